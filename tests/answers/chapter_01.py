"""Right and wrong answers to the exercises of chapter 1, a variational autoencoder."""

import torch


def kl_between(mean_q, logvar_q, mean_p, logvar_p):
    ratio = (logvar_q - logvar_p).exp() + (mean_q - mean_p) ** 2 / logvar_p.exp()
    return 0.5 * (ratio - 1 - logvar_q + logvar_p).flatten(1).sum(1)


def best_linear(x, k):
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    return mean, vectors[:, -k:]


def best_variance(x, x_hat):
    return (x - x_hat).square().mean()


def fit_gaussian(z):
    flat = z.flatten(1)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    root = vectors * values.clamp(min=0).sqrt()

    def sample(n, generator):
        eps = torch.randn(n, len(mean), generator=generator).to(z)
        return (mean + eps @ root.T).reshape(n, *z.shape[1:])
    return sample


def in_place(x, k):
    x -= x.mean(0)
    return x.mean(0), torch.linalg.eigh(x.T @ x)[1][:, -k:]


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


def wrong_side(flat, mean, cov):
    values, vectors = torch.linalg.eigh(cov)
    return lambda eps: mean + eps @ (vectors * values.clamp(min=0).sqrt())


SOLUTIONS = {"01.1": kl_between, "01.2": 6e-4, "01.3": best_linear, "01.4": best_variance, "01.6": fit_gaussian}
right = kl_between
WRONG = {
    "01.1": [
        (lambda mq, lq, mp, lp: right(mp, lp, mq, lq), "changed places"),
        (lambda mq, lq, mp, lp: right(mq, lq, mp, lp) / 40, "mean over the latent values"),
        (lambda mq, lq, mp, lp: right(mq, lq, mp, lp).mean(), "all axes but the first"),
        (lambda mq, lq, mp, lp: 2 * right(mq, lq, mp, lp), "every term is halved"),
        (lambda mq, lq, mp, lp: right(mq, lq, mp, lp) + 20, "a term is missing"),
        (lambda mq, lq, mp, lp: 0.5 * ((lq - lp).exp() + (mq - mp) ** 2 - 1 - lq + lp).flatten(1).sum(1),
         "divided by the variance of p"),
        (lambda mq, lq, mp, lp: 0.5 * (((lq - lp) / 2).exp() + (mq - mp) ** 2 / (lp / 2).exp() - 1 - (lq - lp) / 2)
         .flatten(1).sum(1), "the one of the chapter"),
    ],
    "01.2": [(1.2e-3, "no 1/2"), (1e-4 * 256 / 3072, "larger, not smaller"), (1e-4 * 256 / 3072 / 2, "larger, not"),
             (1e-4 * 3072 / 2, "number of latent values"), (1e-4, "write both losses with sums")],
    "01.3": [
        (lambda x, k: (x.mean(0), torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)))[1][:, :k]), "sorts upwards"),
        (lambda x, k: (x.mean(0), torch.linalg.eigh(x.T @ x)[1][:, -k:]), "subtract the mean first"),
        (lambda x, k: (x.mean(0), torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:k]), "one column per code"),
        (lambda x, k: (x.mean(0), torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:, :k]), "subtract the mean|sorts|orthonormal"),
        (in_place, "not x -="),
        (lambda x, k: (x.mean(0), best_linear(x, k)[1] * 2), "length 1"),
        (lambda x, k: (x.mean(), best_linear(x, k)[1]), "one entry per pixel"),
    ],
    "01.4": [
        (lambda x, y: (x - y).square().mean().sqrt(), "square root"),
        (lambda x, y: (x - y).square().flatten(1).sum(1).mean(), "this is a sum"),
        (lambda x, y: (x - y).square().sum(), "this is a sum"),
        (lambda x, y: 0.5 * (x - y).square().mean(), "has none"),
        (lambda x, y: (x - y).var(correction=0), "variance of the error|derivative"),
        (lambda x, y: (x - y).abs().mean(), "derivative"),
    ],
    "01.6": [
        (forgets_generator, "pass generator"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + flat.std(0) * eps), "one by one"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + eps @ cov), "square root of the covariance"),
        (gaussian(lambda flat, mean, cov: lambda eps: eps @ torch.linalg.cholesky(cov).T), "add the mean"),
        (gaussian(lambda flat, mean, cov: lambda eps: mean + eps @ torch.linalg.cholesky(cov).T), "zero eigenvalues|stopped with"),
        (gaussian(wrong_side), "square root|one by one"),
        (lambda z: lambda n, generator: torch.randn(n, z[0].numel(), generator=generator), "reshape"),
    ],
}
