"""One step is every sampler. On Gaussian data, where the denoiser and the ODE map are closed form, the error falls with
slope 1 (order 1) and 2 (order 2), with and without noise. Steps go from grid point to grid point, N steps cost N
evaluations, the last one lands on z0_hat without noise, and no history is left from an earlier call."""

from itertools import pairwise
from math import log

import pytest
import torch

from helpers_theory import BestNet, Gaussian, TinyNet, normal
from ldm_minimal.denoiser import TARGETS, Denoiser
from ldm_minimal.guidance import guide
from ldm_minimal.sampler import SOLVERS, sample, sample_noise, step
from ldm_minimal.schedule import SCHEDULES, cosine, ddpm, linear, time_grid

EACH = pytest.mark.parametrize("name", list(SCHEDULES))
EVERY_SOLVER = pytest.mark.parametrize("solver", list(SOLVERS))
GAUSSIAN = Gaussian(0.7, 0.4)


def last(steps):
    """The final sample of a run."""
    for zt, _ in steps:
        pass
    return zt


def slope(errors):
    """How fast the error falls between the last two runs, of which the second has twice the steps."""
    return log(errors[-2] / errors[-1]) / log(2)


def times64(*values):
    return torch.tensor(values, dtype=torch.float64)


def noise_maker(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------- the golden test

@EACH
@pytest.mark.parametrize("order", [1, 2])
def test_without_noise_the_error_against_the_exact_ode_falls_with_slope(name, order):
    schedule, start, errors = SCHEDULES[name], torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], []
    for steps in (160, 320):
        times = time_grid(steps, schedule, "log_snr", start=0.98, end=0.02)
        exact = GAUSSIAN.flow_map(start, schedule(times[0]), schedule(times[-1]))
        found = last(sample(GAUSSIAN.denoiser(schedule), start, None, schedule, times, 0.0, order))
        errors.append((found - exact).abs().max().item())
    assert slope(errors) == pytest.approx(order, abs=0.04)
    assert errors[-1] < (6e-3 if order == 1 else 4e-5)


def moments(schedule, times, eta, order):
    """Mean and std of what the sampler makes of z ~ the exact marginal at times[0], without drawing a number.

    The denoiser is affine, so the sample is an affine function of the start and of the noises. Row 0 starts one std
    off, row k has noise 1 in step k, the last row has neither: it ends at the mean, and the squared distances of the
    others from it add up to the variance.
    """
    now = schedule(times[0])
    start = torch.zeros(len(times) + 1, 1, dtype=torch.float64)
    start[0] = GAUSSIAN.std_at(*now)
    draws = iter(torch.eye(len(times) + 1, dtype=torch.float64)[1:, :, None])
    out = last(sample(GAUSSIAN.denoiser(schedule), start + now[0] * GAUSSIAN.mean, None, schedule, times, eta, order,
                      lambda: next(draws)))
    return out[-1].item(), (out[:-1] - out[-1]).square().sum().sqrt().item()


@EACH
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_with_noise_the_mean_is_exact_and_the_error_of_the_std_falls_with_slope(name, eta, order):
    schedule, errors = SCHEDULES[name], []
    for steps in (160, 320):
        times = time_grid(steps, schedule, "log_snr", start=0.98, end=0.02)
        mean, std = moments(schedule, times, eta, order)
        end = schedule(times[-1])
        assert mean == pytest.approx(end[0].item() * GAUSSIAN.mean, rel=1e-11)
        errors.append(abs(std - GAUSSIAN.std_at(*end).item()))
    assert slope(errors) == pytest.approx(order, abs=0.05)
    assert errors[-1] < (6e-3 if order == 1 else 5e-5)


@EACH
@EVERY_SOLVER
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
def test_from_pure_noise_to_data_every_solver_ends_at_the_mean_and_std_of_the_data(name, solver, spacing):
    mean, std = moments(SCHEDULES[name], time_grid(300, SCHEDULES[name], spacing), *SOLVERS[solver])
    assert mean == pytest.approx(0.7, rel=1e-11)
    assert std == pytest.approx(0.4, rel=0.03)


