r"""Latents of a whole data set, computed once, and the scale that gives them unit variance.

    z0 = scale * z,  scale = 1 / std(z),        Var(z) = Var(mean) + E[exp(logvar)]

The schedule assumes data of about unit variance: alpha and sigma then say how much of z_t is signal. The cache
keeps the posterior's mean and logvar, not one sample of it, so every epoch draws its latents afresh; the variance is
therefore that of the samples (law of total variance), over the whole training set, in float64.

The denoiser may learn the means in place of the samples (RunConfig.latents): all moments then get a logvar of
-inf, and scale and samples follow. Its samples then need not show the posterior's noise; whether that helps, book/trials.md
asks and leaves open.

Paper: 2112.10752, appendix G ("rescaling"); Stable Diffusion's 0.18215 is such a 1 / std.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .data import to_float
from .precision import autocast
from .vae import VAE, DiagonalGaussian


@torch.no_grad()
def encode_moments(vae: VAE, images: Tensor, batch: int = 500, precision: str = "fp32") -> Iterator[Tensor]:
    """uint8 images (N, 1, H, W) -> a generator of (b, 2, C, h, w) float32: mean and logvar of each batch, in order."""
    device = next(vae.parameters()).device
    for chunk in images.split(batch):
        with autocast(device, precision):
            posterior = vae.encode(to_float(chunk.to(device)))
        yield torch.stack([posterior.mean, posterior.logvar], dim=1)


def latent_scale(moments: Tensor) -> float:
    """1 / std of the latents that training sees. moments: (N, 2, C, h, w)."""
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    variance = mean.var(correction=0) + logvar.exp().mean()
    return float(variance.rsqrt())


def draw_latents(moments: Tensor, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """One fresh sample of each latent, scaled: (B, 2, C, h, w) -> z0 (B, C, h, w)."""
    return scale * DiagonalGaussian(moments[:, 0], moments[:, 1]).sample(generator)
