"""The command line: python -m ldm_minimal {train, sample, reconstruct, evaluate, classic, info, bench, grade}.

Exit codes: 0 done, 1 it failed (data, checkpoint, disk, divergence), 2 the call was wrong, 130 interrupted.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from . import __version__, data, parallel, plot
from .checkpoint import CheckpointError, atomic, load_json, save_json
from .evaluate import as_table, balanced, draw, evaluate, reconstruction_quality
from .options import add_options, chosen, flag
from .pipeline import SHIPPED, WEIGHTS, LatentDiffusion, SampleConfig, load_classifier
from .precision import PRECISIONS, device_name, pick_device, pick_precision
from .presets import PRESETS, SECTIONS, default_preset, read_config
from .race import CONTESTANTS
from .report import describe, summary
from .run import STAGES, Interrupted, Run, bar, load_vae, versions
from .train import Diverged

CLASSIC = SampleConfig(steps=50, guidance=1.25)
FAILURES = (data.DataError, CheckpointError, Diverged, OSError, torch.OutOfMemoryError)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m ldm_minimal",
                                   description="Latent diffusion on Fashion-MNIST, from scratch.")
    main.add_argument("--version", action="version", version=f"ldm_minimal {__version__}, torch {torch.__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, model: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, usage=f"{main.prog} {name} [arguments] [options]")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
        sub.add_argument("--precision", default="auto", choices=PRECISIONS,
                         help="number format of the networks (default: auto)")
        if model:
            sub.add_argument("--model", default="unet", metavar="MODEL",
                             help=f"a run folder, a model's JSON, or one that ships: {', '.join(SHIPPED)} (default: unet)")
        return sub

    def sampler(sub: argparse.ArgumentParser, config: SampleConfig) -> None:
        sub.add_argument("--weak", metavar="MODEL",
                         help="a weaker model of the same latents to guide away from, in place of the same one without the label "
                         "(autoguidance); of those that ship, `weak` goes with unet and `best/weak` with best, at --guidance 1.5. "
                         "At 1 it is not asked, at 0 it draws alone")
        add_options(sub, config)
        sub.set_defaults(base=config)

    sub = command("train", "train a complete latent diffusion model, or one stage of it")
    sub.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES), help="what to train (default: all)")
    sub.add_argument("--preset", choices=tuple(PRESETS),
                     help="budget (default: t4 on a GPU, cpu elsewhere); flags below change single values of it")
    sub.add_argument("--out", type=Path, help="run folder (default: the next free runs/DATASET-PRESET)")
    sub.add_argument("--resume", action="store_true",
                     help="go on with the run in --out, or with the latest unfinished one")
    sub.add_argument("--vae-from", type=Path, metavar="PATH",
                     help="take the autoencoder from this run folder or model JSON instead of training one; "
                     "with stage vae: train on from it")
    sub.add_argument("--denoiser-from", type=Path, metavar="PATH",
                     help="train on from the denoiser of this run folder or model JSON")
    sub.add_argument("--compile", action="store_true", help="use torch.compile for the denoiser where it works")
    shown = PRESETS["cpu"]
    add_options(sub, shown)
    for prefix, section in SECTIONS.items():
        add_options(sub, getattr(shown, section), prefix, f"{prefix}, with the defaults of preset cpu")

    sub = command("sample", "draw images of the classes asked for", model=True)
    sub.add_argument("classes", nargs="*", metavar="CLASS", help="names or numbers; all ten if none is given")
    sub.add_argument("--n", type=int, default=8, help="images per class (default: 8)")
    sub.add_argument("--out", type=Path, default=Path("samples.png"), help="grid to write, PNG (default: samples.png)")
    sub.add_argument("--npz", type=Path, help="also write the images (uint8) and labels here")
    sampler(sub, SampleConfig())

    sub = command("reconstruct", "encode and decode test images; prints PSNR and SSIM", model=True)
    sub.add_argument("--n", type=int, default=20, help="images to show (default: 20)")
    sub.add_argument("--out", type=Path, default=Path("reconstructions.png"),
                     help="grid to write, PNG (default: reconstructions.png)")

    sub = command("evaluate", "the whole table of metrics, with floor, ceiling and noise", model=True)
    sub.add_argument("--n", type=int, default=10_000, help="images of each kind (default: 10000)")
    sub.add_argument("--inception", action="store_true",
                     help="add the Inception FID (needs the extra `inception`; minutes to hours on a CPU)")
    sub.add_argument("--seeds", type=int, default=1, help="sets of samples, from --seed on (default: 1)")
    sub.add_argument("--out", type=Path, default=Path("metrics.json"),
                     help="where to write it all (default: metrics.json)")
    sampler(sub, SampleConfig())

    sub = command("classic", "the classic form of the exercise: 512 samples at guidance 1.25, a gallery by class, "
                  "the PSNR beside it", model=True)
    sub.add_argument("--n", type=int, default=512, help="samples (default: 512)")
    sub.add_argument("--out", type=Path, default=Path("classic"),
                     help="folder for gallery.png and metrics.json (default: classic)")
    sampler(sub, CLASSIC)

    command("info", "what this machine has: versions, device, precision and why, data and where, minutes to expect")

    sub = commands.add_parser("grade", help="mark a submitted notebook, or a folder of them",
                              description="mark the checked exercises of a submitted notebook, or of all notebooks below a folder",
                              usage=f"{main.prog} grade [arguments] [options]")
    sub.add_argument("submission", type=Path, nargs="?", help="a notebook, or a folder of notebooks of one assignment")
    sub.add_argument("--out", type=Path, help="a notebook, or a folder with one: Gradescope's results.json; a folder of many: a CSV (default: marks.csv), with "
                     "the results of each submission beside it, which are kept when it is run again")
    sub.add_argument("--exercises", nargs="+", metavar="NN.N", help="what to mark (default: the checked exercises of the chapters that occur)")
    sub.add_argument("--private-seed", type=int, default=0, metavar="N",
                     help="other numbers in the checks than those that students see (default: 0, the same)")
    sub.add_argument("--seconds", type=float, default=20.0, help="for each answer, by the clock (default: 20)")
    sub.add_argument("--memory", type=int, default=2000, metavar="MB", help="for each answer (default: 2000)")
    sub.add_argument("--workers", type=int, help="answers at a time, for a folder (default: one for each core)")
    sub.add_argument("--held", action="store_true", help="say what submissions cannot do on this machine, and what they can, and stop")

    sub = command("bench", "measure here: speed; a race in quality of latents, pixels and diffusers; how cost grows; "
                  "where a training step spends its time")
    sub.add_argument("kind", nargs="?", default="speed", choices=("speed", "race", "scale", "profile"),
                     help="what to measure (default: speed, in about a minute)")
    sub.add_argument("--seconds", type=float, default=2.0, help="speed, scale: time for each measurement (default: 2)")
    sub.add_argument("--minutes", type=float, nargs="+", default=[10.0], metavar="M",
                     help="race: training time of each contestant; several make a curve, M by M (default: 10)")
    sub.add_argument("--n", type=int, default=2000, help="race: samples of each contestant (default: 2000)")
    sub.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS],
                     help="race: who takes part (default: all)")
    sub.add_argument("--out", type=Path, help="also write the tables as JSON here; race, scale: and a .png beside it")
    return main


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    commands = {"train": run_train, "sample": run_sample, "reconstruct": run_reconstruct, "evaluate": run_evaluate,
                "classic": run_classic, "info": run_info, "bench": run_bench, "grade": run_grade}
    try:
        return commands[args.command](args) or 0
    except FAILURES as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2 if isinstance(error, FileExistsError) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def machine(args) -> tuple[torch.device, str]:
    device = pick_device(args.device)
    return device, pick_precision(device, args.precision)[0]


def load_model(args, name: str | None = None) -> LatentDiffusion:
    """The model of this name, or the one that --model names: a path that exists, else one that ships."""
    device, precision = machine(args)
    name = name or args.model
    known = name in SHIPPED and not Path(name).exists()
    model = LatentDiffusion.pretrained(name) if known else LatentDiffusion.load(name)
    return model.to(device, precision)


def load_weak(args) -> LatentDiffusion | None:
    return load_model(args, args.weak) if args.weak else None


def positive(n: int, name: str = "n") -> int:
    if n < 1:
        raise ValueError(f"{name} must be at least 1, got {n}")
    return n


def free_folder(dataset: str, preset: str) -> Path:
    """runs/DATASET-PRESET, or with the next number behind it: nothing is ever overwritten."""
    folder, number = Path("runs") / f"{dataset}-{preset}", 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{dataset}-{preset}-{number}"
    return folder


DONE = {"all": "metrics.json", "vae": "vae.json", "denoiser": "model.json", "classifier": "classifier-*.json",
        "perceptual": "perceptual-*.safetensors"}  # the last file of each stage


def latest_unfinished() -> Path:
    """The run in runs/ that was written to last and lacks the last file of its stage."""
    candidates = [p.parent for p in Path("runs").glob("*/config.json")
                  if not any(p.parent.glob(DONE.get(load_json(p).get("stage"), "*")))]
    if not candidates:
        raise ValueError("no unfinished run in runs/: name one with --out, or start one without --resume")
    return max(candidates, key=lambda folder: max(p.stat().st_mtime for p in folder.iterdir()))


def run_train(args) -> int:
    device = parallel.start(pick_device(args.device))
    precision = pick_precision(device, args.precision)[0]
    processes = parallel.place()[1]
    if args.resume:
        folder = parallel.each(args.out or latest_unfinished())[0]
        known = load_json(folder / "config.json")
        if missing := {"config", "data", "vae_from", "denoiser_from", "stage", "preset", "precision"} - known.keys():
            raise CheckpointError(f"{folder / 'config.json'} was edited or cut off: no {', '.join(sorted(missing))}")
        changed = [flag(name) for name in vars(args) if "." in name or name in ("preset", "vae_from", "denoiser_from") and getattr(args, name)]
        changed += [f"the stage (the run trains {known['stage']})"] * (args.stage not in ("all", known["stage"]))
        if args.precision not in ("auto", known["precision"]):
            changed.append(f"--precision (the run is in {known['precision']})")
        if changed:
            raise ValueError(f"a resumed run keeps its options; leave out {', '.join(changed)}, or start a new run")
        config = read_config(known["config"], str(folder / "config.json"))
        vae_from, denoiser_from, stage, preset, precision = (
            known[key] for key in ("vae_from", "denoiser_from", "stage", "preset", "precision"))
        pick_precision(device, precision)  # that of the run may need another machine
        args.compile = args.compile or known.get("compile", False)
    else:
        preset, stage = args.preset or default_preset(device), args.stage
        vae_from, denoiser_from = (path and str(path.absolute()) for path in (args.vae_from, args.denoiser_from))
        config = chosen(PRESETS[preset], args)
        parts = {section: chosen(getattr(config, section), args, prefix) for prefix, section in SECTIONS.items()}
        config = replace(config, **parts)
        folder = parallel.each(args.out or free_folder(config.dataset, preset))[0]
    if stage == "denoiser" and not vae_from:
        if config.dataset != "fashion-mnist":
            raise ValueError(f"the autoencoder that ships knows no {config.dataset}: name one that does with --vae-from, or train all")
        vae_from = str(WEIGHTS / "unet.json")
    if (vae_from and stage in ("classifier", "perceptual")) or (denoiser_from and stage not in ("all", "denoiser")):
        raise ValueError(f"stage {stage} has no use for the network that --{'denoiser' if denoiser_from else 'vae'}-from names")
    fixed = ("vae.",) * bool(vae_from) + ("vae-",) * bool(vae_from and stage != "vae") + (".net", "unet.", "dit.") * bool(denoiser_from)
    changeable = ("vae.beta",) * (stage == "vae")
    if ignored := [flag(name) for name in vars(args) if name.startswith(fixed) and name not in changeable]:
        raise ValueError(f"a network that is taken from elsewhere stays as it is: leave out {', '.join(ignored)}")
    for training in config.trainings:
        parallel.share(training.batch)  # if it cannot be shared, say so before anything is trained
    print(f"run        {folder} ({'resumed, ' if args.resume else ''}preset {preset}, {device}, {precision})")
    run = Run(folder, config, device, precision, args.compile)
    with run.held():
        if args.resume:
            run.check_data()
        else:
            run.check(vae_from, denoiser_from)
            launcher = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}"
            command = " ".join([launcher, "-m", "ldm_minimal", *map(shlex.quote, sys.argv[1:])])
            run.start(command=command, stage=stage, preset=preset, vae_from=vae_from, denoiser_from=denoiser_from, compile=args.compile)
        return train_stage(run, stage, vae_from, denoiser_from)


def train_stage(run, stage: str, vae_from: str | None, denoiser_from: str | None) -> int:
    folder = run.folder
    try:
        if stage == "vae":
            run.train_vae(vae_from)
        elif stage == "classifier":
            run.train_classifier()
        elif stage == "perceptual":
            run.train_features()
        elif stage == "denoiser":
            run.train_denoiser(load_vae(vae_from).to(run.device), denoiser_from)
        else:
            result = run.all(vae_from, denoiser_from)
            if parallel.is_main():
                print("\n" + summary(result, folder))
    except KeyboardInterrupt as stop:
        if parallel.is_main():
            print(f"\nstopped; go on with: python -m ldm_minimal train --resume --out {shlex.quote(str(folder))}", file=sys.stderr)
        if isinstance(stop, Interrupted):  # which all processes see at the same step
            parallel.leave()
        return 130
    except (OSError, Diverged):
        print(f"\nthe last good state is kept in {folder}", file=sys.stderr)
        raise
    parallel.leave()
    return 0


def run_sample(args) -> int:
    model, weak, config = load_model(args), load_weak(args), chosen(args.base, args)
    ids = data.class_ids(args.classes or list(model.classes), model.dataset)
    labels = ids.repeat_interleave(positive(args.n))
    with bar(len(labels), "samples", "image") as progress:
        x = model.sample(labels, **vars(config), progress=progress.update, weak=weak)
    names = [model.classes[i] for i in ids]
    plot.save_figure(plot.image_grid(x, len(ids), names, title=describe(config, weak)), args.out)
    print(f"wrote {args.out}")
    if args.npz:
        with atomic(args.npz) as part, open(part, "wb") as file:
            np.savez_compressed(file, images=data.to_uint8(x).numpy(), labels=labels.numpy(),
                                classes=np.array(model.classes))
        print(f"wrote {args.npz}")
    return 0


def run_reconstruct(args) -> int:
    model = load_model(args)
    test = data.load(model.dataset, "test")
    rebuilt, quality = reconstruction_quality(model, test.images)
    rows = balanced(test.labels, min(positive(args.n), len(test)))
    pairs = torch.cat([test.images[rows], rebuilt[rows]])
    plot.save_figure(plot.image_grid(pairs, 2, ("image", "rebuilt")), args.out)
    print(f"{len(test)} test images: PSNR {quality['psnr_db']:.2f} dB, SSIM {quality['ssim']:.4f}\nwrote {args.out}")
    return 0


def run_evaluate(args) -> int:
    model, weak, config = load_model(args), load_weak(args), chosen(args.base, args)
    extra = None
    if args.inception:
        from .inception import inception_features, network

        network(str(model.device))  # if it is missing, say so before sampling
        extra = partial(inception_features, device=model.device)
    train, test = (data.load(model.dataset, split) for split in ("train", "test"))
    model_at = Path(args.model)
    own = (model_at.parent if model_at.is_file() else model_at) / f"classifier-{model.dataset}.json"
    judge = next((path for path in (own, WEIGHTS / own.name) if path.is_file()), None)
    if judge is None:
        raise CheckpointError(f"none of the classifiers that ship knows {model.dataset}: run `train classifier --dataset {model.dataset}`, "
                              f"and put {own.name} and the .safetensors of that name beside the model")
    classifier = load_classifier(judge).to(model.device)
    n, seeds = min(positive(args.n), len(test)), positive(args.seeds, "seeds")
    with bar(n * seeds, "samples", "image") as progress:
        result = evaluate(model, classifier, train, test, n, config, extra, progress.update, seeds, weak)
    save_json(args.out, result | {"model": args.model, "weak": args.weak})
    print(f"{n} images of each kind against the {result['reference']}\n{as_table(result)}")
    quality = result["reconstruction"]
    print(f"\nreconstruction PSNR {quality['psnr_db']:.2f} dB, SSIM {quality['ssim']:.4f}; "
          f"memorisation ratio {result['memorisation']:.3f}; {result['sampling']['images_per_second']:.0f} images/s\n"
          f"classes found: {', '.join(f'{k} {v}' for k, v in result['classes_found'].items())}\nwrote {args.out}")
    return 0


def run_classic(args) -> int:
    model, weak, config = load_model(args), load_weak(args), chosen(args.base, args)
    with bar(positive(args.n), "samples", "image") as progress:
        samples, labels, cost = draw(model, args.n, config, progress.update, weak)
    _, quality = reconstruction_quality(model, data.load(model.dataset, "test").images)
    columns = -(-args.n // len(model.classes))
    sheet = torch.zeros(len(model.classes), columns, *samples.shape[1:], dtype=torch.uint8)
    for c in range(len(model.classes)):
        mine = samples[labels == c]
        sheet[c, : len(mine)] = mine
    gallery = plot.image_grid(sheet.flatten(0, 1), len(model.classes), model.classes, title=describe(config, weak))
    plot.save_figure(gallery, args.out / "gallery.png")
    record = {"n": args.n, "sampler": vars(config), "reconstruction": quality, "sampling": cost, "model": args.model,
              "weak": args.weak, "per_class": labels.bincount(minlength=len(model.classes)).tolist(), "latent_scale": model.scale}
    path = args.out / "metrics.json"  # a run's own metrics stay as they are beside it
    save_json(path, (load_json(path) if path.is_file() else {}) | {"classic": record})
    print(f"{args.n} samples in {cost['seconds']:.1f} s; reconstruction PSNR {quality['psnr_db']:.2f} dB\n"
          f"wrote {args.out}/gallery.png and {args.out}/metrics.json")
    return 0


def run_info(args) -> int:
    from .bench import minutes_to_expect

    device = pick_device(args.device)
    precision, reason = pick_precision(device, args.precision)
    rows = versions() | {"device": device_name(device), "precision": f"{precision}: {reason}",
                         "preset": default_preset(device)}
    for name in data.CLASSES:
        try:
            rows[f"data, {name}"] = data.load(name, download=False).source
        except data.DataError as error:
            rows[f"data, {name}"] = str(error)
    rows["minutes for `train`"] = minutes_to_expect(device, precision)
    for name, value in rows.items():
        print(f"{name:22} {value}")
    return 0


def run_bench(args) -> int:
    device, precision = machine(args)
    if args.out and args.out.suffix == ".png":
        raise ValueError("--out names the JSON; a picture, where there is one, gets the same name with .png")
    figure = None
    if args.kind == "race":
        from .race import race
        from .report import race_figure as figure

        result = race(device, precision, args.minutes, args.n, args.contestants, args.out and partial(save_json, args.out))
    elif args.kind == "scale":
        from .report import scale_figure as figure
        from .scale import scale

        result = scale(device, precision, args.seconds)
    elif args.kind == "profile":
        from .profiling import profiling

        result = profiling(device, precision)
    else:
        from .bench import bench

        result = bench(device, precision, args.seconds)
    if args.out:
        save_json(args.out, result)
        print(f"wrote {args.out}")
    if args.out and figure:
        plot.save_figure(figure(result), args.out.with_suffix(".png"))
        print(f"wrote {args.out.with_suffix('.png')}")
    return 0


def run_grade(args) -> int:
    from .checks import EXERCISES
    from .grading import grade, sandbox

    if args.held:
        print("\n".join(sandbox.held()))
        return 0
    if args.submission is None or not args.submission.exists():
        raise ValueError(f"there is no {args.submission}: name a notebook, or a folder of them")
    if unknown := set(args.exercises or ()) - EXERCISES.keys():
        raise ValueError(f"no check for {', '.join(sorted(unknown))}; there are {', '.join(sorted(EXERCISES))}")
    if args.seconds <= 0 or args.memory <= 0 or (args.workers or 1) < 1:
        raise ValueError("--seconds, --memory and --workers are above 0")
    limits = grade.Limits(args.seconds, args.memory)
    with grade.private(args.private_seed):
        if args.submission.is_dir() and not (args.out and args.out.suffix == ".json"):
            out = args.out or Path("marks.csv")
            done = grade.grade_folder(args.submission, out, args.exercises, limits, args.workers or grade.default_workers())
            print(f"wrote {out}: {len(done)} submissions")
            return 0
        one = grade.grade_upload if args.submission.is_dir() else grade.grade
        report = one(args.submission, args.exercises, limits)
    print(report)
    if args.out:
        save_json(args.out, report.gradescope())
    return 0


if __name__ == "__main__":
    sys.exit(main())
