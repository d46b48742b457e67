"""The chapters: one with the package, executed as stored, and clean. (`make test` executes them with nbval as well.)

nbval passes vacuously in known ways: shell lines that fail, magics, cells marked to be skipped. The tests here close
these: every code cell is plain Python and collected, and a notebook that fails makes the harness fail.
"""

import ast
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from ldm_minimal import checks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "book"))
import notebooks as keeper  # noqa: E402

FILES = keeper.files()
BOOKS = {path.relative_to(keeper.NOTEBOOKS).as_posix(): keeper.read(path) for path in FILES}
every_notebook = pytest.mark.parametrize("name", BOOKS)
SOLUTIONS = [name for name in BOOKS if name.startswith("solutions/")]
CHAPTERS = [name for name in BOOKS if name not in SOLUTIONS and not name.startswith("00")]
every_chapter = pytest.mark.parametrize("name", CHAPTERS)

LAYERS = ("schedule", "layers", "ema", "vae", "unet", "dit", "classifier", "denoiser", "guidance", "sampler", "train",
          "metrics", "vq", "perceptual", "latents")  # L0 to L2, but for plumbing as a whole
PLUMBING = {  # public names that no chapter builds, and why
    "layers.at_least_float32": "a type conversion", "layers.draw": "where noise is drawn, for several processes",
    "layers.check_labels": "an error message", "layers.check_latents": "an error message",
    "vae.VAEConfig": "numbers", "unet.UNetConfig": "numbers", "dit.DiTConfig": "numbers",
    "classifier.ClassifierConfig": "numbers", "denoiser.DenoiserConfig": "numbers", "train.TrainConfig": "numbers",
    "perceptual.PerceptualConfig": "numbers", "train.TrainState": "files of a run", "train.Step": "a record",
    "train.Loss": "a wrapper for several processes", "train.Diverged": "an error", "train.Meter": "a log",
    "train.compile_or_not": "a speed-up", "train.Recorded": "a speed-up",
}
TAGS = {"setup", "colab", "check", "exercise"}
THIRD_PARTY = {"torch", "torchvision", "numpy", "matplotlib", "ldm_minimal"}  # Colab has these, or the set-up cell brings it


def markdown(name: str) -> str:
    return "\n\n".join(keeper.text(cell) for cell in BOOKS[name]["cells"] if cell["cell_type"] == "markdown")


def outputs(name: str):
    return [out for cell in keeper.code_cells(BOOKS[name]) for out in cell["outputs"]]


def test_the_sequence_has_no_gap():
    assert [name[:2] for name in BOOKS if name not in SOLUTIONS] == [f"{i:02d}" for i in range(11)]
    assert SOLUTIONS == [f"solutions/{name}" for name in CHAPTERS]


# --- one with the package

