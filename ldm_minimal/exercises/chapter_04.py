"""Checks of the exercises of chapter 4: the latent scale."""

import torch
from torch import Tensor

from ..checks import close, cosine, exercise, integer, noise, uniform


def _moments(n: int, seed: int) -> Tensor:
    """(n, 2, C, h, w): means with an offset and a spread of their own in each channel, and variances from .05 to 1.

    The means drift from the first image to the last, so that batches differ. A channel's variance of means lies
    between 1.5 and 4, its mean variance near 0.7, so that no term is small beside the others.
    """
    channels, height = integer(3, 5, seed=seed), integer(3, 4, seed=seed + 1)
    shape = n, channels, height, height + 2
    spread = uniform(0.5, 1.5, channels, 1, 1, seed=seed + 2)
    offset = torch.linspace(-2, 4, channels)[:, None, None] + uniform(-0.5, 0.5, channels, 1, 1, seed=seed + 3)
    mean = noise(*shape, seed=seed + 4) * spread + offset + torch.linspace(-2, 2, n)[:, None, None, None]
    return torch.stack([mean, noise(*shape, seed=seed + 5).clamp(-3, 0)], dim=1)


@exercise("04.1", "a shift and a scale for each channel", points=1)
def _(normalizer):
    moments = _moments(integer(50, 70, seed=1), seed=2)
    kept, channels = moments.clone(), moments.shape[2]
    shift, scale = normalizer(moments)
    yield "one shift and one scale per channel, shape (C,)", shift.shape == scale.shape == (channels,), \
        f"got {tuple(shift.shape)} and {tuple(scale.shape)}: reduce over images, rows and columns, keep the channels"
    yield "the input is left as it was", torch.equal(moments, kept), \
        "something wrote into moments: work on a new tensor"
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    center, between = mean.mean((0, 2, 3)), mean.var((0, 2, 3), correction=0)
    within, deviation = logvar.exp().mean((0, 2, 3)), (logvar / 2).exp().mean((0, 2, 3))
    total = between + within
    yield "the shift is the mean of each channel", close(shift, center), (
        "z0 = scale * (z - shift): the shift is subtracted, so it has the mean's own sign" if close(shift, -center) else
        "z0 = scale * (z - shift): the shift is in units of z, and not scaled")

    def is_root(variance: Tensor) -> bool:  # n - 1 in place of n moves the scale by less than 1e-3, mistakes by more
        return close(scale, variance**-0.5, rtol=2e-3)

    yield "scale * (z - shift) has standard deviation 1 in each channel", is_root(total), (
        "training sees samples: Var(z) = Var(mean) + E[exp(logvar)], and the second term is missing"
        if is_root(between) else "1 / std, not 1 / variance" if is_root(total**2) else
        "it is multiplied by the scale: 1 / std, not std" if is_root(1 / total) else
        "exp(logvar / 2) is the standard deviation; the sum needs the variance, exp(logvar)"
        if is_root(between + deviation) else
        "logvar is the logarithm of the variance: take its exponential first, then the mean"
        if is_root(between + logvar.mean((0, 2, 3))) or is_root(between + logvar.mean((0, 2, 3)).exp()) else
        "standard deviations do not add up, variances do" if is_root((between.sqrt() + deviation) ** 2) else
        "that is the spread about 0 or about the mean of all channels: take each channel about its own mean"
        if is_root(total + center**2) or is_root(total + (center - center.mean()) ** 2) else
        "compare with 1 / sqrt(Var(mean) + E[exp(logvar)]), taken in each channel about that channel's mean")


@exercise("04.2", "the scale of a stream", points=2)
def _(streamed_scale):
    size = integer(8, 12, seed=1)
    n = 6 * size
    moments, small = _moments(n, seed=2), integer(1, 3, seed=10)
    uneven = [small, 4 * size, 2 * size - small]

    def one(data: Tensor) -> Tensor:
        mean, logvar = data[:, 0].double(), data[:, 1].double()
        return (mean.var(correction=0) + logvar.exp().mean()) ** -0.5

    def right(found, data: Tensor) -> bool:  # there are more than 2,000 values: n - 1 in place of n is within 3e-4
        return close(found, one(data), rtol=5e-4)

    found = streamed_scale(iter([moments]))
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    yield ("one batch: 1 / sqrt(Var(mean) + E[exp(logvar)])", right(found, moments), (
        "exp(logvar), the mean variance of the posteriors, is missing" if close(found, 1 / mean.std(), rtol=2e-3) else
        "the variance is over all values, about one mean: the channels' differences count" if close(
            found, (mean.var((0, 2, 3)).mean() + logvar.exp().mean()) ** -0.5, rtol=2e-3) else
        "the square of the mean is not subtracted" if close(
            found, ((mean**2).mean() + logvar.exp().mean()) ** -0.5, rtol=2e-3) else
        "a generator can be read once: a second loop over it sees nothing" if not 0 < float(found) < 1e9 else
        "on a single batch this is latent_scale itself: is exp(logvar) there, and 1 / sqrt at the end?"))
    yield ("six batches of one size: the same number", right(streamed_scale(iter(moments.split(size))), moments),
           "an average of the batches' scales, stds or variances leaves out the variance between the batches: "
           "collect the sums of mean, mean**2 and exp(logvar) instead")
    yield ("batches of unequal size: the same number", right(streamed_scale(iter(moments.split(uneven))), moments),
           f"a batch of {small} counts as much as one of {4 * size}: divide sums by the number of values, at the end")
    holds = True
    for offset in (2e4, -5e4):  # there squares have steps of 32 and more in float32, and the variance is below 10
        far = moments.clone()
        far[:, 0] += offset
        holds = holds and right(streamed_scale(iter(far.split(uneven))), far)
    yield ("latents far from 0: still the same, to three digits", holds,
           "E[mean**2] - E[mean]**2 loses its digits in float32: convert each batch to float64 first")

    def reused():  # one buffer for all batches, as fast loaders have it
        buffer = torch.empty_like(moments[:size])
        for batch in moments.split(size):
            yield buffer.copy_(batch)

    yield ("a stream that reuses its memory: the same number", right(streamed_scale(reused()), moments),
           "a batch was kept while the next one came (list, torch.cat): add its sums up at once, and let it go")


