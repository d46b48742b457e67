"""Wrong answers to the exercises of chapter 7, samplers, and other right ones."""

import math
from itertools import pairwise

import torch
from coursework import solution

from ldm_minimal.sampler import step

answer, exact_weight, heun, invert = (solution(f"07.{i}") for i in range(1, 5))
(a8, s8), (a4, s4) = ((math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)) for t in (0.8, 0.4))


# 07.2

def by_parts(h, h_last):
    return ((h * h.exp() - h.exp() + 1) / (h.exp() - 1)) / h_last


def numerically(h, h_last):
    u = h * ((torch.arange(4000, dtype=h.dtype) + 0.5) / 4000).reshape(-1, *[1] * h.ndim)
    return (u.exp() * u).mean(0) / u.exp().mean(0) / h_last


def weight_in_place(h, h_last):
    whole = exact_weight(h, h_last)
    h.neg_()
    return whole


# 07.3

def heun_with(mean=lambda a, b: (a + b) / 2, late=True, always=False, from_trial=False):
    def run(denoise, zt, y, schedule, times):
        for t, s in pairwise(times):
            now, nxt = schedule(t), schedule(s)
            z0 = denoise(zt, t.expand(len(zt)), y)
            if always or nxt[1] > 0:
                trial = step(zt, z0, now, nxt)
                z0 = mean(z0, denoise(trial, (s if late else t).expand(len(zt)), y))
                zt = trial if from_trial else zt
            zt = step(zt, z0, now, nxt)
        return zt
    return run


def heun_generator(denoise, zt, y, schedule, times):
    yield zt


def heun_in_velocity(denoise, zt, y, schedule, times):
    """EDM's own variables: z / alpha as a function of sigma / alpha."""
    for t, s in pairwise(times):
        (alpha, sigma), (alpha_s, sigma_s) = schedule(t), schedule(s)
        if alpha < 1e-9:  # z / alpha does not exist there
            z0 = denoise(zt, t.expand(len(zt)), y)
            trial = step(zt, z0, (alpha, sigma), (alpha_s, sigma_s))
            zt = step(zt, (z0 + denoise(trial, s.expand(len(zt)), y)) / 2, (alpha, sigma), (alpha_s, sigma_s))
            continue
        x, level, level_s = zt / alpha, sigma / alpha, sigma_s / alpha_s
        slope = (x - denoise(zt, t.expand(len(zt)), y)) / level
        trial = x + (level_s - level) * slope
        if sigma_s > 0:
            slope = (slope + (trial - denoise(alpha_s * trial, s.expand(len(zt)), y)) / level_s) / 2
            trial = x + (level_s - level) * slope
        zt = alpha_s * trial
    return zt


def last_single(denoise, zt, y, schedule, times):
    """One evaluation on the last step, whatever its end: the order is still 2."""
    if len(times) > 2:
        zt = heun(denoise, zt, y, schedule, times[:-1])
    t, s = times[-2:]
    return step(zt, denoise(zt, t.expand(len(zt)), y), schedule(t), schedule(s))


def times_in_float32(answer):
    """t as torch.full makes it."""
    def run(denoise, zt, *rest):
        return answer(lambda z, t, y: denoise(z, torch.full((len(z),), float(t[0])), y), zt, *rest)
    return run


def euler(denoise, zt, y, schedule, times):
    for t, s in pairwise(times):
        zt = step(zt, denoise(zt, t.expand(len(zt)), y), schedule(t), schedule(s))
    return zt


def midpoint(denoise, zt, y, schedule, times):
    for t, s in pairwise(times):
        half = (t + s) / 2
        trial = step(zt, denoise(zt, t.expand(len(zt)), y), schedule(t), schedule(half))
        zt = step(zt, denoise(trial, half.expand(len(zt)), y), schedule(t), schedule(s))
    return zt


def heun_in_place(denoise, zt, y, schedule, times):
    zt.copy_(heun(denoise, zt, y, schedule, times))
    return zt


def heun_one_time(denoise, zt, y, schedule, times):
    return heun(lambda z, t, y: denoise(z, t[0], y), zt, y, schedule, times)


def heun_no_label(denoise, zt, y, schedule, times):
    return heun(denoise, zt, torch.zeros_like(y), schedule, times)


def heun_last_twice(denoise, zt, y, schedule, times):
    """t = 0 is avoided by asking at the old time again."""
    def safe(z, t, y):
        return denoise(z, t.clamp(min=1e-3), y)
    return heun_with(always=True)(safe, zt, y, schedule, times)


def heun_stops_before_the_end(denoise, zt, y, schedule, times):
    """One line indented too far: the last step is never taken."""
    for t, s in pairwise(times):
        now, nxt = schedule(t), schedule(s)
        z0 = denoise(zt, t.expand(len(zt)), y)
        if nxt[1] > 0:
            trial = step(zt, z0, now, nxt)
            zt = step(zt, (z0 + denoise(trial, s.expand(len(zt)), y)) / 2, now, nxt)
    return zt