def test_every_public_name_has_one_defining_cell():
    homes: dict[str, list[str]] = {}
    for name, book in BOOKS.items():
        for cell in keeper.code_cells(book):
            for defined in keeper.defined(cell):
                homes.setdefault(defined.removeprefix("ldm_minimal."), []).append(name)
    assert {k: v for k, v in homes.items() if len(v) > 1} == {}, "defined in two places"
    public = set()
    for module in LAYERS:
        tree = ast.parse((ROOT / "ldm_minimal" / f"{module}.py").read_text(encoding="utf-8"))
        public |= {f"{module}.{node.name}" for node in tree.body
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")}
    assert public - homes.keys() == PLUMBING.keys(), "a name without a chapter, or plumbing that is none"


@every_chapter
def test_definitions_are_those_of_the_package(name):
    found = 0
    for cell in keeper.code_cells(BOOKS[name]):
        if defined := keeper.defined(cell):
            wanted = "\n\n\n".join(keeper.package_source(each) for each in defined)
            assert keeper.meaning(keeper.text(cell)) == keeper.meaning(wanted), f"{defined}: run `make sync`"
            found += 1
    assert found, "a chapter builds a piece"


@every_chapter
def test_no_piece_of_the_package_is_redefined_without_a_tag(name):
    """A definition with a name of the package, outside the cells that hold the package's own."""
    public = set(PLUMBING) | {d for book in BOOKS.values() for c in keeper.code_cells(book) for d in keeper.defined(c)}
    names = {each.rpartition(".")[2] for each in public}
    for cell in keeper.code_cells(BOOKS[name]):
        if not keeper.defined(cell):
            again = {node.name for node in ast.parse(keeper.text(cell)).body
                     if isinstance(node, (ast.FunctionDef, ast.ClassDef))} & names
            assert not again, f"{again} also stands in the package: tag the cell, or choose another name"


def test_sync_has_nothing_to_do():
    for path in FILES:
        before = path.read_text(encoding="utf-8")
        book = keeper.synced(path, keeper.read(path), keeper.address())
        assert keeper.json.dumps(book, indent=1, ensure_ascii=False) + "\n" == before, f"{path.name}: run `make sync`"


def test_one_token_changed_in_package_or_notebook_is_noticed():
    source = keeper.package_source("ldm_minimal.schedule.log_snr")
    assert keeper.meaning(source) == keeper.meaning(source.replace('"""', '"""Other words. ', 1))
    assert keeper.meaning(source) != keeper.meaning(source.replace(" - ", " + "))
    book = keeper.read(FILES[0])
    before = keeper.code_hash(book)
    cell = keeper.code_cells(book)[-1]
    keeper.put(cell, keeper.text(cell) + "\n0")
    assert keeper.code_hash(book) != before


def test_one_digit_changed_in_an_output_is_noticed():
    book = keeper.read(FILES[1])
    before = keeper.output_hash(book)
    shown = next(out for cell in keeper.code_cells(book) for out in cell["outputs"] if "text" in out)
    shown["text"] = [line.replace("0", "1", 1) for line in shown["text"]]
    assert keeper.output_hash(book) != before


# --- executed as stored, and clean

@every_notebook
def test_stored_outputs_belong_to_this_code(name):
    cells, about = keeper.code_cells(BOOKS[name]), BOOKS[name]["metadata"]["ldm"]
    assert about["code"] == keeper.code_hash(BOOKS[name]), "the code was changed after the run: `make notebooks`"
    assert about["outputs"] == keeper.output_hash(BOOKS[name]), "the outputs are not those of the run: `make notebooks`"
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {"seconds", "device", "python", "versions"} <= about.keys()
    assert about["seconds"] <= 120, "a chapter takes at most two minutes"
    assert "widgets" not in BOOKS[name]["metadata"]


@every_notebook
def test_stored_outputs_are_clean(name):
    assert len((keeper.NOTEBOOKS / name).read_bytes()) <= 1_000_000
    for out in outputs(name):
        assert out["output_type"] != "error", "a traceback is stored"
        assert out.get("name") != "stderr", f"stderr is stored: {out.get('text')}"
        kinds = out.get("data", {}).keys()
        assert not kinds & {"image/svg+xml", "application/vnd.jupyter.widget-view+json", "text/html"}, kinds


@every_notebook
def test_every_picture_has_a_text(name):
    pictures = [out for out in outputs(name) if "image/png" in out.get("data", {})]
    assert pictures or name in SOLUTIONS
    for out in pictures:
        assert len(out["metadata"]["image/png"]["alt"]) >= 40, "alt= says what the figure shows"


@every_notebook
def test_no_trace_of_a_machine(name):
    book = BOOKS[name]
    shown = [keeper.text(cell) for cell in book["cells"]]
    shown += ["".join(out.get("text", [])) + "".join(out.get("data", {}).get("text/plain", [])) for out in outputs(name)]
    for words in shown:
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|opt|content|mnt|work|Users)/|[A-Z]:\\", words), words[:200]
        assert not re.search(r"\.py:\d+: |Traceback|Warning", words), "a warning or a traceback in the output"


# --- plain Python that runs on Colab and that nbval sees

@every_notebook
def test_cells_are_plain_python(name):
    for cell in keeper.code_cells(BOOKS[name]):
        source = keeper.text(cell)
        tree = ast.parse(source)  # a magic or a shell line, whose failure nbval would not see, is no Python
        assert "NBVAL" not in source and "get_ipython" not in source
        assert all(tag in TAGS or tag.startswith("defines:") for tag in keeper.tags(cell)), keeper.tags(cell)
        assert source.count("\n") < 60 or keeper.defined(cell), "a cell of more than 60 lines"
        assert max(map(len, source.splitlines()), default=0) <= 121, "a line that the reader must scroll"
        for node in ast.walk(tree):
            outer = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            outer += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in outer:
                root = module.partition(".")[0]
                assert root in THIRD_PARTY or root in sys.stdlib_module_names, f"{module} may be missing on Colab"


def test_nbval_collects_every_code_cell():
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "--nbval-lax",
                           "--nbval-current-env", "notebooks"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    for name, book in BOOKS.items():
        collected = len(re.findall(rf"(?m)^notebooks/{re.escape(name)}::", done.stdout))
        assert collected == len(keeper.code_cells(book)), name


def test_a_failing_notebook_fails(tmp_path):
    book = {"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "source": "assert 1 == 2", "outputs": [],
                       "execution_count": None}],
            "metadata": BOOKS[FILES[0].name]["metadata"], "nbformat": 4, "nbformat_minor": 5}
    keeper.write(tmp_path / "planted.ipynb", book)
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "."]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300).returncode == 1


# --- written for people

