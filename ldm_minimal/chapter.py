"""What every chapter begins with: where it runs, and what it may spend.

A chapter says what each of its trainings costs in optimizer steps, once for a CPU and once for a GPU:
`budget(200, gpu=2000)`. Nothing else depends on the machine. LDM_FAST=1 in the environment takes a tenth of the
steps, to see quickly that a chapter runs; its figures then show little, and the output says so.
"""

import os
import platform
import sys
from dataclasses import dataclass

import torch

from . import __version__, data, plot
from .precision import autocast, device_name, pick_device, pick_precision


@dataclass(frozen=True)
class Budget:
    """Called with the steps for each kind of machine, it says how many to take here."""

    device: torch.device
    precision: str  # of the networks: fp32, bf16 or fp16
    fast: bool = False

    def __call__(self, cpu: int, gpu: int | None = None) -> int:
        steps = cpu if self.device.type == "cpu" or gpu is None else gpu
        return max(1, steps // 10) if self.fast else steps

    def autocast(self):
        """A context in which the networks compute in `precision`."""
        return autocast(self.device, self.precision)


def start() -> Budget:
    """Print what there is to work with, give figures their style, and return the budget."""
    plot.use_style()
    device = pick_device()
    precision, _ = pick_precision(device)
    train, test = data.load(split="train"), data.load(split="test")
    fast = os.environ.get("LDM_FAST", "0") not in ("", "0")
    print(f"versions   ldm_minimal {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"device     {device_name(device)}, networks in {precision}")
    if device.type == "cpu" and "google.colab" in sys.modules:
        print("           a GPU trains longer and better: Runtime > Change runtime type > T4 GPU, then run all again")
    print(f"data       {len(train):,} + {len(test):,} images of Fashion-MNIST")
    if fast:
        print("budget     LDM_FAST: a tenth of the steps; the figures will not show what the text says")
    else:
        print("budget     at most two minutes on two CPU cores (LDM_FAST=1 in the environment: a tenth of the steps)")
    return Budget(device, precision, fast)
