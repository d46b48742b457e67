"""Wrong answers to the exercises of chapter 2, forward noising, and other right ones."""

import torch
from coursework import solution
from ldm_minimal.schedule import time_of_log_snr, vp

betas_of, transition, score, vp_time = (solution(number) for number in ("02.1", "02.2", "02.3", "02.4"))


# 02.1

def knots(schedule, steps):
    return schedule(torch.arange(steps + 1, dtype=torch.float64) / steps)[0]


def by_logarithms(schedule, steps):
    return (-torch.expm1(2 * knots(schedule, steps).log().diff())).clamp(max=0.999)


def by_a_loop(schedule, steps):
    betas, before = [], 1.0
    for k in range(1, steps + 1):
        after = float(schedule(torch.tensor(k / steps, dtype=torch.float64))[0]) ** 2
        betas.append(min(1 - after / before, 0.999))
        before = after
    return torch.tensor(betas, dtype=torch.float64)


def late_times(schedule, steps):
    alpha_bar = schedule(torch.linspace(1 / (steps + 1), 1, steps + 1, dtype=torch.float64))[0] ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def few_knots(schedule, steps):
    alpha_bar = schedule(torch.linspace(0, 1, steps, dtype=torch.float64))[0] ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def last_set(schedule, steps):
    return torch.cat([betas_of(schedule, steps)[:-1], torch.tensor([0.999], dtype=torch.float64)])


def scaled_to_end(schedule, steps):  # scaled instead of clipped
    betas = 1 - knots(schedule, steps)[1:] ** 2 / knots(schedule, steps)[:-1] ** 2
    return betas * 0.999 / betas.max()


# 02.2

def by_log_snr(s, t, schedule):
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    ratio = (alpha_t * sigma_s / (sigma_t * alpha_s)) ** 2  # SNR_t / SNR_s
    return alpha_t / alpha_s, sigma_t * torch.sqrt(1 - ratio)


def with_b(change):
    """The right a, and as b change(a, sigma_s, sigma_t)."""
    def wrong(s, t, schedule):
        a, _ = transition(s, t, schedule)
        return a, change(a, schedule(s)[1], schedule(t)[1])
    return wrong


def backwards(s, t, schedule):  # the noise that a sampler puts back
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    a = alpha_t / alpha_s
    return a, sigma_s / sigma_t * torch.sqrt(sigma_t**2 - a**2 * sigma_s**2)


def spoils_s(s, t, schedule):
    a, b = transition(s, t, schedule)
    s += 1
    return a, b


# 02.4

def vp_root(lam, beta_min=0.1, slope=19.9, sign=1):
    """The other form of the positive root, with its numbers open to change."""
    log_alpha = -torch.nn.functional.softplus(-2 * lam) / 2
    return (sign * torch.sqrt(beta_min**2 / 4 - slope * log_alpha) - beta_min / 2) / (slope / 2)


def sigma_for_alpha(lam):
    log_alpha = -torch.nn.functional.softplus(2 * lam) / 2  # this is log(sigma)
    return (torch.sqrt(0.0025 - 19.9 * log_alpha) - 0.05) / 9.95


def whole_integral(lam):  # log(alpha) without the factor 1/2
    log_alpha = -torch.nn.functional.softplus(-2 * lam) / 2
    return (torch.sqrt(0.01 - 39.8 * log_alpha) - 0.1) / 19.9


