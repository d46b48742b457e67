r"""How fast this machine trains and samples: latents against pixels, solver against solver, ours against diffusers.

    ms/step      median over about `seconds` seconds after a warm-up; the rows of a table take turns, so that what
                 disturbs the machine disturbs them alike: trust ratios within a table more than times
    GFLOP/image  as torch.utils.flop_counter counts one call: a multiply-add is 2, a padded pixel counts like any other
    of peak      GFLOP/s of the row over the best that a bare matrix product or convolution reached, in this precision
    MiB          the most held at once, from building the networks to the second training step or the first samples:
                 max_memory_allocated on a GPU; elsewhere the sum of all tensors alive, without a kernel's scratch

A training step is the package's own (train.train) on random data: autocast, loss, backward, clip, AdamW, EMA.
Sampling is LatentDiffusion.sample, with its decoder in float32.
"""

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .baseline import DiffusersUNet, NoAutoencoder, diffusers_ddim
from .data import to_float
from .dit import DiT
from .pipeline import NETS, LatentDiffusion, build_denoiser
from .precision import DTYPES, device_name
from .presets import PRESETS, RunConfig, default_preset
from .run import versions
from .sampler import SOLVERS
from .train import TrainConfig, TrainState, train
from .unet import UNet
from .vae import VAE, vae_loss

SIDE = 28  # of an image
Call = Callable[[], object]


