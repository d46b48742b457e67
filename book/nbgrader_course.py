"""The exercises as a course of nbgrader: its source notebooks, with its marks and metadata, and its configuration.

    python book/nbgrader_course.py FOLDER
    cd FOLDER && nbgrader generate_assignment 05_guidance --create      the students' version, in release/

An exercise with a check becomes a cell for the answer and a locked one that holds the check and its points; nbgrader
marks it automatically. Any other becomes a text for the answer, which a person marks by the rubric of the solution.
"""

import argparse
import sys
from pathlib import Path

import coursework
import notebooks as keeper

CONFIG = '''\
c = get_config()
c.CourseDirectory.course_id = "ldm_minimal"
c.ClearSolutions.code_stub = {"python": "...  # your code"}
c.ClearSolutions.text_stub = "Your answer."
c.ExecutePreprocessor.timeout = 120
'''


def graded(cell: dict, name: str, **kind) -> dict:
    """The cell with nbgrader's metadata, version 3 of its schema."""
    plain = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3, "grade_id": name}
    cell["metadata"] = {"nbgrader": plain | kind}
    return cell


def cells(source: coursework.Source) -> list[dict]:
    make = coursework.cell
    made = [make("markdown", f"# Exercises of chapter {int(source.chapter[:2])}\n\n{source.intro}".strip(), "title"),
            make("code", source.imports + "\n\nfrom ldm_minimal.checks import passes", "imports")]
    for each in source.exercises:
        name = each.number.replace(".", "-")
        made.append(make("markdown", f"{each.head}\n\n{each.task}", f"task-{name}"))
        if each.code:
            body, _, call = each.cell(each.code).rpartition("\ncheck(")
            made.append(graded(make("code", body.strip(), f"answer-{name}"), f"answer-{name}", solution=True))
            made.append(graded(make("code", f"assert passes({call}", f"check-{name}"), f"check-{name}",
                               grade=True, locked=True, points=each.difficulty))
        else:
            text = "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in each.solution)
            text = f"### BEGIN SOLUTION\n{text}\n### END SOLUTION"
            made.append(graded(make("markdown", text, f"answer-{name}"), f"answer-{name}", grade=True, solution=True,
                               points=each.difficulty))
    return made


def write(folder: Path) -> list[Path]:
    """The course's configuration and a source notebook for each chapter; returns the notebooks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    made = []
    for source in coursework.sources():
        path = folder / "source" / source.chapter / f"{source.chapter}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        keeper.write(path, coursework.bare(cells(source)))
        made.append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    made = write(parser.parse_args().folder)
    print(f"wrote {len(made)} notebooks below {made[0].parent.parent}")


if __name__ == "__main__":
    sys.exit(main())
