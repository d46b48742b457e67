"""The mutation gate: known one-line bugs are put into a copy of the package one by one; the tests must find each.

    python tests/mutants.py                all of them
    python tests/mutants.py --sample 6     six, another six every day
    python tests/mutants.py --only 12      one, with the tests' output

Each entry is (file, the line as it stands, the bug, the tests that hold it). Most are bugs of public code bases. A mutant
that survives, or whose line is no longer there, fails the gate.
"""

import argparse
import datetime
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

MUTANTS = [
    # schedules
    ("schedule.py", "torch.cat([betas.new_zeros(1), 0.5 *", "torch.cat([0.5 *", "test_schedule.py"),  # alpha_bar[0] is not 1
    ("schedule.py", "0.5 * torch.log1p(-betas).cumsum(0)", "torch.log1p(-betas).cumsum(0)", "test_schedule.py"),
    ("schedule.py", "log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))\n\n\ndef sigmoid",
     "log_alpha.exp(), torch.sqrt(1 - torch.exp(2 * log_alpha))\n\n\ndef sigmoid", "test_schedule.py"),  # digits lost near t = 0
    ("schedule.py", "return 1 - t, t", "return t, 1 - t", "test_schedule.py"),
    ("schedule.py", "torch.linspace(start, end, steps + 1, dtype", "torch.linspace(start, end + 1 / steps, steps + 1, dtype", "test_schedule.py"),
    # sampling
    ("sampler.py", "-torch.expm1(2 * log_snr(*now) - 2 * log_snr(*nxt))", "-torch.expm1(log_snr(*now) - log_snr(*nxt))", "test_sampler.py"),
    ("sampler.py", "torch.sqrt((sigma_s**2 - tau**2).clamp(min=0))", "sigma_s", "test_sampler.py"),  # noise added, none removed
    ("sampler.py", "z0 + h / (2 * h_last) * (z0 - last)", "z0 + h_last / (2 * h) * (z0 - last)", "test_sampler.py"),
    ("sampler.py", "randn() if eta and not final else 0.0", "randn() if eta else 0.0", "test_sampler.py"),
    ("sampler.py", "last, h_last = z0, h", "last, h_last = guess, h", "test_sampler.py"),
    ("sampler.py", "(seed * 1_000_003 + int(i))", "(seed * 1_000_003 + n)", "test_sampler.py"),  # noise depends on the batch
    # targets and loss
    ("denoiser.py", '"v": lambda alpha, sigma: (-sigma, alpha)', '"v": lambda alpha, sigma: (sigma, alpha)', "test_denoiser.py"),
    ("denoiser.py", '"flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha))',
     '"flow": lambda alpha, sigma: (torch.ones_like(alpha), -torch.ones_like(alpha))', "test_denoiser.py"),
    ("denoiser.py", "y.device) < share", "y.device) > share", "test_denoiser.py"),  # drops 90 % of the labels
    ("denoiser.py", "y = drop_labels(y, self.null, self.drop, generator)", "y = drop_labels(y, self.null, self.drop * self.training, generator)", "test_denoiser.py"),
    ("denoiser.py", "torch.randperm(shape[0], **where)", "torch.arange(shape[0])", "test_denoiser.py"),  # t follows the labels' order
    ("denoiser.py", ".square().flatten(1).mean(1)", ".square().flatten(1).sum(1)", "test_denoiser.py"),
    ("denoiser.py", "return self.net.num_classes", "return 0", "test_denoiser.py"),  # "no label" is a T-shirt
    # guidance
    ("guidance.py", "return uncond + s.to", "return cond + s.to", "test_guidance.py"),  # the scale w of papers, which is s - 1
    ("guidance.py", "uncond, cond = both.chunk(2)", "cond, uncond = both.chunk(2)", "test_guidance.py"),
    ("guidance.py", "if bool((s == 1).all()):", "if False:", "test_guidance.py"),  # twice the cost for nothing
    ("guidance.py", "uncond, cond = weak(zt, t, y), denoise(zt, t, y)", "cond, uncond = weak(zt, t, y), denoise(zt, t, y)", "test_guidance.py"),
    ("guidance.py", "uncond, cond = weak(zt, t, y), denoise(zt, t, y)",
     "uncond, cond = weak(zt, t, torch.full_like(y, null)), denoise(zt, t, y)", "test_guidance.py"),  # the weak one needs the label, too
    # networks
    ("layers.py", "angles = 1000.0 * t.float()", "angles = t.float()", "test_layers.py"),
    ("layers.py", "zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))", "nn.Conv2d(out_channels, out_channels, 3, padding=1)", "test_layers.py"),
    ("layers.py", "min(32, max(1, channels // 4))", "min(32, channels)", "test_layers.py"),  # one channel a group
    ("layers.py", "nn.Embedding(num_classes + 1, dim)", "nn.Embedding(num_classes, dim)", "test_layers.py test_networks.py"),
    ("layers.py", "q.shape[-1] ** -0.5", "q.shape[-1] ** 0.5", "test_layers.py"),
    ("unet.py", "h = part(h, size=skips[-1].shape[2:])", "h = part(h)", "test_networks.py"),  # 7 -> 4 -> 8
    ("unet.py", "zero_init(nn.Conv2d(first, config.in_channels, 3, padding=1))", "nn.Conv2d(first, config.in_channels, 3, padding=1)", "test_networks.py"),
    ("dit.py", "row = self.position[:rows, None].expand(rows, columns, -1)", "row = self.position[None, :columns].expand(rows, columns, -1)", "test_networks.py"),
    ("dit.py", "self.modulation = zero_init(nn.Linear(width, 6 * width))", "self.modulation = nn.Linear(width, 6 * width)", "test_networks.py"),
    # autoencoder and latents
    ("vae.py", "torch.exp(self.logvar / 2) * eps", "torch.exp(self.logvar) * eps", "test_vae.py"),
    ("vae.py", "(self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)", "(self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).mean(1)", "test_vae.py"),
    ("vae.py", ".clamp(-30.0, 20.0)", "", "test_vae.py"),
    ("vae.py", "config.channels[::-1], config.steps[::-1]", "config.channels[::-1], config.steps", "test_vae.py"),
    ("layers.py", "max(3, factor + 1 - factor % 2)", "3", "test_layers.py"),  # a factor of 7 sees 9 pixels of 49
    ("vq.py", "self.codes(index).detach() + (z - z.detach()), index", "self.codes(index), index", "test_vq.py"),  # the encoder learns nothing
    ("vq.py", "(z.detach() - q).square() + 0.25 * (z - q.detach()).square()",
     "(z - q.detach()).square() + 0.25 * (z.detach() - q).square()", "test_vq.py"),  # beta on the other term, as in public code
    ("vq.py", "enabled=False", "dtype=torch.bfloat16", "test_vq.py"),
    ("perceptual.py", "self.discriminator(x_hat.detach())", "self.discriminator(x_hat)", "test_perceptual.py"),  # the VAE helps D
    ("perceptual.py", "self.discriminator.requires_grad_(False)  #", "pass  #", "test_perceptual.py"),  # D learns to be deceived
    ("perceptual.py", "F.normalize(v.float(), dim=1, eps=1e-3)", "v.float()", "test_perceptual.py"),
    ("perceptual.py", "vae.encoder.requires_grad_(not config.decoder_only)", "vae.requires_grad_(not config.decoder_only)", "test_perceptual.py"),
    ("run.py", "round(self.config.early * config.steps)", "round((1 - self.config.early) * config.steps)", "test_run.py"),
    ("run.py", "return state.ema\n", "return state\n", "test_cli.py"),  # ships the last weights, not their average
    ("run.py", "int(60 * config.minutes / per_step)", "int(config.minutes / per_step)", "test_run.py"),
    ("run.py", "noise, denoiser.times, self.device)", "noise, device=self.device)", "test_run.py"),
    ("run.py", 'replace(config, steps=more["steps"], warmup=more["warmup"])', "config", "test_cli.py"),
    ("run.py", "moments[:, 1] = -torch.inf", "moments[:, 1] = 0", "test_run.py"),
    ("run.py", "keep(state.ema.model,", "keep(state.model,", "test_run.py"),
    ("latents.py", "mean.var(correction=0) + logvar.exp().mean()", "mean.var(correction=0)", "test_latents.py"),
    ("latents.py", "float(variance.rsqrt())", "float(1 / variance)", "test_latents.py"),
    ("pipeline.py", "self.vae.decode(chunk.to(self.device) / self.scale)", "self.vae.decode(chunk.to(self.device))", "test_pipeline.py"),
    ("pipeline.py", "/ self.scale) for chunk", "* self.scale) for chunk", "test_pipeline.py"),
    ("pipeline.py", "SCHEDULES[config.schedule], config.target", 'SCHEDULES["cosine"], config.target', "test_pipeline.py"),
    ("pipeline.py", "times, eta, order, randn)", "times, order=order, randn=randn)", "test_pipeline.py"),  # every solver without noise
    # data, training, averaging, files
    ("data.py", ".round().clamp(0, 255)", ".clamp(0, 255)", "test_data.py"),
    ("data.py", "return _order(n, seed, epoch)", "return _order(n, seed, 0)", "test_data.py"),  # the same order in every epoch
    ("ema.py", "min(self.decay, (1 + self.updates) / (10 + self.updates))", "self.decay", "test_ema.py"),
    ("ema.py", "1 - decay)", "decay)", "test_ema.py"),
    ("train.py", "scaler.unscale_(optimizer)\n", "pass\n", "test_train.py"),
    ("train.py", "step_generator(seed, state.step, state.device, noise)", "step_generator(seed, 0, state.device, noise)", "test_train.py"),
    ("train.py", "        self.index.copy_(index)\n", "", "test_train.py"),  # every replay trains on the recorded batch
    ("train.py", "name: value.clone()", "name: value", "test_train.py"),  # and reports the last one's losses for all
    ("train.py", 'group.get("speed", 1.0) * ', "", "test_perceptual.py"),
    ("train.py", "learning_rate(state.step, config)", "config.lr", "test_train.py"),
    ("train.py", "weight_decay=config.weight_decay, ", "", "test_train.py"),
    ("train.py", 'enabled=precision == "fp16"', "enabled=False", "test_train.py"),
    ("train.py", 'values.get("eps_mse", values["loss"])', 'values["loss"]', "test_train.py"),
    ("train.py", "self.step, self.ema.updates = own[\"step\"], own[\"ema_updates\"]", "self.step = own[\"step\"]", "test_train.py"),
    ("train.py", 'load_into(self.ema.model, parts["ema"], str(path))', "pass", "test_train.py"),
    ("checkpoint.py", "os.replace(part, path)", "path.write_bytes(part.read_bytes()[:-1])", "test_checkpoint.py"),
    # several processes
    ("parallel.py", "module if place()[1] == 1 else", "module if True else", "test_parallel.py"),  # gradients of the own share only
    ("layers.py", "whole[part * shape[0] : (part + 1) * shape[0]]", "whole[: shape[0]]", "test_parallel.py"),  # the same noise in all
    # evaluation
    ("evaluate.py", "prdc(equal, features)", "prdc(features, equal)", "test_pipeline.py"),
    ("evaluate.py", "replace(config, seed=seed)", "config", "test_pipeline.py"),  # all seeds the same
    ("metrics.py", "kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()", "kxx.sum() + kyy.sum()", "test_metrics.py"),  # a biased KID
    ("metrics.py", "kthvalue(k + 1, dim=1)", "kthvalue(k, dim=1)", "test_metrics.py"),  # counts a point as its own neighbour
    ("metrics.py", "a.double() / 255, b.double() / 255", "a.double() / 256, b.double() / 255", "test_metrics.py"),
    ("precision.py", "torch.cuda.set_device(device)", "pass", "test_precision.py"),  # graphs are recorded on another GPU
    ("precision.py", 'if capability >= (8, 0) else', 'if torch.cuda.is_bf16_supported() else', "test_precision.py"),
]


