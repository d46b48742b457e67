"""Checks of the exercises of chapter 2: forward noising."""

import torch
from torch import Tensor

from ..checks import close, cosine, exercise, integer, noise, uniform


def _numbers(low: float, high: float, *shape: int, seed: int) -> Tensor:
    return uniform(low, high, *shape, seed=seed).double()


def _straight_line(t: Tensor) -> tuple[Tensor, Tensor]:
    """A straight line: alpha + sigma = 1, not variance preserving."""
    return 1 - t, t


def _fading(seed: int):
    """A variance preserving schedule, alpha = exp(-a t - b t^2): some signal is left at t = 1."""
    a, b = uniform(0.5, 1.5, seed=seed).item(), uniform(1, 3, seed=seed + 1).item()

    def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -a * t - b * t**2
        return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))
    return schedule


def _tilted(seed: int):
    """alpha = 1 - a t, sigma = b t: neither alpha^2 + sigma^2 nor alpha + sigma stays 1."""
    a, b = uniform(0.3, 0.7, seed=seed).item(), uniform(1.5, 3, seed=seed + 1).item()
    return lambda t: (1 - a * t, b * t)


@exercise("02.1", "back to betas", points=2)
def _(betas_of):
    few, many, long, fading = integer(5, 9, seed=1), integer(30, 60, seed=2), integer(900, 1100, seed=5), _fading(3)
    for schedule, steps in ((fading, few), (cosine, many), (cosine, long)):
        betas = torch.as_tensor(betas_of(schedule, steps))
        yield (f"{steps} steps give {steps} betas", betas.shape == (steps,),
               f"the shape is {tuple(betas.shape)}: T + 1 knots t = 0, 1/T, ..., 1 have T ratios between neighbors")
        yield "in float64", betas.dtype == torch.float64, (
            f"they are {betas.dtype}: make the times with dtype=torch.float64")
        alpha = schedule(torch.arange(steps + 1, dtype=torch.float64) / steps)[0]
        product = torch.cumprod(1 - betas, 0)
        yield ("the first step adds noise", bool(betas[0] > 0),
               "the first beta is 0: the ratios begin at alpha_bar_1 / alpha_bar_0, not at alpha_bar_0 itself")
        yield ("1 - beta multiplies alpha squared", not close(product[:-1], alpha[1:-1]),
               "the product of 1 - beta is alpha, and should be alpha_bar = alpha squared: the square is missing")
        yield ("the product of 1 - beta up to k is alpha(k / T) squared", close(product[:-1], alpha[1:-1] ** 2)
               and close(betas[:-1], 1 - (alpha[1:-1] / alpha[:-2]) ** 2, 1e-3, 0),
               "clip from above only: the first betas of a long chain are far below 1e-4"
               if betas[0] == betas[1] < 1e-3 else "1 - beta_k is alpha_bar_k / alpha_bar_(k-1), with t = k / T: is the order turned, or an index shifted?")
    yield ("all betas lie in (0, 0.999]", bool(((betas > 0) & (betas <= 0.999 + 1e-9)).all()),
           "cosine ends at alpha = 0, so the last beta would be 1: clip at 0.999")
    yield "the last one is clipped, not dropped", close(betas[-1], 0.999), (
        "the last beta of cosine is too small: it comes from alpha_bar_T = 0, and is clipped to 0.999")
    before, after = fading(torch.tensor([(few - 1) / few, 1.0], dtype=torch.float64))[0].square()
    yield ("a last step that needs no clipping is left alone", close(betas_of(fading, few)[-1], 1 - after / before),
           "the last beta is wrong although signal is left: clip the betas at 0.999, nothing else")


@exercise("02.2", "from one noisy time to a later one", points=2)
def _(transition):
    s, t = _numbers(0.05, 0.4, 3, 1, seed=1), _numbers(0.5, 0.95, 3, 1, seed=2)
    given = s.clone(), t.clone()
    pair = transition(*given, cosine)
    yield "a pair of numbers for each time", hasattr(pair, "__len__") and len(pair) == 2 and all(
        tuple(torch.as_tensor(each).shape) == (3, 1) for each in pair), "return (a, b), each of the shape of s and t"
    yield "a comes first", not close(pair[1] * cosine(s)[0], cosine(t)[0]), "a and b have changed places"
    yield "the inputs are left alone", close(given[0], s) and close(given[1], t), "an in-place operation changed s or t"
    for name, schedule in (("a variance preserving schedule", cosine), ("the straight line", _straight_line),
                           ("another one", _tilted(3))):
        a, b = transition(s, t, schedule)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
        yield (f"{name}: a carries alpha_s to alpha_t", close(a * alpha_s, alpha_t),
               "a * alpha_s should be alpha_t" + (": it is the other way round" if close(a * alpha_t, alpha_s) else ""))
        wanted = sigma_t**2 - a**2 * sigma_s**2
        yield (f"{name}: b is a standard deviation", not close(b, wanted),
               "b is the variance of the noise: take its root")
        yield (f"{name}: noises add up as variances", not close(b, sigma_t - a * sigma_s),
               "independent noises add their variances, not their standard deviations")
        yield (f"{name}: b is not a shortcut", close(1 - a**2, wanted) or not close(b, torch.sqrt(1 - a**2)),
               "b**2 = 1 - a**2 holds only where alpha**2 + sigma**2 = 1")
        yield (f"{name}: a**2 sigma_s**2 + b**2 = sigma_t**2", close(b**2, wanted) and bool((b > 0).all()),
               "what z_s brings along and what is added should make the variance of z_t")
    a, b = transition(torch.zeros(3, 1), t.float(), cosine)
    alpha, sigma = cosine(t.float())
    yield "from clean data it is q(z_t | z0)", close(a, alpha) and close(b, sigma), (
        "for s = 0 it should give (alpha_t, sigma_t)")


