"""Every check passes the right answer and tells each wrong one its mistake; tests/answers holds both."""

import importlib.util
from pathlib import Path

import pytest

from ldm_minimal import checks

FILES = sorted((Path(__file__).parent / "answers").glob("chapter_*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = [load(path) for path in FILES]
RIGHT = [case for module in MODULES for case in (  # a list where there is more than one way
    module.SOLUTIONS.items() if isinstance(module.SOLUTIONS, dict) else module.SOLUTIONS)]
WRONG = [(number, answer, words) for module in MODULES for number, cases in module.WRONG.items() for answer, words in cases]


def heard(capsys, number, answer):
    answers = answer if isinstance(answer, tuple) else (answer,)
    passed = checks.passes(number, *answers)
    return passed, capsys.readouterr().out


@pytest.mark.parametrize("number, answer", RIGHT)
def test_a_right_answer_passes(number, answer, capsys):
    passed, text = heard(capsys, number, answer)
    assert passed, text


@pytest.mark.parametrize("number, answer, words", WRONG)
def test_a_wrong_answer_is_told_its_mistake(number, answer, words, capsys):
    passed, text = heard(capsys, number, answer)
    assert not passed and any(each in text for each in words.split("|")), text


def test_every_exercise_with_a_check_has_answers():
    wrong = {number: sum(n == number for n, *_ in WRONG) for number in checks.EXERCISES}
    assert dict(RIGHT).keys() == checks.EXERCISES.keys()
    assert min(wrong.values()) >= 2, wrong
