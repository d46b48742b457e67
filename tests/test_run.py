"""The main job: what its denoiser learns, and the early copy of it that the samples are guided away from."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from ldm_minimal import LatentDiffusion, data, run
from ldm_minimal.__main__ import main
from ldm_minimal.checkpoint import load_json, load_tensors
from ldm_minimal.denoiser import Denoiser, draw_times
from ldm_minimal.latents import draw_latents
from ldm_minimal.presets import PRESETS
from ldm_minimal.train import TrainConfig, step_generator

TINY = ["train", "--preset", "tiny", "--precision", "fp32"]
SMALLER = ["--vae-train-steps", "6", "--denoiser-train-steps", "8", "--samples", "20"]


def test_the_denoiser_of_half_the_steps_is_kept_and_the_samples_are_guided_away_from_it(tiny_run, tmp_path):
    model, weak, metrics = (load_json(tiny_run / f"{name}.json") for name in ("model", "weak", "metrics"))
    assert weak["meta"]["steps"] == 20 and metrics["weak"] == "weak.json" and metrics["sampler"]["guidance"] == 1.5
    assert weak["files"]["vae"] == model["files"]["vae"] and weak["files"]["denoiser"] != model["files"]["denoiser"]
    argv = ["evaluate", "--model", str(tiny_run), "--n", "60", "--steps", "4", "--guidance", "1.5", "--precision", "fp32"]
    for name, more in (("guided", ["--weak", str(tiny_run / "weak.json")]), ("plain", [])):
        assert main([*argv, *more, "--out", str(tmp_path / name)]) == 0
    fd = {name: load_json(tmp_path / name)["table"]["samples"]["fd"] for name in ("guided", "plain")}
    assert fd["guided"] == pytest.approx(metrics["table"]["samples"]["fd"], rel=1e-3) and fd["plain"] != pytest.approx(fd["guided"], rel=1e-3)


def test_the_weak_model_is_the_average_after_its_share_of_the_steps_and_to_keep_it_changes_nothing(tmp_path):
    runs = {"kept": ["--early", "0.25"], "without": ["--early", "0"], "no average": ["--early", "0.25", "--denoiser-train-ema", "0"]}
    for name, flags in runs.items():
        assert main([*TINY, *SMALLER, *flags, "--out", str(tmp_path / name)]) == 0
    assert not (tmp_path / "without" / "weak.json").exists() and load_json(tmp_path / "kept" / "weak.json")["meta"]["steps"] == 2
    read = lambda name, part: load_tensors(tmp_path / name / f"{part}.safetensors")[0]
    kept, without = read("kept", "denoiser"), read("without", "denoiser")
    assert all(torch.equal(kept[key], without[key]) for key in kept)
    state = read("kept", "denoiser.state")  # of step 8: the average that is kept is an earlier one
    average, weights = read("kept", "weak"), read("no average", "weak")
    for key in ("stem.weight", "time.0.bias"):
        assert not torch.equal(average[key], weights[key]) and not torch.equal(average[key], state[f"ema.net.{key}"])


@pytest.mark.parametrize("latents", ["samples", "means"])
def test_the_denoiser_learns_samples_of_the_posteriors_or_their_means_at_unit_variance(tmp_path, monkeypatch, latents):
    distances = []

    def draw(moments, scale, generator):
        z0 = draw_latents(moments, scale, generator)
        distances.append((z0 - scale * moments[:, 0]).abs().max().item())
        return z0

    monkeypatch.setattr(run, "draw_latents", draw)
    assert main([*TINY, *SMALLER, "--latents", latents, "--out", str(tmp_path / "run")]) == 0
    means = LatentDiffusion.load(tmp_path / "run").encode(data.to_float(data.load().images))  # scaled
    if latents == "means":
        assert max(distances) < 1e-4 and means.std(correction=0) == pytest.approx(1, abs=1e-4)
    else:
        assert min(distances) > 0.1 and means.std(correction=0) < 0.98


@pytest.mark.parametrize("flags, words", [
    (["--early", "1"], ["early", "below 1"]), (["--early", "-0.1"], ["early"]),
])
def test_the_share_of_the_steps_lies_below_one(tmp_path, capsys, flags, words):
    assert main([*TINY, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and not (tmp_path / "run").exists()


def test_minutes_become_as_many_steps_as_fit_into_them(tmp_path, monkeypatch):
    clock = count(0, 0.5)  # half a second a step
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(run, "train", lambda *given: range(12))
    fit = run.Run(tmp_path / "run", PRESETS["tiny"], torch.device("cpu"), "fp32").fit
    short = fit("vae", torch.nn.Linear(1, 1), None, TrainConfig(steps=1000, warmup=100, minutes=2.0))
    assert (short.steps, short.warmup) == (240, 24)
    enough = TrainConfig(steps=100, warmup=50, minutes=2.0)
    assert fit("vae", torch.nn.Linear(1, 1), None, enough) == enough, "nothing is cut where the time suffices"


def test_a_step_of_the_denoiser_sees_its_images_their_labels_and_the_times_asked_for(tiny_run, tmp_path, monkeypatch):
    seen, loss = [], Denoiser.loss

    def spy(self, z0, y, generator=None, t=None, eps=None):
        seen.append((z0, y, t))
        return loss(self, z0, y, generator, t=t, eps=eps)

    monkeypatch.setattr(Denoiser, "loss", spy)
    monkeypatch.setattr(run, "draw_latents", lambda moments, scale, noise: scale * moments[:, 0])  # draws no number
    assert main([*TINY, "denoiser", "--vae-from", str(tiny_run), "--seed", "5", "--early", "0", "--denoiser-train-steps", "3",
                 "--denoiser-times", "logit_normal", "--out", str(tmp_path / "run")]) == 0
    model, train, steps = LatentDiffusion.load(tmp_path / "run"), data.load(), list(seen)
    assert len(steps) == 3
    for step, (z0, y, t) in enumerate(steps):
        index = data.batch_index(step, len(y), len(train), 5)
        assert torch.equal(y, train.labels[index])
        assert torch.equal(t, draw_times(len(y), step_generator(5, step, "cpu"), "logit_normal"))
        torch.testing.assert_close(z0, model.encode(data.to_float(train.images[index])), rtol=1e-3, atol=1e-4)
