"""What the chapters begin with, and how an exercise's check answers."""

import re

import pytest
import torch

from ldm_minimal import chapter, checks


@pytest.fixture
def twice(monkeypatch):
    """One exercise, 99.1: a function that doubles."""
    monkeypatch.setattr(checks, "EXERCISES", {})

    @checks.exercise("99.1", "doubling", points=1)
    def _(answer):
        yield "zero stays zero", answer(0) == 0, "is something added?"
        yield "three becomes six", answer(3) == 6, "squared instead of doubled?"


def says(capsys, *answers) -> tuple[bool, str]:
    return checks.passes("99.1", *answers), capsys.readouterr().out


def test_a_right_answer_passes(twice, capsys):
    passed, text = says(capsys, lambda x: 2 * x)
    assert passed and text.count("  yes  ") == 2 and "  no   " not in text


def test_a_wrong_answer_is_told_the_likely_mistake(twice, capsys):
    passed, text = says(capsys, lambda x: x * x)
    assert not passed and "squared instead of doubled?" in text and "yes  zero stays zero" in text


def test_a_stub_is_not_done_yet(twice, capsys):
    for answer in (None, lambda x: None):
        passed, text = says(capsys, answer)
        assert not passed and "not done yet" in text and "  no   " not in text


def test_an_error_in_the_answer_is_one_line(twice, capsys):
    passed, text = says(capsys, lambda x: 1 / 0)
    assert not passed and "ZeroDivisionError: division by zero" in text and "Traceback" not in text


def test_an_unknown_exercise_and_a_missing_answer_are_named(twice, capsys):
    checks.check("99.2", None)
    assert re.search("99.2.*99.1", capsys.readouterr().out)
    passed, text = says(capsys)
    assert not passed and "takes answer, and got 0" in text


def test_check_shows_nothing_but_its_words(twice, capsys):
    assert checks.check("99.1", None) is None and "not done yet" in capsys.readouterr().out


def test_close_sees_shapes_and_values():
    assert checks.close(torch.ones(2, 3), 1) and checks.close([1.0, 2.0], [1.0, 2.0 + 1e-7])
    assert not checks.close(torch.ones(2, 3), torch.ones(3, 2)) and not checks.close(1.0, 1.1)


def test_the_budget_knows_the_machine_and_the_hurry(monkeypatch, capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert chapter.Budget(cpu, "fp32")(200, gpu=2000) == 200 and chapter.Budget(gpu, "fp16")(200, gpu=2000) == 2000
    assert chapter.Budget(gpu, "fp16")(200) == 200 and chapter.Budget(cpu, "fp32", fast=True)(200, gpu=2000) == 20
    assert chapter.Budget(cpu, "fp32", fast=True)(3) == 1
    monkeypatch.setenv("LDM_FAST", "1")
    budget = chapter.start()
    text = capsys.readouterr().out
    assert budget.fast and "a tenth of the steps" in text and torch.__version__ in text and "images" in text
    monkeypatch.setenv("LDM_FAST", "0")
    assert not chapter.start().fast
