"""Wrong answers to the exercises of chapter 8, the complete model, and other right ones."""

import random

import torch
from coursework import solution

unscale_and_clip, batch_index, seconds, savings = (solution(number) for number in ("08.1", "08.2", "08.3", "08.7"))


# 08.1

def norm(tensors):
    return torch.cat([g.flatten() for g in tensors]).norm()


def clip_with(measure):
    """Another measure in place of the common norm."""
    def answer(gradients, scale, limit):
        true = [g / scale for g in gradients]
        return [g * min(1.0, float(limit / (measure(true) + 1e-6))) for g in true]
    return answer


def clip_first(gradients, scale, limit):
    factor = min(1.0, float(limit / norm(gradients)))
    return [g * factor / scale for g in gradients]


def clip_each(gradients, scale, limit):
    return [g / scale * min(1.0, float(limit / norm([g / scale]))) for g in gradients]


def clip_values(gradients, scale, limit):
    return [(g / scale).clamp(-limit, limit) for g in gradients]


def clip_in_place(gradients, scale, limit):
    for g in gradients:
        g /= scale
    return unscale_and_clip(gradients, 1.0, limit)


def always_to_the_limit(gradients, scale, limit):
    true = [g / scale for g in gradients]
    return [g * limit / norm(true) for g in true]


def zeros_over_zero(gradients, scale, limit):
    total = norm(gradients) / scale
    return [g / scale * torch.minimum(torch.ones(()), limit * total / total**2) for g in gradients]


def as_pytorch_does(gradients, scale, limit):
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients):
        p.grad = g / scale
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    return [p.grad for p in parameters]


def by_sum_of_squares(gradients, scale, limit):
    total = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5 / scale
    factor = limit / total if total > limit else 1.0
    return tuple(g * (factor / scale) for g in gradients)


# 08.2

