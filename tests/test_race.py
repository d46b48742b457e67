"""The other benchmarks on tiny networks: time to quality, growth of cost, where a step's time goes."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm_minimal import data, profiling, race, scale
from ldm_minimal.__main__ import main
from ldm_minimal.baseline import diffusers_ddim, diffusers_loss
from ldm_minimal.bench import Work, count_flop, size
from ldm_minimal.pipeline import SampleConfig
from ldm_minimal.presets import RunConfig
from ldm_minimal.run import Interrupted, Run
from ldm_minimal.train import TrainConfig, TrainState, train
from ldm_minimal.unet import UNet, UNetConfig
from ldm_minimal.vae import VAE, VAEConfig

CPU = torch.device("cpu")
TINY = RunConfig(
    vae=VAEConfig(channels=(8, 8, 16)), vae_train=TrainConfig(batch=8, steps=100),
    unet=UNetConfig(channels=(8, 32), blocks=1), denoiser_train=TrainConfig(batch=8, steps=100, warmup=0, lr=3e-3),
    sample=SampleConfig(steps=2),
)
PEAK = {"sides": (32,), "maps": ((8, 7),)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    whole = data.load
    monkeypatch.setattr(data, "load", lambda *name: replace(
        (d := whole(*name)), images=d.images[:200].clone(), labels=d.labels[:200].clone()))


@pytest.fixture
def racer(tmp_path):
    def make(config):
        run = race.Racer(tmp_path / "run", config, CPU, "fp32")
        run.start(command="test")
        run.started = time.perf_counter()
        return run
    return make


def test_a_race_has_one_complete_row_for_each_contestant_and_budget(capsys, monkeypatch):
    seen = set()

    class Spy(UNet):
        def forward(self, zt, t, y):
            seen.add(tuple(zt.shape[1:]))
            return super().forward(zt, t, y)

    def fit(run, name, model, objective, config):
        assert config.steps == race.ENDLESS
        return replace(config, steps=round(1000 * config.minutes), warmup=0)

    monkeypatch.setattr(race, "UNet", Spy)
    monkeypatch.setattr(Run, "fit", fit)
    budgets = (0.004, 0.002)
    so_far = []
    result = race.race(CPU, "fp32", budgets, 20, config=TINY, keep=lambda result: so_far.append(len(result["rows"])))
    assert so_far == [*range(1, len(result["rows"]) + 1)], "an interruption must not lose the rows that are there"
    shown = capsys.readouterr().out
    assert json.loads(json.dumps(result))["rows"][0]["fd"] == result["rows"][0]["fd"]
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == ["ours, latents", "ours, pixels"] and names == 2 * names[: len(names) // 2]
    assert seen == {(1, 28, 28)}, "the pixel contestant's U-Net sees pixels, and the latent one is run.py's own"
    for row in result["rows"]:
        steps = row["stages"]["denoiser"]["step"]
        assert row["images_seen"] == steps * 8 and row["minutes"] > 0 and row["fd"] > result["real images"]["fd"]
        assert row["space"] == ("4x7x7" if row["name"] == "ours, latents" else "1x28x28")
        assert row["name"] in shown and ("vae" in row["stages"]) == (row["name"] == "ours, latents")
    latents, pixels = result["rows"][:2]
    assert latents["parameters"] == size(VAE(TINY.vae)) + size(UNet(TINY.unet))
    assert pixels["parameters"] == size(UNet(replace(TINY.unet, in_channels=1)))
    steps = [row["images_seen"] / 8 for row in result["rows"] if row["space"] == "1x28x28"]
    assert sorted(steps) == steps and set(steps) == {2, 4}, "the budget decides the steps, the smallest comes first"
    assert "not with papers" in shown


def test_vae_and_denoiser_share_a_budget_as_in_the_preset(racer, monkeypatch):
    given = {}

    def train_vae(run):
        given["vae"] = run.config.vae_train
        return VAE(TINY.vae)

    def train_denoiser(run, vae):
        given["denoiser"] = run.config.denoiser_train
        return nn.Module()

    monkeypatch.setattr(Run, "train_vae", train_vae)
    monkeypatch.setattr(Run, "train_denoiser", train_denoiser)
    monkeypatch.setattr(nn.Module, "to", lambda module, *where: module)
    minutes = [replace(stage, minutes=m) for stage, m in ((TINY.vae_train, 2.0), (TINY.denoiser_train, 6.0))]
    race.train_latents(racer(replace(TINY, vae_train=minutes[0], denoiser_train=minutes[1])), 40.0)
    assert given["vae"].minutes == pytest.approx(10) and given["vae"].steps == race.ENDLESS
    assert 39 < given["denoiser"].minutes < 40, "what the VAE did not use is left, but for the encoding"


def test_the_stop_watch_stands_still_while_steps_are_timed(racer, monkeypatch):
    monkeypatch.setattr(Run, "fit", lambda run, *stage: time.sleep(0.3) or "fitted")
    run = racer(TINY)
    assert run.fit("vae", None, None, None) == "fitted" and 60 * run.minutes < 0.2


def test_a_race_needs_a_budget_and_enough_samples():
    for minutes, n in (((0.0,), 20), ((float("inf"),), 20), ((1.0,), 19), ((1.0,), 10_000)):
        with pytest.raises(ValueError, match="a race needs"):
            race.race(CPU, "fp32", minutes, n, config=TINY)


def test_without_diffusers_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # makes its import fail
    assert race.race(CPU, "fp32", (), 20, config=TINY)["rows"] == []
    assert "diffusers is left out" in capsys.readouterr().out
    race.race(CPU, "fp32", (), 20, ["latents"], config=TINY)
    assert "diffusers" not in capsys.readouterr().out, "nobody asked for it"


def test_the_loss_of_the_diffusers_contestant_falls_and_it_samples(racer, monkeypatch):
    pytest.importorskip("diffusers")
    losses = []

    def stage(run, name, model, objective, config):
        config = replace(config, steps=40, batch=16, minutes=0)
        state = TrainState(model, config)
        for step in train(state, objective, len(run.images), config):
            losses.append(float(step.values["loss"].mean()))
            assert step.values["loss"].shape == (16,)
        return state.ema

    monkeypatch.setattr(Run, "stage", stage)
    model = race.train_diffusers(racer(TINY), 1.0)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    draw = [model.sample(torch.arange(4), steps=2, guidance=2.0, seed=seed, solver="ours") for seed in (0, 0, 1)]
    assert draw[0].shape == (4, 1, 28, 28) and draw[0].abs().max() <= 1
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_a_network_that_knows_the_image_has_no_loss_under_diffusers_and_its_loop_finds_it():
    diffusers = pytest.importorskip("diffusers")
    scheduler, x0 = diffusers.DDIMScheduler(), torch.rand(3, 1, 4, 4) * 2 - 1

    class Knows:
        num_classes = 10

        def __call__(self, zt, t, y):
            torch.testing.assert_close(1000 * t, (1000 * t).round(), atol=1e-3, rtol=0)  # whole steps
            alpha_bar = scheduler.alphas_cumprod[(1000 * t).round().long()][:, None, None, None]
            return (zt - alpha_bar.sqrt() * x0.repeat(len(zt) // 3, 1, 1, 1)) / (1 - alpha_bar).sqrt()

    out = diffusers_ddim(Knows(), scheduler, torch.randn(3, 1, 4, 4), torch.arange(3), 10, 2.0, "fp32")
    torch.testing.assert_close(out, x0, atol=1e-3, rtol=0)
    rng = torch.Generator().manual_seed(0)
    loss = diffusers_loss(Knows(), diffusers.DDPMScheduler(), x0, torch.arange(3), 0.1, rng)
    assert loss.shape == (3,) and loss.max() < 1e-6


def test_the_fit_finds_a_planted_exponent():
    x = [49, 256, 1024, 16384]
    assert scale.exponent(x, [0.02 * v**1.3 for v in x]) == pytest.approx(1.3)
    assert scale.exponent(x, [5.0] * 4) == pytest.approx(0)


def test_the_tables_of_growth_are_complete(capsys):
    result = scale.scale(CPU, "fp32", 0.0, TINY, (2, 4), (32, 64), (16, 32), **PEAK)
    assert json.loads(json.dumps(result))["exponents"] == result["exponents"]
    assert [row["batch"] for row in result["batch"]] == [2, 4] and [row["width"] for row in result["width"]] == [32, 64]
    assert len({row["gflop_per_image"] for row in result["batch"]}) == 1, "an image costs the same in any batch"
    shapes = [(row["space"], row["side"], row["shape"]) for row in result["side"]]
    assert shapes == [("latents", 16, (4, 4, 4)), ("latents", 32, (4, 8, 8)),
                      ("pixels", 16, (1, 16, 16)), ("pixels", 32, (1, 32, 32))]
    for row in result["batch"] + result["width"] + result["side"]:
        assert row["ms_per_image"] == pytest.approx(1000 * row["seconds"] / row["batch"])
    assert 1.5 < result["exponents"]["first channels"]["FLOP"] < 2.1, "a convolution costs in x out"
    assert 0.8 < result["exponents"]["pixels of the image, pixels"]["FLOP"] < 2
    assert "positions that the U-Net sees" in capsys.readouterr().out


@pytest.mark.parametrize(("operation", "kind"), [
    ("aten::mkldnn_convolution", "convolution"), ("aten::convolution_backward", "convolution"),
    ("aten::addmm", "matrix product"), ("aten::bmm", "matrix product"), ("aten::linear", "matrix product"),
    ("aten::native_group_norm_backward", "normalisation"), ("aten::silu_backward", "activation"),
    ("aten::_softmax", "activation"), ("aten::_foreach_lerp_", "EMA"), ("aten::_fused_adamw_", "optimizer"),
    ("aten::linalg_vector_norm", "optimizer"), ("aten::copy_", "copies"), ("aten::expand", "the rest"),
    ("aten::sum", "the rest"), ("autograd::engine::evaluate_function: ConvolutionBackward0", "the rest"),
])
def test_operations_have_their_kind(operation, kind):
    assert profiling.kind_of(operation) == kind


def test_the_profile_is_the_whole_step_and_counts_every_convolution():
    def make():
        return Work(TINY, CPU, "fp32").train_denoiser(UNet, TINY.unet, (4, 7, 7), 8)

    found = profiling.profile_steps(make(), 2, CPU)
    assert sum(row["share"] for row in found["kinds"].values()) + found["outside"] == pytest.approx(1)
    assert 0 <= found["outside"] < 0.9 and found["kinds"]["convolution"]["share"] > 0.05
    layers = sum(isinstance(layer, nn.Conv2d) for layer in UNet(TINY.unet).modules())
    assert found["kinds"]["convolution"]["calls"] == 2 * layers, "forward and backward"
    assert found["kinds"]["EMA"]["calls"] == 1 and found["kinds"]["optimizer"]["calls"] >= 2
    flop = sum((row["gflops"] or 0) * 1e9 * row["ms"] / 1e3 for row in found["kinds"].values())
    assert flop == pytest.approx(count_flop(make()))


def test_the_command_line_reaches_each_kind_and_draws(tmp_path, monkeypatch, capsys):
    asked = {}
    rows = [{"name": name, "budget": m, "fd": fd} for name in "ab" for m, fd in ((1.0, 3.0), (2.0, 1.5))]
    monkeypatch.setattr(race, "race", lambda device, precision, minutes, n, who, keep: asked.update(race=(minutes, n, who)) or {
        "rows": rows})
    row = {"space": "latents", "images_per_second": 1.0, "ms_per_image": 2.0, "batch": 1, "width": 32, "side": 28}
    monkeypatch.setattr(scale, "scale", lambda device, precision, seconds: asked.update(scale=seconds) or {
        key: [row] for key in ("batch", "width", "side")})
    monkeypatch.setattr(profiling, "profiling", lambda *machine: asked.update(profile=True) or {})
    out = tmp_path / "race.json"
    assert main(["bench", "race", "--minutes", "1", "2", "--n", "30", "--contestants", "pixels", "--out", str(out)]) == 0
    assert main(["bench", "scale", "--seconds", "0.5", "--out", str(tmp_path / "scale.json")]) == 0
    assert main(["bench", "profile", "--out", str(tmp_path / "profile.json")]) == 0
    assert asked == {"race": ([1.0, 2.0], 30, ["pixels"]), "scale": 0.5, "profile": True}
    assert json.loads(out.read_text()) == {"rows": rows}
    made = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(race, "race", lambda *arguments, **more: (_ for _ in ()).throw(Interrupted))
    assert main(["bench", "race"]) == 130 and "stopped" in capsys.readouterr().err
    assert made == {"race.json", "race.png", "scale.json", "scale.png", "profile.json"}
