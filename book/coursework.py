"""The exercises' keeper: one source for each chapter, book/exercises/NN_name.md, and what is made of it.

    python book/coursework.py write [NN ...]   stubs into the chapters, and notebooks/solutions/NN_name.ipynb
    python book/coursework.py tables           the tables of book/instructors.md and book/messages.md

A source is Markdown. What stands above the first exercise opens the chapter's section "Exercises" (text) and the
solutions (a block of Python: their imports). Then for each exercise

    ## Exercise 05.2  Rescaled guidance  (implement, difficulty 2, 15 minutes)

    The task, for the student.

    ```python
    def rescaled(uncond, cond, scale, phi):
        \"\"\"shapes\"\"\"
        ### BEGIN SOLUTION
        return ...
        ### END SOLUTION
    ```

    ### Solution

    What the solutions say, with more blocks of Python, which they execute.

The block with the marks (nbgrader's own) becomes the exercise's cell: the student gets `...  # your code` for what is
between them (nothing where a line `answer = None` stands above), the solutions get it without the marks. Both get the
line `# exercise 05.2` above, by which the grader finds the cell, and the call of the check below.
"""

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import notebooks as keeper

sys.path.insert(0, str(keeper.ROOT))

SOURCES = Path(__file__).parent / "exercises"
SOLUTIONS = keeper.NOTEBOOKS / "solutions"
KINDS = ("derive", "discuss", "experiment", "implement")
HEAD = re.compile(r"(?m)^## Exercise (\d\d\.\d+)  (.+?)  \(([^()]*), difficulty ([123]), ([^()]*)\)$")
BLOCK = re.compile(r"(?ms)^```python\n(.*?)^```$\n?")
MARKED = re.compile(r"(?ms)^( *)### BEGIN SOLUTION\n(.*?)^ *### END SOLUTION\n?")


class SourceError(ValueError):
    """A source that cannot be read, and where."""


@dataclass
class Exercise:
    number: str
    title: str
    kind: str  # words of KINDS: "derive and implement"
    difficulty: int
    time: str  # "15 minutes"
    task: str
    code: str = ""  # with its marks; empty where nothing is coded
    solution: list[tuple[str, str]] = field(default_factory=list)  # ("markdown" | "code", text)

    @property
    def head(self) -> str:
        return f"### Exercise {self.number}  {self.title}  ({self.kind}, difficulty {self.difficulty}, {self.time})"

    def cell(self, body: str) -> str:
        from ldm_minimal.checks import EXERCISES
        if self.number not in EXERCISES:
            raise SourceError(f"exercise {self.number} has code, and no check in ldm_minimal/exercises")
        call = ", ".join([f'"{self.number}"', *EXERCISES[self.number].names])
        gap = "\n" if body.startswith(("answer", "#")) else "\n\n"
        return f"# exercise {self.number}\n{body.rstrip()}\n{gap}check({call})"

    @property
    def stub(self) -> str:
        """The student's cell."""
        def blank(mark: re.Match) -> str:
            above = self.code[:mark.start()].rstrip().rpartition("\n")[2]
            return "" if above.startswith("answer = None") else f"{mark[1]}...  # your code\n"
        return self.cell(MARKED.sub(blank, self.code))

    @property
    def solved(self) -> str:
        """The same cell with its solution."""
        return self.cell(MARKED.sub(lambda mark: mark[2], self.code))


@dataclass
class Source:
    chapter: str  # "05_guidance"
    intro: str
    imports: str
    exercises: list[Exercise]


def split(text: str) -> list[tuple[str, str]]:
    """Markdown with blocks of Python -> [("markdown" | "code", text)], empty pieces left out."""
    pieces, at = [], 0
    for block in BLOCK.finditer(text):
        pieces += [("markdown", text[at:block.start()].strip()), ("code", block[1].rstrip())]
        at = block.end()
    return [(kind, piece) for kind, piece in [*pieces, ("markdown", text[at:].strip())] if piece]


