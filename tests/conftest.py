"""Every test runs on the bundled subset and on the CPU, so that it gives the same on any machine.

Those that need a GPU are asked for: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_train.py -k on_a_gpu
"""

import os
from pathlib import Path

import pytest
import torch

import ldm_minimal
from ldm_minimal.__main__ import main

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
SUBSET = Path(ldm_minimal.__file__).parent / "assets" / "fashion-mnist-subset"


@pytest.fixture(autouse=True)
def bundled_data(monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(SUBSET))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A complete run of the preset `tiny` in float32, made once: it learns nothing, but every file is there."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    os.environ["LDM_DATA"] = str(SUBSET)
    assert main(["train", "--preset", "tiny", "--precision", "fp32", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread():
    """Tiny networks gain nothing from threads, and lose much where another process wants the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
