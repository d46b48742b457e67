r"""The whole table of one model: what it reconstructs and samples, beside the best and the worst there could be.

Every distance is against all test images, for n images of each of

    floor     real training images: what a perfect model would score at this n
    ceiling   test images through the autoencoder and back: no denoiser can do better than its decoder
    samples   of the model
    noise     uniform random pixels: what no model should score
"""

import time
from dataclasses import replace

import torch
from torch import Tensor

from .classifier import Classifier
from .data import Dataset, to_float, to_uint8
from .metrics import frechet_distance, kid, memorisation, prdc, psnr, ssim
from .pipeline import LatentDiffusion, SampleConfig


@torch.no_grad()
def reconstruct(model: LatentDiffusion, images: Tensor) -> Tensor:
    """uint8 -> encode (posterior mean) -> decode -> uint8."""
    return torch.cat([to_uint8(model.decode(model.encode(to_float(chunk)))).cpu() for chunk in images.split(500)])


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (N, 1, H, W) -> (features (N, d), predicted class (N,)), in float32."""
    device = next(classifier.parameters()).device
    features = torch.cat([classifier.features(to_float(chunk.to(device))) for chunk in images.split(500)])
    return features.cpu(), classifier.head(features).argmax(1).cpu()


def balanced(labels: Tensor, n: int, seed: int = 0) -> Tensor:
    """Indices of n images, as evenly over the classes as they allow, in random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    place = torch.zeros(len(labels), dtype=torch.long)  # the rank of each image within its own class
    for c in labels.unique():
        mine = order[labels[order] == c]
        place[mine] = torch.arange(len(mine))
    return order[place[order].argsort(stable=True)][:n]


def compare(features: Tensor, reference: Tensor, equal: Tensor) -> dict[str, float]:
    """One row: FD and KID against the whole reference, neighbor counts against `equal`, as many as `features`."""
    mean, spread = kid(features, reference)
    row = {"fd": frechet_distance(features, reference), "kid_x1000": 1000 * mean, "kid_spread_x1000": 1000 * spread}
    return row | prdc(equal, features)


def score(classifier: Classifier, images: Tensor, labels: Tensor, reference: Tensor, equal: Tensor):
    """(one row: `compare`, and the share of images called what `labels` asks for; features; classes found)."""
    features, found = classify(classifier, images)
    row = compare(features, reference, equal)
    return row | {"class_accuracy": float((found == labels).double().mean())}, features, found


def reconstruction_quality(model: LatentDiffusion, images: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(reconstructions, their mean PSNR in dB and SSIM)."""
    rebuilt = reconstruct(model, images)
    return rebuilt, {"psnr_db": float(psnr(images, rebuilt).mean()), "ssim": float(ssim(images, rebuilt).mean())}


def draw(model: LatentDiffusion, n: int, config: SampleConfig, progress=None,
         weak: LatentDiffusion | None = None) -> tuple[Tensor, Tensor, dict]:
    """n samples with labels 0, 1, ... 9, 0, 1, ...: (uint8 images, labels, cost). weak: see LatentDiffusion.sample."""
    labels = torch.arange(n) % len(model.classes)
    start = time.perf_counter()
    x = model.sample(labels, **vars(config), progress=progress, weak=weak)
    seconds = time.perf_counter() - start
    passes = config.steps * (1 if config.guidance in (0.0, 1.0) else 2)
    return to_uint8(x), labels, {"seconds": seconds, "images_per_second": n / seconds,
                                 "evaluations_per_image": config.steps, "forward_passes_per_image_at_most": passes}


def evaluate(model: LatentDiffusion, classifier: Classifier, train: Dataset, test: Dataset, n: int = 10_000,
             config: SampleConfig = SampleConfig(), extra_features=None, progress=None, seeds: int = 1,
             weak: LatentDiffusion | None = None) -> dict:
    """Everything as one dictionary. n is at most the number of test images.

    Each row but the floor also has its distance to the floor's training images ("..._train"), which is the more
    usual reference and the set that the model has seen.
    extra_features: uint8 images -> features of another network (Inception), for all rows but noise: "inception_..."
    seeds: so many sets of samples, drawn from config.seed on; the rows of the further ones are in "more_seeds"
    weak: a weaker model, for autoguidance
    """
    n = min(n, len(test), len(train))
    if n < 20:
        raise ValueError(f"need at least 20 images to compare sets, got {n}")
    samples, labels, cost = draw(model, n, config, progress, weak)
    rebuilt, quality = reconstruction_quality(model, test.images)
    generator = torch.Generator().manual_seed(config.seed % 2**63)
    noise = torch.randint(0, 256, (n, *test.images.shape[1:]), generator=generator, dtype=torch.uint8)
    train_rows, test_rows = balanced(train.labels, n), balanced(test.labels, n)
    sets = {
        "floor": (train.images[train_rows], train.labels[train_rows]),
        "ceiling": (rebuilt[test_rows], test.labels[test_rows]),
        "samples": (samples, labels),
        "noise": (noise, labels),
    }
    for seed in range(config.seed + 1, config.seed + seeds):
        sets[f"samples, seed {seed}"] = (draw(model, n, replace(config, seed=seed), progress, weak)[0], labels)
    reference, _ = classify(classifier, test.images)
    extra_reference = extra_features(test.images) if extra_features else None
    table = {}
    for name, (images, wanted) in sets.items():
        row, features, predicted = score(classifier, images, wanted, reference, reference[test_rows])
        table[name] = row
        if name == "floor":
            floor = features
        else:
            row["fd_train"] = frechet_distance(features, floor)
        if extra_features and name != "noise":
            other = extra_features(images)
            row["inception_fid"] = frechet_distance(other, extra_reference)
            row["inception_kid_x1000"], row["inception_kid_spread_x1000"] = (
                1000 * v for v in kid(other, extra_reference))
            if name == "floor":
                extra_floor = other
            else:
                row["inception_fid_train"] = frechet_distance(other, extra_floor)
        if name == "samples":
            counts = predicted.bincount(minlength=len(model.classes)).tolist()
    more = {name: table.pop(name) for name in list(table) if name.startswith("samples, seed")}
    some = min(n, 1000)
    return {
        "n": n, "reference": f"{len(test)} test images of {test.name}",
        "features": f"own classifier, {reference.shape[1]} features",
        "reconstruction": quality, "table": table, "more_seeds": more, "sampling": cost, "sampler": vars(config),
        "classes_found": dict(zip(model.classes, counts)),
        "memorisation": memorisation(samples[:some], test.images[:some], train.images),
    }


def as_table(result: dict) -> str:
    """The table as text, one row for each set."""
    columns = [("fd", "FD", 3), ("kid_x1000", "KID x1000", 2), ("precision", "precision", 3), ("recall", "recall", 3),
               ("density", "density", 3), ("coverage", "coverage", 3), ("class_accuracy", "accuracy", 3),
               ("inception_fid", "Inception FID", 2), ("inception_fid_train", "against train", 2)]
    columns = [column for column in columns if column[0] in result["table"]["samples"]]
    lines = [" " * 10 + "".join(f"{title:>{len(title) + 5}}" for _, title, _ in columns)]
    for name, row in (result["table"] | result["more_seeds"]).items():
        cells = [f"{row[key]:>{len(title) + 5}.{digits}f}" if key in row else " " * (len(title) + 5)
                 for key, title, digits in columns]
        lines.append(f"{name.replace('samples, ', ''):10}" + "".join(cells))
    return "\n".join(lines)
