"""The process that runs a student's code. It is forked from one that has imported what answers use, and then shut.

From there on it is not trusted, and all that leaves it is values (remote.py). The text of the notebook is taken apart in
here as well: a text can be made that crashes Python's parser.
"""

import math
import os
import sys

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from . import sandbox, submission
from .remote import Link

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  here, since it wants to write its cache


def run(connection, number: str, names: list[str], cells: list[str], seconds: float, megabytes: int) -> None:
    """Hand over the answers to an exercise, then do what the other side asks, until it closes the pipe."""
    _leave_only(connection.fileno())
    torch.set_num_threads(1)

    def start():
        program, answers = submission.answer_to(number, cells, names)
        space = {"__name__": "__main__", "math": math, "np": np, "plt": plt, "torch": torch, "nn": torch.nn, "F": F,
                 "Tensor": torch.Tensor}  # what a chapter imports, for a notebook from which the set-up was cut
        exec(compile(program, "submission", "exec"), space)
        return eval(answers, space)

    link = Link(connection)
    link.kept.append(start)  # number 0
    connection.send_bytes(b"ready")
    sandbox.shut(seconds, megabytes)
    try:
        while True:
            link.serve(*link.receive())
    finally:
        os._exit(0)


def _leave_only(pipe: int) -> None:
    """No other file is open, nothing of the caller's is left in the environment, and what the code prints goes nowhere."""
    sys.argv[:] = [""]
    os.environ.clear()
    os.chdir("/")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 4096)
