"""The package can be read from top to bottom: in the order below, each file imports only files that come before it.

The imports are read from the source, those inside functions included. Below the top layer a file takes nothing from
its own layer either, with one exception: plot uses data (bytes of images) and checkpoint (files whole or not at all).
"""

import ast
import sys
from pathlib import Path

import pytest

import ldm_minimal

LAYERS = {
    "L0": ["options", "precision", "schedule", "layers", "parallel", "data", "checkpoint", "ema", "plot", "checks",
           *(f"exercises/chapter_{i:02d}" for i in range(1, 11)), "exercises"],
    "L1": ["vae", "unet", "dit", "classifier", "denoiser", "guidance", "sampler", "train", "metrics"],
    "L2": ["vq", "perceptual", "latents"],
    "L3": ["pipeline"],
    "L4": ["__init__", "presets", "evaluate", "report", "run", "inception", "baseline", "bench", "race", "scale", "profiling",
           "chapter", "grading/sandbox", "grading/submission", "grading/remote", "grading/worker", "grading/grade", "grading",
           "__main__"],
}
ORDER = [name for names in LAYERS.values() for name in names]
TABLE = ("checks", "exercises")  # the checks list the exercises, whose files are made of the functions of checks
WITHIN = {("plot", "data"), ("plot", "checkpoint"), TABLE, *((f"exercises/chapter_{i:02d}", "checks") for i in range(1, 11)),
          *(("exercises", f"exercises/chapter_{i:02d}") for i in range(1, 11))}  # imports inside one layer below L4
PLOTTERS = {"report", "chapter", "__main__"}  # and the notebooks
THIRD_PARTY = {"torch", "torchvision", "numpy", "matplotlib", "safetensors", "tqdm"}  # as in pyproject.toml

FOLDER = Path(ldm_minimal.__file__).parent
FILES = {file.relative_to(FOLDER).with_suffix("").as_posix().replace("/__init__", ""): ast.parse(file.read_text(encoding="utf-8"))
         for file in sorted(FOLDER.glob("**/*.py"))}
PACKAGES = {"ldm_minimal", "ldm_minimal.exercises", "ldm_minimal.grading"}
every_file = pytest.mark.parametrize("name", FILES)


def own_imports(tree, name=""):
    """The files of the package that a file imports, at its top or inside a function."""
    parts = name.split("/")
    folders = ["ldm_minimal", *(parts if f"ldm_minimal.{name}" in PACKAGES else parts[:-1])]  # where "from ." begins
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folders[: len(folders) - node.level + 1] if node.level else []
            module = ".".join(above + [node.module] * bool(node.module))
            targets = [f"{module}.{alias.name}" for alias in node.names] if module in PACKAGES else [module]
        else:
            continue
        for target in targets:
            package, _, rest = target.partition(".")
            file = rest.replace(".", "/")
            if package == "ldm_minimal" and file in ORDER:
                found.add(file)
            elif package == "ldm_minimal" and rest != "__version__":
                raise AssertionError(f"an import of {target}, which is in no layer")
    return found


def outer_imports(tree):
    """The packages of others that a file imports at its top, which is when it is imported itself."""
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_the_reader_of_imports_sees_every_form_of_them():
    source = """
import ldm_minimal.vae
from ldm_minimal import data
from ldm_minimal.unet import UNet
from . import __version__, plot
from .layers import (
    attend,
)
def f():
    from .run import Run
    from . import pipeline as p
"""
    assert own_imports(ast.parse(source)) == {"vae", "data", "unet", "plot", "layers", "run", "pipeline"}
    with pytest.raises(AssertionError, match="ldm_minimal.utils"):
        own_imports(ast.parse("from .utils import helper"))
    source = "import os, numpy as np\nfrom torch import nn\ndef f(): import scipy"
    assert outer_imports(ast.parse(source)) == {"numpy", "torch"}


def test_every_file_has_its_place_in_the_order_once():
    assert FILES.keys() == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@every_file
def test_a_file_imports_only_files_that_come_before_it(name):
    later = set(ORDER[ORDER.index(name):])
    assert own_imports(FILES[name], name) & later <= ({TABLE[1]} if name == TABLE[0] else set())


@pytest.mark.parametrize("layer", ["L0", "L1", "L2", "L3"])
def test_a_file_below_the_top_takes_nothing_from_its_own_layer_but_what_is_listed(layer):
    inside = {(name, other) for name in LAYERS[layer] for other in own_imports(FILES[name], name) & set(LAYERS[layer])}
    assert inside == {pair for pair in WITHIN if pair[0] in LAYERS[layer]}


def test_the_schedule_the_layers_and_the_metrics_stand_alone():
    for name in ("schedule", "layers", "metrics", "ema", "options"):
        assert not own_imports(FILES[name], name)


def test_only_the_report_the_command_line_and_the_notebooks_import_plot():
    assert {name for name, tree in FILES.items() if "plot" in own_imports(tree, name)} <= PLOTTERS
    assert {name for name, tree in FILES.items() if "matplotlib" in outer_imports(tree)} <= {"plot", "grading/worker"}


@every_file
def test_importing_a_file_needs_only_the_declared_dependencies(name):
    assert outer_imports(FILES[name]) <= THIRD_PARTY


@every_file
def test_every_file_opens_by_saying_what_it_does(name):
    text = ast.get_docstring(FILES[name])
    assert text and len(text.split()) >= (6 if name.startswith("exercises/") else 10)
    assert text.splitlines()[0].rstrip()[-1] in ".:?", "the first line is a sentence"
