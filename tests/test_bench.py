"""The benchmark on tiny networks: its tables are complete and consistent, its counts are those of a hand count."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from ldm_minimal.baseline import DiffusersUNet
from ldm_minimal.bench import Work, bench, count_flop, median_seconds, minutes_to_expect, size, with_peak_mib
from ldm_minimal.dit import DiTConfig
from ldm_minimal.pipeline import SampleConfig
from ldm_minimal.presets import PRESETS, RunConfig
from ldm_minimal.sampler import SOLVERS
from ldm_minimal.train import TrainConfig
from ldm_minimal.unet import UNet, UNetConfig
from ldm_minimal.vae import VAEConfig

CPU = torch.device("cpu")
TINY = RunConfig(
    vae=VAEConfig(channels=(8, 8, 16)), vae_train=TrainConfig(batch=8, steps=100),
    unet=UNetConfig(channels=(8, 32), blocks=1), dit=DiTConfig(width=16, depth=1, heads=2),
    denoiser_train=TrainConfig(batch=8, steps=100), sample=SampleConfig(steps=2),
)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_tables_are_complete_and_consistent(capsys):
    result = bench(CPU, "fp32", 0.0, TINY, sides=(32,), maps=((8, 7),))
    shown = capsys.readouterr().out
    assert json.loads(json.dumps(result)) == result
    assert {"torch", "device", "threads", "precision"} <= result["machine"].keys()
    assert result["peak"]["gflops"] == max(result["peak"]["matmul"], result["peak"]["convolution"]) > 0
    assert list(result["training"]) == ["VAE", "U-Net", "DiT"] and list(result["solvers"]) == list(SOLVERS)

    tables = [result[name] for name in ("training", "latents and pixels", "solvers", "diffusers") if name in result]
    for name, row in [pair for table in tables for pair in table.items()]:
        assert name in shown
        assert all(value > 0 for value in row.values()), (name, row)
        assert row["images_per_second"] == pytest.approx(row["images"] / row["steps"] * row["steps_per_second"])
        gflops = row["gflop_per_image"] * row["images_per_second"]
        assert row["share_of_peak"] == pytest.approx(gflops / result["peak"]["gflops"])

    rows, ratio = result["latents and pixels"], result["ratios"]
    for what in ("training", "sampling"):
        wanted = rows[f"{what}, latents"]["images_per_second"] / rows[f"{what}, pixels"]["images_per_second"]
        assert ratio[f"latents / pixels, {what}"] == pytest.approx(wanted)
    counts = [rows[f"training, {what}"]["gflop_per_image"] for what in ("pixels", "latents")]
    assert 14 < counts[0] / counts[1] < 19  # 784 pixels for 49


def test_without_diffusers_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # makes its import fail
    row = {"images_per_second": 1.0}
    monkeypatch.setattr("ldm_minimal.bench.measure", lambda title, jobs, **_: dict.fromkeys(jobs, row))
    result = bench(CPU, "fp32", 0.0, TINY, sides=(32,), maps=((8, 7),))
    assert "diffusers" not in result and "ours against diffusers: left out" in capsys.readouterr().out


def test_flop_of_the_unet_are_those_of_a_hand_count():
    """A 3x3 convolution costs 2 * 9 * in * out for each output pixel; the U-Net is the sum of its layers."""
    unet, (zt, t, y) = UNet(TINY.unet), (torch.randn(5, 4, 7, 7), torch.rand(5), torch.arange(5))
    assert count_flop(partial(unet.stem, zt)) == 5 * 7 * 7 * 2 * 9 * 4 * 8

    total = 0

    def by_hand(layer, inputs, out):
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += 2 * out.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += 2 * out.numel() * layer.in_features
        elif type(layer).__name__ == "Attention":  # q k^T and weights v: two products of N x N x channels
            total += 2 * 2 * out[:, 0].numel() * out[0, 0].numel() * out.shape[1]

    hooks = [layer.register_forward_hook(by_hand) for layer in unet.modules()]
    unet(zt, t, y)
    for hook in hooks:
        hook.remove()
    assert count_flop(partial(unet, zt, t, y)) == total


def test_a_training_step_costs_three_forward_passes():
    unet = TINY.unet
    step = Work(TINY, CPU, "fp32").train_denoiser(UNet, unet, (4, 7, 7), 8)
    once = count_flop(partial(UNet(unet), torch.randn(8, 4, 7, 7), torch.rand(8), torch.arange(8)))
    assert 2.9 < count_flop(step) / once <= 3  # a little less: nobody asks for the gradient of the first layer's input


def test_memory_is_that_of_the_tensors_alive():
    def call():
        kept = torch.zeros(1 << 18)  # 1 MiB
        for _ in range(3):
            passing = kept + 1  # 1 MiB, and one more where the new is made before the old is released
        passing.view(-1, 2).add_(1)  # no memory of its own
        del passing
        return kept.clone()

    assert with_peak_mib(call, CPU)[1] == pytest.approx(3.0)


def test_rows_take_turns_and_are_timed_at_least_three_times():
    order = []
    found = median_seconds({"a": partial(order.append, "a"), "b": partial(order.append, "b")}, 0.0, CPU)
    assert "".join(order[-6:]) == "ababab" and found["a"] > 0


@pytest.mark.parametrize("config", [UNetConfig(), PRESETS["tiny"].unet, TINY.unet], ids=lambda c: str(c.channels))
def test_the_diffusers_network_has_our_size_and_our_shapes(config):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = DiffusersUNet(config)
        assert 0.9 < size(theirs) / size(UNet(config)) < 1.1
        zt = torch.empty(2, 4, 7, 7)
        assert theirs(zt, torch.empty(2), torch.zeros(2, dtype=torch.long)).shape == zt.shape


def test_expected_minutes_are_steps_times_seconds_up_to_the_limit_of_a_stage(monkeypatch):
    monkeypatch.setattr("ldm_minimal.bench.median_seconds", lambda calls, *_: dict(zip(calls, (0.06, 0.12))))
    budget = TrainConfig(batch=100, steps=2000)
    config = replace(TINY, samples=1000, vae_train=budget, denoiser_train=budget)
    rest = (40_000 * 0.06 + 2 * 2 * 1000 * 0.12) / 100 / 3 / 60  # minutes: 2 steps, each twice for guidance
    text = "about {} (an estimate, measured over a few steps: VAE {}, denoiser {}, the rest " + f"{rest:.1f})"
    assert minutes_to_expect(CPU, "fp32", config) == text.format(6, "2.0", "4.0")
    capped = replace(config, denoiser_train=replace(config.denoiser_train, minutes=1.5))
    assert minutes_to_expect(CPU, "fp32", capped) == text.format(4, "2.0", "1.5")


def test_expected_minutes_are_measured():
    assert minutes_to_expect(CPU, "fp32", TINY, seconds=0.0).startswith("about ")