@exercise("04.3", "a wrong scale on the straight line", points=2)
def _(same_noise):
    t = torch.linspace(0, 1, integer(9, 15, seed=1), dtype=torch.float64)
    kept, s, small = t.clone(), float(uniform(2.0, 4.0, seed=2)), float(uniform(0.2, 0.4, seed=3))
    large = same_noise(t, s)
    yield "t is left as it was, and t' has its shape", torch.equal(t, kept) and large.shape == t.shape, \
        f"got shape {tuple(large.shape)} for {tuple(t.shape)}, or an operation in place (+=, mul_) has changed t"
    yield "t = 0 stays data, t = 1 stays noise", close(large[[0, -1]], torch.tensor([0.0, 1.0])), (
        "0 / 0 or inf / inf at an end: multiply both sides by the denominators first" if not large.isfinite().all() else
        "both ends are fixed points: no noise stays no noise, and no signal no signal, whatever the scale")
    yield "s = 1 changes nothing", close(same_noise(t, 1.0), t), "unit data is the reference: for s = 1 the answer is t"
    yield (f"data larger than 1 is cleaner at the same t: t' < t for s = {s:.1f}", (large < t)[1:-1].all(),
           "that is t itself: s does nothing" if close(large, t) else
           "the other way round: s * (1 - t) / t = (1 - t') / t', solved for t'")
    inner, s = t[1:-1], small
    there = same_noise(inner, s)
    ratio, wanted = (1 - there) / there, (1 - inner) / inner
    yield "the ratio of signal to noise agrees: (1 - t') / t' = s (1 - t) / t", close(ratio, s * wanted), (
        "the factor is s, not s**2" if close(ratio, s**2 * wanted) else
        "the factor is s, not its root" if close(ratio, s**0.5 * wanted) else
        "that matches signal to noise on the cosine schedule; here alpha = 1 - t and sigma = t"
        if close(torch.tan(torch.pi / 2 * inner), s * torch.tan(torch.pi / 2 * there)) else
        "write the ratio alpha / sigma of both sides, and solve for t'")
    yield "1 / s undoes s", close(same_noise(there, 1 / s), inner), \
        "shifting by log s and then by -log s must give t again"
    u, eps = (noise(len(inner), 4, seed=i).double() for i in (4, 5))
    t, there = inner[:, None], same_noise(inner[:, None], s)
    yield "z_t of the small data is a multiple of z_t' of unit data, t of any shape", \
        close((1 - t) * s * u + t * eps, (t + s * (1 - t)) * ((1 - there) * u + there * eps)), \
        "the ratio agrees, so the two noisy tensors differ by one factor only: use elementwise operations"


@exercise("04.4", "a schedule for a wrong scale", points=2)
def _(shifted):
    power, t = float(uniform(1.5, 2.5, seed=1)), 0.1 + 0.8 * uniform(0, 1, 11, seed=2).double()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for s in (float(uniform(0.1, 0.4, seed=3)), float(uniform(2.5, 8.0, seed=4))):
        schedule = shifted(cosine, s)
        (old_alpha, old_sigma), (alpha, sigma) = cosine(t), schedule(t)
        old, new = old_alpha / old_sigma, alpha / sigma
        yield f"s = {s:.2f}: alpha**2 + sigma**2 = 1", close(alpha**2 + sigma**2, torch.ones_like(t)), \
            "a new ratio is not enough: divide both by sqrt(alpha**2 + sigma**2), so that the variance is preserved"
        yield f"s = {s:.2f}: s * alpha / sigma is what alpha / sigma is for unit data", close(s * new, old), (
            "the other way round: data larger than 1 needs more noise, so it is sigma that gets the factor s"
            if close(new, s * old) else "that is the schedule as it was: s does nothing" if close(new, old) else
            "the ratio must change by exactly s: is the factor s, not s**2 or sqrt(s)?"
            if close(s**2 * new, old) or close(s**0.5 * new, old) else
            "take the given alpha and sigma at the same t, and change nothing but their ratio")
        alpha, sigma = schedule(ends)
        yield f"s = {s:.2f}: t = 0 is data and t = 1 is noise", close(alpha, 1 - ends) and close(sigma, ends), \
            "at the ends nothing changes; a division by sigma or by alpha gives NaN there"
    for name, given in (("another schedule", lambda t: cosine(t**power)), ("the straight line", lambda t: (1 - t, t))):
        (old_alpha, old_sigma), (alpha, sigma) = given(t), shifted(given, s)(t)
        yield f"the same for {name}", close(s * alpha * old_sigma, sigma * old_alpha) and close(
            alpha**2 + sigma**2, torch.ones_like(t)), \
            "use what `schedule` returns, and nothing that holds for cosine only, such as alpha**2 + sigma**2 = 1"
    alpha, sigma = schedule(uniform(0.0, 1.0, 3, 1, 1, 1, seed=5))
    yield "times of any shape and dtype", alpha.shape == sigma.shape == (3, 1, 1, 1) and alpha.dtype == torch.float32, \
        "a schedule takes (B, 1, 1, 1) in float32 as well: use only elementwise operations"
