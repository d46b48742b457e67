r"""What our latent diffusion is compared with: the same on pixels, and the U-Net, loss and sampler of diffusers.

Each is put under the calls of this package, so that one training loop, one clock and one table serve them all.
diffusers is imported only where it is used: the package does not need it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CLASSES
from .denoiser import drop_labels
from .guidance import guide
from .precision import autocast
from .sampler import sample_noise
from .unet import UNetConfig


class NoAutoencoder(nn.Module):
    """Pixel diffusion is latent diffusion with the identity for an autoencoder."""

    def decode(self, z: Tensor) -> Tensor:
        return z


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DModel as net(zt, t, y), with our channels, blocks and attention; within 10 % of our parameters.

    It takes only sizes that halve evenly: 7x7 is padded to 8x8 on the way in and cut on the way out.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        from diffusers import UNet2DModel

        self.num_classes, upper, low = config.num_classes, len(config.channels) - 1, "Attn" if config.attention else ""
        self.multiple = 2**upper
        self.net = UNet2DModel(
            in_channels=config.in_channels, out_channels=config.in_channels, block_out_channels=config.channels,
            down_block_types=("DownBlock2D",) * upper + (f"{low}DownBlock2D",), layers_per_block=config.blocks,
            up_block_types=(f"{low}UpBlock2D",) + ("UpBlock2D",) * upper, attention_head_dim=32,
            norm_num_groups=min(32, config.channels[0] // 4), num_class_embeds=config.num_classes + 1)

    def forward(self, zt: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = zt.shape[2:]
        zt = F.pad(zt, (0, -width % self.multiple, 0, -height % self.multiple))
        return self.net(zt, 1000 * t, class_labels=y).sample[:, :, :height, :width]


def diffusers_loss(net: DiffusersUNet, scheduler, x: Tensor, y: Tensor, drop: float, generator) -> Tensor:
    """The loss of diffusers' manual, with labels: mean squared error of the noise that its scheduler added, (B,)."""
    where, many = {"generator": generator, "device": x.device}, scheduler.config.num_train_timesteps
    eps, k = torch.randn(x.shape, **where), torch.randint(0, many, (len(x),), **where)
    out = net(scheduler.add_noise(x, eps, k), k / many, drop_labels(y, net.num_classes, drop, generator))
    return (out.float() - eps).square().flatten(1).mean(1)


@torch.no_grad()
def diffusers_ddim(net: DiffusersUNet, scheduler, z: Tensor, labels: Tensor, steps: int, guidance: float,
                   precision: str) -> Tensor:
    """The loop of diffusers' manual around its U-Net and its DDIMScheduler: noise z (N, C, h, w) -> samples like z."""

    def predict(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(z.device, precision):
            return net(z, t.to(z.device), y).float()

    scheduler.set_timesteps(steps)
    for k in scheduler.timesteps:
        out = guide(predict, net.num_classes, guidance)(z, (k / 1000).expand(len(z)), labels)
        z = scheduler.step(out, k, z).prev_sample
    return z.cpu()


class DiffusersModel:
    """Their U-Net and their DDIM sampler under the call `sample` of LatentDiffusion."""

    def __init__(self, net: DiffusersUNet, scheduler, latent_shape: tuple[int, ...], dataset: str, precision: str):
        self.denoiser, self.scheduler, self.latent_shape = net.eval(), scheduler, latent_shape
        self.classes, self.precision = CLASSES[dataset], precision

    def sample(self, labels: Tensor, steps: int, guidance: float, seed: int, **ours) -> Tensor:
        """labels (N,) -> (N, 1, 28, 28) in [-1, 1]. `ours`: what only our samplers know (solver, spacing, ...)."""
        images, device = [], next(self.denoiser.parameters()).device
        for index in torch.arange(len(labels)).split(256):
            noise = sample_noise(seed, index.tolist(), self.latent_shape, device)()
            images.append(diffusers_ddim(self.denoiser, self.scheduler, noise, labels[index].to(device), steps,
                                         guidance, self.precision))
        return torch.cat(images).clamp(-1, 1)
