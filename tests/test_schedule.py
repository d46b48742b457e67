"""The noise schedules hold their boundary values and identities, keep their digits near t = 0, and agree with the
published formulas, written out here a second time. from_betas has T + 1 knots with alpha_bar_0 = 1. Time grids fall, in
float64, and N steps are N + 1 times."""

from math import cos, log, pi

import pytest
import torch

from helpers_theory import normal
from ldm_minimal.schedule import (
    MIDDLE, SCHEDULES, add_noise, cosine, ddpm, from_betas, linear, log_snr, sigmoid, time_grid, time_of_log_snr, vp,
)

ALL = pytest.mark.parametrize("name", list(SCHEDULES))
LINEAR_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def times64(*values):
    return torch.tensor(values, dtype=torch.float64)


def inside(n=1001):
    """n times strictly inside (0, 1)."""
    return torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]


# ------------------------------------------------------------------------------------------------- the five schedules

@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_at_time_zero_are_free_of_noise(name, dtype):
    alpha, sigma = SCHEDULES[name](torch.zeros(1, dtype=dtype))
    assert alpha.item() == 1 and sigma.item() == 0


@pytest.mark.parametrize("name, alpha_end", [
    ("cosine", 0), ("linear", 0), ("sigmoid", 0), ("vp", 6.57e-3), ("ddpm", 6.35e-3),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_time_one_the_signal_is_gone_or_nearly_gone_and_not_negative(name, alpha_end, dtype):
    alpha, sigma = SCHEDULES[name](torch.ones(1, dtype=dtype))
    assert 0 <= alpha.item() == pytest.approx(alpha_end, abs=1e-5)
    assert sigma.item() == pytest.approx(1, abs=3e-5)


@ALL
def test_variance_is_preserved_or_the_path_is_straight(name):
    alpha, sigma = SCHEDULES[name](inside())
    total = alpha + sigma if name == "linear" else alpha**2 + sigma**2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)


@ALL
def test_log_snr_falls_strictly_from_plus_infinity(name):
    t = torch.cat([times64(0.0), inside()])
    clock = log_snr(*SCHEDULES[name](t))
    assert clock[0] == float("inf") and bool((clock.diff() < 0).all())


def test_log_snr_is_the_log_of_alpha_over_sigma():
    assert log_snr(times64(0.6), times64(0.8)).item() == pytest.approx(log(0.75), rel=1e-14)


@ALL
def test_float32_keeps_its_digits_near_time_zero(name):
    """1 - alpha_bar at t = 1e-6 is below float32's resolution next to 1: it must never be formed by a subtraction."""
    t = torch.logspace(-6, -1, 21, dtype=torch.float32)
    _, sigma = SCHEDULES[name](t)
    _, exact = SCHEDULES[name](t.double())
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule, slope", [(vp, 0.1), (ddpm, -1000 * torch.log1p(-LINEAR_BETAS[0]).item())])
def test_float64_keeps_its_digits_near_time_zero(schedule, slope):
    """sigma^2 = slope * t to first order, with a relative error below 1e-9 at t = 1e-12."""
    _, sigma = schedule(times64(1e-12))
    assert sigma.item() ** 2 == pytest.approx(slope * 1e-12, rel=1e-9, abs=0)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_goes_in_and_two_of_the_same_shape_and_dtype_come_out(name, dtype):
    for shape in [(), (5,), (2, 1, 3)]:
        t = torch.full(shape, 0.3, dtype=dtype)
        for rate in SCHEDULES[name](t):
            assert rate.shape == t.shape and rate.dtype == dtype
        one = [rate.double().item() for rate in SCHEDULES[name](times64(0.3))]
        assert [rate.flatten()[0].item() for rate in SCHEDULES[name](t)] == pytest.approx(one, rel=1e-6)


# --------------------------------------------------------------------------------------------- against their formulas

def test_cosine_is_a_quarter_turn():
    t = inside(99)
    alpha, sigma = cosine(t)
    expected = torch.polar(torch.ones_like(t), t * pi / 2)  # e^{i pi t / 2}
    torch.testing.assert_close(torch.complex(alpha, sigma), expected, rtol=0, atol=1e-15)


def test_linear_is_a_straight_line():
    alpha, sigma = linear(inside(99))
    assert torch.equal(sigma, inside(99)) and torch.equal(alpha, 1 - inside(99))


@pytest.mark.parametrize("start, end, tau", [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-3.0, 1.0, 0.4)])
def test_sigmoid_is_the_formula_of_chen_2023(start, end, tau):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)

    def logistic(x):
        return 1 / (1 + torch.exp(-torch.as_tensor(x, dtype=torch.float64)))

    first, last = logistic(start / tau), logistic(end / tau)
    alpha_bar = (last - logistic((t * (end - start) + start) / tau)) / (last - first)
    alpha, sigma = sigmoid(t, start, end, tau)
    torch.testing.assert_close(alpha**2, alpha_bar, rtol=0, atol=1e-14)
    torch.testing.assert_close(sigma**2, 1 - alpha_bar, rtol=0, atol=1e-14)


