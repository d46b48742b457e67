"""Checks of the exercises: properties and closed forms, and for what fails the likely mistake in words.

    check("05.2", my_guide)        prints what holds and what does not

An exercise is a generator of (what was looked at, whether it holds, what is probably wrong if not). The first
that does not hold ends the check, and so does an error in the answer, which is shown in one line, not as a traceback.
An answer that is None, or returns None, is not done yet.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Finding = tuple[str, bool, str]
EXERCISES: dict[str, tuple[str, Callable[..., Iterator[Finding]]]] = {}  # "05.2": (title, its check)


class NotDone(Exception):
    """The answer is still the stub."""


def exercise(number: str, title: str):
    """Register a generator of findings as the check of one exercise."""
    def register(test):
        assert number not in EXERCISES, f"two checks for exercise {number}"
        EXERCISES[number] = (title, test)
        return test
    return register


def done(value):
    """The value itself; NotDone for None."""
    if value is None:
        raise NotDone
    return value


def check(number: str, *answers) -> None:
    """Look at the answer (or answers) to an exercise and say in words what holds and what does not."""
    passes(number, *answers)


def passes(number: str, *answers) -> bool:
    """What `check` says, and whether all of it holds."""
    if number not in EXERCISES:
        raise ValueError(f"there is no exercise {number!r}, choose from {', '.join(sorted(EXERCISES))}")
    title, test = EXERCISES[number]
    print(f"exercise {number}: {title}")
    try:
        given = [_watched(done(answer)) for answer in answers]
        for what, holds, mistake in test(*given):
            if not holds:
                print(f"  no   {what}\n       {mistake}")
                return False
            print(f"  yes  {what}")
    except NotDone:
        print("  not done yet")
        return False
    except Exception as error:  # whatever a learner's code raises: said in one line, and the notebook goes on
        print(f"  no   it stopped with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return False
    return True


def _watched(answer):
    """A function whose None, the answer of a stub, becomes NotDone. Anything else as it is."""
    if isinstance(answer, type) or not callable(answer) or isinstance(answer, torch.nn.Module):
        return answer
    return lambda *args, **kwargs: done(answer(*args, **kwargs))


def close(a, b, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Equal shapes (or a number for b), and values equal up to rounding."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    return (b.ndim == 0 or a.shape == b.shape) and torch.allclose(a, b.expand_as(a), rtol=rtol, atol=atol)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine schedule (alpha, sigma): variance preserving, down to alpha = 0."""
    return torch.cos(t * (torch.pi / 2)).clamp(min=0), torch.sin(t * (torch.pi / 2))


# 01 a variational autoencoder

@exercise("01.1", "KL between two Gaussians")
def _(answer):
    from torch.distributions import Normal, kl_divergence

    mean_q, logvar_q, mean_p, logvar_p = (noise(3, 4, 5, 2, seed=i) for i in range(4))
    q, p = Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())
    out = answer(mean_q, logvar_q, mean_p, logvar_p)
    yield "one number for each image", tuple(out.shape) == (3,), "sum over all axes but the first"
    exact, other = (kl_divergence(a, b).flatten(1).sum(1) for a, b in ((q, p), (p, q)))
    yield "it is KL(q || p), not KL(p || q)", not close(out, other), "q and p have changed places"
    yield "a sum over the latent values", not close(out, exact / 40), "this is the mean over the latent values"
    yield "the factor 1/2 is there", not close(out, 2 * exact), "twice too large: every term is halved"
    same = answer(mean_q, logvar_q, mean_q, logvar_q)
    yield "zero between a Gaussian and itself", close(same, 0.0, atol=1e-4), (
        "a term is missing: the -1, or the ratio of variances")
    zero = torch.zeros_like(mean_q)
    simple = 0.5 * (mean_q**2 + logvar_q.exp() - 1 - logvar_q).flatten(1).sum(1)
    yield "against N(0, I) it is the chapter's KL", close(answer(mean_q, logvar_q, zero, zero), simple), \
        "with mean_p = 0 and logvar_p = 0 the formula must become the one of the chapter"
    yield "equal to torch.distributions", close(out, exact), \
        "is the squared distance of the means divided by the variance of p, and exp() taken of logvar, not of half of it?"


@exercise("01.2", "one beta, two conventions")
def _(answer):
    value = float(answer)
    pixels, latents = 3 * 32 * 32, 4 * 8 * 8
    right = 1e-4 * pixels / latents / 2
    yield "the half of the squared error is counted", not close(value, 2 * right, rtol=0.02, atol=0), \
        "mse_loss has no 1/2: multiply the whole loss by half the number of pixel values"
    yield "the ratio of sizes is the right way up", not any(
        close(value, 1e-4 * latents / pixels * f, rtol=0.02, atol=0) for f in (1, 0.5, 2)), \
        "the KL's mean is over few values, the error's over many: the weight of the sums is larger, not smaller"
    yield "the KL was a mean over the latent values", not any(
        close(value, 1e-4 * pixels * f, rtol=0.02, atol=0) for f in (1, 0.5)), "divide by the number of latent values"
    yield "beta for sums", close(value, right, rtol=0.02, atol=0), \
        "write both losses with sums, and multiply one until its error is 1/2 sum (x - x_hat)^2"


@exercise("01.3", "the best linear autoencoder")
def _(answer):
    x = noise(200, 12) * torch.linspace(3, 0.2, 12) @ noise(12, 12, seed=1) + 5 * noise(12, seed=2)
    before = x.clone()
    mean, basis = answer(x, 4)
    yield "shapes (D,) and (D, k)", tuple(mean.shape) == (12,) and tuple(basis.shape) == (12, 4), \
        "mean has one entry per pixel; basis has one column per code value"
    yield "x itself is left alone", torch.equal(x, before), "x - x.mean(0), not x -= x.mean(0)"
    yield "the mean is that of the data", close(mean, x.mean(0), rtol=1e-3, atol=1e-3), (
        "mean over images, not over pixels")
    yield "the columns are orthonormal", close(basis.T @ basis, torch.eye(4), atol=1e-3), \
        "eigenvectors of length 1; an SVD's right vectors are rows of Vh: transpose"
    centered = (x - x.mean(0)).double()
    variances = torch.linalg.eigvalsh(centered.T @ centered)  # ascending
    error = float((centered - centered @ basis.double() @ basis.double().T).square().sum())
    yield "not the directions of least variance", error < 0.9 * float(variances[4:].sum()), \
        "eigh sorts upwards: the last k columns are the ones to keep"
    yield "the data were centered before", close(error, float(variances[:8].sum()), rtol=1e-2), \
        "the squared error must be the sum of the dropped variances: subtract the mean first"
    flat = noise(50, 3) @ noise(3, 12, seed=1) + 2
    mean, basis = (part.double() for part in answer(flat, 3))
    rebuilt = mean + (flat - mean) @ basis @ basis.T
    yield "data of three dimensions come back from three numbers", close(rebuilt, flat, rtol=1e-3, atol=1e-3), \
        "mean + (x - mean) @ basis @ basis.T must be x where x has no more than k dimensions"


@exercise("01.4", "a decoder that measures its own variance")
def _(answer):
    x = noise(5, 1, 6, 4)
    x_hat = x + 0.3 * noise(5, 1, 6, 4, seed=1)
    squared = (x - x_hat).double().square()
    out = float(answer(x, x_hat))
    mean = float(squared.mean())
    yield "a variance, not a standard deviation", not close(out, mean**0.5, rtol=1e-3), "leave out the square root"
    yield "an average over pixels and images", not any(close(out, f * mean, rtol=1e-3) for f in (24, 5, 120)), \
        "this is a sum: both terms of the objective grow with the number of values, so that number cancels"
    yield "the 1/2 cancels", not any(close(out, f * mean, rtol=1e-3) for f in (0.5, 2)), \
        "both terms have the factor 1/2, so the optimum has none"

    def objective(v):
        return float((squared / (2 * v) + 0.5 * torch.tensor(v, dtype=torch.float64).log()).sum())

    yield "a little more or less is worse", out > 0 and objective(out) < min(objective(0.97 * out), objective(1.03 * out)), \
        "set the derivative with respect to v to zero: -e^2 / (2 v^2) + 1 / (2 v), summed"
    yield "errors around another value than 0 count in full", close(float(answer(x, x + 1)), 1.0, rtol=1e-3), \
        "the mean of the squared error, not the variance of the error"


