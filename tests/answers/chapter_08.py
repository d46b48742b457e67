"""Right and wrong answers to the exercises of chapter 8, the complete model."""

import torch


def norm(tensors):
    return torch.cat([g.flatten() for g in tensors]).norm()


def unscale_and_clip(gradients, scale, limit):
    true = [g / scale for g in gradients]
    factor = min(1.0, float(limit / norm(true)))
    return [g * factor for g in true]


def clip_first(gradients, scale, limit):
    factor = min(1.0, float(limit / norm(gradients)))
    return [g * factor / scale for g in gradients]


def clip_each(gradients, scale, limit):
    return [g / scale * min(1.0, float(limit / norm([g / scale]))) for g in gradients]


def clip_in_place(gradients, scale, limit):
    for g in gradients:
        g /= scale
    return unscale_and_clip(gradients, 1.0, limit)


def order(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch_index(step, batch, n, seed):
    epoch, place = divmod(step, n // batch)
    return order(n, seed * 100_003 + epoch)[place * batch : (place + 1) * batch]


def replaced(step, batch, n, seed):
    return torch.randint(n, (batch,), generator=torch.Generator().manual_seed(seed * 7 + step))


def one_order(step, batch, n, seed):
    return batch_index(step % (n // batch), batch, n, seed)


def no_seed(step, batch, n, seed):
    return batch_index(step, batch, n, 0)


def seed_plus_epoch(step, batch, n, seed):
    epoch, place = divmod(step, n // batch)
    return order(n, seed + epoch)[place * batch : (place + 1) * batch]


def seconds(operations, steps, batch, peak=65e12, efficiency=0.2):
    return 3 * operations * steps * batch / (peak * efficiency)


SOLUTIONS = {"08.1": unscale_and_clip, "08.2": batch_index, "08.3": seconds}
WRONG = {
    "08.1": [(clip_first, "before the scale"), (clip_each, "before the scale|together"), (clip_in_place, "in place")],
    "08.2": [(replaced, "replacement"), (one_order, "depend on the epoch"), (no_seed, "seed"),
             (seed_plus_epoch, "seed + epoch")],
    "08.3": [(lambda *a, **k: seconds(*a, **k) / 3, "factor 3"),
             (lambda o, s, b, peak=65e12, efficiency=0.2: 3 * o * s * b / peak * efficiency, "efficiency"),
             (lambda o, s, b, **k: seconds(o, s, 1, **k), "seconds =")],
}