def test_vp_solves_its_differential_equation():
    """d log(alpha) / dt = -beta(t) / 2 with beta(t) = 0.1 + 19.9 t, checked by a central difference."""
    t, h = inside(50), 1e-5
    slope = (torch.log(vp(t + h)[0]) - torch.log(vp(t - h)[0])) / (2 * h)
    torch.testing.assert_close(slope, -0.5 * (0.1 + 19.9 * t), rtol=1e-8, atol=1e-8)


def test_discrete_betas_approach_vp_with_slope_one():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)

    def distance(steps):
        betas = torch.linspace(0.1, 20, steps, dtype=torch.float64) / steps
        return (from_betas(betas)(t)[0] - vp(t)[0]).abs().max()

    near, far = distance(4000), distance(1000)
    assert far < 3e-3
    assert torch.log(far / near).item() / log(4) == pytest.approx(1, abs=0.02)
    assert (ddpm(t)[0] - vp(t)[0]).abs().max() == far  # DDPM's thousand betas are the case of 1000 steps


# --------------------------------------------------------------------------------------------------- discrete betas

@pytest.mark.parametrize("betas", [LINEAR_BETAS, torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3], dtype=torch.float64)])
def test_betas_give_one_knot_more_than_there_are_betas_and_each_is_the_cumulative_product(betas):
    steps = len(betas)
    alpha_bar = torch.cat([times64(1.0), torch.cumprod(1 - betas, 0)])
    alpha, sigma = from_betas(betas)(torch.arange(steps + 1, dtype=torch.float64) / steps)
    torch.testing.assert_close(alpha**2, alpha_bar, rtol=1e-11, atol=0)
    torch.testing.assert_close(sigma**2, 1 - alpha_bar, rtol=1e-11, atol=1e-14)
    assert alpha[0] == 1 and sigma[0] == 0
    assert sigma[1].item() ** 2 == pytest.approx(betas[0].item(), rel=1e-12, abs=0)  # step 1 adds beta_1


def test_between_the_knots_log_alpha_is_a_straight_line():
    schedule = from_betas(times64(0.1, 0.5))
    left, middle, right = (torch.log(schedule(times64(t))[0]) for t in (0.5, 0.625, 1.0))
    torch.testing.assert_close(middle, 0.75 * left + 0.25 * right, rtol=1e-14, atol=0)