@exercise("01.6", "a Gaussian fitted to the latents")
def _(answer):
    mixing = noise(6, 6, seed=3)
    z = (noise(400, 6) @ mixing + torch.arange(6)).reshape(400, 2, 1, 3)
    sample, seeded = answer(z), torch.Generator().manual_seed(5)
    n = 20_000
    out = sample(n, seeded)
    yield "n latents of the shape of the given ones", tuple(out.shape) == (n, 2, 1, 3), "reshape to (n, *z.shape[1:])"
    yield "the generator decides", torch.equal(sample(4, torch.Generator().manual_seed(1)),
                                               sample(4, torch.Generator().manual_seed(1))), \
        "pass generator= on to torch.randn"
    flat, given = out.flatten(1).double(), z.flatten(1).double()
    cov, spread = torch.cov(given.T), given.std(0)
    yield "the mean is right", bool(((flat.mean(0) - given.mean(0)).abs() < 6.5 * spread / n**0.5).all()), \
        "add the mean of the latents, value by value"
    drawn = torch.cov(flat.T)
    band = 6.5 * ((cov.diag()[:, None] * cov.diag() + cov**2) / n) ** 0.5 + 0.01 * cov.diag().max()
    yield "each value has its variance", bool(((drawn - cov).diag().abs() < band.diag()).all()), \
        "multiply the noise by a square root of the covariance: not by the covariance, nor by variances"
    yield "values that belong together stay together", bool(((drawn - cov).abs() < band).all()), \
        "the values are drawn one by one: use the whole covariance matrix, and the right side of its root"
    few = answer(noise(5, 2, 3, 3))(7, torch.Generator().manual_seed(0))
    yield "fewer latents than dimensions are no obstacle", tuple(few.shape) == (7, 2, 3, 3) and bool(few.isfinite().all()), \
        "then the covariance has zero eigenvalues: eigh with clamp(min=0), or a little added to the diagonal"


# 02 forward noising

def _straight_line(t: Tensor) -> tuple[Tensor, Tensor]:
    """A straight line: alpha + sigma = 1, not variance preserving."""
    return 1 - t, t


def _fading(t: Tensor) -> tuple[Tensor, Tensor]:
    """Variance preserving, alpha = exp(-t - 2 t^2): some signal is left at t = 1."""
    log_alpha = -t - 2 * t**2
    return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))


@exercise("02.1", "back to betas")
def _(betas_of):
    for schedule, steps in ((_fading, 7), (_cosine, 40)):
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
        yield ("the product of 1 - beta up to k is alpha(k / T) squared", close(product[:-1], alpha[1:-1] ** 2),
               "it is not: 1 - beta_k is alpha_bar_k / alpha_bar_(k-1), with t = k / T (is the order or an index shifted?)")
    yield ("all betas lie in (0, 0.999]", bool(((betas > 0) & (betas <= 0.999)).all()),
           "cosine ends at alpha = 0, so the last beta would be 1: clip at 0.999")
    before, after = _fading(torch.tensor([6 / 7, 1.0], dtype=torch.float64))[0].square()
    yield ("a last step that needs no clipping is left alone", close(betas_of(_fading, 7)[-1], 1 - after / before),
           "the last beta is wrong although signal is left: clip the betas at 0.999, nothing else")


@exercise("02.2", "from one noisy time to a later one")
def _(transition):
    s, t = torch.tensor([0.1, 0.3, 0.05], dtype=torch.float64), torch.tensor([0.2, 0.9, 0.6], dtype=torch.float64)
    for name, schedule in (("a variance preserving schedule", _cosine), ("the straight line", _straight_line)):
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
    a, b = transition(torch.zeros(2), torch.tensor([0.3, 0.8]), _cosine)
    alpha, sigma = _cosine(torch.tensor([0.3, 0.8]))
    yield "from clean data it is q(z_t | z0)", close(a, alpha) and close(b, sigma), (
        "for s = 0 it should give (alpha_t, sigma_t)")


@exercise("02.3", "the score is a denoiser")
def _(score):
    alpha, sigma = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in ([0.9, 0.6, 0.2], [0.3, 0.8, 0.95]))
    zt = noise(3, 2, 5, seed=1).double().requires_grad_()
    v = alpha**2 * 0.25 + sigma**2  # each number: half N(-1, 0.25), half N(1, 0.25)
    parts = torch.stack([-(zt - alpha * m) ** 2 / (2 * v) for m in (-1, 1)])
    (wanted,) = torch.autograd.grad((torch.logsumexp(parts, 0) - 0.5 * torch.log(v)).sum(), zt)
    each = torch.stack([m + alpha * 0.25 / v * (zt - alpha * m) for m in (-1, 1)])
    z0_hat, zt = (parts.softmax(0) * each).sum(0).detach(), zt.detach()
    before = zt.clone(), z0_hat.clone()
    found = score(zt, z0_hat, alpha, sigma)
    yield "a gradient for every number", found.shape == zt.shape, (
        f"the shape is {tuple(found.shape)}, not {tuple(zt.shape)}")
    yield "it points to where the density grows", not close(found, -wanted), (
        "the sign is wrong: noise points away from the data")
    yield ("it is divided by the variance of the noise", not close(found, wanted * sigma),
           "divide by sigma squared: what you have is minus the noise, E[eps | z_t]")
    yield ("the shrinking of the data counts", not close(found, (z0_hat - zt) / sigma**2),
           "z_t is centered at alpha z0, not at z0")
    yield "it is the gradient of log q(z_t)", close(found, wanted), "it differs from the gradient of the exact density"
    yield "the inputs are left alone", close(zt, before[0]) and close(z0_hat, before[1]), (
        "the function changed its inputs")


@exercise("02.4", "the time of a log-SNR")
def _(vp_time):
    t = torch.linspace(0.02, 0.98, 24, dtype=torch.float64).view(4, 6)
    log_alpha = -0.05 * t - 4.975 * t**2  # vp: the integral of 0.1 + 19.9 u, times -1/2
    lam = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    found = torch.as_tensor(vp_time(lam))
    yield "a time for every log-SNR", found.shape == t.shape, f"the shape is {tuple(found.shape)}, not {tuple(t.shape)}"
    yield "no time is negative", bool((found > 0).all()), (
        "some are not positive: take the other root (or a sign is wrong)")
    yield ("later for less signal", bool((found.flatten().diff() > 0).all()),
           "t should grow as the log-SNR falls: is alpha / sigma the wrong way round?")
    yield ("in our units", not (close(vp_time(2 * lam), t) or close(vp_time(lam / 2), t)),
           "a factor 2: our log-SNR is log(alpha / sigma), not log(alpha**2 / sigma**2)")
    yield "beta_min counts", not close(found, torch.sqrt(-log_alpha / 4.975)), (
        "beta_min = 0.1 was left out of the equation")
    steeper = (torch.sqrt(0.05**2 - 20 * log_alpha) - 0.05) / 10
    yield "beta rises by 19.9", not close(found, steeper), "the slope of beta(t) is beta_max - beta_min, not beta_max"
    yield "it gives back the times of vp", close(found, t, rtol=1e-4, atol=1e-4), (
        "vp has another log-SNR at these times")


# 03 the U-Net and the denoiser

