"""Checks of the exercises of chapter 1: a variational autoencoder."""

from math import log

import torch
from torch import Tensor

from ..checks import close, exercise, generator, integer, noise, uniform


@exercise("01.1", "KL between two Gaussians", points=1)
def _(kl_between):
    from torch.distributions import Normal, kl_divergence

    shape = (integer(3, 5, seed=10), integer(2, 4, seed=11), integer(4, 6, seed=12), integer(2, 3, seed=13))
    given = mean_q, logvar_q, mean_p, logvar_p = [noise(*shape, seed=i) for i in range(4)]
    before = [each.clone() for each in given]
    q, p = Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())
    out = kl_between(*given)
    yield "one number for each image", tuple(out.shape) == shape[:1], "sum over all axes but the first"
    yield "the inputs are left alone", all(map(torch.equal, given, before)), "an in-place operation changed one of them"
    exact, other = (kl_divergence(a, b).flatten(1).sum(1) for a, b in ((q, p), (p, q)))
    yield "it is KL(q || p), not KL(p || q)", not close(out, other), "q and p have changed places"
    yield "a sum over the latent values", not close(out, exact / mean_q[0].numel()), (
        "this is the mean over the latent values")
    yield "the factor 1/2 is there", not close(out, 2 * exact), "twice too large: every term is halved"
    yield "in nats", not close(out, exact / log(2)), "these are bits: take the natural logarithm"
    same = kl_between(mean_q, logvar_q, mean_q, logvar_q)
    yield "zero between a Gaussian and itself", close(same, 0.0, atol=1e-4), (
        "a term is missing: the -1, or the ratio of variances")
    zero = torch.zeros_like(mean_q)
    simple = 0.5 * (mean_q**2 + logvar_q.exp() - 1 - logvar_q).flatten(1).sum(1)
    yield "against N(0, I) it is the chapter's KL", close(kl_between(mean_q, logvar_q, zero, zero), simple), \
        "with mean_p = 0 and logvar_p = 0 the formula must become the one of the chapter"
    yield "equal to torch.distributions", close(out, exact), \
        "is the squared distance of the means divided by the variance of p, and exp() taken of logvar, not of a half?"
    longer = kl_between(*(each[:, None] for each in given))
    yield "any number of axes", close(longer, exact), (
        "this is right for (B, C, h, w) only: sum over all axes but the first, however many there are")


@exercise("01.2", "one beta, two conventions", points=1)
def _(answer):
    value = float(answer)
    pixels, latents = 3 * 32 * 32, 4 * 8 * 8
    right = 1e-4 * pixels / latents / 2

    def among(*numbers: float) -> bool:
        return any(close(value, number, rtol=0.02, atol=0) for number in numbers)

    yield "the half of the squared error is counted", not among(2 * right), \
        "mse_loss has no 1/2: multiply the whole loss by half the number of pixel values"
    yield "the ratio of sizes is the right way up", not among(*(1e-4 * latents / pixels * f for f in (1, 0.5, 2))), \
        "the KL's mean is over few values, the error's over many: the weight of the sums is larger, not smaller"
    yield "the KL was a mean over the latent values", not among(1e-4 * pixels, 1e-4 * pixels / 2), \
        "divide by the number of latent values"
    forgotten = [right * f * g for f in (1, 2) for g in (1 / 3, 4, 4 / 3)]
    yield "channels are counted on both sides", not among(*forgotten), \
        "a mean runs over all values: 3 x 32 x 32 of the image, 4 x 8 x 8 of the code"
    yield "beta for sums", among(right), \
        "write both losses with sums, and multiply one until its error is 1/2 sum (x - x_hat)^2"


def _cloud(n: int, d: int, k: int, seed: int) -> Tensor:
    """(n, d): a std of 2 to 3 in k directions and of 0.2 to 0.5 in the others, far from 0 along one of the latter."""
    axes = torch.linalg.qr(noise(d, d, seed=seed)).Q.T  # rows: orthonormal directions
    spread = torch.cat([uniform(2, 3, k, seed=seed + 1), uniform(0.2, 0.5, d - k, seed=seed + 2)])
    return noise(n, d, seed=seed + 3) * spread @ axes + uniform(8, 12, 1, seed=seed + 4) * axes[-1]


