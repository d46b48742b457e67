"""ldm_minimal: a latent diffusion model for Fashion-MNIST, small enough to read in an afternoon.

Read the files in the order of their dependence: schedule, layers, vae, unet, dit, denoiser, guidance, sampler, ema,
train, latents, metrics, pipeline, run.
"""

__version__ = "0.1.0"

from .pipeline import LatentDiffusion

__all__ = ["LatentDiffusion", "__version__"]
