r"""The U-Net: a denoiser that looks at a latent at two or more sizes at once.

    down   every block's output goes on a stack;        7x7 -> 4x4
    middle residual block, attention, residual block
    up     every block takes one output off the stack;  4x4 -> 7x7

Two sizes with two blocks each are the four blocks of the classic exercise, laid out for a 7x7 latent, where a
second halving would leave 2x2. Time and label become one vector that scales and shifts every block.
The last convolution starts at zero, so the first prediction is zero and the first loss is the target's mean square.

Papers: U-Net 1505.04597; for diffusion 2006.11239, 2105.05233.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import (
    Attention, Downsample, LabelEmbedding, ResBlock, Upsample, check_latents, group_norm, timestep_embedding,
    zero_init,
)
from .options import option


@dataclass(frozen=True)
class UNetConfig:
    channels: tuple[int, ...] = option((64, 128), "channels per resolution; each further entry halves the latent")
    blocks: int = option(2, "residual blocks per resolution on the way down (one more on the way up)")
    attention: bool = option(True, "attention at the lowest resolution (the middle always has it)")
    in_channels: int = 4  # channels of what is denoised
    num_classes: int = 10  # number of labels (label num_classes is the null label)

    def __post_init__(self):
        if not self.channels or min(*self.channels, self.blocks) < 1:
            raise ValueError(f"channels and blocks must be at least 1, got {self.channels} and {self.blocks}")


class UNet(nn.Module):
    """net(zt, t, y) -> like zt, for any height and width."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config, self.num_classes = config, config.num_classes
        first, last = config.channels[0], config.channels[-1]
        dim = 2 * first
        self.embed_dim = first
        self.time = nn.Sequential(nn.Linear(first, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = LabelEmbedding(config.num_classes, dim)
        self.stem = nn.Conv2d(config.in_channels, first, 3, padding=1)

        def attention(level: int, width: int) -> nn.Module:
            return Attention(width) if config.attention and level == len(config.channels) - 1 else nn.Identity()

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        stack, width = [first], first  # channels of the outputs that the way up will take back
        for level, wide in enumerate(config.channels):
            if level > 0:
                self.down.append(Downsample(width, width))
                stack.append(width)
            for _ in range(config.blocks):
                self.down.append(nn.ModuleList([ResBlock(width, wide, dim), attention(level, wide)]))
                stack.append(width := wide)
        self.middle = nn.ModuleList([ResBlock(last, last, dim), Attention(last), ResBlock(last, last, dim)])
        for level, wide in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                self.up.append(nn.ModuleList([ResBlock(width + stack.pop(), wide, dim), attention(level, wide)]))
                width = wide
            if level > 0:
                self.up.append(Upsample(width, width))
        assert not stack, "every output of the way down must be taken back on the way up"
        last_conv = zero_init(nn.Conv2d(first, config.in_channels, 3, padding=1))
        self.out = nn.Sequential(group_norm(first), nn.SiLU(), last_conv)

    def forward(self, zt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """zt (B, C, h, w), t (B,) in [0, 1], y (B,) labels in 0 ... num_classes -> (B, C, h, w)."""
        check_latents(zt, t, y, self.config.in_channels)
        emb = self.time(timestep_embedding(t, self.embed_dim)) + self.label(y)  # (B, dim)
        h = self.stem(zt)  # (B, first, h, w)
        skips = [h]
        for part in self.down:
            if isinstance(part, Downsample):
                h = part(h)  # (B, width, ceil(h/2), ceil(w/2))
            else:
                block, attention = part
                h = attention(block(h, emb))
            skips.append(h)
        block, attention, block2 = self.middle
        h = block2(attention(block(h, emb)), emb)
        for part in self.up:
            if isinstance(part, Upsample):
                h = part(h, size=skips[-1].shape[2:])  # exactly the size that the next skip has: 4 -> 7
            else:
                block, attention = part
                h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
        assert not skips, "an output of the way down was not used"
        return self.out(h)
