"""Builds the book: python book/build.py [--into FOLDER] [--pdf]   (make book, make pdf)

    book/pages/*.md, book/*.md, notebooks/**/*.ipynb, docstrings  ->  FOLDER/source  ->  Sphinx  ->  FOLDER/html

The pages are copied, with their links turned to where their targets lie in the book; `<!-- insert: name -->` in a page is
replaced by what the function of that name in INSERTS makes from the project's files. The notebooks get, for the book only:
a line with Colab, download and minutes; the alternative texts of their figures where myst-nb looks for them; links from
arXiv numbers to the bibliography and from defining cells to the API reference. Nothing is executed.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import browser
import notebooks as keeper

sys.path.insert(0, str(keeper.ROOT))

ROOT = keeper.ROOT
BOOK = ROOT / "book"
BUILD = BOOK / "_build"
WEIGHTS = ROOT / "ldm_minimal" / "assets" / "weights"
README = ROOT / "README.md"
LIMIT_MB = 40

API = {  # page: (title, modules), in the order of README's map
    "networks": ("Noise and networks", "schedule layers vae vq perceptual unet dit"),
    "denoising": ("Denoising and sampling", "denoiser guidance sampler"),
    "training": ("Training", "ema train latents"),
    "evaluation": ("Evaluation", "metrics classifier evaluate"),
    "model": ("The complete model", "pipeline presets run report parallel"),
    "course": ("Chapters, checks and marks",
               "chapter checks grading.grade grading.submission grading.remote grading.sandbox"),
    "plumbing": ("Plumbing", "data checkpoint plot precision options inception"),
    "measuring": ("Comparisons and costs", "baseline bench race scale profiling"),
}


# --- pieces of the project's files that pages show

def section(path: Path, title: str) -> str:
    """What stands under a heading of level two."""
    return re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", path.read_text(encoding="utf-8"))[1].strip()


def title(notebook: dict) -> str:
    return re.match(r"# (.*)", keeper.text(notebook["cells"][0]))[1]


def chapters() -> list[Path]:
    return sorted(keeper.NOTEBOOKS.glob("*.ipynb"))


def chapter_list() -> str:
    """Each chapter with what it promises (the first paragraph after its title) and its measured minutes."""
    rows = []
    for path in chapters():
        book = keeper.read(path)
        promise = " ".join(keeper.text(book["cells"][0]).split("\n\n")[1].split())
        rows.append(f"- **[{title(book)}](chapters/{path.name})** ({minutes(book)})\\\n  {promise}")
    return "\n".join(rows)


def solutions_list() -> str:
    return "\n".join(f"- [{title(keeper.read(path))}](chapters/solutions/{path.name})"
                     for path in sorted(keeper.NOTEBOOKS.glob("solutions/*.ipynb")))


def minutes(notebook: dict) -> str:
    """As measured when the notebook was run; empty if it was not."""
    seconds = notebook["metadata"].get("ldm", {}).get("seconds")
    return "" if seconds is None else f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def measured() -> dict:
    return json.loads((WEIGHTS / "metrics.json").read_text(encoding="utf-8"))


MODELS = {"best": "best model, with autoguidance", "autoguided": "U-Net with autoguidance", "unet": "U-Net", "dit": "DiT"}


def results_table() -> str:
    """The table that ship.py wrote into README."""
    return "\n".join(re.findall(r"(?m)^\|.*$", re.search(r"(?s)<!-- results -->(.*)<!-- /results -->", README.read_text(encoding="utf-8"))[1]))


def results_cost() -> str:
    metrics = measured()
    rows = ["| model | samples | images/s | calls of a network an image | PSNR of reconstructions | SSIM | memorization ratio |",
            "|---|---|---|---|---|---|---|"]
    machines: dict[str, list[str]] = {}
    for key, name in MODELS.items():
        m = metrics[key]
        machines.setdefault(f"{m['device']}, {m['precision']}", []).append(name)
        rows.append(f"| {name} | {m['n']:,} | {m['sampling']['images_per_second']:.0f} | {m['sampling']['forward_passes_per_image_at_most']} | "
                    f"{m['reconstruction']['psnr_db']:.2f} dB | {m['reconstruction']['ssim']:.3f} | {m['memorisation']:.2f} |")
    drawn = " and ".join(f"{machine} ({'; '.join(names)})" for machine, names in machines.items())
    return "\n".join(rows) + f"\n\nDrawn on: {drawn}."


def results_classes() -> str:
    metrics = measured()
    found = [metrics[key]["classes_found"] for key in ("best", "unet", "dit")]
    rows = ["| class | best model | U-Net | DiT |", "|---|---|---|---|"]
    return "\n".join(rows + [f"| {name} | " + " | ".join(f"{counts[name]:,}" for counts in found) + " |" for name in found[0]])


def model_card() -> str:
    """MODEL_CARD.md one level deeper, as a part of a page."""
    card = (WEIGHTS / "MODEL_CARD.md").read_text(encoding="utf-8").replace("# Model card\n", "", 1)
    card = re.sub(r"(?ms)^## Measured\n.*?(?=^License)", "", card)
    return re.sub(r"(?m)^#", "##", card)


def api_table() -> str:
    return "\n".join(["| page | modules |", "|---|---|"]
                     + [f"| [{name}](api/{page}.rst) | {', '.join(f'`{m}`' for m in modules.split())} |"
                        for page, (name, modules) in API.items()])


def colab_how() -> str:
    where = keeper.address()
    return (f"Each chapter's page has a link \"Open in Colab\", which opens it from {where}; its set-up cell installs the package from there. With a wheel of your own:" if where else
            "There is no public address to open the chapters from yet, so you bring two files yourself.")


INSERTS = {
    "chapters": chapter_list, "solutions": solutions_list, "results": results_table, "cost": results_cost,
    "classes": results_classes, "card": model_card, "api": api_table, "colab": colab_how,
    "troubles": lambda: section(README, "When something goes wrong"),
    "race": lambda: section(README, "Time to quality"), "times": lambda: section(README, "How long it takes"),
    "map": lambda: section(README, "The map"), "data": lambda: section(README, "Data"),
}


# --- pages

def known_papers() -> set[str]:
    return set(re.findall(r"(?m)^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(encoding="utf-8")))


def cited(text: str, papers: set[str]) -> str:
    """Numbers of papers in a Markdown text become links to the bibliography; code, formulas and other links stay."""
    pieces = re.split(r"(?ms)(^```.*?^```|`[^`\n]+`|\$\$.*?\$\$)", text)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"\[(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/\1\)", r"\1", pieces[i])
        pieces[i] = re.sub(r"(?<![\w./\[])\d{4}\.\d{4,5}(?![\w\]])",
                           lambda m: f"{{cite}}`{m[0]}`" if m[0] in papers else m[0], pieces[i])
    return "".join(pieces)


def page(text: str, papers: set[str]) -> str:
    """A page of book/ with its insertions, and with links as the book needs them."""
    text = re.sub(r"<!-- insert: (\w+) -->", lambda m: INSERTS[m[1]](), text)
    text = re.sub(r"<!-- /?\w+ -->\n", "", text)  # marks of the scripts that write tables
    text = text.replace("](../notebooks/", "](chapters/").replace("](notebooks/", "](chapters/").replace("](book/", "](")
    return cited(text, papers)


def bar(path: Path, notebook: dict) -> str:
    """The line under a chapter's title."""
    name, up = path.relative_to(keeper.NOTEBOOKS), "../" * len(path.relative_to(keeper.NOTEBOOKS).parts)
    colab = f"[Open in Colab]({up}start.md#in-colab)"
    if where := keeper.address():
        colab = keeper.badge(path, where)
    parts = [colab, f'<a href="{up}notebooks/{name}" download>Download the notebook</a>']
    if seconds := minutes(notebook):
        parts.append(f"Runs in {seconds} ({notebook['metadata']['ldm']['device']})")
    return "{.chapter-bar}\n" + " · ".join(parts)


