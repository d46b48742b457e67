"""Wrong answers, and other right ones, to the exercises of chapter 9, evaluation."""

import math
import statistics

import torch


# ---- 09.1
def bias(d, n, m):
    return d * (d + 5) / 4 * (1 / n + 1 / m)


def exact_variances(d, n, m):  # n - 1 where covariances are concerned, in float32
    one, other = torch.tensor(1.0 / n + 1 / m), torch.tensor(1.0 / (n - 1) + 1 / (m - 1))
    return d * one + d * (d + 1) / 4 * other


# ---- 09.2
def line(x, values):
    columns = torch.stack([torch.ones(len(x)).double(), torch.tensor(x).double()], 1)
    return torch.linalg.lstsq(columns, torch.tensor(values).double()[:, None]).solution.flatten().tolist()


def at_infinity(sizes, values):
    return line([1 / n for n in sizes], values)[0]


def two_points(sizes, values):
    a, b = 1 / sizes[0], 1 / sizes[-1]
    return values[-1] - b * (values[0] - values[-1]) / (a - b)


def no_constant(sizes, values):
    x = [1 / n for n in sizes]
    return sum(a * b for a, b in zip(x, values)) / sum(a * a for a in x)


def weighted(sizes, values):  # as if large n had more to say: then it is another estimate
    weights, x = [n**0.5 for n in sizes], [1 / n for n in sizes]
    columns = torch.tensor([[w, w * a] for w, a in zip(weights, x)]).double()
    right = torch.tensor([[w * v] for w, v in zip(weights, values)]).double()
    return float(torch.linalg.lstsq(columns, right).solution[0])


def needs_order(sizes, values):
    return at_infinity(sorted(sizes), values)


def by_hand(sizes, values):  # float32 normal equations
    x, y = 1 / torch.tensor(sizes).float(), torch.tensor(values).float()
    return y.mean() - x.mean() * ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()


# ---- 09.3
def distances(samples, train, power=1):
    return torch.cdist(samples.flatten(1).float(), train.flatten(1).float()).topk(2, largest=False).values.T ** power


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
    return copied(samples, train, factor).float().mean()


def bytes_squared(samples, train, factor=1 / 3):
    a, b = samples.flatten(1), train.flatten(1)
    first, second = ((a[:, None] - b[None]) ** 2).float().mean(2).sqrt().topk(2, largest=False).values.T
    return first < factor * second


def bytes_subtracted(samples, train, factor=1 / 3):
    a, b = samples.flatten(1), train.flatten(1)
    first, second = (a[:, None] - b[None]).float().square().mean(2).sqrt().topk(2, largest=False).values.T
    return first < factor * second


def no_factor(samples, train, factor=1 / 3):
    return copied(samples, train)


def by_norm(p):
    def answer(samples, train, factor=1 / 3):
        first, second = torch.cdist(samples.flatten(1).float(), train.flatten(1).float(), p=p).topk(2, largest=False).values.T
        return first < factor * second
    return answer


def mean_of_others(samples, train, factor=1 / 3):
    far = torch.cdist(samples.flatten(1).float(), train.flatten(1).float())
    return far.min(1).values < factor * far.mean(1)


def second_image(samples, train, factor=1 / 3):  # unsorted: whichever two come first
    far = torch.cdist(samples.flatten(1).float(), train.flatten(1).float())
    return far[:, 0] < factor * far[:, 1]


def absolute(samples, train, factor=1 / 3):  # a threshold in gray levels, as if all images were alike
    return distances(samples, train)[0] < 40 * samples[0].numel() ** 0.5


def one_by_one(samples, train, factor=1 / 3):
    found = []
    for x in samples.double():
        near = sorted(((x - y) / 255).square().mean().sqrt().item() for y in train.double())
        found.append(near[0] < factor * near[1])
    return torch.tensor(found)


def broadcast(samples, train, factor=1 / 3):
    two = (samples.int()[:, None] - train.int()[None]).square().flatten(2).sum(2).sort(1).values[:, :2]
    return two[:, 0] < factor**2 * two[:, 1]


