"""Turn finished runs into what the package ships: half-precision weights, their model card, README's table and picture.

    python -m ldm_minimal train vae --preset release --out runs/vae
    python -m ldm_minimal train classifier --preset release --out runs/classifier
    python -m ldm_minimal train denoiser --preset release --vae-from runs/vae --out runs/unet
    python -m ldm_minimal train denoiser --preset release --net dit --denoiser-train-steps 3500 --vae-from runs/vae --out runs/dit
    python book/ship.py --vae runs/vae --classifier runs/classifier --unet runs/unet --dit runs/dit

With --only-numbers the weights stay, and everything that shows their numbers is measured and written anew.
"""

import argparse
import re
from pathlib import Path

import torch

from ldm_minimal import LatentDiffusion, checkpoint, data, plot
from ldm_minimal.evaluate import as_table, evaluate
from ldm_minimal.pipeline import NETS, WEIGHTS, SampleConfig, load_classifier
from ldm_minimal.precision import pick_device, pick_precision
from ldm_minimal.report import describe
from ldm_minimal.run import bar, device_name

ROOT = Path(__file__).parent.parent
TITLES = {"unet": "U-Net", "dit": "DiT"}


def copy_weights(runs: dict[str, Path]) -> None:
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    for net in NETS:
        model = LatentDiffusion.load(runs[net])
        model.meta["runs"] = {"vae": origin(runs["vae"], "vae"), "denoiser": origin(runs[net], "denoiser")}
        model.save(WEIGHTS, net, net, half=True)
    stem = "classifier-fashion-mnist"
    tensors, _ = checkpoint.load_tensors(runs["classifier"] / f"{stem}.safetensors")
    checkpoint.save_tensors(WEIGHTS / f"{stem}.safetensors", {k: v.half() for k, v in tensors.items()})
    known = checkpoint.load_json(runs["classifier"] / f"{stem}.json")
    checkpoint.save_json(WEIGHTS / f"{stem}.json", known | origin(runs["classifier"], "classifier"))


def origin(run: Path, stage: str) -> dict:
    """Where a network comes from: the command without this machine's paths, data, device, steps and seconds."""
    config = checkpoint.load_json(run / "config.json")
    _, state = checkpoint.load_tensors(run / f"{stage}.state.safetensors")
    return {"command": config["command"], "seed": config["config"]["seed"], "data_sha256": config["data"]["sha256"],
            "steps": state["step"], "seconds": round(state["more"]["seconds"]), "device": config["device"],
            "precision": config["precision"], "versions": config["versions"]}


def measure(n: int, sample: SampleConfig) -> dict:
    """Both models against the real test set: name -> result of evaluate()."""
    train, test = (data.load("fashion-mnist", split) for split in ("train", "test"))
    if len(train) != 60_000:
        raise SystemExit("the numbers that ship are measured on all of Fashion-MNIST, which was not found")
    device = pick_device()
    precision, _ = pick_precision(device)
    classifier = load_classifier(WEIGHTS / "classifier-fashion-mnist.json").to(device)
    results = {}
    for net in NETS:
        model = LatentDiffusion.pretrained(net).to(device, precision)
        with bar(n, net, "image") as progress:
            results[net] = evaluate(model, classifier, train, test, n, sample, progress=progress.update)
        results[net]["device"], results[net]["precision"] = device_name(device), precision
        print(as_table(results[net]))
    checkpoint.save_json(WEIGHTS / "metrics.json", results)
    return results


