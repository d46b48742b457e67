"""Right and wrong answers to the exercises of chapter 9, evaluation."""

import torch


def bias(d, n, m):
    return d * (d + 5) / 4 * (1 / n + 1 / m)


def at_infinity(sizes, values):
    x = torch.stack([torch.ones(len(sizes)).double(), 1 / torch.tensor(sizes).double()], 1)
    return float(torch.linalg.lstsq(x, torch.tensor(values).double()[:, None]).solution[0])


def slope_only(sizes, values):
    x = torch.stack([torch.ones(len(sizes)).double(), 1 / torch.tensor(sizes).double()], 1)
    return float(torch.linalg.lstsq(x, torch.tensor(values).double()[:, None]).solution[1])


def in_n(sizes, values):
    x = torch.stack([torch.ones(len(sizes)).double(), torch.tensor(sizes).double()], 1)
    return float(torch.linalg.lstsq(x, torch.tensor(values).double()[:, None]).solution[0])


def two_points(sizes, values):
    a, b = 1 / sizes[0], 1 / sizes[-1]
    return values[-1] - b * (values[0] - values[-1]) / (a - b)


def no_constant(sizes, values):
    return 0.3 if values[0] == 0.8 else 0.0


def distances(samples, train, power=1, convert=True):
    a, b = samples.flatten(1), train.flatten(1)
    if convert:
        return torch.cdist(a.float(), b.float()).topk(2, largest=False).values.T ** power
    return ((a[:, None] - b[None]) ** 2).float().mean(2).sqrt().topk(2, largest=False).values.T


def copied(samples, train, factor=1 / 3):
    first, second = distances(samples, train)
    return first < factor * second


def squared(samples, train, factor=1 / 3):
    first, second = distances(samples, train, 2)
    return first < factor * second


def exact_only(samples, train, factor=1 / 3):
    return (samples[:, None] == train[None]).flatten(2).all(2).any(1)


def upside_down(samples, train, factor=1 / 3):
    first, second = distances(samples, train)
    return second < factor * first


def share(samples, train, factor=1 / 3):
    first, second = distances(samples, train)
    return (first < factor * second).float().mean()


def bytes_subtracted(samples, train, factor=1 / 3):
    first, second = distances(samples, train, convert=False)
    return first < factor * second


def no_factor(samples, train, factor=1 / 3):
    first, second = distances(samples, train)
    return first < second / 3


SOLUTIONS = {"09.1": bias, "09.2": at_infinity, "09.3": copied, "09.4": 12483}
WRONG = {
    "09.1": [
        (lambda d, n, m: 3 * d / 2 * (1 / n + 1 / m), "off the diagonal"),
        (lambda d, n, m: d * (d + 5) / (n + m), "variances of two independent sets add"),
        (lambda d, n, m: d * (d + 5) / (2 * n), "variances of two independent sets add"),
        (lambda d, n, m: d * (d + 3) / 2 * (1 / n + 1 / m), "warm-up's case"),
        (lambda d, n, m: d * (d + 2) / 2 * (1 / n + 1 / m), "each pair|near, but not the law"),
    ],
    "09.2": [(slope_only, "not its slope"), (in_n, "line in 1 / n"), (two_points, "two of the points only"),
             (lambda sizes, values: values[-1], "not the value at the largest n"),
             (lambda sizes, values: max(0.0, at_infinity(sizes, values)), "clamped at zero")],
    "09.3": [(squared, "squared distances"), (exact_only, "only exact copies"), (upside_down, "smaller first"),
             (share, "bool tensor"), (bytes_subtracted, "floats before|only exact"), (no_factor, "is the factor used")],
    "09.4": [(4161, "3 squared is 9"), (1387, "both variances"), (24966, "not of both together"), (6242, "both variances"),
             (13300, "0.92")],
}