@exercise("03.1", "what a target weighs")
def _(answer):
    t = torch.tensor([0.1, 0.35, 0.5, 0.8, 0.97], dtype=torch.float64)
    alpha, sigma = _cosine(t)
    yield "x0 weighs its own error with 1", close(answer(alpha, sigma, "x0"), 1.0), \
        "for x0 the output is z0, so both losses are the same"
    eps = torch.as_tensor(answer(alpha, sigma, "eps"), dtype=torch.float64)
    snr = (alpha / sigma) ** 2
    yield "eps weighs it with alpha^2 / sigma^2", close(eps, snr), (
        "upside down: an error of z0 times alpha / sigma is the error of eps" if close(eps, 1 / snr) else
        "losses are squares: square the factor" if close(eps, snr.sqrt()) else
        "keep z_t fixed: an error e of z0 is an error -alpha e / sigma of eps")
    v = torch.as_tensor(answer(alpha, sigma, "v"), dtype=torch.float64)
    yield "v weighs it with 1 + alpha^2 / sigma^2 where alpha^2 + sigma^2 = 1", close(v, 1 + snr), \
        "put eps = (z_t - alpha z0) / sigma into v = alpha eps - sigma z0, and see what z0 is multiplied by"
    yield "flow weighs it with 1 / sigma^2 on the straight line", \
        close(answer(1 - t, t, "flow"), 1 / t**2), "the determinant is alpha + sigma, which is 1 there"
    yield "on the straight line v weighs it with ((1 - t)^2 + t^2)^2 / t^2", \
        close(answer(1 - t, t, "v"), ((1 - t) ** 2 + t**2) ** 2 / t**2), \
        "alpha^2 + sigma^2 = 1 was used, which holds for variance-preserving schedules only"


