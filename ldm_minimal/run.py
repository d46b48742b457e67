r"""The main job: data -> VAE -> latents and their scale -> denoiser -> pictures and metrics, in one folder.

    config.json            what was asked for, and on what it ran
    log.jsonl              one line per 50 steps: loss, its parts, noise-prediction error by range of t
    *.state.safetensors    everything a stage needs to go on after an interruption, written every minute
    vae.safetensors, denoiser.safetensors, model.json      the trained model, as LatentDiffusion.load reads it
    weak.safetensors, weak.json                            the denoiser early in its training, for autoguidance
    samples.png, reconstructions.png, curves.png, filmstrip.png, metrics.json

A run killed at any moment goes on with --resume exactly where its last state was written. Of several processes
(parallel.py) all train, and the first alone writes.
"""

import copy
import fcntl
import json
import os
import platform
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from . import __version__, data, parallel, report
from .checkpoint import CheckpointError, atomic, load_json, save_json, save_tensors
from .classifier import Classifier, classifier_loss
from .denoiser import draw_times
from .ema import EMA
from .evaluate import classify, evaluate
from .latents import draw_latents, encode_moments, latent_scale
from .perceptual import FeatureNet, PerceptualVAE
from .pipeline import (
    NETS, WEIGHTS, LatentDiffusion, build_denoiser, check_sha256, config_from, load_classifier, load_weights,
)
from .precision import autocast, device_name
from .presets import RunConfig
from .train import Meter, TrainConfig, TrainState, compile_or_not, train
from .vae import VAE, VAEConfig
from .vq import build_vae

STAGES = ("perceptual", "vae", "denoiser", "classifier")
LOG_EVERY = 50  # steps
SAVE_EVERY = 60  # seconds


