"""Right and wrong answers to the exercises of chapter 6, the diffusion transformer."""

import torch


def as_convolution(weight, p):
    return weight.unflatten(1, (-1, p, p))

def wrong_swapped(weight, p):
    return weight.unflatten(1, (-1, p, p)).mT.contiguous()

def wrong_channels_last(weight, p):
    return weight.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)

def wrong_shape(weight, p):
    return weight.unflatten(1, (-1, p * p))


def fold(weight, bias, shift, scale):
    return weight * (1 + scale), bias + weight @ shift

def wrong_no_one(weight, bias, shift, scale):
    return weight * scale, bias + weight @ shift

def wrong_scaled_shift(weight, bias, shift, scale):
    W = weight * (1 + scale)
    return W, bias + W @ shift

def wrong_no_shift(weight, bias, shift, scale):
    return weight * (1 + scale), bias

def wrong_in_place(weight, bias, shift, scale):
    b = bias + weight @ shift
    return weight.mul_(1 + scale), b


def rotary(x, place):
    half = x.shape[-1] // 2
    angles = place.to(x)[:, None] * 10_000 ** (-torch.arange(half).to(x) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

def rotary_interleaved(x, place):
    half = x.shape[-1] // 2
    angles = place.to(x)[:, None] * 10_000 ** (-torch.arange(half).to(x) / half)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1).flatten(-2)

def wrong_sign(x, place):
    half = x.shape[-1] // 2
    angles = place.to(x)[:, None] * 10_000 ** (-torch.arange(half).to(x) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() + b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

def wrong_one_frequency(x, place):
    half = x.shape[-1] // 2
    angles = place.to(x)[:, None].expand(-1, half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

def wrong_square(x, place):
    return rotary(x, place**2)

def wrong_added(x, place):
    half = x.shape[-1] // 2
    angles = place.to(x)[:, None] * 10_000 ** (-torch.arange(half).to(x) / half)
    return x + torch.cat([angles.cos(), angles.sin()], dim=-1)

def wrong_frequencies(x, place):
    half = x.shape[-1] // 2
    angles = place.to(x)[:, None] * 10_000 ** (-torch.arange(half).to(x) / (2 * half))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def stub(*args):
    ...

SOLUTIONS = [("06.1", as_convolution), ("06.2", fold), ("06.3", (12 * 1152**2 * 256 + 2 * 256**2 * 1152) * 28 / 1e9),
         ("06.3", 118.6), ("06.3", 118), ("06.4", rotary), ("06.4", rotary_interleaved)]
CAUGHT = [("06.1", wrong_swapped, "rows and columns"), ("06.1", wrong_channels_last, "channel, row, column"),
         ("06.1", wrong_shape, "its shape is"),
         ("06.2", wrong_no_one, "1 in 1 + scale"), ("06.2", wrong_scaled_shift, "shift is not scaled"),
         ("06.2", wrong_no_shift, "shift goes through"), ("06.2", wrong_in_place, "in place"),
         ("06.3", 236.8, "as two"), ("06.3", 114.2, "products of attention"), ("06.3", 592.3, "how many tokens"),
         ("06.3", 1.18e11, "billions"), ("06.3", 60, "half of"),
         ("06.4", wrong_sign, "sign"), ("06.4", wrong_one_frequency, "all pairs turn alike"),
         ("06.4", wrong_square, "place times frequency"), ("06.4", wrong_added, "cos 1, sin 0"),
         ("06.4", wrong_frequencies, "10000^(-2i/d)")]
WRONG = {n: [(answer, words) for number, answer, words in CAUGHT if number == n] for n, _ in SOLUTIONS}
