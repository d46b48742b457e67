"""Everything that the book's interactive page loads, into one folder:  python book/play/export.py FOLDER

    unet.onnx, decoder.onnx   the shipped U-Net and decoder: weights in float16, cast to float32 inside the graph
    play.json                 classes, latent scale, ends of the time grid, one test image of each class with its latent
    play.png                  what the page shows where it cannot compute
    play.js, play.css         from book/play/static
    ort.js, ort-*.wasm        ONNX Runtime Web, from book/node_modules

The networks are exported as they are; schedule, guidance and sampler are not in the files: play.js has them, to be read.
"""

import argparse
import base64
import math
import shutil
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from ldm_minimal import LatentDiffusion, checkpoint, data, layers, plot  # noqa: E402
from ldm_minimal.guidance import guide  # noqa: E402
from ldm_minimal.sampler import SOLVERS, sample  # noqa: E402
from ldm_minimal.schedule import MIDDLE, time_grid  # noqa: E402

RUNTIME = ROOT / "book" / "node_modules" / "onnxruntime-web" / "dist"
OPSET = 18


# --- noise: the page's own, a function of (seed, index, k), so that it can be written again in any language

def mix(x: int) -> int:
    """A 32-bit number -> another that looks unrelated (a step of the golden ratio, then MurmurHash3's finalizer)."""
    h = (x + 0x9E3779B9) & 0xFFFFFFFF
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def noise(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers for picture `index` of a seed, by Box and Muller: two uniforms make two normals."""
    n = math.prod(shape)
    u = [(mix(mix(mix(seed) + index) + k) + 0.5) / 2**32 for k in range(n + n % 2)]
    z = [math.sqrt(-2 * math.log(u[k - k % 2])) * (math.sin if k % 2 else math.cos)(2 * math.pi * u[k - k % 2 + 1])
         for k in range(n)]
    return torch.tensor(z).reshape(shape)


def draw(model: LatentDiffusion, label: int, steps: int, guidance: float, solver: str, seed: int, count: int = 4):
    """What the page draws, drawn by the package: latents and images of `count` pictures. `label` may be the null label."""
    eta, order = SOLVERS[solver]
    zt = torch.stack([noise(seed, i, model.latent_shape) for i in range(count)])
    times = time_grid(steps, model.denoiser.schedule, "middle")
    denoise = guide(model.denoise, model.denoiser.null, guidance)
    with torch.no_grad():
        *_, (z0, _) = sample(denoise, zt, torch.full((count,), label), model.denoiser.schedule, times, eta, order)
    return z0, model.decode(z0)


# --- files

def half(path: Path) -> None:
    """Store the weights of an ONNX file as float16; a Cast per tensor gives the graph its float32 back."""
    model = onnx.load(path)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and math.prod(weight.dims) > 64:
            name = weight.name
            values = onnx.numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, f"{name}.half"))
            casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_networks(model: LatentDiffusion, folder: Path) -> None:
    """unet(zt, t, y) -> out and decoder(z) -> x, for any batch size."""
    zt, t, y = torch.zeros(2, *model.latent_shape), torch.ones(2), torch.zeros(2, dtype=torch.long)
    networks = {"unet": (model.denoiser.net, {"zt": zt, "t": t, "y": y}, "out"), "decoder": (model.vae.decoder, {"z": zt}, "x")}
    for name, (net, inputs, output) in networks.items():
        with warnings.catch_warnings(), patch.object(layers, "check_labels"):  # a look at values cannot be exported
            warnings.simplefilter("ignore")  # the older exporter: a tenth of the time, and one package less
            torch.onnx.export(net, tuple(inputs.values()), folder / f"{name}.onnx", dynamo=False, opset_version=OPSET,
                              input_names=list(inputs), output_names=[output],
                              dynamic_axes={key: {0: "batch"} for key in (*inputs, output)})
        half(folder / f"{name}.onnx")


def write_json(model: LatentDiffusion, folder: Path) -> None:
    """The numbers that play.js needs beside the weights."""
    subset = data.ASSETS / f"{model.dataset}-subset"  # the same pictures on every machine
    images, labels = (torch.from_numpy(data.read(subset / file, model.dataset)) for file in data.FILES["test"])
    first = [int((labels == label).nonzero()[0]) for label in range(len(model.classes))]
    latents = model.encode(data.to_float(images[first].unsqueeze(1)))
    checkpoint.save_json(folder / "play.json", {
        "classes": model.classes, "null": model.denoiser.null, "latent": model.latent_shape, "scale": model.scale,
        "middle": MIDDLE, "size": list(images.shape[1:]),
        "tests": [{"label": label, "pixels": base64.b64encode(images[i].numpy().tobytes()).decode(),
                   "latent": [round(value, 5) for value in z.flatten().tolist()]}
                  for label, (i, z) in enumerate(zip(first, latents))],
    })


def write_picture(model: LatentDiffusion, folder: Path) -> None:
    """The first experiment of the page, drawn by the package."""
    rows = [draw(model, label=6, steps=20, guidance=s, solver="dpm++2m", seed=0)[1] for s in (0, 1, 4)]
    figure = plot.image_grid(torch.cat(rows), 3, [f"guidance {s}" for s in (0, 1, 4)], zoom=3)
    plot.save_figure(figure, folder / "play.png")


def export(folder: Path) -> None:
    model = LatentDiffusion.pretrained()
    if (model.config.schedule, model.config.target) != ("cosine", "v"):
        raise ValueError(f"play.js knows the cosine schedule and the target v, not {model.config.schedule}, {model.config.target}")
    runtime = {"ort.js": RUNTIME / "ort.wasm.bundle.min.mjs",  # renamed: some hosts do not serve .mjs as a script
               "ort-wasm-simd-threaded.wasm": RUNTIME / "ort-wasm-simd-threaded.wasm"}
    if missing := [path for path in runtime.values() if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not there: run `npm ci` in book/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in runtime.items():
        shutil.copyfile(path, folder / name)
    shutil.copytree(Path(__file__).parent / "static", folder, dirs_exist_ok=True)
    write_networks(model, folder)
    write_json(model, folder)
    write_picture(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    export(parser.parse_args().folder)


if __name__ == "__main__":
    main()
