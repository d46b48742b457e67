"""Which number format the networks run in: chosen from the hardware, with the reason in words.

    bf16   GPUs of compute capability >= 8.0, and CPUs with native bfloat16: 2-4x faster, float32's range
    fp16   older GPUs (a T4 is 7.5): needs the loss scaled, so that small gradients do not round to zero
    fp32   everything else

torch.cuda.is_bf16_supported() is not asked: it says yes on a T4, which only emulates it.
Losses, targets, KL and the time embedding stay in float32 in every mode.
"""

import torch

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; a GPU that is named by its number also becomes PyTorch's current one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}, choose from auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported, choose from auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {name!r} was asked for, but PyTorch sees {count or 'no'} GPU{'s' * (count > 1)} here")
    if device.type == "cuda" and device.index is not None:  # streams, graphs and synchronize() mean the current GPU
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """In words, for a run's record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def pick_precision(device: torch.device, wanted: str = "auto") -> tuple[str, str]:
    """("bf16" | "fp16" | "fp32", the reason)."""
    if wanted not in PRECISIONS:
        raise ValueError(f"unknown precision {wanted!r}, choose from {', '.join(PRECISIONS)}")
    if wanted == "fp16" and device.type != "cuda":
        raise ValueError("fp16 needs a GPU; on a CPU use bf16 or fp32")
    if wanted != "auto":
        return wanted, "asked for"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        shown = ".".join(map(str, capability))
        chosen, sign = ("bf16", ">=") if capability >= (8, 0) else ("fp16", "<")
        return chosen, f"compute capability {shown} {sign} 8.0"
    if device.type == "cpu" and cpu_has_bf16():
        return "bf16", "this CPU multiplies bfloat16 natively"
    return "fp32", "no native bfloat16 here"


def cpu_has_bf16() -> bool:
    """AVX-512 BF16 or AMX; asked of PyTorch, whose name for the question differs between versions."""
    if hasattr(torch.cpu, "get_capabilities"):
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def autocast(device: torch.device, precision: str):
    """A context in which matrix products and convolutions run in `precision`."""
    return torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES)
