"""Right and wrong answers to the exercises of chapter 4, the latent scale."""

import torch


def channels(moments):
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
    return mean.mean((0, 2, 3)), variance.rsqrt()


def channels_means(moments):
    mean = moments[:, 0].double()
    return mean.mean((0, 2, 3)), 1 / mean.std((0, 2, 3), correction=0)


def channels_half(moments):
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    return mean.mean((0, 2, 3)), (mean.var((0, 2, 3), correction=0) + (logvar / 2).exp().mean((0, 2, 3))).rsqrt()


def channels_variance(moments):
    shift, scale = channels(moments)
    return shift, scale**2


def channels_scaled_shift(moments):
    shift, scale = channels(moments)
    return shift * scale, scale


def channels_images(moments):
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    return mean.mean(0), (mean.var(0) + logvar.exp().mean(0)).rsqrt()


def channels_writes(moments):
    out = channels(moments)
    moments[:, 0] -= moments[:, 0].mean()
    return out


def stream(batches):
    count = total = square = variance = 0
    for moments in batches:
        mean, logvar = moments[:, 0].double(), moments[:, 1].double()
        count += mean.numel()
        total += mean.sum()
        square += (mean**2).sum()
        variance += logvar.exp().sum()
    return float((square / count - (total / count) ** 2 + variance / count) ** -0.5)


def one(moments):
    mean, logvar = moments[:, 0].double(), moments[:, 1].double()
    return (mean.var(correction=0) + logvar.exp().mean()) ** -0.5


def stream_average(batches):
    scales = [one(b) for b in batches]
    return sum(scales) / len(scales)


def stream_unequal(batches):
    rows = [(b[:, 0].double().mean(), (b[:, 0].double() ** 2).mean(), b[:, 1].double().exp().mean()) for b in batches]
    m, s, v = (sum(r) / len(rows) for r in zip(*rows))
    return (s - m**2 + v) ** -0.5


def stream_float32(batches):
    count = total = square = variance = 0
    for moments in batches:
        mean, logvar = moments[:, 0], moments[:, 1]
        count += mean.numel()
        total, square, variance = total + mean.sum(), square + (mean**2).sum(), variance + logvar.exp().sum()
    return (square / count - (total / count) ** 2 + variance / count).clamp(min=1e-9) ** -0.5


def stream_means(batches):
    return 1 / torch.cat([b[:, 0].double().flatten() for b in batches]).std()


def shifted(schedule, c):
    def new(t):
        alpha, sigma = schedule(t)
        norm = torch.sqrt(alpha**2 + c**2 * sigma**2)
        return alpha / norm, c * sigma / norm
    return new


def shifted_wrong_way(schedule, c):
    return shifted(schedule, 1 / c)


def shifted_unnormalized(schedule, c):
    return lambda t: (schedule(t)[0] / c, schedule(t)[1])


def shifted_square(schedule, c):
    return shifted(schedule, c**2)


def shifted_ratio(schedule, c):
    def new(t):
        alpha, sigma = schedule(t)
        ratio = alpha / (c * sigma)
        sigma = (1 + ratio**2) ** -0.5
        return ratio * sigma, sigma
    return new


SOLUTIONS = {"04.1": channels, "04.2": stream, "04.3": lambda t, c: t / (t + c * (1 - t)), "04.4": shifted}
WRONG = {
    "04.1": [(channels_means, "second term is missing"), (channels_half, "needs the variance"),
             (channels_variance, "not 1 / variance"), (channels_scaled_shift, "units of z"),
             (channels_images, "keep the channels"), (channels_writes, "wrote into moments")],
    "04.2": [(stream_average, "between the batches"), (stream_unequal, "divide sums"), (stream_float32, "float64"),
             (stream_means, "exp(logvar)")],
    "04.3": [(lambda t, c: c * t / (c * t + 1 - t), "other way round"), (lambda t, c: t / c, "fixed points"),
             (lambda t, c: t / (t + c**2 * (1 - t)), "not s**2"), (lambda t, c: t, "other way round")],
    "04.4": [(shifted_wrong_way, "other way round"), (shifted_unnormalized, "variance is preserved"),
             (shifted_square, "not s**2"), (shifted_ratio, "NaN")],
}
