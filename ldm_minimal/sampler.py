r"""Sampling: from noise to data along a grid of times, one step for every solver.

    eps_hat = (z_t - alpha_t z0_hat) / sigma_t
    tau     = eta * sigma_s * sqrt(1 - exp(2 log_snr_t - 2 log_snr_s))
    z_s     = alpha_s z0_hat + sqrt(sigma_s^2 - tau^2) eps_hat + tau * noise

    eta = 0                       DDIM; on the straight path it is Euler for rectified flow; DPM-Solver++(1)
    eta = 1                       DDPM: tau^2 is the variance of q(z_s | z_t, z0)
    z0_hat extrapolated, eta = 0  DPM-Solver++(2M): z0_hat + h / (2 h_last) (z0_hat - z0_hat_last), h = step in log_snr
    z0_hat extrapolated, eta = 1  its stochastic form

So a solver is two numbers, (eta, order), and one loop runs them all. N steps are N evaluations of the denoiser.

Papers: DDPM 2006.11239 eq. 7, DDIM 2010.02502 eq. 12, DPM-Solver++ 2211.01095 algorithm 2.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .schedule import log_snr

SOLVERS = {  # name: (eta, order)
    "ddpm": (1.0, 1),
    "ddim": (0.0, 1),
    "dpm++2m": (0.0, 2),
    "sde-dpm++2m": (1.0, 2),
}


def step(zt: Tensor, z0: Tensor, now, nxt, eta: float = 0.0, noise: Tensor | float = 0.0) -> Tensor:
    """From z_t to z_s. now = (alpha_t, sigma_t), nxt = (alpha_s, sigma_s): scalars in float64 on the CPU."""
    (alpha, sigma), (alpha_s, sigma_s) = now, nxt
    eps = (zt - alpha * z0) / sigma
    share = -torch.expm1(2 * log_snr(*now) - 2 * log_snr(*nxt))  # < 0 on the way up to more noise, where eta is 0
    tau = eta * sigma_s * torch.sqrt(share.clamp(min=0))
    return alpha_s * z0 + torch.sqrt((sigma_s**2 - tau**2).clamp(min=0)) * eps + tau * noise


def sample(denoise, zt: Tensor, y: Tensor, schedule, times: Tensor, eta: float = 0.0, order: int = 1, randn=None):
    """A generator over the steps: yields (z_s, z0_hat) after each; the last z_s is the sample.

    denoise:  (zt, t, y) -> estimate of z0, with t (B,) float64 on the CPU
    zt:       (B, ...) noise at times[0];  y: (B,) labels
    times:    (N + 1,) falling times in float64 on the CPU, see schedule.time_grid; the last one may be 0
    randn:    () -> noise like zt; needed where eta > 0
    """
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()) or not 0 <= times[-1] < times[0] <= 1:
        raise ValueError(f"times must fall from noise to data, within [0, 1], and hold at least two, got {times}")
    if order not in (1, 2) or not 0 <= eta <= 1:
        raise ValueError(f"order must be 1 or 2 and eta in [0, 1], got {order} and {eta}")
    if eta and randn is None:
        randn = lambda: torch.randn_like(zt)  # noqa: E731
    last = h_last = None
    for t, s in pairwise(times.double().cpu()):
        now, nxt = schedule(t), schedule(s)
        final = bool(nxt[1] == 0)  # the last step lands on z0_hat exactly: no noise, first order
        z0 = denoise(zt, t.expand(len(zt)), y)
        h = log_snr(*nxt) - log_snr(*now)
        guess = z0 if order == 1 or last is None or final else z0 + h / (2 * h_last) * (z0 - last)
        zt = step(zt, guess, now, nxt, eta, randn() if eta and not final else 0.0)
        last, h_last = z0, h
        yield zt, z0


def sample_noise(seed: int, indices, shape: tuple[int, ...], device="cpu"):
    """() -> (B, *shape) normal noise, drawn on the CPU from one generator for each sample.

    Sample i depends on (seed, i) alone: the same picture comes out at any batch size, on any device.
    """
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + int(i)) % 2**63) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