def versions() -> dict[str, str]:
    return {"ldm_minimal": __version__, "python": platform.python_version(), "torch": torch.__version__}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal, seen between two steps; the state has been written."""


@contextmanager
def interrupt_between_steps():
    """Within it the first Ctrl-C (or SIGTERM) only sets the flag that this yields; the loop reads it after a step."""
    flag = []
    before = {}

    def handler(number, frame):
        if flag:
            raise KeyboardInterrupt  # asked twice: now
        flag.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread (a notebook's worker, a test): Ctrl-C stays what it is
        pass
    try:
        yield flag
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm:
    """Rate, time left and a postfix for every long step; a line now and then where the output is no terminal."""
    seconds = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, desc=f"{what:10}", unit=unit, initial=initial, mininterval=seconds, dynamic_ncols=True,
                smoothing=0.05, disable=not parallel.is_main())


class Run:
    """A run folder: its config, its log, and the stages that fill it."""

    record = True  # steps as CUDA graphs, see train.train

    def __init__(self, folder: Path, config: RunConfig, device: torch.device, precision: str, compile: bool = False):
        self.folder, self.config, self.device, self.precision, self.compile = folder, config, device, precision, compile
        self.progress = torch.zeros((), dtype=torch.float64, device=device)  # share of the present stage's steps taken
        for first in (True, False):  # the first process may have to fetch the files
            if parallel.is_main() == first:
                self.images: data.Dataset = data.load(config.dataset, "train")
                self.test: data.Dataset = data.load(config.dataset, "test")
            parallel.each(None)
        print(f"data       {len(self.images)} + {len(self.test)} images, {self.images.source}", flush=True)

    # -- the folder ---------------------------------------------------------------------------------------------

    @contextmanager
    def held(self):
        """Within it no other process trains in the folder: FileExistsError if one does already."""
        if not parallel.is_main():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        place = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(place)
            raise FileExistsError(f"another process is training in {self.folder}: name another folder with --out") from None
        except OSError:  # a file system without locks
            pass
        try:
            for leftover in self.folder.glob(".*.part*"):  # of a process that was killed while it wrote
                leftover.unlink()
            yield
        finally:
            if not any(self.folder.iterdir()):  # nothing was begun
                self.folder.rmdir()
            os.close(place)

    def check(self, vae_from=None, denoiser_from=None) -> None:
        """Refuse now what a later stage could not do, by one image through the networks: ValueError or CheckpointError."""
        config = self.config
        if config.vae_loss.decoder_only and not vae_from:
            raise ValueError("decoder_only leaves the encoder as it is: name a trained one with --vae-from")
        for part in config.trainings:
            data.batch_index(0, part.batch, len(self.images), config.seed)
        vae = load_vae(vae_from) if vae_from else build_vae(config.vae)
        denoiser = build_denoiser(self.network(vae, denoiser_from), config.denoiser)
        with torch.no_grad():
            z = vae.encode(data.to_float(self.images.images[:1])).mean
            denoiser(z, torch.ones(1), torch.zeros(1, dtype=torch.long))

    def start(self, **more) -> None:
        """Write config.json: from here on the folder is a run that can be resumed. FileExistsError where files are."""
        if self.folder.exists() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} exists and is not empty: choose another --out, or go on with it: "
                                  f"--resume --out {shlex.quote(str(self.folder))}")
        parallel.each(None)  # all have looked before one writes
        if parallel.is_main():
            save_json(self.folder / "config.json", more | {
                "precision": self.precision, "device": device_name(self.device), "processes": parallel.place()[1],
                "versions": versions(), "data": {"source": self.images.source, "sha256": self.images.sha256},
                "config": asdict(self.config),
            })

    def check_data(self) -> None:
        """Before going on: the data must be what the run began with."""
        began = load_json(self.folder / "config.json")["data"]
        if began["sha256"] != self.images.sha256:
            raise CheckpointError(f"{self.folder} was begun on other data ({began['source']}) than what is found now "
                                  f"({self.images.source}); set LDM_DATA to the former to go on")

    def log(self, entry: dict) -> None:
        if parallel.is_main():
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def entries(self, stage: str) -> list[dict]:
        """The log of one stage; a last line cut off by a kill is not an entry."""
        path = self.folder / "log.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
        return [e for e in entries if e["stage"] == stage]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop log lines of steps that will be taken again."""
        path = self.folder / "log.jsonl"
        if path.is_file():
            keep = [e for s in STAGES for e in self.entries(s) if s != stage or e["step"] <= step]
            with atomic(path) as part:
                part.write_text("".join(json.dumps(e) + "\n" for e in keep), encoding="utf-8")

    # -- one stage ----------------------------------------------------------------------------------------------

    def stage(self, name: str, model, objective, config: TrainConfig, keep=None) -> EMA:
        """Train `model` to the end, from the state file where there is one; returns its EMA.

        keep: called with the EMA's model, the step and the seconds when the share `early` of its steps has been taken
        """
        path = self.folder / f"{name}.state.safetensors"
        model, spent = model.to(self.device), 0.0
        if config.minutes and not path.is_file():
            config = self.fit(name, model, objective, config)
        state = TrainState(model, config, self.precision)
        if path.is_file():
            more = state.load(path)
            spent, config = more["seconds"], replace(config, steps=more["steps"], warmup=more["warmup"])
        if parallel.is_main():
            self.forget_after(name, state.step)
        started = saved = time.perf_counter()
        meter = Meter()
        when = keep and max(1, round(self.config.early * config.steps))
        self.progress.fill_(state.step / config.steps)

        def save() -> None:
            if parallel.is_main():
                seconds = spent + time.perf_counter() - started
                state.save(path, {"seconds": seconds, "steps": config.steps, "warmup": config.warmup})

        with interrupt_between_steps() as interrupted, bar(config.steps, name, "step", state.step) as progress:
            for step in train(state, objective, len(self.images), config, self.config.seed, self.record):
                meter.add(step)
                progress.update()
                if step.step == when:
                    keep(state.ema.model, step.step, spent + time.perf_counter() - started)
                self.progress.fill_(step.step / config.steps)
                stop = parallel.mean(torch.tensor(float(len(interrupted)))) > 0  # a signal may reach only one process
                if step.step % LOG_EVERY == 0 or step.step == config.steps or stop:
                    means = meter.summary()  # raises Diverged; what is saved below is therefore sound
                    seconds = spent + time.perf_counter() - started
                    self.log({"stage": name, "step": step.step, "seconds": round(seconds, 2), **means})
                    shown = {key: f"{means[key]:.4g}" for key in ("loss", "eps_mse") if key in means}
                    progress.set_postfix(shown, refresh=False)
                    if stop:
                        save()
                        parallel.each(None)  # torchrun ends all processes when the first has gone
                        raise Interrupted
                    if time.perf_counter() - saved > SAVE_EVERY or step.step == config.steps:
                        save()
                        saved = time.perf_counter()
        parallel.each(None)  # from here on all find what the first has written
        return state.ema

    def fit(self, name: str, model, objective, config: TrainConfig) -> TrainConfig:
        """Fewer steps where this machine is too slow for config.minutes, measured on a throw-away copy of the model."""
        self.progress.fill_(1.0)  # as at the end, with every term of the loss: the dearest steps
        trial = TrainState(copy.deepcopy(model), config, self.precision)
        for copied, own in zip(trial.model.modules(), model.modules()):
            if own._compiled_call_impl:  # a copy is not compiled
                copied.compile()
        times = [time.perf_counter()]
        for _ in train(trial, objective, len(self.images), replace(config, steps=12), self.config.seed, self.record):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        per_step = sorted(b - a for a, b in pairwise(times[3:]))[4]  # the median, after three steps to warm up
        steps = parallel.each(min(config.steps, max(1, int(60 * config.minutes / per_step))))[0]
        if steps == config.steps:
            return config
        print(f"{name:10} {steps} steps instead of {config.steps}: at {1000 * per_step:.0f} ms a step, that is "
              f"what {config.minutes:g} minutes allow", flush=True)
        return replace(config, steps=steps, warmup=min(config.warmup, steps // 10))

    # -- the three networks -------------------------------------------------------------------------------------

    def train_vae(self, start_from=None) -> VAE:
        """The VAE's EMA; also in vae.safetensors and vae.json. start_from: as for load_vae, else from scratch."""
        if (self.folder / "vae.json").is_file():
            return load_vae(self.folder).to(self.device)
        features = self.features() if self.config.vae_loss.perceptual else None
        images = self.images.images.to(self.device)

        def objective(model, index, noise):
            return model.loss(data.to_float(images[index]), features, self.progress, noise)

        torch.manual_seed(self.config.seed)
        vae = load_vae(start_from).requires_grad_(True) if start_from else build_vae(self.config.vae)
        vae.config = replace(vae.config, beta=self.config.vae.beta)  # of all options of the VAE only this is no shape
        model = PerceptualVAE(vae, self.config.vae_loss)
        vae = self.stage("vae", model, objective, self.config.vae_train).model.vae
        if parallel.is_main():
            checksum = save_tensors(self.folder / "vae.safetensors", vae.state_dict())
            save_json(self.folder / "vae.json", {"vae": asdict(vae.config), "sha256": checksum})
        return vae.requires_grad_(False)

    def features(self) -> FeatureNet:
        """The network of the perceptual loss: the one that ships for this data set, else one trained here."""
        name = f"perceptual-{self.config.dataset}.safetensors"
        path = WEIGHTS / name if (WEIGHTS / name).is_file() else self.folder / name
        if not path.is_file():
            self.train_features()
        net = FeatureNet()
        load_weights(net, path)
        return net.eval().requires_grad_(False).to(self.device)

    def train_features(self) -> None:
        """perceptual-{dataset}.safetensors: another network and another seed than the classifier that measures."""
        self.train_on_labels("perceptual", FeatureNet, self.config.perceptual_train, self.config.seed + 2)

    def train_denoiser(self, vae: VAE, start_from=None) -> LatentDiffusion:
        """The complete model with the denoiser's EMA; also in model.json and the files that it names.

        With `early` of the config also weak.json: the same model with the EMA after that share of the steps.
        start_from: a run folder or model JSON whose denoiser to go on with, else from scratch.
        """
        if (self.folder / "model.json").is_file():
            return LatentDiffusion.load(self.folder, self.device)
        config = self.config
        chunks, labels = [], self.images.labels.to(self.device)
        with bar(len(self.images), "latents", "image") as progress:
            for chunk in encode_moments(vae, self.images.images, precision=self.precision):
                chunks.append(chunk)
                progress.update(len(chunk))
        moments = torch.cat(chunks)  # (N, 2, C, h, w), on the device
        if config.latents == "means":
            moments[:, 1] = -torch.inf  # logvar: posteriors without spread, whose samples are their means
        scale = latent_scale(moments)
        print(f"latents    {tuple(moments.shape[2:])}, scale 1/std = {scale:.4f}", flush=True)

        def objective(denoiser, index, noise):
            z0 = draw_latents(moments[index], scale, noise)
            t = draw_times(len(index), noise, denoiser.times, self.device)
            loss = denoiser.loss(z0, labels[index], noise, t=t)
            return {"loss": loss, "eps_mse": denoiser.noise_loss(loss.detach(), t), "t": t}

        torch.manual_seed(config.seed)
        denoiser = build_denoiser(self.network(vae, start_from), config.denoiser)
        if self.compile:
            shape = (config.denoiser_train.batch // parallel.place()[1], *moments.shape[2:])
            zt, y = torch.zeros(shape, device=self.device), labels.new_zeros(shape[0])
            with autocast(self.device, self.precision):
                said = compile_or_not(denoiser.to(self.device).net, zt, zt.new_zeros(len(zt)), y)
            print(f"denoiser   {said}", flush=True)

        def packed(denoiser, steps: int, seconds: float) -> LatentDiffusion:
            meta = {"command": load_json(self.folder / "config.json")["command"], "seed": config.seed,
                    "steps": steps, "seconds": round(seconds, 2), "device": device_name(self.device),
                    "precision": self.precision, "versions": versions(),
                    "data": {"source": self.images.source, "sha256": self.images.sha256}}
            return LatentDiffusion(vae, denoiser, scale, tuple(moments.shape[2:]), config.dataset, config.denoiser, meta)

        def keep(*then) -> None:
            if parallel.is_main():
                packed(*then).save(self.folder, "weak", "weak")

        trained = self.stage("denoiser", denoiser, objective, config.denoiser_train, keep if config.early else None).model
        last = self.entries("denoiser")[-1]
        model = packed(trained, last["step"], last["seconds"])
        if parallel.is_main():
            model.save(self.folder)
        return model

    def network(self, vae: VAE, start_from=None):
        """The network that the denoiser's training begins with, see train_denoiser."""
        config = self.config
        if not start_from:
            kind, _ = NETS[config.net]
            return kind(replace(getattr(config, config.net), in_channels=vae.config.latent_channels))
        before = LatentDiffusion.load(start_from)
        if (before.config.schedule, before.config.target) != (config.denoiser.schedule, config.denoiser.target):
            raise ValueError(f"{start_from} predicts {before.config.target} on {before.config.schedule}, this run "
                             f"{config.denoiser.target} on {config.denoiser.schedule}")
        return before.denoiser.net.requires_grad_(True)

    def weak(self) -> LatentDiffusion | None:
        """The model to guide away from, if `train_denoiser` kept one."""
        return LatentDiffusion.load(self.folder / "weak.json").to(self.device, self.precision) if self.config.early else None

    def train_classifier(self) -> Classifier:
        """The feature classifier's EMA; also in classifier-{dataset}.safetensors and .json, with its test accuracy."""
        path = self.folder / f"classifier-{self.config.dataset}.json"
        if path.is_file():
            return load_classifier(path).to(self.device)
        build = partial(Classifier, self.config.classifier)
        classifier = self.train_on_labels("classifier", build, self.config.classifier_train, self.config.seed + 1)
        if parallel.is_main():
            _, found = classify(classifier, self.test.images)
            accuracy = float((found == self.test.labels).double().mean())
            print(f"classifier accuracy on the test set {100 * accuracy:.1f} %", flush=True)
            save_json(path, {"classifier": asdict(self.config.classifier), "test_accuracy": accuracy})
        return classifier

    def train_on_labels(self, stage: str, build, config: TrainConfig, seed: int):
        """The EMA of build(), trained to tell the classes apart; also in {stage}-{dataset}.safetensors."""
        images, labels = self.images.images.to(self.device), self.images.labels.to(self.device)

        def objective(net, index, noise):
            return {"loss": classifier_loss(net, data.to_float(images[index]), labels[index], noise)}

        torch.manual_seed(seed)
        net = self.stage(stage, build(), objective, config).model
        if parallel.is_main():
            save_tensors(self.folder / f"{stage}-{self.config.dataset}.safetensors", net.state_dict())
        parallel.each(None)
        return net

    def measure(self, model: LatentDiffusion, weak: LatentDiffusion | None = None) -> dict:
        """metrics.json: the table of evaluate.py for config.samples images, and the seconds of each stage.

        Only the first process measures; the others get {}.
        """
        path = WEIGHTS / f"classifier-{self.config.dataset}.json"
        classifier = load_classifier(path).to(self.device) if path.is_file() else self.train_classifier()
        if not parallel.is_main():
            return {}
        n = min(self.config.samples, len(self.test))
        with bar(n, "samples", "image") as progress:
            result = evaluate(model, classifier, self.images, self.test, n, self.config.sample,
                              progress=progress.update, weak=weak)
        result["weak"] = weak and "weak.json"
        result["training"] = {stage: {key: entries[-1][key] for key in ("step", "seconds", "loss")}
                              for stage in STAGES if (entries := self.entries(stage))}
        save_json(self.folder / "metrics.json", result)
        return result

    def all(self, vae_from=None, denoiser_from=None) -> dict:
        """Every stage that is not done yet; returns the metrics."""
        vae = load_vae(vae_from).to(self.device) if vae_from else self.train_vae()
        model = self.train_denoiser(vae, denoiser_from).to(self.device, self.precision)
        weak = self.weak() if parallel.is_main() else None
        if parallel.is_main():
            report.pictures(model, self.test, self.config.sample, self.folder, weak)
            curves = report.training_curves({stage: self.entries(stage) for stage in STAGES})
            report.save_figure(curves, self.folder / "curves.png")
        return self.measure(model, weak)


def load_vae(path) -> VAE:
    """The autoencoder of a run folder (vae.json) or of any JSON with a section "vae" and vae.safetensors beside it."""
    path = Path(path)
    if path.is_dir():
        path = path / ("vae.json" if (path / "vae.json").is_file() else "model.json")
    known, file = load_json(path), path.parent / "vae.safetensors"
    vae = build_vae(config_from(VAEConfig, known.get("vae"), str(path)))
    load_weights(vae, file)
    checksum = known.get("sha256") or known.get("files", {}).get("vae", {}).get("sha256")
    if checksum:  # older run folders have none
        check_sha256(file, checksum, path)
    return vae.eval().requires_grad_(False)