def median_seconds(calls: dict[str, Call], seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds of one call of each, measured in turns for about `seconds` each, and at least three times."""

    def clock(call: Call, repeats: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    block = min(0.1, seconds / 3)  # short calls are timed in blocks: training does not wait for a GPU at each step
    repeats = {name: max(1, int(block / clock(call))) for name, call in calls.items()}  # this is the warm-up, too
    times, end = {name: [] for name in calls}, time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            times[name].append(clock(call, repeats[name]))
    return {name: median(values) for name, values in times.items()}


def count_flop(call: Call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Alive(TorchDispatchMode):
    """Follows the memory of every tensor made within it until it is released; `peak`: the most bytes at once."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.storages:
                self.storages[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.release, id(storage)).atexit = False
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
        return out

    def release(self, key: int) -> None:
        self.held -= self.storages.pop(key)


def with_peak_mib(call: Call, device: torch.device) -> tuple[object, float]:
    """(what `call` returns, the most MiB held at once of what was made within it)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return call(), (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with Alive() as alive:
        return call(), alive.peak / 2**20


def machine_peak(device: torch.device, precision: str, seconds: float, sides=None, maps=((192, 7), (192, 28))) -> dict:
    """GFLOP/s of matrix products (side, side) and 3x3 convolutions of (128, channels, side, side); the best of all."""
    where, calls = {"device": device, "dtype": DTYPES.get(precision, torch.float32)}, {}
    for n in sides or ((4096, 8192) if device.type == "cuda" else (1024, 2048)):
        calls[f"matmul {n}x{n}"] = partial(torch.mm, torch.randn(n, n, **where), torch.randn(n, n, **where))
    for channels, side in maps:
        x, kernel = torch.randn(128, channels, side, side, **where), torch.randn(channels, channels, 3, 3, **where)
        name = f"convolution {channels}x{side}x{side}"
        calls[name] = partial(F.conv2d, x, kernel, padding=1)
        x, kernel = (a.to(memory_format=torch.channels_last) for a in (x, kernel))
        calls[f"{name}, channels last"] = partial(F.conv2d, x, kernel, padding=1)
    rates = {name: count_flop(calls[name]) / s / 1e9 for name, s in median_seconds(calls, seconds, device).items()}
    best = {kind: max(r for name, r in rates.items() if name.startswith(kind)) for kind in ("matmul", "convolution")}
    return {"gflops": max(best.values()), **best, "sizes": rates}


def measure(title: str, jobs: dict[str, tuple], seconds: float, device: torch.device, peak: float) -> dict[str, dict]:
    """One table, printed and returned. A job is (images, steps, make, *arguments); make(*arguments) gives the call."""

    def build(images, steps, make, *arguments) -> tuple[Call, int]:
        call = make(*arguments)
        if steps == 1:  # a training step: only from the second on AdamW's moments are there from start to end
            call()
        return call, count_flop(call)

    built = {name: with_peak_mib(partial(build, *job), device) for name, job in jobs.items()}
    times = median_seconds({name: call for name, ((call, _), _) in built.items()}, seconds, device)
    print(f"\n{title:38}{'images':>8}{'ms/step':>10}{'images/s':>10}{'GFLOP/image':>13}{'of peak':>9}{'MiB':>8}")
    rows = {}
    for name, s in times.items():
        (images, steps, *_), ((_, flop), mib) = jobs[name], built[name]
        rows[name] = {
            "images": images, "steps": steps, "seconds": s, "steps_per_second": steps / s,
            "images_per_second": images / s, "gflop_per_image": flop / images / 1e9,
            "share_of_peak": flop / s / 1e9 / peak, "memory_mib": mib}
        print(f"{name:38}{images:8}{1000 * s / steps:10.1f}{images / s:10.0f}{flop / images / 1e9:13.3f}"
              f"{flop / s / 1e7 / peak:7.0f} %{mib:8.0f}", flush=True)
    return rows


@dataclass(frozen=True)
class Work:
    """What is timed, for one RunConfig on one device: each method builds networks and returns a call."""

    config: RunConfig
    device: torch.device
    precision: str
    record: bool = True  # see train.train

    @property
    def latent(self) -> tuple[int, int, int]:
        return (self.config.vae.latent_channels,) + 2 * (SIDE // self.config.vae.factor,)

    def training(self, model: nn.Module, objective, config: TrainConfig) -> Call:
        """The next step of the package's training loop, over 2 * batch images and without end."""
        state = TrainState(model.to(self.device), config, self.precision)
        endless = replace(config, steps=10**9)
        return partial(next, train(state, objective, 2 * config.batch, endless, record=self.record))

    def train_vae(self) -> Call:
        config, batch = self.config.vae, self.config.vae_train.batch
        shape = (2 * batch, config.in_channels, SIDE, SIDE)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

        def objective(vae, index, noise):
            reconstruction, kl = vae_loss(vae, to_float(images[index]), noise)
            return {"loss": reconstruction + config.beta * kl}

        return self.training(VAE(config), objective, self.config.vae_train)

    def train_denoiser(self, kind, config, shape: tuple[int, ...], batch: int) -> Call:
        z0 = torch.randn(2 * batch, *shape, device=self.device)
        labels = torch.arange(2 * batch, device=self.device) % config.num_classes
        denoiser = build_denoiser(kind(replace(config, in_channels=shape[0])), self.config.denoiser)
        config = replace(self.config.denoiser_train, batch=batch)
        return self.training(denoiser, lambda d, index, rng: {"loss": d.loss(z0[index], labels[index], rng)}, config)

    def sample(self, shape: tuple[int, ...], n: int, decoded: bool, solver="ddim", guidance=1.0) -> Call:
        vae = VAE(self.config.vae) if decoded else NoAutoencoder()
        denoiser = build_denoiser(UNet(replace(self.config.unet, in_channels=shape[0])), self.config.denoiser)
        model = LatentDiffusion(vae, denoiser, 1.0, shape).to(self.device, self.precision)
        return partial(model.sample, torch.arange(n) % denoiser.null, self.config.sample.steps, guidance, solver)

    def sample_diffusers(self, shape: tuple[int, ...], n: int) -> Call:
        """diffusers_ddim on an untrained network."""
        from diffusers import DDIMScheduler

        net = DiffusersUNet(replace(self.config.unet, in_channels=shape[0])).to(self.device).eval()
        scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        labels = torch.arange(n, device=self.device) % net.num_classes
        noise = partial(torch.randn, n, *shape, device=self.device)
        return lambda: diffusers_ddim(net, scheduler, noise(), labels, self.config.sample.steps, 1.0, self.precision)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe_machine(device: torch.device, precision: str) -> dict:
    """What the numbers were measured on, printed and returned."""
    machine = versions() | {"device": device_name(device), "threads": torch.get_num_threads(), "precision": precision}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    return machine


def bench(device: torch.device, precision: str, seconds=2.0, config: RunConfig | None = None, **peak_sizes) -> dict:
    """All tables, printed as they come and returned for JSON. config: by default the preset that `train` would take."""
    config = config or PRESETS[default_preset(device)]
    work, n, steps = Work(config, device, precision), config.denoiser_train.batch, config.sample.steps
    few, latent, pixel = max(2, n // 4), work.latent, (config.vae.in_channels, SIDE, SIDE)
    machine = describe_machine(device, precision)
    peak = machine_peak(device, precision, seconds / 4, **peak_sizes)
    print(f"measured peak: matrix product {peak['matmul']:.0f}, convolution {peak['convolution']:.0f} GFLOP/s")
    table = partial(measure, seconds=seconds, device=device, peak=peak["gflops"])
    result = {"machine": machine, "seconds": seconds, "peak": peak, "ratios": {}, "parameters": {
        "vae": size(VAE(config.vae)), "unet": size(UNet(config.unet)), "dit": size(DiT(config.dit))}}

    def ratio(name: str, rows: dict, above: str, below: str) -> None:
        result["ratios"][name] = value = rows[above]["images_per_second"] / rows[below]["images_per_second"]
        print(f"  images/s, {name}: {value:.2f}x", flush=True)

    result["training"] = table("training", {
        "VAE": (config.vae_train.batch, 1, work.train_vae),
        "U-Net": (n, 1, work.train_denoiser, UNet, config.unet, latent, n),
        "DiT": (n, 1, work.train_denoiser, DiT, config.dit, latent, n)})

    rows = result["latents and pixels"] = table("the U-Net on latents and on pixels", {
        "training, latents": (few, 1, work.train_denoiser, UNet, config.unet, latent, few),
        "training, pixels": (few, 1, work.train_denoiser, UNet, config.unet, pixel, few),
        "sampling, latents": (few // 2, steps, work.sample, latent, few // 2, True),
        "sampling, pixels": (few // 2, steps, work.sample, pixel, few // 2, False)})
    for what in ("training", "sampling"):
        ratio(f"latents / pixels, {what}", rows, f"{what}, latents", f"{what}, pixels")

    result["solvers"] = table(f"{steps} steps, guided and decoded", {
        name: (few, steps, work.sample, latent, few, True, name, 2.0) for name in SOLVERS})

    try:
        import diffusers

        theirs = DiffusersUNet(replace(config.unet, in_channels=latent[0]))
    except (ImportError, RuntimeError) as error:  # RuntimeError: something that diffusers needs is broken
        print(f"\nours against diffusers: left out, diffusers does not import here ({type(error).__name__})")
        return result
    result["parameters"]["diffusers"], machine["diffusers"] = size(theirs), diffusers.__version__
    even = (latent[0], *(-(-side // theirs.multiple) * theirs.multiple for side in latent[1:]))
    rows = result["diffusers"] = table("ours and diffusers, unguided DDIM", {
        f"training, ours {latent}": (n, 1, work.train_denoiser, UNet, config.unet, latent, n),
        f"training, ours {even}": (n, 1, work.train_denoiser, UNet, config.unet, even, n),
        f"training, diffusers {even}": (n, 1, work.train_denoiser, DiffusersUNet, config.unet, latent, n),
        f"sampling, ours {latent}": (few, steps, work.sample, latent, few, False),
        f"sampling, ours {even}": (few, steps, work.sample, even, few, False),
        f"sampling, diffusers {even}": (few, steps, work.sample_diffusers, latent, few)})
    print(f"  {latent} is padded to {even} for diffusers; parameters in millions: "
          f"ours {result['parameters']['unet'] / 1e6:.2f}, diffusers {size(theirs) / 1e6:.2f}")
    for what in ("training", "sampling"):
        for shape in (latent, even):
            name = f"ours {shape} / diffusers {even}, {what}"
            ratio(name, rows, f"{what}, ours {shape}", f"{what}, diffusers {even}")
    return result


def minutes_to_expect(device: torch.device, precision: str, config: RunConfig | None = None, seconds=1.5) -> str:
    """The minutes of `train` with this device's preset, in words: its steps times the seconds of a step measured here.

    TrainConfig.minutes caps a stage. The rest is counted in forward passes, each a third of a training step: samples
    through the denoiser (twice, for guidance), 60,000 images through the encoder, 10,000 through encoder and decoder.
    """
    config = config or PRESETS[default_preset(device)]
    work, stages = Work(config, device, precision), {"VAE": config.vae_train, "denoiser": config.denoiser_train}
    net, batch = getattr(config, config.net), config.denoiser_train.batch
    steps = {"VAE": work.train_vae(), "denoiser": work.train_denoiser(NETS[config.net][0], net, work.latent, batch)}
    per_step = median_seconds(steps, seconds, device)
    minutes = {name: min(stage.steps * per_step[name] / 60, stage.minutes or inf) for name, stage in stages.items()}
    passes = {"VAE": 60_000 / 2 + 10_000, "denoiser": 2 * config.samples * config.sample.steps}
    minutes["the rest"] = sum(passes[name] / stage.batch * per_step[name] / 3 / 60 for name, stage in stages.items())
    shown = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    return f"about {max(1, round(sum(minutes.values())))} (an estimate, measured over a few steps: {shown})"
