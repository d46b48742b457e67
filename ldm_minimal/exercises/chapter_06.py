"""Checks of the exercises of chapter 6: the diffusion transformer."""

import torch
from torch.nn.functional import conv2d, linear, pixel_unshuffle

from ..checks import close, exercise, integer, noise


@exercise("06.1", "a patch embedding is a convolution", points=1)
def _(as_convolution):
    for p in (2, 3, 1):
        C, D = integer(2, 4, seed=10 + p), integer(5, 8, seed=20 + p)
        weight, zt = noise(D, C * p * p, seed=p), noise(2, C, 2 * p, 3 * p, seed=3 + p)
        kept, kernel = weight.clone(), as_convolution(weight, p)
        shape = tuple(kernel.shape)
        yield f"the kernel of {C} channels and patch {p} has shape {(D, C, p, p)}", shape == (D, C, p, p), (
            f"its shape is {shape}: what conv2d takes is (out, in, height, width)")
        wanted = pixel_unshuffle(zt, p).flatten(2).transpose(1, 2) @ weight.T
        out, turned = (conv2d(zt, k, stride=p).flatten(2).transpose(1, 2) for k in (kernel, kernel.mT))
        yield f"patch {p}: the convolution with stride {p} gives the tokens of the linear layer", close(out, wanted), (
            "rows and columns of a patch are swapped" if close(turned, wanted) else
            "the values of a token are ordered (channel, row, column), as pixel_unshuffle writes them")
        yield f"patch {p}: the weight is as it was", torch.equal(weight, kept), "the weight was changed in place"


@exercise("06.2", "fold the modulation away", points=2)
def _(fold):
    n = integer(4, 6)
    for out, D in ((n, n), (n, 3)):  # a square layer first: there a wrong axis gives wrong numbers, not an error
        weight, bias, shift, scale = (noise(*shape, seed=i) for i, shape in enumerate(((out, D), (out,), (D,), (D,))))
        given = [weight, bias, shift, scale]
        kept, folded = [tensor.clone() for tensor in given], fold(*given)
        yield f"{D} to {out}: two come back", isinstance(folded, (tuple, list)) and len(folded) == 2, (
            "return the weight and the bias")
        W, b = folded
        yield f"{D} to {out}: the layer and its modulation are as they were", all(map(torch.equal, given, kept)), (
            "an input was changed in place")
        right = W.shape == (out, D) and b.shape == (out,)
        yield f"{D} to {out}: weight and bias have the shapes of the layer", right, (
            f"they are {tuple(W.shape)} and {tuple(b.shape)}, and should be {(out, D)} and {(out,)}")
        yield f"{D} to {out}: what multiplies x is right", close(W, weight + weight * scale), (
            "the 1 in 1 + scale is missing: with scale zero the layer must stay what it is" if close(W, weight * scale)
            else "scale multiplies inputs: column j of the weight is multiplied by 1 + scale[j]")
        yield f"{D} to {out}: what remains at x = 0 is right", close(b, weight @ shift + bias), (
            "the shift is not scaled: the bias gains W shift, with the weight as it was" if close(b, W @ shift + bias)
            else "the bias of the layer itself is lost" if close(b, weight @ shift) else
            "the shift goes through the layer, too: the bias gains W shift")
        x = noise(7, D, seed=4)
        yield f"{D} to {out}: modulation and layer in one give the same outputs", close(
            linear(x, W, b), linear(x * (1 + scale) + shift, weight, bias)), "they differ"


@exercise("06.3", "what does the paper count?", points=2)
def _(answer):
    tokens, width, depth = (32 // 2) ** 2, 1152, 28
    layers, products = 12 * width**2 * tokens * depth / 1e9, 2 * tokens**2 * width * depth / 1e9
    value, total = float(answer), layers + products
    near = lambda wanted: abs(value / wanted - 1) < 0.004  # noqa: E731
    mistakes = {
        2 * total: "that counts a multiplication with its addition as two",
        layers: "the two products of attention, q k^T and weights times v, are missing",
        total / depth: "that is one block: times the depth",
        1.5 * layers + products: "the modulation runs once per image, not once per token",
        total / tokens: "that is one token: times their number",
    }
    mistake = next((words for wrong, words in mistakes.items() if near(wrong)), (
        "the answer is in billions" if value > 1e6 else
        "how many tokens does a 32 x 32 latent have with patch 2?" if value > 3 * layers else
        "that is the number of the paper: count, and see how near you come" if value == 119 else
        "half of 24 D^2 N + 4 D N^2 for a block, times the depth"))
    yield f"about {total:.0f} billion multiply-adds, the paper's number of 119 nearly whole", near(total), mistake


@exercise("06.4", "rotary positions", points=3)
def _(rotary):
    d, start = 4 * integer(2, 4), integer(1, 4, seed=1)
    place = torch.tensor([0, 5, 2, 9, 1, 3])  # not in order: the place is what `place` says
    x = noise(2, 3, 6, d, seed=2)
    kept, out = x.clone(), rotary(x, place)
    yield "the shape and the dtype stay", out.shape == x.shape and out.dtype == x.dtype, (
        f"{tuple(x.shape)} {x.dtype} became {tuple(out.shape)} {out.dtype}")
    yield "the input is as it was", torch.equal(x, kept), "x was changed in place: rotate into a new tensor"
    yield "at place 0 nothing is turned", close(out[:, :, 0], x[:, :, 0]), "the angle at place 0 is 0: cos 1, sin 0"
    yield "lengths stay", close(out.norm(dim=-1), x.norm(dim=-1)), (
        "a rotation is (a cos - b sin, a sin + b cos): one sign is wrong, or a and b share no angle")
    q, k = noise(4, 3, 1, d, seed=3), noise(4, 3, 1, d, seed=4)  # twelve products: chance cannot make them all agree

    def product(m, n):
        return (rotary(q, torch.tensor([m])) * rotary(k, torch.tensor([n]))).sum(-1)

    same = [(5 + start, start, 5, 0), (2, 2 + start, 0, start)]
    same = all(close(product(m, n), product(i, j), atol=1e-4) for m, n, i, j in same)
    yield "q at m times k at n depends on m - n only", same, (
        "the angle must be place times frequency, the same for q and k")
    yield "and it does depend on m - n", not close(product(9, 4), product(9, 5)), (
        "nothing was turned: the angles come from `place`, which need not be 0, 1, 2, ...")
    turn = rotary(torch.eye(d)[None, None], torch.ones(d, dtype=torch.long))[0, 0]  # one place onward, as a matrix
    angles = torch.linalg.eigvals(turn.double()).angle().abs().sort().values
    wanted = (10_000.0 ** (-torch.arange(d // 2, dtype=torch.float64) * 2 / d)).repeat_interleave(2).sort().values
    yield "the frequencies run from 1 down, 10000^(-2i/d)", close(angles, wanted, 1e-3, 1e-5), (
        "all pairs turn alike" if close(angles, angles[-1].item(), 1e-2) else "pair i turns by 10000^(-2i/d) a place")
    far = rotary(x.double(), place)
    yield "float64 stays float64, and gives the same", far.dtype == torch.float64 and close(far, out), (
        "compute the angles in float32 or more, and return the dtype of x")
    coarse, fine = rotary(x.bfloat16(), place + 300), rotary(x, place + 300)
    yield "bfloat16 stays bfloat16, and places around 300 are told apart", coarse.dtype == torch.bfloat16 and close(coarse, fine, 0.02, 0.06), (
        "bfloat16 rounds place 301 to 300: compute the angles in float32 or more, and return the dtype of x")
