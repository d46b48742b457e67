"""Wrong answers to the exercises of chapter 3, the U-Net and the denoiser, and other right ones."""

import torch
import torch.nn.functional as F

from coursework import solution

weight, attend, average, linear = (solution(f"03.{i}") for i in (1, 2, 3, 6))


# 03.1

def weight_flipped(alpha, sigma, target):
    return 1 / weight(alpha, sigma, target)


def weight_root(alpha, sigma, target):
    return weight(alpha, sigma, target) ** 0.5


def weight_of_eps(alpha, sigma, target):  # (determinant / alpha)^2
    return weight(alpha, sigma, target) * (sigma / alpha) ** 2


def weight_determinant(alpha, sigma, target):
    return weight(alpha, sigma, target) * sigma**2


def weight_vp(alpha, sigma, target):
    return 1 / sigma**2 if target == "v" else weight(alpha, sigma, target)


def weight_vp_eps(alpha, sigma, target):
    return 1 / sigma**2 - 1 if target == "eps" and (alpha + sigma - 1).abs().min() > 0 else weight(alpha, sigma, target)


def weight_line(alpha, sigma, target):
    return 1 / sigma**2 if target == "flow" else weight(alpha, sigma, target)


def weight_v_sign(alpha, sigma, target):  # v = alpha eps + sigma z0
    return ((alpha**2 - sigma**2) / sigma) ** 2 if target == "v" else weight(alpha, sigma, target)


def weight_flow_sign(alpha, sigma, target):  # eps + z0
    return ((alpha - sigma) / sigma) ** 2 if target == "flow" else weight(alpha, sigma, target)


def weight_v_as_eps(alpha, sigma, target):  # z0's own part of v forgotten
    return (alpha**2 / sigma) ** 2 if target == "v" else weight(alpha, sigma, target)


def weight_by_gradient(alpha, sigma, target):
    z0 = torch.zeros_like(alpha).requires_grad_()
    eps = (1 - alpha * z0) / sigma
    out = {"eps": eps, "x0": z0, "v": alpha * eps - sigma * z0, "flow": eps - z0}[target]
    return torch.autograd.grad(out.sum(), z0)[0] ** 2


def weight_plain(alpha, sigma, target):  # a number where it is one
    return {"x0": 1.0, "eps": (alpha / sigma) ** 2, "v": ((alpha**2 + sigma**2) / sigma) ** 2,
            "flow": (1 + alpha / sigma) ** 2}[target]


def weight_single(alpha, sigma, target):
    return weight(alpha.float(), sigma.float(), target)


# 03.2

def window(far, fill=float("-inf"), scale=True, dim=-1):
    """local_attend with another rule for what is too far: far(rows apart, columns apart, places apart, radius)."""
    def local_attend(q, k, v, height, width, radius):
        i = torch.arange(height * width)
        rows, columns = (i[:, None] // width - i // width).abs(), (i[:, None] % width - i % width).abs()
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale else 1)
        return scores.masked_fill(far(rows, columns, (i[:, None] - i).abs(), radius), fill).softmax(dim) @ v
    return local_attend


def square(rows, columns, places, radius):
    return torch.maximum(rows, columns) > radius


def attend_after(q, k, v, height, width, radius):  # masked after the softmax
    eye = torch.eye(height * width).expand(*q.shape[:2], -1, -1)
    near = attend(q, k, eye, height, width, radius) > 0
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) * near) @ v


def attend_swapped(q, k, v, height, width, radius):
    return attend(q, k, v, width, height, radius)


def attend_wraps(q, k, v, height, width, radius):
    i = torch.arange(height * width)
    rows, columns = (i[:, None] // width - i // width).abs(), (i[:, None] % width - i % width).abs()
    far = torch.maximum(rows, torch.minimum(columns, width - columns)) > radius
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(far, float("-inf")).softmax(-1) @ v


def attend_wrong_root(q, k, v, height, width, radius):  # divided by sqrt(N), not by sqrt(d)
    return attend(q * (q.shape[-1] / q.shape[-2]) ** 0.5, k, v, height, width, radius)


def attend_fused(q, k, v, height, width, radius):
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([row.flatten(), column.flatten()], 1).double()
    near = torch.cdist(at, at, p=float("inf")) < radius + 0.5
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


def attend_loop(q, k, v, height, width, radius):  # each window cut out of the map
    k, v = (x.unflatten(2, (height, width)) for x in (k, v))
    out = []
    for i in range(height * width):
        r, c = i // width, i % width
        rows, columns = slice(max(0, r - radius), r + radius + 1), slice(max(0, c - radius), c + radius + 1)
        keys, values = (x[:, :, rows, columns].flatten(2, 3) for x in (k, v))
        scores = torch.einsum("bhd,bhnd->bhn", q[:, :, i], keys) / q.shape[-1] ** 0.5
        out.append(torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), values))
    return torch.stack(out, 2)


