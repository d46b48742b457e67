"""Grade a submission, or a folder of them: each answer in a process of its own, each mark computed in this one.

    python -m ldm_minimal grade submission.ipynb --out results.json        a report, and Gradescope's JSON
    python -m ldm_minimal grade submissions/ --out marks.csv               a line for each; stopped, it goes on where it was

submission.py takes an answer's statements out of the notebook; worker.py runs them where sandbox.py lets them do nothing
but compute; remote.py carries calls and values between that process and this one, where the checks of the chapters run.
"""

import csv
import hashlib
import io
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .. import __version__, checks
from ..checkpoint import CheckpointError, atomic, load_json, save_json
from . import submission, worker
from .remote import Link, Lost


@dataclass(frozen=True)
class Limits:
    seconds: float = 20.0  # by the clock, for each answer
    megabytes: int = 2000


@dataclass(frozen=True)
class Mark:
    number: str
    title: str
    points: int
    passed: bool
    words: str


@dataclass(frozen=True)
class Report:
    name: str
    sha256: str
    marks: tuple[Mark, ...]
    trouble: str = ""  # why nothing of it could be read
    seconds: float = 0.0

    @property
    def score(self) -> int:
        return sum(mark.points for mark in self.marks if mark.passed)

    @property
    def out_of(self) -> int:
        return sum(mark.points for mark in self.marks)

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.score} of {self.out_of} points"] + [self.trouble] * bool(self.trouble)
        for mark in self.marks:
            parts.append(f"{mark.words}\n  {mark.points if mark.passed else 0} of {mark.points} points")
        return "\n\n".join(parts)

    def gradescope(self) -> dict:
        """The results.json of Gradescope's autograder."""
        return {
            "score": self.score, "execution_time": round(self.seconds),
            "visibility": "visible", "stdout_visibility": "hidden",
            "output": self.trouble or f"{self.score} of {self.out_of} points. A person marks the tasks without a check.",
            "tests": [{"number": mark.number, "name": f"{mark.number} {mark.title}",
                       "score": mark.points if mark.passed else 0, "max_score": mark.points,
                       "status": "passed" if mark.passed else "failed",
                       "output": mark.words, "output_format": "text"} for mark in self.marks],
            "extra_data": {"submission": self.name, "sha256": self.sha256, "version": __version__},
        }


@cache
def context():
    """Linux forks each worker from a process that has imported torch once; elsewhere each one starts from nothing."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([worker.__name__])
    return made


def run(number: str, cells: list[str], limits: Limits) -> checks.Verdict:
    """The verdict on one answer. The cells are taken apart and run in a process of its own."""
    exercise, late, (here, there) = checks.EXERCISES[number], threading.Event(), context().Pipe()
    process = context().Process(target=worker.run, daemon=True, args=(
        there, number, exercise.names, cells, limits.seconds, limits.megabytes))

    def epitaph() -> str:
        process.join(1)
        if late.is_set():
            return f"it took longer than {limits.seconds:g} seconds, and was stopped"
        return f"its process ended ({_ending(process.exitcode)})"

    def stop() -> None:
        late.set()
        process.kill()

    process.start()
    there.close()
    clock = threading.Timer(limits.seconds, stop)
    try:
        try:
            here.recv_bytes()  # it has imported what it needs; from here on the time counts
        except EOFError as error:
            raise Lost("its process could not be started, which is not the answer's fault: grade it again") from error
        clock.start()
        answers = Link(here, epitaph).ask("call", 0, (), {})  # worker.run's start
        if not isinstance(answers, tuple):
            raise Lost("its process answered with no value")
        return checks.verdict(number, *answers)
    except Exception as error:  # raised by the statements of the answer, before any check
        kind, words = type(error).__name__, str(error).strip().splitlines() or [""]
        plain = kind in (Lost.__name__, submission.Unreadable.__name__)
        return checks.Verdict(exercise, ((words[0] if plain else f"the cell stopped with {kind}: {words[0]}", False, ""),))
    finally:
        clock.cancel()
        process.kill()
        process.join()
        here.close()


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return "it ended itself"
    return {9: "killed, as for too much memory or processor time", 11: "a segmentation fault, as for endless recursion",
            24: "too much processor time", 31: "a forbidden system call"}.get(-code, f"signal {-code}")


def grade(path: Path, numbers: list[str] | None = None, limits: Limits = Limits(), name: str | None = None) -> Report:
    """All checked exercises of the chapters that occur in the notebook, or those numbers."""
    began = time.perf_counter()
    try:
        cells, trouble = submission.code_cells(path), ""
    except submission.Unreadable as error:
        cells, trouble = [], str(error)
    if numbers is None:
        numbers = of_chapters(chapters(cells))
    if not numbers and not trouble:
        trouble = "no cell has a line such as '# exercise 05.2', so there is nothing to grade"
    marks = tuple(mark(number, cells, limits, trouble) for number in numbers)
    return Report(name or printable(path.name), sha256(path), marks, trouble, time.perf_counter() - began)


def mark(number: str, cells: list[str], limits: Limits, trouble: str = "") -> Mark:
    exercise = checks.EXERCISES[number]
    if not trouble and number not in submission.marked(cells):
        trouble = f"there is no cell with the line '# exercise {number}'"
    verdict = checks.Verdict(exercise, ((trouble, False, ""),)) if trouble else run(number, cells, limits)
    words = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(verdict)[:4000])
    return Mark(number, exercise.title, exercise.points, verdict.passed, words)


def chapters(cells: list[str]) -> set[str]:
    """The chapters whose checked exercises a notebook has: {"05"}."""
    return {number[:2] for number in submission.marked(cells) if number in checks.EXERCISES}


def of_chapters(which: set[str]) -> list[str]:
    return sorted(number for number in checks.EXERCISES if number[:2] in which)


def printable(name: str) -> str:
    """A file's name that may be no UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


