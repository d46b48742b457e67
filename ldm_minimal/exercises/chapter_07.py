"""Checks of the exercises of chapter 7: samplers."""

import torch
from torch import Tensor

from ..checks import close, cosine, exercise, integer, noise, uniform


def _number(low: float, high: float, seed: int) -> float:
    return float(uniform(low, high, 1, seed=seed))


def _spread(t, std: float) -> Tensor:
    """Standard deviation of z_t, where that of the data is std."""
    alpha, sigma = cosine(t)
    return (alpha**2 * std**2 + sigma**2).sqrt()


def _ideal(mean: float, std: float, asked: list, labels: list):
    """The best denoiser for data N(mean, std^2). It notes the times and the labels that it was asked about."""
    def denoise(zt, t, y):
        t = torch.as_tensor(t)
        if tuple(t.shape) != tuple(zt.shape[:1]):
            raise ValueError(f"the denoiser takes one time for each sample, t (B,), and got {tuple(t.shape)}: "
                             "t.expand(len(zt))")
        t = t.double()
        asked.append(float(t[0]))
        labels.append(y)
        shape = (-1,) + (1,) * (zt.ndim - 1)
        alpha, gain = cosine(t)[0].reshape(shape), (std / _spread(t, std)).reshape(shape) ** 2
        return mean + alpha * gain * (zt - alpha * mean)
    return denoise


def _even(begin: float, end: float, steps: int) -> Tensor:
    """Times with equal steps in log(alpha / sigma), for the cosine schedule."""
    ends = torch.tensor([begin, end], dtype=torch.float64)
    clock = -torch.log(torch.tan(ends * (torch.pi / 2)))
    return torch.atan(torch.exp(-torch.linspace(*clock.tolist(), steps + 1, dtype=torch.float64))) * (2 / torch.pi)


def _exact(z: Tensor, times: Tensor, mean: float, std: float) -> Tensor:
    """Where the probability-flow ODE takes z, from the first to the last of the times."""
    begin, end = times[0], times[-1]
    return cosine(end)[0] * mean + _spread(end, std) / _spread(begin, std) * (z - cosine(begin)[0] * mean)


def _inner(count: int, seed: int) -> Tensor:
    """`count` times between 0.1 and 0.9, rising, one in the middle half of each of `count` equal slices."""
    return 0.1 + 0.8 * (torch.arange(count) + uniform(0.25, 0.75, count, seed=seed).double()) / count


@exercise("07.1", "what DDPM forgets", points=2)
def _(answer):
    c = float(answer)
    clock = [float(torch.log(a / b)) for a, b in (cosine(torch.tensor(t, dtype=torch.float64)) for t in (0.8, 0.4))]
    sigma, sigma_s = (float(cosine(torch.tensor(t, dtype=torch.float64))[1]) for t in (0.8, 0.4))
    ratio = float(torch.tensor(clock[0] - clock[1]).exp())  # of the signal-to-noise amplitudes
    right = sigma_s * ratio
    yield ("it is between 0 and sigma at t = 0.4", 0 < c < sigma_s * 1.01,
           "z_0.4 holds noise of amplitude sigma_0.4 in all, and eps has a part of it: lambda_t - lambda_s is negative")
    yield ("it is not DDIM's number", not close(c, sigma_s, 2e-3),
           "sigma at 0.4 is what eta = 0 keeps, all of it; at eta = 1 part of the noise is drawn afresh")
    yield ("it is the factor of eps", not close(c, right / sigma, 2e-3),
           "this is the factor of z_t; eps stands in z_t with the factor sigma_t")
    yield ("it is an amplitude", not close(c, right**2, 5e-3) and not close(c, sigma_s * ratio**2, 2e-3),
           "this is a variance, or holds one: take the root")
    yield ("it is one factor for the way, not one for each end", not close(c, ratio, 2e-3),
           "exp(lambda_t - lambda_s) is right, but sigma_s, what z_s has of noise in all, is missing")
    yield ("it is not what is drawn afresh", not close(c, sigma_s * (1 - ratio**2) ** 0.5, 2e-3),
           "this is tau; what is left of eps is the other part, sqrt(sigma_s^2 - tau^2)")
    yield ("it does not depend on the number of steps", close(c, right, 2e-3),
           "one step gives sqrt(sigma_s^2 - tau^2), with tau^2 = sigma_s^2 (1 - SNR_t / SNR_s)")


