"""The chapters' keeper: keeps notebooks and package one, runs them, stores their outputs.

    python book/notebooks.py run [NN ...]     execute all (or those: 05, solutions/05), and store outputs, minutes and a hash
    python book/notebooks.py sync             package -> notebooks: defining cells, the set-up cell, the Colab line
    python book/notebooks.py stamp ADDRESS    set the repository's public address (pyproject.toml), then sync

A cell with the tag `defines:ldm_minimal.vae.Encoder` holds the definition that the package has. Several tags stand for
several definitions in one cell, in this order. `sync` rewrites a cell only where its meaning (its syntax tree without
docstrings) differs from the package's, so a notebook may break its lines differently.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
NAMES = ("torch", "torchvision", "numpy", "matplotlib")

SETUP = '''\
# Set-up, the same in every chapter: find ldm_minimal and, on Colab, install it. torch and numpy are never touched.
import importlib.util, subprocess, sys
from pathlib import Path

ADDRESS = "{address}"  # the public repository; empty as long as there is none
if importlib.util.find_spec("ldm_minimal") is None:
    here = Path.cwd()
    clone = next((p for p in (here, *here.parents) if (p / "ldm_minimal" / "__init__.py").is_file()), None)
    wheel = max(here.glob("ldm_minimal-*.whl"), default=None)
    source = str(wheel) if wheel else ADDRESS and f"git+{{ADDRESS}}"
    if clone:  # this notebook lies in a clone of the repository
        sys.path.insert(0, str(clone))
    elif "google.colab" in sys.modules and source:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", source], check=True)
        importlib.invalidate_caches()
    else:
        raise ModuleNotFoundError(
            "ldm_minimal is not here. In a clone: `make lab`. On Colab: run `make wheel` in a clone, upload "
            "dist/ldm_minimal-*.whl into the folder on the left, and run this cell again.")

from ldm_minimal import chapter

budget = chapter.start()'''


def files() -> list[Path]:
    """All notebooks: the chapters, then the solutions of their exercises, which coursework.py writes."""
    return sorted(NOTEBOOKS.glob("*.ipynb")) + sorted(NOTEBOOKS.glob("solutions/*.ipynb"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, notebook: dict) -> None:
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def text(cell: dict) -> str:
    return "".join(cell["source"])


def put(cell: dict, source: str) -> None:
    cell["source"] = source.splitlines(keepends=True)


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def defined(cell: dict) -> list[str]:
    """The package's names that a cell defines, as written in its tags: ldm_minimal.vae.Encoder, ..."""
    return [tag.removeprefix("defines:") for tag in tags(cell) if tag.startswith("defines:")]


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_hash(notebook: dict) -> str:
    """Changes with any token of any code cell, but for the set-up cell, which `synced` keeps and `stamp` may change."""
    sources = [text(cell) for cell in code_cells(notebook) if "setup" not in tags(cell)]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def output_hash(notebook: dict) -> str:
    """Changes with any token of what the cells have shown: a stored number is as it was computed, or not stored."""
    shown = [cell["outputs"] for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def package_source(name: str) -> str:
    """The text of a top-level definition of the package, with the comments above it left out: "ldm_minimal.vae.VAE"."""
    module, _, wanted = name.rpartition(".")
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        targets = [getattr(t, "id", None) for t in getattr(node, "targets", [])]
        if getattr(node, "name", None) == wanted or wanted in targets:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    raise ValueError(f"the package has no {name}")


def meaning(source: str) -> str:
    """The syntax tree without docstrings: equal for two texts that do the same in the same words."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def address() -> str:
    """The repository's public address, which stands in pyproject.toml; empty as long as there is none."""
    return re.search(r'(?m)^repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]


def badge(path: Path, where: str) -> str:
    """The line under a chapter's title: how to open it in Colab."""
    if not where:
        return "*In Colab: upload this notebook and the wheel that `make wheel` builds.*"
    slug = where.removeprefix("https://github.com/").removesuffix(".git")
    return (f"[Open in Colab](https://colab.research.google.com/github/{slug}/blob/main/notebooks/"
            f"{path.relative_to(NOTEBOOKS).as_posix()})")


def synced(path: Path, notebook: dict, where: str) -> dict:
    """The notebook with the package's definitions, the set-up cell and the Colab line as they should be."""
    for cell in notebook["cells"]:
        if "setup" in tags(cell):
            put(cell, SETUP.format(address=where))
        if names := defined(cell):
            wanted = "\n\n\n".join(package_source(name) for name in names)
            if meaning(text(cell)) != meaning(wanted):
                put(cell, wanted)
        if "colab" in tags(cell):
            put(cell, badge(path, where))
    return notebook


def sync() -> list[str]:
    """Write what `synced` says; returns the notebooks that changed."""
    changed, where = [], address()
    for path in files():
        before = path.read_text(encoding="utf-8")
        write(path, synced(path, json.loads(before), where))
        if path.read_text(encoding="utf-8") != before:
            changed.append(path.name)
    return changed


def run(path: Path, timeout: int = 600) -> float:
    """Execute a notebook from top to bottom and store what it shows; returns the seconds it took."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    seconds = time.perf_counter() - began
    result = json.loads(nbformat.writes(notebook))
    for cell in result["cells"]:
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key == "tags"}
    import torch
    result["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "ldm": {"seconds": round(seconds, 1), "code": code_hash(result), "outputs": output_hash(result),
                "python": platform.python_version(),
                "device": "cuda" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
                "versions": {name: importlib.metadata.version(name) for name in NAMES}},
    }
    cores = {2: "two"}.get(torch.get_num_threads(), torch.get_num_threads())
    minutes = f"{seconds / 60:.1f} minutes on {cores} CPU cores (measured)"
    for cell in result["cells"]:
        if cell["cell_type"] == "markdown" and not torch.cuda.is_available():
            put(cell, re.sub(r"(?<=\*\*Time:\*\* )[^;\n]*", minutes, text(cell)))
    write(path, result)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "sync", "stamp"))
    parser.add_argument("which", nargs="*", help="run: 05, solutions/05 ... (default: all); stamp: the address")
    args = parser.parse_args()
    if args.what == "stamp":
        if len(args.which) != 1:
            parser.error("stamp takes the address, and nothing else")
        project = ROOT / "pyproject.toml"
        lines = project.read_text(encoding="utf-8")
        lines = re.sub(r'(?m)^repository = ".*"$', f'repository = "{args.which[0]}"', lines)
        project.write_text(lines, encoding="utf-8")
    if args.what in ("sync", "stamp"):
        return print("changed:", ", ".join(sync()) or "nothing")
    os.environ.pop("LDM_FAST", None)  # what is stored was not hurried
    names = {str(path.relative_to(NOTEBOOKS)): path for path in files()}
    wanted = [name for name in names if not args.which or name.startswith(tuple(args.which))]
    if not wanted:
        parser.error(f"no notebook begins with {', '.join(args.which)}: there are {', '.join(names)}")
    for name in wanted:
        print(f"{name}: {run(names[name]):.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