def card(results: dict) -> str:
    """MODEL_CARD.md."""
    classifier = checkpoint.load_json(WEIGHTS / "classifier-fashion-mnist.json")
    about = {net: checkpoint.load_json(WEIGHTS / f"{net}.json") for net in NETS}
    rows = [("VAE", "vae.safetensors", about["unet"]["meta"]["runs"]["vae"])]
    rows += [(TITLES[net], f"{net}.safetensors", about[net]["meta"]["runs"]["denoiser"]) for net in NETS]
    rows += [("feature classifier", "classifier-fashion-mnist.safetensors", classifier)]
    lines = ["# Model card", "", "Small latent diffusion models of Fashion-MNIST, for learning and teaching. Trained with this package on the 60,000",
             "training images, stored in float16. They draw 28 x 28 grey pictures of clothes, and nothing else.", "",
             "| network | file | parameters | steps | seconds | device, precision | sha256 |", "|---|---|---|---|---|---|---|"]
    for name, file, run in rows:
        tensors, _ = checkpoint.load_tensors(WEIGHTS / file)
        count = sum(t.numel() for t in tensors.values()) / 1e6
        lines.append(f"| {name} | `{file}` | {count:.2f} M | {run['steps']:,} | {run['seconds']:,} | {run['device']}, {run['precision']} "
                     f"| `{checkpoint.sha256(WEIGHTS / file)}` |")
    lines += ["", f"Seconds were measured while the machine did other work, too. Torch {rows[0][2]['versions']['torch']}, seed {rows[0][2]['seed']}. The latent scale is {about['unet']['latent_scale']:.4f}.",
              f"The classifier is right on {100 * classifier['test_accuracy']:.1f} % of the test images.", "", "Each comes from one command:", "", "```",
              *(run["command"] for _, _, run in rows), "```", "", "## Measured", "",
              *table(results), "", "Licence: MIT, as the package. Data: Fashion-MNIST (MIT, Zalando SE)."]
    return "\n".join(lines) + "\n"


def table(results: dict) -> list[str]:
    """The results as a Markdown table, with its protocol above it."""
    first = next(iter(results.values()))
    sampler = SampleConfig(**first["sampler"] | {"interval": tuple(first["sampler"]["interval"])})
    lines = [f"{first['n']:,} images of each kind against the {first['reference']}; {describe(sampler)}, seed {sampler.seed}, balanced labels, EMA",
             "weights. FD, KID, precision, recall and coverage are on the features of our own classifier, so they compare these rows",
             "with each other and not with papers. (The ceiling's images are rebuilt from the reference itself, which flatters its",
             "precision, recall and coverage.)", "",
             "| images | FD | KID x1000 | precision | recall | coverage | class accuracy |", "|---|---|---|---|---|---|---|"]
    names = {"floor": "real training images (floor)", "ceiling": "test images through the autoencoder (ceiling)", "noise": "uniform noise"}

    def line(name: str, row: dict) -> str:
        return (f"| {name} | {row['fd']:.3f} | {row['kid_x1000']:.2f} | {row['precision']:.3f} | {row['recall']:.3f} | {row['coverage']:.3f} "
                f"| {100 * row['class_accuracy']:.1f} % |")

    lines += [line(names[key], first["table"][key]) for key in ("floor", "ceiling")]
    lines += [line(f"samples, {TITLES[net]}", result["table"]["samples"]) for net, result in results.items()]
    lines += [line(names["noise"], first["table"]["noise"]), "",
              f"Reconstructions of the test set: PSNR {first['reconstruction']['psnr_db']:.2f} dB, SSIM {first['reconstruction']['ssim']:.3f}. "
              f"Memorisation ratio (1 is healthy, 0 is copying): "
              + ", ".join(f"{TITLES[net]} {r['memorisation']:.2f}" for net, r in results.items()) + "."]
    return lines


def replace_between(text: str, name: str, lines: list[str]) -> str:
    """Put lines between <!-- name --> and <!-- /name -->."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no place <!-- {name} -->")
    return pattern.sub(lambda m: m.group(1) + "\n".join(lines) + "\n" + m.group(2), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("vae", "classifier", *NETS):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--only-numbers", action="store_true", help="leave the weights as they are")
    parser.add_argument("--as-measured", action="store_true", help="take the numbers of the last measurement")
    args = parser.parse_args()
    if not (args.only_numbers or args.as_measured):
        copy_weights({name: getattr(args, name) for name in ("vae", "classifier", *NETS)})
    sample = SampleConfig()
    results = checkpoint.load_json(WEIGHTS / "metrics.json") if args.as_measured else measure(args.n, sample)
    (WEIGHTS / "MODEL_CARD.md").write_text(card(results), encoding="utf-8")
    model = LatentDiffusion.pretrained()
    x = model.sample(torch.arange(10).repeat_interleave(10), **vars(sample))
    plot.save_figure(plot.image_grid(x, 10, model.classes), ROOT / "book" / "samples.png")
    readme = ROOT / "README.md"
    readme.write_text(replace_between(readme.read_text(encoding="utf-8"), "results", table(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