@exercise("07.2", "the integral without the shortcut", points=3)
def _(exact_weight):
    h = torch.cat([uniform(0.05, 0.5, 2, seed=1), uniform(1, 3, 2, seed=2)]).double().reshape(2, 2)
    h_last = uniform(0.2, 2, 2, 2, seed=3).double()
    before, before_last = h.clone(), h_last.clone()
    found = exact_weight(h, h_last)
    yield ("the factor has the shape of h", getattr(found, "shape", None) == h.shape,
           "answer elementwise, for tensors of one shape")
    yield ("h and h_last are not overwritten", torch.equal(h, before) and torch.equal(h_last, before_last),
           "work out of place")
    yield ("it is not the shortcut", not close(found, h / (2 * h_last), 1e-3),
           "h / (2 h_last) is the 2M that the chapter has; here the integral is wanted exactly")
    yield ("the line rises in the direction of the step", bool((found > 0).all()),
           "a sign: in the exponent or of the extrapolation; lambda grows along the way, so the weight is exp(+u)")
    yield ("h_last enters as 1 / h_last", close(found * h_last, exact_weight(h, 2 * h_last) * 2 * h_last, 1e-6),
           "the slope of the line is (z0 - z0_last) / h_last")
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * h[..., None]  # the midpoint rule
    right = (torch.exp(u) * u).sum(-1) / torch.exp(u).sum(-1) / h_last
    falling = (torch.exp(-u) * u).sum(-1) / torch.exp(-u).sum(-1) / h_last
    yield ("the weight grows with lambda", not close(found, falling), "the weight is exp(+u), not exp(-u)")
    yield ("it is the mean of u / h_last with the weight exp(u)", close(found, right, 1e-5),
           "divide the integral of exp(u) u / h_last by that of exp(u), which is exp(h) - 1")
    small = uniform(0.5e-5, 2e-5, 50, seed=4).double()
    yield ("for short steps it is h / (2 h_last)", close(exact_weight(small, small), 0.5, 1e-3),
           "digits are lost in a difference of nearly equal numbers: compute in float64, and use torch.expm1(h)")


@exercise("07.3", "Heun's method", points=2)
def _(heun):
    steps, mean, std = integer(3, 6, seed=1), _number(0.5, 1, 2), _number(0.35, 0.6, 3)
    z, y, asked, labels = noise(5, 2, 3, seed=4).double(), torch.tensor([3, 1, 4, 1, 5]), [], []
    times = torch.cat([torch.zeros(1), _inner(steps - 1, seed=5), torch.ones(1)]).double().flip(0)
    before = z.clone()
    out = heun(_ideal(mean, std, asked, labels), z, y, cosine, times)
    yield ("the answer is one latent of the shape of the start", getattr(out, "shape", None) == z.shape,
           "return the last z_s, not a list or a generator")
    yield "the start is not overwritten", torch.equal(z, before), "work out of place"
    yield "the labels are handed on", all(torch.equal(torch.as_tensor(each), y) for each in labels), (
        "every call is denoise(z, t, y), with the y that was given")
    yield ("the denoiser is not asked at t = 0", min(asked, default=1) > 0,
           "on the last step there is nothing to ask: land on z0_hat with one evaluation")
    yield (f"{steps} steps cost {2 * steps - 1} evaluations", len(asked) == 2 * steps - 1,
           f"you spent {len(asked)}: two in each step, one in the last")
    yield ("each step asks at its own time and at the next one",
           close(asked, times[:-1].repeat_interleave(2)[1:], 1e-9),
           "the second evaluation belongs to the trial latent and to its time s")
    starts, y, errors = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], torch.zeros(5, dtype=torch.long), []
    ends = _number(0.96, 0.985, 6), _number(0.015, 0.04, 7)
    for steps in (40, 80):
        grid = _even(*ends, steps)
        found = heun(_ideal(mean, std, [], []), starts, y, cosine, grid)
        errors.append(float((found - _exact(starts, grid, mean, std)).abs().max()))
    order = float(torch.log2(torch.tensor(errors[0] / errors[1])))
    yield (f"twice the steps, a quarter of the error (order {order:.2f})", 1.8 < order < 2.3 and errors[1] < 2e-3,
           "repeat the step from z_t (not from the trial) with the mean of the two estimates of z0")
    known, (alpha, sigma) = noise(5, 2, 3, seed=8).double(), cosine(times[-2])
    landed, near = (heun(lambda zt, t, y: known.clone(), z, torch.zeros(5, dtype=torch.long), cosine, way) for way in (times, times[:-1]))
    yield ("with z0 known every step keeps the noise, the one from t = 1 too", close(near, alpha * known + sigma * z, 1e-6),
           "from alpha z0 + sigma eps to alpha_s z0 + sigma_s eps, as `step` does it, which divides by sigma and not by alpha")
    yield ("the last step lands on z0_hat", close(landed, known, 1e-6), (
        "one evaluation less is not one step less: take the last step as well"))


