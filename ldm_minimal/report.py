"""What a run shows at its end: four pictures and a summary in words; and the pictures of two benchmarks."""

import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from .data import Dataset
from .evaluate import as_table, reconstruct
from .pipeline import LatentDiffusion, SampleConfig
from .plot import curves, image_grid, save_figure
from .train import Meter


def pictures(model: LatentDiffusion, test: Dataset, config: SampleConfig, folder: Path,
             weak: LatentDiffusion | None = None) -> None:
    """reconstructions.png, samples.png (ten of each class), filmstrip.png. weak: for autoguidance."""
    first = torch.stack([(test.labels == c).nonzero()[0, 0] for c in range(len(model.classes))])  # one of each class
    pairs = torch.cat([test.images[first], reconstruct(model, test.images[first])])
    save_figure(image_grid(pairs, 2, ("image", "rebuilt"), model.classes, zoom=3), folder / "reconstructions.png")
    samples = model.sample(torch.arange(len(model.classes)).repeat_interleave(10), **asdict(config), weak=weak)
    save_figure(image_grid(samples, len(model.classes), model.classes, title=describe(config, weak)), folder / "samples.png")
    save_figure(filmstrip(model, config, weak), folder / "filmstrip.png")


def training_curves(log: dict[str, list[dict]]):
    """Loss of each stage, and the noise-prediction error by range of t. log: stage -> its entries."""
    panels = {}
    for stage, keys, title in (("vae", ("reconstruction", "kl"), "VAE: reconstruction and KL per image"),
                               ("denoiser", ("loss", "eps_mse"), "Denoiser: training loss"),
                               ("perceptual", ("loss",), "Network of the perceptual loss: its loss"),
                               ("classifier", ("loss",), "Classifier: loss")):
        entries = log.get(stage)
        if not entries:
            continue
        steps = [e["step"] for e in entries]
        panels[title] = {key.replace("eps_mse", "noise prediction"): (steps, [e[key] for e in entries]) for key in keys}
        if "by_t" in entries[0]:
            edges = [f"{i / Meter.T_BINS:.1f} < t < {(i + 1) / Meter.T_BINS:.1f}" for i in range(Meter.T_BINS)]
            lines = {edge: (steps, [e["by_t"][i] for e in entries]) for i, edge in enumerate(edges)}
            panels["Noise-prediction error by t"] = lines
    return curves(panels, log_y=tuple(panels))


def race_figure(result: dict):
    """FD over the budget of training, one line for each contestant of race.py."""
    lines: dict[str, tuple[list, list]] = {}
    for row in result["rows"]:
        x, y = lines.setdefault(row["name"], ([], []))
        x.append(row["budget"]), y.append(row["fd"])
    title = "FD on our classifier's features"
    return curves({title: lines}, log_y=(title,), log_x=(title,), x_names={title: "budget of training, minutes"})


def scale_figure(result: dict):
    """The three tables of scale.py: rate over batch, time over width, time over pixels."""
    panels: dict[str, dict] = {}
    for title, x, y in (("images/s", "batch", "images_per_second"), ("ms an image", "width", "ms_per_image"),
                        ("ms an image, by size", "side", "ms_per_image")):
        for row in result[x]:
            line = panels.setdefault(title, {}).setdefault(row["space"], ([], []))
            line[0].append(row[x]), line[1].append(row[y])
    names = {"images/s": "batch", "ms an image": "first channels", "ms an image, by size": "pixels a side"}
    return curves(panels, log_y=tuple(panels), log_x=tuple(panels), x_names=names)


def filmstrip(model: LatentDiffusion, config: SampleConfig, weak: LatentDiffusion | None = None):
    """One denoising run of three classes, decoded as it goes: z_t above, the estimate of z0 below."""
    labels = torch.tensor([7, 8, 0])  # in Fashion-MNIST a sneaker, a bag and a T-shirt
    frames = list(model.trajectory(labels, [0, 1, 2], **vars(config), weak=weak))
    shown = sorted({round(i * (len(frames) - 1) / 9) for i in range(10)})
    rows, names = [], []
    for i in range(len(labels)):
        for part, name in ((0, "z_t"), (1, "estimate")):
            rows += [model.decode(frames[k][part][i : i + 1]) for k in shown]
            names.append(f"{model.classes[labels[i]]}: {name}")
    return image_grid(torch.cat(rows), len(names), names, [f"step {k + 1}" for k in shown],
                      title="From noise to image, decoded at each step")


def describe(config: SampleConfig, weak=None) -> str:
    return f"{config.steps} steps of {config.solver}, {'autoguidance' if weak else 'guidance'} {config.guidance:g}"


def summary(result: dict, folder: Path) -> str:
    """What came out, in words."""
    samples, floor, ceiling = (result["table"][k] for k in ("samples", "floor", "ceiling"))
    counts, quality = result["classes_found"], result["reconstruction"]
    rarest = min(counts, key=counts.get)
    minutes = sum(stage["seconds"] for stage in result["training"].values()) / 60
    changed = {key: value for key, value in result["sampler"].items()
               if key not in ("guidance", "seed") and value != getattr(SampleConfig, key)}
    flags = "".join(f" --{key} {' '.join(map(str, value)) if key == 'interval' else value}" for key, value in changed.items())
    weak = f" --weak {shlex.quote(str(folder / result['weak']))}" if result["weak"] else ""
    return "\n".join([
        as_table(result),
        "",
        f"The autoencoder rebuilds test images at {quality['psnr_db']:.1f} dB PSNR (SSIM {quality['ssim']:.3f}).",
        f"Against the {result['reference']}, {result['n']} samples are at a Frechet distance of {samples['fd']:.3f}",
        f"on our own classifier's features; real training images are at {floor['fd']:.3f}, mere reconstructions at "
        f"{ceiling['fd']:.3f}.",
        f"The classifier agrees with the asked-for class on {100 * samples['class_accuracy']:.0f} % of the samples; "
        f"the class it finds least often is {rarest} ({counts[rarest]} of {result['n']}).",
        f"Distance to the nearest training image, samples over test images: {result['memorisation']:.2f} "
        "(far below 1 would mean copying).",
        f"Training took {minutes:.1f} minutes. Everything is in {folder}.",
        f"Draw more of them: python -m ldm_minimal sample --model {shlex.quote(str(folder))}{weak} "
        f"--guidance {result['sampler']['guidance']:g}{flags}",
    ])