@exercise("01.3", "the best linear autoencoder", points=2)
def _(best_linear):
    d, k = integer(10, 16, seed=1), integer(3, 5, seed=2)
    x = _cloud(200, d, k, seed=10)
    before = x.clone()
    mean, basis = map(torch.as_tensor, best_linear(x, k))
    yield "shapes (D,) and (D, k)", tuple(mean.shape) == (d,) and tuple(basis.shape) == (d, k), \
        "mean has one entry per pixel; basis has one column per code value"
    yield "x itself is left alone", torch.equal(x, before), "x - x.mean(0), not x -= x.mean(0)"
    yield "the mean is that of the data", close(mean, x.mean(0), rtol=1e-3, atol=1e-3), (
        "mean over images, not over pixels")
    mean, basis = mean.double(), basis.double()
    yield "the columns are orthonormal", close(basis.T @ basis, torch.eye(k), atol=1e-3), \
        "eigenvectors of length 1; an SVD's right vectors are rows of Vh: transpose"
    centered = x.double() - x.double().mean(0)
    variances = torch.linalg.eigvalsh(centered.T @ centered)  # ascending

    def lost(basis: Tensor) -> float:
        return float((centered - centered @ basis @ basis.T).square().sum())

    error, rows = lost(basis), "directions are columns of eigh's vectors, and rows of an SVD's Vh: Vh[:k].T"
    around_zero = torch.linalg.eigh(x.double().T @ x.double()).eigenvectors[:, -k:]
    yield "not the directions of least variance", error < 0.9 * float(variances[k:].sum()), \
        "eigh sorts upwards: the last k columns are the ones to keep" if close(error, float(variances[k:].sum()), 1e-2) else rows
    # Least: the k directions lose a std of 0.5 each at most. Not centered, one of std 2 is given up for the mean.
    yield "no other k directions lose less", close(error, float(variances[: d - k].sum()), rtol=1e-2), \
        "the squared error must be the sum of the dropped variances: subtract the mean before looking for directions" \
        if close(error, lost(around_zero), 1e-2) else f"{rows}; and nothing is divided by its spread before"
    flat = noise(50, k, seed=3) @ noise(k, d, seed=4) + 2
    mean, basis = (torch.as_tensor(part).double() for part in best_linear(flat, k))
    rebuilt = mean + (flat - mean) @ basis @ basis.T
    yield f"data of {k} dimensions come back from {k} numbers", close(rebuilt, flat, rtol=1e-3, atol=1e-3), \
        "mean + (x - mean) @ basis @ basis.T must be x where x has no more than k dimensions"


@exercise("01.4", "a decoder that measures its own variance", points=2)
def _(best_variance):
    shape = (integer(4, 7, seed=1), 3, integer(8, 10, seed=3), 6)
    x = noise(*shape, seed=4)
    error = noise(*shape, seed=6)
    x_hat = x + uniform(0.2, 0.4, 1, seed=5) * (error - error.mean() + 0.5)  # 4 parts variance, 1 part squared mean
    squared = (x - x_hat).double().square()
    mean, batch, values = float(squared.mean()), len(x), x[0].numel()
    out = torch.as_tensor(best_variance(x, x_hat), dtype=torch.float64)
    yield "one number", out.numel() == 1, f"its shape is {tuple(out.shape)}: one v for all pixels of all images"
    out = float(out)
    yield "a variance, not a standard deviation", not close(out, mean**0.5, rtol=1e-3), "leave out the square root"
    sums = [mean * count for count in (values, batch, values * batch, shape[1])]
    yield "an average over pixels and images", not any(close(out, each, rtol=1e-3) for each in sums), \
        "this is a sum: both terms of the objective grow with the number of values, so that number cancels"
    yield "the 1/2 cancels", not any(close(out, f * mean, rtol=1e-3) for f in (0.5, 2)), \
        "both terms have the factor 1/2, so the optimum has none"
    yield "errors around another value than 0 count in full", not any(
        close(out, float((x - x_hat).double().var(correction=c)), rtol=1e-3) for c in (0, 1)), \
        "this is the variance of the error; its mean counts, too: take the mean of the squared error"

    def objective(v: float) -> float:
        return float((squared / (2 * v) + 0.5 * log(v)).sum())

    least = out > 0 and objective(out) < min(objective(0.97 * out), objective(1.03 * out))
    yield "a little more or less is worse", least, \
        "set the derivative with respect to v to zero: -e^2 / (2 v^2) + 1 / (2 v), summed"
    yield "it is the exact optimum", close(out, mean, rtol=3e-4), \
        "close, but not the minimum: is one value too many or too few counted, or something added?"


