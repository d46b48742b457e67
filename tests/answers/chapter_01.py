"""Wrong answers to the exercises of chapter 1, a variational autoencoder, and other right ones."""

import torch
from coursework import solution

kl_between, best_linear, fit_gaussian = solution("01.1"), solution("01.3"), solution("01.6")


# 01.1

def by_distributions(mean_q, logvar_q, mean_p, logvar_p):
    from torch.distributions import Normal, kl_divergence
    return kl_divergence(Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())).flatten(1).sum(1)


def kl(change):
    """KL with one thing changed: change(vq, vp, squared distance, log ratio) -> per value."""
    def wrong(mean_q, logvar_q, mean_p, logvar_p):
        each = change(logvar_q.exp(), logvar_p.exp(), (mean_q - mean_p) ** 2, logvar_p - logvar_q)
        return each.flatten(1).sum(1)
    return wrong


def spoils(mean_q, logvar_q, mean_p, logvar_p):
    out = kl_between(mean_q, logvar_q, mean_p, logvar_p)
    logvar_p.neg_()
    return out


def of_images(mean_q, logvar_q, mean_p, logvar_p):
    each = (logvar_q - logvar_p).exp() + (mean_q - mean_p) ** 2 / logvar_p.exp() - 1 - logvar_q + logvar_p
    return 0.5 * each.sum((1, 2, 3))


# 01.3

def by_svd(x, k):
    mean = x.mean(0)
    return mean, torch.linalg.svd(x - mean, full_matrices=False)[2][:k].T


def directions(change):
    """The right mean, and as basis change(eigenvectors by rising eigenvalue, eigenvalues, k)."""
    def wrong(x, k):
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
        return mean, change(vectors, values, k)
    return wrong


def in_place(x, k):
    x -= x.mean(0)
    return x.mean(0), torch.linalg.eigh(x.T @ x)[1][:, -k:]


# 01.6

def gaussian(change):
    """fit_gaussian with one thing changed: change(flat, mean, cov) -> function of eps (n, D)."""
    def fit(z):
        flat = z.flatten(1)
        make = change(flat, flat.mean(0), torch.cov(flat.T))
        return lambda n, generator: make(torch.randn(n, flat.shape[1], generator=generator)).reshape(n, *z.shape[1:])
    return fit


def forgets_generator(z):
    sample = fit_gaussian(z)
    return lambda n, generator: sample(n, None)


def fixed_seed(z):
    sample = fit_gaussian(z)
    return lambda n, generator: sample(n, torch.Generator().manual_seed(0))


def one_draw(z):
    sample = fit_gaussian(z)
    return lambda n, generator: sample(1, generator).expand(n, *z.shape[1:])


def wrong_side(flat, mean, cov):
    values, vectors = torch.linalg.eigh(cov)
    return lambda eps: mean + eps @ (vectors * values.clamp(min=0).sqrt())


def no_root(flat, mean, cov):
    values, vectors = torch.linalg.eigh(cov)
    return lambda eps: mean + eps @ (vectors * values).T


def no_clamp(flat, mean, cov):
    values, vectors = torch.linalg.eigh(cov)
    return lambda eps: mean + eps @ (vectors * values.sqrt()).T


def of_weights(z):
    """Random sums of the centered latents have their covariance: no matrix, no root."""
    mean, n = z.mean(0), len(z)
    def sample(count, generator):
        weights = torch.randn(count, n, generator=generator) / (n - 1) ** 0.5
        return mean + torch.einsum("bn,n...->b...", weights, z - mean)
    return sample


def by_cholesky(z):
    cov = torch.cov(z.flatten(1).T)
    root = torch.linalg.cholesky(cov + 1e-3 * torch.eye(len(cov)))
    return gaussian(lambda flat, mean, cov: lambda eps: mean + eps @ root.T)(z)


