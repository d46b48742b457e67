r"""Guidance: lean away from what a less informed denoiser would say.

    z0_hat = uncond + s * (cond - uncond)          s = 0 unconditional, s = 1 conditional, s > 1 guided

In classifier-free guidance `uncond` is the same network without the label. In autoguidance it is a weaker network, told
the label: smaller, less trained; at s = 0 it answers alone. The first makes the label surer, and
pays with variety; the second leads away from where only the weaker network would go (chapter 5 measures both).

The rule's weights add up to one and, at given z_t and t, the four targets are affine in each other: guiding z0, eps, v
or flow is the same thing.
2207.12598 writes w = s - 1, 2406.02507 w for s itself. Guidance costs a second evaluation wherever s is neither 0 nor 1.

Papers: 2207.12598; guidance only in an interval of noise levels 2404.07724; autoguidance 2406.02507.
"""

from math import isfinite

import torch
from torch import Tensor


def guide(denoise, null: int, scale=1.0, interval: tuple[float, float] = (0.0, 1.0), weak=None):
    """A denoiser in, a denoiser out: (zt, t, y) -> guided estimate of z0.

    scale:    a number >= 0, or a function t (B,) -> (B,), the guidance scale s(t)
    interval: (low, high); for t outside it the scale is 1, at one evaluation instead of two
    weak:     a weaker denoiser, to lean away from in place of the same one without the label (autoguidance)
    """
    if not callable(scale) and not (isinstance(scale, (int, float)) and isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance must be a finite number >= 0, got {scale!r}")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the guidance interval must satisfy 0 <= low <= high <= 1, got {interval}")

    def guided(zt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = scale(t) if callable(scale) else torch.full_like(t, scale)
        s = torch.where((t >= low) & (t <= high), s, 1.0)  # (B,) on the CPU in sampling: no wait for a GPU
        if bool((s == 1).all()):
            return denoise(zt, t, y)
        if bool((s == 0).all()):
            return denoise(zt, t, torch.full_like(y, null)) if weak is None else weak(zt, t, y)
        if weak is None:
            both = denoise(torch.cat([zt, zt]), torch.cat([t, t]), torch.cat([torch.full_like(y, null), y]))
            uncond, cond = both.chunk(2)
        else:
            uncond, cond = weak(zt, t, y), denoise(zt, t, y)
        return uncond + s.to(uncond).reshape(-1, 1, 1, 1) * (cond - uncond)

    return guided
