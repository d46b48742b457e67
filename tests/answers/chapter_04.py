"""Wrong answers to the exercises of chapter 4, the latent scale, and other right ones."""

import math

import torch

from coursework import solution

normalizer, streamed, same_noise, shifted = (solution(f"04.{i}") for i in (1, 2, 3, 4))


# 04.1

def channels(spread, center=lambda mean: mean.mean((0, 2, 3))):
    """normalizer with another formula: spread(mean, logvar) -> scale (C,)."""
    return lambda moments: (center(moments[:, 0].double()), spread(moments[:, 0].double(), moments[:, 1].double()))


def between(mean):
    return mean.var((0, 2, 3), correction=0)


def within(logvar):
    return logvar.exp().mean((0, 2, 3))


def channels_images(moments):
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    return mean.mean(0), (mean.var(0) + logvar.exp().mean(0)).rsqrt()


def channels_writes(moments):
    out = normalizer(moments)
    moments[:, 0] -= moments[:, 0].mean()
    return out


def channels_scaled_shift(moments):
    shift, scale = normalizer(moments)
    return shift * scale, scale


def channels_negated(moments):
    shift, scale = normalizer(moments)
    return -shift, scale


def channels_single(moments):
    mean, logvar = moments.unbind(1)
    mean, logvar = (x.transpose(0, 1).flatten(1) for x in (mean, logvar))
    return mean.mean(1), 1 / torch.sqrt(mean.var(1) + logvar.exp().mean(1))


def channels_loop(moments):
    rows = [(m.mean(), (m.square().mean() - m.mean() ** 2 + v.mean()) ** -0.5)
            for m, v in zip(moments[:, 0].double().unbind(1), moments[:, 1].double().exp().unbind(1))]
    return tuple(map(torch.stack, zip(*rows)))


# 04.2

def one(moments):
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    return (mean.var(correction=0) + logvar.exp().mean()) ** -0.5


def sums(batch, dtype=torch.float64):
    mean, logvar = batch[:, 0].to(dtype), batch[:, 1].to(dtype)
    return torch.stack([mean.new_tensor(float(mean.numel())), mean.sum(), (mean**2).sum(), logvar.exp().sum()])


def finish(count, total, square, variance):
    return float((square / count - (total / count) ** 2 + variance / count) ** -0.5)


def stream_average(batches):
    scales = [one(b) for b in batches]
    return sum(scales) / len(scales)


def stream_average_variance(batches):
    variances = [one(b) ** -2 for b in batches]
    return (sum(variances) / len(variances)) ** -0.5


def stream_weighted(batches):  # weights by size, but still within each batch
    rows = [(len(b), one(b) ** -2) for b in batches]
    return (sum(n * v for n, v in rows) / sum(n for n, _ in rows)) ** -0.5


def stream_unequal(batches):
    rows = [(sums(b) / b[:, 0].numel())[1:] for b in batches]
    return finish(1, *(sum(rows) / len(rows)))


def stream_float32(batches):
    total = sum(sums(b, torch.float32) for b in batches)
    return float(((total[2] / total[0]) - (total[1] / total[0]) ** 2 + total[3] / total[0]).clamp(min=1e-9) ** -0.5)


def stream_float32_inside(batches):  # sums of a batch in float32, added up in float64
    return finish(*sum(sums(b, torch.float32).double() for b in batches))


def stream_means(batches):
    return 1 / torch.cat([b[:, 0].double().flatten() for b in batches]).std()


def stream_channels(batches):
    moments = torch.cat(list(batches)).double()
    return (between(moments[:, 0]) + within(moments[:, 1])).mean() ** -0.5


def stream_square(batches):  # E[mean]^2 forgotten
    count, _, square, variance = sum(sums(b) for b in batches)
    return finish(count, 0 * count, square, variance)


def stream_twice(batches):
    count = sum(b[:, 0].numel() for b in batches)
    return finish(count, *sum((sums(b)[1:] for b in batches), torch.zeros(3)))


def stream_inverse(batches):
    return 1 / streamed(batches)


def stream_kept(batches):  # right, but all of it in memory
    return one(torch.cat(list(batches)))


def stream_kept_copies(batches):  # not one pass with four numbers, but right
    return one(torch.cat([b.clone() for b in batches]))


def stream_merged(batches):  # means and squared deviations, merged batch by batch
    n, mean, deviations, variance = 0, 0.0, 0.0, 0.0
    for batch in batches:
        values, logvar = batch[:, 0].double().flatten(), batch[:, 1].double()
        gap, new = float(values.mean()) - mean, n + len(values)
        deviations += float(((values - values.mean()) ** 2).sum()) + gap**2 * n * len(values) / new
        mean, n, variance = mean + gap * len(values) / new, new, variance + float(logvar.exp().sum())
    return (deviations / (n - 1) + variance / n) ** -0.5


def stream_tensor(batches):
    count, total, square, variance = sum(sums(b) for b in batches)
    return torch.rsqrt(square / count - (total / count).square() + variance / count)


# 04.3

def same_in_place(t, s):
    out = same_noise(t, s)
    t /= t + s * (1 - t)
    return out


def same_on_cosine(t, s):  # the cosine schedule's answer
    angle = torch.pi / 2 * t
    return 2 / torch.pi * torch.atan2(torch.sin(angle), s * torch.cos(angle))


def same_ratio(t, s):  # right inside, 0 / 0 at t = 0
    signal = s * (1 - t) / t
    return signal.reciprocal() * t * s / (t * s * signal.reciprocal() + s * t)


def same_by_log_snr(t, s):
    return torch.sigmoid(torch.logit(t) - math.log(s))


