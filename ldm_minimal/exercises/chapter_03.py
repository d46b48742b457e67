"""Checks of the exercises of chapter 3: the U-Net and the denoiser."""

import torch
from torch import Tensor

from ..checks import close, cosine, exercise, integer, noise, uniform


@exercise("03.1", "what a target weighs", points=2)
def _(target_weight):
    t = 0.1 + 0.8 * (torch.arange(5) + uniform(0, 1, 5, seed=1).double()) / 5  # one in each fifth: never all at 1/2
    alpha, sigma = cosine(t)
    snr = (alpha / sigma) ** 2
    found = target_weight(alpha, sigma, "x0")
    yield "x0 weighs its own error with 1", close(found, 1.0), (
        "that is a factor for the error of eps; e is the error of z0" if close(found, 1 / snr) else
        "losses are squares: square the factor" if close(found, -1.0) else
        "the determinant alone is not the factor: solve the system for the error of z0" if close(found, sigma**2) else
        "for x0 the output is z0, so both losses are the same")
    eps = target_weight(alpha, sigma, "eps")
    yield "eps weighs it with alpha^2 / sigma^2", close(eps, snr), (
        "upside down: an error of z0 times alpha / sigma is the error of eps" if close(eps, 1 / snr) else
        "losses are squares: square the factor" if close(torch.as_tensor(eps) ** 2, snr) else
        "keep z_t fixed: an error e of z0 is an error -alpha e / sigma of eps")
    v = target_weight(alpha, sigma, "v")
    yield "v weighs it with 1 + alpha^2 / sigma^2 where alpha^2 + sigma^2 = 1", close(v, 1 + snr), (
        "a sign: v = alpha eps - sigma z0, and both terms move" if close(v, (alpha**2 - sigma**2) ** 2 / sigma**2) else
        "put eps = (z_t - alpha z0) / sigma into v = alpha eps - sigma z0, and see what z0 is multiplied by")
    flow, line = target_weight(1 - t, t, "flow"), target_weight(1 - t, t, "v")
    yield "flow weighs it with 1 / sigma^2 on the straight line", close(flow, 1 / t**2), (
        "a sign: flow = eps - z0, and an error e of z0 comes with the opposite sign in eps"
        if close(flow, (1 - 2 * t) ** 2 / t**2) else "the determinant is alpha + sigma, which is 1 there")
    yield "on the straight line v weighs it with ((1 - t)^2 + t^2)^2 / t^2", \
        close(line, ((1 - t) ** 2 + t**2) ** 2 / t**2), \
        "alpha^2 + sigma^2 = 1 was used, which holds for variance-preserving schedules only"
    alpha, sigma = uniform(0.7, 1.5, 7, seed=2).double(), uniform(0.7, 1.5, 7, seed=3).double()
    r = alpha / sigma
    wanted = {"x0": 1.0, "eps": r**2, "v": (sigma + alpha * r) ** 2, "flow": (1 + r) ** 2}
    wrong = [name for name, w in wanted.items() if not close(target_weight(alpha, sigma, name), w)]
    yield "and so for any alpha and sigma, of no schedule", not wrong, \
        f"not so for {', '.join(wrong)}: alpha^2 + sigma^2 = 1 or alpha + sigma = 1 was used"