@every_chapter
def test_a_chapter_has_its_parts(name):
    cells, words = BOOKS[name]["cells"], markdown(name)
    kinds = [tag for cell in cells for tag in keeper.tags(cell)]
    assert cells[0]["cell_type"] == "markdown" and re.match(r"# \d+\. ", keeper.text(cells[0]))
    assert kinds.count("setup") == 1 and kinds.count("colab") == 1
    assert kinds.count("check") >= 4, "check cells"
    assert re.search(r"(?m)^## Break it", words) and re.search(r"(?m)^## Summary", words)
    assert re.search(r"\*\*Time:\*\* \d\.\d minutes on two CPU cores \(measured\)", words), "`make notebooks` writes it"
    assert 4 <= len(re.findall(rf"(?m)^### Exercise {name[:2]}\.\d", words)) <= 7


@every_chapter
def test_stubs_run_and_say_that_they_are_not_done(name):
    stubs = [cell for cell in keeper.code_cells(BOOKS[name]) if "exercise" in keeper.tags(cell)]
    assert len(stubs) >= 2
    for cell in stubs:
        number = re.match(rf"# exercise ({name[:2]}\.\d)\n", keeper.text(cell))
        assert number and f'check("{number[1]}"' in keeper.text(cell) and number[1] in checks.EXERCISES
        assert "not done yet" in "".join("".join(out.get("text", "")) for out in cell["outputs"])


def test_every_check_has_its_exercise():
    asked = {n for name in CHAPTERS for cell in keeper.code_cells(BOOKS[name])
             for n in re.findall(r'(?m)^check\("(\d\d\.\d)"', keeper.text(cell))}
    assert asked == checks.EXERCISES.keys()


@every_notebook
def test_links_and_images(name):
    words = markdown(name)
    assert not re.search(r"!\[[^\]]*\]\(https?:|<img|<script|<iframe", words), "nothing from elsewhere is loaded"
    assert not re.search(r"!\[\]\(", words), "an image without a text"
    assert r"\begin{align}" not in words, "aligned inside $$ is what GitHub shows"
    for target in re.findall(r"\]\(([^)\s]+)\)", words):
        if not target.startswith(("https://", "http://")):
            file, _, anchor = target.partition("#")
            assert not file or (keeper.NOTEBOOKS / name).parent.joinpath(file).exists(), target
            if anchor:
                where = markdown(file.rpartition("/")[2]) if file else words
                heads = [re.sub(r"\s+", "-", head.strip()) for head in re.findall(r"(?m)^#+ (.*)$", where)]
                assert anchor.lower() in [head.lower() for head in heads], target


def test_the_notation_names_what_exists():
    """book/notation.md: | symbol | meaning | identifier | chapter |."""
    import importlib
    rows = re.findall(r"(?m)^\|[^|]+\|[^|]+\| `([^`]+)` \| (\d\d)", (ROOT / "book" / "notation.md").read_text(encoding="utf-8"))
    assert len(rows) >= 15
    for identifier, chapter in rows:
        book = next(book for name, book in BOOKS.items() if name.startswith(chapter))
        source = "\n".join(keeper.text(cell) for cell in keeper.code_cells(book))
        module, _, attribute = identifier.rpartition(".")
        if module:
            assert hasattr(importlib.import_module(f"ldm_minimal.{module}"), attribute), identifier
        assert re.search(rf"\b{re.escape(attribute)}\b", source), f"{identifier} does not occur in chapter {chapter}"


# --- Colab

def test_the_setup_cell_in_an_empty_folder(tmp_path):
    """A fresh environment, a stand-in for Colab's module, a wheel of this tree; torch and numpy stay as they are."""
    wheels, folder, env = tmp_path / "wheels", tmp_path / "empty", tmp_path / "env"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    venv.create(env, with_pip=True)
    python = next(env.glob("bin/python"))
    packages = subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True,
                              text=True, check=True).stdout.strip()
    import torch
    Path(packages, "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent))  # torch as Colab has it
    cell = next(c for c in keeper.code_cells(BOOKS[FILES[1].name]) if "setup" in keeper.tags(c))
    script = folder.parent / "cell.py"
    script.write_text("import sys, types\nsys.path = [p for p in sys.path if p != sys.path[0]]\n"
                      "sys.modules['google'] = sys.modules['google.colab'] = types.ModuleType('colab')\n"
                      + keeper.text(cell) + "\nimport ldm_minimal; print('from', ldm_minimal.__file__)\n")

    def open_notebook():
        return subprocess.run([python, str(script)], cwd=folder, capture_output=True, text=True, timeout=300)

    empty = open_notebook()
    assert empty.returncode == 1 and "make wheel" in empty.stderr.splitlines()[-1]
    wheel = next(wheels.glob("ldm_minimal-*.whl"))
    wheel.rename(folder / wheel.name)
    filled = open_notebook()
    assert filled.returncode == 0, filled.stderr
    assert f"from {packages}" in filled.stdout and "budget" in filled.stdout
    own = {path.name.partition("-")[0] for path in Path(packages).glob("*.dist-info")}
    assert own <= {"pip", "setuptools", "wheel", "ldm_minimal"}, "the set-up cell installs nothing else"
