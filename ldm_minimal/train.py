r"""One training loop for every network of the package.

    for each step:  batch and noise from (seed, step) -> loss (B,) -> backward -> clip -> AdamW -> EMA -> yield

Where there are several processes (parallel.py), each takes its share of the batch. All randomness is a function of
(seed, step), and a state file holds everything else, so ten steps equal
five, a restart and five more, bit for bit on one device. The learning rate rises linearly over `warmup` steps and
falls to zero along a half cosine. With fp16 the loss is scaled (order: scale, backward, unscale, clip, step, update);
a step that overflowed is repeated at a smaller scale and not counted.

A step of these small networks is a thousand kernels of a few microseconds each: a fast GPU would wait for Python. So it
can be recorded once as a CUDA graph and then replayed (`Recorded`).

Papers: AdamW 1711.05101, cosine decay 1608.03983, clipping 1211.5063, loss scaling 1710.03740.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import cos, inf, pi

import torch
from torch import Tensor, nn

from . import parallel
from .checkpoint import CheckpointError, load_into, load_tensors, save_tensors
from .data import batch_index
from .ema import EMA
from .options import option
from .precision import autocast


@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(2000, "optimizer steps")
    batch: int = option(128, "images per step, of all processes together")
    lr: float = option(1e-3, "peak learning rate")
    warmup: int = option(100, "steps of linear warm-up")
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay")
    clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.999, "decay of the moving average of the weights")
    minutes: float = option(0.0, "take fewer steps where this machine would need longer than this (0: never)")

    def __post_init__(self):
        for name in ("steps", "batch", "lr", "clip"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "minutes"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear from lr / warmup to lr, then half a cosine down to 0 after the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + cos(pi * progress))


def step_generator(seed: int, step: int, device, noise: torch.Generator | None = None) -> torch.Generator:
    """The noise of one step: a generator seeded by (seed, step), on the device that uses it: `noise`, or a new one."""
    return (noise or parallel.generator(device)).manual_seed(seed * 1_000_003 + step)


class TrainState:
    """All that a step changes: the model, its EMA, AdamW's moments, the loss scale, the step number."""

    def __init__(self, model: nn.Module, config: TrainConfig, precision: str = "fp32"):
        self.model, self.precision, self.step = model, precision, 0
        self.device = next(model.parameters()).device
        self.ema = EMA(model, config.ema)
        groups = model.groups() if hasattr(model, "groups") else [{"params": list(model.parameters())}]
        gpu = self.device.type == "cuda"
        for group in groups:  # on a GPU the rate is a tensor, so that a recorded step reads each new value
            group["lr"] = torch.tensor(config.lr, device=self.device) if gpu else config.lr
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=True,
                                           capturable=gpu)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def save(self, path, meta: dict | None = None) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adamw.{index}.{k}": v for k, v in moments.items()}
        own = {"step": self.step, "ema_updates": self.ema.updates, "scaler": self.scaler.state_dict(),
               "precision": self.precision}
        save_tensors(path, tensors, own | {"more": meta or {}})

    def load(self, path) -> dict:
        """Take up where `save` left off; returns its `meta`. CheckpointError if the file does not fit the model."""
        tensors, own = load_tensors(path)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "adamw": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts.setdefault(part, {})[key] = tensor
        if not {"step", "ema_updates", "scaler", "precision"} <= own.keys():
            raise CheckpointError(f"{path} holds no training state")
        if own["precision"] != self.precision:
            raise CheckpointError(f"{path} was trained in {own['precision']}, this run is in {self.precision}: "
                                  f"go on with --precision {own['precision']}")
        load_into(self.model, parts["model"], str(path))
        load_into(self.ema.model, parts["ema"], str(path))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["adamw"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if own["scaler"]:
            self.scaler.load_state_dict(own["scaler"])
        self.step, self.ema.updates = own["step"], own["ema_updates"]
        return own["more"]


@dataclass
class Step:
    """What the loop yields after each step: its number (from 1), per-sample values (B,) and the gradient's norm.

    Of several processes each has the values of its own share, (b,); the norm is that of the whole batch in all.
    """

    step: int
    values: dict[str, Tensor]  # "loss" and whatever else the objective reported
    norm: Tensor


# (model, indices, noise generator) -> {"loss": (B,), and whatever else is to be reported, each (B,)}
Objective = Callable[[nn.Module, Tensor, torch.Generator], dict[str, Tensor]]


class Loss(nn.Module):
    """An objective as a module: DistributedDataParallel wants to see the call of `forward` that uses the weights."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, index: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        return self.objective(self.model, index, noise)


class Recorded:
    """A step as a CUDA graph: a few calls as they come, one that is recorded, and from then on replays of that one.

    step:   indices (B,) on the device -> (values, norm). It may ask nothing of the device, and all that changes from
            one call to the next must be a tensor on it: the indices, the learning rate, and the state of `noise`
    """

    WARM_UP = 3  # calls in which libraries choose their kernels and take their memory

    def __init__(self, step: Callable, noise: torch.Generator):
        self.step, self.noise, self.calls, self.graph = step, noise, 0, torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream()

    def __call__(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self.calls += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        if self.calls <= self.WARM_UP:
            with torch.cuda.stream(self.stream):
                result = self.step(index)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == self.WARM_UP + 1:
            self.index = index.clone()
            self.graph.register_generator_state(self.noise)
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.step(self.index)  # recorded, not run
        self.index.copy_(index)
        self.graph.replay()
        values, norm = self.result  # the next replay writes over these
        return {name: value.clone() for name, value in values.items()}, norm.clone()


def train(state: TrainState, objective: Objective, n: int, config: TrainConfig, seed: int = 0,
          record: bool = False) -> Iterator[Step]:
    """Run from state.step to config.steps over `n` training images; yields after each step and its EMA.

    record: on a GPU in bfloat16 or float32, replay the step as a CUDA graph: the same numbers, without Python's time.
            For objectives that depend on nothing but tensors on the device; the rest would stay as it was when recorded
    """
    model, optimizer, scaler = state.model.train(), state.optimizer, state.scaler
    mine, loss = parallel.share(config.batch), parallel.wrap(Loss(model, objective))
    noise = parallel.generator(state.device)

    def advance(index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        with autocast(state.device, state.precision):
            values = loss(index, noise)
        scaler.scale(values["loss"].mean()).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in values.items()}, norm.detach()

    if record and state.device.type == "cuda" and state.precision != "fp16" and parallel.place()[1] == 1:
        advance = Recorded(advance, noise)
    while state.step < config.steps:
        for group in optimizer.param_groups:
            rate = group.get("speed", 1.0) * learning_rate(state.step, config)
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        step_generator(seed, state.step, state.device, noise)
        before = scaler.get_scale()
        values, norm = advance(batch_index(state.step, config.batch, n, seed)[mine].to(state.device))
        if scaler.get_scale() < before:  # fp16 overflowed, nothing was changed: the same step again, at a smaller scale
            continue
        state.ema.update(model)
        state.step += 1
        yield Step(state.step, values, norm)


class Diverged(RuntimeError):
    """The loss or the gradient is no longer finite."""


class Meter:
    """Collects steps on the device and looks at them only in `summary`, so that no step waits for a GPU."""

    T_BINS = 5  # the loss is also reported for t in (0, .2), (.2, .4) ... (.8, 1)

    def __init__(self):
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def summary(self) -> dict:
        """Means over the steps since the last summary, and by range of t where "t" was reported; then forgets them.

        Raises Diverged, naming the first step that is not finite and its loss by range of t.
        """
        norms = torch.stack([s.norm for s in self.steps]).cpu()
        names = self.steps[0].values
        mine = {name: torch.stack([s.values[name] for s in self.steps]).float().cpu() for name in names}  # (n, b)
        values = {name: torch.cat(parallel.each(mine[name]), dim=1) for name in names}  # (n, B)
        numbers = [s.step for s in self.steps]
        self.steps = []
        finite = torch.isfinite(values["loss"]).all(1) & torch.isfinite(norms)
        if not finite.all():
            first = int(finite.logical_not().nonzero()[0])
            by_t = self.by_t(values["loss"][first], values["t"][first]) if "t" in values else None
            shown = f"; loss by t in fifths {by_t}" if by_t else f"; loss {values['loss'][first].mean().item():.4g}"
            raise Diverged(f"step {numbers[first]}: loss or gradient is not finite "
                           f"(gradient norm {norms[first].item():.4g}{shown})")
        means = {k: v.mean().item() for k, v in values.items() if k != "t"} | {"norm": norms.mean().item()}
        if "t" in values:
            shown = values.get("eps_mse", values["loss"])
            means["by_t"] = self.by_t(shown.flatten(), values["t"].flatten())
        return means

    def by_t(self, loss: Tensor, t: Tensor) -> list[float | None]:
        place = (t * self.T_BINS).long().clamp(max=self.T_BINS - 1)
        groups = [loss[place == i] for i in range(self.T_BINS)]
        return [round(g.mean().item(), 5) if len(g) else None for g in groups]


def compile_or_not(module: nn.Module, *example) -> str:
    """torch.compile in place; where it does not work here, the module stays as it was. Says in words what happened.

    Call it as training will call the module, under the same autocast: what is compiled here need not be again.
    """
    try:
        module.compile()
        module(*example)
        return "compiled"
    except Exception as error:  # no compiler, no Triton: any of many errors, and none of them is a reason to stop
        module._compiled_call_impl = None
        return f"torch.compile does not work here ({type(error).__name__}); going on without it"