@exercise("03.2", "attention in a window")
def _(answer):
    def plain(q, k, v):
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    height, width = 4, 7
    q, k, v = (noise(3, 2, height * width, 8, seed=i) for i in range(3))
    out = answer(q, k, v, height, width, 28)
    yield "the shape stays (B, heads, N, d)", out.shape == v.shape, f"got {tuple(out.shape)}, expected {tuple(v.shape)}"
    yield "a window over the whole map is plain attention", close(out, plain(q, k, v)), \
        "is every score divided by sqrt(d), and nothing masked that is near enough?"
    ones = answer(q, k, torch.ones_like(v), height, width, 1)
    yield "the weights of a window add up to 1", close(ones, torch.ones_like(v)), \
        "mask before the softmax, with -inf, not after it with 0"
    yield "radius 0 gives every position its own value", close(answer(q, k, v, height, width, 0), v), \
        "only the position itself is at distance 0"
    unit = torch.eye(height * width).expand(3, 2, -1, -1)  # values that show the weights
    weights = answer(q, k, unit, height, width, 1)[0, 0]
    row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
    near = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) <= 1
    ragged = (torch.arange(28)[:, None] - torch.arange(28)).abs() <= 1
    tall = torch.maximum((torch.arange(28)[:, None] // height - torch.arange(28) // height).abs(),
                         (torch.arange(28)[:, None] % height - torch.arange(28) % height).abs()) <= 1
    found = weights > 0
    yield "each position sees the 3x3 square around it and nothing else", bool((found == near).all()), (
        "the distance is that of the flattened index: the end of a row is not next to the start of the following one"
        if bool((found == ragged).all()) else
        "height and width changed places: position i lies in row i // width" if bool((found == tall).all()) else
        "the distance is the larger one of |rows| and |columns|, and the radius itself belongs to the window")


@exercise("03.3", "an average without a start")
def _(answer):
    same = [2.5] * 7
    found = [float(x) for x in answer(same, 0.99)]
    yield "one average for each value", len(found) == 7, f"got {len(found)} averages for 7 values"
    yield "the average of a constant is that constant, from the first step", close(found, torch.tensor(same)), \
        ("without a division by 1 - d^n the start at zero stays in the average" if close(found[0], 0.025) else
         "divide what you return by 1 - d^n, n from 1, and keep the running average itself as it is")
    values, d = noise(40).tolist(), 0.9
    found = torch.tensor([float(x) for x in answer(values, d)])
    second = (d * values[0] + values[1]) / (1 + d)
    yield "after two values it is (d x1 + x2) / (1 + d)", close(found[1], second), (
        "that keeps the first value with the weight d instead of 1 - d: a start with x1 is a start, too"
        if close(found[1], d * values[0] + (1 - d) * values[1]) else
        "after n values divide by 1 - d^n, with n counted from 1")
    weights = d ** torch.arange(39, -1, -1.0)
    yield "the n-th value back has d^n of the weight of the last", \
        close(found[-1], (weights * torch.tensor(values)).sum() / weights.sum()), \
        "the correction must not go back into the running average: keep the two apart"


@exercise("03.6", "the best linear denoiser")
def _(answer):
    cov = torch.tensor([[1.5, 0.9, 0.0], [0.9, 1.0, -0.3], [0.0, -0.3, 0.4]], dtype=torch.float64)
    mean, n = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 200_001
    alpha, sigma = 0.6, 0.8
    z0 = mean + noise(n, 3).double() @ torch.linalg.cholesky(cov).T
    zt = alpha * z0 + sigma * noise(n, 3, seed=1).double()
    kept = zt.clone()
    out = answer(zt, alpha, sigma, mean, cov)
    yield "the shape stays (B, D), and z_t is not changed", out.shape == zt.shape and torch.equal(zt, kept), \
        f"got {tuple(out.shape)} for {tuple(zt.shape)}, or z_t was changed in place"
    yield "without noise it is z_t / alpha", close(answer(zt[:5], 0.9, 1e-7, mean, cov), zt[:5] / 0.9), \
        "then cov cancels: alpha cov (alpha^2 cov)^-1 = 1 / alpha; is the mean of z_t, alpha mean, subtracted?"
    yield "with nothing but noise it is the mean", close(answer(zt[:5], 0.0, 1.0, mean, cov), mean.expand(5, 3)), \
        "nothing is known there but the mean of the data: is it added back?"
    scale = answer(mean + noise(4, 3).double(), alpha, sigma, mean, torch.eye(3).double())
    expected = mean + alpha * (mean + noise(4, 3).double() - alpha * mean)
    yield "for white latents it is mean + alpha (z_t - alpha mean)", close(scale, expected), \
        "the covariance of z_t is alpha^2 cov + sigma^2 I"
    error = out - z0
    yield "its error is uncorrelated with z_t, so no linear denoiser is better", \
        bool((error.T @ (zt - alpha * mean) / n).abs().max() < 0.02), \
        "rows are samples: (z_t - alpha mean) @ inverse @ cov, both symmetric; is it the inverse of the whole sum?"


# 04 the latent scale


def _moments(n: int = 60, seed: int = 0) -> Tensor:
    """(n, 2, 3, 4, 6): means with an offset and a spread of their own in each channel, and variances from .05 to 1."""
    spread, offset = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([-1.0, 0.0, 4.0])
    mean = noise(n, 3, 4, 6, seed=seed) * spread[:, None, None] + offset[:, None, None]
    mean += torch.linspace(-2, 2, n)[:, None, None, None]
    logvar = noise(n, 3, 4, 6, seed=seed + 1).clamp(-3, 0)
    return torch.stack([mean, logvar], dim=1)


@exercise("04.1", "a shift and a scale for each channel")
def _(answer):
    moments = _moments()
    kept = moments.clone()
    shift, scale = answer(moments)
    yield ("one shift and one scale per channel, shape (C,)", shift.shape == scale.shape == (3,),
           f"got shapes {tuple(shift.shape)} and {tuple(scale.shape)}: reduce over images, rows and columns, keep the channels")
    yield "the input is left as it was", torch.equal(moments, kept), (
        "something wrote into moments: work on a new tensor")
    mean, variance = moments[:, 0].double(), moments[:, 1].double().exp()
    center = mean.mean((0, 2, 3))
    yield ("the shift is the mean of each channel", close(shift, center),
           "z0 = scale * (z - shift): the shift is in units of z, neither scaled nor negated")
    total = mean.var((0, 2, 3), correction=0) + variance.mean((0, 2, 3))
    yield ("the scale is not that of the means alone", not close(scale, mean.std((0, 2, 3), correction=0) ** -1, rtol=1e-2),
           "training sees samples: Var(z) = Var(mean) + E[exp(logvar)], and the second term is missing")
    yield "the scale is not the variance's inverse", not close(scale, 1 / total, rtol=1e-2), "1 / std, not 1 / variance"
    yield ("exp(logvar) is the variance", not close(scale, (mean.var((0, 2, 3)) + (variance**0.5).mean((0, 2, 3))) ** -0.5, rtol=1e-3),
           "exp(logvar / 2) is the standard deviation; the sum needs the variance, exp(logvar)")
    yield ("scale * (z - shift) has mean 0 and std 1 in each channel", close(scale, total**-0.5, rtol=3e-3),
           "compare with 1 / sqrt(Var(mean) + E[exp(logvar)]), taken in each channel about that channel's mean")


@exercise("04.2", "the scale of a stream")
def _(answer):
    moments = _moments()

    def stream(data: Tensor, sizes: list[int]):
        yield from data.split(sizes)

    def exact(data: Tensor) -> Tensor:
        mean, logvar = data[:, 0].double(), data[:, 1].double()
        return (mean.var(correction=0) + logvar.exp().mean()) ** -0.5

    first = answer(stream(moments, [60]))
    yield ("one batch: 1 / sqrt(Var(mean) + E[exp(logvar)])", close(first, exact(moments)),
           "on a single batch this is latent_scale itself: is exp(logvar) there, and 1 / sqrt at the end?")
    yield ("six batches of one size: the same number", close(answer(stream(moments, [10] * 6)), exact(moments)),
           "an average of the batches' scales, stds or variances leaves out the variance between the batches: "
           "collect the sums of mean, mean**2 and exp(logvar) instead")
    yield ("batches of unequal size: the same number", close(answer(stream(moments, [1, 40, 19])), exact(moments)),
           "a batch of 1 counts as much as one of 40: divide sums by the number of values at the very end")
    far = moments.clone()
    far[:, 0] += 1000
    yield ("latents around 1000: still the same, to four digits", close(answer(stream(far, [1, 40, 19])), exact(far)),
           "E[mean**2] - E[mean]**2 loses its digits in float32: convert each batch to float64 first")


@exercise("04.3", "a wrong scale on the straight line")
def _(answer):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    yield "t = 0 stays data, t = 1 stays noise", close(answer(t, 3.0)[[0, -1]], torch.tensor([0.0, 1.0])), \
        "both ends are fixed points: no signal stays no signal, whatever the scale"
    yield "s = 1 changes nothing", close(answer(t, 1.0), t), "unit data is the reference: for s = 1 the answer is t"
    yield ("data larger than 1 is cleaner at the same t: t' < t for s = 3", bool((answer(t, 3.0) < t)[1:-1].all()),
           "the other way round: s * (1 - t) / t = (1 - t') / t', solved for t'")
    inner, s = t[1:-1], 0.3
    there = answer(inner, s)
    yield "the ratio of signal to noise agrees: (1 - t') / t' = s (1 - t) / t", close((1 - there) / there, s * (1 - inner) / inner), \
        "write the ratio alpha / sigma of both sides, and solve for t'; is it s, not s**2 or log s?"
    yield "1 / s undoes s", close(answer(there, 1 / s), inner), "shifting by log s and then by -log s must give t again"
    u, eps = noise(9, 4, seed=2).double(), noise(9, 4, seed=3).double()
    zt, unit = (1 - inner[:, None]) * s * u + inner[:, None] * eps, (1 - there[:, None]) * u + there[:, None] * eps
    factor = (inner + s * (1 - inner))[:, None]
    yield "z_t of the small data is a multiple of z_t' of unit data", close(zt, factor * unit), \
        "the ratio agrees, so the two noisy tensors differ by one factor only"


@exercise("04.4", "a schedule for a wrong scale")
def _(answer):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for s in (0.2, 5.0):
        schedule = answer(_cosine, s)
        alpha, sigma = schedule(t)
        yield f"s = {s}: alpha**2 + sigma**2 = 1", close(alpha**2 + sigma**2, 1.0), \
            "a new ratio is not enough: divide both by sqrt(alpha**2 + sigma**2), so that the variance is preserved"
        want = torch.log(_cosine(t)[0] / _cosine(t)[1])
        got = torch.log(alpha / sigma) + torch.log(torch.tensor(s, dtype=torch.float64))
        yield f"s = {s}: the sign of the shift", bool(((got - want).abs() < (torch.log(alpha / sigma) - torch.log(
            torch.tensor(s, dtype=torch.float64)) - want).abs()).all()), \
            "the other way round: data larger than 1 needs more noise, so it is sigma that gets the factor s"
        yield f"s = {s}: s * alpha / sigma is what it is for unit data", close(got, want), \
            "the log-SNR must move by exactly log s: is the factor s, not s**2 or sqrt(s)?"
        ends = schedule(torch.tensor([0.0, 1.0], dtype=torch.float64))
        yield f"s = {s}: t = 0 is data and t = 1 is noise", close(ends[0], torch.tensor([1.0, 0.0])) and close(
            ends[1], torch.tensor([0.0, 1.0])), "at the ends nothing changes; a division by sigma or by alpha gives NaN there"
    shape = schedule(torch.rand(3, 1, 1, 1))[0]
    yield "times of any shape and dtype", shape.shape == (3, 1, 1, 1) and shape.dtype == torch.float32, \
        "a schedule takes (B, 1, 1, 1) in float32 as well: use only elementwise operations"


# 05 guidance

@exercise("05.1", "the tilted Gaussian")
def _(answer):
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64)

    def normal(mean, var):
        return -((grid - mean) ** 2) / (2 * var) - 0.5 * torch.tensor(var, dtype=torch.float64).log()

    def truth(m, v, s):
        p = ((1 - s) * normal(0.0, 1.0) + s * normal(m, v)).softmax(0)
        mean = float((p * grid).sum())
        return mean, float((p * (grid - mean) ** 2).sum())

    cases = [(1.2, 0.5, s) for s in (0.5, 2.0, 4.0)] + [(-0.7, 0.8, 3.0), (0.4, 0.25, 1.5)]
    ends = [(1.2, 0.5, 0.0), (1.2, 0.5, 1.0)]
    got = {case: tuple(float(value) for value in done(answer(*case))) for case in ends + cases}
    yield ("s = 0 gives the prior, N(0, 1)", close(torch.tensor(got.pop((1.2, 0.5, 0.0))), torch.tensor((0.0, 1.0))),
           "at s = 0 the label must not count: of the two factors p(z)^(1 - s) and p(z | y)^s only the prior is left")
    mean, var = got.pop((1.2, 0.5, 1.0))
    yield ("s = 1 gives the class, N(m, v)", close(mean, 1.2) and close(var, 0.5),
           "the second number should be the variance, not its root" if close(var, 0.5**0.5) else
           "at s = 1 it is Bayes' rule itself: p(z) p(y | z) is proportional to p(z | y)")
    yield ("the variance is that of the product, summed on a grid",
           all(close(got[case][1], truth(*case)[1], rtol=1e-3) for case in cases),
           "precisions (1 / variance) add up: 1 - s times that of the prior, s times that of the class")
    yield ("the mean is that of the product, summed on a grid",
           all(close(got[case][0], truth(*case)[0], rtol=1e-3) for case in cases),
           "the mean is the precision-weighted one: s m / v divided by the new precision")