ALSO_RIGHT = [
    ("01.1", by_distributions),
    ("01.1", lambda *given: kl_between(*(each.double() for each in given))),
    ("01.2", torch.tensor(6e-4)),
    ("01.2", 0.0006),
    ("01.3", by_svd),
    ("01.3", lambda x, k: (x.mean(0), torch.pca_lowrank(x, k)[2])),  # approximate, and here good enough
    ("01.3", lambda x, k: (x.double().mean(0), best_linear(x.double(), k)[1])),
    ("01.4", lambda x, y: float(((x - y) ** 2).sum() / x.numel())),
    ("01.4", lambda x, y: (x - y).square().flatten(1).mean(1).mean().reshape(1)),
    ("01.3", lambda x, k: tuple(part.numpy() for part in by_svd(x, k))),
    ("01.6", of_weights),
    ("01.6", by_cholesky),
]
WRONG = {
    "01.1": [
        (lambda mq, lq, mp, lp: kl_between(mp, lp, mq, lq), "changed places"),
        (lambda *given: kl_between(*given) / given[0][0].numel(), "mean over the latent values"),
        (lambda *given: kl_between(*given).mean(), "all axes but the first"),
        (lambda *given: 2 * kl_between(*given), "every term is halved"),
        (lambda *given: kl_between(*given) / 0.6931472, "natural logarithm"),
        (kl(lambda vq, vp, d, r: 0.5 * ((vq + d) / vp + r)), "a term is missing"),
        (kl(lambda vq, vp, d, r: 0.5 * (d / vp - 1 + r)), "a term is missing"),
        (kl(lambda vq, vp, d, r: 0.5 * (vq / vp + d - 1 + r)), "divided by the variance of p"),
        (kl(lambda vq, vp, d, r: 0.5 * ((vq + d) / vp - 1 - r)), "the one of the chapter"),
        (kl(lambda vq, vp, d, r: 0.5 * (vq / vp + d / vq - 1 + r)), "the one of the chapter"),
        (kl(lambda vq, vp, d, r: 0.5 * ((vq / vp) ** 0.5 + d / vp**0.5 - 1 + r / 2)), "the one of the chapter"),
        (kl(lambda vq, vp, d, r: 0.5 * ((vq + d) / vp**0.5 - 1 + r)), "exp() taken of logvar|a term is missing"),
        (spoils, "in-place"),
        (of_images, "however many there are"),
    ],
    "01.2": [(1.2e-3, "no 1/2"), (1e-4 * 256 / 3072, "larger, not smaller"), (1e-4 * 256 / 3072 / 2, "larger, not"),
             (1e-4 * 3072 / 2, "number of latent values"), (1e-4, "write both losses with sums"),
             (1e-4 * 32 * 32 / (8 * 8) / 2, "over all values"), (1e-4 * 3072 / 64, "over all values"),
             (6e-2, "write both losses with sums")],
    "01.3": [
        (directions(lambda vectors, values, k: vectors[:, :k]), "sorts upwards"),
        (lambda x, k: (x.mean(0), torch.linalg.eigh(x.T @ x)[1][:, -k:]), "subtract the mean before"),
        (lambda x, k: (x.mean(0), torch.linalg.svd(x, full_matrices=False)[2][:k].T), "subtract the mean before"),
        (lambda x, k: (x.mean(0), torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:k]), "one column per code"),
        (lambda x, k: (x.mean(0), torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:, :k]), "rows of an SVD's Vh"),
        (directions(lambda vectors, values, k: vectors[-k:].T), "rows of an SVD's Vh"),
        (directions(lambda vectors, values, k: vectors[:, -k:] * values[-k:].sqrt()), "length 1"),
        (directions(lambda vectors, values, k: 2 * vectors[:, -k:]), "length 1"),
        (in_place, "not x -="),
        (lambda x, k: (x.mean(), best_linear(x, k)[1]), "one entry per pixel"),
        (lambda x, k: (x.mean(1), best_linear(x, k)[1]), "one entry per pixel"),
        (lambda x, k: (torch.zeros(x.shape[1]), best_linear(x, k)[1]), "mean over images"),
        (lambda x, k: (x.mean(0), best_linear(x / x.std(0), k)[1]), "nothing is divided"),
    ],
    "01.4": [
        (lambda x, y: (x - y).square().mean().sqrt(), "square root"),
        (lambda x, y: (x - y).square().flatten(1).sum(1).mean(), "this is a sum"),
        (lambda x, y: (x - y).square().sum(), "this is a sum"),
        (lambda x, y: (x - y).square().sum(1).mean(), "this is a sum"),
        (lambda x, y: 0.5 * (x - y).square().mean(), "has none"),
        (lambda x, y: (x - y).var(correction=0), "variance of the error"),
        (lambda x, y: (x - y).var(), "variance of the error"),
        (lambda x, y: (x - y).square().flatten(1).mean(1), "one v for all"),
        (lambda x, y: (x - y).square().mean(0), "one v for all"),
        (lambda x, y: 1 / (x - y).square().mean(), "derivative"),
        (lambda x, y: (x - y).abs().mean(), "derivative"),
        (lambda x, y: (x - y).square().median(), "derivative|has none"),
        (lambda x, y: (x - y).square().sum() / (x.numel() - 1), "one value too many or too few"),
        (lambda x, y: x.var(), "derivative"),
    ],
    "01.6": [
        (forgets_generator, "pass generator"),
        (fixed_seed, "another one with a fixed seed"),
        (one_draw, "eps needs n rows"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + flat.std(0) * eps), "one by one"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + flat.var(0) * eps), "square root of the covariance"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + eps @ cov), "square root of the covariance"),
        (gaussian(lambda flat, mean, cov: lambda eps: eps @ torch.linalg.cholesky(cov).T), "add the mean"),
        (gaussian(lambda flat, mean, cov: lambda eps: flat.mean() + eps @ torch.linalg.cholesky(cov).T),
         "value by value"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + eps @ torch.linalg.cholesky(cov).T), "zero eigenvalues"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + eps @ torch.linalg.cholesky(cov)),
         "wrong side"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + eps @ torch.linalg.cholesky(flat.T @ flat / len(flat)).T),
         "square root|one by one"),
        (lambda z: lambda n, generator: z[torch.randint(len(z), (n,), generator=generator)], "given latents again"),
        (gaussian(wrong_side), "wrong side"),
        (gaussian(no_root), "square root of the covariance"),
        (gaussian(no_clamp), "zero eigenvalues"),
        (lambda z: lambda n, generator: torch.randn(n, z[0].numel(), generator=generator), "reshape"),
        (lambda z: lambda n, generator: torch.randn(n, *z.shape[1:], generator=generator), "add the mean"),
    ],
}
