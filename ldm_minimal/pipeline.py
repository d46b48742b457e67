r"""The whole latent diffusion model behind one object.

    encode   z0 = scale * z,  z ~ q(z | x)                          images -> latents of unit variance
    sample   noise -> ... -> z0, guided, along a grid of times       latents from a label
    decode   x = decoder(z0 / scale)                                  latents -> images

The scale factor lives inside encode and decode, so nobody outside can forget it or apply it the wrong way round.

Paper: 2112.10752.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from math import inf, isclose, isfinite
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .checkpoint import CheckpointError
from .classifier import Classifier, ClassifierConfig
from .data import CLASSES, class_ids
from .denoiser import Denoiser, DenoiserConfig
from .dit import DiT, DiTConfig
from .guidance import guide
from .options import option
from .precision import autocast
from .sampler import SOLVERS, sample, sample_noise
from .schedule import GRIDS, SCHEDULES, time_grid
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig
from .vq import build_vae

NETS = {"unet": (UNet, UNetConfig), "dit": (DiT, DiTConfig)}
SHIPPED = ("unet", "dit", "weak", "best", "best/weak")  # the weak ones are small and little trained: for autoguidance
WEIGHTS = Path(__file__).parent / "assets" / "weights"


@dataclass(frozen=True)
class SampleConfig:
    steps: int = option(20, "network evaluations per image, before guidance adds as many again")
    guidance: float = option(1.25, "guidance scale: 0 ignores the label, 1 follows it, above 1 exaggerates it")
    interval: tuple[float, ...] = option((0.0, 1.0), "guide only for t between these two")
    solver: str = option("dpm++2m", "how to step from noise to data", tuple(SOLVERS))
    spacing: str = option("middle", "where the steps lie", GRIDS)
    seed: int = option(0, "seed of the noise")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.guidance < inf:
            raise ValueError(f"the guidance scale must be a finite number >= 0, got {self.guidance}")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(f"the guidance interval must be two numbers, 0 <= low <= high <= 1, got {self.interval}")


def config_from(config_class, data: dict, where: str):
    """JSON -> frozen dataclass. CheckpointError names unknown, missing and mistyped entries."""
    known = {item.name: item for item in fields(config_class)}
    if not isinstance(data, dict) or data.keys() != known.keys():
        found = data.keys() if isinstance(data, dict) else set()
        raise CheckpointError(f"{where}: {config_class.__name__} needs exactly {', '.join(known)}; "
                              f"missing {sorted(known.keys() - found)}, unknown {sorted(found - known.keys())}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    for name, item in known.items():
        kinds = (int, float) if isinstance(item.default, float) else type(item.default)
        mistaken_for_number = isinstance(values[name], bool) and not isinstance(item.default, bool)
        if not isinstance(values[name], kinds) or mistaken_for_number:
            raise CheckpointError(f"{where}: {name} must be like {item.default!r}, found {values[name]!r}")
        choices = item.metadata.get("choices")
        if choices and values[name] not in choices:
            raise CheckpointError(f"{where}: unknown {name} {values[name]!r}, choose from {', '.join(choices)}")
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None


class LatentDiffusion:
    """A trained VAE, a trained denoiser, the latent scale between them, and how they came about (`meta`).

    >>> model = LatentDiffusion.pretrained()
    >>> images = model.sample(["Sneaker", "Bag"], steps=20, guidance=1.25)   # (2, 1, 28, 28) in [-1, 1]
    """

    def __init__(self, vae: VAE, denoiser: Denoiser, scale: float, latent_shape: tuple[int, ...],
                 dataset: str = "fashion-mnist", config: DenoiserConfig = DenoiserConfig(), meta: dict | None = None):
        if not (isinstance(scale, float) and isfinite(scale) and scale > 0):
            raise ValueError(f"the latent scale must be a finite number > 0, got {scale!r}")
        self.vae, self.denoiser = vae.eval().requires_grad_(False), denoiser.eval().requires_grad_(False)
        self.scale, self.latent_shape, self.dataset = scale, tuple(latent_shape), dataset
        self.config, self.meta, self.precision = config, meta or {}, "fp32"

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES[self.dataset]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device, precision: str = "fp32") -> "LatentDiffusion":
        """Move both networks; `precision` is that of the denoiser in sampling (the decoder stays in float32)."""
        self.vae.to(device), self.denoiser.to(device)
        self.precision = precision
        return self

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (N, 1, H, W) in [-1, 1] -> scaled latents: the posterior's mean; with a generator, a sample."""
        posterior = self.vae.encode(x.to(self.device))
        return self.scale * (posterior.mode() if generator is None else posterior.sample(generator))

    @torch.no_grad()
    def decode(self, z0: Tensor, batch: int = 500) -> Tensor:
        """Scaled latents (N, C, h, w) -> images (N, 1, H, W), clamped to [-1, 1]."""
        if z0.shape[1:] != self.latent_shape:
            raise ValueError(f"latents must be (N, {', '.join(map(str, self.latent_shape))}), got {tuple(z0.shape)}")
        chunks = [self.vae.decode(chunk.to(self.device) / self.scale) for chunk in z0.split(batch)]
        return torch.cat(chunks).clamp(-1, 1)

    def sample(self, classes, steps: int = 20, guidance=1.25, solver: str = "dpm++2m", seed: int = 0,
               interval: tuple[float, float] = (0.0, 1.0), spacing: str = "middle", batch: int = 256,
               progress=None, weak: "LatentDiffusion | None" = None) -> Tensor:
        """One image for each entry of `classes` (names or ids): (N, 1, H, W) in [-1, 1].

        steps     network evaluations per image (twice as many where guidance is neither 0 nor 1; with `weak`, the
                  second one is the weak model's)
        guidance  a number, or a function t (B,) -> (B,)
        seed      image i depends on (seed, i) alone, not on `batch` or the device
        progress  called with the number of images done after each batch
        weak      a weaker model of the same latents: guidance leads away from it, in place of the same model without
                  the label (autoguidance, 2406.02507). At guidance 1 it is not asked, at 0 it answers alone
        Raises ValueError for an unknown class, solver or spacing, for steps < 1, for a bad guidance, and for a weak
        model of other latents, of another schedule or on another device.
        """
        labels = class_ids(classes, self.dataset)
        if len(labels) == 0:
            raise ValueError("nothing to sample: classes is empty")
        images = []
        for index in torch.arange(len(labels)).split(batch):
            for z0, _ in self.trajectory(labels[index], index.tolist(), steps, guidance, solver, seed, interval,
                                         spacing, weak):
                pass  # the last one is the sample
            images.append(self.decode(z0).cpu())
            if progress:
                progress(len(index))
        return torch.cat(images)

    @torch.no_grad()
    def trajectory(self, labels: Tensor, index: list[int], steps: int = 20, guidance=1.25, solver: str = "dpm++2m",
                   seed: int = 0, interval: tuple[float, float] = (0.0, 1.0),
                   spacing: str = "middle", weak: "LatentDiffusion | None" = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The steps of one batch: a generator of (z_s, z0_hat), scaled latents. `index`: see sampler.sample_noise."""
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}, choose from {', '.join(SOLVERS)}")
        if weak is not None:
            self.check_weak(weak)
        eta, order = SOLVERS[solver]
        times = time_grid(steps, self.denoiser.schedule, spacing)
        denoise = guide(self.denoise, self.denoiser.null, guidance, tuple(interval), weak and weak.denoise)
        randn = sample_noise(seed, index, self.latent_shape, self.device)
        yield from sample(denoise, randn(), labels.to(self.device), self.denoiser.schedule, times, eta, order, randn)

    def check_weak(self, weak: "LatentDiffusion") -> None:
        """ValueError where the denoiser of `weak` cannot be asked about this model's z_t."""
        if self.device != weak.device:
            raise ValueError(f"the weak model is on {weak.device}, this one on {self.device}: weak.to({str(self.device)!r})")
        mine, its = ((m.dataset, m.latent_shape, m.config.schedule) for m in (self, weak))
        if mine != its or not same_encoder(self.vae, weak.vae) or not isclose(self.scale, weak.scale, rel_tol=0.01):
            raise ValueError("the weak model must have the same data set, encoder, latent scale and noise schedule")

    def denoise(self, zt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The denoiser in this model's precision."""
        with autocast(self.device, self.precision):
            return self.denoiser(zt, t, y)

    def save(self, folder, name: str = "model", denoiser: str = "denoiser", half: bool = False) -> None:
        """vae.safetensors, {denoiser}.safetensors and, last, {name}.json, which knows the checksums of both."""
        folder, files = Path(folder), {}
        for part, stem, module in (("vae", "vae", self.vae), ("denoiser", denoiser, self.denoiser.net)):
            tensors = {k: v.half() if half and v.is_floating_point() else v for k, v in module.state_dict().items()}
            file = folder / f"{stem}.safetensors"
            files[part] = {"file": file.name, "sha256": checkpoint.save_tensors(file, tensors)}
        net = next(key for key, (kind, _) in NETS.items() if isinstance(self.denoiser.net, kind))
        checkpoint.save_json(folder / f"{name}.json", {
            "dataset": self.dataset, "latent_scale": self.scale, "latent_shape": self.latent_shape,
            "vae": asdict(self.vae.config), "net": net, net: asdict(self.denoiser.net.config),
            "denoiser": asdict(self.config), "files": files, "meta": self.meta,
        })

    @classmethod
    def load(cls, path, device="cpu") -> "LatentDiffusion":
        """Read what `save` wrote: a folder with model.json, or such a JSON file itself.

        CheckpointError if a file is missing, cut off, edited, or does not fit the others.
        """
        path = Path(path)
        path = path / "model.json" if path.is_dir() else path
        data = checkpoint.load_json(path)
        missing = {"dataset", "latent_scale", "latent_shape", "vae", "net", "denoiser", "files", "meta"} - data.keys()
        if missing or data["net"] not in NETS or data["dataset"] not in CLASSES:
            raise CheckpointError(f"{path} is not a model description: missing {sorted(missing)}, "
                                  f"net {data.get('net')!r}, dataset {data.get('dataset')!r}")
        kind, config_class = NETS[data["net"]]
        config = config_from(DenoiserConfig, data["denoiser"], str(path))
        vae_config = config_from(VAEConfig, data["vae"], str(path))
        net_config = config_from(config_class, data.get(data["net"]), str(path))
        try:
            denoiser = build_denoiser(kind(net_config), config)
            model = cls(build_vae(vae_config), denoiser, data["latent_scale"], data["latent_shape"], data["dataset"], config,
                        data["meta"])
            wanted = [(module, path.parent / data["files"][part]["file"], data["files"][part]["sha256"])
                      for part, module in (("vae", model.vae), ("denoiser", denoiser.net))]
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{path} describes no model that can be built: {error}") from None
        for module, file, checksum in wanted:
            load_weights(module, file)
            check_sha256(file, checksum, path)
        return model.to(device)

    @classmethod
    def pretrained(cls, name: str = "unet", device="cpu") -> "LatentDiffusion":
        """A Fashion-MNIST model that ships with the package (SHIPPED); the model card is beside the weights."""
        if name not in SHIPPED:
            raise ValueError(f"unknown model {name!r}, choose from {', '.join(SHIPPED)}")
        return cls.load(shipped_json(name), device)


def shipped_json(name: str) -> Path:
    """The JSON file of a model that ships (SHIPPED); one that has a folder of its own is its model.json."""
    path = WEIGHTS / name
    return path / "model.json" if path.is_dir() else WEIGHTS / f"{name}.json"


def build_denoiser(net, config: DenoiserConfig) -> Denoiser:
    return Denoiser(net, SCHEDULES[config.schedule], config.target, config.drop, config.times)


def same_encoder(a: VAE, b: VAE) -> bool:
    """Do two autoencoders have the same latents, up to rounding to half precision? Their decoders may differ."""
    mine, its = ({k: v for k, v in vae.state_dict().items() if not k.startswith("decoder.")} for vae in (a, b))
    return mine.keys() == its.keys() and all(
        v.shape == its[k].shape and torch.allclose(v, its[k], rtol=0.01, atol=1e-3) for k, v in mine.items())


def check_sha256(file: Path, checksum: str, path: Path) -> None:
    """CheckpointError where `file` is not the one that the JSON `path` names."""
    if checkpoint.sha256(file) != checksum:
        raise CheckpointError(f"{file} is not the file that {path} was written for: its checksum differs")


def load_weights(module, file: Path) -> None:
    """safetensors of any float format into a float32 module, strictly."""
    tensors, _ = checkpoint.load_tensors(file)
    checkpoint.load_into(module, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, str(file))


def load_classifier(path) -> Classifier:
    """A feature classifier from its JSON, with the weights beside it; see WEIGHTS for the one that ships."""
    path = Path(path)
    classifier = Classifier(config_from(ClassifierConfig, checkpoint.load_json(path).get("classifier"), str(path)))
    load_weights(classifier, path.with_suffix(".safetensors"))
    return classifier.eval().requires_grad_(False)
