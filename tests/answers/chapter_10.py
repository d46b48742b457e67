"""Right and wrong answers to the exercises of chapter 10, perceptual compression."""

from math import log, log2, prod


def receptive_field(layers):
    field, jump = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * jump
        jump *= stride
    return field


def stride_first(layers):
    field, jump = 1, 1
    for kernel, stride in layers:
        jump *= stride
        field += (kernel - 1) * jump
    return field


def last_stride(layers):
    field, jump = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * jump
        jump = stride
    return field


def compression(codes, h, w, height=28, width=28):
    return 8 * height * width / (h * w * log2(codes))


SOLUTIONS = {"10.1": receptive_field, "10.2": lambda z: z + (z.round() - z).detach(), "10.3": compression}
WRONG = {
    "10.1": [(stride_first, "comes after"), (lambda layers: prod(k for k, _ in layers), "overlap"),
             (last_stride, "strides multiply"), (lambda layers: 1 + sum(k - 1 for k, _ in layers), "2 pixels apart")],
    "10.2": [(lambda z: z.round(), "gradient 0"), (lambda z: z.round().detach(), "detached as a whole"),
             (lambda z: z.round().detach() + 2 * (z - z.detach()), "more than once"), (lambda z: z, "itself, with")],
    "10.3": [(lambda c, h, w, **size: compression(c, h, w, **size) / log(2), "log2"),
             (lambda *a, **size: compression(*a, **size) / 8, "8 bits"), (lambda c, h, w, **size: compression(c, h, w), "use height")],
}