ALSO_RIGHT = [
    ("02.1", by_logarithms), ("02.1", by_a_loop),
    ("02.1", lambda s, n: torch.minimum(betas_of(s, n), torch.full((n,), 0.999, dtype=torch.float64))),
    ("02.2", by_log_snr),
    ("02.2", lambda s, t, f: tuple(each.to(t.dtype) for each in transition(s.double(), t.double(), f))),
    ("02.3", lambda zt, z0_hat, alpha, sigma: -((zt - alpha * z0_hat) / sigma) / sigma),
    ("02.3", lambda *given: score(*(each.float() for each in given))),
    ("02.4", vp_root), ("02.4", lambda lam: time_of_log_snr(lam, vp)), ("02.4", lambda lam: vp_time(lam.float())),
]
WRONG = {
    "02.1": [
        (lambda s, n: (1 - knots(s, n)[1:] / knots(s, n)[:-1]).clamp(max=.999), "the square is missing"),
        (lambda s, n: 1 - knots(s, n)[1:] ** 2 / knots(s, n)[:-1] ** 2, "clip at 0.999"),
        (lambda s, n: (1 - knots(s, n)[:-1] ** 2).clamp(max=.999), "the first beta is 0"),
        (lambda s, n: torch.cat([torch.zeros(1, dtype=torch.float64), betas_of(s, n)]), "T ratios"),
        (few_knots, "T ratios"),
        (lambda s, n: betas_of(s, n).float(), "float64"), (lambda s, n: betas_of(s, n).clamp(min=1e-5), "clip from above only"),
        (lambda s, n: betas_of(s, n).flip(0), "order"),
        (lambda s, n: 1 - knots(s, n)[1:] ** 2, "1 - beta_k is alpha_bar_k / alpha_bar_(k-1)"),
        (lambda s, n: betas_of(s, n).clamp(max=0.3), "1 - beta_k is|clip"),
        (lambda s, n: betas_of(s, n).clamp(max=0.02), "1 - beta_k is"),
        (lambda s, n: betas_of(s, n).clamp(min=1e-4), "clip from above only"),
        (lambda s, n: (1 - knots(s, n)[:-1] ** 2 / knots(s, n)[1:] ** 2).clamp(max=.999), "adds noise|index"),
        (late_times, "index shifted"),
        (last_set, "signal is left"),
        (scaled_to_end, "1 - beta_k is"),
        (lambda s, n: torch.linspace(1e-4, 0.02, n, dtype=torch.float64), "1 - beta_k is"),
    ],
    "02.2": [
        (with_b(lambda a, sigma_s, sigma_t: sigma_t**2 - a**2 * sigma_s**2), "take its root"),
        (with_b(lambda a, sigma_s, sigma_t: sigma_t - a * sigma_s), "not their standard deviations"),
        (with_b(lambda a, sigma_s, sigma_t: torch.sqrt(1 - a**2)), "holds only where"),
        (with_b(lambda a, sigma_s, sigma_t: torch.sqrt(sigma_t**2 - sigma_s**2)), "the variance of z_t"),
        (with_b(lambda a, sigma_s, sigma_t: torch.sqrt(sigma_t**2 - a * sigma_s**2)), "the variance of z_t"),
        (with_b(lambda a, sigma_s, sigma_t: sigma_t), "the variance of z_t"),
        (with_b(lambda a, sigma_s, sigma_t: -torch.sqrt(sigma_t**2 - a**2 * sigma_s**2)), "the variance of z_t"),
        (lambda s, t, f: (f(s)[0] / f(t)[0], transition(s, t, f)[1]), "other way round"),
        (lambda s, t, f: (f(t)[0], f(t)[1]), "should be alpha_t"),
        (lambda s, t, f: (transition(s, t, f)[0] ** 0.5, transition(s, t, f)[1]), "should be alpha_t"),
        (lambda s, t, f: transition(t, s, f), "other way round"),
        (lambda s, t, f: transition(s, t, f)[::-1], "changed places"),
        (lambda s, t, f: transition(s, t, f)[0], "return (a, b)"),
        (lambda s, t, f: (transition(s, t, f)[0].mean(), transition(s, t, f)[1].mean()), "return (a, b)"),
        (backwards, "the variance of z_t"),
        (spoils_s, "in-place"),
    ],
    "02.3": [
        (lambda z, d, a, s: -score(z, d, a, s), "sign"),
        (lambda z, d, a, s: (a * d - z) / s, "divide by sigma squared"),
        (lambda z, d, a, s: (d - z) / s**2, "centered at alpha z0"),
        (lambda z, d, a, s: (d - z / a) / s**2, "differs"),
        (lambda z, d, a, s: (a * d - z) / (a**2 + s**2), "sigma squared alone"),
        (lambda z, d, a, s: -z / s**2, "differs"),
        (lambda z, d, a, s: (a * d - z) / (2 * s**2), "differs"),
        (lambda z, d, a, s: score(z, d, a, s).sum((1, 2)), "shape"),
        (lambda z, d, a, s: score(z, d, a, s) * 1.01, "differs"),
        (lambda z, d, a, s: z.neg_().add_(a * d).div_(s**2), "changed its inputs"),
    ],
    "02.4": [
        (lambda lam: vp_time(lam / 2), "factor 2"), (lambda lam: vp_time(2 * lam), "factor 2"),
        (lambda lam: vp_time(-lam), "wrong way round"), (sigma_for_alpha, "wrong way round"),
        (lambda lam: -vp_time(lam), "other root"), (lambda lam: vp_root(lam, sign=-1), "other root"),
        (lambda lam: vp_root(lam, 0.0), "left out"), (lambda lam: vp_root(lam, slope=20.0), "not beta_max"),
        (lambda lam: vp_time(lam).mean(), "shape"), (lambda lam: vp_time(lam) + 0.01, "another log-SNR"),
        (whole_integral, "1/2 of the integral"), (lambda lam: 2 * vp_time(lam), "another log-SNR"),
        (lambda lam: vp_time(lam.neg_()), "in-place"),
    ],
}
