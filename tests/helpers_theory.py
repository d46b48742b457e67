"""Closed forms and tiny networks that several test files share.

For data z0 ~ N(m, s^2) the marginal of z_t is N(alpha m, alpha^2 s^2 + sigma^2). So the best denoiser E[z0 | z_t] and
the map of the probability-flow ODE are known exactly, and a sampler can be tested without a trained network.
"""

import torch
from torch import nn

from ldm_minimal.denoiser import TARGETS
from ldm_minimal.schedule import expand


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def shake(net, std=0.2):
    """Every parameter moved at random: what is initialised to zero then counts."""
    generator = seeded(1)
    for parameter in net.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)
    return net


class Gaussian:
    """Data N(mean, std^2), independent in every dimension."""

    def __init__(self, mean=0.7, std=0.4):
        self.mean, self.std = mean, std

    def std_at(self, alpha, sigma):
        return torch.sqrt(alpha**2 * self.std**2 + sigma**2)

    def best_z0(self, zt, alpha, sigma):
        return self.mean + alpha * self.std**2 / self.std_at(alpha, sigma) ** 2 * (zt - alpha * self.mean)

    def denoiser(self, schedule):
        return lambda zt, t, y: self.best_z0(zt, *schedule(expand(t, zt)))

    def flow_map(self, zt, now, nxt):
        """Where the probability-flow ODE takes z_t: the distance from the mean, in standard deviations, is kept."""
        return nxt[0] * self.mean + self.std_at(*nxt) / self.std_at(*now) * (zt - now[0] * self.mean)


class ZeroNet(nn.Module):
    """What a zero-initialised network says. Keeps the last (zt, t, y) that it was called with."""

    num_classes = 10

    def forward(self, zt, t, y):
        self.seen = zt, t, y
        return torch.zeros_like(zt)


class TinyNet(nn.Module):
    """A 3x3 convolution that also listens to t and y; height and width are not interchangeable in it."""

    def __init__(self, channels=2, num_classes=3, seed=0, dtype=torch.float64):
        super().__init__()
        self.num_classes = num_classes
        self.conv = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), dtype=dtype)
        self.label = nn.Embedding(num_classes + 1, channels, dtype=dtype)
        with torch.no_grad():
            for i, weight in enumerate(self.parameters()):
                weight.copy_(0.5 * normal(*weight.shape, seed=seed + i))

    def forward(self, zt, t, y):
        return torch.sin(self.conv(zt) + self.label(y)[:, :, None, None] * (1 + t[:, None, None, None]))


class BestNet(nn.Module):
    """The network with the least loss on Gaussian data: E[a z0 + b eps | z_t] for any target."""

    num_classes = 10

    def __init__(self, gaussian, schedule, target):
        super().__init__()
        self.gaussian, self.schedule, self.target = gaussian, schedule, target

    def forward(self, zt, t, y):
        alpha, sigma = self.schedule(expand(t, zt))
        z0 = self.gaussian.best_z0(zt, alpha, sigma)
        a, b = TARGETS[self.target](alpha, sigma)
        return a * z0 + b * (zt - alpha * z0) / sigma
