"""What a run is made of, as one frozen dataclass, and the budgets that ship: cpu, t4, gpu, release, tiny."""

from dataclasses import dataclass, field, is_dataclass

import torch

from .classifier import ClassifierConfig
from .data import CLASSES
from .denoiser import DenoiserConfig
from .dit import DiTConfig
from .options import option
from .perceptual import PerceptualConfig
from .pipeline import NETS, SampleConfig, config_from
from .train import TrainConfig
from .unet import UNetConfig
from .vae import VAEConfig


@dataclass(frozen=True)
class RunConfig:
    dataset: str = option("fashion-mnist", "data set", tuple(CLASSES))
    net: str = option("unet", "denoiser network", tuple(NETS))
    seed: int = option(0, "seed of weights, batches and noise")
    samples: int = option(2000, "samples drawn for the metrics at the end")
    early: float = option(0.0, "share of the denoiser's steps after which it is kept as the weak model of autoguidance "
                          "(0: none; --sample-guidance 1.25 then fits)")
    latents: str = option("samples", "what the denoiser learns: samples of the posteriors, or their means",
                          ("samples", "means"))
    vae: VAEConfig = field(default=VAEConfig())
    vae_train: TrainConfig = field(default=TrainConfig(lr=2e-3, clip=2000.0))  # its loss is a sum over pixels
    vae_loss: PerceptualConfig = field(default=PerceptualConfig())
    perceptual_train: TrainConfig = field(default=TrainConfig(steps=800))
    unet: UNetConfig = field(default=UNetConfig())
    dit: DiTConfig = field(default=DiTConfig())
    denoiser: DenoiserConfig = field(default=DenoiserConfig())
    denoiser_train: TrainConfig = field(default=TrainConfig())
    classifier: ClassifierConfig = field(default=ClassifierConfig())
    classifier_train: TrainConfig = field(default=TrainConfig(lr=2e-3))
    sample: SampleConfig = field(default=SampleConfig())

    @property
    def trainings(self) -> tuple[TrainConfig, ...]:
        """Of every stage."""
        return self.vae_train, self.denoiser_train, self.perceptual_train, self.classifier_train

    def __post_init__(self):
        if self.samples < 20:
            raise ValueError(f"samples must be at least 20 to be compared with the data, got {self.samples}")
        if not 0 <= self.early < 1:
            raise ValueError(f"early is a share of the steps, 0 or more and below 1, got {self.early}")
        if not 0 <= self.seed < 2**40:  # of seed and step together PyTorch takes 64 bits, see train.step_generator
            raise ValueError(f"seed must be 0 or more and below 2**40, got {self.seed}")


SECTIONS = {  # flag prefix: name of the section in RunConfig
    "vae": "vae", "vae-train": "vae_train", "vae-loss": "vae_loss", "perceptual-train": "perceptual_train",
    "unet": "unet", "dit": "dit", "denoiser": "denoiser", "denoiser-train": "denoiser_train",
    "classifier-train": "classifier_train", "sample": "sample",
}

PRESETS = {
    # two CPU cores: at most ten minutes in all; a slower machine takes fewer steps (`minutes` of TrainConfig)
    "cpu": RunConfig(
        vae_train=TrainConfig(steps=2600, batch=32, lr=2e-3, clip=2000.0, minutes=2.4),
        denoiser=DenoiserConfig(times="logit_normal"),
        denoiser_train=TrainConfig(steps=3300, batch=64, lr=4e-3, ema=0.999, minutes=4.2),
        classifier_train=TrainConfig(steps=600, batch=128, lr=2e-3, minutes=1.0),
        early=0.15, sample=SampleConfig(guidance=2.0),
    ),
    # a T4 in at most 15 minutes (an estimate: see README)
    "t4": RunConfig(
        samples=10_000,
        vae_train=TrainConfig(steps=6000, batch=128, lr=2e-3, clip=2000.0, warmup=200),
        denoiser_train=TrainConfig(steps=14_000, batch=256, lr=1e-3, ema=0.9995, warmup=500),
        early=0.05, sample=SampleConfig(guidance=1.5),  # of a longer training an earlier share, see book/trials.md
    ),
    # a datacenter GPU, in about ten minutes (see README): the autoencoder with all terms, and an epoch a second
    "gpu": RunConfig(
        samples=10_000,
        vae=VAEConfig(decoder_blocks=2, beta=0.1),
        vae_train=TrainConfig(steps=11_000, batch=128, lr=1e-3, clip=2000.0, warmup=200),
        vae_loss=PerceptualConfig(perceptual=1.0, adversarial=40.0, width=64, speed=4.0),
        denoiser_train=TrainConfig(steps=28_000, batch=1024, lr=2e-3, ema=0.9995, warmup=500),
    ),
    # the first trainings of the shipped weights: 81 minutes on two busy CPU cores, the DiT included; the refined decoder
    # and the second training of the U-Net made it 162 (see the model card)
    "release": RunConfig(
        samples=10_000,
        vae_train=TrainConfig(steps=4500, batch=128, lr=2e-3, clip=2000.0, warmup=200),
        denoiser_train=TrainConfig(steps=9000, batch=128, lr=1e-3, ema=0.9995, warmup=500),
        classifier_train=TrainConfig(steps=2500, batch=128, lr=2e-3, warmup=200),
    ),
    # seconds; shows that everything runs, not that it learns
    "tiny": RunConfig(
        samples=60,
        vae=VAEConfig(channels=(16, 16, 32)), vae_train=TrainConfig(steps=30, batch=32, lr=2e-3, clip=2000.0, warmup=5),
        unet=UNetConfig(channels=(16, 32), blocks=1), dit=DiTConfig(width=32, depth=2, heads=2),
        denoiser_train=TrainConfig(steps=40, batch=32, warmup=5),
        classifier_train=TrainConfig(steps=20, batch=32, warmup=5),
        early=0.5, sample=SampleConfig(steps=4, guidance=1.5),
    ),
}


def default_preset(device: torch.device) -> str:
    return "t4" if device.type == "cuda" else "cpu"


def read_config(known: dict, where: str) -> RunConfig:
    """The "config" of a config.json -> RunConfig; CheckpointError names what does not fit."""
    kinds = {name: type(value) for name, value in vars(RunConfig()).items() if is_dataclass(value)}
    whole = known | {name: config_from(kind, known.get(name), where) for name, kind in kinds.items()}
    return config_from(RunConfig, whole, where)
