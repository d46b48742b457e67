"""Files that are whole or not there: tensors as safetensors, everything readable as JSON.

Each file is written under a temporary name in the same folder, flushed to disk and renamed, so a process killed at
any moment leaves the old file or the new one. Loading is strict: it names the keys or shapes that do not fit.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint is missing, cut off, edited, or of another architecture; the message says which and what to do."""


@contextmanager
def atomic(path: Path):
    """Write to the temporary path that this yields; on leaving without an error it becomes `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o644)  # safetensors makes files that only their owner may read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_json(path: Path, data: dict) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> dict:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}); it was cut off or edited by hand") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(data).__name__}")
    return data


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict | None = None) -> str:
    """Returns the file's SHA-256. `meta` travels inside the file, so tensors and step number cannot part ways."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as part:
        try:
            save_file(tensors, part, metadata={"meta": json.dumps(meta or {})})
        except SafetensorError as error:  # it wraps the system's error, a full disk for one
            raise OSError(f"could not write {path}: {error}") from None
    return sha256(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not there")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, meta
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it was cut off or edited") from None


def sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_into(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Strict: every key and every shape must fit, and the message names those that do not. `what` names the source."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [f"{k}: {tuple(tensors[k].shape)} in the file, {tuple(own[k].shape)} in the network"
             for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    if missing or extra or wrong:
        kinds = (("missing:", missing), ("unexpected:", extra), ("of another shape:", sorted(wrong)))
        parts = [f"{label} {', '.join(keys[:5])}{' ...' if len(keys) > 5 else ''}" for label, keys in kinds if keys]
        raise CheckpointError(f"the weights in {what} are those of another architecture; {'; '.join(parts)}")
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise CheckpointError(f"the weights in {what} hold NaN or infinity: {', '.join(sorted(bad)[:5])}")
    module.load_state_dict(tensors)
