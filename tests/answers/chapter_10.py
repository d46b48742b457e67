"""Wrong answers, and other right ones, to the exercises of chapter 10: perceptual compression."""

from math import ceil, log, log2, prod

import torch
import torch.nn.functional as F


# ---- 10.1
def stride_first(layers):
    field, jump = 1, 1
    for kernel, stride in layers:
        jump *= stride
        field += (kernel - 1) * jump
    return field


def last_stride(layers):  # the distance between neighbors is the product of all strides so far
    field, jump = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * jump
        jump = stride
    return field


def whole_kernels(layers):
    field, jump = 0, 1
    for kernel, stride in layers:
        field += kernel * jump
        jump *= stride
    return field


def strides_added(layers):
    field, jump = 1, 1
    for kernel, stride in layers:
        field += (kernel - 1) * jump
        jump += stride - 1
    return field


def backwards(layers, order=reversed):
    field = 1
    for kernel, stride in order(layers):
        field = (field - 1) * stride + kernel
    return field


def by_gradient(layers):  # as the chapter's check cell does, but along a line, and in float64
    size = 2 * backwards(layers) + 8
    x = y = torch.zeros(1, 1, size, dtype=torch.float64, requires_grad=True)
    for kernel, stride in layers:
        y = F.conv1d(y, torch.ones(1, 1, kernel, dtype=torch.float64), stride=stride)
    y[0, 0, 0].backward()
    return int((x.grad != 0).sum())


def emptied(layers):
    field, jump = 1, 1
    while layers:
        kernel, stride = layers.pop(0)
        field, jump = field + (kernel - 1) * jump, jump * stride
    return field


# ---- 10.2
class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_place(z):
    with torch.no_grad():
        rounded = z.round()
    out = rounded + (z - z.detach())
    z.data.copy_(rounded)
    return out


# ---- 10.3
def compression(codes, h, w, height=28, width=28):
    return 8 * height * width / (h * w * log2(codes))


# ---- 10.6
def spread(x, f):
    return F.pixel_unshuffle(x, f).var(1, keepdim=True)


def largest(score, budget):
    kept = torch.zeros_like(score).flatten()
    kept[score.flatten().topk(round(budget * score.numel())).indices] = 1
    return kept.view_as(score)


def gate(x, budget, f=4):
    return largest(spread(x, f), budget)


