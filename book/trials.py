"""What was tried, with its numbers: short runs that differ in one thing each, and the tables of book/trials.md.

    python book/trials.py autoencoder factor denoiser --jobs 2      run these groups, then write the tables
    python book/trials.py                                           write the tables from the rows that are there

A trial is one call of `python -m ldm_minimal train` with the flags below; its run folder is runs/trials/GROUP-NUMBER, and its
numbers are kept in book/trials.json. A trial whose row is there is not run again. With --jobs 2 two run at a time on one
thread each, which two cores finish sooner than one after the other on both.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ldm_minimal import LatentDiffusion, data
from ldm_minimal.checkpoint import load_json, save_json
from ldm_minimal.data import to_float, to_uint8
from ldm_minimal.evaluate import balanced, classify, compare, draw
from ldm_minimal.inception import inception_features
from ldm_minimal.metrics import frechet_distance, psnr, ssim
from ldm_minimal.pipeline import WEIGHTS, SampleConfig, load_classifier
from ldm_minimal.run import load_vae

ROOT = Path(__file__).parent.parent
RUNS, ROWS = ROOT / "runs" / "trials", ROOT / "book" / "trials.json"

AUTOENCODER = "vae --vae-train-steps 600 --vae-train-minutes 0"
FACTOR = ("all --vae-train-steps 100000 --vae-train-minutes 2 --denoiser-train-steps 100000 "
          "--denoiser-train-minutes 3")
DENOISER = ("denoiser --vae-from ldm_minimal/assets/weights/unet.json --denoiser-train-steps 100000 "
            "--denoiser-train-minutes 5")
GROUPS = {
    "autoencoder": {
        "plain: squared and absolute error, KL": "",
        "+ perceptual": "--vae-loss-perceptual 1",
        "+ adversarial": "--vae-loss-adversarial 0.5",
        "+ both": "--vae-loss-perceptual 1 --vae-loss-adversarial 0.5",
        "VQ (512 codes) in place of the KL": "--vae-codes 512 --vae-beta 1",
    },
    "factor": {
        "f = 2": "--vae-channels 32 64",
        "f = 4": "",
        "f = 7": "--vae-channels 32 128 --vae-factors 7",
        "f = 14": "--vae-channels 32 64 128 --vae-factors 2 7",
        "f = 4, VQ": "--vae-codes 512 --vae-beta 1",
    },
    "denoiser": {
        "U-Net 64, 128: cosine, v, uniform t": "",
    },
}
BASES = {"autoencoder": AUTOENCODER, "factor": FACTOR, "denoiser": DENOISER}


def run(group: str, name: str, threads: int) -> None:
    """Train one trial in a process of its own and add its row to trials.json."""
    folder, flags = RUNS / f"{group}-{list(GROUPS[group]).index(name)}", GROUPS[group][name]
    command = [sys.executable, "-m", "ldm_minimal", "train", *BASES[group].split(), *flags.split(), "--out", str(folder)]
    RUNS.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    print(f"{group}: {name}", flush=True)
    with open(RUNS / f"{folder.name}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
        measuring = [sys.executable, __file__, "--measure", str(folder)]
        subprocess.run(measuring, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    row = {"flags": flags, "base": BASES[group], "threads": threads} | load_json(folder / "row.json")
    rows = load_json(ROWS) if ROWS.is_file() else {}
    rows.setdefault(group, {})[name] = row
    save_json(ROWS, rows)


def measure(folder: Path, n: int = 2000, inception: int = 1000) -> None:
    """folder/row.json: what the autoencoder rebuilds and, where there is a denoiser, what it draws.

    rFD and rFID compare the reconstructions of the test images (the first `inception` of them for rFID) with these very
    images, so a perfect autoencoder has 0.
    """
    test = data.load("fashion-mnist", "test")
    classifier = load_classifier(WEIGHTS / "classifier-fashion-mnist.json")
    reference, _ = classify(classifier, test.images)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    row = {e["stage"]: {"steps": e["step"], "ms": 1000 * e["seconds"] / e["step"]} for e in entries}  # the last of each
    vae = load_vae(folder) if (folder / "vae.json").is_file() else LatentDiffusion.pretrained().vae
    with torch.no_grad():
        rebuilt = torch.cat([to_uint8(vae.decode(vae.encode(to_float(x)).mode())) for x in test.images.split(500)])
    row |= {"psnr": float(psnr(test.images, rebuilt).mean()), "ssim": float(ssim(test.images, rebuilt).mean()),
            "rfd": frechet_distance(classify(classifier, rebuilt)[0], reference)}
    if (folder / "vae.json").is_file():
        real, fake = (inception_features(images[:inception]) for images in (test.images, rebuilt))
        row["rfid"] = frechet_distance(real, fake)
    if (folder / "model.json").is_file():
        model = LatentDiffusion.load(folder)
        model.to(model.device, "bf16")
        samples, labels, cost = draw(model, n, SampleConfig())
        features, found = classify(classifier, samples)
        row |= compare(features, reference, reference[balanced(test.labels, n)])
        row |= {"class_accuracy": float((found == labels).double().mean()), "images_per_second": cost["images_per_second"]}
    save_json(folder / "row.json", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []])
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time; the threads are divided among them")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    rows, threads = load_json(ROWS) if ROWS.is_file() else {}, max(1, torch.get_num_threads() // args.jobs)
    todo = [(group, name) for group in args.groups for name in GROUPS[group] if name not in rows.get(group, {})]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda trial: run(*trial, threads), todo))


if __name__ == "__main__":
    main()
