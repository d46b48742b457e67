r"""The diffusion transformer (DiT): the latent as a sequence of patches, time and label as modulation.

    tokens = linear(patches) + position
    x = x + gate1 * attention(modulate(norm(x), shift1, scale1))
    x = x + gate2 * mlp(modulate(norm(x), shift2, scale2))        modulate(x, shift, scale) = x * (1 + scale) + shift

The six vectors of a block come from one linear layer of silu(time + label), which starts at zero (adaLN-zero): at
first every block is the identity, and the prediction is zero. Positions are fixed sines and cosines of row and
column, so the network takes any height and width; sizes that no patch divides are padded and cropped.

Paper: 2212.09748.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import LabelEmbedding, attend, check_latents, timestep_embedding, zero_init
from .options import option


@dataclass(frozen=True)
class DiTConfig:
    width: int = option(128, "channels of a token")
    depth: int = option(6, "number of transformer blocks")
    heads: int = option(4, "attention heads")
    patch: int = option(1, "side of a patch in latent pixels")
    mlp: int = option(4, "hidden width of the MLP, in token widths")
    in_channels: int = 4  # channels of what is denoised
    num_classes: int = 10  # number of labels (label num_classes is the null label)

    def __post_init__(self):
        for name in ("width", "depth", "heads", "patch", "mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D); shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after by c (B, D).

    The paper's GELU is the tanh approximation. This is the exact one, as good and a little faster on a CPU.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = config.mlp * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        return self.project(attend(q, k, v).transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=1)  # 6 x (B, D)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """net(zt, t, y) -> like zt, for any height and width up to 64 patches a side."""

    def __init__(self, config: DiTConfig = DiTConfig()):
        super().__init__()
        if config.width % (4 * config.heads):
            raise ValueError(f"width {config.width} must be a multiple of 4 * heads = {4 * config.heads}")
        self.config, self.num_classes = config, config.num_classes
        width, values = config.width, config.in_channels * config.patch**2
        self.patches = nn.Linear(values, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = LabelEmbedding(config.num_classes, width)
        self.register_buffer("position", position_table(64, width // 2), persistent=False)  # (64, D/2)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation, self.out = zero_init(nn.Linear(width, 2 * width)), zero_init(nn.Linear(width, values))

    def forward(self, zt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """zt (B, C, h, w), t (B,) in [0, 1], y (B,) labels in 0 ... num_classes -> (B, C, h, w)."""
        check_latents(zt, t, y, self.config.in_channels)
        height, width, p = zt.shape[2], zt.shape[3], self.config.patch
        zt = F.pad(zt, (0, -width % p, 0, -height % p))
        rows, columns = zt.shape[2] // p, zt.shape[3] // p
        x = F.pixel_unshuffle(zt, p).flatten(2).transpose(1, 2)  # (B, N, C*p*p), N = rows * columns
        x = self.patches(x) + self.positions(rows, columns)  # (B, N, D)
        c = self.time(timestep_embedding(t, self.config.width)) + self.label(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        x = self.out(modulate(self.norm(x), shift, scale))  # (B, N, C*p*p)
        x = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (rows, columns)), p)
        return x[:, :, :height, :width]

    def positions(self, rows: int, columns: int) -> Tensor:
        """(N, D): half of the channels tell the row, half the column."""
        if max(rows, columns) > len(self.position):
            raise ValueError(f"{rows} x {columns} patches, but positions reach only {len(self.position)} a side")
        row = self.position[:rows, None].expand(rows, columns, -1)
        column = self.position[None, :columns].expand(rows, columns, -1)
        return torch.cat([row, column], dim=2).flatten(0, 1)


def position_table(length: int, dim: int) -> Tensor:
    """(length, dim) sines and cosines of 0 ... length - 1: the time embedding's formula at whole numbers."""
    return timestep_embedding(torch.arange(length) / 1000, dim)