@exercise("03.2", "attention in a window", points=2)
def _(local_attend):
    radius = integer(1, 2, seed=1)
    height = 2 * radius + integer(2, 3, seed=2)  # larger than a window, and never as wide as high
    width = height + integer(2, 3, seed=3)
    if integer(0, 1, seed=4):
        height, width = width, height
    n, d = height * width, integer(5, 9, seed=5)
    q, k, v = (noise(3, 2, n, d, seed=i) for i in (6, 7, 8))
    out = local_attend(q, k, v, height, width, radius)
    yield "the shape stays (B, heads, N, d)", out.shape == v.shape, f"got {tuple(out.shape)}, expected {tuple(v.shape)}"
    ones = local_attend(q, k, torch.ones_like(v), height, width, radius)
    yield "the weights of a window add up to 1", close(ones, torch.ones_like(v)), (
        "a position is left without any other: it belongs to its own window" if ones.isnan().any() else
        "mask before the softmax, with -inf, not after it with 0; and the softmax runs over the keys")
    yield "radius 0 gives every position its own value", close(local_attend(q, k, v, height, width, 0), v), \
        "only the position itself is at distance 0, and it belongs to the window; what is too far gets -inf, not 0"
    i = torch.arange(n)

    def window(wide: int) -> tuple[Tensor, Tensor]:  # (N, N): near in rows, near in columns
        return (i[:, None] // wide - i // wide).abs() <= radius, (i[:, None] % wide - i % wide).abs() <= radius

    rows, columns = window(width)
    near, turned = rows & columns, torch.logical_and(*window(height))
    # Values that show the weights. Scores are 0.2 times normal numbers, none above 2: inside, no weight is below 1e-4.
    shown = torch.nn.functional.pad(torch.eye(n), (0, -n % d)).split(d, dim=1)  # d columns at a time: v is as wide as q
    seen = torch.cat([local_attend(0.2 * q, k, part.expand(3, 2, n, d), height, width, radius) for part in shown], -1)[..., :n] > 1e-5
    yield "each position sees the square around it, cut at the border, and nothing else", (seen == near).all(), (
        "the distance is that of the flattened index: the end of a row is not next to the start of the following one"
        if (seen == ((i[:, None] - i).abs() <= radius)).all() else
        "height and width changed places: position i lies in row i // width" if (seen == turned).all() else
        "a window is bounded in rows and in columns: one of the two is missing"
        if (seen == rows).all() or (seen == columns).all() or (seen == (rows | columns)).all() else
        "the map has borders: its right edge is not next to its left one" if seen[..., 0, width - 1].any() else
        "the distance is the larger one of |rows| and |columns|, and the radius itself belongs to the window")
    scores = q @ k.transpose(-1, -2)
    whole = local_attend(q, k, v, height, width, max(height, width))
    yield "a window over the whole map is plain attention", close(whole, (scores / d**0.5).softmax(-1) @ v), (
        "the scores are not divided by sqrt(d)" if close(whole, scores.softmax(-1) @ v) else
        "the scores are those of chapter 3's attend, and nothing is masked that is near enough")
    weights = near * (scores / d**0.5).softmax(-1)
    yield "inside a window the weights have the ratios of plain attention", \
        close(out, weights / weights.sum(-1, keepdim=True) @ v), "a mask may take positions away, and nothing else"


@exercise("03.3", "an average without a start", points=1)
def _(debiased):
    constant, n, d = float(uniform(1.0, 4.0, seed=1)), integer(5, 9, seed=2), float(uniform(0.97, 0.99, seed=3))

    def averages(values: list[float], decay: float) -> Tensor:
        found = debiased(values, decay)
        return torch.tensor([float(x) for x in found] if hasattr(found, "__iter__") else [], dtype=torch.float64)

    found = averages([constant] * n, d)
    yield "one average for each value, as a list", len(found) == n, \
        f"got {len(found)} averages for {n} values: append one after each value and return them all"
    yield "the average of a constant is that constant, from the first step", close(found, torch.full((n,), constant)), (
        "without a division by 1 - d^n the start at zero stays in it" if close(found[0], (1 - d) * constant) else
        "divide what you return by 1 - d^n, n from 1, and keep the running average itself as it is")
    d = float(uniform(0.6, 0.9, seed=4))
    first, second = float(uniform(1.0, 2.0, seed=5)), -float(uniform(1.0, 2.0, seed=6))  # at least 2 apart
    values = [first, second, *noise(38, seed=7).tolist()]
    kept = list(values)
    found = averages(values, d)
    yield "the list given is as it was", values == kept, "the averages were written into it: begin with an empty list"
    yield "after two values it is (d x1 + x2) / (1 + d)", close(found[1], (d * first + second) / (1 + d)), (
        "that keeps the first value with the weight d instead of d / (1 + d): a start with x1 is a start, too"
        if close(found[1], d * first + (1 - d) * second) else
        "d and 1 - d changed places: the average so far gets d, the new value 1 - d"
        if close(found[1], ((1 - d) * first + second) / (2 - d)) else
        "all values count alike there: an older value has d of the weight of the next one"
        if close(found[1], (first + second) / 2) else
        "after n values divide by 1 - d^n, with n counted from 1")
    weights = d ** torch.arange(39, -1, -1, dtype=torch.float64)
    means = (weights * torch.tensor(values)).cumsum(0) / weights.cumsum(0)  # weights d^(40 - n), of the values so far
    yield "a value has d^k of the weight of the one k steps later", close(found, means), \
        "the decay is constant, and the correction must not go back into the running average: keep the two apart"


@exercise("03.6", "the best linear denoiser", points=3)
def _(linear_denoiser):
    size = integer(3, 5, seed=1)
    alpha, sigma = float(uniform(0.5, 0.8, seed=2)), float(uniform(0.4, 0.7, seed=3))
    mean = uniform(1.0, 2.0, size, seed=4).double() * (-1.0) ** torch.arange(size)
    # variances in [0.5, 2], neighbors correlate with 0.6: eigenvalues in [1/8, 8], far from a diagonal matrix
    scale = uniform(0.5, 2.0, size, seed=5).double().sqrt()
    i = torch.arange(size)
    cov = scale[:, None] * scale * 0.6 ** (i[:, None] - i).abs()
    eye, zt = torch.eye(size, dtype=torch.float64), noise(size + 2, size, seed=6).double()
    kept = zt.clone(), mean.clone(), cov.clone()

    def same(a, b) -> bool:  # float32 loses up to about 64 (the largest eigenvalue over the smallest) * 1e-7 * 10
        return close(a, b, atol=1e-3)

    out = linear_denoiser(zt, alpha, sigma, mean, cov)
    yield "the shape stays (B, D)", out.shape == zt.shape, f"got {tuple(out.shape)} for {tuple(zt.shape)}"
    yield "the arguments are as they were", all(map(torch.equal, (zt, mean, cov), kept)), \
        "an operation in place (+=, -=, mul_, ...) has changed an argument"
    clear = linear_denoiser(zt, alpha, 1e-7, mean, cov)
    yield "without noise it is z_t / alpha", same(clear, zt / alpha), (
        "the mean of z_t, alpha mean, is not subtracted" if same(clear, zt / alpha + mean) else
        "Cov(z0, z_t) is alpha cov, not cov" if same(clear, mean + (zt - alpha * mean) / alpha**2) else
        "the mean is not added back, or z_t has another mean than alpha mean"
        if same(clear - zt / alpha, (clear - zt / alpha)[:1].expand_as(zt)) else
        "then cov cancels: alpha cov (alpha^2 cov)^-1 = 1 / alpha; is it a matrix's inverse, not one of entries?")
    white = linear_denoiser(zt, alpha, sigma, mean, eye)
    expected = mean + alpha * (zt - alpha * mean) / (alpha**2 + sigma**2)
    yield "for white latents it is mean + alpha (z_t - alpha mean) / (alpha^2 + sigma^2)", same(white, expected), (
        "the mean must be subtracted from z_t, as alpha mean, and added back at the end"
        if same(white, alpha * zt / (alpha**2 + sigma**2)) else "the covariance of z_t is alpha^2 cov + sigma^2 I")
    blind = linear_denoiser(zt, 0.0, 1.0, mean, cov)
    yield "with nothing but noise it is the mean", same(blind, mean.expand_as(zt)), (
        "alpha is 0 there, where sampling begins: nothing may be divided by it" if not blind.isfinite().all() else
        "nothing is known there but the mean of the data: is it added back?")
    # It is linear, so its matrix can be read off, and what follows is exact: no samples are drawn. With samples as rows
    # z0_hat = mean + (z_t - alpha mean) gain; z_t and the error z0_hat - z0 have the covariance total gain - alpha cov.
    at_zero = linear_denoiser(0 * zt[:1], alpha, sigma, mean, cov).double()
    gain = linear_denoiser(eye, alpha, sigma, mean, cov) - at_zero
    yield "it is linear in z_t, each row by itself", same(out, at_zero + zt @ gain), \
        "a row's answer depends on the other rows, or is not linear: statistics come from mean and cov alone"
    total = alpha**2 * cov + sigma**2 * eye
    left, single = total @ gain - alpha * cov, torch.diag(alpha * cov.diagonal() / total.diagonal())
    yield "its error is uncorrelated with z_t, so no linear denoiser is better", \
        same(left, torch.zeros_like(left)), (
            "only the variances were used: what one value says about another counts, too" if same(gain, single) else
            "is it cov times the inverse of the whole sum alpha^2 cov + sigma^2 I?")
