"""Checks of the exercises of chapter 8: the complete model."""

import torch

from ..checks import close, exercise, integer, noise, uniform


def _number(low: float, high: float, seed: int) -> float:
    return float(uniform(low, high, 1, seed=seed))


def _norm(tensors) -> float:
    return float(torch.cat([g.flatten().double() for g in tensors]).norm())


@exercise("08.1", "unscale, then clip", points=1)
def _(unscale_and_clip):
    scale = 2.0 ** integer(4, 12, seed=1)
    kept = [scale * noise(3, 4, seed=2), scale * noise(5, seed=3), 3 * scale * noise(2, 1, 3, seed=4)]
    gradients, true = [g.clone() for g in kept], _norm(kept) / scale
    got = list(unscale_and_clip(gradients, scale, 1e9))
    yield ("one gradient comes back for each that goes in, in its shape",
           [getattr(g, "shape", None) for g in got] == [k.shape for k in kept],
           "return a list of as many tensors as were given, in their order")
    yield "the given gradients are left alone", all(torch.equal(g, k) for g, k in zip(gradients, kept)), (
        "work on copies: the caller's tensors were changed in place")
    yield "a far limit changes nothing but the scale", all(close(g, k / scale) for g, k in zip(got, kept)), (
        "multiplied by the scale instead of divided?" if close(got[0], kept[0] * scale) else
        "what is small enough is not to be enlarged up to the limit" if _norm(got) > 1e5 * true else
        "divide by the scale, once")
    got = list(unscale_and_clip(gradients, scale, 2 * true))
    yield "the limit is one for the true gradients", all(close(g, k / scale) for g, k in zip(got, kept)), (
        "the norm is the root of the sum of all squares" if close(_norm(got), 2.0, 1e-3) else
        "their norm was below the limit, that of the scaled ones above: clipped before the scale was divided out?")
    limit = true * _number(0.05, 0.15, seed=5)
    got = list(unscale_and_clip(gradients, scale, limit))
    yield "all gradients shrink by one factor", all(
        close(g * (_norm(kept) / _norm(got)), k, rtol=1e-3, atol=1e-3 * scale) for g, k in zip(got, kept)), (
        "the norm is that of all gradients together, not of each tensor, and no number is cut by itself")
    yield "above the limit, the common norm is the limit", close(_norm(got), limit, rtol=1e-3), (
        "the norm is the root of the sum of all squares: one factor, limit / norm, for all numbers of all tensors")
    zeros = list(unscale_and_clip([torch.zeros(3), torch.zeros(2, 2)], scale, limit))
    yield "gradients that are zero stay zero", all(close(z, 0.0) for z in zeros), (
        "0 / 0: the norm may be zero; PyTorch divides by norm + 1e-6")


@exercise("08.2", "the batch of a step", points=2)
def _(my_batch_index):
    batch, steps, seed = integer(8, 12, seed=1), integer(3, 5, seed=2), integer(1, 1000, seed=3)
    n = batch * steps

    def order(number: int, seed: int):
        """The images of a whole epoch, as the answer gives them."""
        return torch.cat([torch.as_tensor(my_batch_index(number * steps + i, batch, n, seed)) for i in range(steps)])

    state = torch.get_rng_state()
    one = torch.as_tensor(my_batch_index(0, batch, n, seed))
    yield ("a batch is (batch,) numbers of type int64", tuple(one.shape) == (batch,) and one.dtype == torch.int64,
           f"got {tuple(one.shape)}, {one.dtype}, where batch is {batch}")
    yield "everybody else's random numbers are left alone", torch.equal(state, torch.get_rng_state()), (
        "the global generator was reseeded or used, so noise drawn after it repeats: torch.Generator().manual_seed(...) makes one of your own")
    first, second, other = order(0, seed), order(1, seed), order(0, seed + 1)
    yield "an epoch sees every image once", sorted(first.tolist()) == list(range(n)), (
        "drawn with replacement, or each batch from an order of its own?")
    yield "the next epoch too", sorted(second.tolist()) == list(range(n)), (
        "the place in the epoch is step % (n // batch)")
    yield "in another order", not torch.equal(first, second), "the order must depend on the epoch"
    yield "in a random order", all(int((o.diff() % n == 1).sum()) <= n // 2 for o in (first, second, other)), (
        "images that are neighbors in the file follow each other: use torch.randperm")
    again = torch.as_tensor(my_batch_index(2, batch, n, seed))
    yield "the same step gives the same batch", torch.equal(again, first[2 * batch : 3 * batch]), (
        "the answer depends on what was called before: use a generator made inside the function")
    yield "another seed, another order", not torch.equal(first, other), "the seed is not used"
    yield "the next seed does not begin with this seed's second epoch", not torch.equal(second, other), (
        "seed + epoch is the same number for both: keep the two apart, as in seed * 1_000_003 + epoch")
    starts = [my_batch_index(epoch * steps, batch, n, s) for s in (seed - 1, seed, seed + 1) for epoch in range(24)]
    known = {tuple(torch.as_tensor(start).tolist()) for start in starts}
    yield "24 epochs of three seeds are 72 orders", len(known) == len(starts), (
        f"only {len(known)} differ: (seed, epoch) and another pair give one number. Multiply the seed by more than any "
        "epoch, as in seed * 1_000_003 + epoch")


