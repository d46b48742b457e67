r"""An exponential moving average of the weights: what is sampled from, because it is smoother than any single step.

    ema <- d * ema + (1 - d) * weights,        d = min(decay, (1 + n) / (10 + n)) after n updates

The warm-up forgets the random start: with a constant d = 0.9999 the average would still hold 61 % of the initial
weights after 5,000 steps. Parameters are averaged, buffers copied.  (2006.11239; the warm-up is a common convention.)
"""

import copy

import torch
from torch import nn


class EMA:
    """`ema.model` is the averaged copy. Call `update` after each optimizer step."""

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)
        self.updates += 1