@exercise("02.3", "the score is a denoiser", points=3)
def _(score):
    low, high = torch.tensor([0.8, 0.5, 0.15]), torch.tensor([0.95, 0.7, 0.3])
    alpha = (low + (high - low) * uniform(0, 1, 3, seed=1)).double().view(-1, 1, 1)
    sigma = (1.15 - alpha) * _numbers(0.9, 1, 3, 1, 1, seed=2)  # 0.18 to 1, and not variance preserving
    m, s2 = uniform(0.8, 1.5, seed=3).item(), uniform(0.1, 0.4, seed=4).item()
    zt = noise(3, integer(2, 4, seed=5), 5, seed=6).double().requires_grad_()
    v = alpha**2 * s2 + sigma**2  # each number: half N(-m, s2), half N(m, s2)
    parts = torch.stack([-(zt - alpha * mean) ** 2 / (2 * v) for mean in (-m, m)])
    (wanted,) = torch.autograd.grad((torch.logsumexp(parts, 0) - 0.5 * torch.log(v)).sum(), zt)
    each = torch.stack([mean + alpha * s2 / v * (zt - alpha * mean) for mean in (-m, m)])
    z0_hat, zt = (parts.softmax(0) * each).sum(0).detach(), zt.detach()
    before = zt.clone(), z0_hat.clone()
    found = score(zt, z0_hat, alpha, sigma)
    yield "a gradient for every number", found.shape == zt.shape, (
        f"the shape is {tuple(found.shape)}, not {tuple(zt.shape)}")
    yield "the inputs are left alone", close(zt, before[0]) and close(z0_hat, before[1]), (
        "the function changed its inputs")
    yield "it points to where the density grows", not close(found, -wanted), (
        "the sign is wrong: noise points away from the data")
    yield ("it is divided by the variance of the noise", not close(found, wanted * sigma),
           "divide by sigma squared: what you have is minus the noise, E[eps | z_t]")
    yield ("the shrinking of the data counts", not close(found, (z0_hat - zt) / sigma**2),
           "z_t is centered at alpha z0, not at z0")
    yield ("only the variance of the noise divides", not close(found, (alpha * z0_hat - zt) / (alpha**2 + sigma**2)),
           "the density under the integral is q(z_t | z0), and its variance is sigma squared alone")
    yield "it is the gradient of log q(z_t)", close(found, wanted, atol=1e-3), (
        "it differs from the gradient of the exact density: begin with one z0, where q(z_t | z0) is normal")
    eps = noise(*zt.shape, seed=7).double()
    known = score(alpha * z0_hat + sigma * eps, z0_hat, alpha, sigma)
    yield "data of a single point: -eps / sigma", close(known, -eps / sigma, atol=1e-3), (
        "with z0 known, z_t - alpha z0 is sigma eps")


@exercise("02.4", "the time of a log-SNR", points=2)
def _(vp_time):
    t = _numbers(0.02, 0.98, 24, seed=1).sort().values.view(4, 6)
    log_alpha = -0.05 * t - 4.975 * t**2  # vp: the integral of 0.1 + 19.9 u, times -1/2
    lam = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    before = lam.clone()
    found = torch.as_tensor(vp_time(lam))
    yield "a time for every log-SNR", found.shape == t.shape, f"the shape is {tuple(found.shape)}, not {tuple(t.shape)}"
    yield "the input is left alone", torch.equal(lam, before), "an in-place operation changed lam"
    yield "no time is negative", bool((found > 0).all()), (
        "some are not positive: take the other root (or a sign is wrong)")
    yield ("later for less signal", bool(found[0, 0] < found[-1, -1]),
           "t should grow as the log-SNR falls: is alpha / sigma the wrong way round?")
    yield ("in our units", not (close(vp_time(2 * lam), t) or close(vp_time(lam / 2), t)),
           "a factor 2: our log-SNR is log(alpha / sigma), not log(alpha**2 / sigma**2)")
    yield "beta_min counts", not close(found, torch.sqrt(-log_alpha / 4.975)), (
        "beta_min = 0.1 was left out of the equation")
    steeper = (torch.sqrt(0.05**2 - 20 * log_alpha) - 0.05) / 10
    yield "beta rises by 19.9", not close(found, steeper), "the slope of beta(t) is beta_max - beta_min, not beta_max"
    yield "it gives back the times of vp", close(found, t, rtol=3e-4, atol=3e-4), (
        "vp has another log-SNR there: is log(alpha) -1/2 of the integral of beta, and alpha**2 + sigma**2 = 1?")
