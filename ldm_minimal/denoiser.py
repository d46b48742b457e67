r"""The denoiser: a network, a schedule and a target make one function (z_t, t, y) -> estimate of z0.

The network predicts a mixture a * z0 + b * eps. With z_t = alpha * z0 + sigma * eps that is a 2x2 system:

    out = a z0 + b eps          eps   a =  0      b = 1        noise             2006.11239
    z_t = alpha z0 + sigma eps  x0    a =  1      b = 0        data
                                v     a = -sigma  b = alpha    velocity          2202.00512
    z0 = (b z_t - sigma out)    flow  a = -1      b = 1        eps - z0          2209.03003, 2403.03206
         -------------------
          alpha b - sigma a     determinant: alpha (eps), -sigma (x0), alpha^2 + sigma^2 (v), alpha + sigma (flow)

The determinant says where a target is safe: eps says nothing of z0 where alpha = 0, v and flow are safe everywhere.
The loss is the mean squared error of the prediction, one number for each sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import at_least_float32, draw
from .options import option
from .schedule import SCHEDULES, expand

TIMES = ("uniform", "logit_normal")
TARGETS = {
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
}


@dataclass(frozen=True)
class DenoiserConfig:
    schedule: str = option("cosine", "noise schedule", tuple(SCHEDULES))
    target: str = option("v", "what the network predicts", tuple(TARGETS))
    times: str = option("uniform", "distribution of t in training", TIMES)
    drop: float = option(0.1, "share of labels replaced by the null label, for guidance")


def to_z0(out: Tensor, zt: Tensor, alpha: Tensor, sigma: Tensor, target: str) -> Tensor:
    """Solve the 2x2 system for z0. All tensors broadcast together.

    For the eps target alpha is floored at 1e-3: below that the division would only amplify the network's error.
    """
    a, b = TARGETS[target](alpha, sigma)
    determinant = alpha * b - sigma * a
    if target == "eps":
        determinant = determinant.clamp(min=1e-3)
    if target == "x0":  # the same solution, without 0 / 0 where sigma = 0
        return out
    return (b * zt - sigma * out) / determinant


def stratified(shape: tuple[int], **where) -> Tensor:
    """(n,) numbers in (0, 1): one in each of n equal slices, in random order."""
    return (torch.randperm(shape[0], **where) + torch.rand(shape, **where)) / shape[0]


def draw_times(batch: int, generator: torch.Generator | None = None, times: str = "uniform", device="cpu") -> Tensor:
    """(B,) times in (0, 1), stratified: one in each of `batch` equal slices of probability, in random order.

    Every batch covers all noise levels, so the loss is less noisy than with independent times; the permutation keeps
    a sample's time independent of its place in the batch. "logit_normal": sigmoid of a standard normal, which
    puts more weight on the middle (2403.03206, section 3.1).
    """
    if times not in TIMES:
        raise ValueError(f"unknown times {times!r}, choose from {', '.join(TIMES)}")
    t = draw(stratified, (batch,), generator, device).clamp(1e-5, 1 - 1e-5)
    return torch.sigmoid(torch.special.ndtri(t)) if times == "logit_normal" else t


def drop_labels(y: Tensor, null: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace each label by `null` with probability `share`, independently (2207.12598, algorithm 1)."""
    return y.masked_fill(draw(torch.rand, y.shape, generator, y.device) < share, null)


class Denoiser(nn.Module):
    """Denoiser(net, schedule, target): forward gives the estimate of z0, loss gives the training loss.

    net:      called as net(zt, t, y) -> like zt; its attribute num_classes is the null label
    schedule: t -> (alpha, sigma)
    target:   one of TARGETS
    drop:     probability with which `loss` hides a label
    times:    how `loss` draws t, see draw_times
    """

    def __init__(self, net: nn.Module, schedule, target: str = "v", drop: float = 0.1, times: str = "uniform"):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}, choose from {', '.join(TARGETS)}")
        if not 0 <= drop <= 1:
            raise ValueError(f"drop is a probability, got {drop}")
        self.net, self.schedule, self.target, self.drop, self.times = net, schedule, target, drop, times

    @property
    def null(self) -> int:
        return self.net.num_classes

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t) as (B, 1, 1, 1), computed in float64 where t lives and then moved to `like`."""
        alpha, sigma = self.schedule(expand(t.double(), like))
        return alpha.to(like), sigma.to(like)

    def forward(self, zt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """zt (B, C, h, w), t (B,) in (0, 1], y (B,) -> the estimate of z0, (B, C, h, w) in float32 or more."""
        alpha, sigma = self.rates(t, zt)
        out = self.net(zt, t.to(zt), y)
        return to_z0(out.to(zt.dtype), zt, alpha, sigma, self.target)

    def loss(self, z0: Tensor, y: Tensor, generator: torch.Generator | None = None, t: Tensor | None = None,
             eps: Tensor | None = None) -> Tensor:
        """Mean squared error of the prediction for each sample: (B,). t and eps are drawn where not given."""
        if t is None:
            t = draw_times(len(z0), generator, self.times, z0.device)
        if eps is None:
            eps = draw(torch.randn, z0.shape, generator, z0.device).to(z0)
        y = drop_labels(y, self.null, self.drop, generator)
        alpha, sigma = self.rates(t, z0)
        a, b = TARGETS[self.target](alpha, sigma)
        out = self.net(alpha * z0 + sigma * eps, t.to(z0), y)
        return (at_least_float32(out) - (a * z0 + b * eps)).square().flatten(1).mean(1)

    def noise_loss(self, loss: Tensor, t: Tensor) -> Tensor:
        """The same errors as errors of the noise prediction: (alpha / determinant)^2 times the loss, (B,).

        From the 2x2 system: an error d in `out` is -sigma d / determinant in z0, and alpha d / determinant in eps.
        """
        alpha, sigma = self.schedule(t.double())
        a, b = TARGETS[self.target](alpha, sigma)
        return ((alpha / (alpha * b - sigma * a)) ** 2).to(loss) * loss
