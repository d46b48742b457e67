"""Wrong answers to the exercises of chapter 6, the diffusion transformer, and other right ones."""

import torch
from coursework import solution

fold, rotary = solution("06.2"), solution("06.4")


# ---- 06.1
def swapped(weight, p):
    return weight.unflatten(1, (-1, p, p)).mT.contiguous()

def channels_last(weight, p):
    return weight.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)

def three_dimensions(weight, p):
    return weight.unflatten(1, (-1, p * p))

def in_and_out_exchanged(weight, p):
    return weight.unflatten(1, (-1, p, p)).transpose(0, 1)

def channels_slowest_of_all(weight, p):  # as if the values were ordered (row, channel, column)
    return weight.unflatten(1, (p, -1, p)).transpose(1, 2)

def in_any_order(weight, p):  # the weight laid out anew
    return weight.T.reshape(len(weight), -1, p, p)

def scaled_in_place(weight, p):
    return weight.mul_(1.0).sub_(weight.mean()).unflatten(1, (-1, p, p))

def value_by_value(weight, p):
    kernel = torch.zeros(len(weight), weight.shape[1] // p**2, p, p)
    for j in range(weight.shape[1]):
        channel, place = divmod(j, p * p)
        kernel[:, channel, place // p, place % p] = weight[:, j]
    return kernel

def by_pixel_shuffle(weight, p):
    return torch.nn.functional.pixel_shuffle(weight[:, :, None, None], p)


# ---- 06.2
def no_one(weight, bias, shift, scale):
    return weight * scale, bias + weight @ shift

def scaled_shift(weight, bias, shift, scale):
    W = weight * (1 + scale)
    return W, bias + W @ shift

def no_shift(weight, bias, shift, scale):
    return weight * (1 + scale), bias

def no_bias(weight, bias, shift, scale):
    return weight * (1 + scale), weight @ shift

def rows_scaled(weight, bias, shift, scale):
    if len(weight) != len(scale):
        return weight * (1 + scale), bias + weight @ shift
    return weight * (1 + scale)[:, None], bias + weight @ shift

def bias_scaled(weight, bias, shift, scale):
    return weight * (1 + scale), bias * (1 + scale)[0] + weight @ shift

def shift_added(weight, bias, shift, scale):
    return weight * (1 + scale), bias + shift.mean()

def transposed(weight, bias, shift, scale):
    return (weight * (1 + scale)).T, bias + weight @ shift

def bias_first(weight, bias, shift, scale):
    return fold(weight, bias, shift, scale)[::-1]

def folded_in_place(weight, bias, shift, scale):
    b = bias + weight @ shift
    return weight.mul_(1 + scale), b

def weight_alone(weight, bias, shift, scale):
    return weight * (1 + scale)

def by_matrices(weight, bias, shift, scale):
    return weight @ torch.diag(1 + scale), torch.einsum("od,d->o", weight, shift) + bias

def by_asking(weight, bias, shift, scale):
    layer = lambda x: torch.nn.functional.linear(x * (1 + scale) + shift, weight, bias)
    b = layer(torch.zeros(len(scale)))
    return [(layer(torch.eye(len(scale))) - b).T, b]


# ---- 06.4
def angles_of(x, place, exponent=1.0):
    half = x.shape[-1] // 2
    return place.float()[:, None] * 10_000 ** (-torch.arange(half) * exponent / half)

def turned(x, angles):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1).to(x)

def in_the_dtype_of_x(x, place):
    return turned(x, angles_of(x, place.to(x).float()))

def wrong_sign(x, place):
    angles, (a, b) = angles_of(x, place), x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() + b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)

def layouts_mixed(x, place):  # angles for neighbors, pairs of halves
    angles, (a, b) = angles_of(x, place).repeat_interleave(2, dim=-1), x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()

def one_frequency(x, place):
    return turned(x, place.to(x)[:, None].expand(-1, x.shape[-1] // 2))

def square(x, place):
    return rotary(x, place**2)

def added(x, place):
    angles = angles_of(x, place)
    return x + torch.cat([angles.cos(), angles.sin()], dim=-1)

def slow_frequencies(x, place):  # i / d for 2 i / d
    return turned(x, angles_of(x, place, 0.5))

def own_places(x, place):  # 0, 1, 2, ... whatever `place` says
    return turned(x, angles_of(x, torch.arange(len(place))))

def places_from_one(x, place):
    return rotary(x, place + 1)

def first_half_only(x, place):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([rotary(a, place), b], dim=-1)

def rotated_in_place(x, place):
    return x.copy_(rotary(x, place))

def always_float32(x, place):
    return rotary(x.float(), place)

def in_degrees(x, place):
    return turned(x, torch.deg2rad(angles_of(x, place)))

def growing_frequencies(x, place):
    return turned(x, angles_of(x, place, -1.0))

def neighbors(x, place):
    angles, a, b = angles_of(x, place), x[..., ::2], x[..., 1::2]
    pairs = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    return torch.stack(pairs, dim=-1).flatten(-2).to(x)

def complex_numbers(x, place):
    turn = torch.polar(torch.ones(()), angles_of(x.float(), place))
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x)

def by_table(x, place):  # the other direction, and cosines from a table
    table = angles_of(x, torch.arange(int(place.max()) + 1))[place]
    c, s = table.cos().repeat(1, 2), table.sin().repeat(1, 2)
    a, b = x.chunk(2, dim=-1)
    return (x * c + torch.cat([b, -a], dim=-1) * s).to(x)


ALSO_RIGHT = [("06.1", value_by_value), ("06.1", by_pixel_shuffle), ("06.2", by_matrices), ("06.2", by_asking),
              ("06.3", 118.6), ("06.3", 118), ("06.3", torch.tensor(118.38)),
              ("06.4", neighbors), ("06.4", complex_numbers), ("06.4", by_table)]
WRONG = {
    "06.1": [(swapped, "rows and columns"), (channels_last, "channel, row, column"), (three_dimensions, "its shape is"),
             (in_and_out_exchanged, "its shape is"), (channels_slowest_of_all, "channel, row, column"),
             (in_any_order, "channel, row, column"), (scaled_in_place, "channel, row, column|in place")],
    "06.2": [(no_one, "1 in 1 + scale"), (scaled_shift, "shift is not scaled"), (no_shift, "shift goes through"),
             (no_bias, "is lost"), (rows_scaled, "column j"), (bias_scaled, "shift goes through"),
             (shift_added, "shift goes through"), (transposed, "column j"), (bias_first, "they are"),
             (folded_in_place, "in place"), (weight_alone, "weight and the bias")],
    "06.3": [(236.8, "as two"), (114.2, "products of attention"), (592.3, "how many tokens"), (1.18e11, "billions"),
             (60, "half of"), (4.23, "one block"), (175.5, "once per image"), (119, "number of the paper"),
             (0.462, "one token")],
    "06.4": [(wrong_sign, "sign"), (layouts_mixed, "share no angle"), (one_frequency, "all pairs turn alike"),
             (square, "place times frequency"), (added, "cos 1, sin 0"), (slow_frequencies, "10000^(-2i/d)"),
             (own_places, "cos 1, sin 0|come from `place`"), (places_from_one, "cos 1, sin 0"),
             (first_half_only, "10000^(-2i/d)"), (rotated_in_place, "in place"), (always_float32, "float64"), (in_the_dtype_of_x, "rounds place 301"),
             (in_degrees, "10000^(-2i/d)"), (growing_frequencies, "10000^(-2i/d)|place times")],
}