def survives(number: int, show: bool = False) -> bool:
    """Put the mutant into a copy of package and tests, run its tests; True if they pass all the same."""
    file, line, bug, tests = MUTANTS[number]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("ldm_minimal", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__", "weights"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        weights = ROOT / "ldm_minimal" / "assets" / "weights"
        if weights.is_dir():
            (Path(folder) / "ldm_minimal" / "assets" / "weights").symlink_to(weights)
        path = Path(folder) / "ldm_minimal" / file
        text = path.read_text(encoding="utf-8")
        if text.count(line) != 1:
            raise SystemExit(f"mutant {number}: {line!r} stands {text.count(line)} times in {file}; bring the list up to date")
        path.write_text(text.replace(line, bug), encoding="utf-8")
        call = [sys.executable, "-m", "pytest", "-x", *(f"tests/{name}" for name in tests.split())]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(call, cwd=folder, env=environment, text=True, timeout=600,
                                stdout=None if show else subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode not in (0, 1):  # anything else is no verdict: a file that no longer imports, no tests found
        raise SystemExit(f"mutant {number}: pytest ended with {result.returncode}\n{result.stdout or ''}")
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="try only so many, another choice every day")
    parser.add_argument("--only", type=int, help="try this one and show the tests' output")
    args = parser.parse_args()
    chosen = list(range(len(MUTANTS)))
    if args.only is not None:
        chosen = [args.only]
    elif args.sample:
        chosen = sorted(random.Random(datetime.date.today().toordinal()).sample(chosen, args.sample))
    alive = []
    for number in chosen:
        file, line, bug, _ = MUTANTS[number]
        lives = survives(number, show=args.only is not None)
        print(f"{'SURVIVED' if lives else 'killed  '}  {number:2}  {file}: {line.strip().splitlines()[0][:70]}", flush=True)
        alive += [number] * lives
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants killed ({len(MUTANTS)} in the list)")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
