"""What was tried, with its numbers: short runs that differ in one thing each, and the tables of book/trials.md.

    python book/trials.py autoencoder factor denoiser --jobs 2      run these groups, then write the tables
    python book/trials.py sampling                                  sample the shipped U-Net in different ways, the same
    python book/trials.py shipped                                   what the shipped autoencoders rebuild, as ship.py measured it, the same
    python book/trials.py                                           write the tables from the rows that are there

A trial is one call of `python -m ldm_minimal train` with the flags below; its run folder is runs/trials/GROUP-NUMBER, its numbers
are kept in book/trials.json. A trial whose row is there is not run again. With --jobs 2 two run at a time on one
thread each, which two cores finish sooner than one after the other on both.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch

from ldm_minimal import LatentDiffusion, data
from ldm_minimal.checkpoint import load_json, save_json
from ldm_minimal.data import to_float, to_uint8
from ldm_minimal.evaluate import balanced, classify, draw, score
from ldm_minimal.metrics import frechet_distance, kid, psnr, ssim
from ldm_minimal.pipeline import WEIGHTS, SampleConfig, load_classifier
from ldm_minimal.precision import pick_precision
from ldm_minimal.run import load_vae

from ship import kept_features, replace_between

ROOT = Path(__file__).parent.parent
RUNS, ROWS = ROOT / "runs" / "trials", ROOT / "book" / "trials.json"
WRITING = Lock()  # two trials may end together

PLAIN = "runs/vae"  # by the first command of the model card: squared and absolute error and a KL, nothing else
FIRST = "--denoiser-train-batch 128 --denoiser-train-lr 0.001 --denoiser-times uniform"  # the preset when the trials began
STRAIGHT = "--denoiser-schedule linear --denoiser-target flow --denoiser-times logit_normal"
WHOLE = (f"all {FIRST} --vae-train-batch 128 --vae-train-steps 100000 --vae-train-minutes 1.5 --denoiser-train-steps 100000 "
         "--denoiser-train-minutes 2 --samples 20 --sample-steps 2")
GROUPS = {  # name: (what all its trials share, {trial: its own flags})
    "autoencoder": (
        f"vae --vae-from {PLAIN} --vae-train-batch 32 --vae-train-lr 0.0005 --vae-train-steps 700 "
        "--vae-train-minutes 0 --vae-loss-start 0.1", {
            "squared and absolute error, KL": "",
            "+ perceptual": "--vae-loss-perceptual 1",
            "+ adversarial": "--vae-loss-adversarial 20",
            "+ both": "--vae-loss-perceptual 1 --vae-loss-adversarial 20",
        }),
    "factor": (
        WHOLE, {
            "f = 1 (1 channel)": "--vae-channels 32 --vae-latent-channels 1",
            "f = 2": "--vae-channels 32 64",
            "f = 4": "",
            "f = 7": "--vae-channels 32 128 --vae-factors 7",
            "f = 14": "--vae-channels 32 64 128 --vae-factors 2 7",
            "f = 4, VQ with 512 codes": "--vae-codes 512 --vae-beta 1",
        }),
    "beta": (
        WHOLE, {f"beta {beta:g}": f"--vae-beta {beta:g}" for beta in (0.02, 0.1, 0.3)}),
    "batch": (
        "vae --vae-train-steps 100000 --vae-train-minutes 2.5", {
            "batch 128": "--vae-train-batch 128",
            "batch 64": "--vae-train-batch 64",
            "batch 32": "--vae-train-batch 32",
        }),
    "denoiser": (
        f"denoiser {FIRST} --denoiser-train-steps 100000 --denoiser-train-minutes 2", {
            "U-Net 64-128, cosine, v, uniform t": "",
            "seed 1": "--seed 1",
            "linear path, flow, uniform t": "--denoiser-schedule linear --denoiser-target flow",
            "linear path, flow, logit-normal t": STRAIGHT,
            "cosine, eps": "--denoiser-target eps",
            "U-Net 96-192, 1 block": "--unet-channels 96 192 --unet-blocks 1",
            "U-Net 64-128, learning rate 2e-3": "--denoiser-train-lr 0.002",
            "cosine, v, logit-normal t, learning rate 2e-3": "--denoiser-times logit_normal --denoiser-train-lr 0.002",
            "linear path, flow, logit-normal t, learning rate 2e-3": f"{STRAIGHT} --denoiser-train-lr 0.002",
            "the same, learning rate 4e-3": f"{STRAIGHT} --denoiser-train-lr 0.004",
            "the same, learning rate 2e-3, batch 64": f"{STRAIGHT} --denoiser-train-lr 0.002 --denoiser-train-batch 64",
            "cosine, v, logit-normal t, learning rate 4e-3": "--denoiser-times logit_normal --denoiser-train-lr 0.004",
            "the same, batch 64": "--denoiser-times logit_normal --denoiser-train-lr 0.004 --denoiser-train-batch 64",
            "cosine, v, logit-normal t, learning rate 2e-3, batch 32": "--denoiser-times logit_normal --denoiser-train-lr 0.002 --denoiser-train-batch 32",
            "cosine, v, uniform t, learning rate 4e-3, batch 64": "--denoiser-train-lr 0.004 --denoiser-train-batch 64",
            "DiT 128 x 6": "--net dit",
            "DiT 192 x 6": "--net dit --dit-width 192 --dit-heads 6",
        }),
}
MORE = ("sampling", "shipped")  # groups that train nothing
SAMPLING = {f"{solver}, {spacing}, {steps} steps": SampleConfig(steps, 2.0, solver=solver, spacing=spacing)
            for solver, spacing in (("dpm++2m", "middle"), ("dpm++2m", "time"), ("ddim", "time"))
            for steps in (5, 10, 20, 50)}
GUIDANCE = {f"guidance {scale:g}, for t in {low:g} ... {high:g}": SampleConfig(10, scale, (low, high), spacing="middle")
            for scale, low, high in ((1.0, 0, 1), (1.25, 0, 1), (1.5, 0, 1), (2.0, 0, 1), (3.0, 0, 1), (2.0, 0.0, 0.8),
                                     (2.0, 0.2, 0.8))}
AUTOGUIDANCE = {f"away from the weak U-Net, scale {scale:g}": SampleConfig(10, scale) for scale in (1.25, 1.5, 2.0)}
DRAWN = {  # samples of each trial
    "factor": (500, SampleConfig(10, spacing="middle")),
    "beta": (500, SampleConfig(10, spacing="middle")),
    "denoiser": (1000, SampleConfig(10, 1.25, spacing="middle")),
}


def run(group: str, name: str, threads: int) -> None:
    """Train one trial in a process of its own, measure it in another, and add its row to trials.json."""
    common, trials = GROUPS[group]
    folder = RUNS / f"{group}-{list(trials).index(name)}"
    command = ["-m", "ldm_minimal", "train", *common.split(), *trials[name].split(), "--out", str(folder)]
    RUNS.mkdir(parents=True, exist_ok=True)
    print(f"{group}: {name}", flush=True)
    with open(RUNS / f"{folder.name}.log", "w", encoding="utf-8") as log:
        for arguments in (command, [__file__, "--measure", str(folder), group]):
            subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=log, check=True,
                           env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    with WRITING:
        rows = load_json(ROWS) if ROWS.is_file() else {}
        rows.setdefault(group, {})[name] = {"flags": trials[name], "threads": threads} | load_json(folder / "row.json")
        save_json(ROWS, rows)


def draw_and_score(model, classifier, test, reference: torch.Tensor, n: int, config: SampleConfig, weak=None):
    """(n samples, their row): distances to the test images' features `reference`, class accuracy, rate."""
    x, labels, cost = draw(model, n, config, weak=weak)
    row, *_ = score(classifier, x, labels, reference, reference[balanced(test.labels, n)])
    return x, row | {"images_per_second": cost["images_per_second"]}


