r"""How fast this machine trains and samples: latents against pixels, solver against solver, ours against diffusers.

    ms/step      median over about `seconds` seconds after a warm-up; the rows of one table take turns, so what disturbs
                 the machine disturbs them alike, and ratios within a table mean more than the times do
    GFLOP/image  what torch.utils.flop_counter counts in one call: a multiply-add is 2, a padded pixel counts like any
    of peak      the row's GFLOP/s over the best that a bare matrix product or convolution reaches here, in this precision
    MiB          the most that PyTorch held at once, from building the networks to the end of the second call:
                 max_memory_allocated on a GPU, elsewhere the allocations minus the releases that its profiler saw

A training step is the package's own (train.train), on random data: autocast, loss, backward, clip, AdamW, EMA.
Sampling is LatentDiffusion.sample in the model's precision, with the decoder in float32 (as in use).
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import inf
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .data import to_float
from .pipeline import NETS, LatentDiffusion, build_denoiser
from .precision import DTYPES, autocast
from .presets import PRESETS, RunConfig, default_preset
from .run import device_name, versions
from .sampler import SOLVERS
from .train import TrainConfig, TrainState, train
from .unet import UNet, UNetConfig
from .vae import VAE, vae_loss

SIDE = 28  # of an image
Call = Callable[[], object]


# -- measuring ----------------------------------------------------------------------------------------------------


def median_seconds(calls: dict[str, Call], seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds of one call of each, measured in turns for about `seconds` each, and at least three times."""

    def clock(call: Call, repeats: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    for call in calls.values():
        clock(call)
    repeats = {name: max(1, int(0.1 / clock(call))) for name, call in calls.items()}  # a GPU is waited for every 0.1 s
    times, end = {name: [] for name in calls}, time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            times[name].append(clock(call, repeats[name]))
    return {name: median(values) for name, values in times.items()}


def count_flop(call: Call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_mib(call: Call, device: torch.device) -> tuple[object, float]:
    """(what `call` returns, the most MiB that it held at once, of what was allocated within it)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return result, max(accumulate(size for _, size in changes), default=0) / 2**20


def machine_peak(device: torch.device, precision: str, seconds: float, sides=None, maps=((192, 7), (192, 14), (192, 28))) -> dict:
    """GFLOP/s of matrix products (side, side) and of 3x3 convolutions (128, channels, side, side), and the best of each."""
    where = {"device": device, "dtype": DTYPES.get(precision, torch.float32)}
    calls = {}
    for n in sides or ((4096, 8192) if device.type == "cuda" else (1024, 2048)):
        calls[f"matmul {n}x{n}"] = partial(torch.mm, torch.randn(n, n, **where), torch.randn(n, n, **where))
    for channels, side in maps:
        for name, order in ("", torch.contiguous_format), (" channels last", torch.channels_last):
            x = torch.randn(128, channels, side, side, **where).to(memory_format=order)
            weight = torch.randn(channels, channels, 3, 3, **where).to(memory_format=order)
            calls[f"convolution {channels}x{side}x{side}{name}"] = partial(F.conv2d, x, weight, padding=1)
    rates = {name: count_flop(calls[name]) / s / 1e9 for name, s in median_seconds(calls, seconds, device).items()}
    best = {kind: max(rate for name, rate in rates.items() if name.startswith(kind)) for kind in ("matmul", "convolution")}
    return {"sizes_gflops": rates, "matmul_gflops": best["matmul"], "convolution_gflops": best["convolution"],
            "gflops": max(best.values())}


@dataclass(frozen=True)
class Job:
    """One row: make() builds the networks and returns the call, which takes `steps` steps for `images` images."""

    make: Callable[[], Call]
    images: int
    steps: int = 1


def measure(title: str, jobs: dict[str, Job], seconds: float, device: torch.device, peak: float) -> dict[str, dict]:
    """The rows of one table, printed and returned. peak: GFLOP/s of the machine."""

    def build(job: Job) -> tuple[Call, int]:
        call = job.make()
        call()
        return call, count_flop(call)

    built = {name: peak_mib(partial(build, job), device) for name, job in jobs.items()}
    times = median_seconds({name: call for name, ((call, _), _) in built.items()}, seconds, device)
    print(f"\n{title:40}{'images':>8}{'ms/step':>10}{'images/s':>10}{'GFLOP/image':>13}{'of peak':>9}{'MiB':>8}")
    rows = {}
    for name, ((_, flop), mib) in built.items():
        job, s = jobs[name], times[name]
        row = rows[name] = {
            "images": job.images, "steps": job.steps, "seconds": s, "steps_per_second": job.steps / s, "images_per_second": job.images / s,
            "gflop_per_image": flop / job.images / 1e9, "share_of_peak": flop / s / 1e9 / peak, "memory_mib": mib}
        print(f"{name:40}{job.images:8}{1000 * s / job.steps:10.1f}{row['images_per_second']:10.0f}{row['gflop_per_image']:13.3f}"
              f"{100 * row['share_of_peak']:7.0f} %{mib:8.0f}", flush=True)
    return rows


# -- what is measured ---------------------------------------------------------------------------------------------


class NoAutoencoder(nn.Module):
    """Pixel diffusion is latent diffusion with the identity for an autoencoder."""

    def decode(self, z: Tensor) -> Tensor:
        return z


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel as net(zt, t, y), with our channels, blocks and attention: within 10 % of our parameters.

    It takes only sizes that halve evenly: 7x7 is padded to 8x8 on the way in and cut on the way out.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        from diffusers import UNet2DModel

        self.num_classes, lower = config.num_classes, len(config.channels) - 1
        last = "Attn" if config.attention else ""
        self.net = UNet2DModel(
            in_channels=config.in_channels, out_channels=config.in_channels, block_out_channels=config.channels,
            layers_per_block=config.blocks, down_block_types=("DownBlock2D",) * lower + (f"{last}DownBlock2D",),
            up_block_types=(f"{last}UpBlock2D",) + ("UpBlock2D",) * lower, attention_head_dim=32,
            norm_num_groups=min(32, config.channels[0] // 4), num_class_embeds=config.num_classes + 1)
        self.multiple = 2**lower

    def forward(self, zt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = zt.shape[2:]
        zt = F.pad(zt, (0, -width % self.multiple, 0, -height % self.multiple))
        return self.net(zt, 1000 * t, class_labels=y).sample[:, :, :height, :width]


@dataclass(frozen=True)
class Work:
    """The calls that are timed, for one RunConfig on one device."""

    config: RunConfig
    device: torch.device
    precision: str

    @property
    def latent(self) -> tuple[int, int, int]:
        side = SIDE // self.config.vae.factor
        return self.config.vae.latent_channels, side, side

    def steps_of(self, model: nn.Module, objective, config: TrainConfig) -> Call:
        """The next step of the package's training loop, which here never ends."""
        state = TrainState(model.to(self.device), config, self.precision)
        return partial(next, train(state, objective, 2 * config.batch, replace(config, steps=10**9)))

    def train_vae(self) -> Call:
        config = self.config.vae
        shape = (2 * self.config.vae_train.batch, config.in_channels, SIDE, SIDE)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

        def objective(vae, index, noise):
            reconstruction, kl = vae_loss(vae, to_float(images[index]), noise)
            return {"loss": reconstruction + config.beta * kl}

        return self.steps_of(VAE(config), objective, self.config.vae_train)

    def train_denoiser(self, kind, config, shape: tuple[int, ...], batch: int) -> Call:
        z0 = torch.randn(2 * batch, *shape, device=self.device)
        labels = torch.arange(2 * batch, device=self.device) % config.num_classes
        denoiser = build_denoiser(kind(replace(config, in_channels=shape[0])), self.config.denoiser)
        return self.steps_of(denoiser, lambda model, index, noise: {"loss": model.loss(z0[index], labels[index], noise)},
                             replace(self.config.denoiser_train, batch=batch))

    def sample(self, vae: nn.Module, shape: tuple[int, ...], n: int, solver: str, guidance: float) -> Call:
        """Our U-Net's samples of this shape, decoded by `vae`."""
        denoiser = build_denoiser(UNet(replace(self.config.unet, in_channels=shape[0])), self.config.denoiser)
        model = LatentDiffusion(vae, denoiser, 1.0, shape, self.config.dataset, self.config.denoiser).to(self.device, self.precision)
        return partial(model.sample, torch.arange(n) % denoiser.null, self.config.sample.steps, guidance, solver)

    def sample_diffusers(self, shape: tuple[int, ...], n: int) -> Call:
        """The loop of diffusers' manual around its U-Net and its DDIMScheduler, without guidance and decoding."""
        from diffusers import DDIMScheduler

        net = DiffusersUNet(replace(self.config.unet, in_channels=shape[0])).to(self.device).eval()
        scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        labels = torch.arange(n, device=self.device) % net.num_classes

        @torch.no_grad()
        def call() -> Tensor:
            z = torch.randn(n, *shape, device=self.device)
            scheduler.set_timesteps(self.config.sample.steps)
            for t in scheduler.timesteps:
                with autocast(self.device, self.precision):
                    out = net(z, (t / 1000).expand(n).to(self.device), labels)
                z = scheduler.step(out.float(), t, z).prev_sample
            return z.cpu()

        return call


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def bench(device: torch.device, precision: str, seconds: float = 2.0, config: RunConfig | None = None, **peak_sizes) -> dict:
    """All tables, printed as they come and returned for JSON. config: by default the preset that `train` would take."""
    config = config or PRESETS[default_preset(device)]
    work, n = Work(config, device, precision), config.denoiser_train.batch
    few, steps, latent, pixel = max(1, n // 4), config.sample.steps, work.latent, (config.vae.in_channels, SIDE, SIDE)
    machine = versions() | {"device": device_name(device), "threads": torch.get_num_threads(), "precision": precision, "seconds": seconds}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    peak = machine_peak(device, precision, seconds / 4, **peak_sizes)
    print(f"measured peak: matrix product {peak['matmul_gflops']:.0f}, convolution {peak['convolution_gflops']:.0f} GFLOP/s", flush=True)
    table = partial(measure, seconds=seconds, device=device, peak=peak["gflops"])
    result = {"machine": machine, "peak": peak, "ratios": {}, "parameters": {
        "vae": size(VAE(config.vae)), "unet": size(UNet(config.unet)), "dit": size(NETS["dit"][0](config.dit))}}

    def ratio(name: str, rows: dict, above: str, below: str) -> None:
        result["ratios"][name] = value = rows[above]["images_per_second"] / rows[below]["images_per_second"]
        print(f"  {name}: {value:.2f}x")

    result["training"] = table("training", {
        "VAE": Job(work.train_vae, config.vae_train.batch),
        "U-Net": Job(partial(work.train_denoiser, UNet, config.unet, latent, n), n),
        "DiT": Job(partial(work.train_denoiser, NETS["dit"][0], config.dit, latent, n), n)})

    rows = result["latents and pixels"] = table("one U-Net on latents and on pixels", {
        f"training {latent}": Job(partial(work.train_denoiser, UNet, config.unet, latent, few), few),
        f"training {pixel}": Job(partial(work.train_denoiser, UNet, config.unet, pixel, few), few),
        f"sampling {latent}, decoded": Job(lambda: work.sample(VAE(config.vae), latent, few, "ddim", 1.0), few, steps),
        f"sampling {pixel}": Job(lambda: work.sample(NoAutoencoder(), pixel, few, "ddim", 1.0), few, steps)})
    ratio("latents / pixels, training", rows, f"training {latent}", f"training {pixel}")
    ratio("latents / pixels, sampling", rows, f"sampling {latent}, decoded", f"sampling {pixel}")

    result["solvers"] = table(f"{steps} steps of a solver, guided, decoded", {
        name: Job(partial(lambda name: work.sample(VAE(config.vae), latent, n // 2, name, 2.0), name), n // 2, steps) for name in SOLVERS})

    try:
        theirs = DiffusersUNet(replace(config.unet, in_channels=latent[0]))
    except (ImportError, RuntimeError) as error:  # RuntimeError: diffusers is there, but something that it imports is broken
        print(f"\nours against diffusers: left out, diffusers cannot be imported here ({type(error).__name__})")
        return result
    result["parameters"]["diffusers"] = size(theirs)
    even = (latent[0], *(-(-side // theirs.multiple) * theirs.multiple for side in latent[1:]))
    rows = result["diffusers"] = table("ours against diffusers, unguided DDIM", {
        f"training, ours {latent}": Job(partial(work.train_denoiser, UNet, config.unet, latent, n), n),
        f"training, ours {even}": Job(partial(work.train_denoiser, UNet, config.unet, even, n), n),
        f"training, diffusers {even}": Job(partial(work.train_denoiser, DiffusersUNet, config.unet, latent, n), n),
        f"sampling, ours {latent}": Job(lambda: work.sample(NoAutoencoder(), latent, n // 2, "ddim", 1.0), n // 2, steps),
        f"sampling, ours {even}": Job(lambda: work.sample(NoAutoencoder(), even, n // 2, "ddim", 1.0), n // 2, steps),
        f"sampling, diffusers {even}": Job(partial(work.sample_diffusers, latent, n // 2), n // 2, steps)})
    print(f"  parameters: ours {result['parameters']['unet']:,}, diffusers {size(theirs):,}; {latent[1:]} is padded to {even[1:]} for diffusers")
    for what in ("training", "sampling"):
        ratio(f"ours / diffusers, {what}", rows, f"{what}, ours {latent}", f"{what}, diffusers {even}")
        ratio(f"ours / diffusers, {what}, both on {even}", rows, f"{what}, ours {even}", f"{what}, diffusers {even}")
    return result


def minutes_to_expect(device: torch.device, precision: str, config: RunConfig | None = None, seconds: float = 1.5) -> str:
    """The minutes of `train` with this device's preset, in words: steps times the time of a step, measured over a few.

    Where TrainConfig.minutes limits a stage, so it does here. The rest is counted as forward passes, each a third of a
    training step: the samples through the denoiser (twice, for guidance), 60,000 images through the encoder and 10,000
    through the whole autoencoder.
    """
    config = config or PRESETS[default_preset(device)]
    work, (kind, _) = Work(config, device, precision), NETS[config.net]
    stages = {"VAE": config.vae_train, "denoiser": config.denoiser_train}
    per_step = median_seconds({
        "VAE": work.train_vae(),
        "denoiser": work.train_denoiser(kind, getattr(config, config.net), work.latent, config.denoiser_train.batch)}, seconds, device)
    minutes = {name: min(stage.steps * per_step[name] / 60, stage.minutes or inf) for name, stage in stages.items()}
    passes = {"VAE": 60_000 / 2 + 10_000, "denoiser": 2 * config.samples * config.sample.steps}
    minutes["the rest"] = sum(passes[name] / stage.batch * per_step[name] / 3 / 60 for name, stage in stages.items())
    shown = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    return f"about {sum(minutes.values()):.0f} (an estimate, measured over a few steps: {shown})"