def test_ddpm_is_the_textbooks_thousand_betas():
    alpha, _ = ddpm(torch.arange(1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(alpha[1:] ** 2, torch.cumprod(1 - LINEAR_BETAS, 0), rtol=1e-11, atol=0)


SCALED_LINEAR = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion


@pytest.mark.parametrize("betas, alpha_end, digits", [
    (LINEAR_BETAS, 0.0064, 1e-4),
    (SCALED_LINEAR, 0.0683, 5e-5),
    (torch.linspace(1e-4, 0.02, 200), 0.1322**0.5, 1e-4),  # fewer steps with the same betas: another process,
    (torch.linspace(1e-4, 0.02, 100), 0.60, 5e-3),          # which does not end at noise
])
def test_how_much_signal_known_betas_leave_at_the_end(betas, alpha_end, digits):
    assert from_betas(betas)(times64(1.0))[0].item() == pytest.approx(alpha_end, abs=digits)


@pytest.mark.parametrize("betas", [
    [], [0.1, 0.0], [0.1, 1.0], [-0.1, 0.2], [0.1, 1.5], [0.1, float("nan")], [[0.1, 0.2]], 0.1,
])
def test_betas_outside_zero_to_one_or_of_wrong_shape_raise(betas):
    with pytest.raises(ValueError, match="betas"):
        from_betas(torch.tensor(betas))


# ---------------------------------------------------------------------------------------------------------- add_noise

@ALL
def test_add_noise_mixes_each_sample_at_its_own_time(name):
    z0, eps, t = normal(3, 2, 4, 5, seed=1), normal(3, 2, 4, 5, seed=2), times64(0.1, 0.5, 0.9)
    zt = add_noise(z0, eps, t, SCHEDULES[name])
    assert zt.shape == z0.shape
    for i in range(3):
        alpha, sigma = SCHEDULES[name](t[i])
        torch.testing.assert_close(zt[i], alpha * z0[i] + sigma * eps[i], rtol=0, atol=1e-15)


def test_add_noise_has_the_mean_and_the_variance_of_the_forward_process():
    """n = 40,000: the bands are 5 standard errors wide, a false alarm has probability below 1e-6."""
    n = 40_000
    for name in SCHEDULES:
        zt = add_noise(torch.full((1, n), 2.0).double(), normal(1, n, seed=3), times64(0.4), SCHEDULES[name])
        alpha, sigma = (rate.item() for rate in SCHEDULES[name](times64(0.4)))
        assert zt.mean().item() == pytest.approx(2 * alpha, abs=5 * sigma / n**0.5)
        assert zt.var().item() == pytest.approx(sigma**2, rel=5 * (2 / n) ** 0.5)


@pytest.mark.parametrize("z0, eps, t", [((2, 1, 4, 5), (2, 1, 5, 4), (2,)), ((2, 1, 4, 5), (2, 1, 4, 5), (3,)),
                                        ((2, 1, 4, 5), (2, 1, 4, 5), (1,)), ((2, 1, 4, 5), (2, 1, 4, 5), ()),
                                        ((2, 1, 4, 5), (1, 1, 4, 5), (2,))])
def test_add_noise_names_the_shapes_that_do_not_fit(z0, eps, t):
    with pytest.raises(ValueError) as error:
        add_noise(torch.zeros(z0), torch.zeros(eps), torch.full(t, 0.5), cosine)
    assert all(str(shape) in str(error.value) for shape in (z0, eps, t))


def test_a_step_number_is_not_taken_for_a_time():
    """Whole numbers would all be times after the end: nothing but zeros from ddpm, other nonsense elsewhere."""
    k, zero = torch.tensor([0, 500]), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="k / T and not a step number"):
        add_noise(zero, zero, k, cosine)
    with pytest.raises(ValueError, match="k / T and not a step number"):
        ddpm(k)


# --------------------------------------------------------------------------------------------- the clock and the grids

@ALL
def test_time_of_log_snr_and_log_snr_are_inverse(name):
    t = torch.linspace(0.002, 0.999, 50, dtype=torch.float64)
    clock = log_snr(*SCHEDULES[name](t))
    back = time_of_log_snr(clock, SCHEDULES[name])
    assert back.dtype == torch.float64
    torch.testing.assert_close(back, t, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_snr(*SCHEDULES[name](back)), clock, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_time_grid_is_uniform_and_visits_both_ends(steps):
    times = time_grid(steps)
    assert times.dtype == torch.float64 and times.device.type == "cpu"
    torch.testing.assert_close(times, times64(*[1 - i / steps for i in range(steps + 1)]), rtol=0, atol=1e-15)
    assert times[0] == 1 and times[-1] == 0


def test_a_time_grid_can_start_late_and_end_early():
    torch.testing.assert_close(time_grid(3, start=0.8, end=0.2), times64(0.8, 0.6, 0.4, 0.2), rtol=0, atol=1e-15)


@ALL
def test_a_log_snr_grid_is_uniform_in_log_snr(name):
    schedule = SCHEDULES[name]
    times = time_grid(9, schedule, "log_snr", start=0.9, end=0.1)
    assert times.dtype == torch.float64 and len(times) == 10 and bool((times.diff() < 0).all())
    assert [times[0].item(), times[-1].item()] == pytest.approx([0.9, 0.1], abs=1e-14)
    steps = log_snr(*schedule(times)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(9), rtol=1e-10, atol=0)


@ALL
def test_a_log_snr_grid_down_to_the_data_runs_to_0_002_and_then_lands(name):
    schedule = SCHEDULES[name]
    times = time_grid(9, schedule, "log_snr")
    assert len(times) == 10 and bool((times.diff() < 0).all())
    assert times[0] == 1 and times[-1] == 0 and times[-2].item() == pytest.approx(0.002, abs=1e-12)
    steps = log_snr(*schedule(times[1:-1])).diff()
    torch.testing.assert_close(steps, steps.mean().expand(7), rtol=1e-10, atol=0)
    assert torch.equal(time_grid(1, schedule, "log_snr"), times64(1.0, 0.0))


@pytest.mark.parametrize("start, end", [(1.0, 0.001), (0.0015, 0.0), (0.0019, 0.0005), (1.0, 0.9995)])
def test_a_log_snr_grid_near_the_ends_still_falls_from_start_to_end(start, end):
    times = time_grid(4, cosine, "log_snr", start=start, end=end)
    assert bool((times.diff() < 0).all())
    assert [times[0].item(), times[-1].item()] == pytest.approx([start, end], abs=1e-12)


@pytest.mark.parametrize("steps", [0, -1, 2.5, 10.0, True, "10", None])
def test_steps_that_are_no_whole_number_above_zero_raise(steps):
    with pytest.raises(ValueError, match=f"steps.*{steps!r}"):
        time_grid(steps)


@pytest.mark.parametrize("start, end", [
    (0.0, 0.0), (0.5, 0.5), (0.2, 0.8), (1.1, 0.0), (1.0, -0.1), (float("nan"), 0.0),
])
def test_a_grid_that_does_not_fall_inside_zero_to_one_raises(start, end):
    with pytest.raises(ValueError, match=f"start={start} and end={end}"):
        time_grid(5, start=start, end=end)


def test_an_unknown_spacing_raises_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="karras.*time, log_snr"):
        time_grid(5, cosine, "karras")


@pytest.mark.parametrize("spacing", ["log_snr", "middle"])
def test_a_grid_in_log_snr_without_its_schedule_is_refused(spacing):
    with pytest.raises(ValueError, match=f"{spacing}.*needs the schedule"):
        time_grid(5, spacing=spacing)


# ---------------------------------------------------------------------------------------------- facts about schedules

def test_where_the_eps_target_amplifies_errors():
    """z0 = (z_t - sigma out) / alpha: an error grows by sigma / alpha, 157x at DDPM's end, 637x for cosine at 0.999."""
    assert torch.exp(-log_snr(*ddpm(times64(1.0)))).item() == pytest.approx(157, abs=0.6)
    assert torch.exp(-log_snr(*cosine(times64(0.999)))).item() == pytest.approx(637, abs=0.6)


def nichol_dhariwal_betas(steps=1000, offset=0.008):
    """2102.09672, eq. 17 with its clipping at 0.999."""
    f = [cos((i / steps + offset) / (1 + offset) * pi / 2) ** 2 for i in range(steps + 1)]
    return times64(*[min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)])