def parse(text: str, chapter: str) -> Source:
    """SourceError where the text is not of the form that stands at the top of this file."""
    heads = list(HEAD.finditer(text))
    if len(heads) != len(re.findall(r"(?m)^## ", text)):
        raise SourceError(f"{chapter}: a heading is not '## Exercise NN.N  Title  (kind, difficulty N, time)'")
    top = text[: heads[0].start()] if heads else text
    top = re.sub(r"\A# .*\n", "", top)
    imports = "\n\n".join(piece for kind, piece in split(top) if kind == "code")
    source = Source(chapter, BLOCK.sub("", top).strip(), imports, [])
    for head, after in zip(heads, [*heads[1:], None]):
        number, title, kind, difficulty, time = head.groups()
        if not number.startswith(chapter[:2]):
            raise SourceError(f"{chapter}: exercise {number} belongs to another chapter")
        if not set(re.findall(r"\w+", kind)) - {"and", "stretch"} <= set(KINDS):
            raise SourceError(f"{number}: {kind!r} is none of {', '.join(KINDS)}")
        task, marker, solution = text[head.end(): after.start() if after else len(text)].partition("\n### Solution\n")
        if not marker or not solution.strip():
            raise SourceError(f"{number} has no '### Solution'")
        marked = [block for block in BLOCK.finditer(task) if "### BEGIN SOLUTION" in block[1]]
        if len(marked) > 1:
            raise SourceError(f"{number} has more than one block with a solution")
        if marked and not MARKED.search(marked[0][1]):
            raise SourceError(f"{number}: '### BEGIN SOLUTION' without '### END SOLUTION'")
        if marked:
            task = task[: marked[0].start()] + task[marked[0].end():]
        source.exercises.append(Exercise(number, title, kind, int(difficulty), time, task.strip(),
                                         marked[0][1] if marked else "", split(solution)))
    return source


def sources() -> list[Source]:
    return [parse(path.read_text(encoding="utf-8"), path.stem) for path in sorted(SOURCES.glob("[0-9][0-9]_*.md"))]


def solution(number: str):
    """The answer (or the tuple of answers) that the source of an exercise holds, for the tests."""
    from ldm_minimal import checks
    path = next(SOURCES.glob(f"{number[:2]}_*.md"))
    source = parse(path.read_text(encoding="utf-8"), path.stem)
    exercise = next(each for each in source.exercises if each.number == number)
    space: dict = {}
    exec(source.imports, space)  # noqa: S102  our own text
    exec(MARKED.sub(lambda mark: mark[2], exercise.code), space)  # noqa: S102
    found = tuple(space[name] for name in checks.EXERCISES[number].names)
    return found if len(found) > 1 else found[0]


# cells

def cell(kind: str, text: str, name: str, tags: tuple[str, ...] = ()) -> dict:
    made = {"cell_type": kind, "id": name, "metadata": {"tags": list(tags)} if tags else {},
            "source": text.splitlines(keepends=True)}
    return made | {"execution_count": None, "outputs": []} if kind == "code" else made


def stub_cells(source: Source) -> list[dict]:
    """The section "Exercises" of a chapter."""
    made = [cell("markdown", f"## Exercises\n\n{source.intro}".strip(), "exercises")]
    for each in source.exercises:
        name = "exercise-" + each.number.replace(".", "-")
        made.append(cell("markdown", f"{each.head}\n\n{each.task}", name))
        if each.code:
            made.append(cell("code", each.stub, f"{name}-code", ("exercise",)))
    return made


def chapter_with_stubs(notebook: dict, source: Source) -> dict:
    """The chapter with its section "Exercises", up to the next heading of its level, as the source says."""
    cells = notebook["cells"]
    heads = [i for i, each in enumerate(cells) if each["cell_type"] == "markdown" and keeper.text(each).startswith("## ")]
    first = next(i for i in heads if keeper.text(cells[i]).startswith("## Exercises"))
    rest = next(i for i in heads if i > first)
    known = {keeper.text(each): each for each in cells[first:rest] if each["cell_type"] == "code"}
    made = stub_cells(source)
    for each in made:  # what was run and is as it was keeps its output
        if old := known.get(keeper.text(each)) if each["cell_type"] == "code" else None:
            each.update(outputs=old["outputs"], execution_count=old["execution_count"])
    return notebook | {"cells": [*cells[:first], *made, *cells[rest:]]}


def solution_cells(source: Source, title: str) -> list[dict]:
    number = int(source.chapter[:2])
    made = [
        cell("markdown", f"# Solutions of chapter {number}: {title}\n\n"
             f"Try first: the tasks stand in [the chapter](../{source.chapter}.ipynb), with hints. An answer that passes "
             "its check is right, also where it looks different from the one here.", "title"),
        cell("code", keeper.SETUP.format(address=keeper.address()), "setup", ("setup",)),
        cell("code", source.imports + "\n\nfrom ldm_minimal.checks import check", "imports"),
    ]
    for each in source.exercises:
        name = "solution-" + each.number.replace(".", "-")
        made.append(cell("markdown", f"{each.head.replace('###', '##', 1)}\n\n{each.task}", name))
        if each.code:
            made.append(cell("code", each.solved, f"{name}-code", ("exercise",)))
        for i, (kind, text) in enumerate(each.solution):
            text = f"### Solution\n\n{text}" if i == 0 and kind == "markdown" else text
            made.append(cell(kind, text, f"{name}-{i}"))
    return made


