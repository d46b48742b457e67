"""Checks of the exercises of chapter 10: perceptual compression."""

from math import log, log2

import torch
from torch import Tensor

from ..checks import close, exercise, generator, integer, noise, uniform


@exercise("10.1", "how far a patch reaches", points=2)
def _(receptive_field):
    k, s = integer(3, 7), integer(2, 3, seed=1)
    yield "one convolution sees its kernel", receptive_field([(k, 1)]) == k and receptive_field([(k, s)]) == k, (
        "start from 1 pixel, and add (kernel - 1) times the distance between neighbors so far; "
        "a layer's own stride comes after")
    kernels = [integer(2, 7, seed=2 + i) for i in range(3)]
    yield f"kernels of {', '.join(map(str, kernels))}, all of stride 1, see {sum(kernels) - 2}", (
        receptive_field([(each, 1) for each in kernels]) == sum(kernels) - 2), (
        "the fields overlap: do not multiply or add the kernels, each adds one less than its width")
    yield f"({k}, {s}), ({k}, 1) sees {k + (k - 1) * s}", receptive_field([(k, s), (k, 1)]) == k + (k - 1) * s, (
        f"behind a stride of {s}, neighbors are {s} pixels apart: the strides so far multiply what a kernel adds")
    yield "the discriminator sees 18", receptive_field([(4, 2), (4, 2), (3, 1), (1, 1)]) == 18, (
        "strides multiply: after two of stride 2 neighbors are 4 pixels apart")
    field = 1 + (k - 1) * (s**5 - 1) // (s - 1)  # the jumps 1, s, s^2, ... add up to a geometric series
    yield f"five of ({k}, {s}) see {field}", receptive_field([(k, s)] * 5) == field, (
        f"the distance between neighbors is multiplied by {s} with every layer")
    strides = [integer(1, 3, seed=10 + i) for i in range(6)]
    layers = [(stride + integer(0, 3, seed=20 + i), stride) for i, stride in enumerate(strides)]  # no pixel is left out
    field, told = 1, list(layers)
    for kernel, stride in reversed(layers):  # `field` outputs of a layer see so many of its inputs
        field = (field - 1) * stride + kernel
    yield f"{', '.join(map(str, layers))} see {field}", receptive_field(told) == field, (
        "a kernel adds (kernel - 1) times the product of all strides before it, in the order of the layers")
    yield "the list is left as it was", told == layers, "it was changed in place"


@exercise("10.2", "straight through rounding", points=2)
def _(round_through):
    b, c = integer(2, 4), integer(3, 6, seed=1)
    start = float(uniform(2, 4, seed=2)) * noise(b, c, 4, 5, seed=3)
    start = torch.where((start - start.round()).abs() > 0.49, start.round() + 0.3, start)  # nothing near a tie
    z = start.clone().requires_grad_(True)
    out = round_through(z)
    yield "forward, it rounds", close(out.detach(), start.round()), (
        "this rounds down, or towards zero: to the nearest is asked for"
        if close(out.detach(), start.floor()) or close(out.detach(), start.trunc())
        else "the value must be round(z) itself, with nothing added")
    yield "the gradient reaches z", out.requires_grad, (
        "detached as a whole: nothing is left for the gradient to pass through")
    weights = noise(b, c, 4, 5, seed=4)
    (out * weights).sum().backward()
    grad = z.grad if z.grad is not None else torch.zeros_like(z)
    yield "its gradient is that of the identity", close(grad, weights), (
        "the gradient is 0 everywhere: torch.round has none, nor has z - z, unless one of the two is detached"
        if not grad.abs().any() else
        "the sign is wrong: the gradient passes through the -z, which has to be detached" if close(grad, -weights) else
        "z is counted more than once, or only in part: it has to stand once outside of what is detached")
    double = start.flatten().double()
    out = round_through(double.clone())
    yield "also in float64, in one dimension", close(out, double.round()) and out.dtype == torch.float64, (
        "the dtype is to stay as it was")
    yield "z itself is left alone", torch.equal(z.detach(), start), "z was changed in place"


@exercise("10.3", "how many bits", points=1)
def _(compression):
    bits, side = integer(3, 12), integer(20, 40, seed=1)
    got = compression(2**bits, side, side, side, side)
    yield f"{2**bits} codes, {bits} bits, at each pixel: a ratio of {8 / bits:.3f}", close(got, 8 / bits), (
        "log2, not the natural logarithm: the answer is to be in bits"
        if close(got, 8 / bits / log(2)) or close(got, 1 / bits / log(2)) else
        "a pixel of the image has 8 bits" if close(got, 1 / bits) else
        "the fraction is upside down" if close(got, bits / 8) else
        "use height and width" if close(got, 6272 / (side * side * bits)) else "bits of the image / bits of the latent")
    bits, h, w = integer(5, 12, seed=2), integer(3, 6, seed=3), integer(7, 10, seed=4)
    yield f"{2**bits} codes at {h} x {w}: 6272 bits to {h * w * bits}", (
        close(compression(2**bits, h, w), 6272 / (h * w * bits))), (
        "bits of the image / bits of the latent, and a latent has places * log2(codes) of them")
    codes = 3 * 2 ** integer(3, 9, seed=5)  # log2 of it has a part of 0.585 behind the point
    yield f"{codes} codes, which is no power of two", close(compression(codes, h, w), 6272 / (h * w * log2(codes))), (
        f"log2({codes}) is no whole number: all {h * w} places together are one of {codes}^{h * w} things, "
        "so nothing is rounded for each of them")
    height, width = integer(30, 60, seed=7), integer(61, 90, seed=8)
    yield "the image's size counts", (
        close(compression(2**bits, h, w, height=height, width=width), 8 * height * width / (h * w * bits))), (
        "use height and width")


