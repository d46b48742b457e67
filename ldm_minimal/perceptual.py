r"""The autoencoder as the field trains it: two more judges, which see texture where pixel errors see brightness.

    loss        = reconstruction + beta KL + p * pixels * perceptual + a * adversarial               for each image
    perceptual  = sum over layers, mean over places, of |u(x) - u(x_hat)|^2,    u = f / |f|, f a layer's channels
    adversarial = - mean over patches of D(x_hat)
    D's loss    =   mean over patches of max(0, 1 - D(x)) + max(0, 1 + D(x_hat))                          hinge

f are the maps of a small classifier, trained beforehand and then fixed; it is not the one that measures samples, or
the measure would be trained upon. D says for each patch whether it is real. It learns from the first step and is
listened to only after `start`: before that it would lead the decoder astray.

a is a plain number, chosen so that D's loss stays below 2. 2012.09841 (eq. 7) takes the ratio of the two terms' pulls
on the decoder's last weights instead; here that ratio ran away: where D knows nothing its pull is nearly zero, the
ratio lends it a weight of thousands, and D does not recover (book/trials.md). A plain weight keeps a clueless D silent.

With `decoder_only` the encoder stays as it is: then the latents, their scale and every denoiser stay valid, and the
decoder learns to paint the texture that the latents do not hold.

Papers: LPIPS 1801.03924; patches 1611.07004; hinge 1802.05957; all together 2012.09841, 2112.10752.
"""

from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import group_norm
from .options import option
from .vae import VAE, vae_terms


@dataclass(frozen=True)
class PerceptualConfig:
    perceptual: float = option(0.0, "p: weight of the perceptual term, per pixel")
    adversarial: float = option(0.0, "a: weight of the adversarial term")
    width: int = option(32, "channels of the discriminator's first layer; the next have twice and four times as many")
    speed: float = option(1.0, "the discriminator's learning rate, in multiples of the autoencoder's")
    start: float = option(0.2, "share of the steps before the discriminator is listened to")
    decoder_only: bool = option(False, "leave the encoder as it is")

    def __post_init__(self):
        for name in ("perceptual", "adversarial", "speed"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.width < 1:
            raise ValueError(f"width must be >= 1, got {self.width}")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start is a share of the steps, 0 ... 1, got {self.start}")


class FeatureNet(nn.Module):
    """A plain stack of convolutions (in the manner of 1409.1556): maps at three resolutions, and class logits."""

    WIDTHS = (16, 32, 64)

    def __init__(self, in_channels: int = 1, num_classes: int = 10):
        super().__init__()
        widths, stages = (in_channels, *self.WIDTHS), []
        for before, width in zip(widths, self.WIDTHS):
            stages.append(nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(width, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):  # without norms, the size of a signal must survive each ReLU (1502.01852)
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def maps(self, x: Tensor) -> list[Tensor]:
        """x (B, 1, H, W) -> maps (B, 16, H, W), (B, 32, H/2, W/2), (B, 64, H/4, W/4)."""
        maps = []
        for stage in self.stages:
            x = stage(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """-> (B, num_classes) logits; trained with classifier.classifier_loss."""
        return self.head(self.maps(x)[-1].float().mean(dim=(2, 3)))


def perceptual_distance(net: FeatureNet, x: Tensor, x_hat: Tensor) -> Tensor:
    """(B,): 0 for equal images, at most 2 for each layer (after a ReLU no two maps point apart). x has no gradient."""
    with torch.no_grad():
        real = net.maps(x)
    distance = torch.zeros(len(x), device=x.device)
    for a, b in zip(real, net.maps(x_hat)):
        a, b = (F.normalize(v.float(), dim=1, eps=1e-3) for v in (a, b))  # each place to length 1
        distance = distance + (a - b).square().sum(1).mean(dim=(1, 2))
    return distance


class PatchDiscriminator(nn.Module):
    """x (B, 1, H, W) -> logits (B, 1, H/4, W/4), > 0 means real. The convolutions of each see 18 x 18 pixels (only the
    norms' mean and spread come from the whole image)."""

    def __init__(self, in_channels: int = 1, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), group_norm(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), group_norm(4 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss for each image: (B,). 2 where it says nothing, 0 where every patch is told apart."""
    return (F.relu(1 - real) + F.relu(1 + fake)).flatten(1).mean(1)


class PerceptualVAE(nn.Module):
    """A VAE in training, with the discriminator that it is trained against: one network, one loss, one optimizer."""

    def __init__(self, vae: VAE, config: PerceptualConfig):
        super().__init__()
        self.vae, self.config = vae, config
        self.discriminator = PatchDiscriminator(vae.config.in_channels, config.width) if config.adversarial else None
        vae.encoder.requires_grad_(not config.decoder_only)

    def groups(self) -> list[dict]:
        """What the optimizer is to move, and how fast in multiples of the learning rate (two rates: 1706.08500)."""
        groups = [{"params": list(self.vae.parameters())}]
        if self.discriminator is not None:
            groups.append({"params": list(self.discriminator.parameters()), "speed": self.config.speed})
        return groups

    def loss(self, x: Tensor, features: FeatureNet | None = None, progress: float | Tensor = 1.0,
             generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """x (B, 1, H, W) in [-1, 1] -> "loss" and its terms, each (B,). progress: share of the training done."""
        x_hat, reconstruction, regularization = vae_terms(self.vae, x, generator)
        terms, judged = {"reconstruction": reconstruction, "kl": regularization}, reconstruction
        if self.config.perceptual:
            if features is None:
                raise ValueError(f"the perceptual term (weight {self.config.perceptual:g}) needs a FeatureNet")
            terms["perceptual"] = perceptual_distance(features, x, x_hat)
            judged = judged + self.config.perceptual * x[0].numel() * terms["perceptual"]
        loss = judged + self.vae.config.beta * regularization
        if self.discriminator is not None:
            terms["discriminator"] = hinge_loss(self.discriminator(x), self.discriminator(x_hat.detach()))
            loss = loss + terms["discriminator"]  # D's turn: it saw x_hat as a picture without a history
            self.discriminator.requires_grad_(False)  # the decoder's turn: gradients go through D, not to D
            adversarial = -self.discriminator(x_hat).flatten(1).mean(1)
            self.discriminator.requires_grad_(True)
            loss = loss + self.config.adversarial * (progress >= self.config.start) * adversarial
        return {"loss": loss} | terms