@exercise("05.2", "rescaled guidance")
def _(answer):
    uncond, cond = 0.5 + 2.0 * noise(3, 4, 5, 7, seed=1), noise(3, 4, 5, 7, seed=2) - 0.3
    cond = cond * torch.tensor([0.5, 1.0, 3.0]).reshape(-1, 1, 1, 1)
    before = uncond.clone(), cond.clone()
    plain = uncond + 3.0 * (cond - uncond)

    def spread(x: Tensor) -> Tensor:
        return x.flatten(1).std(1)

    got = done(answer(uncond, cond, 3.0, 0.0))
    yield ("the arguments are as they were", torch.equal(uncond, before[0]) and torch.equal(cond, before[1]),
           "an operation in place (+=, mul_, ...) has changed an argument")
    yield "it keeps the shape", got.shape == cond.shape, f"expected {tuple(cond.shape)}, got {tuple(got.shape)}"
    yield ("phi = 0 is guidance as it was", close(got, plain),
           "at phi = 0 nothing is rescaled: uncond + s (cond - uncond); is phi the share of the rescaled one?")
    got = done(answer(uncond, cond, 3.0, 1.0))
    whole = plain * (cond.std() / plain.std())
    yield ("phi = 1 gives each sample the standard deviation of its own conditional estimate",
           close(spread(got), spread(cond), rtol=1e-3),
           "one ratio for the whole batch makes a sample depend on its neighbors: take the std over dims (1, 2, 3) only"
           if close(got, whole, rtol=1e-3) else
           "multiply by std(cond) / std(guided), each over all values of one sample and of all its channels together")
    ratio = (spread(cond) / spread(plain)).reshape(-1, 1, 1, 1)
    yield ("rescaling multiplies and does nothing else", close(got, plain * ratio, rtol=1e-3),
           "no mean is taken out before, and none put back: guided * std(cond) / std(guided)")
    mixture = (0.7 * ratio + 0.3) * plain
    yield ("phi = 0.7 is a mixture of both", close(answer(uncond, cond, 3.0, 0.7), mixture, rtol=1e-3),
           "phi times the rescaled estimate plus 1 - phi times the plain one")
    yield ("scale 1 is the conditional estimate at any phi", close(answer(uncond, cond, 1.0, 0.7), cond),
           "at s = 1 guided is cond and the ratio is 1")


@exercise("05.3", "a test that catches")
def _(answer):
    def coin(shape, generator):
        return torch.rand(shape, generator=generator)

    def right(y, null, share, generator=None):
        return torch.where(coin(y.shape, generator) < share, null, y)

    def also_right(y, null, share, generator=None):
        return torch.where(coin(y.shape, generator) >= 1 - share, torch.full_like(y, null), y)

    def reverse(y, null, share, generator=None):
        return torch.where(coin(y.shape, generator) > share, null, y)

    def together(y, null, share, generator=None):
        return torch.where(coin((1,), generator) < share, null, y)

    def never(y, null, share, generator=None):
        return y.clone()

    def wrong_null(y, null, share, generator=None):
        return torch.where(coin(y.shape, generator) < share, 0, y)

    def one_class(y, null, share, generator=None):  # the right share in all, but only of the even classes
        return torch.where((coin(y.shape, generator) < 2 * share) & (y % 2 == 0), null, y)

    def shuffles(y, null, share, generator=None):
        mixed = y[torch.randperm(len(y), generator=generator)]
        return torch.where(coin(y.shape, generator) < share, null, mixed)

    def in_place(y, null, share, generator=None):
        y[coin(y.shape, generator) < share] = null
        return y

    def verdict(drop) -> bool:
        try:
            return bool(done(answer(drop)))
        except (AssertionError, RuntimeError, IndexError, NotDone):
            return False  # a test may also complain by an assert, or by returning nothing

    done(answer(right))
    yield ("right functions pass, eight times each", all(map(verdict, 8 * (right, also_right))),
           "it turned a right one away: take more labels or a wider band, say five times sqrt(share (1 - share) / n)")
    for drop, what, mistake in (
        (reverse, "a reversed inequality is caught",
         "90 % dropped passed: compare the share of nulls with the share asked for"),
        (never, "no dropout at all is caught", "nothing was dropped, and it passed"),
        (wrong_null, "a wrong null label is caught",
         "dropped labels became class 0: count the nulls, and see that no other label has changed"),
        (together, "one coin for the whole batch is caught",
         "all or nothing passed: draw once with very many labels, not many times with the mean taken"),
        (shuffles, "labels that move are caught",
         "the labels that were kept stand at other places: compare them with the input where they are no null"),
        (one_class, "a coin that looks at the label is caught",
         "the share was right over all and wrong in each class: look at the classes one by one"),
        (in_place, "a change of the input is caught",
         "the labels given were overwritten, so the next epoch has fewer: keep a clone and compare"),
    ):
        yield what, not any(verdict(drop) for _ in range(3)), mistake


@exercise("05.4", "what an interval costs")
def _(answer):
    log_snr = torch.linspace(-3.5, 2.5, 20, dtype=torch.float64)  # "middle": 20 knots, then the landing at t = 0
    t = torch.atan(torch.exp(-log_snr)) * 2 / torch.pi  # cosine: alpha / sigma = 1 / tan(pi t / 2)
    t[0] = 1.0
    inside = int(((t >= 0.2) & (t <= 0.8)).sum())
    value = float(answer)
    yield ("it is a number between 20 and 40", 20 <= value <= 40,
           "each of 20 steps costs one evaluation, or two inside the interval")
    yield ("it is not the share of the time axis", value != 20 + round(0.6 * 20),
           "0.2 ... 0.8 is 60 % of the time axis, but the grid is not uniform in t: see time_grid(20, cosine, 'middle')")
    yield ("it counts the evaluations inside twice", value == 20 + inside,
           f"{value:g} is not it: of 21 times the denoiser is asked at the first 20, at cost 2 inside and 1 outside")


# 06 the diffusion transformer


@exercise("06.1", "a patch embedding is a convolution")
def _(answer):
    for p, C, D in ((2, 3, 5), (3, 4, 6), (1, 4, 8)):
        weight, zt = noise(D, C * p * p), noise(2, C, 2 * p, 3 * p, seed=1)
        kept, kernel = weight.clone(), answer(weight, p)
        shape = tuple(kernel.shape)
        yield f"the kernel of {C} channels and patch {p} has shape {(D, C, p, p)}", shape == (D, C, p, p), (
            f"its shape is {shape}: what conv2d takes is (out, in, height, width)")
        wanted = torch.nn.functional.pixel_unshuffle(zt, p).flatten(2).transpose(1, 2) @ weight.T
        out = torch.nn.functional.conv2d(zt, kernel, stride=p).flatten(2).transpose(1, 2)
        turned = torch.nn.functional.conv2d(zt, kernel.mT, stride=p).flatten(2).transpose(1, 2)
        yield f"patch {p}: the convolution with stride {p} gives the tokens of the linear layer", close(out, wanted), (
            "rows and columns of a patch are swapped" if close(turned, wanted) else
            "the values of a token are ordered (channel, row, column), as pixel_unshuffle writes them")
        yield f"patch {p}: the weight is as it was", torch.equal(weight, kept), "the weight was changed in place"


@exercise("06.2", "fold the modulation away")
def _(answer):
    weight, bias, shift, scale, x = noise(5, 3), noise(5, seed=1), noise(3, seed=2), noise(3, seed=3), noise(7, 3, seed=4)
    given = [weight, bias, shift, scale]
    kept = [tensor.clone() for tensor in given]
    W, b = answer(*given)
    yield "the layer and its modulation are as they were", all(map(torch.equal, given, kept)), (
        "an input was changed in place")
    yield "weight and bias have the shapes of the layer", W.shape == (5, 3) and b.shape == (5,), (
        f"they are {tuple(W.shape)} and {tuple(b.shape)}, and should be (5, 3) and (5,)")
    yield "what multiplies x is right", close(W, weight + weight * scale), (
        "the 1 in 1 + scale is missing: with scale zero the layer must stay what it is" if close(W, weight * scale) else
        "scale multiplies inputs: column j of the weight is multiplied by 1 + scale[j]")
    yield "what remains at x = 0 is right", close(b, weight @ shift + bias), (
        "the shift is not scaled: the bias gains W shift, with the weight as it was" if close(b, W @ shift + bias) else
        "the shift goes through the layer, too: the bias gains W shift")
    out = torch.nn.functional.linear(x * (1 + scale) + shift, weight, bias)
    yield "modulation and layer in one give the same outputs", close(torch.nn.functional.linear(x, W, b), out), (
        "they differ")


