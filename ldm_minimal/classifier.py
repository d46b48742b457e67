r"""A small classifier whose last features measure how alike two sets of images are.

The Frechet distance needs features that know the data. The usual Inception network has seen photographs, not 28 x 28
clothes; this one is trained on the data set itself. Its distances are not comparable with those of papers, and are
named so.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Downsample, ResBlock, group_norm
from .options import option


@dataclass(frozen=True)
class ClassifierConfig:
    in_channels: int = 1  # image channels
    channels: tuple[int, ...] = option((32, 64, 96), "channels per resolution; the last is the number of features")
    num_classes: int = 10  # number of classes


class Classifier(nn.Module):
    """features: x (B, 1, H, W) in [-1, 1] -> (B, channels[-1]); forward: -> (B, num_classes) logits."""

    def __init__(self, config: ClassifierConfig = ClassifierConfig()):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, config.channels[0], 3, padding=1)]
        for level, width in enumerate(config.channels):
            if level > 0:
                layers.append(Downsample(config.channels[level - 1], width))
            layers.append(ResBlock(width, width))
        self.layers = nn.Sequential(*layers, group_norm(width), nn.SiLU())
        self.head = nn.Linear(width, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x).float().mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def classifier_loss(classifier: Classifier, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Cross-entropy (B,), on images moved by up to two pixels. Never mirrored: shoes have a direction."""
    side = x.shape[-1]
    where = generator.device if generator is not None else x.device
    shift = torch.randint(0, 5, (2,), generator=generator, device=where).to(x.device)
    rows, columns = shift[:, None] + torch.arange(side, device=x.device)
    x = F.pad(x, (2, 2, 2, 2), value=-1.0)[:, :, rows[:, None], columns]
    return F.cross_entropy(classifier(x).float(), y, reduction="none")
