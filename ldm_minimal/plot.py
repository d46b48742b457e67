"""Pictures of one style: images pixel for pixel, never smoothed; a palette that is safe for colour-blind readers."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
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
    """A figure that a notebook shows as the last value of a cell; no pyplot, no global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, format="png")
        return buffer.getvalue()


def as_gray(images: Tensor) -> np.ndarray:
    """(N, 1, H, W), uint8 or floats in [-1, 1] -> (N, H, W) uint8, dark ink on white: 255 - value."""
    images = images if not images.is_floating_point() else to_uint8(images)
    return 255 - images[:, 0].cpu().numpy()


def image_grid(images: Tensor, rows: int, row_names=None, column_names=None, title: str | None = None, zoom: int = 2):
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
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(sheet, vmin=0, vmax=255, aspect="equal")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        middle_y = [(height + gap) * (i + 0.5) - gap / 2 for i in range(rows)]
        middle_x = [(width + gap) * (i + 0.5) - gap / 2 for i in range(columns)]
        axes.set_yticks(middle_y if row_names else [], row_names)
        axes.set_xticks(middle_x if column_names else [], column_names)
        axes.xaxis.tick_top()
        if title:
            axes.set_title(title, pad=8)
    return figure


def curves(panels: dict[str, dict[str, tuple[list, list]]], log_y=(), log_x=(), x_names: dict[str, str] | None = None):
    """One panel per entry: {panel title: {line name: (x, y)}}. Panels named in `log_y`, `log_x` have logarithmic axes.

    x_names: panel title -> what its x axis counts, where it is not steps.
    """
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(3.6 * len(panels), 3.0), layout="constrained")
        for place, (title, lines) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), place + 1)
            for name, (x, y) in lines.items():
                axes.plot(x, y, label=name, linewidth=1.4, marker="." if len(x) < 10 else None)
            axes.set_title(title)
            axes.set_xlabel((x_names or {}).get(title, "optimizer step"))
            if title in log_y:
                axes.set_yscale("log")
            if title in log_x:
                axes.set_xscale("log")
            if len(lines) > 1:
                beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(lines) > 3 else {}
                axes.legend(fontsize=8, **beside)
    return figure


def save_figure(figure, path: Path) -> None:
    """PNG, written whole or not at all."""
    with matplotlib.rc_context(STYLE), atomic(path) as part:
        figure.savefig(part, format="png")
