r"""The noise schedule: how much signal and how much noise there is at time t.

    z_t = alpha(t) * z0 + sigma(t) * eps,      alpha**2 + sigma**2 = 1  (variance preserving)
                                          or   alpha + sigma = 1        (straight line, rectified flow)

Time runs from t = 0 (data: alpha = 1, sigma = 0) to t = 1 (noise). A schedule is a function t -> (alpha, sigma)
that works on tensors of any shape, dtype and device. All that a sampler or a loss needs follows from it:
alpha_bar = alpha**2 is the textbook's cumulative product, log_snr = log(alpha / sigma) its natural clock.

Papers: DDPM 2006.11239, cosine 2102.09672, sigmoid 2212.11972 and 2301.10972, rectified flow 2209.03003, vp 2011.13456.
"""

from math import pi

import torch
from torch import Tensor


def cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """A quarter turn on the unit circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2)  (2102.09672, without offset)."""
    return torch.cos(t * (pi / 2)).clamp(min=0), torch.sin(t * (pi / 2))  # in float32, cos(pi / 2) is -4e-8


def linear(t: Tensor) -> tuple[Tensor, Tensor]:
    """A straight line from data to noise: alpha = 1 - t, sigma = t  (rectified flow, 2209.03003)."""
    return 1 - t, t


def vp(t: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> tuple[Tensor, Tensor]:
    """DDPM's betas in the limit of infinitely many steps  (VP-SDE, 2011.13456, eq. 33).

    d log(alpha)/dt = -beta(t) / 2 with beta(t) rising linearly. sigma comes from expm1, because
    1 - alpha**2 near t = 0 would lose its digits.
    """
    log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
    return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))