def same_by_shift(t, s):  # 2403.03206's way to write it
    return t / s / (1 + (1 / s - 1) * t)


def same_by_inverse(t, s):
    return 1 / (1 + s * (1 - t) / t)


# 04.4

def shifted_unnormalized(schedule, s):
    return lambda t: (schedule(t)[0] / s, schedule(t)[1])


def shifted_ratio(schedule, s):
    def new(t):
        alpha, sigma = schedule(t)
        ratio = alpha / (s * sigma)
        sigma = (1 + ratio**2) ** -0.5
        return ratio * sigma, sigma
    return new


def shifted_time(schedule, s):  # right for the straight line's clock only
    return lambda t: schedule(t * s / (t * s + 1 - t))


def shifted_cosine_only(schedule, s):
    def new(t):
        angle = torch.atan2(s * torch.sin(torch.pi / 2 * t), torch.cos(torch.pi / 2 * t).clamp(min=0))
        return torch.cos(angle), torch.sin(angle)
    return new


def shifted_vp_given(schedule, s):  # sigma from alpha, as if the given schedule were variance preserving
    def new(t):
        alpha, _ = schedule(t)
        sigma = torch.sqrt((1 - alpha**2).clamp(min=0))
        norm = torch.sqrt(alpha**2 + (s * sigma) ** 2)
        return alpha / norm, s * sigma / norm
    return new


def shifted_flattened(schedule, s):
    new = shifted(schedule, s)
    return lambda t: tuple(x.reshape(-1) for x in new(t))


def shifted_angle(schedule, s):
    def new(t):
        alpha, sigma = schedule(t)
        angle = torch.atan2(s * sigma, alpha)
        return torch.cos(angle), torch.sin(angle)
    return new


def shifted_log_snr(schedule, s):
    def new(t):
        alpha, sigma = schedule(t)
        lam = torch.log(alpha) - torch.log(sigma) - math.log(s)
        return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()
    return new


def shifted_hypot(schedule, s):
    def new(t):
        alpha, sigma = (x.double() for x in schedule(t))
        return tuple((x / torch.hypot(alpha / s, sigma)).to(t.dtype) for x in (alpha / s, sigma))
    return new


ALSO_RIGHT = [
    ("04.1", channels_single), ("04.1", channels_loop),
    ("04.1", channels(lambda m, v: (m.var((0, 2, 3)) + within(v)) ** -0.5)),
    ("04.2", stream_kept_copies), ("04.2", stream_merged), ("04.2", stream_tensor),
    ("04.3", same_by_log_snr), ("04.3", same_by_shift), ("04.3", same_by_inverse),
    ("04.4", shifted_angle), ("04.4", shifted_log_snr), ("04.4", shifted_hypot),
]
WRONG = {
    "04.1": [(channels(lambda m, v: between(m) ** -0.5), "second term is missing"),
             (channels(lambda m, v: (between(m) + within(v / 2)) ** -0.5), "needs the variance"),
             (channels(lambda m, v: (between(m) + within(v)) ** -1), "not 1 / variance"),
             (channels(lambda m, v: (between(m) + within(v)) ** 0.5), "1 / std, not std"),
             (channels(lambda m, v: (between(m) + v.mean((0, 2, 3)).exp()) ** -0.5), "exponential first"),
             (channels(lambda m, v: 1 / (between(m).sqrt() + within(v / 2))), "do not add up"),
             (channels(lambda m, v: ((m**2).mean((0, 2, 3)) + within(v)) ** -0.5), "about 0"),
             (channels(lambda m, v: ((m - m.mean()).square().mean((0, 2, 3)) + within(v)) ** -0.5), "its own mean"),
             (channels(lambda m, v: (m.var() + v.exp().mean()).expand(m.shape[1]) ** -0.5), "that channel's mean"),
             (channels_scaled_shift, "and not scaled"), (channels_negated, "own sign"),
             (channels_images, "keep the channels"), (channels_writes, "wrote into moments")],
    "04.2": [(stream_average, "between the batches"), (stream_average_variance, "between the batches"),
             (stream_weighted, "between the batches"), (stream_unequal, "divide sums"), (stream_float32, "float64"),
             (stream_float32_inside, "float64"), (stream_means, "is missing"), (stream_channels, "one mean"),
             (stream_square, "not subtracted"), (stream_twice, "read once"), (stream_inverse, "1 / sqrt at the end"),
             (stream_kept, "let it go")],
    "04.3": [(lambda t, s: s * t / (s * t + 1 - t), "other way round"), (lambda t, s: t / s, "fixed points"),
             (lambda t, s: t / (t + s**2 * (1 - t)), "not s**2"), (lambda t, s: t + 0, "does nothing"),
             (lambda t, s: t / (t + s**0.5 * (1 - t)), "not its root"), (same_on_cosine, "on the cosine schedule"),
             (same_ratio, "0 / 0"), (same_in_place, "changed t"), (lambda t, s: t**s, "agrees"),
             (lambda t, s: t / (t + s * (1 - t)) ** 2, "for s = 1|agrees")],
    "04.4": [(lambda schedule, s: shifted(schedule, 1 / s), "other way round"), (shifted_ratio, "NaN"),
             (lambda schedule, s: shifted(schedule, s**2), "not s**2"), (shifted_unnormalized, "variance is preserved"),
             (lambda schedule, s: shifted(schedule, s**0.5), "not s**2"), (shifted_time, "nothing but their ratio"),
             (lambda schedule, s: schedule, "does nothing"), (shifted_cosine_only, "cosine only"),
             (shifted_vp_given, "cosine only"), (shifted_flattened, "elementwise")],
}
