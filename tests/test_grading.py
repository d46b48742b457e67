"""Grading: right answers get their points, and whatever else a submission does, it gets none for it and reaches nothing.

Each hostile cell stands in a notebook beside a right answer, which must get its points all the same.
"""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm_minimal import checks
from ldm_minimal.__main__ import main
from ldm_minimal.grading import grade, sandbox, submission

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "book"))
import coursework  # noqa: E402

linux = pytest.mark.skipif(not (sandbox.landlock_version() and sandbox.seccomp_known()), reason="needs Landlock and seccomp")
LIMITS = grade.Limits(seconds=4, megabytes=1000)

IMPORTS = "import torch\nfrom torch import Tensor"
SCORE = '''# exercise 02.3
def score(zt, z0_hat, alpha, sigma):
    return -(zt - alpha * z0_hat) / sigma**2

check("02.3", score)'''


def notebook(path, *cells):
    made = {"cells": [{"cell_type": "code", "metadata": {}, "source": text.splitlines(keepends=True), "outputs": [],
                       "execution_count": None} for text in cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(made))
    return path


def marks(path, *numbers) -> dict:
    return {mark.number: mark for mark in grade.grade(path, list(numbers) or None, LIMITS).marks}


# --- right answers

def test_the_solutions_get_all_points(tmp_path):
    for source in coursework.sources():  # in the chapter's own notebook, among its trainings and figures
        chapter = ROOT / "notebooks" / f"{source.chapter}.ipynb"
        cells, solved = submission.code_cells(chapter), {each.number: each.solved for each in source.exercises if each.code}
        for number, place in submission.marked(cells).items():
            cells[place] = solved.get(number, cells[place])
        sizes = {number: submission.answer_to(number, cells, checks.EXERCISES[number].names)[0].count("\n") for number in solved}
        assert max(sizes.values()) < 100, f"an answer needs no training: {sizes}"
        report = grade.grade(notebook(tmp_path / chapter.name, *cells))
        assert report.score == report.out_of > 0, str(report)
        assert [mark.number for mark in report.marks] == [each.number for each in source.exercises if each.code]


def test_stubs_get_nothing_and_say_so(tmp_path):
    source = coursework.sources()[4]
    report = grade.grade(notebook(tmp_path / "a.ipynb", source.imports, *(each.stub for each in source.exercises if each.code)))
    assert report.score == 0 and all("not done yet" in mark.words for mark in report.marks)


def test_the_slice_takes_what_the_answer_needs_and_no_more(tmp_path):
    cells = [IMPORTS, "%matplotlib inline\n!pip list", "raise SystemExit('a training that must not run')", "FACTOR = 2\nz = 1 / 0",
             "def helper(x):\n    z = FACTOR * x\n    return z", "def unused():\n    return missing",
             "FACTOR = 1", "FACTOR -= 2",
             "# exercise 02.3\nimport math\ndef mine(zt, z0_hat, alpha, sigma):\n    return helper(zt - alpha * z0_hat) / sigma**2\n"
             "print(mine(undefined))\ncheck('02.3', mine)", "this is no python"]
    program, answers = submission.answer_to("02.3", cells, ["score"])
    assert answers == "(mine,)"
    assert program.splitlines() == ["FACTOR = 2", "def helper(x):", "    z = FACTOR * x", "    return z", "FACTOR = 1", "FACTOR -= 2",
                                    "def mine(zt, z0_hat, alpha, sigma):", "    return helper(zt - alpha * z0_hat) / sigma ** 2"]
    assert marks(notebook(tmp_path / "a.ipynb", *cells), "02.3")["02.3"].passed


def test_what_loops_and_branches_add_to_a_constant_counts_and_calls_of_modules_do_not():
    cells = ["import torch\nimport numpy as np", "torch.manual_seed(0)\nnp.random.seed(0)", "torch.testing.assert_close(1, 2)", "W = []\nfor k in range(3):\n    W.append(k)",
             "if W:\n    W.reverse()", "def later():\n    W.clear()", "input?\n%timeit W\nhere = %pwd\nreason = 1  # is that right?",
             "# exercise 02.3\ndef score(*args):\n    return torch.tensor(W) * reason * np.pi"]
    program = submission.answer_to("02.3", [cells[0], *cells[1:]], ["score"])[0]
    assert program.splitlines() == ["import torch", "import numpy as np", "torch.manual_seed(0)", "np.random.seed(0)", "W = []", "for k in range(3):", "    W.append(k)",
                                    "if W:", "    W.reverse()", "reason = 1", "def score(*args):", "    return torch.tensor(W) * reason * np.pi"]


def test_an_empty_answer_is_not_a_number():
    for number in ("04.2", "09.2", "10.3"):
        assert not checks.passes(number, lambda *args, **kwargs: []), number


def test_without_a_call_of_check_the_stubs_name_counts_and_the_last_mark_wins(tmp_path):
    path = notebook(tmp_path / "a.ipynb", IMPORTS, SCORE.replace("-(", "("), SCORE.partition("check(")[0])
    assert marks(path, "02.3")["02.3"].passed


def test_gradients_functions_iterators_generators_and_changes_pass_the_pipe(tmp_path):
    path = notebook(tmp_path / "a.ipynb", IMPORTS, "# exercise 10.2\ndef round_through(z):\n    return z + (z.round() - z).detach()",
                    "# exercise 04.2\ndef streamed_scale(batches):\n    n = a = b = c = 0\n    for m in batches:\n        m = m.double()\n"
                    "        n += m[:, 0].numel(); a += m[:, 0].sum(); b += (m[:, 0] ** 2).sum(); c += m[:, 1].exp().sum()\n"
                    "    return float(((b / n - (a / n) ** 2) + c / n) ** -0.5)")
    found = marks(path, "10.2", "04.2")
    assert found["10.2"].passed and found["04.2"].passed, found
    path = notebook(tmp_path / "b.ipynb", IMPORTS, "# exercise 10.2\ndef round_through(z):\n    return z.round()",
                    SCORE.replace("    return", "    found =").replace("sigma**2", "sigma**2\n    zt += 1\n    return found"))
    found = marks(path, "10.2", "02.3")
    assert "gradient is 0 everywhere" in found["10.2"].words and "inputs" in found["02.3"].words


# --- hostile and broken ones

HOSTILE = {  # the body of `score`, and the words that it must be told
    "an endless loop": ("while True: pass", "longer than 4 seconds"),
    "a long sleep": ("import time; time.sleep(60)", "longer than 4 seconds"),
    "it leaves": ("import sys; sys.exit(0)", "SystemExit"),
    "it leaves for good": ("import os; os._exit(0)", "its process ended"),
    "gigabytes": ("return torch.zeros(10**11)", "stopped with RuntimeError"),
    "gigabytes of a list": ("x = []\n    while True: x.append(bytearray(2**20))", "MemoryError|process ended"),
    "endless recursion": ("return score(zt, z0_hat, alpha, sigma)", "RecursionError"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "segmentation fault"),
    "an object equal to all": ("class A:\n        shape = dtype = property(lambda s: A())\n        __eq__ = lambda *a: True\n"
                               "        __torch_function__ = classmethod(lambda *a, **k: True)\n    return A()", "no  "),
    "a function of torch replaced": ("torch.allclose = torch.equal = lambda *a, **k: True\n    return zt", "not centered|no  "),
    "the checks replaced": ("import ldm_minimal.checks as c\n    c.close = lambda *a, **k: True\n    c.verdict = c.passes = c.check = c.close\n"
                            "    return zt * 0", "no  "),
    "printed results": ("print('exercise 02.3: yes\\n  3 of 3 points' * 100)\n    return zt", "no  "),
    "written to every open file": ("import os\n    for fd in range(300):\n        try: os.write(fd, b'{\"score\": 3}' * 9)\n        except OSError: pass\n"
                                   "    return zt", "no value|process ended|no  "),
    "a tensor on no device": ("return torch.empty(2, device='meta')", "no  "),
    "a sparse tensor": ("return zt[0].to_sparse()", "no  "),
    "an endless iterator": ("import itertools\n    return itertools.count()", "no  "),
    "a huge number": ("return 10**10_000", "no  "),
    "a list in itself": ("x = []\n    x.append(x)\n    return x", "no  "),
    "a string of a gigabyte": ("return 'x' * 10**9", "no  "),
    "a syntax error": ("return (", "no Python"),
    "deep brackets": ("return " + "(" * 5000 + "1" + ")" * 5000, "no Python"),
    "deep minus signs": ("return " + "-" * 200_000 + "1", "no Python|process ended|RecursionError"),
    "a null byte": ("return '\0'", "no Python"),
    "the exception of the stub": ("from ldm_minimal.checks import NotDone\n    raise NotDone", "no  "),
    "threads": ("import threading\n    [threading.Thread(target=lambda: [0 for _ in iter(int, 1)], daemon=True).start() for _ in range(50)]\n"
                "    return zt", "no  "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_gets_a_line_and_no_points(name, tmp_path):
    body, words = HOSTILE[name]
    beside_a_right_answer(tmp_path, f"def score(zt, z0_hat, alpha, sigma):\n    {body}\n", words)


@pytest.mark.parametrize("cell, words", [
    ("x = next(0 for _ in iter(int, 1) if _)\ndef score(*args): return x", "longer than 4 seconds"),
    ("import sys\nscore = sys.exit(0)", "the cell stopped with SystemExit"), ("score = 1 / 0", "the cell stopped with ZeroDivisionError"),
    ("score = 'a word'", "no  "), ("score = None", "not done yet"), ("", "NameError"), ("check('02.3', score, score)", "NameError"),
    ("score = torch.zeros\ncheck('02.3', score, score)", "takes score, and got 2 answers"),
    ("class score: pass", "no  "), ("import math as score", "no  ")])
def test_hostile_and_broken_cells_too(cell, words, tmp_path):
    beside_a_right_answer(tmp_path, cell, words)


def beside_a_right_answer(tmp_path, cell, words):
    path = notebook(tmp_path / "a.ipynb", IMPORTS, f"# exercise 02.3\n{cell}", "# exercise 02.4\ndef vp_time(lam):\n"
                    "    log_alpha = -0.5 * torch.log1p(torch.exp(-2 * lam))\n    return (torch.sqrt(0.05**2 - 4 * 4.975 * log_alpha) - 0.05) / 9.95")
    began = time.monotonic()
    found = marks(path, "02.3", "02.4")
    assert time.monotonic() - began < 30
    text = found["02.3"].words
    assert not found["02.3"].passed and any(each in text for each in words.split("|")), text
    assert "Traceback" not in text and text.replace("\n", "").isprintable() and len(text) < 2000
    assert found["02.4"].passed, found["02.4"].words


REACHING = {  # expressions that reach out of the process; each must raise an error
    "write a file": "open({canary!r}, 'w')",
    "write a new file": "open({canary!r} + '.new', 'w')",
    "write a file in /tmp": "open('/tmp/ldm_minimal_was_here', 'w')",
    "read a file": "open({canary!r}).read()",
    "read the solutions": "open({solutions!r}).read()",
    "list the folder": "__import__('os').listdir({folder!r})",
    "delete a file": "__import__('os').remove({canary!r})",
    "delete a folder": "__import__('shutil').rmtree({folder!r})",
    "rename": "__import__('os').rename({canary!r}, {canary!r} + '.moved')",
    "truncate": "__import__('os').truncate({canary!r}, 0)",
    "change rights": "__import__('os').chmod({canary!r}, 0)",
    "set the time": "__import__('os').utime({canary!r}, (0, 0))",
    "a link": "__import__('os').symlink('/', {canary!r} + '.link')",
    "run a program": "__import__('subprocess').run(['/bin/true'])",
    "a shell": "1 / (__import__('os').system('true') == 0)",
    "fork": "__import__('os').fork()",
    "kill the parent": "__import__('os').kill(__import__('os').getppid(), 9)",
    "kill all": "__import__('os').kill(-1, 9)",
    "a connection": "__import__('socket').create_connection(('127.0.0.1', 9), timeout=1)",
    "a socket": "__import__('socket').socket(__import__('socket').AF_INET, __import__('socket').SOCK_DGRAM)",
    "see processes": "__import__('os').listdir('/proc')",
    "the pipe's other end": "open('/proc/' + str(__import__('os').getppid()) + '/mem', 'rb')",
    "limits of another": "__import__('resource').prlimit(__import__('os').getppid(), __import__('resource').RLIMIT_CPU, (9000, 9000))",
    "the priority of another": "__import__('os').setpriority(__import__('os').PRIO_PROCESS, __import__('os').getppid(), 19)",
    "a signal by way of a file": "__import__('fcntl').fcntl(0, 8, __import__('os').getppid())",
    "more memory again": "__import__('resource').setrlimit(__import__('resource').RLIMIT_DATA, (-1, -1))",
}


@linux
@pytest.mark.parametrize("name", REACHING)
def test_nothing_outside_is_reached(name, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    code = REACHING[name].format(canary=str(canary), folder=str(tmp_path),
                                 solutions=str(ROOT / "book" / "exercises" / "02_forward_noising.md"))
    cell = f'''# exercise 02.3
def score(zt, z0_hat, alpha, sigma):
    try:
        {code}
    except Exception as error:
        if type(error) not in (PermissionError, OSError, ZeroDivisionError, ValueError): raise
        return -(zt - alpha * z0_hat) / sigma**2
    raise RuntimeError("it was reached")'''
    found = marks(notebook(tmp_path / "a.ipynb", IMPORTS, cell), "02.3")
    assert found["02.3"].passed, found["02.3"].words
    assert canary.read_text() == "alive" and not os.path.exists("/tmp/ldm_minimal_was_here")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb", "canary"]


@pytest.mark.parametrize("text, words", [
    ("", "not JSON"), ("{", "not JSON"), ("[1, 2]", "no list of cells"), ('{"cells": 3}', "no list of cells"), ("\udcff", "not JSON"),
    ('{"cells": [{"cell_type": "code", "source": 3}, 4, null]}', "nothing to grade"), ("[" * 100_000, "not JSON"),
    ('{"cells": []}', "nothing to grade"), ('{"cells": ' + "9" * 5000 + "}", "not JSON"),
    (json.dumps({"cells": [{"cell_type": "code", "source": "\n \t" * 500_000}]}), "nothing to grade")])
def test_what_is_no_notebook_is_told_so(text, words, tmp_path, capsys):
    path = tmp_path / "a.ipynb"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert main(["grade", str(path), "--out", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["score"] == 0 and words in result["output"] and result["tests"] == []
    assert main(["grade", str(path), "--exercises", "02.3", "--out", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["tests"][0]["max_score"] == 3


def test_a_missing_cell_costs_its_points_and_no_others(tmp_path):
    report = grade.grade(notebook(tmp_path / "a.ipynb", IMPORTS, SCORE), None, LIMITS)
    assert (report.score, report.out_of) == (3, sum(e.points for n, e in checks.EXERCISES.items() if n.startswith("02")))
    assert "no cell with the line '# exercise 02.1'" in report.marks[0].words


# --- seeds, formats, folders

def test_typed_in_results_fail_with_a_private_seed(tmp_path, monkeypatch):
    seen = []

    def spy(zt, z0_hat, alpha, sigma):
        seen.append(-(zt - alpha * z0_hat) / sigma**2)
        return seen[-1]

    monkeypatch.setattr(checks, "SEED", 0)
    assert checks.passes("02.3", spy)
    cell = (f"# exercise 02.3\nRESULTS = iter({[each.tolist() for each in seen]})\n"
            "def score(zt, z0_hat, alpha, sigma):\n    return torch.tensor(next(RESULTS), dtype=zt.dtype)")
    path = notebook(tmp_path / "a.ipynb", IMPORTS, cell)
    assert marks(path, "02.3")["02.3"].passed
    monkeypatch.setattr(checks, "SEED", 4711)
    assert not marks(path, "02.3")["02.3"].passed


def test_a_submission_does_not_see_the_seed(tmp_path):
    cell = SCORE.replace("    return", "    import os, sys\n    from ldm_minimal import checks\n"
                         "    if checks.SEED or len(sys.argv) > 1 or dict(os.environ): raise RuntimeError(f'{checks.SEED} {sys.argv} {os.environ}')\n    return")
    path, out = notebook(tmp_path / "a.ipynb", IMPORTS, cell), tmp_path / "r.json"
    subprocess.run([sys.executable, "-m", "ldm_minimal", "grade", str(path), "--private-seed", "4711", "--out", str(out)], check=True,
                   cwd=ROOT, capture_output=True)
    tests = {test["number"]: test for test in json.loads(out.read_text())["tests"]}
    assert tests["02.3"]["status"] == "passed", tests["02.3"]["output"]


def test_the_results_have_gradescopes_form(tmp_path, capsys):
    path, out = notebook(tmp_path / "a.ipynb", IMPORTS, SCORE), tmp_path / "results.json"
    assert main(["grade", str(path), "--out", str(out)]) == 0
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    assert result["score"] == 3 == sum(test["score"] for test in result["tests"]) and "3 of 3 points" in text
    for test in result["tests"]:
        assert {"name", "number", "score", "max_score", "status", "output"} <= test.keys() and test["status"] in ("passed", "failed")
        assert isinstance(test["output"], str) and 0 <= test["score"] <= test["max_score"]


def test_a_folder_becomes_one_table_and_is_gone_on_with(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "marks.csv"
    for i in range(4):
        (folder / f"student {i}").mkdir(parents=True)
        notebook(folder / f"student {i}" / "work.ipynb", IMPORTS, SCORE if i else SCORE.replace("-(", "("))
    (folder / "=broken.ipynb").write_text("{")
    (folder / ".ipynb_checkpoints").mkdir()
    notebook(folder / ".ipynb_checkpoints" / "work.ipynb", SCORE)
    assert main(["grade", str(folder), "--out", str(out), "--workers", "3"]) == 0
    first = out.read_text()
    rows = list(csv.DictReader(first.splitlines()))
    assert [(row["submission"], row["score"], row["02.3"]) for row in rows] == [
        ("'=broken.ipynb", "0", "0"), ("student 0/work.ipynb", "0", "0"), *((f"student {i}/work.ipynb", "3", "3") for i in (1, 2, 3))]
    assert "not JSON" in rows[0]["trouble"] and {row["max_score"] for row in rows} == {"9"}
    capsys.readouterr()
    notebook(folder / "student 0" / "work.ipynb", IMPORTS, SCORE)  # one hands in again, and one result was cut off
    next((tmp_path / "marks.results").glob("*.json")).write_text("{")
    assert main(["grade", str(folder), "--out", str(out), "--workers", "3"]) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if " of 9" in line]
    assert 1 <= len(again) <= 2 and any("student 0" in line for line in again)
    assert list(csv.DictReader(out.read_text().splitlines()))[1]["score"] == "3"


def test_notebooks_of_several_chapters_are_marked_each_for_its_own_and_what_holds_none_gets_a_line(tmp_path):
    other, folder, out = SCORE.replace("02.3", "04.3"), tmp_path / "in", tmp_path / "marks.csv"
    for i in range(2):
        (folder / f"student {i}").mkdir(parents=True)
        notebook(folder / f"student {i}" / "TWO.IPYNB", IMPORTS, SCORE)
        notebook(folder / f"student {i}" / "four.ipynb", IMPORTS, other)
    (folder / "student 2").mkdir()
    assert main(["grade", str(folder), "--out", str(out), "--seconds", "4"]) == 0
    rows = {row["submission"]: row for row in csv.DictReader(out.read_text().splitlines())}
    assert rows["student 0/TWO.IPYNB"]["02.3"] == "3" and rows["student 0/TWO.IPYNB"]["04.3"] == ""
    assert rows["student 1/four.ipynb"]["04.3"] == "0" and rows["student 1/four.ipynb"]["02.3"] == ""
    assert "no file" in rows["student 2"]["trouble"] and rows["student 2"]["02.3"] == rows["student 2"]["04.3"] == "0"
    assert grade.expected([folder / "student 0" / "TWO.IPYNB"])[0] == grade.of_chapters({"02"})


def test_who_hands_in_both_chapters_in_one_notebook_misses_none_silently(tmp_path):
    both = [notebook(tmp_path / f"{i}.ipynb", "# exercise 02.3\n", "# exercise 04.3\n") for i in range(3)]
    assert set(map(tuple, grade.expected([*both, notebook(tmp_path / "x.ipynb", "# exercise 02.3\n")]))) == {tuple(grade.of_chapters({"02", "04"}))}


def test_an_upload_without_one_notebook_gets_results_that_say_so(tmp_path):
    folder, out = tmp_path / "upload", tmp_path / "results.json"
    folder.mkdir()
    for made, words in (("a.ipynb", "3 of 9"), ("b.ipynb", "hand in one notebook")):
        notebook(folder / made, IMPORTS, SCORE)
        assert main(["grade", str(folder), "--out", str(out)]) == 0
        assert words in json.loads(out.read_text())["output"]


def test_a_result_of_other_checks_is_not_taken_for_todays(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    notebook(tmp_path / "in" / "a.ipynb", IMPORTS, SCORE)
    again = []
    for changed in ("one", "one", "two"):
        monkeypatch.setattr(grade, "checks_sha256", lambda: changed)
        assert main(["grade", str(tmp_path / "in"), "--exercises", "02.3", "--out", str(tmp_path / "marks.csv")]) == 0
        again.append("a.ipynb: 3 of 3" in capsys.readouterr().out)
    assert again == [True, False, True]


@pytest.mark.parametrize("wrong", [["nowhere.ipynb"], [], ["{tmp}"], ["{tmp}/a.ipynb", "--exercises", "99.9"], ["{tmp}/a.ipynb", "--private-seed", "-1"],
                                   ["{tmp}/a.ipynb", "--seconds", "0"]])
def test_a_wrong_call_is_told_so(wrong, tmp_path, capsys):
    if len(wrong) > 1:
        notebook(tmp_path / "a.ipynb", IMPORTS)
    assert main(["grade", *(each.format(tmp=tmp_path) for each in wrong)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_is_held_is_said(capsys):
    assert main(["grade", "--held"]) == 0
    text = capsys.readouterr().out
    assert "memory" in text and "files" in text and "network" in text and "not held: " in text


def test_the_hook_in_python_holds_where_the_kernel_does_not(tmp_path):
    """In a process of its own, since a hook cannot be taken back."""
    canary = tmp_path / "canary"
    canary.write_text("alive")
    code = f'''
import os, socket, subprocess
from ldm_minimal.grading import sandbox
sandbox.lock_python()
import json.tool  # packages can still be read
for attempt in (lambda: open({str(canary)!r}, "w"), lambda: open({str(canary)!r}), lambda: os.remove({str(canary)!r}), lambda: os.system("true"),
                lambda: subprocess.run(["true"]), lambda: socket.socket(), lambda: os.fork(), lambda: os.kill(os.getppid(), 9)):
    try:
        attempt()
    except PermissionError:
        print("refused")
'''
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["refused"] * 8, done
    assert canary.read_text() == "alive"