def sigmoid(t: Tensor, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """alpha_bar falls along a piece of a logistic curve, stretched to end at 1 and 0  (2212.11972; as 2301.10972, alg. 1).

    The difference of two logistic functions, at x and y, is written as sinh((x-y)/2) / (2 cosh(x/2) cosh(y/2)), so
    that neither end loses digits. In the ratio of two such drops the cosh of the end that they share cancels.
    """
    a, b = start / tau, end / tau
    x = a + t * (b - a)
    full = torch.sinh(x.new_full((), (b - a) / 2))

    def share(gap: Tensor, far: float) -> Tensor:  # of the whole drop, between x and the near end
        cosh_far = torch.cosh(x.new_full((), far / 2))
        return torch.sinh(gap / 2) * cosh_far / (full * torch.cosh(x / 2))

    return torch.sqrt(share((1 - t) * (b - a), a).clamp(min=0)), torch.sqrt(share(t * (b - a), b).clamp(min=0))


def from_betas(betas: Tensor):
    """The textbook's T discrete betas as a function of continuous t.

    alpha_bar_k = prod_{i<=k} (1 - beta_i) gives T + 1 knots at t = k / T, with alpha_bar_0 = 1 (no noise).
    Between the knots log(alpha) is interpolated linearly, so schedule(k / T) is the textbook's value exactly.

    betas: (T,) in (0, 1). Fewer betas make another process, not a faster one: to sample in fewer steps, take a
    coarser time grid over the same betas. The schedule wants times k / T; for step numbers it raises ValueError.
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"betas must be a 1-D tensor of values inside (0, 1), got shape {tuple(betas.shape)}")
    knots = torch.cat([betas.new_zeros(1), 0.5 * torch.log1p(-betas).cumsum(0)])  # (T + 1,) log(alpha)

    tables = {}  # the knots, once for each device: a GPU would wait for a copy in every step

    def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
        if not t.is_floating_point():
            raise ValueError(f"t is a time in [0, 1], k / T and not a step number k, got {t.dtype}")
        if t.device not in tables:
            tables[t.device] = knots.to(t.device)
        table = tables[t.device]
        position = (t.double() * len(betas)).clamp(0, len(betas))
        left = position.floor().long().clamp(max=len(betas) - 1)
        log_alpha = torch.lerp(table[left], table[left + 1], position - left)
        return log_alpha.exp().to(t.dtype), torch.sqrt(-torch.expm1(2 * log_alpha)).to(t.dtype)

    return schedule


ddpm = from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))  # DDPM's thousand linear betas

SCHEDULES = {"cosine": cosine, "linear": linear, "vp": vp, "sigmoid": sigmoid, "ddpm": ddpm}


def log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """log(alpha / sigma): +inf for clean data, -inf for pure noise. (Half of the log of the power ratio.)"""
    return torch.log(alpha) - torch.log(sigma)


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), so that one number per sample multiplies a whole image."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(z0: Tensor, eps: Tensor, t: Tensor, schedule) -> Tensor:
    """Draw from q(z_t | z0): alpha(t) * z0 + sigma(t) * eps.

    z0, eps: (B, ...) of one shape; t: (B,) in [0, 1]. Raises ValueError where the shapes do not fit, and for whole
    numbers as t, which are step numbers: time is k / T.
    """
    if z0.shape != eps.shape or t.shape != z0.shape[:1]:
        raise ValueError(f"z0 {tuple(z0.shape)}, eps {tuple(eps.shape)} and t {tuple(t.shape)} do not fit together")
    if not t.is_floating_point():
        raise ValueError(f"t is a time in [0, 1], k / T and not a step number k, got {t.dtype}")
    alpha, sigma = schedule(expand(t, z0))
    return alpha * z0 + sigma * eps


def time_of_log_snr(target: Tensor, schedule) -> Tensor:
    """The inverse clock: the t at which log_snr(t) = target, by bisection (log_snr falls with t), in float64."""
    low, high = torch.zeros_like(target, dtype=torch.float64), torch.ones_like(target, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        too_clean = log_snr(*schedule(middle)) > target
        low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
    return (low + high) / 2


GRIDS = ("time", "log_snr", "middle")
MIDDLE = (-3.5, 2.5)  # log(alpha / sigma): before it there is only noise, after it only polish


def time_grid(steps: int, schedule=None, spacing: str = "time", start: float = 1.0, end: float = 0.0) -> Tensor:
    """steps + 1 times from `start` down to `end`, float64 on the CPU, so that step scalars keep their digits.

    spacing "time": uniform in t. spacing "log_snr": uniform in log(alpha / sigma), the clock in which
    DPM-Solver++'s error is a power of the step. That clock may be infinite at the ends: a grid from 1 is laid as if
    from 0.999, and one to 0 takes its last step from 0.002. spacing "middle": the same between the two values of
    MIDDLE alone; the first step begins at `start` and the last one lands on `end`, however far these lie outside.
    The last two need the schedule. N steps cost N network evaluations.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be a whole number >= 1, got {steps!r}")
    if not 0 <= end < start <= 1:
        raise ValueError(f"need 0 <= end < start <= 1, got start={start} and end={end}")
    if spacing not in GRIDS:
        raise ValueError(f"unknown spacing {spacing!r}, choose from {', '.join(GRIDS)}")
    if spacing != "time" and schedule is None:
        raise ValueError(f"spacing {spacing!r} needs the schedule")
    if spacing == "log_snr":
        first = start if start < 1 else max(0.999, (1 + end) / 2)  # log_snr may be infinite at 1 and at 0
        last = end if end > 0 else min(0.002, start / 2)
    elif spacing == "middle":
        outer, inner = time_of_log_snr(torch.tensor(MIDDLE, dtype=torch.float64), schedule).tolist()
        first, last = min(start, outer), max(end, inner)
    if spacing == "time" or first <= last:  # or all of the way lies outside the middle
        return torch.linspace(start, end, steps + 1, dtype=torch.float64)
    landing = [torch.tensor([end], dtype=torch.float64)] if end < last else []
    ends = log_snr(*schedule(torch.tensor([first, last], dtype=torch.float64)))
    knots = torch.linspace(ends[0].item(), ends[1].item(), steps + 1 - len(landing), dtype=torch.float64)
    times = time_of_log_snr(knots, schedule)
    times[0] = start
    return torch.cat([times, *landing])