def solutions_notebook(source: Source) -> dict:
    chapter = keeper.read(keeper.NOTEBOOKS / f"{source.chapter}.ipynb")
    title = re.match(r"# \d+\. (.*)", keeper.text(chapter["cells"][0]))[1]
    return bare(solution_cells(source, title))


def bare(cells: list[dict]) -> dict:
    """A notebook that was not run yet."""
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5,
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}}


def same_code(a: dict, b: dict) -> bool:
    return [keeper.text(c) for c in keeper.code_cells(a)] == [keeper.text(c) for c in keeper.code_cells(b)]


def written(source: Source) -> dict[Path, dict]:
    """The notebooks that the source makes, with what was stored in those that are there and have the same code."""
    path = keeper.NOTEBOOKS / f"{source.chapter}.ipynb"
    made = {path: chapter_with_stubs(keeper.read(path), source)}
    path, solved = SOLUTIONS / f"{source.chapter}.ipynb", solutions_notebook(source)
    if path.is_file() and same_code(old := keeper.read(path), solved):
        for mine, theirs in zip(keeper.code_cells(solved), keeper.code_cells(old)):
            mine.update(outputs=theirs["outputs"], execution_count=theirs["execution_count"])
        solved["metadata"] = old["metadata"]
    return made | {path: solved}


def write(which: list[str]) -> list[str]:
    """Write what `written` says, for all chapters or those numbers; returns the notebooks that changed."""
    SOLUTIONS.mkdir(exist_ok=True)
    changed = []
    for source in (each for each in sources() if not which or each.chapter[:2] in which):
        for path, notebook in written(source).items():
            before = path.read_text(encoding="utf-8") if path.is_file() else ""
            keeper.write(path, notebook)
            if path.read_text(encoding="utf-8") != before:
                changed.append(str(path.relative_to(keeper.NOTEBOOKS)))
    return changed


# tables for instructors

def plan() -> str:
    """A row for each chapter: what it costs in minutes, and its exercises."""
    rows = ["| chapter | runs in, two CPU cores | exercises | with a check (points) | minutes of exercises |",
            "|---|---|---|---|---|"]
    for source in sources():
        chapter = keeper.read(keeper.NOTEBOOKS / f"{source.chapter}.ipynb")
        coded = [each for each in source.exercises if each.code]
        minutes = sum(int(each.time.split()[0]) * (60 if "hour" in each.time else 1) for each in source.exercises)
        seconds, points = chapter["metadata"]["ldm"]["seconds"], sum(each.difficulty for each in coded)
        rows.append(f"| [{source.chapter}](../notebooks/{source.chapter}.ipynb) | {seconds:.0f} s | "
                    f"{len(source.exercises)} | {len(coded)} ({points}) | {minutes} |")
    return "\n".join(rows)


def messages() -> str:
    """Each check's messages for the wrong answers of tests/answers, as a student sees them."""
    import importlib.util

    from ldm_minimal import checks
    parts = []
    for path in sorted((keeper.ROOT / "tests" / "answers").glob("chapter_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for number in sorted(module.WRONG):
            told = []
            for wrong, _ in module.WRONG[number]:
                answers = wrong if isinstance(wrong, tuple) else (wrong,)
                what, _, mistake = checks.verdict(number, *answers).findings[-1]
                told.append((what, mistake))
            title = checks.EXERCISES[number].title
            parts.append("\n".join([f"## {number} {title}", "",
                                    "| what does not hold | what the student is told |", "|---|---|",
                                    *(f"| {_cell(what)} | {_cell(mistake)} |" for what, mistake in dict.fromkeys(told))]))
    return "\n\n".join(parts)


def _cell(words: str) -> str:
    """Text for a cell of a table: as it is printed."""
    return " ".join(words.split()).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def tables() -> dict[Path, str]:
    """The files for instructors, with the tables between their marks as they should be."""
    made = {}
    for name, mark, table in (("instructors.md", "plan", plan()), ("messages.md", "messages", messages())):
        path = Path(__file__).parent / name
        text = path.read_text(encoding="utf-8")
        made[path] = re.sub(rf"(?s)(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "tables"))
    parser.add_argument("which", nargs="*", help="numbers of chapters (default: all)")
    args = parser.parse_args()
    known = [each.chapter[:2] for each in sources()]
    if unknown := [number for number in args.which if number not in known]:
        parser.error(f"no exercises of {', '.join(unknown)}: there are {', '.join(known)}")
    if args.what == "write":
        return print("changed:", ", ".join(write(args.which)) or "nothing")
    for path, text in tables().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
