"""Checks of the exercises of chapter 9: evaluation."""

import torch
from torch import Tensor

from ..checks import close, exercise, generator, integer, noise, uniform


@exercise("09.1", "the bias of the Frechet distance", points=3)
def _(bias):
    n, m = integer(20_000, 40_000), integer(20_000, 40_000, seed=1)  # so large that n - 1 in the place of n is as right
    yield f"one dimension, n = m = {n:,}: 3 / n", close(bias(1, n, n), 3 / n, 0.01, 0), \
        "the warm-up's case: 2 / n from the means and 1 / n from the standard deviations"
    d = integer(3, 9, seed=2)
    yield "both sets count: a set twice as large halves its own share", \
        close(bias(d, m, 2 * m), 0.75 * float(bias(d, m, m)), 0.005, 0) and \
        close(bias(d, 2 * m, m), 0.75 * float(bias(d, m, m)), 0.005, 0), \
        "the variances of two independent sets add: 1 / n + 1 / m, not 2 / n or 2 / (n + m)"
    d = integer(12, 20, seed=3)  # the law's ratio: 12.5 to 13.6
    ratio = float(bias(4 * d, n, m)) / float(bias(d, n, m))
    yield f"four times the dimension, d = {4 * d} in the place of {d}: 10 to 15 times the bias", 10 < ratio < 15, \
        "d means, but d (d + 1) / 2 different entries of a covariance: did you count the entries off the diagonal?" \
        if ratio < 8 else "the means give a part that grows like d, and the covariances one like d (d + 1)"
    # One FD is nearly s chi2(d) from the means, s / 2 chi2(d) from the diagonals and s / 2 chi2(d (d - 1) / 2) from the
    # rest, s = 1 / n + 1 / m. Its variance is s^2 d (d + 9) / 4, so relative to its mean it scatters by
    # 2 sqrt((d + 9) / d) / (d + 5): 0.224 for d = 8, and the mean of 400 pairs by 0.0112. The band is six of these, and
    # 0.015 for what the law leaves out, the terms in 1 / n^2 (measured: below 0.007).
    p, q = integer(300, 400, seed=4), integer(300, 400, seed=5)
    measured = float(_frechet(noise(400, p, 8, seed=6).double(), noise(400, q, 8, seed=7).double()).mean())
    ours = float(bias(8, p, q))
    yield f"400 pairs of {p} and {q} points in 8 dimensions have a mean FD of {measured:.3f}, yours is {ours:.3f}", \
        abs(measured / ours - 1) < 6 * 0.0112 + 0.015, \
        "variance 2 / n for each entry on the diagonal, 1 / n off it, each pair (i, j), (j, i) twice, times 1/4"
    d = integer(8, 12, seed=8)
    yield f"{d} dimensions, {n:,} and {m:,} points, to one per cent", \
        close(bias(d, n, m), (d + d * (d + 1) / 4) * (1 / n + 1 / m), 0.01, 0), \
        "near, but not the law: add up what the d means give, the d entries on the diagonal, and the d (d - 1) off it"


def _frechet(a: Tensor, b: Tensor) -> Tensor:
    """The Frechet distances of pairs of sets (R, n, d) and (R, m, d): (R,), for exercise 09.1."""
    mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    cov_a, cov_b = ((x - mean).mT @ (x - mean) / (x.shape[1] - 1) for x, mean in ((a, mean_a), (b, mean_b)))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum(1)
    traces = (cov_a + cov_b).diagonal(dim1=1, dim2=2).sum(1)
    return (mean_a - mean_b).square().sum((1, 2)) + traces - 2 * cross


@exercise("09.2", "the Frechet distance at infinite n", points=2)
def _(at_infinity):
    sizes = [integer(80, 120), integer(200, 300, seed=1), integer(700, 1200, seed=2), integer(3000, 5000, seed=3)]
    limit, slope = float(uniform(0.2, 0.8, seed=4)), float(uniform(30, 80, seed=5))
    got = at_infinity(list(sizes), [limit + slope / n for n in sizes])
    yield f"values {limit:.3f} + {slope:.1f} / n give {limit:.3f}", close(got, limit, 0, 1e-3), \
        "this is the slope: the value at 1 / n = 0 is asked for" if close(got, slope, 0.01, 0) else \
        "fit a line in 1 / n (not in n) and return its value at 1 / n = 0, not the value at the largest n"
    yield f"values that do not depend on n, all {limit:.3f}, give themselves", \
        close(at_infinity([100, 200, 300], [limit] * 3), limit, 0, 1e-3), "the fit needs a constant as well as 1 / n"
    # Scattered values, on a line through the first and the last and through any two neighbors far from the fit of all.
    x = torch.tensor([1 / n for n in sizes], dtype=torch.float64)
    y = torch.tensor([1.0, 0.2, 0.6, 0.1], dtype=torch.float64) * (1 + limit)
    fit = y.mean() - x.mean() * ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    got = at_infinity(list(sizes), y.tolist())
    yield "where the values scatter, all of them count", close(got, float(fit), 0, 1e-3), \
        "a line through two of the points only, or one that weighs them differently"
    yield "in any order", close(at_infinity(sizes[::-1], y.flip(0).tolist()), float(fit), 0, 1e-3), \
        "the sizes need not be sorted"
    n, drop = integer(100, 300, seed=6), float(uniform(0.1, 0.3, seed=7))  # through (1/n, 2 drop) and (1/2n, drop / 2)
    yield "a negative estimate stays negative", close(at_infinity([n, 2 * n], [2 * drop, drop / 2]), -drop, 0, 1e-3), \
        "clamped at zero: then many estimates of zero would be too large on average"