def each_image(x, budget, f=4):  # the same share for every image
    score = spread(x, f).flatten(1)
    k = round(budget * score.shape[1])
    kept = torch.zeros_like(score).scatter(1, score.topk(k).indices, 1.0)
    return kept.view(len(x), 1, x.shape[2] // f, x.shape[3] // f)


def threshold(x, budget, f=4):
    score = spread(x, f)
    return (score >= score.flatten().quantile(1 - budget)).float()


def above(x, budget, f=4):
    score = spread(x, f)
    return (score > score.flatten().quantile(1 - budget)).float()


def mean_square(x, budget, f=4):
    return largest(F.avg_pool2d(x * x, f), budget)


def brightness(x, budget, f=4):
    return largest(F.avg_pool2d(x, f), budget)


def torn(x, budget, f=4):  # f * f pixels that follow each other in memory are no patch
    b, _, height, width = x.shape
    return largest(x.reshape(b, 1, height // f, width // f, f * f).var(-1), budget)


def of_pixels(x, budget, f=4):  # no pooling to the latent's resolution
    mean = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=1)
    return largest((x - mean).square(), budget)


def across_the_batch(x, budget, f=4):
    score = F.avg_pool2d(x, f).var(0, keepdim=True).expand(len(x), -1, -1, -1)
    return largest(score.contiguous(), budget)


def transposed(x, budget, f=4):
    return gate(x, budget, f).transpose(2, 3)


def relative(x, budget, f=4):  # a soft gate
    score = spread(x, f)
    return score / score.max() * budget


def subtracts(x, budget, f=4):
    x -= F.avg_pool2d(x, f).repeat_interleave(f, 2).repeat_interleave(f, 3)
    return gate(x, budget, f)


def by_moments(x, budget, f=4):
    score = F.avg_pool2d(x * x, f) - F.avg_pool2d(x, f).square()
    rank = score.flatten().argsort(descending=True).argsort()
    return (rank < int(budget * score.numel() + 1e-9)).float().view_as(score)


def by_unfolding(x, budget, f=4):
    patches = x.unfold(2, f, f).unfold(3, f, f)
    order = patches.double().std((-2, -1), correction=0).flatten().tolist()
    kept = sorted(range(len(order)), key=lambda i: order[i])[len(order) - ceil(budget * len(order) - 1e-6):]
    mask = torch.zeros(len(order))
    mask[kept] = 1
    return mask.view(len(x), 1, x.shape[2] // f, x.shape[3] // f)


ALSO_RIGHT = [
    ("10.1", backwards), ("10.1", by_gradient),
    ("10.2", Through.apply), ("10.2", lambda z: z - z.detach() + z.detach().round()),
    ("10.2", lambda z: z + (torch.floor(z + 0.5) - z).detach()),
    ("10.3", lambda codes, h, w, height=28, width=28: torch.tensor(8.0 * height * width) / (torch.tensor(codes).log2() * h * w)),
    ("10.6", by_moments), ("10.6", by_unfolding),
]
WRONG = {
    "10.1": [(stride_first, "comes after"), (lambda layers: prod(k for k, _ in layers), "overlap"),
             (last_stride, "strides multiply"), (lambda layers: 1 + sum(k - 1 for k, _ in layers), "pixels apart"),
             (whole_kernels, "overlap"), (strides_added, "strides multiply|is multiplied by"),
             (lambda layers: backwards(layers, iter), "pixels apart"), (emptied, "in place")],
    "10.2": [(lambda z: z.round(), "gradient is 0"), (lambda z: z.round().detach(), "detached as a whole"),
             (lambda z: z.round().detach() + 2 * (z - z.detach()), "more than once"), (lambda z: z, "itself, with"),
             (lambda z: z + (z.round() - z), "gradient is 0"), (lambda z: z.detach() + (z.round() - z), "sign is wrong"),
             (lambda z: z + (z.floor() - z).detach(), "rounds down"), (lambda z: z + (z.trunc() - z).detach(), "towards zero"),
             (lambda z: z + z.round().detach(), "itself, with"),
             (lambda z: z.float() + (z.float().round() - z.float()).detach(), "dtype"), (in_place, "in place")],
    "10.3": [(lambda c, h, w, height=28, width=28: 8 * height * width / (h * w * log(c)), "log2"),
             (lambda c, h, w, height=28, width=28: height * width / (h * w * log2(c)), "8 bits"),
             (lambda c, h, w, height=28, width=28: h * w * log2(c) / (8 * height * width), "upside down|bits of the latent"),
             (lambda c, h, w, height=28, width=28: compression(c, h, w), "use height"),
             (lambda c, h, w, height=28, width=28: 8 * height * width / (h * w * ceil(log2(c))), "no whole number"),
             (lambda c, h, w, height=28, width=28: height * width / (h * w), "bits"),
             (lambda c, h, w, height=28, width=28: 8 * height * width / (h * w * c), "bits")],
    "10.6": [(each_image, "of the whole batch"), (threshold, "all patches are tied"), (above, "all patches are tied"),
             (mean_square, "bright plain patch"), (brightness, "not the variance inside|of the whole batch"),
             (torn, "not the variance inside|of the whole batch"), (of_pixels, "one value for each place"),
             (across_the_batch, "not the variance inside|of the whole batch"), (transposed, "one value for each place"),
             (relative, "kept (1.0) or not"), (lambda x, budget, f=4: gate(x, budget, f).bool(), "no bool"),
             (lambda x, budget, f=4: gate(x, 1 - budget, f), "not the one that is dropped"),
             (lambda x, budget, f=4: largest(-spread(x, f), budget), "least varied"),
             (lambda x, budget, f=4: gate(x, budget, 4), "4 typed in"), (subtracts, "in place")],
}
