r"""The other way to keep latents in shape: a codebook of vectors, of which the decoder sees nothing else.

    q(z)  = the code e_k nearest to z, at each place of the latent
    loss  = reconstruction + beta * (|sg(z) - q(z)|^2 + 1/4 |z - sg(q(z))|^2)           sg: no gradient through this
    d x_hat / d z is taken as d x_hat / d q(z): straight through the choice, which has no derivative

The choice belongs to the decoder: diffusion works on the continuous z in front of it, and what the denoiser gets
slightly wrong, the nearest code puts right. There is no noise in the encoder and no KL.

Papers: VQ-VAE 1711.00937, eq. 3; as the first layer of the decoder 2112.10752, section 3.1.
"""

import torch
from torch import Tensor, nn

from .vae import VAE, DiagonalGaussian, VAEConfig


class VectorQuantizer(nn.Module):
    """z (B, C, h, w) -> (the nearest codes, like z, with z's gradient; their numbers (B, h, w))."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.codebook = nn.Embedding(codes, dim)
        nn.init.normal_(self.codebook.weight)

    def nearest(self, z: Tensor) -> Tensor:
        """|z - e|^2 = |z|^2 - 2 z.e + |e|^2, of which the first term is the same for all codes."""
        book = self.codebook.weight.float()  # (K, C)
        if z.ndim != 4 or z.shape[1] != book.shape[1]:
            raise ValueError(f"latents must be (B, {book.shape[1]}, h, w), got {tuple(z.shape)}")
        flat = z.movedim(1, -1).float()  # (B, h, w, C)
        with torch.autocast(z.device.type, enabled=False):  # in bfloat16, one code in twenty would be a wrong one
            return (book.square().sum(1) - 2 * flat @ book.T).argmin(-1)

    def codes(self, index: Tensor) -> Tensor:
        """(B, h, w) -> (B, C, h, w)."""
        return self.codebook(index).movedim(-1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        index = self.nearest(z.detach())
        return self.codes(index).detach() + (z - z.detach()), index  # the code itself, bit for bit, and z's gradient

    def loss(self, z: Tensor) -> Tensor:
        """(B,): pulls the codes towards what is encoded and, a quarter as strongly, the encoder towards its codes."""
        q = self.codes(self.nearest(z.detach()))
        return ((z.detach() - q).square() + 0.25 * (z - q.detach()).square()).flatten(1).sum(1)


class VQVAE(VAE):
    """encode: x -> z without spread; decode: z -> the nearest codes -> x. In all else a VAE."""

    def __init__(self, config: VAEConfig):
        super().__init__(config)
        self.quantizer = VectorQuantizer(config.codes, config.latent_channels)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """A Gaussian so narrow (std 3e-7) that its samples are its mean but for rounding."""
        mean = super().encode(x).mean
        return DiagonalGaussian(mean, torch.full_like(mean, -30.0))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(self.quantizer(z)[0])

    def regularization(self, posterior: DiagonalGaussian) -> Tensor:
        return self.quantizer.loss(posterior.mean)


def build_vae(config: VAEConfig) -> VAE:
    return VQVAE(config) if config.codes else VAE(config)