@exercise("08.3", "how long would it take?", points=2)
def _(training_seconds):
    work, steps, batch = 1e6 * integer(1, 900, seed=1), integer(100, 9000, seed=2), integer(8, 256, seed=3)
    peak, share = 1e12 * integer(1, 99, seed=4), _number(0.1, 0.45, seed=5)
    right = 3 * work * steps * batch / (peak * share)
    ratio = float(training_seconds(work, steps, batch, peak=peak, efficiency=share)) / right
    yield f"{steps} steps of {batch}, {work:.0e} operations, at {share:.2f} of {peak:.0e} a second", close(ratio, 1), (
        "forgot the factor 3: one pass forward, and two passes' worth for the gradients" if close(ratio, 1 / 3) else
        "forgot the forward pass: it costs one, the gradients two more" if close(ratio, 2 / 3) else
        "the factor is 3 in all, not 3 on top of the first" if close(ratio, 4 / 3) else
        "divide by the efficiency: at a lower share of the peak it takes longer" if close(ratio, share**2) else
        "the share of the peak is not used" if close(ratio, share) else
        "operations are per image: multiply by the batch" if close(ratio * batch, 1.0) else
        "that is the time of one step: multiply by the steps" if close(ratio * steps, 1.0) else
        "the answer is in seconds" if close(ratio * 60, 1.0) or close(ratio * 3600, 1.0) else
        "seconds = 3 * operations * steps * batch / (peak * efficiency)")
    ratio = float(training_seconds(work, steps, batch)) * 65e12 * 0.2 / (right * peak * share)
    yield "the defaults are a T4 at a fifth of its peak", close(ratio, 1.0), (
        "peak and efficiency keep their defaults, and are used")


@exercise("08.7", "what the latent saves, counted", points=2)
def _(savings):
    found = [float(ratio) for ratio in savings(512, 512, 3, 8, 4)]
    yield "three ratios come back", len(found) == 3, "values, work of a convolution, attention scores: in this order"
    yield "they say how many times less the latent costs", found[0] > 1, "pixels over latents, not the reverse"
    yield "512 x 512 x 3 values are 48 times as many as 64 x 64 x 4", close(found[0], 48.0), (
        "64 is the ratio of the positions; the channels grow from 3 to 4" if close(found[0], 64.0) else
        "f divides the height and the width" if close(found[0], 6.0) else
        "values = height * width * channels, before and after")
    yield "a convolution inside the network works 64 times less", close(found[1], 64.0), (
        "inside, the widths are the same for both: only the number of positions counts, not the channels of the image")
    yield "attention holds 4096 times fewer scores", close(found[2], 4096.0), (
        "a score for each pair of positions: the square of the ratio of positions, whatever the channels")
    for i in range(4):
        f = 2 ** integer(2, 4, seed=10 * i)
        colors, channels = integer(1, 3, seed=10 * i + 1), integer(5, 9, seed=10 * i + 2)
        height, width = (f * integer(3, 40, seed=10 * i + k) for k in (3, 4))
        found = [float(ratio) for ratio in savings(height, width, colors, f, channels)]
        yield f"{height} x {width} x {colors} at f = {f} with {channels} channels: the values", close(
            found[0], f**2 * colors / channels), "the channels are those of the image and of the latent, as given"
        yield "... and the two costs, which do not depend on the size of the image", close(
            found[1:], torch.tensor([f**2, f**4])), "f in height and f in width: f**2 positions, f**4 pairs"
