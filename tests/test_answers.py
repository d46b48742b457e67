"""Every check passes the right answer and tells each wrong one its mistake, with the public seed and with private ones.

The right answers are the solutions in book/exercises; the wrong ones stand in tests/answers, a file for each chapter.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

from ldm_minimal import checks

sys.path.insert(0, str(Path(__file__).parent.parent / "book"))
import coursework  # noqa: E402

FILES = sorted((Path(__file__).parent / "answers").glob("chapter_*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = [load(path) for path in FILES]
RIGHT = [(number, coursework.solution(number)) for number in checks.EXERCISES]
RIGHT += [case for module in MODULES for case in getattr(module, "ALSO_RIGHT", [])]  # other ways that are as good
WRONG = [(number, answer, words) for module in MODULES for number, cases in module.WRONG.items() for answer, words in cases]


def heard(capsys, number, answer):
    answers = answer if isinstance(answer, tuple) else (answer,)
    passed = checks.passes(number, *answers)
    return passed, capsys.readouterr().out


@pytest.fixture(params=[0, 1, 77])
def seed(request, monkeypatch):
    monkeypatch.setattr(checks, "SEED", request.param)


@pytest.mark.parametrize("number, answer", RIGHT)
def test_a_right_answer_passes(number, answer, seed, capsys):
    passed, text = heard(capsys, number, answer)
    assert passed, text


@pytest.mark.parametrize("number, answer, words", WRONG)
def test_a_wrong_answer_is_told_its_mistake(number, answer, words, seed, capsys):
    passed, text = heard(capsys, number, answer)
    assert not passed and any(each in text for each in words.split("|")), text


def test_every_check_has_three_wrong_answers_or_more():
    wrong = {number: sum(n == number for n, *_ in WRONG) for number in checks.EXERCISES}
    assert min(wrong.values()) >= 3, {number: n for number, n in wrong.items() if n < 3}