# ----------------------------------------------------------------------------------------------------------- one step

@EACH
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_with_the_true_z0_stays_on_the_forward_process(name, eta):
    """z_s = alpha_s z0 + c eps + tau noise with c^2 + tau^2 = sigma_s^2: z_s has the distribution q(z_s | z0)."""
    now, nxt = SCHEDULES[name](times64(0.8)), SCHEDULES[name](times64(0.5))
    zero = times64(0.0)
    z0_part = step(now[0], times64(1.0), now, nxt, eta, zero)
    eps_part = step(now[1], zero, now, nxt, eta, zero)
    noise_part = step(zero, zero, now, nxt, eta, times64(1.0))
    torch.testing.assert_close(z0_part, nxt[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(eps_part**2 + noise_part**2, nxt[1]**2, rtol=1e-14, atol=0)
    assert bool(noise_part > 0) == (eta > 0)
    full = step(zero, zero, now, nxt, 1.0, times64(1.0))
    torch.testing.assert_close(noise_part, eta * full, rtol=1e-14, atol=0)  # eta scales the standard deviation


def test_at_eta_one_a_step_is_the_posterior_of_ddpm_written_with_betas():
    """2006.11239, eq. 7: mean and variance of q(z_{k-1} | z_k, z0) for each of the thousand steps."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cat([times64(1.0), torch.cumprod(1 - betas, 0)])
    z0, zt = times64(0.3), times64(-1.1)
    for k in range(1, 1001):
        now, nxt = ddpm(times64(k / 1000)), ddpm(times64((k - 1) / 1000))
        beta, alpha = betas[k - 1], 1 - betas[k - 1]
        mean = bar[k - 1].sqrt() * beta / (1 - bar[k]) * z0 + alpha.sqrt() * (1 - bar[k - 1]) / (1 - bar[k]) * zt
        variance = (1 - bar[k - 1]) / (1 - bar[k]) * beta
        found = step(zt, z0, now, nxt, 1.0, 0.0)
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=0)
        tau = step(zt, z0, now, nxt, 1.0, 1.0) - found
        torch.testing.assert_close(tau**2, variance.reshape(1), rtol=1e-8, atol=1e-17)


@EACH
def test_over_a_wide_step_the_added_variance_is_sigma_squared_times_one_minus_the_snr_ratio(name):
    """The share of eta: tau^2 = eta^2 sigma_s^2 (1 - SNR_t / SNR_s)."""
    (alpha, sigma), (alpha_s, sigma_s) = now, nxt = SCHEDULES[name](times64(0.9)), SCHEDULES[name](times64(0.2))
    tau = step(times64(0.0), times64(0.0), now, nxt, 0.6, 1.0)
    snr_ratio = (alpha / sigma) ** 2 / (alpha_s / sigma_s) ** 2
    torch.testing.assert_close(tau**2, 0.36 * sigma_s**2 * (1 - snr_ratio), rtol=1e-12, atol=0)


@EACH
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_tiny_step_is_finite(name, eta):
    """1 - SNR_t / SNR_s is rounding noise there, and must not turn negative under the root."""
    for t in torch.linspace(0.01, 1, 100, dtype=torch.float64):
        for gap in (1e-16, 1e-13, 1e-9):
            z = step(times64(1.0), times64(0.5), SCHEDULES[name](t), SCHEDULES[name](t - gap), eta, 1.0)
            assert bool(z.isfinite().all())


def test_on_the_straight_path_a_step_without_noise_is_euler_for_the_flow_velocity():
    """The network predicts eps - z0 = dz/dt; z_s = z_t + (s - t) velocity."""
    times, zt = time_grid(7), normal(2, 2, 4, 5)
    net, y = TinyNet(), torch.tensor([0, 1])
    expected = zt
    for t, s in pairwise(times):
        expected = expected + (s - t) * net(expected, t.expand(2), y)
    found = last(sample(Denoiser(net, linear, "flow"), zt, y, linear, times))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_order_two_extrapolates_z0_by_half_the_step_over_the_last_step():
    """DPM-Solver++(2M) on an uneven grid, with the coefficients of 2211.01095, algorithm 2, written out."""
    times, zt, y = times64(0.9, 0.7, 0.6, 0.2), normal(3, 1, 4, 5), torch.tensor([0, 1, 2])
    denoise = Denoiser(TinyNet(channels=1), cosine)
    rates = [cosine(t) for t in times]
    clock = [torch.log(alpha / sigma) for alpha, sigma in rates]
    z, old = zt, None
    for i in range(3):
        h = clock[i + 1] - clock[i]
        z0 = denoise(z, times[i].expand(3), y)
        r = None if old is None else (clock[i] - clock[i - 1]) / h
        d = z0 if old is None else (1 + 1 / (2 * r)) * z0 - 1 / (2 * r) * old
        z, old = rates[i + 1][1] / rates[i][1] * z - rates[i + 1][0] * torch.expm1(-h) * d, z0
    torch.testing.assert_close(last(sample(denoise, zt, y, cosine, times, order=2)), z, rtol=0, atol=1e-13)


# ----------------------------------------------------------------------------------------------------------- the loop

class Recorder:
    """A denoiser that keeps the latents and times that it is asked about."""

    def __init__(self, denoise):
        self.denoise, self.latents, self.times, self.answers = denoise, [], [], []

    def __call__(self, zt, t, y):
        self.latents.append(zt)
        self.times.append(t)
        self.answers.append(self.denoise(zt, t, y))
        return self.answers[-1]


@EVERY_SOLVER
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_n_steps_are_n_evaluations_one_at_each_grid_point_but_the_last(solver, steps):
    denoise, times = Recorder(GAUSSIAN.denoiser(cosine)), time_grid(steps)
    seen = list(sample(denoise, normal(3, 1), None, cosine, times, *SOLVERS[solver]))
    assert len(seen) == len(denoise.times) == steps
    for asked, t in zip(denoise.times, times):
        assert asked.dtype == torch.float64 and asked.tolist() == [t.item()] * 3


@EACH
def test_each_step_goes_to_the_next_grid_point_on_an_uneven_grid(name):
    """Where the denoiser knows z0, the path without noise is alpha z0 + sigma eps at exactly the times of the grid."""
    schedule, times = SCHEDULES[name], times64(0.97, 0.9, 0.5, 0.47, 0.1, 0.0)
    z0, eps = normal(2, 1, 4, 5, seed=1), normal(2, 1, 4, 5, seed=2)
    path = [rate[0] * z0 + rate[1] * eps for rate in map(schedule, times)]
    for order in (1, 2):
        denoise = Recorder(lambda zt, t, y: z0)
        found = [zt for zt, _ in sample(denoise, path[0], None, schedule, times, 0.0, order)]
        for got, expected in zip(found, path[1:]):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        for asked, expected in zip(denoise.latents, path):
            torch.testing.assert_close(asked, expected, rtol=0, atol=1e-12)


@EACH
@EVERY_SOLVER
def test_the_last_step_lands_on_z0_hat_exactly_and_draws_no_noise(name, solver):
    denoise, draws = Recorder(GAUSSIAN.denoiser(SCHEDULES[name])), []

    def randn():
        draws.append(normal(3, 1, seed=len(draws)))
        return draws[-1]

    eta, order = SOLVERS[solver]
    *_, (zt, z0) = sample(denoise, normal(3, 1), None, SCHEDULES[name], time_grid(6), eta, order, randn)
    assert torch.equal(z0, denoise.answers[-1])  # not extrapolated
    torch.testing.assert_close(zt, z0, rtol=0, atol=1e-15)
    assert len(draws) == (5 if eta else 0)


def test_each_step_yields_the_estimate_that_it_was_made_from():
    denoise = Recorder(GAUSSIAN.denoiser(cosine))
    yielded = [z0 for _, z0 in sample(denoise, normal(3, 1), None, cosine, time_grid(5), order=2)]
    assert len(yielded) == 5 and all(torch.equal(z0, answer) for z0, answer in zip(yielded, denoise.answers))


def test_the_first_step_is_first_order_also_after_an_earlier_run():
    denoise, zt, times = Denoiser(TinyNet(), cosine), normal(2, 2, 4, 5), time_grid(4, start=0.9)
    y = torch.tensor([0, 1])
    alone = [z for z, _ in sample(denoise, zt, y, cosine, times, order=2)]
    last(sample(denoise, normal(2, 2, 4, 5, seed=9), y, cosine, times, order=2))
    again = [z for z, _ in sample(denoise, zt, y, cosine, times, order=2)]
    first = [z for z, _ in sample(denoise, zt, y, cosine, times, order=1)]
    assert torch.equal(alone[0], first[0]) and not torch.allclose(alone[1], first[1])
    assert all(torch.equal(a, b) for a, b in zip(alone, again))


def test_two_runs_in_turn_do_not_mix_their_histories():
    denoise, y, times = Denoiser(TinyNet(), cosine), torch.tensor([0, 1]), time_grid(4, start=0.9)
    starts = normal(2, 2, 4, 5, seed=1), normal(2, 2, 4, 5, seed=2)
    alone = [last(sample(denoise, z, y, cosine, times, order=2)) for z in starts]
    for ends in zip(*(sample(denoise, z, y, cosine, times, order=2) for z in starts)):
        pass
    assert all(torch.equal(end[0], expected) for end, expected in zip(ends, alone))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_start_is_not_overwritten_and_its_precision_is_kept(order, eta):
    zt = normal(2, 1, 4, 5).float()
    before = zt.clone()
    denoise = GAUSSIAN.denoiser(lambda t: [rate.float() for rate in cosine(t)])
    out = last(sample(denoise, zt, None, cosine, time_grid(3), eta, order))
    assert torch.equal(zt, before) and out.dtype == torch.float32 and out.shape == zt.shape


def test_noise_comes_from_the_callers_source_and_otherwise_from_the_global_seed():
    def run(randn=None):
        return last(sample(GAUSSIAN.denoiser(cosine), normal(3, 1), None, cosine, time_grid(5), 1.0, 1, randn))

    assert torch.equal(run(noise_maker((3, 1), 1)), run(noise_maker((3, 1), 1)))
    assert not torch.equal(run(noise_maker((3, 1), 1)), run(noise_maker((3, 1), 2)))
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first) and not torch.equal(first, second)


@pytest.mark.parametrize("times", [
    [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.4, 0.0], [1.0, float("nan"), 0.0], [1.0], [],
    [[1.0, 0.5], [0.9, 0.2]], [999.0, 500.0, 0.0], [1.0, -0.5],
])
def test_times_that_do_not_fall_raise(times):
    with pytest.raises(ValueError, match="times must fall"):
        next(sample(GAUSSIAN.denoiser(cosine), normal(3, 1), None, cosine, torch.tensor(times), 0.0, 1))


@pytest.mark.parametrize("order", [0, 3])
def test_an_order_other_than_one_or_two_raises(order):
    with pytest.raises(ValueError, match=f"order.*{order}"):
        next(sample(GAUSSIAN.denoiser(cosine), normal(3, 1), None, cosine, time_grid(3), 0.0, order))


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_outside_zero_to_one_raises(eta):
    with pytest.raises(ValueError, match=f"eta.*{eta}"):
        next(sample(GAUSSIAN.denoiser(cosine), normal(3, 1), None, cosine, time_grid(3), eta, 1))


def test_the_solvers_are_pairs_of_eta_and_order():
    assert SOLVERS == {"ddpm": (1.0, 1), "ddim": (0.0, 1), "dpm++2m": (0.0, 2), "sde-dpm++2m": (1.0, 2)}


# ------------------------------------------------------------------------------------------- the axes are independent

@EACH
@pytest.mark.parametrize("target", list(TARGETS))
@EVERY_SOLVER
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
def test_every_schedule_target_and_solver_runs_from_pure_noise_with_and_without_guidance(name, target, solver, spacing):
    denoise = Denoiser(TinyNet(dtype=torch.float32), SCHEDULES[name], target)
    zt, y = normal(2, 2, 4, 5, dtype=torch.float32), torch.tensor([0, 2])
    times = time_grid(4, SCHEDULES[name], spacing)
    with torch.no_grad():
        plain, guided = (last(sample(denoiser, zt, y, SCHEDULES[name], times, *SOLVERS[solver],
                                     lambda: normal(2, 2, 4, 5, seed=3, dtype=torch.float32)))
                         for denoiser in (denoise, guide(denoise, denoise.null, 2.0)))
    for out in (plain, guided):
        assert out.shape == (2, 2, 4, 5) and out.dtype == torch.float32 and bool(out.isfinite().all())
    assert not torch.allclose(plain, guided)


@EACH
@pytest.mark.parametrize("target", list(TARGETS))
@EVERY_SOLVER
def test_the_sample_does_not_depend_on_what_a_perfect_network_predicts(name, target, solver):
    """The best eps, x0, v or flow for Gaussian data all stand for the same z0_hat, so the sample is the same."""
    schedule, zt, y = SCHEDULES[name], normal(2, 2, 4, 5), torch.tensor([0, 1])
    denoisers = Denoiser(BestNet(GAUSSIAN, schedule, target), schedule, target), GAUSSIAN.denoiser(schedule)
    times = time_grid(5, start=0.98)
    found, expected = (last(sample(denoise, zt, y, schedule, times, *SOLVERS[solver], noise_maker(zt.shape)))
                       for denoise in denoisers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------- noises

def test_the_noise_of_a_sample_depends_on_the_seed_and_its_index_alone():
    """Split, reorder or enlarge the batch: sample i keeps its noise, in the first draw and in the later ones."""
    whole, left, right, mixed = (sample_noise(3, i, (2, 4, 5)) for i in (range(6), range(4), range(4, 6), [5, 0, 3]))
    for _ in range(3):
        batch = whole()
        assert batch.shape == (6, 2, 4, 5)
        assert torch.equal(torch.cat([left(), right()]), batch) and torch.equal(mixed(), batch[[5, 0, 3]])


def test_samples_seeds_and_draws_all_differ():
    """Also (seed, i) and (seed + 1, i - 1), or (0, 1000) and (1, 0), which a careless sum of the two would confuse."""
    indices = [*range(50), 100, 1_000, 10_000, 100_000]
    firsts = [sample_noise(seed, indices, (3,))() for seed in range(20)]
    draw = sample_noise(0, indices, (3,))
    draw()
    values = torch.cat([*firsts, draw()])
    assert len(values.unique(dim=0)) == 21 * len(indices)


def test_the_noise_is_standard_normal_and_independent_across_samples():
    """20,000 values: bands of 5 standard errors, false alarm below 1e-6 for each."""
    noise = sample_noise(1, range(100), (200,))()
    assert noise.mean().abs() < 5 / 20_000**0.5
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / 20_000) ** 0.5)
    assert noise.mean(0).var().item() == pytest.approx(1 / 100, rel=5 * (2 / 199) ** 0.5)


@EVERY_SOLVER
def test_a_sample_is_the_same_in_a_batch_of_six_and_in_batches_of_four_and_two(solver):
    """Start and step noise come from one source for each sample; here the denoiser works value by value."""
    def run(indices):
        randn = sample_noise(7, indices, (2, 4, 5))
        zt, times = randn().double(), time_grid(5)
        return last(sample(GAUSSIAN.denoiser(cosine), zt, None, cosine, times, *SOLVERS[solver], randn))

    assert torch.equal(run(range(6)), torch.cat([run(range(4)), run(range(4, 6))]))


def test_a_deterministic_step_goes_up_to_more_noise_and_back():
    """DDIM inversion: the same estimate of z0, one step up and one down, ends where it began."""
    z0, zt = torch.full((2, 1, 2, 2), 0.3, dtype=torch.float64), torch.full((2, 1, 2, 2), 0.9, dtype=torch.float64)
    low, high = (cosine(torch.tensor(t, dtype=torch.float64)) for t in (0.4, 0.7))
    up = step(zt, z0, low, high)
    assert torch.isfinite(up).all() and not torch.allclose(up, zt)
    torch.testing.assert_close(step(up, z0, high, low), zt)
