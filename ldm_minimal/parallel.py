r"""Several processes as one: each takes an equal share of every batch, and together they take the steps of one process.

    gradient of the mean loss of a batch = mean over the processes of the gradients of their shares' mean losses
    noise of a sample                    = its row of the noise of the whole batch, which is a function of (seed, step)

`torchrun --nproc-per-node=N -m ldm_minimal train` starts N processes, one for each GPU; DistributedDataParallel
(2006.15704) takes the mean, in another order of sums. The first process alone writes, prints and evaluates.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: torch.device) -> torch.device:
    """Join the others, if torchrun started this process (else its share is the whole); returns its device."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        if not is_main():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def leave() -> None:
    """The end in common: the others wait here while the first evaluates. Not after an error of one process alone."""
    if dist.is_available() and dist.is_initialized():
        each(None)
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def is_main() -> bool:
    return place()[0] == 0


def share(batch: int) -> slice:
    """The rows of a batch that are this process's. ValueError where there are no equal shares."""
    part, parts = place()
    if batch % parts:
        raise ValueError(f"a batch of {batch} has no equal shares for {parts} processes: choose a multiple of {parts}")
    return slice(part * batch // parts, (part + 1) * batch // parts)


class Noise(torch.Generator):
    """The same generator in all processes, and which share of its numbers is this process's (see layers.draw)."""

    def __init__(self, device="cpu"):
        self.part, self.parts = place()


def generator(device) -> torch.Generator:
    """What a step draws its noise from: a Noise where there are several processes, else PyTorch's own."""
    return torch.Generator(device) if place()[1] == 1 else Noise(device)


def wrap(module: nn.Module) -> nn.Module:
    """For several processes a DistributedDataParallel: after backward(), gradients are means over the processes."""
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # harmless, of 1x1 kernels
    return module if place()[1] == 1 else nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def mean(x: Tensor) -> Tensor:
    """The mean over the processes of a tensor of one shape, which is overwritten."""
    if place()[1] > 1:
        dist.all_reduce(x)
    return x / place()[1]


def each(value) -> list:
    """The values of all processes, in order, of whatever kind. It comes back when all have called it."""
    if len(values := [value] * place()[1]) > 1:
        dist.all_gather_object(values, value)
    return values
