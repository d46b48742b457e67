"""The list of mutants fits the code: each line stands once, each bug is another line that still is Python."""

import ast
from pathlib import Path

import pytest

from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_each_mutant_fits_the_code(number):
    file, line, bug, tests = MUTANTS[number]
    text = (ROOT / "ldm_minimal" / file).read_text(encoding="utf-8")
    assert text.count(line) == 1 and bug != line
    ast.parse(text.replace(line, bug))
    assert all((Path(__file__).parent / name).is_file() for name in tests.split())


def test_there_are_as_many_mutants_as_promised():
    assert len(MUTANTS) >= 25 and len({m[:3] for m in MUTANTS}) == len(MUTANTS)
