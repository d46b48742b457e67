"""Right and wrong answers to the exercises of chapter 2, forward noising."""

import math
import torch

D = torch.float64

def knots(schedule, steps): return schedule(torch.arange(steps + 1, dtype=D) / steps)[0]

def betas_of(schedule, steps):
    alpha_bar = knots(schedule, steps) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)

def transition(s, t, schedule):
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    a = alpha_t / alpha_s
    return a, torch.sqrt(sigma_t**2 - a**2 * sigma_s**2)

def score(zt, z0_hat, alpha, sigma):
    return (alpha * z0_hat - zt) / sigma**2

def vp_time(lam, beta_min=0.1, beta_max=20.0):
    log_alpha = -torch.nn.functional.softplus(-2 * lam) / 2
    rise = (beta_max - beta_min) / 4
    return (torch.sqrt(beta_min**2 / 4 - 4 * rise * log_alpha) - beta_min / 2) / (2 * rise)

WRONG = {
    "02.1": [
        (lambda s, n: (1 - knots(s, n)[1:] / knots(s, n)[:-1]).clamp(max=.999), "the square is missing"),
        (lambda s, n: 1 - knots(s, n)[1:] ** 2 / knots(s, n)[:-1] ** 2, "clip at 0.999"),
        (lambda s, n: (1 - knots(s, n)[:-1] ** 2).clamp(max=.999), "the first beta is 0"),
        (lambda s, n: torch.cat([torch.zeros(1, dtype=D), betas_of(s, n)]), "T ratios"),
        (lambda s, n: betas_of(s, n).float(), "float64"),
        (lambda s, n: betas_of(s, n).flip(0), "order"),
        (lambda s, n: 1 - knots(s, n)[1:] ** 2, "1 - beta_k is alpha_bar_k / alpha_bar_(k-1)"),
        (lambda s, n: betas_of(s, n).clamp(max=0.3), "it is not|clip"),
    ],
    "02.2": [
        (lambda s, t, f: (transition(s, t, f)[0], transition(s, t, f)[1] ** 2), "take its root"),
        (lambda s, t, f: (transition(s, t, f)[0], f(t)[1] - transition(s, t, f)[0] * f(s)[1]), "not their standard deviations"),
        (lambda s, t, f: (transition(s, t, f)[0], torch.sqrt(1 - transition(s, t, f)[0] ** 2)), "holds only where"),
        (lambda s, t, f: (f(s)[0] / f(t)[0], transition(s, t, f)[1]), "other way round"),
        (lambda s, t, f: (transition(s, t, f)[0], torch.sqrt(f(t)[1] ** 2 - f(s)[1] ** 2)), "the variance of z_t"),
        (lambda s, t, f: (transition(s, t, f)[0], -transition(s, t, f)[1]), "the variance of z_t"),
    ],
    "02.3": [
        (lambda z, d, a, s: -score(z, d, a, s), "sign"),
        (lambda z, d, a, s: (a * d - z) / s, "divide by sigma squared"),
        (lambda z, d, a, s: (d - z) / s**2, "centered at alpha z0"),
        (lambda z, d, a, s: score(z, d, a, s).sum((1, 2)), "shape"),
        (lambda z, d, a, s: score(z, d, a, s) * 1.01, "differs"),
        (lambda z, d, a, s: z.neg_().add_(a * d).div_(s**2), "changed its inputs"),
    ],
    "02.4": [
        (lambda l: vp_time(l / 2), "factor 2"), (lambda l: vp_time(2 * l), "factor 2"),
        (lambda l: vp_time(-l), "wrong way round"), (lambda l: -vp_time(l), "other root"),
        (lambda l: vp_time(l, 0.0, 19.9), "left out"), (lambda l: vp_time(l, 0.1, 20.1), "not beta_max"),
        (lambda l: vp_time(l).mean(), "shape"), (lambda l: vp_time(l) + 0.01, "another log-SNR"),
    ],
}
SOLUTIONS = {"02.1": betas_of, "02.2": transition, "02.3": score, "02.4": vp_time}
