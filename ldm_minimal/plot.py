"""Pictures of one style: images pixel for pixel, never smoothed; a palette that is safe for color-blind readers."""

import base64
import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, LogLocator, NullLocator
from torch import Tensor

from .checkpoint import atomic
from .data import to_uint8

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLE = {
    "figure.dpi": 110, "savefig.bbox": "tight", "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "image.interpolation": "nearest",
    "image.cmap": "gray", "axes.prop_cycle": matplotlib.cycler(color=COLORS), "legend.frameon": False,
}


class Picture(Figure):
    """A figure that a notebook shows as the last value of a cell, with its text for those who do not see it (`alt`).

    No pyplot, no global state.
    """

    alt = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png", pil_kwargs={"optimize": True})
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": self.alt or "a picture"}
        return data, {"image/png": {"alt": self.alt}}


def use_style() -> None:
    """From here on, whatever matplotlib makes looks like the rest."""
    matplotlib.rcParams.update(STYLE)


def axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.0, 3.0), alt: str = "", **options):
    """(figure, axes) in the style of the chapters: one Axes, or an array of them; `size` in inches for all together."""
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=size, layout="constrained")
        figure.alt = alt
        return figure, figure.subplots(rows, columns, **options)


def as_gray(images: Tensor) -> np.ndarray:
    """(N, 1, H, W), uint8 or floats in [-1, 1] -> (N, H, W) uint8, dark ink on white: 255 - value."""
    images = images if not images.is_floating_point() else to_uint8(images)
    return 255 - images[:, 0].cpu().numpy()


def image_grid(images: Tensor, rows: int, row_names=None, column_names=None, title: str | None = None, zoom: int = 2,
               alt: str = ""):
    """A figure of `rows` rows of images, read row by row. Names label rows on the left and columns on top."""
    pixels = as_gray(images)
    columns = -(-len(pixels) // rows)
    height, width = pixels.shape[1:]
    gap = 2
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    inches = [zoom * side / 100 for side in sheet.shape[::-1]]
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(inches[0], inches[1]), dpi=100)
        figure.alt = alt or title or ""
        ax = figure.add_axes((0, 0, 1, 1))
        ax.imshow(sheet, vmin=0, vmax=255, aspect="equal")
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        middle_y = [(height + gap) * (i + 0.5) - gap / 2 for i in range(rows)]
        middle_x = [(width + gap) * (i + 0.5) - gap / 2 for i in range(columns)]
        ax.set_yticks(middle_y if row_names else [], row_names)
        ax.set_xticks(middle_x if column_names else [], column_names)
        ax.xaxis.tick_top()
        if title:
            ax.set_title(title, pad=8)
    return figure


def log_axis(axis) -> None:
    """Logarithmic, and plain numbers beside it: 1, 2, 5, 10, ..., or even steps where it spans less than a decade."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else AutoLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def curves(panels: dict[str, dict[str, tuple[list, list]]], log_y=(), log_x=(), x_names: dict[str, str] | None = None,
           alt: str = ""):
    """One panel per entry: {panel title: {line name: (x, y)}}. Panels named in `log_y`, `log_x` have logarithmic axes,
    along x with ticks at the points themselves.

    x_names: panel title -> what its x axis counts, where it is not steps.
    """
    figure, places = axes(1, len(panels), (3.6 * len(panels), 3.0), alt, squeeze=False)
    with matplotlib.rc_context(STYLE):
        for ax, (title, lines) in zip(places[0], panels.items()):
            for name, (x, y) in lines.items():
                ax.plot(x, y, label=name, linewidth=1.4, marker="." if len(x) < 10 else None)
            ax.set_title(title)
            ax.set_xlabel((x_names or {}).get(title, "optimizer step"))
            if title in log_y:
                log_axis(ax.yaxis)
            if title in log_x:
                log_axis(ax.xaxis)
                ax.set_xticks(sorted({value for x, _ in lines.values() for value in x}))
            if len(lines) > 1:
                beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(lines) > 3 else {}
                ax.legend(fontsize=8, **beside)
    return figure


def save_figure(figure, path: Path) -> None:
    """PNG, written whole or not at all."""
    with matplotlib.rc_context(STYLE), atomic(path) as part:
        figure.savefig(part, format="png")


BLOCKS = {  # name: (what it says, column, row); the upper row is training, the lower one sampling
    "encoder": ("encoder\nx to z", 1, 1), "scale": ("latent scale\nz0 = z / std", 2, 1),
    "noise": ("add noise\nz0 to z_t", 3, 1), "denoiser": ("denoiser\nU-Net or DiT", 4, 0.5),
    "sampler": ("sampler\nnoise to z0", 3, 0), "guidance": ("guidance\nby the label y", 5.15, 0.5),
    "decoder": ("decoder\nz0 * std to x", 1, 0), "evaluation": ("evaluation", 0, 0),
}


def pipeline(*highlight: str):
    """The whole of latent diffusion as one picture, with the blocks of this chapter in color."""
    if unknown := set(highlight) - BLOCKS.keys():
        raise ValueError(f"unknown block {', '.join(sorted(unknown))}, choose from {', '.join(BLOCKS)}")
    named = ", ".join(highlight)
    figure, ax = axes(size=(8.2, 2.3), alt=(
        "Diagram of latent diffusion. Training: images are encoded, scaled and noised, and the denoiser learns to undo "
        "the noise. Sampling: noise is denoised step by step, guided by a label, and decoded to an image."
        + (f" Highlighted: {named}." if named else "")))
    with matplotlib.rc_context(STYLE):
        ax.axis("off")
        ax.set(xlim=(-0.55, 5.75), ylim=(-0.5, 1.5))
        arrow = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}

        def go(start, end):
            ax.annotate("", end, start, arrowprops=arrow)

        for name, (words, x, y) in BLOCKS.items():
            chosen = name in highlight
            ax.text(x, y, words, ha="center", va="center", fontsize=8.5, color="white" if chosen else "0.15",
                    bbox={"boxstyle": "round,pad=0.45", "facecolor": COLORS[0] if chosen else "0.93",
                          "edgecolor": COLORS[0] if chosen else "0.7"})
        ax.text(0, 1, "images x", ha="center", va="center", fontsize=8.5)
        for a, b in ((0.3, 0.6), (1.4, 1.53), (2.47, 2.63)):
            go((a, 1), (b, 1))
        go((3.4, 1), (3.75, 0.75)), go((3.75, 0.25), (3.4, 0)), go((3.25, 0.2), (3.6, 0.4))
        go((4.7, 0.5), (4.45, 0.5)), go((2.6, 0), (1.4, 0)), go((0.6, 0), (0.36, 0))
        ax.text(2.0, 0.08, "z0", ha="center", fontsize=8.5)
        ax.text(-0.5, 1.38, "training", fontsize=8, color="0.4", style="italic")
        ax.text(-0.5, -0.45, "sampling", fontsize=8, color="0.4", style="italic")
    return figure