def _patches(b: int, h: int, w: int, f: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (b, 1, h * f, w * f) made of f x f patches, and the ranks of the patches by variance (b, 1, h, w).

    The patches have a mean of 0 and standard deviations in a shuffled geometric series from 0.01 to 0.2, so that
    those of neighboring rank differ by 8 % or more in variance (up to 72 patches): much more than any rounding.
    """
    n = b * h * w
    pattern = noise(n, f * f, seed=seed)
    pattern = pattern - pattern.mean(1, keepdim=True)
    pattern = pattern / pattern.square().mean(1, keepdim=True).sqrt()
    rank = torch.randperm(n, generator=generator(seed + 1))
    patches = (0.01 * 20 ** (rank / (n - 1)))[:, None] * pattern
    return patches.view(b, 1, h, w, f, f).transpose(3, 4).reshape(b, 1, h * f, w * f), rank.view(b, 1, h, w)


@exercise("10.6", "a gate at the resolution of the latent", points=3)
def _(gate):
    f, b, h, w = 4, 3, integer(3, 4), integer(5, 6, seed=1)
    n = b * h * w  # 45 to 72
    keep = integer(h * w, n // 2 - 3, seed=2)
    x, rank = _patches(b, h, w, f, 3)
    kept = x.clone()
    mask = gate(x, keep / n, f)
    yield f"images {tuple(x.shape)} with f = {f} have a mask {(b, 1, h, w)}", (
        isinstance(mask, Tensor) and mask.shape == (b, 1, h, w)), (
        "one value for each place of the latent, to which a patch of f x f pixels belongs")
    yield "of floats 0 and 1", mask.is_floating_point() and bool(((mask == 0) | (mask == 1)).all()), (
        "a place is kept (1.0) or not (0.0): no bool, and nothing between the two")
    yield f"{keep} of the {n} places of the batch are kept", abs(float(mask.sum()) - keep) < 1.5, (
        "budget is the share that is kept, not the one that is dropped"
        if abs(float(mask.sum()) + keep - n) < 1.5 else "the share kept of the whole batch has to be the budget")
    inside, outside = rank[mask == 1], rank[mask == 0]
    yield "they are those of the largest variance in the batch", int(inside.min()) > int(outside.max()), (
        "the least varied places were kept" if int(inside.max()) < int(outside.min()) else
        "the same share for every image, but the budget is one of the whole batch"
        if len(mask.sum((1, 2, 3)).unique()) == 1 else
        "not the variance inside of each f x f patch: where do the rows and columns of the image go?")
    low = float(uniform(0.3, 0.5, seed=5))
    least = (rank == 0).flatten(1).any(1).float().view(b, 1, 1, 1)  # 1 for the image with the least varied patch
    moved = gate(x + low * least, keep / n, f)
    yield "brightness does not count: a constant added to one of the images changes nothing", (
        int(rank[moved == 1].min()) > int(rank[moved == 0].max())), (
        "in this measure a bright plain patch is large, as in the mean square: the mean has to be taken away first")
    plain = torch.full_like(x, low)
    total = float(gate(plain, keep / n, f).sum())
    yield "images without any variance keep the budget as well", abs(total - keep) < 1.5, (
        "all patches are tied here: a threshold keeps all of them or none, so count instead")
    plain[1] = x[1]
    yield "one varied image among plain ones gets it all", float(gate(plain, h * w / n, f)[1].sum()) > h * w - 1.5, (
        "the budget is one of the whole batch: what plain images do not need goes to the others")
    none, all_ = (float(gate(x, end, f).mean()) for end in (0.0, 1.0))
    yield "a budget of 0 keeps nothing, and 1 everything", (none, all_) == (0, 1), f"it keeps {none:.2f} and {all_:.2f}"
    higher, rank = _patches(2, 6, 4, 2, 7)
    mask = gate(higher, 0.25, 2)
    yield "also with f = 2, and images that are higher than wide", (
        mask.shape == rank.shape and torch.equal(mask == 1, rank >= 36)), "f is an argument: is 4 typed in somewhere?"
    yield "the images are left as they were", torch.equal(x, kept), "they were changed in place"
