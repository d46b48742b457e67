"""Checks of the exercises: properties and closed forms, and for what fails the likely mistake in words.

    check("05.2", my_guide)        prints what holds and what does not

An exercise is a generator of (what was looked at, whether it holds, what is probably wrong if not). The first
that does not hold ends the check, and so does an error in the answer, which is shown in one line, not as a traceback.
An answer that is None, or returns None, is not done yet.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Finding = tuple[str, bool, str]
EXERCISES: dict[str, tuple[str, Callable[..., Iterator[Finding]]]] = {}  # "05.2": (title, its check)


class NotDone(Exception):
    """The answer is still the stub."""


def exercise(number: str, title: str):
    """Register a generator of findings as the check of one exercise."""
    def register(test):
        assert number not in EXERCISES, f"two checks for exercise {number}"
        EXERCISES[number] = (title, test)
        return test
    return register


def done(value):
    """The value itself; NotDone for None."""
    if value is None:
        raise NotDone
    return value


def check(number: str, *answers) -> None:
    """Look at the answer (or answers) to an exercise and say in words what holds and what does not."""
    passes(number, *answers)


def passes(number: str, *answers) -> bool:
    """What `check` says, and whether all of it holds."""
    if number not in EXERCISES:
        raise ValueError(f"there is no exercise {number!r}, choose from {', '.join(sorted(EXERCISES))}")
    title, test = EXERCISES[number]
    print(f"exercise {number}: {title}")
    try:
        given = [_watched(done(answer)) for answer in answers]
        for what, holds, mistake in test(*given):
            if not holds:
                print(f"  no   {what}\n       {mistake}")
                return False
            print(f"  yes  {what}")
    except NotDone:
        print("  not done yet")
        return False
    except Exception as error:  # whatever a learner's code raises: said in one line, and the notebook goes on
        print(f"  no   it stopped with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return False
    return True


def _watched(answer):
    """A function whose None, the answer of a stub, becomes NotDone. Anything else as it is."""
    if isinstance(answer, type) or not callable(answer) or isinstance(answer, torch.nn.Module):
        return answer
    return lambda *args, **kwargs: done(answer(*args, **kwargs))


def close(a, b, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Equal shapes (or a number for b), and values equal up to rounding."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    return (b.ndim == 0 or a.shape == b.shape) and torch.allclose(a, b.expand_as(a), rtol=rtol, atol=atol)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