def attend_renormalized(q, k, v, height, width, radius):  # cut after the softmax, and divided by what is left
    eye = torch.eye(height * width).expand(*q.shape[:2], -1, -1)
    near = (attend(0 * q, k, eye, height, width, radius) > 0).float()
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) * near
    return weights / weights.sum(-1, keepdim=True) @ v


# 03.3

def moving(start=lambda values: 0.0, correct=lambda average, d, n: average / (1 - d**n), rate=lambda d, n: d,
           feed=False):
    """debiased with another start, correction or decay; with `feed` the correction goes back into the average."""
    def debiased(values, decay):
        average, out = start(values), []
        for n, value in enumerate(values, 1):
            average = rate(decay, n) * average + (1 - rate(decay, n)) * value
            out.append(correct(average, decay, n))
            average = out[-1] if feed else average
        return out
    return debiased


def uncorrected(average, d, n):
    return average


def debiased_swapped(values, decay):
    return average(values, 1 - decay)


def debiased_last(values, decay):
    return average(values, decay)[-1]


def debiased_mean(values, decay):
    return [sum(values[:n]) / n for n in range(1, len(values) + 1)]


def debiased_in_place(values, decay):
    values[:] = average(values, decay)
    return values


def debiased_sums(values, decay):  # the weights themselves, newest first
    out = []
    for n in range(1, len(values) + 1):
        weights = [decay**k for k in range(n)]
        out.append(sum(w * x for w, x in zip(weights, reversed(values[:n]))) / sum(weights))
    return out


def debiased_rate(values, decay):  # the same as an average with a decay of its own for each step, begun with x1
    out = [values[0]]
    for n, value in enumerate(values[1:], 2):
        out.append(out[-1] + (1 - decay) / (1 - decay**n) * (value - out[-1]))
    return out


def debiased_tensor(values, decay):
    return torch.tensor(average(torch.tensor(values), decay))


# 03.6

def linear_no_mean(zt, alpha, sigma, mean, cov):
    return linear(zt, alpha, sigma, 0 * mean, cov)


def linear_unshifted(zt, alpha, sigma, mean, cov):
    return linear_no_mean(zt, alpha, sigma, mean, cov) + mean


def linear_not_added(zt, alpha, sigma, mean, cov):
    return linear(zt, alpha, sigma, mean, cov) - mean


def linear_mean_unscaled(zt, alpha, sigma, mean, cov):  # z_t - mean
    return linear(zt + (alpha - 1) * mean, alpha, sigma, mean, cov)


def linear_variances(zt, alpha, sigma, mean, cov):
    return linear(zt, alpha, sigma, mean, torch.diag(cov.diagonal()))


def linear_no_alpha(zt, alpha, sigma, mean, cov):
    eye = torch.eye(len(mean), dtype=cov.dtype)
    return mean + torch.linalg.solve(alpha**2 * cov + sigma**2 * eye, (zt - alpha * mean).T).T @ cov


def linear_sigma(zt, alpha, sigma, mean, cov):  # sigma for its square
    return linear(zt, alpha, sigma**0.5, mean, cov)


def linear_entries(zt, alpha, sigma, mean, cov):  # a division of entries for a matrix's inverse
    total = alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=cov.dtype)
    return mean + (zt - alpha * mean) @ (alpha * cov / total)


def linear_everywhere(zt, alpha, sigma, mean, cov):  # sigma^2 added to every entry, not to the diagonal
    return mean + alpha * torch.linalg.solve(alpha**2 * cov + sigma**2, (zt - alpha * mean).T).T @ cov


def linear_average(zt, alpha, sigma, mean, cov):  # one variance for all, with the right gain for it
    c = cov.diagonal().mean()
    return mean + alpha * c / (alpha**2 * c + sigma**2) * (zt - alpha * mean)


def linear_batch(zt, alpha, sigma, mean, cov):  # the mean of the batch for that of the data
    return linear(zt - zt.mean(0) + alpha * mean, alpha, sigma, mean, cov)


