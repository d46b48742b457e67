"""Right and wrong answers to the exercises of chapter 7, samplers."""

import math
from functools import partial
from itertools import pairwise

import torch

from ldm_minimal.sampler import step

c = lambda t: (math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))
(a8, s8), (a4, s4) = c(0.8), c(0.4)
answer = s4 * (a8 / s8) / (a4 / s4)


def exact_weight(h, h_last):
    return (h / -torch.expm1(-h) - 1) / h_last


def heun(denoise, zt, y, schedule, times, mean=lambda a, b: (a + b) / 2, old_time=False, always_two=False):
    for t, s in pairwise(times):
        now, nxt = schedule(t), schedule(s)
        z0 = denoise(zt, t.expand(len(zt)), y)
        if always_two or nxt[1] > 0:
            trial, later = step(zt, z0, now, nxt), t if old_time else s
            z0 = mean(z0, denoise(trial, later.expand(len(zt)), y))
        zt = step(zt, z0, now, nxt)
    return zt


heun_always_two = partial(heun, always_two=True)
heun_old_time = partial(heun, old_time=True)
heun_second_only = partial(heun, mean=lambda a, b: b)


def up(z, z0, now, nxt):
    (alpha, sigma), (alpha_s, sigma_s) = now, nxt
    return alpha_s * z0 + sigma_s * (z - alpha * z0) / sigma


def invert(denoise, z, y, schedule, times, rounds=0, move=step):
    for t, s in pairwise(times):
        now, nxt = schedule(t), schedule(s)
        there = move(z, denoise(z, t.expand(len(z)), y), now, nxt)
        for _ in range(rounds):
            there = move(z, denoise(there, s.expand(len(z)), y), now, nxt)
        z = there
    return z


def invert_by_hand(denoise, z, y, schedule, times, rounds=0):
    return invert(denoise, z, y, schedule, times, rounds, up)


def invert_no_rounds(denoise, z, y, schedule, times, rounds=0):
    return invert(denoise, z, y, schedule, times)


def invert_round_from_there(denoise, z, y, schedule, times, rounds=0):
    for t, s in pairwise(times):
        z = step(z, denoise(z, t.expand(len(z)), y), schedule(t), schedule(s))
        for _ in range(rounds):
            z = step(z, denoise(z, s.expand(len(z)), y), schedule(t), schedule(s))
    return z


def invert_round_old_time(denoise, z, y, schedule, times, rounds=0):
    for t, s in pairwise(times):
        now, nxt = schedule(t), schedule(s)
        there = step(z, denoise(z, t.expand(len(z)), y), now, nxt)
        for _ in range(rounds):
            there = step(z, denoise(there, t.expand(len(z)), y), now, nxt)
        z = there
    return z


def heun_generator(denoise, zt, y, schedule, times):
    yield zt


def euler(denoise, zt, y, schedule, times):
    for t, s in pairwise(times):
        zt = step(zt, denoise(zt, t.expand(len(zt)), y), schedule(t), schedule(s))
    return zt


def invert_down(denoise, z, y, schedule, times, rounds=0):
    return invert(denoise, z, y, schedule, times.flip(0))


def invert_noisy(denoise, z, y, schedule, times, rounds=0):
    for t, s in pairwise(times):
        z = up(z, denoise(z, t.expand(len(z)), y), schedule(t), schedule(s)) + 0.1 * torch.randn_like(z)
    return z


def invert_asks_above(denoise, z, y, schedule, times, rounds=0):
    for t, s in pairwise(times):
        z = up(z, denoise(z, s.expand(len(z)), y), schedule(t), schedule(s))
    return z


def invert_in_place(denoise, z, y, schedule, times, rounds=0):
    z.mul_(1.0).add_(0.5)
    return invert(denoise, z, y, schedule, times)


def invert_one_jump(denoise, z, y, schedule, times, rounds=0):
    return invert(denoise, z, y, schedule, times[[0, -1]])


CASES = [
    ("07.1", answer, "all of it holds", True),
    ("07.1", None, "not done yet", False),
    ("07.1", s4, "eta = 0 keeps", False),
    ("07.1", answer / s8, "factor of z_t", False),
    ("07.1", answer**2, "variance: take the root", False),
    ("07.1", answer / s4, "is missing", False),
    ("07.1", 0.3, "one step gives", False),
    ("07.2", exact_weight, "", True),
    ("07.2", lambda h, h_last: None, "not done yet", False),
    ("07.2", lambda h, h_last: h / (2 * h_last), "the chapter has", False),
    ("07.2", lambda h, h_last: (h / torch.expm1(h) - 1) / h_last, "a sign", False),
    ("07.2", lambda h, h_last: (1 - h / torch.expm1(h)) / h_last, "divide the integral", False),
    ("07.2", lambda h, h_last: (h * h.exp() - torch.expm1(h)) / h_last, "divide the integral", False),
    ("07.2", lambda h, h_last: (h / -torch.expm1(-h) - 1) * h_last, "slope of the line", False),
    ("07.2", lambda h, h_last: ((h * h.exp() - h.exp() + 1) / (h.exp() - 1)) / h_last, "", True),
    ("07.2", lambda h, h_last: (h / -torch.expm1(-h.float()) - 1) / h_last, "digits are lost", False),
    ("07.3", heun, "", True),
    ("07.3", lambda *a: None, "not done yet", False),
    ("07.3", heun_generator, "not a list", False),
    ("07.3", heun_always_two, "nothing to ask", False),
    ("07.3", heun_old_time, "its time s", False),
    ("07.3", heun_second_only, "mean of the two", False),
    ("07.3", euler, "you spent 4", False),
    ("07.4", invert, "", True),
    ("07.4", lambda *a: None, "not done yet", False),
    ("07.4", invert_by_hand, "", True),
    ("07.4", invert_no_rounds, "one for each round", False),
    ("07.4", invert_round_from_there, "not from where it arrived", False),
    ("07.4", invert_round_old_time, "upper of its two times", False),
    ("07.4", invert_down, "the way goes up", False),
    ("07.4", invert_noisy, "without noise of your own", False),
    ("07.4", invert_asks_above, "ask before the step", False),
    ("07.4", invert_in_place, "out of place", False),
    ("07.4", invert_one_jump, "at the lower of its two times", False),
]
SOLUTIONS = [(number, answer) for number, answer, _, holds in CASES if holds]
WRONG = {n: [(a, words) for number, a, words, holds in CASES if number == n and not holds] for n, _ in SOLUTIONS}
