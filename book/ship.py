"""Turn finished runs into what the package ships: half-precision weights, their model card, README's table and picture.

    python book/ship.py --vae RUN --unet RUN --dit RUN --weak RUN --perceptual RUN --classifier RUN \\
                        --best RUN --best/vae RUN --best/weak RUN

takes the networks of the run folders named and leaves the others as they are; then everything that shows their numbers is
measured and written anew: all rows of the table, those that --rows names, or none (--rows without a name), whose numbers are
then those of the last measurement. The commands of the runs are in the model card. --inception adds the Inception FID: about
ten minutes on two CPU cores for each of the twelve sets of 10,000 images.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import torch

from ldm_minimal import LatentDiffusion, checkpoint, data, plot
from ldm_minimal.evaluate import as_table, evaluate
from ldm_minimal.inception import inception_features
from ldm_minimal.pipeline import SHIPPED, WEIGHTS, SampleConfig, load_classifier, same_encoder, shipped_json
from ldm_minimal.precision import device_name, pick_device, pick_precision
from ldm_minimal.report import describe
from ldm_minimal.run import bar, load_vae

ROOT = Path(__file__).parent.parent
TITLES = {"unet": "U-Net", "dit": "DiT", "weak": "weak U-Net", "best": "best model", "best/weak": "weak U-Net of the best model"}
ROWS = {  # ways to sample: (model, guidance; the weak model of autoguidance). For the scales see trials.md
    "unet": ("unet", 1.25, None), "dit": ("dit", 1.25, None), "autoguided": ("unet", 1.5, "weak"),
    "best": ("best", 1.5, "best/weak"),
}


def title(row: str) -> str:
    net, guidance, weak = ROWS[row]
    return TITLES[net] + (f" with autoguidance {guidance:g}" if weak else "")


def copy_weights(runs: dict[str, Path]) -> None:
    models = {net: LatentDiffusion.load(runs[net]) if net in runs else LatentDiffusion.pretrained(net) for net in SHIPPED}
    for net, model in models.items():  # all were read before the first is written: those of a folder share its VAE's file
        path = shipped_json(net)
        shipped, vae = checkpoint.load_json(path)["meta"]["runs"], str((path.parent / "vae").relative_to(WEIGHTS))
        model.meta["runs"] = dict(shipped)
        if net in runs:
            model.meta["runs"]["denoiser"] = origins(runs[net], "denoiser")
        if vae in runs:
            before, model.vae = model.vae, load_vae(runs[vae])
            model.meta["runs"]["vae"] = origins(runs[vae], "vae")
            if not same_encoder(before, model.vae):
                raise SystemExit(f"{net} was trained on other latents than those of {runs[vae]}")
    for net, model in models.items():
        path = shipped_json(net)
        if not all(same_encoder(model.vae, other.vae) for name, other in models.items() if shipped_json(name).parent == path.parent):
            raise SystemExit(f"{net} was trained on other latents than the networks that ship beside it")
    for net, model in models.items():
        path = shipped_json(net)
        model.save(path.parent, path.stem, path.stem, half=True)
    for stage in ("perceptual", "classifier"):
        stem = f"{stage}-fashion-mnist"
        if stage in runs:
            tensors, _ = checkpoint.load_tensors(runs[stage] / f"{stem}.safetensors")
            checkpoint.save_tensors(WEIGHTS / f"{stem}.safetensors", {k: v.half() for k, v in tensors.items()})
            found = runs[stage] / f"{stem}.json"
            known = checkpoint.load_json(found) if found.is_file() else {}
            checkpoint.save_json(WEIGHTS / f"{stem}.json", known | {"runs": origins(runs[stage], stage)})


def origins(run: Path, stage: str) -> list[dict]:
    """Where a network comes from, run after run: the command, data, device, steps and seconds of each.

    A run that trained on from another one or from shipped weights (--vae-from, --denoiser-from) comes after the runs of these.
    """
    if not (run / "log.jsonl").is_file():  # a model that ships, which brings its own along
        return checkpoint.load_json(run / "model.json" if run.is_dir() else run)["meta"]["runs"][stage]
    config, entries = checkpoint.load_json(run / "config.json"), (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last = [entry for line in entries if (entry := json.loads(line))["stage"] == stage][-1]
    own = {"command": config["command"], "seed": config["config"]["seed"], "data_sha256": config["data"]["sha256"],
           "steps": last["step"], "seconds": round(last["seconds"]), "device": config["device"],
           "precision": config["precision"], "versions": config["versions"]}
    start = config.get(f"{stage}_from")
    before = origins(Path(start), stage) if start else []
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


def measure(n: int, rows: list[str], inception: bool, seeds: int) -> dict:
    """The rows named against the real test set, and the others as they were: name -> result of evaluate().

    seeds: so many sets of samples for the rows with autoguidance
    """
    train, test = (data.load("fashion-mnist", split) for split in ("train", "test"))
    if len(train) != 60_000:
        raise SystemExit("the numbers that ship are measured on all of Fashion-MNIST, which was not found")
    device = pick_device()
    precision, _ = pick_precision(device)
    classifier = load_classifier(WEIGHTS / "classifier-fashion-mnist.json").to(device)
    results = last_measured()
    for row in rows:
        net, guidance, weak = ROWS[row]
        model, other = (each and LatentDiffusion.pretrained(each).to(device, precision) for each in (net, weak))
        sets = seeds if weak else 1
        with bar(n * sets, row, "image") as progress:
            results[row] = evaluate(model, classifier, train, test, n, SampleConfig(guidance=guidance), kept_features if inception else None,
                                    progress.update, sets, other)
        results[row] |= {"weak": weak, "device": device_name(device), "precision": precision}
        print(as_table(results[row]), flush=True)
        checkpoint.save_json(WEIGHTS / "metrics.json", results)
    return results


def last_measured() -> dict:
    return checkpoint.load_json(WEIGHTS / "metrics.json")


def card(results: dict) -> str:
    """MODEL_CARD.md."""
    about = {net: checkpoint.load_json(shipped_json(net)) for net in SHIPPED}
    judges = {name: checkpoint.load_json(WEIGHTS / f"{name}-fashion-mnist.json") for name in ("classifier", "perceptual")}
    networks = [("VAE", "vae", about["unet"]["meta"]["runs"]["vae"]), ("VAE of the best model", "best/vae", about["best"]["meta"]["runs"]["vae"])]
    networks += [(TITLES[net], str(shipped_json(net).relative_to(WEIGHTS).with_suffix("")), about[net]["meta"]["runs"]["denoiser"]) for net in SHIPPED]
    networks += [("feature classifier", "classifier-fashion-mnist", judges["classifier"]["runs"]),
                 ("network of the perceptual loss", "perceptual-fashion-mnist", judges["perceptual"]["runs"])]
    lines = ["# Model card", "", "Small latent diffusion models of Fashion-MNIST, for learning and teaching. Trained with this package on the 60,000",
             "training images, stored in float16. They draw 28 x 28 gray pictures of clothes, and nothing else.", "",
             "| network | file | parameters | sha256 |", "|---|---|---|---|"]
    for name, stem, _ in networks:
        file = WEIGHTS / f"{stem}.safetensors"
        count = sum(t.numel() for t in checkpoint.load_tensors(file)[0].values()) / 1e6
        lines.append(f"| {name} | `{stem}.safetensors` | {count:.2f} M | `{checkpoint.sha256(file)}` |")
    lines += ["", "Each VAE has latents of its own: the best model's networks fit each other, and none of the others.",
              f"The latent scale is {about['best']['latent_scale']:.2f} there and {about['unet']['latent_scale']:.2f} elsewhere. The classifier is right on "
              f"{100 * judges['classifier']['test_accuracy']:.1f} % of the test images.", "",
              "## How they were trained", "",
              "In a denoiser's command `runs/vae` is the run of this table's first line, and `ldm_minimal/assets/weights/best` the VAE of the best model as",
              "it ships; every other run or path of the package's own weights is the network as the line above left it. Each line needs an `--out` of its",
              "own. Seconds are upper bounds: the machine did other work, too. The first training of the best model's U-Net was laid out for 22,000 steps",
              "and shortened to 10,000 while it ran.", "",
              "| network | command | steps | seconds | device, precision |", "|---|---|---|---|---|"]
    lines += [f"| {name} | `{run['command']}` | {run['steps']:,} | {run['seconds']:,} | {run['device']}, {run['precision']} |"
              for name, _, runs in networks for run in runs]
    lines += ["", "## Measured", "", *table(results), "", "License: MIT, as the package. Data: Fashion-MNIST (MIT, Zalando SE)."]
    return "\n".join(lines) + "\n"


def table(results: dict) -> list[str]:
    """The results as a Markdown table, with its protocol above it."""
    first = results["unet"]
    sampler = SampleConfig(**first["sampler"] | {"interval": tuple(first["sampler"]["interval"])})
    inception = any("inception_fid" in result["table"]["samples"] for result in results.values())
    lines = [f"{first['n']:,} images of each kind against the {first['reference']}; {describe(sampler)}, balanced labels, EMA weights, uint8 images.",
             "FD, KID, precision, recall and coverage are on the features of our own classifier, so they compare these rows with each other and",
             "not with papers. (The ceiling's images are rebuilt from the reference itself, which flatters all but its FID train and its accuracy.)",
             "KID is the mean of fifty random subsets, whose choice alone moves it by 0.2 to 0.35 for samples and by 0.15 for real images."]
    if inception:
        lines += ["FID is on the standard Inception features: against the 10,000 test images, and against 10,000 training images. Autoguidance is "
                  "away from", "the weak U-Net on the same latents."]
    heads = ["images", *(["FID test", "FID train"] if inception else []), "FD", "KID x1000", "precision", "recall", "coverage", "class accuracy"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    coders = {"VAE": first, "VAE of the best model": results["best"]}

    def line(name: str, row: dict) -> str:
        cells = [f"{row[key]:.2f}" if key in row else "" for key in ("inception_fid", "inception_fid_train")] if inception else []
        cells += [f"{row['fd']:.3f}", f"{round(row['kid_x1000'], 2) + 0:.2f}",  # + 0: no -0.00
                  *(f"{row[key]:.3f}" for key in ("precision", "recall", "coverage")),
                  f"{100 * row['class_accuracy']:.1f} %"]
        return "| " + " | ".join([name, *cells]) + " |"

    lines.append(line("real training images (floor)", first["table"]["floor"]))
    lines += [line(f"test images through the {name} (ceiling)", result["table"]["ceiling"]) for name, result in coders.items()]
    for row, result in results.items():
        lines.append(line(f"samples, {title(row)}", result["table"]["samples"]))
        lines += [line(name.replace("samples", f"samples, {title(row)}"), more) for name, more in result["more_seeds"].items()]
    lines += [line("uniform noise", first["table"]["noise"]), "", "Reconstructions of the test set: "
              + "; ".join(f"{name}: PSNR {found['psnr_db']:.2f} dB, SSIM {found['ssim']:.3f}"
                          for name, result in coders.items() if (found := result["reconstruction"])) + ". "
              "Memorization ratio (1 is healthy, 0 is copying): "
              + ", ".join(f"{title(row)}: {result['memorisation']:.2f}" for row, result in results.items()) + "."]
    return lines


def replace_between(text: str, name: str, lines: list[str]) -> str:
    """Put lines between <!-- name --> and <!-- /name -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"there is no place <!-- {name} --> to write to")
    return pattern.sub(lambda m: m.group(1) + "\n".join(lines) + "\n" + m.group(2), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("vae", "best/vae", "perceptual", "classifier", *SHIPPED)
    for name in parts:
        parser.add_argument(f"--{name}", type=Path, metavar="RUN")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3, help="sets of samples with autoguidance")
    parser.add_argument("--inception", action="store_true", help="measure the Inception FID, too")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="what to measure (default: all)")
    args = parser.parse_args()
    copy_weights({name: path for name in parts if (path := getattr(args, name))})
    results = measure(args.n, args.rows, args.inception, args.seeds) if args.rows else last_measured()
    (WEIGHTS / "MODEL_CARD.md").write_text(card(results), encoding="utf-8")
    net, guidance, weak = ROWS["best"]
    x = LatentDiffusion.pretrained(net).sample(torch.arange(10).repeat_interleave(10), guidance=guidance, weak=LatentDiffusion.pretrained(weak))
    plot.save_figure(plot.image_grid(x, 10, data.CLASSES["fashion-mnist"]), ROOT / "book" / "samples.png")
    readme = ROOT / "README.md"
    readme.write_text(replace_between(readme.read_text(encoding="utf-8"), "results", table(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
