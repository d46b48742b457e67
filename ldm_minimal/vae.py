r"""The autoencoder: images x to a Gaussian over small latents z, and back.

    q(z | x) = N(mean(x), exp(logvar(x)))           encoder
    z        = mean + exp(logvar / 2) * eps         reparameterization, eps ~ N(0, I)
    loss     = sum over pixels of (1/2 (x - decode(z))**2 + |x - decode(z)|)  +  beta * KL
    KL       = sum over latent values of 1/2 (mean**2 + exp(logvar) - 1 - logvar)

Both terms are sums over one image, so beta keeps its meaning: with the squared error alone, beta is the variance of
the Gaussian decoder whose ELBO this is. The latent is 4 x 7 x 7 for a 28 x 28 image (f = 4): 784 values to 196.

Papers: VAE 1312.6114; the lightly regularised autoencoder of latent diffusion 2112.10752.
"""

from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor, nn

from .layers import Downsample, ResBlock, Upsample, at_least_float32, draw, group_norm
from .options import option


class DiagonalGaussian:
    """N(mean, exp(logvar)), one independent Gaussian per latent value. mean, logvar: (B, C, h, w)."""

    def __init__(self, mean: Tensor, logvar: Tensor):
        if mean.shape != logvar.shape:
            raise ValueError(f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} differ in shape")
        self.mean = at_least_float32(mean)
        self.logvar = at_least_float32(logvar).clamp(-30.0, 20.0)  # exp() of these bounds is finite in float32

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * eps, differentiable in mean and logvar. The generator's device decides where eps is drawn."""
        eps = draw(torch.randn, self.mean.shape, generator, self.mean.device).to(self.mean)
        return self.mean + torch.exp(self.logvar / 2) * eps

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over the latent values of each image: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 1  # image channels
    channels: tuple[int, ...] = option((32, 64, 128), "channels per resolution")
    factors: tuple[int, ...] = option((), "how many times smaller each further resolution is (none: 2 each)")
    blocks: int = option(1, "residual blocks per resolution")
    decoder_blocks: int = option(0, "the same for the decoder (0: as many as in the encoder)")
    latent_channels: int = option(4, "channels of the latent")
    beta: float = option(0.02, "weight of the KL (both terms are sums over one image), or of the codebook's loss")
    codes: int = option(0, "size of the codebook of a VQ-regularised autoencoder (0: none, a KL instead)")

    def __post_init__(self):
        if len(self.steps) != len(self.channels) - 1 or min(self.steps, default=1) < 1:
            raise ValueError(f"each resolution but the first needs a factor >= 1: channels {self.channels}, "
                             f"factors {self.factors}")
        if min(*self.channels, self.latent_channels, self.in_channels) < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}, {self.latent_channels} in the latent and "
                             f"{self.in_channels} in an image")
        for name in ("blocks", "codes", "decoder_blocks", "beta"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")

    @property
    def steps(self) -> tuple[int, ...]:
        """The factor from each resolution to the next."""
        return self.factors or (2,) * (len(self.channels) - 1)

    @property
    def factor(self) -> int:
        """f: how many times smaller the latent is along each side."""
        return prod(self.steps)


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2 * latent_channels, H/f, W/f): mean and logvar, stacked."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.channels
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, channels[0], 3, padding=1)]
        for level, width in enumerate(channels):
            if level > 0:
                layers.append(Downsample(channels[level - 1], width, config.steps[level - 1]))
            layers += [ResBlock(width, width) for _ in range(config.blocks)]
        layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, in_channels, f*h, f*w): the encoder's mirror image."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, factors = config.channels[::-1], config.steps[::-1]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)]
        for level, width in enumerate(channels):
            if level > 0:
                layers.append(Upsample(channels[level - 1], width, factors[level - 1]))
            layers += [ResBlock(width, width) for _ in range(config.decoder_blocks or config.blocks)]
        layers += [group_norm(width), nn.SiLU(), nn.Conv2d(width, config.in_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class VAE(nn.Module):
    """encode: x (B, C, H, W) in [-1, 1] -> DiagonalGaussian over (B, latent_channels, H/f, W/f); decode: back to x."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        channels, factor = self.config.in_channels, self.config.factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"images must be (B, {channels}, H, W) with H and W multiples of {factor}, "
                             f"got {tuple(x.shape)}")
        return DiagonalGaussian(*self.encoder(x).chunk(2, dim=1))

    def decode(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise ValueError(f"latents must be (B, {self.config.latent_channels}, h, w), got {tuple(z.shape)}")
        return at_least_float32(self.decoder(z))

    def regularization(self, posterior: DiagonalGaussian) -> Tensor:
        """What keeps the latents in shape, weighted with beta in the loss: the KL, (B,). (vq.py has another.)"""
        return posterior.kl()


def vae_terms(vae: VAE, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(x_hat like x, reconstruction (B,), regularization (B,): the KL of a VAE), both summed over one image.

    The squared error keeps the mean right, the absolute error keeps edges sharp.
    """
    posterior = vae.encode(x)
    x_hat = vae.decode(posterior.sample(generator))
    error = x_hat - x
    reconstruction = (0.5 * error**2 + error.abs()).flatten(1).sum(1)
    return x_hat, reconstruction, vae.regularization(posterior)


def vae_loss(vae: VAE, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(reconstruction, regularization), each (B,); the loss is reconstruction + beta * regularization."""
    return vae_terms(vae, x, generator)[1:]
