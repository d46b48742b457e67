"""Coursework: one source for each chapter's exercises, and what is made of it."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ldm_minimal import checks

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "book"))
import coursework  # noqa: E402
import nbgrader_course  # noqa: E402
import notebooks as keeper  # noqa: E402

SOURCES = {source.chapter: source for source in coursework.sources()}
ALL = [each for source in SOURCES.values() for each in source.exercises]
CODED = [each for each in ALL if each.code]
every_source = pytest.mark.parametrize("name", SOURCES)


def test_there_are_enough_of_each_kind():
    kinds = Counter(kind for each in ALL for kind in coursework.KINDS if kind in each.kind)
    assert len(ALL) >= 45 and len(CODED) >= 20 and min(kinds[kind] for kind in coursework.KINDS) >= 6, kinds
    assert [each.number for each in ALL] == sorted({each.number for each in ALL}), "each number once, in order"


def test_checks_and_sources_agree():
    assert {each.number for each in CODED} == checks.EXERCISES.keys()
    for each in CODED:
        assert checks.EXERCISES[each.number].points == each.difficulty, each.number


@pytest.mark.parametrize("number", [each.number for each in CODED])
def test_stub_and_solution_are_one(number):
    each = next(each for each in CODED if each.number == number)
    solved = each.solved.splitlines()
    lines = [line for line in each.stub.splitlines() if "# your code" not in line]
    places, at = [], 0
    for line in lines:
        at = solved.index(line, at) + bool(line)
        places.append(at)
    assert lines[0] == f"# exercise {number}" == solved[0] and lines[-1].startswith(f'check("{number}", ') and lines[-1] == solved[-1]
    assert len(solved) > len(lines) and "SOLUTION" not in each.stub + each.solved


@every_source
def test_chapters_and_solutions_are_as_the_source_says(name):
    for path, notebook in coursework.written(SOURCES[name]).items():
        on_disk = keeper.read(path)
        assert [keeper.text(cell) for cell in notebook["cells"]] == [keeper.text(cell) for cell in on_disk["cells"]], \
            f"{path.name}: run `python book/coursework.py write`"


@every_source
def test_solutions_were_run_and_pass_their_checks(name):
    book = keeper.read(coursework.SOLUTIONS / f"{name}.ipynb")
    shown = {re.match(r"# exercise (\S+)", keeper.text(cell))[1]: "".join("".join(out.get("text", "")) for out in cell["outputs"])
             for cell in keeper.code_cells(book) if "exercise" in keeper.tags(cell)}
    assert shown.keys() == {each.number for each in SOURCES[name].exercises if each.code}
    for number, text in shown.items():
        assert "  yes  " in text and "  no   " not in text and "not done" not in text, f"{number}: {text}"


@every_source
def test_every_task_has_a_solution_of_its_kind(name):
    for each in SOURCES[name].exercises:
        words = " ".join(text for kind, text in each.solution if kind == "markdown")
        assert len(words.split()) >= 15 and "TODO" not in words, each.number
        assert re.fullmatch(r"\d+ (minutes|hours)", each.time), each.time
        if "discuss" in each.kind:
            assert len(re.findall(r"\b1 point\b", words)) >= 4, f"{each.number}: a rubric of single points"
        if "derive" in each.kind and not each.code.strip().startswith("answer"):
            assert "$" in words, f"{each.number}: a derivation"


def test_the_tables_for_instructors_are_up_to_date():
    for path, text in coursework.tables().items():
        old, new = (re.sub(r"\d+(\.\d+)?", "N", each) for each in (path.read_text(encoding="utf-8"), text))
        assert old == new, f"{path.name}: run `python book/coursework.py tables`"
    assert len(re.findall(r"(?m)^## ", text)) == len(CODED) and text.count("\n| ") > 3 * len(CODED)


SOURCE = '''# Exercises
Words.

```python
import torch
```

## Exercise 05.1  A title  (derive, difficulty 2, 15 minutes)

Do it.

```python
def tilted_gaussian(m, v, s):
    """Doc."""
    ### BEGIN SOLUTION
    return 1

    ### END SOLUTION
```

More.

### Solution

Because.

```python
print(1)
```
'''


def test_the_reader_of_sources():
    source = coursework.parse(SOURCE, "05_x")
    (each,) = source.exercises
    assert source.intro == "Words." and source.imports == "import torch"
    assert (each.number, each.title, each.kind, each.difficulty, each.time) == ("05.1", "A title", "derive", 2, "15 minutes")
    assert each.task == "Do it.\n\n\nMore." and each.solution == [("markdown", "Because."), ("code", "print(1)")]
    assert each.stub == '# exercise 05.1\ndef tilted_gaussian(m, v, s):\n    """Doc."""\n    ...  # your code\n\n\ncheck("05.1", tilted_gaussian)'
    assert "return 1" in each.solved


@pytest.mark.parametrize("old, new, words", [
    ("difficulty 2", "difficulty 4", "heading"), ("(derive,", "(think,", "none of"), ("### Solution", "### Answer", "no '### Solution'"),
    ("### END SOLUTION", "", "without"), ("05.1", "06.1", "another chapter"), ("Because.", "", "no '### Solution'")])
def test_a_broken_source_is_told_where(old, new, words):
    text = SOURCE.replace(old, new)
    if old == "Because.":
        text = text[: text.index("```python\nprint")]
    with pytest.raises(coursework.SourceError, match=words):
        coursework.parse(text, "05_x")


def test_nbgrader_takes_the_course(tmp_path, monkeypatch):
    """nbgrader's own tool makes the students' version, finds the stubs failing and the solutions passing."""
    pytest.importorskip("nbgrader")
    made = nbgrader_course.write(tmp_path)
    assert len(made) == len(SOURCES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # it calls alembic by name
    name = "02_forward_noising"

    def nbgrader(*args):
        done = subprocess.run([sys.executable, "-m", "nbgrader", *args], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    assert nbgrader("generate_assignment", name, "--create")[0] == 0
    release = keeper.read(tmp_path / "release" / name / f"{name}.ipynb")
    text = "\n".join(keeper.text(cell) for cell in release["cells"])
    assert "SOLUTION" not in text and text.count("...  # your code") >= 4 and "Your answer." in text
    assert "Success" in nbgrader("validate", str(made[1]))[1]
    code, said = nbgrader("validate", f"release/{name}/{name}.ipynb")
    assert "failed" in said and "Success" not in said
    for chapter in made[:1] + made[2:]:  # the form of the others: one point or more for each, unique names
        cells = [cell["metadata"]["nbgrader"] for cell in keeper.read(chapter)["cells"] if "nbgrader" in cell["metadata"]]
        assert len({cell["grade_id"] for cell in cells}) == len(cells) and all(cell["points"] >= 1 for cell in cells if cell["grade"])
    shutil.rmtree(tmp_path / "release")