@exercise("06.3", "what does the paper count?")
def _(answer):
    tokens, width, depth = (32 // 2) ** 2, 1152, 28
    linear, products = 12 * width**2 * tokens * depth / 1e9, 2 * tokens**2 * width * depth / 1e9
    near = lambda wanted: abs(float(answer) / wanted - 1) < 0.004  # noqa: E731
    if near(2 * (linear + products)):
        mistake = "that counts a multiplication with its addition as two"
    elif near(linear):
        mistake = "the two products of attention, q k^T and weights times v, are missing"
    elif float(answer) > 1e6:
        mistake = "the answer is in billions"
    elif float(answer) > 3 * linear:
        mistake = "how many tokens does a 32 x 32 latent have with patch 2?"
    else:
        mistake = "half of 24 D^2 N + 4 D N^2 for a block, times the depth"
    yield f"about {linear + products:.0f} billion multiply-adds, the paper's number of 119 nearly whole", near(linear + products), mistake


@exercise("06.4", "rotary positions")
def _(answer):
    d, place = 8, torch.arange(6)
    x = noise(2, 3, 6, d)
    kept, out = x.clone(), answer(x, place)
    yield "the shape and the dtype stay", out.shape == x.shape and out.dtype == x.dtype, (
        f"{tuple(x.shape)} {x.dtype} became {tuple(out.shape)} {out.dtype}")
    yield "the input is as it was", torch.equal(x, kept), "x was changed in place: rotate into a new tensor"
    yield "at place 0 nothing is turned", close(out[:, :, 0], x[:, :, 0]), "the angle at place 0 is 0: cos 1, sin 0"
    yield "lengths stay", close(out.norm(dim=-1), x.norm(dim=-1)), (
        "a rotation is (a cos - b sin, a sin + b cos): one sign is wrong, or a and b share no angle")
    q, k = noise(1, 1, 1, d, seed=1), noise(1, 1, 1, d, seed=2)

    def product(m, n):
        return (answer(q, torch.tensor([m])) * answer(k, torch.tensor([n]))).sum()

    yield "q at m times k at n depends on m - n only", close(product(9, 4), product(6, 1)) and close(product(2, 5), product(0, 3)), (
        "the angle must be place times frequency, the same for q and k")
    yield "and it does depend on m - n", not close(product(9, 4), product(9, 5)), "nothing was turned"
    turn = answer(torch.eye(d)[None, None].expand(1, 1, d, d), torch.ones(d))[0, 0]  # one place onward, as a matrix
    angles = torch.linalg.eigvals(turn.double()).angle().abs().sort().values
    wanted = (10_000.0 ** (-torch.arange(d // 2, dtype=torch.float64) * 2 / d)).repeat_interleave(2).sort().values
    yield "the frequencies run from 1 down, 10000^(-2i/d)", close(angles, wanted, 1e-3, 1e-5), (
        "all pairs turn alike" if close(angles, angles[-1].item(), 1e-2) else "pair i turns by 10000^(-2i/d) a place")
    far = answer(x.double(), place)
    yield "float64 stays float64, and gives the same", far.dtype == torch.float64 and close(far, out), (
        "compute the angles in the dtype of x")


# 07 samplers


def _gaussian(t):
    """Data N(0.7, 0.4^2): mean and standard deviation of z_t."""
    alpha, sigma = _cosine(t)
    return alpha * 0.7, (alpha**2 * 0.4**2 + sigma**2).sqrt()


class _Ideal:
    """The best denoiser for these data, which notes the times that it was asked about."""

    def __init__(self):
        self.times = []

    def __call__(self, zt, t, y):
        t = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
        self.times.append(float(t[0]))
        (mean, std), alpha = _gaussian(t), _cosine(t)[0]
        shape = (-1,) + (1,) * (zt.ndim - 1)
        return 0.7 + (alpha * 0.4**2 / std**2).reshape(shape) * (zt - mean.reshape(shape))


def _even(begin: float, end: float, steps: int) -> Tensor:
    """Times with equal steps in log(alpha / sigma), for the cosine schedule."""
    ends = torch.tensor([begin, end], dtype=torch.float64)
    clock = -torch.log(torch.tan(ends * (torch.pi / 2)))
    return torch.atan(torch.exp(-torch.linspace(*clock.tolist(), steps + 1, dtype=torch.float64))) * (2 / torch.pi)


def _exact(z, times):
    """Where the probability-flow ODE takes z, from the first to the last of the times."""
    (mean, std), (mean_end, std_end) = _gaussian(times[0]), _gaussian(times[-1])
    return mean_end + std_end / std * (z - mean)


@exercise("07.1", "what DDPM forgets")
def _(answer):
    c = float(answer)
    clock = [float(torch.log(a / b)) for a, b in (_cosine(torch.tensor(t, dtype=torch.float64)) for t in (0.8, 0.4))]
    sigma, sigma_s = (float(_cosine(torch.tensor(t, dtype=torch.float64))[1]) for t in (0.8, 0.4))
    ratio = float(torch.tensor(clock[0] - clock[1]).exp())  # of the signal-to-noise amplitudes
    right = sigma_s * ratio
    yield ("it is not DDIM's number", not close(c, sigma_s, 2e-3),
           "sigma at 0.4 is what eta = 0 keeps, all of it; at eta = 1 part of the noise is drawn afresh")
    yield ("it is the factor of eps", not close(c, right / sigma, 2e-3),
           "this is the factor of z_t; eps stands in z_t with the factor sigma_t")
    yield ("it is an amplitude", not close(c, right**2, 5e-3), "this is a variance: take the root")
    yield ("it is one factor for the way, not one for each end", not close(c, ratio, 2e-3),
           "exp(lambda_t - lambda_s) is right, but sigma_s, what z_s has of noise in all, is missing")
    yield ("it does not depend on the number of steps", close(c, right, 2e-3),
           "one step gives sqrt(sigma_s^2 - tau^2), with tau^2 = sigma_s^2 (1 - SNR_t / SNR_s)")


@exercise("07.2", "the integral without the shortcut")
def _(weight):
    h = torch.tensor([0.05, 0.3, 1.0, 2.5], dtype=torch.float64)
    h_last = torch.tensor([0.1, 0.2, 1.5, 0.7], dtype=torch.float64)
    before = h.clone()
    found = weight(h, h_last)
    yield "the factor has the shape of h", found.shape == h.shape, "answer elementwise, for tensors of one shape"
    yield "h is not overwritten", torch.equal(h, before), "work out of place"
    yield ("it is not the shortcut", not close(found, h / (2 * h_last), 1e-3),
           "h / (2 h_last) is the 2M that the chapter has; here the integral is wanted exactly")
    yield ("the line rises in the direction of the step", bool((found > 0).all()),
           "a sign: in the exponent or of the extrapolation; lambda grows along the way, so the weight is exp(+u)")
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * h[:, None]  # the midpoint rule
    weights = torch.exp(u)
    right = (weights * u).sum(1) / weights.sum(1) / h_last
    yield ("h_last enters as 1 / h_last", close(found * h_last, weight(h, 2 * h_last) * 2 * h_last, 1e-6),
           "the slope of the line is (z0 - z0_last) / h_last")
    yield ("it is the mean of u / h_last with the weight exp(u)", close(found, right, 1e-5),
           "divide the integral of exp(u) u / h_last by that of exp(u), which is exp(h) - 1")
    small = torch.tensor([1e-5], dtype=torch.float64)
    yield ("for short steps it is h / (2 h_last)", close(weight(small, small), 0.5, 1e-3),
           "digits are lost in a difference of nearly equal numbers: compute in float64, and use torch.expm1(h)")


@exercise("07.3", "Heun's method")
def _(heun):
    z = noise(5, 2, 3, seed=1).double()
    before = z.clone()
    times, denoise = torch.tensor([1, 0.8, 0.45, 0.3, 0], dtype=torch.float64), _Ideal()
    out = heun(denoise, z, torch.zeros(5, dtype=torch.long), _cosine, times)
    yield ("the answer is one latent of the shape of the start", getattr(out, "shape", None) == z.shape,
           "return the last z_s, not a list or a generator")
    yield "the start is not overwritten", torch.equal(z, before), "work out of place"
    yield ("the denoiser is not asked at t = 0", min(denoise.times) > 0,
           "on the last step there is nothing to ask: land on z0_hat with one evaluation")
    yield ("4 steps cost 7 evaluations", len(denoise.times) == 7,
           f"you spent {len(denoise.times)}: two in each step, one in the last")
    asked = [1, 0.8, 0.8, 0.45, 0.45, 0.3, 0.3]
    yield ("each step asks at its own time and at the next one", close(denoise.times, torch.tensor(asked), 1e-9),
           "the second evaluation belongs to the trial latent and to its time s")
    starts, errors = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], []
    for steps in (80, 160):
        grid = _even(0.98, 0.02, steps)
        found = heun(_Ideal(), starts, torch.zeros(5, dtype=torch.long), _cosine, grid)
        errors.append(float((found - _exact(starts, grid)).abs().max()))
    order = float(torch.log2(torch.tensor(errors[0] / errors[1])))
    yield (f"twice the steps, a quarter of the error (order {order:.2f})", 1.85 < order < 2.2 and errors[1] < 2e-3,
           "repeat the step from z_t (not from the trial) with the mean of the two estimates of z0")


@exercise("07.4", "from an image to its noise, and back")
def _(invert):
    z0, eps = noise(3, 2, 4, 5, seed=2).double(), noise(3, 2, 4, 5, seed=3).double()
    times, y = torch.tensor([0.01, 0.2, 0.5, 0.55, 1.0], dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    (alpha, sigma), (alpha_end, sigma_end) = _cosine(times[0]), _cosine(times[-1])
    start = alpha * z0 + sigma * eps
    before = start.clone()
    out = invert(lambda *_: z0, start, y, _cosine, times)
    yield ("the answer is one latent of the shape of the start", getattr(out, "shape", None) == z0.shape,
           "return the latent at times[-1]")
    yield "the start is not overwritten", torch.equal(start, before), "work out of place"
    yield ("it ends where the noise is, at times[-1]", not close(out, start, 0, 0.2),
           "the way goes up: iterate over the times as they are")
    yield ("with z0 known it finds the noise exactly", close(out, alpha_end * z0 + sigma_end * eps, 1e-6),
           "from each time to the next: alpha_s z0 + sigma_s eps (`step` with eta = 0), without noise of your own")
    starts, y = torch.linspace(-0.4, 1.8, 5, dtype=torch.float64)[:, None], torch.zeros(5, dtype=torch.long)
    grid, denoise = _even(0.98, 0.02, 400).flip(0), _Ideal()
    out = invert(denoise, starts, y, _cosine, grid)
    yield ("rounds=0: the denoiser is asked once a step, at the time the latent is at",
           close(denoise.times, grid[:-1], 1e-9),
           "ask before the step, at the lower of its two times, once for each pair of neighbors")
    yield ("Gaussian data: the distance from the mean, in standard deviations, is kept",
           close(out, _exact(starts, grid), 0, 0.05), "the exact map is missed: one step for each pair of neighbors?")
    grid, denoise = _even(0.98, 0.02, 40).flip(0), _Ideal()
    out = invert(denoise, starts, y, _cosine, grid, 2)
    yield ("rounds=2: three questions a step", len(denoise.times) == 120,
           f"you asked {len(denoise.times)} times in 40 steps: one for the step, and one for each round")
    expected = torch.stack([grid[:-1], grid[1:], grid[1:]], dim=1).flatten()
    yield ("a round asks at the time of arrival", close(denoise.times, expected, 1e-9),
           "the step has arrived at the upper of its two times: that time belongs to the latent there")
    back = invert(_Ideal(), starts, y, _cosine, grid, 40)
    for t, s in zip(grid.flip(0)[:-1], grid.flip(0)[1:]):  # DDIM, down
        (alpha, sigma), (alpha_s, sigma_s) = _cosine(t), _cosine(s)
        guess = _Ideal()(back, t.expand(5), y)
        back = alpha_s * guess + sigma_s * (back - alpha * guess) / sigma
    yield ("with 40 rounds DDIM returns to the start exactly", close(back, starts, 0, 1e-6),
           "each round repeats the step from where it began (not from where it arrived), with the new estimate")


# 08 the complete model

@exercise("08.1", "unscale, then clip")
def _(answer):
    gradients = [8.0 * noise(3, 4), 8.0 * noise(5, seed=1)]
    kept = [g.clone() for g in gradients]
    norm = lambda tensors: torch.cat([g.flatten() for g in tensors]).norm()  # noqa: E731
    true = norm(kept) / 8
    got = list(answer(gradients, 8.0, 1e9))
    yield "one gradient comes back for each that goes in", len(got) == 2, (
        "return a list of as many tensors as were given")
    yield "a limit that is not reached changes nothing but the scale", all(
        close(g, k / 8) for g, k in zip(got, kept)), (
        "divide by the scale, once, and do not enlarge what is small enough")
    yield "the given gradients are left alone", all(torch.equal(g, k) for g, k in zip(gradients, kept)), (
        "work on copies: the caller's tensors were changed in place")
    got = list(answer(gradients, 8.0, 1.0))
    yield "above the limit, the common norm is the limit", close(norm(got), 1.0, rtol=1e-3), (
        "was it clipped before the scale was divided out, or each tensor by itself?")
    yield "all gradients shrink by one factor", all(close(g * true, k / 8, rtol=1e-3) for g, k in zip(got, kept)), (
        "the norm is that of all gradients together, not of each tensor")


@exercise("08.2", "the batch of a step")
def _(answer):
    epoch = torch.cat([torch.as_tensor(answer(step, 10, 40, 0)) for step in range(4)])
    yield "an epoch sees every image once", sorted(epoch.tolist()) == list(range(40)), (
        "drawn with replacement, or each batch from an order of its own?")
    after = torch.cat([torch.as_tensor(answer(step, 10, 40, 0)) for step in range(4, 8)])
    yield "the next epoch too", sorted(after.tolist()) == list(range(40)), (
        "the place in the epoch is step % (n // batch)")
    yield "in another order", not torch.equal(epoch, after), "the order must depend on the epoch"
    yield "the same step gives the same batch", torch.equal(torch.as_tensor(answer(2, 10, 40, 0)), epoch[20:30]), (
        "the answer depends on what was called before: use a generator made inside the function")
    other = torch.cat([torch.as_tensor(answer(step, 10, 40, 1)) for step in range(4)])
    yield "another seed, another order", not torch.equal(epoch, other), "the seed is not used"
    yield "seed 1 does not begin with the second epoch of seed 0", not torch.equal(after, other), (
        "seed + epoch is the same number for both: keep the two apart, as in seed * 1_000_003 + epoch")


@exercise("08.3", "how long would it take?")
def _(answer):
    base = answer(1e6, 100, 10, peak=1e9, efficiency=0.5)
    yield "1e6 operations, 100 steps of 10, at half of 1e9 a second: 6 s", close(base, 6.0), (
        "forgot the factor 3 for the backward pass?" if close(base, 2.0) else
        "divide by the efficiency: at a lower share of the peak it takes longer" if close(base, 1.5) else
        "seconds = 3 * operations * steps * batch / (peak * efficiency)")
    yield "twice the batch, twice the time", close(answer(1e6, 100, 20, peak=1e9, efficiency=0.5), 12.0), (
        "operations are per image: multiply by the batch")
    yield "half the efficiency, twice the time", close(answer(1e6, 100, 10, peak=1e9, efficiency=0.25), 12.0), (
        "the share of the peak stands in the denominator")


# 09 evaluation


@exercise("09.1", "the bias of the Frechet distance")
def _(answer):
    for n in (1000, 50_000):  # tolerances: n - 1 in the place of n is as right
        yield f"one dimension, n = m = {n}: 3 / n", close(answer(1, n, n), 3 / n, 0.01, 0), \
            "the warm-up's case: 2 / n from the means and 1 / n from the standard deviations"
    yield "both sets count: a set twice as large halves its own share", \
        close(answer(3, 500, 1000), (answer(3, 500, 500) + answer(3, 1000, 1000)) / 2, 0.01, 0), \
        "the variances of two independent sets add: 1 / n + 1 / m, not 2 / n or 2 / (n + m)"
    big, small = float(answer(64, 1000, 1000)), float(answer(16, 1000, 1000))
    yield "it grows with the square of the dimension, nearly", 8 < big / small < 16, \
        "d means, but d (d + 1) / 2 entries of a covariance: did you count the entries off the diagonal?"
    a, b = noise(40, 400, 8).double(), noise(40, 300, 8, seed=1).double()
    measured = torch.stack([_frechet(p, q) for p, q in zip(a, b)]).mean()
    yield f"40 pairs of 400 and 300 points in 8 dimensions have a mean FD of {measured:.3f}", \
        abs(float(answer(8, 400, 300)) / measured - 1) < 0.15, \
        "variance 2 / n for each entry on the diagonal, 1 / n off it, each pair (i, j), (j, i) twice, times 1/4"
    yield "ten dimensions, 700 and 900 points, to two per cent", close(answer(10, 700, 900), 37.5 * (1 / 700 + 1 / 900), 0.02, 0), \
        "near, but not the law: d (1/n + 1/m) from the means, d (d + 1) / 4 (1/n + 1/m) from the covariances"


def _frechet(a: Tensor, b: Tensor) -> Tensor:
    """The Frechet distance of two sets in float64, for exercise 09.1."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


@exercise("09.2", "the Frechet distance at infinite n")
def _(answer):
    sizes = [100, 250, 1000, 4000]
    yield "values 0.3 + 50 / n give 0.3", close(answer(sizes, [0.3 + 50 / n for n in sizes]), 0.3, 1e-3, 1e-5), \
        "fit a line in 1 / n (not in n) and return its value at 1 / n = 0, not its slope and not the value at the largest n"
    yield "values that do not depend on n give themselves", close(answer([100, 200, 300], [0.7] * 3), 0.7, 1e-4, 0), \
        "the fit needs a constant as well as 1 / n"
    x = torch.tensor([1 / n for n in sizes]).double()
    y = torch.tensor([1.0, 0.2, 0.5, 0.1]).double()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    yield "where the values scatter, all of them count", \
        close(answer(sizes, y.tolist()), float(y.mean() - slope * x.mean()), 1e-3, 1e-5), \
        "a line through two of the points only, or another weight for each of them"
    yield "a negative estimate stays negative", close(answer([100, 200], [0.5, 0.2]), -0.1, 1e-3, 1e-5), \
        "clamped at zero: then many estimates of zero would be too large on average"


@exercise("09.3", "copies of training images")
def _(answer):
    train = (noise(31, 1, 6, 9).mul(60).add(128)).clamp(0, 255).to(torch.uint8)
    new = (noise(5, 1, 6, 9, seed=1).mul(60).add(128)).clamp(0, 255).to(torch.uint8)
    kept = train.clone()
    found = answer(train[4:11], train)
    yield "one answer, yes or no, for each sample", found.shape == (7,) and found.dtype == torch.bool, \
        "return a bool tensor (N,), not the distances or a share"
    yield "training images are copies", bool(found.all()), \
        "the nearest training image is then at distance 0: compare it with the second nearest, the smaller first"
    yield "new images are not", not answer(new, train).any(), \
        "for these nearest and second nearest are alike: floats before subtracting? the right way round?"
    near = (train[:3].int() + 4).clamp(0, 255).to(torch.uint8)
    yield "four gray levels away is still a copy", bool(answer(near, train).all()), \
        "only exact copies are found"
    black, white = torch.zeros(1, 1, 6, 9, dtype=torch.uint8), torch.full((1, 1, 6, 9), 250, dtype=torch.uint8)
    between = torch.full((1, 1, 6, 9), 100, dtype=torch.uint8)  # distances 100 and 150
    pair = torch.cat([black, white])
    yield "distances 100 and 150 are below a factor of 0.7", bool(answer(between, pair, 0.7)[0]), \
        "is the factor used, and on the second nearest?"
    yield "and not below a factor of 0.5", not answer(between, pair, 0.5)[0], \
        "squared distances: (100 / 150)^2 is less than 0.5, 100 / 150 is not"
    yield "the training set is left as it was", torch.equal(train, kept), "it was changed in place"


@exercise("09.4", "samples for one per cent of accuracy")
def _(answer):
    value = float(answer)
    exact = 9 * (0.92 * 0.08 + 0.93 * 0.07) / 0.01**2  # 12483
    yield "more than a few thousand", value > 8000, \
        "three standard errors of the *difference*: both variances, and 3 squared is 9"
    yield "it is the number for each model", value < 1.5 * exact, \
        "samples of each model, not of both together"
    yield "within two per cent", abs(value / exact - 1) < 0.02, \
        "9 (0.92 * 0.08 + 0.93 * 0.07) / 0.01^2"


# 10 perceptual compression

@exercise("10.1", "how far a patch reaches")
def _(answer):
    yield "one convolution sees its kernel", answer([(5, 1)]) == 5 and answer([(3, 2)]) == 3, (
        "start from 1 pixel, and add (kernel - 1) times the distance between neighbors so far; a layer's own stride comes after")
    yield "two of (3, 1) see 5", answer([(3, 1), (3, 1)]) == 5, "the fields overlap: do not multiply or add the kernels"
    yield "(3, 2), (3, 1) sees 7", answer([(3, 2), (3, 1)]) == 7, (
        "behind a stride of 2, neighbors are 2 pixels apart: the strides so far multiply what a kernel adds")
    yield "the discriminator sees 18", answer([(4, 2), (4, 2), (3, 1), (1, 1)]) == 18, (
        "strides multiply: after two of stride 2 neighbors are 4 pixels apart")
    yield "many layers", answer([(3, 2)] * 5) == 63, "the distance between neighbors doubles with every stride of 2"


@exercise("10.2", "straight through rounding")
def _(answer):
    z = (3 * noise(3, 4, 5)).requires_grad_(True)
    kept = z.detach().clone()
    out = answer(z)
    yield "forward, it rounds", close(out.detach(), kept.round()), (
        "the value must be round(z) itself, with nothing added")
    yield "the gradient reaches z", out.requires_grad, (
        "detached as a whole: nothing is left for the gradient to pass through")
    weights = noise(3, 4, 5, seed=1)
    (out * weights).sum().backward()
    grad = z.grad if z.grad is not None else torch.zeros_like(z)
    yield "its gradient is that of the identity", close(grad, weights), (
        "torch.round alone has the gradient 0 everywhere" if not grad.abs().any() else
        "z is counted more than once: z + (round(z) - z).detach() has it once")
    yield "z itself is left alone", torch.equal(z.detach(), kept), "z was changed in place"


@exercise("10.3", "how many bits")
def _(answer):
    yield "256 codes are 8 bits: 28 x 28 places compress nothing", close(answer(256, 28, 28), 1.0), (
        "log2, not the natural logarithm; and a pixel of the image has 8 bits" if not close(answer(256, 28, 28), 1 / 8)
        else "a pixel of the image has 8 bits")
    yield "512 codes at 7 x 7: 6272 bits to 441", close(answer(512, 7, 7), 6272 / 441), (
        "bits of the image / bits of the latent, and a latent has places * log2(codes) of them")
    yield "a bigger book holds more bits, so it compresses less", answer(1024, 7, 7) < answer(16, 7, 7), (
        "the fraction is upside down")
    yield "the image's size counts", close(answer(2, 4, 4, height=16, width=32), 256.0), "use height and width"
