r"""Time to quality: three ways to a model of Fashion-MNIST, side by side, after equal time of training here.

    ours, latents   the complete LDM of the device's default preset: VAE, one encoding of the data, U-Net on latents
    ours, pixels    the same U-Net (UNetConfig) on the 28 x 28 pixels, without a VAE
    diffusers       its UNet2DModel of as many channels and blocks on the pixels, with its DDPMScheduler (defaults:
                    1000 steps, noise prediction) for the noise of training and its DDIMScheduler for sampling

Protocol. Each row is a training of its own, from the seed to the end of its learning-rate schedule: several budgets
are several trainings, and none is scored half-way, at a high learning rate. A budget becomes a number of steps
beforehand, from a few timed ones on a copy (Run.fit; these do not count); `minutes` is what the rest then took by the
clock: VAE, encoding, steps, state files. VAE and denoiser share a budget as they share the preset's minutes (or steps,
where it sets none).

Equal for all: images, their order, batch size, precision, AdamW, learning rate, warm-up, clipping, EMA, hidden labels
(train.train runs all three; diffusers' manual has a lower learning rate and no EMA), samples, their labels and noise,
steps and guidance. Each its own: network, noise schedule, loss, sampler (ours: the preset's solver). Samples are drawn
after the clock has stopped, and compared with all test images: FD and KID on our classifier's features.
"""

import time
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from . import data
from .baseline import DiffusersModel, DiffusersUNet, NoAutoencoder, diffusers_loss
from .bench import SIDE, describe_machine, size
from .evaluate import balanced, classify, draw, score
from .latents import encode_moments
from .pipeline import WEIGHTS, LatentDiffusion, SampleConfig, build_denoiser, load_classifier
from .presets import PRESETS, RunConfig, default_preset
from .run import Run
from .train import TrainConfig
from .unet import UNet

ENDLESS = 10**9  # steps: time is the limit


class Racer(Run):
    """A Run with a stop-watch that stands still while steps are timed."""

    started = 0.0
    record = False  # on a GPU, too, all contestants run alike

    def fit(self, *stage) -> TrainConfig:
        before = time.perf_counter()
        config = super().fit(*stage)
        self.started += time.perf_counter() - before
        return config

    @property
    def minutes(self) -> float:
        return (time.perf_counter() - self.started) / 60


def lasting(config: TrainConfig, minutes: float) -> TrainConfig:
    """Training for so many minutes; Run.fit makes steps of them."""
    return replace(config, steps=ENDLESS, minutes=max(minutes, 1e-3))  # 0 would mean no limit


def train_latents(run: Racer, minutes: float) -> LatentDiffusion:
    vae, denoiser = run.config.vae_train, run.config.denoiser_train
    a, b = (vae.minutes, denoiser.minutes) if vae.minutes and denoiser.minutes else (vae.steps, denoiser.steps)
    run.config = replace(run.config, vae_train=lasting(vae, minutes * a / (a + b)))
    trained = run.train_vae()
    for _ in range(2):  # how long will the encoding take? The first chunk is the warm-up
        before = run.minutes
        chunk = next(encode_moments(trained, run.images.images, precision=run.precision)).cpu()  # which waits for a GPU
    after = run.minutes + (run.minutes - before) * len(run.images) / len(chunk)
    run.config = replace(run.config, denoiser_train=lasting(denoiser, minutes - after))
    return run.train_denoiser(trained).to(run.device, run.precision)


def train_pixels(run: Racer, minutes: float) -> LatentDiffusion:
    config, shape = run.config, (run.config.vae.in_channels, SIDE, SIDE)
    images, labels = run.images.images.to(run.device), run.images.labels.to(run.device)

    def objective(denoiser, index, noise):
        return {"loss": denoiser.loss(data.to_float(images[index]), labels[index], noise)}

    torch.manual_seed(config.seed)
    denoiser = build_denoiser(UNet(replace(config.unet, in_channels=shape[0])), config.denoiser)
    trained = run.stage("denoiser", denoiser, objective, lasting(config.denoiser_train, minutes)).model
    model = LatentDiffusion(NoAutoencoder(), trained, 1.0, shape, config.dataset, config.denoiser)
    return model.to(run.device, run.precision)


def train_diffusers(run: Racer, minutes: float) -> DiffusersModel:
    from diffusers import DDIMScheduler, DDPMScheduler

    config, shape, scheduler = run.config, (run.config.vae.in_channels, SIDE, SIDE), DDPMScheduler()
    images, labels = run.images.images.to(run.device), run.images.labels.to(run.device)

    def objective(net, index, noise):
        x = data.to_float(images[index])
        return {"loss": diffusers_loss(net, scheduler, x, labels[index], config.denoiser.drop, noise)}

    torch.manual_seed(config.seed)
    net = DiffusersUNet(replace(config.unet, in_channels=shape[0]))
    trained = run.stage("denoiser", net, objective, lasting(config.denoiser_train, minutes)).model
    return DiffusersModel(trained, DDIMScheduler.from_config(scheduler.config), shape, config.dataset, run.precision)


