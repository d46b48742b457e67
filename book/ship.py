"""Turn finished runs into what the package ships: half-precision weights, their model card, README's table and picture.

    python book/ship.py --vae RUN --vae-gpu RUN --perceptual RUN --classifier RUN --unet RUN --dit RUN --weak RUN

takes the networks of the run folders named and leaves the others as they are; then everything that shows their numbers is
measured and written anew (with --as-measured: written from the last measurement). Without any RUN only the numbers are
refreshed. The commands of the runs are in the model card. --inception adds the Inception FID: about ten minutes on two CPU
cores for each of the eight sets of 10,000 images.
"""

import argparse
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ldm_minimal import LatentDiffusion, checkpoint, data, plot
from ldm_minimal.evaluate import as_table, evaluate
from ldm_minimal.inception import inception_features
from ldm_minimal.pipeline import SHIPPED, WEIGHTS, SampleConfig, load_classifier
from ldm_minimal.precision import pick_device, pick_precision
from ldm_minimal.report import describe
from ldm_minimal.run import bar, device_name, load_vae

ROOT = Path(__file__).parent.parent
GPU = WEIGHTS / "vae-gpu"  # a better autoencoder, with latents of its own: what to train the next denoisers on
AUTOGUIDANCE = 1.5  # the scale, for which see trials.md
TITLES = {"unet": "U-Net", "dit": "DiT", "weak": "weak U-Net", "autoguided": f"U-Net with autoguidance {AUTOGUIDANCE:g}"}


def copy_weights(runs: dict[str, Path]) -> None:
    vae = load_vae(runs["vae"]) if "vae" in runs else None
    models = {net: LatentDiffusion.load(runs[net]) if net in runs else LatentDiffusion.pretrained(net) for net in SHIPPED}
    for net, model in models.items():  # all were read before the first is written: they share the VAE's file
        shipped = checkpoint.load_json(WEIGHTS / f"{net}.json")["meta"]["runs"]
        model.meta["runs"] = dict(shipped)
        if net in runs:
            model.meta["runs"]["denoiser"] = origins(runs[net], "denoiser", shipped)
        if vae:
            model.vae, model.meta["runs"]["vae"] = vae, origins(runs["vae"], "vae", shipped)
        model.save(WEIGHTS, net, net, half=True)
    if "vae-gpu" in runs:
        vae = load_vae(runs["vae-gpu"])
        checkpoint.save_tensors(GPU / "vae.safetensors", {k: v.half() for k, v in vae.state_dict().items()})
        checkpoint.save_json(GPU / "vae.json", {"vae": asdict(vae.config), "runs": origins(runs["vae-gpu"], "vae", {})})
    for stage in ("perceptual", "classifier"):
        stem = f"{stage}-fashion-mnist"
        if stage in runs:
            tensors, _ = checkpoint.load_tensors(runs[stage] / f"{stem}.safetensors")
            checkpoint.save_tensors(WEIGHTS / f"{stem}.safetensors", {k: v.half() for k, v in tensors.items()})
            found = runs[stage] / f"{stem}.json"
            known = checkpoint.load_json(found) if found.is_file() else {}
            checkpoint.save_json(WEIGHTS / f"{stem}.json", known | {"runs": origins(runs[stage], stage, {})})