def test_cosine_agrees_with_the_papers_discrete_cosine_up_to_its_offset():
    t = torch.arange(1001, dtype=torch.float64) / 1000
    discrete = from_betas(nichol_dhariwal_betas())
    assert (discrete(t)[0] - cosine(t)[0]).abs().max() < 0.013  # the offset of 0.008 moves t by at most 0.008
    assert discrete(times64(1.0))[0].item() == pytest.approx(4.9e-5, rel=0.01)


@pytest.mark.parametrize("schedule, expected", [
    (ddpm, 0.276), (from_betas(SCALED_LINEAR), 0.373), (from_betas(nichol_dhariwal_betas()), 0.496), (cosine, 0.4995),
])
def test_the_mean_of_alpha_bar_over_the_thousand_steps(schedule, expected):
    """The least noise-prediction error that is possible on N(0, I) latents; cosine without offset has 1/2 - 1/2000."""
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert (schedule(t)[0] ** 2).mean().item() == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_the_middle_grid_is_even_in_log_snr_inside_and_reaches_both_ends(name, steps):
    schedule = SCHEDULES[name]
    times = time_grid(steps, schedule, "middle")
    assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
    middle = log_snr(*schedule(times[1:-1]))
    assert torch.all(middle > MIDDLE[0]) and abs(middle[-1].item() - MIDDLE[1]) < 1e-3
    if steps > 2:
        assert torch.allclose(middle.diff(), torch.tensor((MIDDLE[1] - MIDDLE[0]) / (steps - 1)).double(), atol=1e-3)


def test_the_middle_grid_between_other_ends():
    assert time_grid(1, cosine, "middle").tolist() == [1, 0]
    part = time_grid(4, cosine, "middle", 0.6, 0.3)  # all of it within the middle: no landing
    assert part[0] == 0.6 and abs(part[-1].item() - 0.3) < 1e-9
    assert log_snr(*cosine(part)).diff().std() < 1e-6
    beyond = time_grid(4, cosine, "middle", 0.04, 0.0)  # all of it nearer to the data than the middle: uniform in t
    assert torch.allclose(beyond, torch.linspace(0.04, 0, 5, dtype=torch.float64))
