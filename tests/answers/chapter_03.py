"""Right and wrong answers to the exercises of chapter 3, the U-Net and the denoiser."""

import torch

def weight(alpha, sigma, target):
    a, b = {"eps": (0 * alpha, 0 * alpha + 1), "x0": (0 * alpha + 1, 0 * alpha), "v": (-sigma, alpha),
            "flow": (0 * alpha - 1, 0 * alpha + 1)}[target]
    return ((alpha * b - sigma * a) / sigma) ** 2

def local_attend(q, k, v, height, width, radius):
    i = torch.arange(height * width)
    row, column = i // width, i % width
    far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) > radius
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(far, float("-inf"))
    return scores.softmax(-1) @ v

def debiased(values, decay):
    average, out = 0.0, []
    for n, value in enumerate(values, 1):
        average = decay * average + (1 - decay) * value
        out.append(average / (1 - decay**n))
    return out

def linear(zt, alpha, sigma, mean, cov):
    total = alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=cov.dtype)
    return mean + alpha * torch.linalg.solve(total, (zt - alpha * mean).T).T @ cov

def w_flip(alpha, sigma, target): return 1 / weight(alpha, sigma, target)
def w_root(alpha, sigma, target): return weight(alpha, sigma, target) ** 0.5
def w_noise(alpha, sigma, target): return weight(alpha, sigma, target) * (sigma / alpha) ** 2
def w_vp(alpha, sigma, target): return 1 / sigma**2 if target == "v" else weight(alpha, sigma, target)

def l_after(q, k, v, height, width, radius):
    i = torch.arange(height * width); row, column = i // width, i % width
    near = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) <= radius
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) * near) @ v
def l_flat(q, k, v, height, width, radius):
    i = torch.arange(height * width); far = (i[:, None] - i).abs() > radius
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(far, float("-inf")).softmax(-1) @ v
def l_swap(q, k, v, height, width, radius): return local_attend(q, k, v, width, height, radius)
def l_noscale(q, k, v, height, width, radius): return local_attend(q * q.shape[-1] ** 0.5, k, v, height, width, radius)
def l_open(q, k, v, height, width, radius): return local_attend(q, k, v, height, width, radius - 1)
def l_manhattan(q, k, v, height, width, radius):
    i = torch.arange(height * width); row, column = i // width, i % width
    far = (row[:, None] - row).abs() + (column[:, None] - column).abs() > radius
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(far, float("-inf")).softmax(-1) @ v

def d_none(values, decay):
    average, out = 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value; out.append(average)
    return out
def d_first(values, decay):
    average, out = values[0], []
    for value in values:
        average = decay * average + (1 - decay) * value; out.append(average)
    return out
def d_off(values, decay):
    average, out = 0.0, []
    for n, value in enumerate(values):
        average = decay * average + (1 - decay) * value; out.append(average / (1 - decay ** (n + 2)))
    return out
def d_back(values, decay):
    average, out = 0.0, []
    for n, value in enumerate(values, 1):
        average = (decay * average + (1 - decay) * value) / (1 - decay**n); out.append(average)
    return out

def g_nomean(zt, alpha, sigma, mean, cov): return linear(zt, alpha, sigma, 0 * mean, cov)
def g_unshifted(zt, alpha, sigma, mean, cov): return linear(zt, alpha, sigma, 0 * mean, cov) + mean
def g_diag(zt, alpha, sigma, mean, cov): return linear(zt, alpha, sigma, mean, torch.diag(cov.diagonal()))
def g_noalpha(zt, alpha, sigma, mean, cov):
    return mean + torch.linalg.solve(alpha**2 * cov + sigma**2 * torch.eye(3, dtype=cov.dtype), (zt - alpha * mean).T).T @ cov
def g_sigma(zt, alpha, sigma, mean, cov):
    return mean + alpha * torch.linalg.solve(alpha**2 * cov + sigma * torch.eye(3, dtype=cov.dtype), (zt - alpha * mean).T).T @ cov

CASES = [
    ("03.1", weight, [(w_flip, "upside down"), (w_root, "squares"), (w_noise, "x0"), (w_vp, "variance-preserving")]),
    ("03.2", local_attend, [(l_after, "before the softmax"), (l_flat, "flattened"), (l_swap, "changed places"),
                                    (l_noscale, "sqrt(d)"), (l_open, "itself"), (l_manhattan, "larger one")]),
    ("03.3", debiased, [(d_none, "without a division"), (d_first, "a start, too"), (d_off, "n from 1"), (d_back, "as it is")]),
    ("03.6", linear, [(g_nomean, "mean"), (g_unshifted, "mean"), (g_diag, "uncorrelated"), (g_noalpha, "cancels"), (g_sigma, "covariance")]),
]
SOLUTIONS = {number: right for number, right, _ in CASES}
WRONG = {number: wrong for number, _, wrong in CASES}
