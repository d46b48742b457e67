"""The command line as a user meets it: the whole run, resume after a kill, exit codes, and clear words for wrong input."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_minimal import bench
from ldm_minimal import run as run_module
from ldm_minimal.__main__ import latest_unfinished, main
from ldm_minimal.checkpoint import load_into, load_json, load_tensors, save_json, save_tensors
from ldm_minimal.perceptual import FeatureNet
from ldm_minimal.plot import as_gray, image_grid
from ldm_minimal.report import summary

from conftest import SUBSET

TINY = ["train", "--preset", "tiny", "--precision", "fp32"]
SMALLER = ["--vae-train-steps", "6", "--denoiser-train-steps", "8"]


def png_size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n", f"{path} is no PNG"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def fails(capsys, argv, code, *words):
    assert main([str(a) for a in argv]) == code
    error = capsys.readouterr().err
    for word in words:
        assert word in error, f"{word!r} is not in: {error}"
    assert "Traceback" not in error


# -- the main job -----------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_it_promises(tiny_run):
    for name in ("vae.safetensors", "denoiser.safetensors", "model.json", "config.json", "log.jsonl", "metrics.json"):
        assert (tiny_run / name).stat().st_size > 100
    for name in ("samples.png", "reconstructions.png", "curves.png", "filmstrip.png"):
        assert min(png_size(tiny_run / name)) > 50
    model, config = load_json(tiny_run / "model.json"), load_json(tiny_run / "config.json")
    assert model["meta"]["seed"] == 0 and model["meta"]["steps"] == 40 and len(model["meta"]["data"]["sha256"]) == 64
    assert model["latent_shape"] == [4, 7, 7] and model["latent_scale"] > 0 and model["denoiser"]["target"] == "v"
    assert config["versions"]["torch"] == torch.__version__ and config["config"]["vae_train"]["steps"] == 30
    log = [json.loads(line) for line in (tiny_run / "log.jsonl").read_text().splitlines()]
    last = [e for e in log if e["stage"] == "denoiser"][-1]
    assert last["step"] == 40 and len(last["by_t"]) == 5 and 0 < last["eps_mse"] < last["loss"] < 2


def test_the_metrics_hold_the_whole_protocol(tiny_run):
    metrics = load_json(tiny_run / "metrics.json")
    assert list(metrics["table"]) == ["floor", "ceiling", "samples", "noise"]
    for row in metrics["table"].values():
        assert {"fd", "kid_x1000", "precision", "recall", "density", "coverage", "class_accuracy"} <= row.keys()
    assert metrics["table"]["floor"]["fd"] < metrics["table"]["samples"]["fd"] < metrics["table"]["noise"]["fd"]
    assert sum(metrics["classes_found"].values()) == metrics["n"] == 60
    assert 5 < metrics["reconstruction"]["psnr_db"] < 40 and 0 < metrics["reconstruction"]["ssim"] < 1
    assert metrics["sampling"]["evaluations_per_image"] == 4 and metrics["memorisation"] > 0


def test_the_last_line_says_how_to_draw_as_the_run_did(tiny_run):
    metrics = load_json(tiny_run / "metrics.json")
    metrics["sampler"] |= {"solver": "ddim", "interval": (0.2, 0.8)}
    _, model, weak, *sampler = summary(metrics, tiny_run).splitlines()[-1].split(" --")
    assert model.startswith("model") and weak.endswith("weak.json")
    assert sorted(sampler) == ["guidance 1.5", "interval 0.2 0.8", "solver ddim", "steps 4"], "what is not the default, and no seed"


def test_what_a_run_leaves_is_the_average_and_not_the_last_weights(tiny_run):
    for part, inner in (("denoiser", "net"), ("vae", "vae")):
        left, state = (load_tensors(tiny_run / f"{part}{end}.safetensors")[0] for end in ("", ".state"))
        assert all(torch.equal(left[k], state[f"ema.{inner}.{k}"]) for k in left)
        assert not all(torch.equal(left[k], state[f"model.{inner}.{k}"]) for k in left)


def test_a_run_that_was_made_shorter_goes_on_at_that_length(tmp_path, monkeypatch):
    calls, loss, folder = [], run_module.PerceptualVAE.loss, tmp_path / "run"

    def stops_in_the_fourth_step(model, *given):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(model, *given)

    monkeypatch.setattr(run_module, "LOG_EVERY", 1)
    monkeypatch.setattr(run_module, "SAVE_EVERY", 0)
    monkeypatch.setattr(run_module.Run, "fit", lambda run, name, model, objective, config: replace(config, steps=6, warmup=2))
    monkeypatch.setattr(run_module.PerceptualVAE, "loss", stops_in_the_fourth_step)
    assert main([*TINY, "vae", "--vae-train-steps", "12", "--vae-train-minutes", "1", "--out", str(folder)]) == 130
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    own = load_tensors(folder / "vae.state.safetensors")[1]
    assert (own["step"], own["more"]["steps"], own["more"]["warmup"]) == (6, 6, 2)


def test_an_existing_folder_is_never_overwritten(tiny_run, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in tiny_run.iterdir()}
    fails(capsys, [*TINY, "--out", tiny_run], 2, "exists and is not empty", "--resume")
    assert before == {p.name: p.stat().st_mtime_ns for p in tiny_run.iterdir()}


def test_without_out_each_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([*TINY, "vae", "--vae-train-steps", "2"]) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["fashion-mnist-tiny", "fashion-mnist-tiny-2"]


LONGER = [*TINY, "--samples", "20", "--vae-train-steps", "4", "--denoiser-train-steps", "250"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    os.environ["LDM_DATA"] = str(SUBSET)
    assert main([*LONGER, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_stopped_in_the_middle_and_resumed_ends_with_the_same_weights(uninterrupted, tmp_path, blow):
    folder = tmp_path / "broken"
    # the state is written every 0 seconds instead of every 60, so that a kill finds one; nothing else differs
    code = "import ldm_minimal.run as r, sys; r.SAVE_EVERY = 0; from ldm_minimal.__main__ import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *LONGER, "--out", str(folder)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    state, deadline = folder / "denoiser.state.safetensors", time.time() + 120
    while not state.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(blow)
    error = process.communicate()[1]
    assert not (folder / "model.json").exists(), "the run was over before it could be stopped"
    if blow != signal.SIGKILL:
        assert process.returncode == 130 and f"--resume --out {folder}" in error
    assert 0 < load_tensors(state)[1]["step"] < 250
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    for name in ("vae.safetensors", "weak.safetensors", "denoiser.safetensors"):
        a, b = load_tensors(uninterrupted / name)[0], load_tensors(folder / name)[0]
        assert all(torch.equal(a[k], b[k]) for k in a), f"{name} differs"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    numbers = [entry["step"] for entry in log if entry["stage"] == "denoiser"]
    assert numbers[-1] == 250 and numbers == sorted(set(numbers)), "no step stands in the log twice"


def test_resume_refuses_changed_options_and_changed_data(tiny_run, tmp_path, capsys, monkeypatch):
    fails(capsys, ["train", "--resume", "--out", tiny_run, "--seed", "3"], 2, "keeps its options", "seed")
    fails(capsys, ["train", "--resume", "--out", tiny_run, "--precision", "bf16"], 2, "the run is in fp32")
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    config = load_json(copy / "config.json")
    config["data"]["sha256"] = "0" * 64
    (copy / "config.json").write_text(json.dumps(config))
    fails(capsys, ["train", "--resume", "--out", copy], 1, "other data")
    (copy / "config.json").write_text(json.dumps({"config": config["config"]}))
    fails(capsys, ["train", "--resume", "--out", copy], 1, "config.json was edited or cut off", "no data, denoiser_from, precision")
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["train", "--resume"], 2, "no unfinished run")
    for name, stage, last in (("a", "all", "model.json"), ("b", "vae", "log.jsonl"), ("c", "denoiser", "model.json"), ("d", "vae", "vae.json")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for file in ("config.json", last):
            (tmp_path / "runs" / name / file).write_text(json.dumps({"stage": stage}))
    assert latest_unfinished() == Path("runs/b"), "a and b miss their last file, and b was written to last"


def test_resume_refuses_another_stage_and_other_starts_and_a_precision_that_this_machine_lacks(tiny_run, tmp_path, capsys, monkeypatch):
    fails(capsys, ["train", "vae", "--resume", "--out", tiny_run], 2, "keeps its options", "the run trains all")
    fails(capsys, ["train", "--resume", "--vae-from", tiny_run, "--denoiser-from", tiny_run, "--out", tiny_run], 2, "--vae-from, --denoiser-from")
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    save_json(copy / "config.json", load_json(copy / "config.json") | {"precision": "fp16"})
    fails(capsys, ["train", "--resume", "--device", "cpu", "--out", copy], 2, "fp16 needs a GPU")


def test_two_processes_do_not_train_in_one_folder(tiny_run, tmp_path, capsys):
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    flock = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    (copy / ".model.json.part1").write_text("half, by the other process")
    other = subprocess.Popen([sys.executable, "-c", flock, str(copy)], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        fails(capsys, ["train", "--resume", "--out", copy], 2, "another process is training in")
        assert (copy / ".model.json.part1").exists(), "what the other one writes is left alone"
    finally:
        other.kill(), other.wait()
    assert main(["train", "--resume", "--out", str(copy)]) == 0 and not (copy / ".model.json.part1").exists()


def test_a_denoiser_is_not_trained_on_an_autoencoder_of_other_images_or_with_its_options_ignored(tiny_run, tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "run"]
    fails(capsys, [*TINY, "denoiser", "--vae-latent-channels", "8", *out], 2, "stays as it is", "--vae-latent-channels")
    fails(capsys, [*TINY, "--vae-from", tiny_run, "--vae-channels", "8", "16", *out], 2, "stays as it is", "--vae-channels")
    fails(capsys, [*TINY, "vae", "--vae-from", tiny_run, "--vae-channels", "8", "16", *out], 2, "stays as it is", "--vae-channels")
    fails(capsys, [*TINY, "classifier", "--vae-from", tiny_run, *out], 2, "stage classifier has no use", "--vae-from")
    fails(capsys, [*TINY, "vae", "--denoiser-from", tiny_run, *out], 2, "stage vae has no use", "--denoiser-from")
    monkeypatch.setenv("LDM_DATA", str(run_module.data.ASSETS / "mnist-subset"))
    fails(capsys, [*TINY, "denoiser", "--dataset", "mnist", *out], 2, "knows no mnist", "--vae-from")
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_other_than_the_one_described_is_refused(tiny_run, tmp_path, capsys):
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    tensors, meta = load_tensors(copy / "vae.safetensors")
    save_tensors(copy / "vae.safetensors", {name: 2 * tensor for name, tensor in tensors.items()}, meta)
    for start in (copy, copy / "model.json"):
        fails(capsys, [*TINY, "denoiser", "--vae-from", start, "--out", tmp_path / "run"], 1, "vae.safetensors", "its checksum differs")


def test_a_diverging_run_stops_names_the_step_and_keeps_its_last_state(tmp_path, capsys):
    folder = tmp_path / "run"
    fails(capsys, [*TINY, "--vae-train-lr", "1e30", "--vae-train-clip", "1e30", "--out", folder], 1, "step", "not finite", "last good state")
    assert not (folder / "vae.safetensors").exists()


def test_a_slow_machine_takes_fewer_steps_and_says_so(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*TINY, "vae", "--vae-train-minutes", "0.0005", "--vae-train-steps", "5000", "--out", str(folder)]) == 0
    assert "instead of 5000" in capsys.readouterr().out
    assert load_tensors(folder / "vae.state.safetensors")[1]["more"]["steps"] < 500


def test_the_students_variant_is_flags_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(run_module.data.ASSETS / "mnist-subset"))
    folder = tmp_path / "mnist"
    assert main([*TINY, "--dataset", "mnist", "--unet-blocks", "1", *SMALLER, "--out", str(folder)]) == 0
    assert load_json(folder / "model.json")["dataset"] == "mnist"
    assert main(["sample", "7", "3", "--model", str(folder), "--n", "2", "--steps", "2", "--out", str(folder / "s.png")]) == 0


def test_the_other_network_schedule_and_target_are_flags_too(tmp_path):
    folder = tmp_path / "dit"
    flags = ["--net", "dit", "--denoiser-schedule", "linear", "--denoiser-target", "flow", "--denoiser-times", "logit_normal"]
    assert main([*TINY, *flags, *SMALLER, "--samples", "20", "--out", str(folder)]) == 0
    model = load_json(folder / "model.json")
    assert model["net"] == "dit" and model["denoiser"] == {"schedule": "linear", "target": "flow", "times": "logit_normal", "drop": 0.1}


# -- the autoencoder's other losses ------------------------------------------------------------------------------


STEPS = ["--vae-train-steps", "6", "--vae-train-batch", "16", "--vae-train-warmup", "1"]
FEATURES = ["--perceptual-train-steps", "3", "--perceptual-train-batch", "16"]


def weights(folder):
    return load_tensors(folder / "vae.safetensors")[0]


def test_an_autoencoder_is_trained_on_from_the_given_one(tiny_run, tmp_path):
    vae = [*TINY, "vae", *STEPS, "--vae-from", str(tiny_run)]
    assert main([*vae, "--vae-train-lr", "1e-12", "--seed", "5", "--out", str(tmp_path / "still")]) == 0
    given, still = weights(tiny_run), weights(tmp_path / "still")
    for name in given:
        torch.testing.assert_close(still[name], given[name], atol=1e-8, rtol=0)
    assert main([*vae, "--vae-loss-decoder-only", "--out", str(tmp_path / "decoder")]) == 0
    decoder = weights(tmp_path / "decoder")
    assert all(torch.equal(decoder[name], given[name]) == name.startswith("encoder.") for name in given)
    assert load_json(tmp_path / "decoder" / "vae.json")["vae"] == load_json(tiny_run / "vae.json")["vae"]


def test_a_decoder_alone_without_a_trained_encoder_is_refused(tmp_path, capsys):
    fails(capsys, [*TINY, "vae", "--vae-loss-decoder-only", "--out", tmp_path / "run"], 2, "decoder_only", "--vae-from")


def test_a_denoiser_is_trained_on_from_the_given_one(tiny_run, tmp_path):
    folder = tmp_path / "on"
    flags = ["--denoiser-train-steps", "3", "--denoiser-train-lr", "1e-12", "--seed", "5"]
    assert main([*TINY, "denoiser", "--vae-from", str(tiny_run), "--denoiser-from", str(tiny_run), *flags,
                 "--out", str(folder)]) == 0
    a, b = (load_tensors(f / "denoiser.safetensors")[0] for f in (tiny_run, folder))
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=1e-8, rtol=0)
    before, after = (load_json(f / "model.json")["latent_scale"] for f in (tiny_run, folder))
    assert after == pytest.approx(before)


def test_a_denoiser_with_another_target_is_not_trained_on(tiny_run, tmp_path, capsys):
    fails(capsys, [*TINY, "denoiser", "--vae-from", tiny_run, "--denoiser-from", tiny_run, "--denoiser-target", "eps",
                   "--out", tmp_path / "on"], 2, "predicts v on cosine", "eps on cosine")


def test_an_autoencoder_with_all_terms_stopped_and_resumed_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "WEIGHTS", tmp_path)  # no network of the perceptual loss is there yet
    monkeypatch.setattr(run_module, "LOG_EVERY", 2)
    monkeypatch.setattr(run_module, "SAVE_EVERY", 0)
    argv = [*TINY, "vae", *STEPS, *FEATURES, "--vae-loss-perceptual", "0.1", "--vae-loss-adversarial", "20",
            "--vae-loss-start", "0.5"]
    seen, loss, threads = [], run_module.PerceptualVAE.loss, torch.get_num_threads()

    def stops_in_the_sixth_step(model, x, features, progress, noise):
        seen.append(float(progress))
        if len(seen) == 6:
            raise KeyboardInterrupt
        return loss(model, x, features, progress, noise)

    torch.set_num_threads(1)
    try:
        assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
        monkeypatch.setattr(run_module.PerceptualVAE, "loss", stops_in_the_sixth_step)
        assert main([*argv, "--out", str(tmp_path / "broken")]) == 130
        assert load_tensors(tmp_path / "broken" / "vae.state.safetensors")[1]["step"] == 4
        assert main(["train", "--resume", "--out", str(tmp_path / "broken")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert seen == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 4 / 6, 5 / 6]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(a[name], b[name]) for name in a)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"reconstruction", "kl", "perceptual", "discriminator"} <= log[-1].keys()


def test_the_network_of_the_perceptual_loss_is_a_stage_of_its_own_and_each_data_set_has_one(tmp_path, monkeypatch):
    folder = tmp_path / "p"
    assert main([*TINY, "perceptual", *FEATURES, "--out", str(folder)]) == 0
    net = FeatureNet()
    load_into(net, load_tensors(folder / "perceptual-fashion-mnist.safetensors")[0], "it")
    monkeypatch.setenv("LDM_DATA", str(run_module.data.ASSETS / "mnist-subset"))
    monkeypatch.setattr(run_module, "WEIGHTS", folder)  # where there is one for the other data set only
    mnist = tmp_path / "mnist"
    flags = ["--dataset", "mnist", *STEPS, *FEATURES, "--vae-loss-perceptual", "0.1"]
    assert main([*TINY, "vae", *flags, "--out", str(mnist)]) == 0
    own = load_tensors(mnist / "perceptual-mnist.safetensors")[0]
    assert not torch.equal(own["head.weight"], net.head.weight) and (mnist / "vae.json").is_file()
    log = [json.loads(line) for line in (mnist / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log] == ["perceptual", "vae"] and 0 < log[-1]["perceptual"] < 6


def test_a_codebook_and_any_factor_are_flags_and_the_denoiser_follows(tmp_path, capsys):
    vae, folder = tmp_path / "vae", tmp_path / "vq"
    flags = ["--vae-codes", "32", "--vae-channels", "8", "16", "--vae-factors", "7"]
    assert main([*TINY, "vae", *flags, *STEPS, "--out", str(vae)]) == 0
    assert main([*TINY, "denoiser", "--denoiser-train-steps", "2", "--vae-from", str(vae), "--out", str(folder)]) == 0
    model = load_json(folder / "model.json")
    assert model["latent_shape"] == [4, 4, 4] and model["vae"]["codes"] == 32 and model["vae"]["factors"] == [7]
    assert weights(folder)["quantizer.codebook.weight"].shape == (32, 4)
    argv = ["sample", "Bag", "--model", str(folder), "--n", "2", "--steps", "2"]
    assert main([*argv, "--out", str(folder / "s.png")]) == 0
    model["vae"]["factors"] = [7, 2]
    (folder / "model.json").write_text(json.dumps(model))
    fails(capsys, ["sample", "--model", folder, "--out", tmp_path / "x.png"], 1, "model.json", "factors (7, 2)")


# -- the other commands -----------------------------------------------------------------------------------------


def test_sample_writes_a_grid_and_the_arrays(tiny_run, tmp_path):
    png, npz = tmp_path / "a.png", tmp_path / "a.npz"
    assert main(["sample", "Sneaker", "bag", "--model", str(tiny_run), "--n", "3", "--steps", "2", "--out", str(png), "--npz", str(npz)]) == 0
    arrays = np.load(npz)
    assert arrays["images"].shape == (6, 1, 28, 28) and arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == [7, 7, 7, 8, 8, 8] and min(png_size(png)) > 50


def test_reconstruct_prints_its_quality(tiny_run, tmp_path, capsys):
    assert main(["reconstruct", "--model", str(tiny_run), "--n", "10", "--out", str(tmp_path / "r.png")]) == 0
    assert "2000 test images: PSNR" in capsys.readouterr().out and min(png_size(tmp_path / "r.png")) > 50


def test_the_classic_exercise_is_one_command(tiny_run, tmp_path):
    save_json(tmp_path / "metrics.json", {"n": 60})  # as a run left it
    assert main(["classic", "--model", str(tiny_run), "--steps", "2", "--out", str(tmp_path)]) == 0
    assert load_json(tmp_path / "metrics.json")["n"] == 60
    assert main(["classic", "--model", str(tiny_run), "--n", "20", "--steps", "1", "--out", str(tmp_path / "few")]) == 0
    assert load_json(tmp_path / "few" / "metrics.json")["classic"]["n"] == 20
    record = load_json(tmp_path / "metrics.json")["classic"]
    assert record["n"] == 512 and record["sampler"]["guidance"] == 1.25 and sum(record["per_class"]) == 512
    assert record["reconstruction"]["psnr_db"] > 5 and min(png_size(tmp_path / "gallery.png")) > 50


def test_evaluate_writes_the_table(tiny_run, tmp_path, capsys):
    assert main(["evaluate", "--model", str(tiny_run), "--n", "30", "--steps", "2", "--out", str(tmp_path / "m.json")]) == 0
    shown = capsys.readouterr().out
    assert "ceiling" in shown and "30 images of each kind against the 2000 test images" in shown and load_json(tmp_path / "m.json")["n"] == 30


def test_evaluate_says_how_to_get_a_classifier_where_none_ships(tiny_run, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    save_json(copy / "model.json", load_json(copy / "model.json") | {"dataset": "mnist"})
    monkeypatch.setenv("LDM_DATA", str(run_module.data.ASSETS / "mnist-subset"))
    fails(capsys, ["evaluate", "--model", copy, "--n", "30", "--out", tmp_path / "m.json"], 1, "knows mnist", "train classifier --dataset mnist")


@pytest.mark.parametrize("kind", ["race", "scale"])
def test_a_table_is_not_written_where_its_picture_goes(tmp_path, capsys, kind):
    fails(capsys, ["bench", kind, "--out", tmp_path / "race.png"], 2, "--out names the JSON")


def test_autoguidance_takes_a_weaker_model_and_refuses_one_of_other_latents(tiny_run, tmp_path, capsys):
    drawn = {}
    for name, model, flags in (("good", "unet", ["--guidance", "1"]), ("weak", "weak", ["--guidance", "1"]),
                               ("by the weak one alone", "unet", ["--weak", "weak", "--guidance", "0"]),
                               ("guided", "unet", ["--weak", "weak", "--guidance", "1.5"])):
        npz = tmp_path / f"{name}.npz"
        argv = ["sample", "bag", "--model", model, "--n", "2", "--steps", "3", *flags, "--out", str(tmp_path / "a.png"), "--npz", str(npz)]
        assert main(argv) == 0
        drawn[name] = np.load(npz)["images"].astype(int)
    assert abs(drawn["weak"] - drawn["by the weak one alone"]).max() <= 1 < abs(drawn["weak"] - drawn["good"]).max()
    assert abs(drawn["guided"] - drawn["good"]).max() > 1
    argv = ["evaluate", "--model", str(tiny_run), "--weak", str(tiny_run), "--n", "20", "--steps", "1", "--out", str(tmp_path / "m.json")]
    assert main(argv) == 0 and load_json(tmp_path / "m.json")["weak"] == str(tiny_run)
    fails(capsys, ["sample", "--model", tiny_run, "--weak", "weak", "--out", tmp_path / "x.png"], 2, "weak model", "encoder")
    fails(capsys, ["sample", "--model", tiny_run, "--weak", "nowhere", "--out", tmp_path / "x.png"], 1, "nowhere")


def test_info_names_versions_precision_and_data(capsys, monkeypatch):
    monkeypatch.setattr(bench, "default_preset", lambda device: "tiny")  # the minutes are then measured in no time
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (torch.__version__, "precision", "fashion-mnist", "minutes", "preset"):
        assert word in out


# -- wrong input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["Hat"], ["unknown class 'Hat'", "Sneaker"]), (["11"], ["unknown class '11'", "0 ... 9"]), (["--steps", "0"], ["steps", "0"]),
    (["--n", "0"], ["n must be at least 1", "0"]), (["--guidance", "-1"], ["guidance", "-1"]), (["--guidance", "nan"], ["guidance", "nan"]),
    (["--interval", "0.9", "0.1"], ["interval"]), (["--interval", "0.9"], ["two numbers"]),
])
def test_wrong_sampling_options_are_refused_with_the_valid_ones(tiny_run, tmp_path, capsys, flags, words):
    fails(capsys, ["sample", *flags, "--model", tiny_run, "--out", tmp_path / "x.png"], 2, *words)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("argv, words", [
    (["sample", "--solver", "euler"], ["invalid choice: 'euler'", "dpm++2m"]), (["train", "--preset", "huge"], ["invalid choice: 'huge'", "cpu"]),
    (["train", "--denoiser-schedule", "x"], ["invalid choice: 'x'", "cosine"]), (["train", "--dataset", "cifar"], ["invalid choice", "mnist"]),
    (["fly"], ["invalid choice", "train"]), (["train", "--unet-blocks", "two"], ["invalid int value: 'two'"]), ([], ["COMMAND"]),
])
def test_unknown_names_are_refused_with_the_valid_ones(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(word in error for word in words), error


@pytest.mark.parametrize("flags", [["--vae-train-steps", "0"], ["--denoiser-train-batch", "-4"], ["--denoiser-train-lr", "nan"], ["--samples", "3"],
                                   ["--denoiser-drop", "1.5"], ["--denoiser-train-batch", "99999"], ["--vae-codes", "-3"],
                                   ["--vae-factors", "7"], ["--vae-loss-start", "2"], ["--vae-loss-adversarial", "-1"],
                                   ["--sample-steps", "0"], ["--sample-guidance", "-1"], ["--sample-interval", "0.5"], ["--unet-blocks", "0"],
                                   ["--unet-channels", "16", "30"], ["--net", "dit", "--dit-heads", "0"], ["--net", "dit", "--dit-width", "30"],
                                   ["--vae-beta", "-1"], ["--seed", "9223372036854775807"], ["--denoiser-from", str(run_module.WEIGHTS / "unet.json"),
                                    "--denoiser-target", "eps"],
                                   ["--vae-channels", "8", "8", "8", "8"], ["--vae-channels", "-8", "16"], ["--vae-latent-channels", "-1"],
                                   ["--vae-latent-channels", "8", "--denoiser-from", str(run_module.WEIGHTS / "unet.json")],
                                   ["--classifier-train-batch", "99999"], ["--vae-loss-decoder-only"],
                                   ["--vae-from", str(run_module.WEIGHTS / "unet.json")],  # and steps for it
                                   ["--denoiser-from", str(run_module.WEIGHTS / "unet.json"), "--net", "dit"]])
def test_impossible_training_options_end_with_a_sentence(tmp_path, capsys, flags):
    fails(capsys, [*TINY, *SMALLER, *flags, "--out", tmp_path / "run"], 2, "error:")
    assert not (tmp_path / "run").exists(), "refused before anything is trained"


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    fails(capsys, ["sample", "--model", tmp_path / "none", "--out", tmp_path / "x.png"], 1, "none is not there")


def test_damaged_data_is_named_with_the_remedy(tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(os.environ["LDM_DATA"], tmp_path / "data")
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:1000])
    monkeypatch.setenv("LDM_DATA", str(folder))
    fails(capsys, [*TINY, "--out", tmp_path / "run"], 1, "train-images-idx3-ubyte.gz", "LDM_DATA")


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    fails(capsys, [*TINY, "--out", tmp_path / "file" / "run"], 1, "file")


def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path, capsys, monkeypatch):
    def full(self, path, meta=None):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run_module.TrainState, "save", full)
    fails(capsys, [*TINY, *SMALLER, "--out", tmp_path / "run"], 1, "No space left", "last good state")
    assert load_json(tmp_path / "run" / "config.json")["preset"] == "tiny"


def test_pictures_show_dark_clothes_on_white():
    black = torch.full((1, 1, 2, 2), -1.0)
    assert as_gray(black).max() == 255 and as_gray(black).min() == 255


def test_a_picture_shows_itself_in_a_notebook_pixel_for_pixel():
    picture = image_grid(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), 2, zoom=3, alt="four black squares")
    data, about = picture._repr_mimebundle_()
    assert base64.b64decode(data["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
    assert data["text/plain"] == about["image/png"]["alt"] == "four black squares"
    axes = picture.axes[0]
    assert axes.images[0].get_interpolation() == "nearest" and axes.images[0].get_array().shape == (58, 58)
    assert picture.get_size_inches() * picture.dpi == pytest.approx([3 * 58, 3 * 58])
