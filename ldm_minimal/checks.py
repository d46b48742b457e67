"""Checks of the exercises: properties and closed forms, and for what fails the likely mistake in words.

    check("05.2", rescaled)        prints what holds and what does not

A check is a generator of (what was looked at, whether it holds, what is probably wrong if not). The first that does
not hold ends it, and so does an error in the answer, which is shown in one line, not as a traceback. An answer that
is None, or returns None, is not done yet. The checks themselves stand in `exercises`, a file for each chapter.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Finding = tuple[str, bool, str]
SEED = 0  # of all numbers that the checks draw; a grader may choose another one (`grade --private-seed`)


class NotDone(Exception):
    """The answer is still the stub."""


class Stopped(Exception):
    """What ended the answer from outside, in words that are shown as they stand."""


@dataclass(frozen=True)
class Exercise:
    number: str  # "05.2"
    title: str
    points: int  # as many as its difficulty, 1 to 3
    test: Callable[..., Iterator[Finding]]

    @property
    def names(self) -> list[str]:
        """What the answers are called in the chapter's stub: the arguments of the test."""
        return list(inspect.signature(self.test).parameters)


EXERCISES: dict[str, Exercise] = {}


def exercise(number: str, title: str, points: int):
    """Register a generator of findings as the check of one exercise."""
    def register(test):
        assert number not in EXERCISES, f"two checks for exercise {number}"
        EXERCISES[number] = Exercise(number, title, points, test)
        return test
    return register


@dataclass(frozen=True)
class Verdict:
    """What a check has found: the findings in their order (the last one may fail), and whether there was an answer."""
    exercise: Exercise
    findings: tuple[Finding, ...]
    done: bool = True

    @property
    def passed(self) -> bool:
        return self.done and all(holds for _, holds, _ in self.findings)

    def __str__(self) -> str:
        lines = [f"exercise {self.exercise.number}: {self.exercise.title}"]
        for what, holds, mistake in self.findings:
            lines += [f"  yes  {what}"] if holds else [f"  no   {what}", *([f"       {mistake}"] if mistake else [])]
        return "\n".join(lines if self.done else [*lines, "  not done yet"])


def check(number: str, *answers) -> None:
    """Look at the answer (or answers) to an exercise and say in words what holds and what does not."""
    passes(number, *answers)


def passes(number: str, *answers) -> bool:
    """What `check` says, and whether all of it holds."""
    if number not in EXERCISES:
        print(f"there is no exercise {number!r}, choose from {', '.join(sorted(EXERCISES))}")
        return False
    found = verdict(number, *answers)
    print(found)
    return found.passed


def verdict(number: str, *answers) -> Verdict:
    """Run one check; whatever the answers raise becomes the last finding. KeyError for a number that is none."""
    which, found = EXERCISES[number], []
    try:
        if len(answers) != len(which.names):
            raise TypeError(f"check {number} takes {', '.join(which.names)}, and got {len(answers)} answers")
        given = [_watched(done(answer)) for answer in answers]
        for finding in which.test(*given):
            found.append((finding[0], bool(finding[1]), finding[2]))
            if not finding[1]:
                break
    except NotDone:
        return Verdict(which, tuple(found), done=False)
    except Stopped as error:
        found.append((str(error), False, ""))
    except (Exception, SystemExit) as error:  # whatever a learner's code raises: said in one line, and the notebook goes on
        words = str(error).strip().splitlines()
        found.append((f"it stopped with {type(error).__name__}: {words[0] if words else ''}".rstrip(": "), False, ""))
    return Verdict(which, tuple(found))


def done(value):
    """The value itself; NotDone for None."""
    if value is None:
        raise NotDone
    return value


def _watched(answer):
    """A function whose None, the answer of a stub, becomes NotDone. Anything else as it is."""
    if isinstance(answer, type) or not callable(answer) or isinstance(answer, torch.nn.Module):
        return answer
    return lambda *args, **kwargs: done(answer(*args, **kwargs))


# what the checks are made of

def generator(seed: int = 0) -> torch.Generator:
    """A generator that depends on the seed given and on SEED."""
    return torch.Generator().manual_seed(seed + (SEED << 20))


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for a seed."""
    return torch.randn(shape, generator=generator(seed))


def uniform(low: float, high: float, *shape: int, seed: int = 0) -> Tensor:
    """Numbers in [low, high), the same for a seed."""
    return low + (high - low) * torch.rand(shape, generator=generator(seed))


def integer(low: int, high: int, seed: int = 0) -> int:
    """A whole number in low ... high, both possible."""
    return int(torch.randint(low, high + 1, (), generator=generator(seed)))


def close(a, b, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Equal shapes (or a number for b), and values equal up to rounding."""
    a = torch.as_tensor(a, dtype=torch.float64)
    b = torch.as_tensor(b, dtype=torch.float64)
    return (a.numel() > 0 if b.ndim == 0 else a.shape == b.shape) and torch.allclose(a, b.expand_as(a), rtol=rtol, atol=atol)


def cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine schedule (alpha, sigma): variance preserving, down to alpha = 0."""
    return torch.cos(t * (torch.pi / 2)).clamp(min=0), torch.sin(t * (torch.pi / 2))


from . import exercises  # noqa: E402, F401  each of its files registers its checks, with the functions above