CONTESTANTS = {"latents": ("ours, latents", train_latents), "pixels": ("ours, pixels", train_pixels),
               "diffusers": ("diffusers", train_diffusers)}


def race(device: torch.device, precision: str, minutes=(10.0,), n=2000, contestants=tuple(CONTESTANTS), keep=None,
         config: RunConfig | None = None) -> dict:
    """The table, printed and returned for JSON. minutes: the budgets; config: by default the device's preset.

    keep: called with the table so far after each contestant, so that an interruption loses one at most
    """
    config = replace(config or PRESETS[default_preset(device)], net="unet")
    train, test = (data.load(config.dataset, split) for split in ("train", "test"))
    if not all(0 < m < inf for m in minutes) or not 20 <= n <= len(test):
        raise ValueError(f"a race needs more than 0 minutes and 20 ... {len(test)} samples, got {minutes} and {n}")
    sampler = replace(config.sample, guidance=SampleConfig.guidance)  # classifier-free for all: a preset may have autoguidance
    result = {"machine": describe_machine(device, precision), "n": n, "sampler": vars(sampler), "rows": []}
    chosen = dict(CONTESTANTS[key] for key in contestants)
    try:
        from diffusers import UNet2DModel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: something that diffusers needs is broken
        if chosen.pop("diffusers", None):
            print(f"diffusers is left out: it does not import here ({type(error).__name__})")
    classifier = load_classifier(WEIGHTS / f"classifier-{config.dataset}.json").to(device)
    reference, some = classify(classifier, test.images)[0], balanced(test.labels, n)

    real = balanced(train.labels, n)
    result["real images"], *_ = score(classifier, train.images[real], train.labels[real], reference, reference[some])
    for budget, (name, contestant) in product(sorted(minutes), chosen.items()):
        print(f"\n{name}, {budget:g} minutes", flush=True)
        with TemporaryDirectory() as folder:
            run = Racer(Path(folder) / "run", replace(config, early=0.0), device, precision)
            run.start(command="bench race")
            run.started = time.perf_counter()
            model, spent = contestant(run, budget), run.minutes
            stages = {stage: run.entries(stage)[-1] for stage in ("vae", "denoiser") if run.entries(stage)}
        images, labels, cost = draw(model, n, sampler)
        row, *_ = score(classifier, images, labels, reference, reference[some])
        last, parts = stages["denoiser"], [getattr(model, part) for part in ("vae", "denoiser") if hasattr(model, part)]
        seen = last["step"] * config.denoiser_train.batch
        result["rows"].append({
            "name": name, "space": "x".join(map(str, model.latent_shape)), "parameters": sum(map(size, parts)),
            "budget": budget, "minutes": spent, "images_seen": seen, "images_per_second": seen / last["seconds"],
            "sampling_images_per_second": cost["images_per_second"], "sampling_seconds": cost["seconds"],
            "stages": {k: {key: v[key] for key in ("step", "seconds", "loss")} for k, v in stages.items()},
        } | row)
        print(f"{name}: FD {row['fd']:.3f} after {spent:.2f} minutes", flush=True)
        if keep:
            keep(result)
    print("\n" + as_text(result))
    return result


READING = """
Lower FD and KID are better: {} samples against all test images, on our own classifier's features, so that rows compare
with each other and not with papers. Images seen and images/s are the denoiser's; the minutes are all of the training,
for latents with VAE and encoding. One seed: a small difference may be chance."""


def as_text(result: dict) -> str:
    columns = {"space": ("space", ""), "parameters": ("parameters", ","), "images_per_second": ("images/s", ".0f"),
               "images_seen": ("images seen", ","), "minutes": ("minutes", ".2f"), "fd": ("FD", ".3f"),
               "kid_x1000": ("KID x1000", ".2f"), "class_accuracy": ("accuracy", ".3f"),
               "sampling_images_per_second": ("drawn/s", ".1f")}
    lines = [" " * 15 + "".join(f"{title:>12}" for title, _ in columns.values())]
    for row in [*result["rows"], {"name": "real images"} | result["real images"]]:
        cells = [format(row[key], form) if key in row else "" for key, (_, form) in columns.items()]
        lines.append(f"{row['name']:15}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines) + "\n" + READING.format(result["n"])
