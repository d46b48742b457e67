r"""How the cost of a training step grows: with the batch, with the width, with the size of the images.

    batch   the preset's U-Net on latents of 28 x 28 images, batch 16 ... 512
    width   the same at the preset's batch, first channels 32 ... 128, each further resolution twice as many
    size    the preset's U-Net at images of 28, 64, 128 pixels a side: on latents (f = 4: 7, 16, 32) and on the pixels

Protocol: that of bench.py: the package's own training step, medians of rows that take turns within a table, FLOP as
counted, memory as held. The data are random numbers of the right shape: the work does not depend on the content. A
bigger image gets a smaller batch (at most as many positions in all as four of the preset's batches of 28 x 28 images
have), so look at the cost of one image. The network is the same at every size, though one would give it more resolutions for bigger
images: its attention then sees N = (side / 2)^2 positions and costs N^2. Left out: the VAE's own steps.

The exponent k of cost ~ pixels^k is the slope of a straight line through the logarithms: 1 where each pixel costs the
same, up to 2 where attention dominates, below 1 where small images cannot fill the machine.
"""

from dataclasses import replace
from math import log
from statistics import linear_regression

import torch

from .bench import Work, describe_machine, machine_peak, measure
from .presets import PRESETS, RunConfig, default_preset
from .unet import UNet


def exponent(x, y) -> float:
    """k of y ~ x^k, by least squares through the logarithms."""
    return linear_regression([log(v) for v in x], [log(v) for v in y]).slope


def scale(device: torch.device, precision: str, seconds=2.0, config: RunConfig | None = None,
          batches=(16, 32, 64, 128, 256, 512), widths=(32, 64, 96, 128), pixels=(28, 64, 128), **peak_sizes) -> dict:
    """Three tables and the exponents, printed and returned for JSON. config: by default the device's preset."""
    config = config or PRESETS[default_preset(device)]
    work, n, factor = Work(config, device, precision), config.denoiser_train.batch, config.vae.factor
    machine = describe_machine(device, precision)
    peak = machine_peak(device, precision, seconds / 4, **peak_sizes)
    print(f"measured peak: {peak['gflops']:.0f} GFLOP/s")
    result = {"machine": machine, "seconds": seconds, "peak": peak, "exponents": {}}

    def table(title: str, key: str, jobs: dict[str, tuple]) -> None:
        """jobs: name -> (space, value of `key`, batch, UNetConfig, shape)."""
        calls = {name: (batch, 1, work.train_denoiser, UNet, unet, shape, batch)
                 for name, (_, _, batch, unet, shape) in jobs.items()}
        rows = measure(title, calls, seconds, device, peak["gflops"])
        result[key] = [{"name": name, "space": space, key: value, "batch": batch, "shape": shape,
                        "ms_per_image": 1000 / rows[name]["images_per_second"]} | rows[name]
                       for name, (space, value, batch, _, shape) in jobs.items()]

    def fit(what: str, rows: list[dict], x) -> None:
        """The exponents of time and of FLOP over x(row), printed and kept."""
        both = {name: exponent([x(row) for row in rows], [row[key] for row in rows])
                for name, key in (("time", "ms_per_image"), ("FLOP", "gflop_per_image"))}
        result["exponents"][what] = both
        print(f"  {what}: time of an image ~ (...)^{both['time']:.2f}, FLOP ~ (...)^{both['FLOP']:.2f}", flush=True)

    table("training over batch, latents", "batch", {
        f"batch {batch}": ("latents", batch, batch, config.unet, work.latent) for batch in batches})

    doubled = {width: tuple(width * 2**level for level in range(len(config.unet.channels))) for width in widths}
    table("training over width, latents", "width", {
        f"channels {channels}": ("latents", width, n, replace(config.unet, channels=channels), work.latent)
        for width, channels in doubled.items()})
    fit("first channels", result["width"], lambda row: row["width"])

    jobs, positions = {}, 4 * n * work.latent[1] ** 2
    for space, divisor, channels in (("latents", factor, config.vae.latent_channels),
                                     ("pixels", 1, config.vae.in_channels)):
        for side in pixels:
            shape = (channels, side // divisor, side // divisor)
            batch = max(1, min(n, positions // (shape[1] * shape[2])))
            jobs[f"{side} px, {space} {shape}"] = (space, side, batch, config.unet, shape)
    table("training over size", "side", jobs)
    for space in ("latents", "pixels"):
        fit(f"pixels of the image, {space}", [row for row in result["side"] if row["space"] == space],
            lambda row: row["side"] ** 2)
    fit("positions that the U-Net sees, both", result["side"], lambda row: row["shape"][1] * row["shape"][2])
    return result