@exercise("01.6", "a Gaussian fitted to the latents", points=3)
def _(fit_gaussian):
    # Each value is its own noise (std 0.5 to 1) plus a common one times 1.5 to 2.5: variances 2.5 to 7.3, correlations
    # of 0.69 and more. A missing root, a wrong side or values drawn one by one are outside the bands below by far.
    own, common = uniform(0.5, 1, 6, seed=1), uniform(1.5, 2.5, 6, seed=2) * torch.tensor([1, -1, 1, 1, -1, 1])
    z = own * noise(1000, 6, seed=3) + common * noise(1000, 1, seed=4) + uniform(2, 4, 6, seed=5)
    z = z.reshape(1000, 2, 1, 3)
    before, n = z.clone(), 20_000
    sample = fit_gaussian(z)
    out = sample(n, generator(6))
    yield "n latents of the shape of the given ones", tuple(out.shape) == (n, 2, 1, 3), "reshape to (n, *z.shape[1:])"
    yield "the latents are left alone", torch.equal(z, before), "z - mean, not z -= mean"
    yield "the generator decides", torch.equal(sample(4, generator(7)), sample(4, generator(7))), \
        "pass generator= on to torch.randn"
    yield "another generator, other draws", not torch.equal(sample(4, generator(7)), sample(4, generator(8))), \
        "the given generator is not used: is there another one with a fixed seed?"
    yield "each draw has its own noise", not bool((out[0] == out[1]).all()), "all draws are the same: eps needs n rows"
    flat, given = out.flatten(1).double(), z.flatten(1).double()
    yield "new latents", len(flat[:2000].unique(dim=0)) == 2000, "some come twice: are these the given latents again?"
    cov, drawn, spread = torch.cov(given.T), torch.cov(flat.T), torch.maximum(given.std(0), flat.std(0))
    # 6.5 standard errors of a mean and of a covariance, 27 comparisons: a false alarm in 1e8 seeds or rarer. The 1 %
    # is for who divides by N, or adds a little to the diagonal.
    yield "the mean is right", bool(((flat.mean(0) - given.mean(0)).abs() < 6.5 * spread / n**0.5).all()), \
        "add the mean of the latents, value by value"
    band = 6.5 * ((cov.diag()[:, None] * cov.diag() + cov**2) / n) ** 0.5 + 0.01 * cov.diag().max()
    turned = close(torch.linalg.eigvalsh(drawn), torch.linalg.eigvalsh(cov), 0.1)  # root.T @ root has those of root @ root.T
    yield "each value has its variance", bool(((drawn - cov).diag().abs() < band.diag()).all()), \
        "the root stands on the wrong side: draws are rows, so eps @ root.T" if turned else \
        "multiply the noise by a square root of the covariance: not by the covariance, nor by variances"
    yield "values that belong together stay together", bool(((drawn - cov).abs() < band).all()), \
        "the values are drawn one by one: use the whole covariance matrix, and the right side of its root"
    try:  # 5 latents span 4 dimensions of 196
        few = fit_gaussian(noise(5, 4, 7, 7, seed=9))(7, generator(10))
    except RuntimeError:  # what torch.linalg.cholesky says of a singular matrix
        few = torch.tensor(float("nan"))
    drawn = tuple(few.shape) == (7, 4, 7, 7) and bool(few.isfinite().all())
    yield "fewer latents than dimensions are no obstacle", drawn, \
        "then the covariance has zero eigenvalues, some negative by rounding: treat those as 0 before taking roots"