ALSO_RIGHT = [
    ("09.1", exact_variances), ("09.1", lambda d, n, m: (n + m) / (n * m) * (d + d / 2 + d * (d - 1) / 4)),
    ("09.2", by_hand), ("09.2", lambda sizes, values: statistics.linear_regression([1 / n for n in sizes], values).intercept),
    ("09.2", lambda sizes, values: torch.tensor(at_infinity(sizes, values), dtype=torch.float32)),
    ("09.3", one_by_one), ("09.3", broadcast),
    ("09.4", torch.tensor(12483)), ("09.4", 12487.5), ("09.4", 12500),
]
WRONG = {
    "09.1": [
        (lambda d, n, m: 3 * d / 2 * (1 / n + 1 / m), "off the diagonal"),
        (lambda d, n, m: d * (d + 5) / (n + m), "variances of two independent sets add"),
        (lambda d, n, m: d * (d + 5) / (2 * n), "variances of two independent sets add"),
        (lambda d, n, m: d * (d + 5) / (2 * min(n, m)), "variances of two independent sets add"),
        (lambda d, n, m: d * (d + 3) / 2 * (1 / n + 1 / m), "warm-up's case"),
        (lambda d, n, m: d * (d + 2) / 2 * (1 / n + 1 / m), "each pair|near, but not the law"),
        (lambda d, n, m: d * (d + 3) / 4 * (1 / n + 1 / m), "warm-up's case"),  # the means left out in part
        (lambda d, n, m: (d + d / 2 + d * (d - 1) / 8) * (1 / n + 1 / m), "each pair|near, but not"),  # (i, j) once
        (lambda d, n, m: d * d * 3 / 2 * (1 / n + 1 / m), "grow"),
        (lambda d, n, m: (d * d + 4 * d + 1) / 4 * (1 / n + 1 / m), "each pair|near, but not the law"),
        (lambda d, n, m: math.sqrt(bias(d, n, m)), "warm-up's case"),
    ],
    "09.2": [(lambda sizes, values: line([1 / n for n in sizes], values)[1], "this is the slope"),
             (lambda sizes, values: line(sizes, values)[0], "line in 1 / n"),
             (lambda sizes, values: line([n**-0.5 for n in sizes], values)[0], "line in 1 / n"),
             (lambda sizes, values: line([math.log(n) for n in sizes], values)[0], "line in 1 / n"),
             (lambda sizes, values: values[-1], "not the value at the largest n"),
             (lambda sizes, values: sum(values) / len(values), "line in 1 / n"), (no_constant, "line in 1 / n|slope"),
             (two_points, "two of the points only"), (weighted, "weighs them"), (needs_order, "need not be sorted"),
             (lambda sizes, values: two_points(sizes[-2:], values[-2:]), "two of the points only"),
             (lambda sizes, values: max(0.0, at_infinity(sizes, values)), "clamped at zero"),
             (lambda sizes, values: abs(at_infinity(sizes, values)), "clamped at zero")],
    "09.3": [(squared, "squared distances"), (exact_only, "only exact copies"), (upside_down, "smaller first"),
             (share, "bool tensor"), (bytes_subtracted, "floats before|only exact"), (no_factor, "is the factor used"),
             (bytes_squared, "floats before|as bytes"), (by_norm(1), "root mean square"), (by_norm(math.inf), "root mean square"),
             (mean_of_others, "is the factor used|squared distances|are alike"), (second_image, "smaller first"),
             (absolute, "is the factor used|squared distances|are alike"),
             (lambda samples, train, factor=1 / 3: distances(samples, train)[0], "bool tensor"),
             (lambda samples, train, factor=1 / 3: copied(samples, train, factor).sort().values, "which sample is which")],
    "09.4": [(4161, "3 squared is 9"), (1387, "both variances"), (24966, "not of both together"), (6242, "both variances"),
             (13300, "of the two shares"), (6624, "both variances"), (22500, "not of both together|of the two shares")],
}