# a folder

def notebooks(folder: Path) -> list[Path]:
    """All notebooks below a folder, by their names; no links, nothing hidden."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() == ".ipynb" and p.is_file() and not p.is_symlink())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def without_notebook(folder: Path, paths: list[Path]) -> list[Path]:
    """What lies where submissions lie and holds no notebook: a zip, an empty folder. It gets a line, too."""
    tops = {path.relative_to(folder).parts[0] for path in paths}
    kinds = {(folder / top).is_dir() for top in tops}  # a folder for each student, or a file
    return sorted(p for p in folder.iterdir() if p.name not in tops and p.name[0] != "." and p.is_dir() in kinds)


def expected(paths: list[Path]) -> list[list[str]]:
    """What each notebook of a folder is graded for: the chapters that at least half of the notebooks like it have.

    Like it are those with a chapter in common; of one without any chapter, all. So a chapter left out is missed where
    students hand in one notebook, and no other chapter is where they hand in one for each. A chapter in fewer than a
    tenth of all is none of the assignment.
    """
    has = []
    for path in paths:
        try:
            has.append(chapters(submission.code_cells(path)))
        except submission.Unreadable:
            has.append(set())
    counts = Counter(chapter for mine in has for chapter in mine)
    has = [{chapter for chapter in mine if 10 * counts[chapter] >= len(paths)} for mine in has]

    def usual(mine: set[str]) -> list[str]:
        like = [other for other in has if other & mine] or [other for other in has if other]
        return of_chapters({c for c in counts if 2 * sum(c in other for other in like) >= len(like)})

    return [usual(mine) for mine in has]


def grade_folder(folder: Path, out: Path, numbers: list[str] | None, limits: Limits, workers: int) -> list[dict]:
    """Grade all notebooks below the folder into the CSV `out`; results that are there already are kept.

    The results lie in `out` with the ending .results, a JSON for each submission. One is used again while notebook,
    exercises, seed, limits and version are what they were.
    """
    paths, results = notebooks(folder), out.with_suffix(".results")
    if not paths:
        raise ValueError(f"{folder} holds no notebooks (*.ipynb)")
    paths += [path for path in without_notebook(folder, paths) if path.resolve() not in (out.resolve(), results.resolve())]
    asked = [numbers] * len(paths) if numbers else expected(paths)
    if not any(asked):
        raise ValueError(f"no chapter's exercises occur in half of the {len(paths)} notebooks: name them with --exercises")
    results.mkdir(parents=True, exist_ok=True)

    def one(path: Path, numbers: list[str]) -> dict:
        name = printable(path.relative_to(folder).as_posix())
        key = {"submission": name, "sha256": sha256(path), "exercises": numbers, "version": __version__, "checks": checks_sha256(),
               "seed": hashlib.sha256(str(checks.SEED).encode()).hexdigest()[:16],
               "limits": [limits.seconds, limits.megabytes]}
        place = results / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        try:
            if (known := load_json(place))["key"] == key:
                return known
        except (CheckpointError, OSError, KeyError, TypeError):
            pass
        report = grade(path, numbers, limits, name)
        made = {"key": key, "results": report.gradescope(), "trouble": report.trouble}
        save_json(place, made)
        print(f"{name}: {report.score} of {report.out_of}", flush=True)
        return made

    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(one, paths, asked))
    write_csv(out, sorted({number for each in asked for number in each}), done)
    return done


def write_csv(out: Path, numbers: list[str], done: list[dict]) -> None:
    """A line for each submission: its score, the points of each exercise, and why nothing could be read."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["submission", "score", "max_score", *numbers, "trouble", "sha256"])
    for each in done:
        tests = each["results"]["tests"]
        scores = {t["number"]: t["score"] for t in tests}  # empty: nothing that this one is graded for
        name = each["key"]["submission"]
        name = "'" + name if name[:1] in "=+-@" else name  # not a formula in a spreadsheet
        table.writerow([name, each["results"]["score"], sum(t["max_score"] for t in tests), *(scores.get(number, "") for number in numbers),
                        each["trouble"], each["key"]["sha256"]])
    with atomic(out) as part:
        part.write_text(text.getvalue(), encoding="utf-8")


@cache
def checks_sha256() -> str:
    """Of all that decides on a mark: one that was made with other checks is not taken for today's."""
    package = Path(checks.__file__).parent
    files = [package / "checks.py", *sorted((package / "exercises").glob("*.py")), *sorted((package / "grading").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def grade_upload(folder: Path, numbers: list[str] | None, limits: Limits) -> Report:
    """The report on the one notebook in a student's upload; where there is none, or several, a report that says so."""
    paths = notebooks(folder)
    if len(paths) == 1:
        return grade(paths[0], numbers, limits)
    found = ", ".join(printable(path.name) for path in paths[:5]) or "none"
    return Report(printable(folder.name), "", (), f"hand in one notebook (*.ipynb); here: {found}")


@contextmanager
def private(seed: int):
    """The checks' seed, and one thread for each computation (there are many at once); afterwards all is as it was."""
    if not 0 <= seed < 2**40:
        raise ValueError(f"a private seed is a whole number from 0 to {2**40 - 1}, got {seed}")
    before = checks.SEED, torch.get_num_threads(), sys.argv[:]
    checks.SEED = seed
    torch.set_num_threads(1)
    del sys.argv[1:]  # multiprocessing hands it to the workers, and the seed is nothing that a submission should see
    try:
        yield
    finally:
        checks.SEED, threads, sys.argv[:] = before
        torch.set_num_threads(threads)


def default_workers() -> int:
    return os.cpu_count() or 1
