r"""What limits a training step: its time by kind of operation, for the VAE, the U-Net and the DiT.

Protocol: torch.profiler over a few of the package's own training steps (bench.Work: the device's default preset,
random data), after two that warm up. Counted is the time inside an operation and outside those that it calls: on a
GPU the time of its kernels, elsewhere that of the CPU. Forward and backward are together. An operation of no kind
belongs to the one that calls it; a call within another of its kind is not counted again. GFLOP/s are FLOP as bench.py
counts them over the time of their kind.

    copies       casts between formats, concatenation, enlarging
    optimizer    AdamW and clipping
    the rest     what fits no kind: sums, additions, products with a number, random numbers, autograd's bookkeeping
    outside      what of the step's wall-clock time is in no operation: Python; on a GPU its idle share (kernels of one
                 stream follow each other, so the gap between their sum and the clock is idleness)

The profiler itself takes time, the more the smaller the operations are: compare the step with `bench`. On a GPU,
where the loop replays its step as a CUDA graph, it would see one operation alone: there the kernels are those of the
step that is not recorded, and the clock is that of the one that is.
"""

import re
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .bench import Call, Work, describe_machine, median_seconds
from .dit import DiT
from .presets import PRESETS, default_preset
from .unet import UNet

KINDS = {  # kind: the operations that it names; the first that fits counts
    "convolution": r"conv",
    "matrix product": r"(^|_)(add|b|badd)?b?mm($|_)|matmul|linear($|_backward)|attention",
    "normalisation": r"(group|layer|batch)_norm",
    "activation": r"silu|gelu|relu|sigmoid|softmax",
    "EMA": r"_foreach_lerp",
    "optimizer": r"adam|_foreach_|vector_norm|_amp_|^optimizer\.",  # with clipping
    "copies": r"copy|^to$|clone|contiguous|^cat$|stack|reshape|upsample",
}
REST = "the rest"


def kind_of(operation: str) -> str:
    """'aten::mkldnn_convolution' -> 'convolution'. Only operations have a kind, autograd's nodes around them not."""
    space, _, name = operation.rpartition("::")
    if space != "aten" and not operation.startswith("Optimizer."):
        return REST
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), REST)


def count_by_kind(call: Call) -> Counter:
    with FlopCounterMode(display=False) as counter:
        call()
    total = Counter()
    for operation, flop in counter.get_flop_counts()["Global"].items():
        total[kind_of(str(operation).replace(".", "::"))] += flop
    return total


def profile_steps(call: Call, steps: int, device: torch.device, seconds: float | None = None) -> dict:
    """{"seconds": of a step, "outside": share, "kinds": {kind: share, ms, calls, gflops}}; shares of the step.

    seconds: of a step, where another clock than that of the profiled steps is to count
    """
    gpu = device.type == "cuda"
    call()  # with the one that is counted the warm-up
    flop = count_by_kind(call)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities, acc_events=True) as record:
        start = time.perf_counter()
        for _ in range(steps):
            call()
        if gpu:
            torch.cuda.synchronize(device)
        seconds = seconds or (time.perf_counter() - start) / steps
    spent, calls = Counter(dict.fromkeys([*KINDS, REST], 0.0)), Counter()
    for event in record.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its time is with the operation that started it
        around = [event]
        while around[-1].cpu_parent is not None:
            around.append(around[-1].cpu_parent)
        found = [kind for one in around if (kind := kind_of(one.name)) != REST]  # from the inside out
        kind = found[0] if found else REST
        spent[kind] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6 / steps
        calls[kind] += kind not in found[1:] and (kind_of(event.name) == kind)
    seconds = max(seconds, sum(spent.values()))
    kinds = {kind: {"share": s / seconds, "ms": 1000 * s, "calls": calls[kind] / steps,
                    "gflops": flop[kind] / s / 1e9 if flop[kind] and s else None} for kind, s in spent.items()}
    return {"seconds": seconds, "outside": 1 - sum(spent.values()) / seconds, "kinds": kinds}


def profiling(device: torch.device, precision: str) -> dict:
    """The tables for the device's preset, printed and returned for JSON."""
    config, steps = PRESETS[default_preset(device)], 5
    loose, recorded = (Work(config, device, precision, record) for record in (False, True))
    n = config.denoiser_train.batch
    result = {"machine": describe_machine(device, precision), "steps": steps, "tables": {}}
    for name, make in {"VAE": Work.train_vae,
                       "U-Net": lambda work: work.train_denoiser(UNet, config.unet, work.latent, n),
                       "DiT": lambda work: work.train_denoiser(DiT, config.dit, work.latent, n)}.items():
        clock = median_seconds({name: make(recorded)}, 1.0, device)[name] if device.type == "cuda" else None
        result["tables"][name] = found = profile_steps(make(loose), steps, device, clock)
        title = f"{name}, {1000 * found['seconds']:.1f} ms a step"
        print(f"\n{title:28}{'share':>8}{'ms':>9}{'calls':>8}{'GFLOP/s':>10}")
        for kind, row in sorted(found["kinds"].items(), key=lambda pair: -pair[1]["ms"]):
            rate = f"{row['gflops']:.0f}" if row["gflops"] else ""
            print(f"{kind:28}{100 * row['share']:6.1f} %{row['ms']:9.2f}{row['calls']:8.0f}{rate:>10}")
        idle, share = "the GPU idle" if device.type == "cuda" else "outside any operation", found["outside"]
        print(f"{idle:28}{100 * share:6.1f} %{1000 * found['seconds'] * share:9.2f}", flush=True)
    return result
