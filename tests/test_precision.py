"""Device and number format from the hardware: a T4 gets fp16 whatever it claims, newer GPUs bf16, a CPU what it can do.

No GPU is needed: the questions put to PyTorch are answered here.
"""

import pytest
import torch

from ldm_minimal import precision
from ldm_minimal.precision import PRECISIONS, autocast, cpu_has_bf16, pick_device, pick_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """gpu((7, 5)): from now on PyTorch sees a GPU of that compute capability, which claims to support bf16."""
    def show(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a, **k: capability)

    return show


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("capability", [(6, 0), (7, 0), (7, 5)], ids=str)
def test_a_gpu_before_8_0_gets_fp16_although_it_claims_to_support_bf16(gpu, capability):
    gpu(capability)
    name, reason = pick_precision(CUDA)
    assert name == "fp16" and f"{capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_a_gpu_from_8_0_on_gets_bf16(gpu, capability):
    gpu(capability)
    name, reason = pick_precision(CUDA)
    assert name == "bf16" and f"{capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize("able, expected", [(True, "bf16"), (False, "fp32")])
def test_a_cpu_gets_bf16_only_where_it_has_it_natively(monkeypatch, able, expected):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: able)
    name, reason = pick_precision(CPU)
    assert name == expected and "bfloat16" in reason


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
@pytest.mark.parametrize("able", [True, False])
def test_on_a_cpu_what_is_asked_for_is_given(monkeypatch, wanted, able):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: able)
    assert pick_precision(CPU, wanted) == (wanted, "asked for")


@pytest.mark.parametrize("wanted", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=str)
def test_on_a_gpu_what_is_asked_for_is_given(gpu, wanted, capability):
    gpu(capability)
    assert pick_precision(CUDA, wanted) == (wanted, "asked for")


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        pick_precision(CPU, "fp16")


@pytest.mark.parametrize("wanted", ["fp8", "", "BF16", "float32"])
def test_an_unknown_precision_is_refused_and_the_known_ones_are_named(wanted):
    with pytest.raises(ValueError) as error:
        pick_precision(CPU, wanted)
    assert repr(wanted) in str(error.value) and all(known in str(error.value) for known in PRECISIONS)


def test_a_gpu_that_is_not_there_is_refused(no_gpu):
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"{name}.*no GPU"):
            pick_device(name)


def test_a_gpu_with_a_number_too_high_is_refused(gpu):
    gpu((9, 0))
    with pytest.raises(ValueError, match="cuda:2.*2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu0", "mps", "meta"])
def test_a_device_that_no_one_knows_is_refused(name):
    with pytest.raises(ValueError) as error:
        pick_device(name)
    assert repr(name) in str(error.value) and "cuda" in str(error.value)


def test_the_device_is_the_gpu_where_there_is_one_and_a_named_one_becomes_the_current_one(gpu, monkeypatch):
    gpu((9, 0))
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device() == CUDA and pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cpu") == CPU
    assert current == [torch.device("cuda:1")], "CUDA's streams and graphs belong to the current GPU"


def test_the_device_is_the_cpu_where_there_is_no_gpu(no_gpu):
    assert pick_device() == pick_device("auto") == pick_device("cpu") == CPU


@pytest.mark.parametrize("answer, expected", [
    ({"avx512_bf16": True, "amx_bf16": False}, True), ({"avx512_bf16": False, "amx_bf16": True}, True),
    ({"avx512_bf16": False, "amx_bf16": False}, False), ({"avx2": True, "avx512_f": True}, False), ({}, False),
])
def test_the_cpus_capabilities_are_asked_of_pytorch(monkeypatch, answer, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: answer, raising=False)
    assert cpu_has_bf16() is expected


@pytest.mark.parametrize("avx512, amx", [(True, False), (False, True), (False, False), (None, True), (None, None)])
def test_an_older_pytorch_is_asked_by_its_own_names(monkeypatch, avx512, amx):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name, answer in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if answer is None:  # still older: the question itself is unknown
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert cpu_has_bf16() is bool(avx512 or amx)


def test_autocast_rounds_matrix_products_in_bf16_and_only_there():
    a, b = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.eye(8)
    with autocast(CPU, "bf16"):
        product, total = a @ b, a.sum()
    assert product.dtype == torch.bfloat16 and total.dtype == torch.float32
    with autocast(CPU, "fp32"):
        product = a @ b
    assert product.dtype == torch.float32 and torch.equal(product, a)


def test_autocast_in_fp32_switches_off_an_outer_autocast():
    a = torch.eye(4)
    with autocast(CPU, "bf16"):
        with autocast(CPU, "fp32"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