def words(text: str, name: str) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def chapter(path: Path, papers: set[str]) -> dict:
    """A notebook as the book shows it."""
    book = keeper.read(path)
    heading, rest = keeper.text(book["cells"][0]).split("\n", 1)
    cells = [words(f"{heading}\n\n{bar(path, book)}\n\n{cited(rest, papers)}", "title")]
    for cell in book["cells"][1:]:
        tags = keeper.tags(cell)
        if cell["cell_type"] == "markdown":
            keeper.put(cell, cited(keeper.text(cell), papers))
        if names := keeper.defined(cell):
            links = ", ".join(f"{{py:obj}}`~{name}`" for name in names)
            cells.append(words(f"{{.defines}}\nGoes into the package: {links}", f"package-{len(cells)}"))
        if "setup" in tags:
            cell["metadata"]["tags"] = [*tags, "hide-input"]
        alts = [out["metadata"]["image/png"]["alt"] for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
        if len(alts) > 1:
            raise ValueError(f"{path.name}: a cell with {len(alts)} pictures; myst-nb takes one alternative text for a cell")
        if alts:
            cell["metadata"]["mystnb"] = {"image": {"alt": alts[0]}}
        if "colab" not in tags:  # the bar says it
            cells.append(cell)
    return book | {"cells": cells}


def api_page(name: str, modules: str) -> str:
    """reStructuredText for autodoc."""
    parts = [f"{name}\n{'=' * len(name)}"]
    for module in modules.split():
        file = module.replace(".", "/") + ".py"
        parts.append(f"``{file}``\n{'-' * (len(file) + 4)}\n\n.. automodule:: ldm_minimal.{module}")
    return "\n\n".join(parts) + "\n"


def write_sources(source: Path) -> None:
    """Everything that Sphinx reads, into one folder."""
    papers = known_papers()
    missing = {path.stem for path in (ROOT / "ldm_minimal").glob("*.py")} - {"__init__", "__main__"} \
        - {module for _, modules in API.values() for module in modules.split()}
    if missing:
        raise ValueError(f"modules on no page of the API reference: {', '.join(sorted(missing))}")
    shutil.rmtree(source, ignore_errors=True)
    for folder in ("chapters/solutions", "api", "images"):
        (source / folder).mkdir(parents=True)
    for path in [*BOOK.glob("pages/*.md"), *BOOK.glob("*.md")]:
        (source / path.name).write_text(page(path.read_text(encoding="utf-8"), papers), encoding="utf-8")
    for path in keeper.files():
        keeper.write(source / "chapters" / path.relative_to(keeper.NOTEBOOKS), chapter(path, papers))
    for name, (heading, modules) in API.items():
        (source / "api" / f"{name}.rst").write_text(api_page(heading, modules), encoding="utf-8")
    shutil.copy(BOOK / "references.bib", source)
    shutil.copy(BOOK / "samples.png", source / "images")
    from ldm_minimal import plot, report
    plot.save_figure(plot.pipeline(*plot.BLOCKS), source / "images" / "pipeline.png")
    for kind, draw in (("race", report.race_figure), ("scale", report.scale_figure)):  # what `bench` wrote
        found = json.loads((BOOK / f"{kind}.json").read_text(encoding="utf-8"))
        plot.save_figure(draw(found), source / "images" / f"{kind}.png")


# --- static files

def write_static(static: Path) -> None:
    """MathJax and what the interactive page needs, into one folder."""
    shutil.rmtree(static, ignore_errors=True)
    mathjax = BOOK / "node_modules" / "mathjax" / "es5"
    fonts = Path("output", "chtml", "fonts", "woff-v2")
    (static / "mathjax" / fonts).mkdir(parents=True)
    shutil.copy(mathjax / "tex-chtml.js", static / "mathjax")
    for font in (mathjax / fonts).glob("*.woff"):
        shutil.copy(font, static / "mathjax" / fonts)
    subprocess.run([sys.executable, BOOK / "play" / "export.py", static / "play"], check=True)


def packages() -> None:
    """`npm ci` in book/, where that was not done since the lock file changed."""
    installed = BOOK / "node_modules" / ".package-lock.json"
    if installed.is_file() and installed.stat().st_mtime >= (BOOK / "package-lock.json").stat().st_mtime:
        return
    subprocess.run([browser.tool("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=BOOK, check=True)
    installed.touch()


def sphinx(builder: str, into: Path) -> Path:
    """Run Sphinx on what was prepared; a warning is an error."""
    out = into / builder
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "sphinx", "-b", builder, "-W", "--keep-going", "-q", "-E", "-j", "2", "-c", BOOK,
                    "-D", f"html_static_path={BOOK / 'static'},{into / 'static'}", "-d", into / "doctrees" / builder,
                    into / "source", out], check=True)
    return out


def prepare(into: Path) -> None:
    packages()
    write_sources(into / "source")
    write_static(into / "static")


def pdf(into: Path = BUILD) -> Path:
    """The whole book on one page, printed by Chromium."""
    from playwright.sync_api import sync_playwright
    program, environment = browser.find()  # if there is none, say so before the pages are built
    prepare(into)
    page, out = sphinx("singlehtml", into) / "index.html", into / "book.pdf"
    number = '<div style="font-size: 8px; width: 100%; text-align: center" class="pageNumber"></div>'
    with sync_playwright() as player:
        chromium = player.chromium.launch(executable_path=program, env=os.environ | environment, args=["--no-sandbox"])
        shown = chromium.new_page(color_scheme="light")
        shown.goto(page.as_uri(), timeout=300_000)
        shown.evaluate("() => MathJax.startup.promise")
        shown.pdf(path=out, format="A4", scale=0.82, print_background=True, outline=True, tagged=True, display_header_footer=True,
                  header_template="<span></span>", footer_template=number,
                  margin={"top": "17mm", "bottom": "17mm", "left": "17mm", "right": "17mm"})
        chromium.close()
    return out


def build(into: Path = BUILD) -> Path:
    """The site in into/html."""
    prepare(into)
    out = sphinx("html", into)
    for path in keeper.files():  # to download: as they are in the repository, without their outputs
        book = keeper.read(path)
        for cell in keeper.code_cells(book):
            cell.update(outputs=[], execution_count=None)
        target = out / "notebooks" / path.relative_to(keeper.NOTEBOOKS)
        target.parent.mkdir(parents=True, exist_ok=True)
        keeper.write(target, book)
    for path in out.rglob("*.map"):  # for those who debug the theme
        path.unlink()
    shutil.rmtree(out / "_static" / "locales", ignore_errors=True)  # the theme's other languages
    for path in (out / "_images").glob("*.png"):
        shrink(path)
    return out


def shrink(path: Path) -> None:
    """The same picture in fewer bytes: without transparency, and with a palette where it has at most 256 colors."""
    from PIL import Image
    picture = Image.open(path).convert("RGB")
    if colors := picture.getcolors(256):
        picture = picture.quantize(len(colors), dither=Image.Dither.NONE)
    smaller = io.BytesIO()
    picture.save(smaller, "PNG", optimize=True)
    if len(smaller.getvalue()) < path.stat().st_size:
        path.write_bytes(smaller.getvalue())


def megabytes(path: Path) -> float:
    """Of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=BUILD)
    parser.add_argument("--pdf", action="store_true", help="book.pdf instead of the site")
    args = parser.parse_args()
    if sys.version_info < (3, 11):
        sys.exit("the tools of the book need Python 3.11 or newer: make PYTHON=/path/to/python3.11 VENV=.venv-book book")
    began = time.perf_counter()
    out = (pdf if args.pdf else build)(args.into.resolve())
    print(f"{out}: {megabytes(out):.0f} MB in {time.perf_counter() - began:.0f} s")
    if not args.pdf:
        print(f"To read it: {sys.executable} -m http.server --bind 127.0.0.1 --directory {out}")
        if megabytes(out) > LIMIT_MB:
            sys.exit(f"the book is larger than {LIMIT_MB} MB")


if __name__ == "__main__":
    main()