def origins(run: Path, stage: str, shipped: dict) -> list[dict]:
    """Where a network comes from, run after run: the command, data, device, steps and seconds of each.

    A run that trained on from another one or from shipped weights (--vae-from, --denoiser-from) comes after the runs of these.
    """
    if not (run / "log.jsonl").is_file():  # vae-gpu, which brings its own along
        return checkpoint.load_json(run / f"{stage}.json")["runs"]
    config, entries = checkpoint.load_json(run / "config.json"), (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last = [entry for line in entries if (entry := json.loads(line))["stage"] == stage][-1]
    own = {"command": config["command"], "seed": config["config"]["seed"], "data_sha256": config["data"]["sha256"],
           "steps": last["step"], "seconds": round(last["seconds"]), "device": config["device"],
           "precision": config["precision"], "versions": config["versions"]}
    start = config.get(f"{stage}_from")
    before = origins(Path(start), stage, shipped) if start and Path(start).is_dir() else shipped[stage] if start else []
    return [*before, own]


def kept_features(images: torch.Tensor) -> torch.Tensor:
    """Inception features, kept in runs/inception: most sets are compared more than once, and each takes minutes."""
    device = pick_device()
    precision = "bf16" if pick_precision(device)[0] == "bf16" else "fp32"
    name = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    path = ROOT / "runs" / "inception" / f"{name}-{precision}.safetensors"
    if not path.is_file():
        checkpoint.save_tensors(path, {"features": inception_features(images, device, precision)})
    return checkpoint.load_tensors(path)[0]["features"]


def measure(n: int, sample: SampleConfig, inception: bool, seeds: int) -> dict:
    """Each way of sampling against the real test set: name -> result of evaluate(). `seeds` is for the best of them."""
    train, test = (data.load("fashion-mnist", split) for split in ("train", "test"))
    if len(train) != 60_000:
        raise SystemExit("the numbers that ship are measured on all of Fashion-MNIST, which was not found")
    device = pick_device()
    precision, _ = pick_precision(device)
    classifier = load_classifier(WEIGHTS / "classifier-fashion-mnist.json").to(device)
    results = {}
    models = {net: LatentDiffusion.pretrained(net).to(device, precision) for net in SHIPPED}
    for name, net, weak, config, sets in (("unet", "unet", None, sample, 1), ("dit", "dit", None, sample, 1),
                                          ("autoguided", "unet", "weak", replace(sample, guidance=AUTOGUIDANCE), seeds)):
        with bar(n * sets, name, "image") as progress:
            results[name] = evaluate(models[net], classifier, train, test, n, config, kept_features if inception else None,
                                     progress.update, sets, models.get(weak))
        results[name] |= {"weak": weak, "device": device_name(device), "precision": precision}
        print(as_table(results[name]), flush=True)
        checkpoint.save_json(WEIGHTS / "metrics.json", results)
    return results


def card(results: dict) -> str:
    """MODEL_CARD.md."""
    about = {net: checkpoint.load_json(WEIGHTS / f"{net}.json") for net in SHIPPED}
    judges = {name: checkpoint.load_json(WEIGHTS / f"{name}-fashion-mnist.json") for name in ("classifier", "perceptual")}
    networks = [("VAE", "vae", about["unet"]["meta"]["runs"]["vae"])]
    networks += [(TITLES[net], net, about[net]["meta"]["runs"]["denoiser"]) for net in SHIPPED]
    networks += [("feature classifier", "classifier-fashion-mnist", judges["classifier"]["runs"]),
                 ("network of the perceptual loss", "perceptual-fashion-mnist", judges["perceptual"]["runs"]),
                 ("VAE trained on a GPU", "vae-gpu/vae", checkpoint.load_json(GPU / "vae.json")["runs"])]
    lines = ["# Model card", "", "Small latent diffusion models of Fashion-MNIST, for learning and teaching. Trained with this package on the 60,000",
             "training images, stored in float16. They draw 28 x 28 grey pictures of clothes, and nothing else.", "",
             "| network | file | parameters | sha256 |", "|---|---|---|---|"]
    for name, stem, _ in networks:
        file = WEIGHTS / f"{stem}.safetensors"
        count = sum(t.numel() for t in checkpoint.load_tensors(file)[0].values()) / 1e6
        lines.append(f"| {name} | `{stem}.safetensors` | {count:.2f} M | `{checkpoint.sha256(file)}` |")
    lines += ["", "The VAE trained on a GPU has latents of its own, which none of these denoisers fits: it is for denoisers to come (book/trials.md).",
              f"The latent scale of the others is {about['unet']['latent_scale']:.4f}. The classifier is right on "
              f"{100 * judges['classifier']['test_accuracy']:.1f} % of the test images.", "",
              "## How they were trained", "",
              "In this order; a path of the package's own weights in a command means the network as the line above left it. Seconds are",
              "upper bounds: the machine did other work, too.", "",
              "| network | command | steps | seconds | device, precision |", "|---|---|---|---|---|"]
    lines += [f"| {name} | `{run['command']}` | {run['steps']:,} | {run['seconds']:,} | {run['device']}, {run['precision']} |"
              for name, _, runs in networks for run in runs]
    lines += ["", "## Measured", "", *table(results), "", "Licence: MIT, as the package. Data: Fashion-MNIST (MIT, Zalando SE)."]
    return "\n".join(lines) + "\n"


def table(results: dict) -> list[str]:
    """The results as a Markdown table, with its protocol above it."""
    first = results["unet"]
    sampler = SampleConfig(**first["sampler"] | {"interval": tuple(first["sampler"]["interval"])})
    inception = "inception_fid" in first["table"]["samples"]
    lines = [f"{first['n']:,} images of each kind against the {first['reference']}; {describe(sampler)}, balanced labels, EMA weights, uint8 images.",
             "FD, KID, precision, recall and coverage are on the features of our own classifier, so they compare these rows with each other and",
             "not with papers. (The ceiling's images are rebuilt from the reference itself, which flatters its precision, recall and coverage.)"]
    if inception:
        lines += ["FID is on the standard Inception features: against the 10,000 test images, and against 10,000 training images. Autoguidance is "
                  "away from", "the weak U-Net."]
    heads = ["images", *(["FID test", "FID train"] if inception else []), "FD", "KID x1000", "precision", "recall", "coverage", "class accuracy"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    names = {"floor": "real training images (floor)", "ceiling": "test images through the autoencoder (ceiling)", "noise": "uniform noise"}

    def line(name: str, row: dict) -> str:
        cells = [f"{row[key]:.2f}" if key in row else "" for key in ("inception_fid", "inception_fid_train")] if inception else []
        cells += [f"{row['fd']:.3f}", f"{row['kid_x1000']:.2f}", *(f"{row[key]:.3f}" for key in ("precision", "recall", "coverage")),
                  f"{100 * row['class_accuracy']:.1f} %"]
        return "| " + " | ".join([name, *cells]) + " |"

    lines += [line(names[key], first["table"][key]) for key in ("floor", "ceiling")]
    for net, result in results.items():
        lines.append(line(f"samples, {TITLES[net]}", result["table"]["samples"]))
        lines += [line(name.replace("samples", f"samples, {TITLES[net]}"), row) for name, row in result["more_seeds"].items()]
    lines += [line(names["noise"], first["table"]["noise"]), "",
              f"Reconstructions of the test set: PSNR {first['reconstruction']['psnr_db']:.2f} dB, SSIM {first['reconstruction']['ssim']:.3f}. "
              f"Memorisation ratio (1 is healthy, 0 is copying): "
              + ", ".join(f"{TITLES[net]}: {r['memorisation']:.2f}" for net, r in results.items()) + "."]
    return lines


def replace_between(text: str, name: str, lines: list[str]) -> str:
    """Put lines between <!-- name --> and <!-- /name -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no place <!-- {name} -->")
    return pattern.sub(lambda m: m.group(1) + "\n".join(lines) + "\n" + m.group(2), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("vae", "vae-gpu", "perceptual", "classifier", *SHIPPED)
    for name in parts:
        parser.add_argument(f"--{name}", type=Path, metavar="RUN")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3, help="sets of samples of the U-Net with autoguidance")
    parser.add_argument("--inception", action="store_true", help="measure the Inception FID, too")
    parser.add_argument("--as-measured", action="store_true", help="take the numbers of the last measurement")
    args = parser.parse_args()
    copy_weights({name: path for name in parts if (path := getattr(args, name.replace("-", "_")))})
    sample = SampleConfig()
    results = checkpoint.load_json(WEIGHTS / "metrics.json") if args.as_measured else measure(args.n, sample, args.inception, args.seeds)
    (WEIGHTS / "MODEL_CARD.md").write_text(card(results), encoding="utf-8")
    model = LatentDiffusion.pretrained()
    x = model.sample(torch.arange(10).repeat_interleave(10), **vars(sample))
    plot.save_figure(plot.image_grid(x, 10, model.classes), ROOT / "book" / "samples.png")
    readme = ROOT / "README.md"
    readme.write_text(replace_between(readme.read_text(encoding="utf-8"), "results", table(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