def linear_in_place(zt, alpha, sigma, mean, cov):
    out = linear(zt, alpha, sigma, mean, cov)
    zt -= alpha * mean
    return out


def linear_tweedie(zt, alpha, sigma, mean, cov):  # (z_t + sigma^2 score) / alpha: right, but not at alpha = 0
    total = alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=cov.dtype)
    score = -torch.linalg.solve(total, (zt - alpha * mean).T).T
    return (zt + sigma**2 * score) / torch.tensor(alpha)


def linear_precisions(zt, alpha, sigma, mean, cov):  # the other form: precisions add up
    inverse = torch.linalg.inv(cov)
    after = torch.linalg.inv(inverse + alpha**2 / sigma**2 * torch.eye(len(mean), dtype=cov.dtype))
    return (inverse @ mean + alpha / sigma**2 * zt) @ after


def linear_axes(zt, alpha, sigma, mean, cov):  # in the axes of the covariance each value is by itself
    lam, axes = torch.linalg.eigh(cov)
    return mean + ((zt - alpha * mean) @ axes * (alpha * lam / (alpha**2 * lam + sigma**2))) @ axes.T


def linear_single(zt, alpha, sigma, mean, cov):
    return linear(zt.float(), alpha, sigma, mean.float(), cov.float())


ALSO_RIGHT = [
    ("03.1", weight_by_gradient), ("03.1", weight_plain), ("03.1", weight_single),
    ("03.2", attend_fused), ("03.2", attend_loop), ("03.2", attend_renormalized), ("03.2", window(square, fill=-1e9)),
    ("03.3", debiased_sums), ("03.3", debiased_rate), ("03.3", debiased_tensor),
    ("03.6", linear_precisions), ("03.6", linear_axes), ("03.6", linear_single),
]
WRONG = {
    "03.1": [(weight_flipped, "upside down"), (weight_root, "square the factor"),
             (lambda *given: -weight_root(*given), "square the factor"),
             (lambda alpha, sigma, target: 1.0 if target == "x0" else -weight_root(alpha, sigma, target), "square the factor"), (weight_vp, "variance-preserving"),
             (weight_of_eps, "e is the error of z0"), (weight_determinant, "determinant alone"),
             (weight_vp_eps, "of no schedule"), (weight_line, "of no schedule"), (weight_v_sign, "a sign: v"),
             (weight_flow_sign, "a sign: flow"), (weight_v_as_eps, "what z0 is multiplied by")],
    "03.2": [(attend_after, "before the softmax"), (window(lambda r, c, i, radius: i > radius), "flattened"),
             (attend_swapped, "changed places"), (window(square, scale=False), "not divided by sqrt(d)"),
             (window(lambda r, c, i, radius: torch.maximum(r, c) >= radius), "its own window|belongs to the window"),
             (window(lambda r, c, i, radius: r + c > radius), "larger one"), (window(square, fill=0.0), "not 0"),
             (window(lambda r, c, i, radius: r > radius), "radius 0"), (attend_wraps, "borders"),
             (window(lambda r, c, i, radius: torch.minimum(r, c) > radius), "radius 0"),
             (window(square, dim=-2), "runs over the keys"), (attend_wrong_root, "chapter 3's attend")],
    "03.3": [(moving(correct=uncorrected), "without a division"), (moving(feed=True), "as it is"),
             (moving(start=lambda values: values[0], correct=uncorrected), "a start, too"),
             (moving(correct=lambda average, d, n: average / (1 - d ** (n + 1))), "n from 1"),
             (moving(correct=lambda average, d, n: average / (1 - d)), "n from 1"),
             (moving(rate=lambda d, n: min(d, n / (9 + n))), "n from 1"), (debiased_swapped, "changed places"),
             (debiased_last, "return them all"), (debiased_mean, "count alike"), (debiased_in_place, "empty list")],
    "03.6": [(linear_no_mean, "added back"), (linear_unshifted, "not subtracted"), (linear_not_added, "not added back"),
             (linear_mean_unscaled, "another mean"), (linear_variances, "only the variances"),
             (linear_no_alpha, "not cov"), (linear_sigma, "alpha^2 cov + sigma^2 I"), (linear_entries, "of entries"),
             (linear_everywhere, "alpha^2 cov + sigma^2 I"), (linear_average, "uncorrelated"),
             (linear_batch, "other mean|other rows"), (linear_in_place, "in place"), (linear_tweedie, "divided by it")],
}