def autoencoders(group: str = "shipped") -> None:
    """Rows of the autoencoders that ship, as ship.py measured them: all test images rebuilt, against the same images."""
    rows, known = load_json(ROWS), load_json(WEIGHTS / "metrics.json")
    rows[group] = {}
    for name, model in (("of the chapters' models", "unet"), ("of the best model, trained on a GPU", "best")):
        of, ceiling = known[model]["reconstruction"], known[model]["table"]["ceiling"]
        rows[group][name] = {"psnr": of["psnr_db"], "ssim": of["ssim"], "rfd": ceiling["fd"], "rfid_all": ceiling["inception_fid"],
                             "inception_kid_x1000": ceiling["inception_kid_x1000"]}
    save_json(ROWS, rows)


def measure(folder: Path, group: str, n: int = 1000) -> None:
    """folder/row.json: what the autoencoder rebuilds and, where there is a denoiser, what it draws."""
    test = data.load("fashion-mnist", "test")
    classifier = load_classifier(WEIGHTS / "classifier-fashion-mnist.json")
    reference, _ = classify(classifier, test.images)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    row = {e["stage"]: {"steps": e["step"], "ms": 1000 * e["seconds"] / e["step"]} | {k: e[k] for k in ("kl",) if k in e}
           for e in entries}  # the last of each
    if (folder / "vae.json").is_file():
        vae = load_vae(folder)
        rebuilt = torch.cat([to_uint8(vae.decode(vae.encode(to_float(x)).mode())) for x in test.images.split(500)])
        row |= {"psnr": float(psnr(test.images, rebuilt).mean()), "ssim": float(ssim(test.images, rebuilt).mean()),
                "rfd": frechet_distance(classify(classifier, rebuilt)[0], reference)}
        if vae.config.codes:
            latents = torch.cat([vae.encode(to_float(x)).mode() for x in test.images.split(500)])
            row["codes_used"] = len(vae.quantizer(latents)[1].unique())
    if group == "autoencoder":
        real, fake = kept_features(test.images[: 3 * n]), kept_features(rebuilt[:n])
        row |= {"rfid": frechet_distance(real[:n], fake), "inception_kid_x1000": 1000 * kid(real[n:], fake)[0]}
    elif group in DRAWN:
        samples, config = DRAWN[group]
        model = LatentDiffusion.load(folder)
        x, drawn = draw_and_score(model.to(model.device, pick_precision(model.device)[0]), classifier, test, reference, samples, config)
        row |= drawn
    save_json(folder / "row.json", row)