# 07.4

def up(z, z0, now, nxt):
    (alpha, sigma), (alpha_s, sigma_s) = now, nxt
    return alpha_s * z0 + sigma_s * (z - alpha * z0) / sigma


def invert_by_hand(denoise, z, y, schedule, times, rounds=0):
    for t, s in zip(times, times[1:]):
        z0 = denoise(z, t.repeat(len(z)), y)
        for _ in range(rounds):
            z0 = denoise(up(z, z0, schedule(t), schedule(s)), s.repeat(len(z)), y)
        z = up(z, z0, schedule(t), schedule(s))
    return z


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


def invert_mean(denoise, z, y, schedule, times, rounds=0):
    """Heun upwards, so to speak: the mean of both estimates."""
    for t, s in pairwise(times):
        now, nxt = schedule(t), schedule(s)
        first = denoise(z, t.expand(len(z)), y)
        there = step(z, first, now, nxt)
        for _ in range(rounds):
            there = step(z, (first + denoise(there, s.expand(len(z)), y)) / 2, now, nxt)
        z = there
    return z


def invert_one_round(denoise, z, y, schedule, times, rounds=0):
    return invert(denoise, z, y, schedule, times, min(rounds, 1))


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


def invert_all_steps(denoise, z, y, schedule, times, rounds=0):
    return [invert(denoise, z, y, schedule, times[: i + 1], rounds) for i in range(1, len(times))]


def invert_no_label(denoise, z, y, schedule, times, rounds=0):
    return invert(denoise, z, torch.full_like(y, 10), schedule, times, rounds)


ALSO_RIGHT = [
    ("07.1", torch.tensor(answer)), ("07.1", 0.139),
    ("07.2", by_parts), ("07.2", numerically), ("07.2", lambda h, h_last: (h - 1 + h / torch.expm1(h)) / h_last),
    ("07.3", heun_with()), ("07.3", heun_in_velocity), ("07.3", last_single),
    ("07.3", times_in_float32(heun)), ("07.4", times_in_float32(invert)),
    ("07.3", lambda *args: heun(*args).clone()),
    ("07.4", invert_by_hand), ("07.4", lambda *args, **named: invert(*args, **named) + 0),
]
WRONG = {
    "07.1": [
        (s4, "eta = 0 keeps"), (answer / s8, "factor of z_t"), (answer**2, "take the root"),
        (s4 * (a8 * s4 / s8 / a4) ** 2, "take the root"), (answer / s4, "is missing"), (0.3, "one step gives"),
        (s4**2 / answer, "is negative"), (-answer, "is negative"), (math.sqrt(s4**2 - answer**2), "this is tau"),
        (math.nan, "is negative"),
    ],
    "07.2": [
        (lambda h, h_last: h / (2 * h_last), "the chapter has"),
        (lambda h, h_last: h / h_last, "divide the integral"),
        (lambda h, h_last: (h / torch.expm1(h) - 1) / h_last, "a sign"),
        (lambda h, h_last: (1 - h / torch.expm1(h)) / h_last, "not exp(-u)"),
        (lambda h, h_last: (h * h.exp() - torch.expm1(h)) / h_last, "divide the integral"),
        (lambda h, h_last: (h / -torch.expm1(-h)) / h_last, "divide the integral"),
        (lambda h, h_last: (h / -torch.expm1(-h) - 1) * h_last, "slope of the line"),
        (lambda h, h_last: h / -torch.expm1(-h) - 1, "slope of the line"),
        (lambda h, h_last: (h / -torch.expm1(-h.float()) - 1) / h_last, "digits are lost"),
        (lambda h, h_last: exact_weight(h, h_last).mean(), "elementwise"),
        (weight_in_place, "out of place"),
    ],
    "07.3": [
        (heun_generator, "not a list"), (heun_with(always=True), "nothing to ask"),
        (heun_with(late=False), "its time s"),
        (heun_with(mean=lambda a, b: b), "mean of the two"), (heun_with(mean=lambda a, b: a + b), "mean of the two"),
        (heun_with(from_trial=True), "mean of the two"), (euler, "you spent"), (midpoint, "you spent"),
        (heun_in_place, "out of place"), (heun_one_time, "t.expand"), (heun_no_label, "with the y that was given"),
        (heun_last_twice, "you spent"), (heun_stops_before_the_end, "take the last step as well"),
    ],
    "07.4": [
        (invert_no_rounds, "one for each round"), (invert_round_from_there, "not from where it arrived"),
        (invert_round_old_time, "upper of its two times"), (invert_mean, "not from where it arrived"),
        (invert_one_round, "one for each round"), (invert_down, "the way goes up"),
        (invert_noisy, "without noise of your own"), (invert_asks_above, "ask before the step"),
        (invert_in_place, "out of place"), (invert_one_jump, "at the lower of its two times"),
        (invert_all_steps, "return the latent"), (invert_no_label, "with the y that was given"),
    ],
}
