r"""The building blocks that the VAE, the U-Net and the DiT share.

    ResBlock:   h = conv(silu(norm(x)));  h = conv(silu(norm(h) * (1 + scale) + shift));  x + h
    Attention:  softmax(q k^T / sqrt(d)) v over the pixels of a feature map, added to it
    time:       [cos(w_i * 1000 t), sin(w_i * 1000 t)] at geometrically spaced frequencies w_i

The second convolution of a block and the projection of an attention start at zero: at the start every block is
its skip (the identity where the width stays), and a deep network trains from its first step. `scale` and `shift` carry time and label.

Papers: group norm 1803.08494, attention 1706.03762, the block 2006.11239 and 2105.05233 (scale-shift).
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """At least 4 channels a group: with one channel a group, the mean of each channel would be erased."""
    groups = min(32, max(1, channels // 4))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


def zero_init(layer: nn.Module) -> nn.Module:
    """Weights and bias to zero; nothing is initialized after this."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def at_least_float32(x: Tensor) -> Tensor:
    """Half formats to float32 (for losses, KL and whatever leaves a network); float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draw(make, shape, generator: torch.Generator | None, device) -> Tensor:
    """make(shape), e.g. torch.randn, on `device`; the generator's own device decides where it is drawn.

    With a parallel.Noise, (b, ...) is one share of a batch: the numbers of the whole batch are drawn, and the rows
    of this share kept, so that a sample's noise does not depend on how many processes there are.
    """
    part, parts = getattr(generator, "part", 0), getattr(generator, "parts", 1)
    where = generator.device if generator is not None else device
    whole = make((parts * shape[0], *shape[1:]), generator=generator, device=where)
    return whole[part * shape[0] : (part + 1) * shape[0]].to(device)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(B,) times in [0, 1] -> (B, dim) sines and cosines in float32  (1706.03762, section 3.5).

    t is scaled by 1000 first: the frequencies were made for step numbers 0 ... 1000, and with unscaled t
    neighboring times would look the same. float32 throughout, because bfloat16(999) = 1000.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    frequencies = torch.exp(torch.arange(dim // 2, device=t.device) * (-log(max_period) / (dim // 2)))  # 1 ... ~1e-4
    angles = 1000.0 * t.float()[:, None] * frequencies[None]  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a skip; `emb` (B, emb_dim), where given, scales and shifts between the two."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int | None = None):
        super().__init__()
        self.norm1, self.conv1 = group_norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * out_channels) if emb_dim else None
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        h = self.norm2(h)
        if self.emb is not None:
            scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)  # 2 x (B, out, 1, 1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the second-last axis; q, k, v (B, heads, N, d) -> the same  (1706.03762, eq. 1).

    On a GPU, PyTorch's fused kernel never stores the N x N weights. On a CPU and for the 49 tokens of a 7x7 latent,
    the formula as it stands is five times faster than that kernel (its backward pass is slow on short sequences).
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, N, N)
    return weights @ v


class Attention(nn.Module):
    """Self-attention over the H*W positions of a feature map, `head_dim` channels a head."""

    def __init__(self, channels: int, head_dim: int = 32):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"channels {channels} is no multiple of head_dim {head_dim}")
        self.heads = channels // head_dim
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each (B, heads, H*W, head_dim)
        out = attend(q, k, v)
        out = out.transpose(2, 3).reshape(batch, channels, height, width)
        return x + self.project(out)


class Downsample(nn.Module):
    """`factor` times smaller; for 2 half the size, rounded up: 28 -> 14 -> 7 -> 4."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        kernel = max(3, factor + 1 - factor % 2)  # odd, and wide enough to see every pixel
        padding = (kernel - factor + 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=factor, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """`factor` times larger, or to a given `size` (height, width): 4 -> 7 undoes 7 -> 4."""

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (self.factor * x.shape[2], self.factor * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class LabelEmbedding(nn.Module):
    """num_classes rows and one more: the null label `num_classes`, which stands for "no label given"."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        # on a GPU this look at the values would wait for the device in every step, and torch.compile would stop at it
        if not y.is_cuda and not torch.compiler.is_compiling():
            check_labels(y, self.num_classes)
        return self.table(y)  # (B,) -> (B, dim)


def check_labels(y: Tensor, num_classes: int) -> None:
    """ValueError unless every label is in 0 ... num_classes (the last one is the null label)."""
    if y.dtype != torch.long or (len(y) and (int(y.min()) < 0 or int(y.max()) > num_classes)):
        span = f"{int(y.min())} ... {int(y.max())}" if len(y) else "none"
        raise ValueError(f"labels must be int64 in 0 ... {num_classes}, got {y.dtype} with values {span}")


def check_latents(zt: Tensor, t: Tensor, y: Tensor, channels: int) -> None:
    """ValueError with both shapes in it, unless zt is (B, channels, h, w) and t and y are (B,)."""
    if zt.ndim != 4 or zt.shape[1] != channels:
        raise ValueError(f"the network takes latents of shape (B, {channels}, h, w), got {tuple(zt.shape)}")
    if t.shape != zt.shape[:1] or y.shape != zt.shape[:1]:
        raise ValueError(f"t {tuple(t.shape)} and y {tuple(y.shape)} must have one entry for each of {len(zt)} latents")