def sampling(group: str, trials: dict[str, SampleConfig], n: int = 1000, weak: LatentDiffusion | None = None) -> None:
    """Rows of the shipped U-Net, sampled in different ways from the same noise."""
    test, rows = data.load("fashion-mnist", "test"), load_json(ROWS) if ROWS.is_file() else {}
    classifier = load_classifier(WEIGHTS / "classifier-fashion-mnist.json")
    reference, _ = classify(classifier, test.images)
    model = LatentDiffusion.pretrained()
    for each in filter(None, (model, weak)):
        each.to(each.device, pick_precision(each.device)[0])
    rows[group] = {}
    for name, config in trials.items():
        _, rows[group][name] = draw_and_score(model, classifier, test, reference, n, config, weak)
        print(f"{name}: FD {rows[group][name]['fd']:.3f}", flush=True)
    save_json(ROWS, rows)


COLUMNS = {  # heading: how a row shows it
    "PSNR dB": lambda r: f"{r['psnr']:.2f}",
    "SSIM": lambda r: f"{r['ssim']:.4f}",
    "rFD": lambda r: f"{r['rfd']:.4f}",
    "rFID, 10,000": lambda r: f"{r['rfid_all']:.2f}",
    "rFID, 1,000": lambda r: f"{r['rfid']:.2f}",
    "Inception KID x1000": lambda r: f"{r['inception_kid_x1000']:.2f}",
    "VAE ms/step": lambda r: f"{r['vae']['ms']:.0f}",
    "codes used": lambda r: f"{r['codes_used']}",
    "denoiser steps": lambda r: f"{r['denoiser']['steps']:,}",
    "denoiser ms/step": lambda r: f"{r['denoiser']['ms']:.0f}",
    "FD": lambda r: f"{r['fd']:.3f}",
    "KID x1000": lambda r: f"{r['kid_x1000']:.2f}",
    "precision": lambda r: f"{r['precision']:.3f}",
    "recall": lambda r: f"{r['recall']:.3f}",
    "KL": lambda r: f"{r['vae']['kl']:.0f}",
    "class accuracy": lambda r: f"{100 * r['class_accuracy']:.1f} %",
    "samples/s": lambda r: f"{r['images_per_second']:.0f}",
}


def table(rows: dict[str, dict]) -> list[str]:
    """A Markdown table of all columns that some row has."""
    def cell(show, row: dict) -> str:
        try:
            return show(row)
        except KeyError:
            return ""

    shown = {head: show for head, show in COLUMNS.items() if any(cell(show, row) for row in rows.values())}
    lines = ["| " + " | ".join(["trial", *shown]) + " |", "|---" * (len(shown) + 1) + "|"]
    return lines + ["| " + " | ".join([name, *(cell(show, row) for show in shown.values())]) + " |"
                    for name, row in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join([*GROUPS, *MORE]))
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time; the threads are divided among them")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(Path(args.measure[0]), args.measure[1])
    rows, threads = load_json(ROWS) if ROWS.is_file() else {}, max(1, torch.get_num_threads() // args.jobs)
    if unknown := set(args.groups) - {*GROUPS, *MORE}:
        parser.error(f"unknown group {', '.join(unknown)}")
    todo = [(group, name) for group in args.groups if group in GROUPS for name in GROUPS[group][1] if name not in rows.get(group, {})]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda trial: run(*trial, threads), todo))
    if "shipped" in args.groups:
        autoencoders()
    if "sampling" in args.groups:
        sampling("solver", SAMPLING)
        sampling("guidance", GUIDANCE)
        sampling("autoguidance", AUTOGUIDANCE, weak=LatentDiffusion.pretrained("weak"))
    page = ROOT / "book" / "trials.md"
    text = page.read_text(encoding="utf-8")
    for group, of in load_json(ROWS).items():  # the words around the tables stay
        text = replace_between(text, group, table(of))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