@exercise("07.4", "from an image to its noise, and back", points=2)
def _(invert):
    z0, eps = noise(3, 2, 4, 5, seed=2).double(), noise(3, 2, 4, 5, seed=3).double()
    begin, steps, mean, std = _number(0.005, 0.03, 4), integer(3, 6, seed=5), _number(0.5, 1, 6), _number(0.35, 0.6, 7)
    times = torch.cat([torch.tensor([begin]), _inner(steps - 1, seed=8), torch.ones(1)]).double()
    (alpha, sigma), (alpha_end, sigma_end) = cosine(times[0]), cosine(times[-1])
    start, y = alpha * z0 + sigma * eps, torch.tensor([2, 7, 1])
    before = start.clone()
    out = invert(lambda zt, t, y: z0.clone(), start, y, cosine, times)
    yield ("the answer is one latent of the shape of the start", getattr(out, "shape", None) == z0.shape,
           "return the latent at times[-1]")
    yield "the start is not overwritten", torch.equal(start, before), "work out of place"
    yield ("it ends where the noise is, at times[-1]", not close(out, start, 0, 0.5),
           "the way goes up: iterate over the times as they are")
    yield ("with z0 known it finds the noise exactly", close(out, alpha_end * z0 + sigma_end * eps, 1e-6),
           "from each time to the next: alpha_s z0 + sigma_s eps (`step` with eta = 0), without noise of your own")
    starts, y = mean + std * torch.linspace(-2.5, 2.5, 5, dtype=torch.float64)[:, None], torch.arange(5)
    ends = _number(0.96, 0.985, 9), _number(0.015, 0.04, 10)
    grid, asked, labels = _even(*ends, 200).flip(0), [], []
    out = invert(_ideal(mean, std, asked, labels), starts, y, cosine, grid)
    yield "the labels are handed on", all(torch.equal(torch.as_tensor(each), y) for each in labels), (
        "every call is denoise(z, t, y), with the y that was given")
    yield ("rounds=0: the denoiser is asked once a step, at the time the latent is at", close(asked, grid[:-1], 1e-9),
           "ask before the step, at the lower of its two times, once for each pair of neighbors")
    yield ("Gaussian data: the distance from the mean, in standard deviations, is kept",
           close(out, _exact(starts, grid, mean, std), 0, 0.05),
           "the exact map is missed: one step for each pair of neighbors?")
    grid, asked, rounds = _even(*ends, 20).flip(0), [], integer(2, 3, seed=11)
    out = invert(_ideal(mean, std, asked, []), starts, y, cosine, grid, rounds)
    yield (f"rounds={rounds}: {1 + rounds} questions a step", len(asked) == 20 * (1 + rounds),
           f"you asked {len(asked)} times in 20 steps: one for the step, and one for each round")
    yield ("a round asks at the time of arrival",
           close(asked, torch.stack([grid[:-1], *[grid[1:]] * rounds], dim=1).flatten(), 1e-9),
           "the step has arrived at the upper of its two times: that time belongs to the latent there")
    back = invert(_ideal(mean, std, [], []), starts, y, cosine, grid, 15)
    for t, s in zip(grid.flip(0)[:-1], grid.flip(0)[1:]):  # DDIM, down
        (alpha, sigma), (alpha_s, sigma_s) = cosine(t), cosine(s)
        guess = _ideal(mean, std, [], [])(back, t.expand(5), y)
        back = alpha_s * guess + sigma_s * (back - alpha * guess) / sigma
    yield ("with 15 rounds DDIM returns to the start exactly", close(back, starts, 0, 1e-4),
           "each round repeats the step from where it began (not from where it arrived), with the new estimate")