def _images(count: int, height: int, width: int, seed: int) -> Tensor:
    return noise(count, 1, height, width, seed=seed).mul(60).add(128).clamp(0, 255).to(torch.uint8)


@exercise("09.3", "copies of training images", points=2)
def _(copied):
    height, width = integer(5, 7), integer(8, 10, seed=1)
    # At least 40 values with a std of 60: squared distances are like chi2(40). One of 7 new images is three times as
    # near to one of 40 as to all others with a chance below 7 * 40 * P(chi2(40) < 40 / 9) = 1.2e-10.
    train, new = _images(40, height, width, 2), _images(7, height, width, 3)
    which = torch.randperm(40, generator=generator(4))[:5]
    kept = train.clone(), new.clone()
    found = copied(train[which], train)
    yield "one answer, yes or no, for each sample", \
        isinstance(found, Tensor) and found.shape == (5,) and found.dtype == torch.bool, \
        "return a bool tensor (N,), not the distances or a share"
    yield "training images are copies", bool(found.all()), \
        "the nearest training image is then at distance 0: compare it with the second nearest, the smaller first"
    yield "new images are not", not copied(new, train).any(), \
        "for these nearest and second nearest are alike: floats before subtracting? the right way round?"
    step = integer(3, 6, seed=5) * noise(5, 1, height, width, seed=9).sign().int()
    near = (train[which].int() + step).clamp(0, 255).to(torch.uint8)
    yield "a few gray levels away is still a copy", bool(copied(near, train).all()), \
        "only exact copies are found, or bytes were subtracted as bytes: 3 - 5 is 254 in uint8"
    mixed = torch.cat([new[:3], near[:2], new[3:]])
    yield "each sample is judged for itself", copied(mixed, train).tolist() == [False] * 3 + [True] * 2 + [False] * 4, \
        "copies among new images: which sample is which?"

    def flat(*levels):
        return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, height, width).contiguous()

    level = integer(90, 110, seed=6)  # distances level and 250 - level, in either order: a ratio of 0.56 to 0.79
    near = 16 * integer(2, 9, seed=10)
    yield f"distances {near} and {near + 2} are alike", not copied(flat(0), flat(near, near + 2), 0.7)[0], \
        f"squared in uint8, where {near} * {near} is 0: floats before anything else"
    ratio = level / (250 - level)
    between, pair = flat(level), flat(250, 0) if integer(0, 1, seed=7) else flat(0, 250)
    yield f"distances {level} and {250 - level} are below a factor of {1.1 * ratio:.2f}", \
        bool(copied(between, pair, 1.1 * ratio)[0]), "is the factor used, and on the second nearest?"
    yield f"and not below a factor of {0.9 * ratio:.2f}", not copied(between, pair, 0.9 * ratio)[0], \
        f"squared distances: ({level} / {250 - level})^2 is less than {0.9 * ratio:.2f}, {level} / {250 - level} is not"
    # One image is 60 away everywhere, the other one 180 on a third of its pixels: equal means of the differences.
    side = 3 * integer(2, 4, seed=8)
    spread = torch.full((1, 1, side, side), 60, dtype=torch.uint8)
    lump = torch.zeros(1, 1, side, side, dtype=torch.uint8)
    lump[:, :, : side // 3] = 180  # root mean square 104, mean 60, largest 180
    zero, both = torch.zeros_like(lump), torch.cat([lump, spread])
    yield "the distance is the root mean square one", \
        bool(copied(zero, both, 0.7)[0]) and not copied(zero, both, 0.45)[0], \
        "60 everywhere against 180 on a third of the pixels is 60 against 104: not the mean or largest difference"
    yield "the images are left as they were", torch.equal(train, kept[0]) and torch.equal(new, kept[1]), \
        "they were changed in place"


@exercise("09.4", "samples for one per cent of accuracy", points=2)
def _(answer):
    value = float(answer)
    exact = 9 * (0.92 * 0.08 + 0.93 * 0.07) / 0.01**2  # 12483
    yield "more than a few thousand", value > 8000, \
        "three standard errors of the *difference*: both variances, and 3 squared is 9"
    yield "it is the number for each model", value < 1.5 * exact, \
        "samples of each model, not of both together; or standard errors were added, where variances add"
    yield "within two per cent", abs(value / exact - 1) < 0.02, \
        "p (1 - p) for each of the two shares, added; its root over n is the standard error"
