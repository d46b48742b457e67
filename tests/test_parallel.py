"""Two processes equal one at the same batch: the same weights, the same log, interrupted or not; one of them writes.

"Equal" is up to the order of sums in float32. The moments of AdamW are compared most closely, being linear in the
gradients; the weights are not, where a gradient is so small that the optimizer's division makes noise of it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ldm_minimal
from ldm_minimal import parallel
from ldm_minimal.__main__ import main
from ldm_minimal.checkpoint import load_json, load_tensors
from ldm_minimal.classifier import Classifier, ClassifierConfig, classifier_loss
from ldm_minimal.denoiser import Denoiser, draw_times
from ldm_minimal.schedule import cosine
from ldm_minimal.train import TrainConfig, TrainState, step_generator, train
from ldm_minimal.unet import UNet, UNetConfig
from ldm_minimal.vae import VAE, VAEConfig, vae_loss

DIGITS = Path(ldm_minimal.__file__).parent / "assets" / "mnist-subset"  # no network of theirs ships: all are trained
FLAGS = ["--preset", "tiny", "--dataset", "mnist", "--precision", "fp32", "--samples", "20",
         "--perceptual-train-steps", "2", "--perceptual-train-batch", "32", "--vae-train-steps", "6",
         "--denoiser-train-steps", "6", "--classifier-train-steps", "2",
         "--vae-loss-perceptual", "0.0005",  # more would drown the rest: f / |f| of an untrained net enlarges rounding errors
         "--vae-loss-adversarial", "0.5", "--vae-loss-start", "0.4"]
INTERRUPTED = """
import os, signal, sys
from ldm_minimal.__main__ import main
from ldm_minimal.train import Meter
add = Meter.add

def add_and_stop(self, step):
    add(self, step)
    if step.step == 3 and os.environ["RANK"] == "1":  # the one that does not write
        os.kill(os.getpid(), signal.SIGTERM)

Meter.add = add_and_stop
sys.exit(main(sys.argv[1:]))
"""


def torchrun(*argv) -> subprocess.CompletedProcess:
    """Two processes on the CPU, with a thread each."""
    environment = os.environ | {"LDM_DATA": str(DIGITS), "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": str(Path(ldm_minimal.__file__).parent.parent)}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, argv)]
    with subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, error = process.communicate(timeout=580)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends those it started; a kill would leave them waiting for each other
            raise
    return subprocess.CompletedProcess(call, process.returncode, output, error)


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(DIGITS))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "one"
    os.environ["LDM_DATA"] = str(DIGITS)
    assert main(["train", *FLAGS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel") / "two"
    done = torchrun("-m", "ldm_minimal", "train", *FLAGS, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Everything is in") == 1, "one process prints"
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The autoencoder alone, stopped after three of its six steps by a signal to the process that does not write."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "interrupted.py").write_text(INTERRUPTED)
    stopped = torchrun(folder / "interrupted.py", "train", "vae", *FLAGS, "--out", folder / "run")
    assert stopped.returncode != 0 and stopped.stderr.count("go on with") == 1, stopped.stderr
    assert load_tensors(folder / "run" / "vae.state.safetensors")[1]["step"] == 3
    return folder / "run"


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_up_to_rounding(a: Path, b: Path) -> None:
    a, b = (load_tensors(folder)[0] for folder in (a, b))
    assert a.keys() == b.keys()
    for kind, tolerance in (("exp_avg", 1e-4), ("model.", 1e-5), ("ema.", 1e-5)):
        names = [name for name in a if name.startswith(kind) or name.endswith(kind)]
        x, y = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (a, b))
        difference = ((x - y).norm() / x.norm()).item()
        assert difference < tolerance, f"{kind}: {difference:.1e}"


# -- one process, as if it were one of two ------------------------------------------------------------------------


def halves(seed: int = 0) -> list[torch.Generator]:
    generators = [step_generator(seed, 5, "cpu", parallel.Noise()) for _ in range(2)]
    for part, generator in enumerate(generators):
        generator.part, generator.parts = part, 2
    return generators


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_the_times_of_two_shares_are_those_of_the_whole_batch(times):
    whole = draw_times(16, torch.Generator().manual_seed(5), times)
    assert torch.equal(whole, draw_times(16, step_generator(0, 5, "cpu"), times)), "a generator like any other"
    assert torch.equal(whole, torch.cat([draw_times(8, noise, times) for noise in halves()]))


def test_the_losses_of_two_shares_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    denoiser = Denoiser(UNet(UNetConfig(channels=(16, 32), blocks=1)), cosine, "v", drop=0.5)
    torch.nn.init.normal_(next(p for p in reversed(list(denoiser.parameters())) if p.ndim == 4))  # so that labels count
    vae, classifier = VAE(VAEConfig(channels=(16, 16, 32))), Classifier(ClassifierConfig(channels=(16, 32)))
    z, y, x = torch.randn(8, 4, 7, 7), torch.arange(8), torch.rand(8, 1, 28, 28)
    for loss in (lambda rows, noise: denoiser.loss(z[rows], y[rows], noise),
                 lambda rows, noise: sum(vae_loss(vae, x[rows], noise)),
                 lambda rows, noise: classifier_loss(classifier, x[rows], y[rows], noise)):
        with torch.no_grad():
            whole = loss(slice(0, 8), step_generator(0, 5, "cpu"))
            parts = [loss(rows, noise) for rows, noise in zip((slice(0, 4), slice(4, 8)), halves())]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_a_batch_without_equal_shares_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(parallel, "place", lambda: (1, 3))
    assert list(range(12))[parallel.share(12)] == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="batch of 32 .* 3 processes"):
        parallel.share(32)
    config, model = TrainConfig(batch=32), torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="batch of 32 .* 3 processes"):
        next(train(TrainState(model, config), lambda model, index, noise: {}, 64, config))


# -- two processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["perceptual", "vae", "denoiser"])
def test_two_processes_train_what_one_does(one, two, stage):
    assert_equal_up_to_rounding(one / f"{stage}.state.safetensors", two / f"{stage}.state.safetensors")


def test_the_log_is_that_of_the_whole_batch_and_is_written_once(one, two):
    a, b = log(one), log(two)
    assert [(e["stage"], e["step"]) for e in a] == [(e["stage"], e["step"]) for e in b]
    for mine, theirs in zip(a, b):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"stage", "seconds"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), key


def test_the_folder_is_the_same_as_that_of_one_process(one, two):
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert load_json(two / "config.json")["processes"] == 2
    assert load_json(two / "config.json")["command"].startswith("torchrun --nproc-per-node=2 -m ldm_minimal train")
    a, b = (load_json(folder / "metrics.json") for folder in (one, two))
    assert a["table"]["samples"]["fd"] == pytest.approx(b["table"]["samples"]["fd"], rel=1e-2) and a["n"] == b["n"]


def test_two_processes_go_on_bit_for_bit_where_they_were_stopped(two, interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    done = torchrun("-m", "ldm_minimal", "train", "--resume", "--out", folder)
    assert done.returncode == 0, done.stderr
    a, b = (load_tensors(path / "vae.state.safetensors")[0] for path in (two, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [entry["step"] for entry in log(folder) if entry["stage"] == "vae"] == [3, 6]


def test_one_process_goes_on_where_two_were_stopped(one, interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert_equal_up_to_rounding(one / "vae.state.safetensors", folder / "vae.state.safetensors")
