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
        here.recv_bytes()  # it has imported what it needs; from here on the time counts
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
    return Report(name or path.name, sha256(path), marks, trouble, time.perf_counter() - began)


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


def sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


# a folder

def notebooks(folder: Path) -> list[Path]:
    """All notebooks below a folder, by their names; no links, nothing hidden."""
    found = (p for p in folder.rglob("*.ipynb") if p.is_file() and not p.is_symlink())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def usual_exercises(paths: list[Path]) -> list[str]:
    """Those of the chapters that at least half of the submissions have: what a folder is graded for, unless it is told."""
    seen: Counter = Counter()
    for path in paths:
        try:
            seen.update(chapters(submission.code_cells(path)))
        except submission.Unreadable:
            pass
    return of_chapters({chapter for chapter, n in seen.items() if 2 * n >= len(paths)})


def grade_folder(folder: Path, out: Path, numbers: list[str] | None, limits: Limits, workers: int) -> list[dict]:
    """Grade all notebooks below the folder into the CSV `out`; results that are there already are kept.

    The results lie in `out` with the ending .results, a JSON for each submission. One is used again while notebook,
    exercises, seed, limits and version are what they were.
    """
    paths, results = notebooks(folder), out.with_suffix(".results")
    if not paths:
        raise ValueError(f"{folder} holds no notebooks (*.ipynb)")
    numbers = numbers or usual_exercises(paths)
    if not numbers:
        raise ValueError(f"no chapter's exercises occur in half of the {len(paths)} notebooks: name them with --exercises")
    results.mkdir(parents=True, exist_ok=True)

    def one(path: Path) -> dict:
        name = path.relative_to(folder).as_posix().encode(errors="replace").decode()
        key = {"submission": name, "sha256": sha256(path), "exercises": numbers, "version": __version__,
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
        done = list(pool.map(one, paths))
    write_csv(out, numbers, done)
    return done


def write_csv(out: Path, numbers: list[str], done: list[dict]) -> None:
    """A line for each submission: its score, the points of each exercise, and why nothing could be read."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["submission", "score", "max_score", *numbers, "trouble", "sha256"])
    for each in done:
        tests = each["results"]["tests"]
        name = each["key"]["submission"]
        name = "'" + name if name[:1] in "=+-@" else name  # not a formula in a spreadsheet
        table.writerow([name, each["results"]["score"], sum(t["max_score"] for t in tests), *(t["score"] for t in tests),
                        each["trouble"], each["key"]["sha256"]])
    with atomic(out) as part:
        part.write_text(text.getvalue(), encoding="utf-8")


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
