r"""How good are reconstructions and samples? Pairs are compared pixel by pixel, sets by their features.

    PSNR   = -10 log10(mean squared error), images in [0, 1]                          pairs only, never samples
    FD     = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)                     1706.08500 (FID, on Inception)
    KID    = unbiased MMD^2 with kernel (x.y / d + 1)^3                               1801.01401
    precision / recall      share of one set inside the k-nearest-neighbor balls of the other   1904.06991
    density / coverage      the same, robust to outliers                              2002.09797
    memorisation            distance to the nearest training image, samples over test images; near 1 is healthy

Images are uint8 (N, 1, H, W), as they would be saved. Features are (N, d). Means and covariances are in float64, with n - 1,
and two distances are comparable only at the same n: with fewer samples the Frechet distance comes out larger. Sets with
equal numbers of each class are more alike than random ones: FD comes out smaller, and KID slightly below zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def as_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"need two uint8 batches of one shape, got {a.dtype} {tuple(a.shape)} "
                         f"and {b.dtype} {tuple(b.shape)}")
    return a.double() / 255, b.double() / 255


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB: (N,); inf for equal images."""
    a, b = as_pairs(a, b)
    return -10 * torch.log10((a - b).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair: (N,). Gaussian window 11x11, std 1.5, C1 = .01^2, C2 = .03^2, no padding."""
    a, b = as_pairs(a, b)
    x = torch.arange(11, dtype=a.dtype) - 5
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    window = (line[:, None] * line[None]) / line.sum() ** 2
    channels = a.shape[1]
    window = window.expand(channels, 1, 11, 11).to(a)

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(v, window, groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def check_features(a: Tensor, b: Tensor, least: int = 2) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, d) with one d, got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"need at least {least} samples in each set, got {len(a)} and {len(b)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("the features hold NaN or infinity")


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians fitted to the two feature sets. Symmetric; 0 only for equal mean and covariance.

    tr (C1 C2)^1/2 is taken as tr (C1^1/2 C2 C1^1/2)^1/2: the same number, from symmetric matrices.
    """
    check_features(a, b)
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(x.T)) for x in (a, b))
    root = _root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def kid(a: Tensor, b: Tensor, subsets: int = 50, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of the unbiased squared MMD; may be slightly negative for equal sets."""
    check_features(a, b)
    size = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    a, b = a.double().cpu(), b.double().cpu()
    dim, results = a.shape[1], []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]]
        y = b[torch.randperm(len(b), generator=generator)[:size]]
        kxx, kyy, kxy = ((p @ q.T / dim + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (size * (size - 1))
        results.append(within - 2 * kxy.mean())
    results = torch.stack(results)
    return float(results.mean()), float(results.std(correction=0))


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest other point: (N,)."""
    return torch.cat([torch.cdist(chunk, points).kthvalue(k + 1, dim=1).values for chunk in points.split(1000)])


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage with the k nearest neighbors (itself not counted)."""
    check_features(real, fake, least=k + 1)
    real, fake = real.double().cpu(), fake.double().cpu()
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    inside_real, covered = [], torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for chunk, radii in zip(fake.split(1000), fake_radii.split(1000)):
        distance = torch.cdist(chunk, real)  # (b, N_real)
        in_ball = distance < real_radii  # each fake in the balls of the reals
        inside_real.append(in_ball.sum(1))
        covered |= in_ball.any(0)
        recalled |= (distance < radii[:, None]).any(0)
    hits = torch.cat(inside_real).double()
    return {
        "precision": float((hits > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(hits.mean() / k),
        "coverage": float(covered.double().mean()),
    }


def nearest_distance(images: Tensor, train: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """Root-mean-square pixel distance in [0, 1] of each image to its nearest training image, and that one's index."""
    if images.dtype != torch.uint8 or train.dtype != torch.uint8 or images.shape[1:] != train.shape[1:]:
        raise ValueError(f"need uint8 images of one size, got {images.dtype} {tuple(images.shape)} "
                         f"and {train.dtype} {tuple(train.shape)}")
    flat = train.flatten(1).float() / 255
    distances, places = [], []
    for chunk in images.split(batch):
        low = torch.cdist(chunk.flatten(1).float() / 255, flat).min(dim=1)
        distances.append(low.values), places.append(low.indices)
    return torch.cat(distances) / flat.shape[1] ** 0.5, torch.cat(places)


def memorisation(samples: Tensor, test: Tensor, train: Tensor) -> float:
    """Mean nearest-neighbor distance to the training set, samples over test images. Far below 1: the model copies."""
    return float(nearest_distance(samples, train)[0].mean() / nearest_distance(test, train)[0].mean())