def order(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def keyed(key):
    """The solution with another number in place of (seed, epoch)."""
    def answer(step, batch, n, seed):
        epoch, place = divmod(step, n // batch)
        return order(n, key(seed, epoch))[place * batch : (place + 1) * batch]
    return answer


def with_random(step, batch, n, seed):
    images = list(range(n))
    random.Random(f"{seed}, epoch {step * batch // n}").shuffle(images)
    begin = step * batch % n
    return torch.tensor(images[begin : begin + batch])


def one_stream(step, batch, n, seed):
    """All orders of a seed from one generator, drawn again in every call."""
    generator, epoch = torch.Generator().manual_seed(seed), step // (n // batch)
    for _ in range(epoch + 1):
        images = torch.randperm(n, generator=generator)
    return images[step % (n // batch) * batch :][:batch]


def replaced(step, batch, n, seed):
    return torch.randint(n, (batch,), generator=torch.Generator().manual_seed(seed * 7 + step))


def each_its_own_order(step, batch, n, seed):
    return order(n, seed * 1_000_003 + step)[:batch]


def one_order(step, batch, n, seed):
    return batch_index(step % (n // batch), batch, n, seed)


def no_seed(step, batch, n, seed):
    return batch_index(step, batch, n, 0)


def not_shuffled(step, batch, n, seed):
    return (torch.arange(batch) + step * batch + seed + step // (n // batch)) % n


def reseeded(step, batch, n, seed):
    torch.manual_seed(seed * 1_000_003 + step // (n // batch))
    return torch.randperm(n)[step % (n // batch) * batch :][:batch]


def global_state(step, batch, n, seed):
    return torch.randperm(n)[step % (n // batch) * batch :][:batch]


def place_not_wrapped(step, batch, n, seed):
    return order(n, seed * 1_000_003 + step // (n // batch))[step * batch : (step + 1) * batch]


ALSO_RIGHT = [
    ("08.1", as_pytorch_does), ("08.1", by_sum_of_squares), ("08.1", clip_with(norm)),
    ("08.2", with_random), ("08.2", one_stream), ("08.2", keyed(lambda seed, epoch: seed * 1000 + epoch)),
    ("08.2", keyed(lambda seed, epoch: hash((seed, epoch)))),
    ("08.3", lambda operations, steps, batch, peak=65e12, efficiency=0.2:
        torch.tensor((operations + 2 * operations) * steps * batch / peak / efficiency, dtype=torch.float32)),
    ("08.7", lambda height, width, colors, f, channels: torch.tensor(
        [height * width * colors / (height // f * (width // f) * channels), f * f, f**4], dtype=torch.float32)),
    ("08.7", lambda height, width, colors, f, channels: [
        colors * f**2 / channels, (height * width) / ((height // f) * (width // f)),
        (height * width) ** 2 // ((height // f) * (width // f)) ** 2]),
]
WRONG = {
    "08.1": [
        (clip_first, "before the scale"), (clip_each, "not of each tensor"), (clip_in_place, "in place"),
        (clip_values, "cut by itself"), (always_to_the_limit, "not to be enlarged"),
        (lambda g, scale, limit: unscale_and_clip(g, 1 / scale, limit), "instead of divided"),
        (lambda g, scale, limit: unscale_and_clip(g, scale, 1e9), "one factor, limit / norm"),
        (lambda g, scale, limit: g, "divide by the scale"),
        (lambda g, scale, limit: unscale_and_clip(g, scale, limit)[:1], "as many tensors"),
        (lambda g, scale, limit: [torch.cat([x.flatten() for x in g]) / scale], "as many tensors"),
        (clip_with(lambda g: max(float(x.abs().max()) for x in g)), "root of the sum"),
        (clip_with(lambda g: sum(float(norm([x])) for x in g)), "root of the sum|before the scale"),
        (clip_with(lambda g: float(norm(g)) ** 2), "root of the sum|before the scale"),
        (zeros_over_zero, "0 / 0"),
    ],
    "08.2": [
        (replaced, "replacement"), (each_its_own_order, "order of its own"), (one_order, "depend on the epoch"),
        (no_seed, "seed is not used"), (not_shuffled, "torch.randperm"), (global_state, "global generator"), (reseeded, "global generator"),
        (place_not_wrapped, "step % (n // batch)"), (keyed(lambda seed, epoch: seed + epoch), "seed + epoch"),
        (keyed(lambda seed, epoch: seed * epoch), "seed is not used"),
        (keyed(lambda seed, epoch: seed * 10 + epoch), "more than any epoch"),
        (keyed(lambda seed, epoch: seed - epoch), "more than any epoch"),
        (keyed(lambda seed, epoch: seed ^ epoch), "more than any epoch|seed + epoch"),
        (lambda *args: batch_index(*args).float(), "int64"), (lambda *args: batch_index(*args)[:-1], "where batch is"),
    ],
    "08.3": [
        (lambda *a, **k: seconds(*a, **k) / 3, "factor 3"),
        (lambda *a, **k: seconds(*a, **k) * 2 / 3, "forgot the forward pass"),
        (lambda *a, **k: seconds(*a, **k) * 4 / 3, "3 in all"),
        (lambda o, s, b, peak=65e12, efficiency=0.2: 3 * o * s * b / peak * efficiency, "lower share"),
        (lambda o, s, b, peak=65e12, efficiency=0.2: 3 * o * s * b / peak, "is not used"),
        (lambda o, s, b, **k: seconds(o, s, 1, **k), "by the batch"),
        (lambda o, s, b, **k: seconds(o, 1, b, **k), "by the steps"),
        (lambda *a, **k: seconds(*a, **k) / 3600, "in seconds"),
        (lambda o, s, b, peak=65e12, efficiency=0.2: 1 / seconds(o, s, b, peak, efficiency), "seconds ="),
        (lambda o, s, b, peak=6.5e12, efficiency=0.2: seconds(o, s, b, peak, efficiency), "keep their defaults"),
    ],
    "08.7": [
        (lambda h, w, colors, f, channels: (48.0, 64.0, 4096.0), "as given"),
        (lambda h, w, colors, f, channels: (f**2, f**2, f**4), "64 is the ratio of the positions"),
        (lambda h, w, colors, f, channels: (f * colors / channels, f, f**2), "height and the width"),
        (lambda h, w, colors, f, channels: (channels / colors / f**2, 1 / f**2, 1 / f**4), "not the reverse"),
        (lambda h, w, colors, f, channels: (f**2 * colors / channels,) * 2 + (f**4,), "widths are the same"),
        (lambda h, w, colors, f, channels: (f**2 * colors / channels, f**2, f**2), "square of the ratio"),
        (lambda h, w, colors, f, channels: (f**2 * colors / channels, f**2, f**4 * colors / channels), "square of the"),
        (lambda h, w, colors, f, channels: (f**2 * channels / colors, f**2, f**4), "values ="),
        (lambda h, w, colors, f, channels: (f**2 * 3 / 4, f**2, f**4), "as given"),
        (lambda h, w, colors, f, channels: (f**2 * colors / channels, h * w / 4096, (h * w / 4096) ** 2), "f**4"),
        (lambda h, w, colors, f, channels: (f**2 * colors / channels, f**2), "three ratios"),
    ],
}
