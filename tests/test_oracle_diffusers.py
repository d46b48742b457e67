"""Where conventions agree, our steps equal those of the library diffusers to rounding: DDPM, DDIM(eta), DPM-Solver++
(2M) and its SDE form, Euler for flow matching, the forward process, the velocity, the time embedding. Its timestep k is
our knot t = (k + 1) / T. Its table of alpha_bar is replaced by the same one in float64, so that rounding means 1e-8 or
less, unless a test says otherwise."""

import pytest
import torch

from ldm_minimal.denoiser import TARGETS
from ldm_minimal.layers import timestep_embedding
from ldm_minimal.sampler import sample, step
from ldm_minimal.schedule import add_noise, cosine, expand, from_betas, linear, log_snr, time_grid

diffusers = pytest.importorskip("diffusers", reason="the library diffusers, the oracle here, is not installed")

T = 1000
BETAS = {
    "linear": torch.linspace(1e-4, 0.02, T, dtype=torch.float64),
    "scaled_linear": torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2,
}
EACH = pytest.mark.parametrize("betas", list(BETAS))


def normal(seed, *shape):
    return torch.randn(shape or (2, 3, 4, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(kind, betas, **options):
    """A scheduler of diffusers over our betas, with its table of alpha_bar in float64."""
    scheduler = getattr(diffusers, kind)(num_train_timesteps=T, trained_betas=BETAS[betas].tolist(), **options)
    scheduler.alphas_cumprod = torch.cumprod(1 - BETAS[betas], 0)
    return scheduler


def knot(timesteps):
    return (torch.as_tensor(timesteps, dtype=torch.float64) + 1) / T


def network(zt, t):
    """Any smooth function of z_t and t does; the steps do not know what the network learned."""
    return torch.sin(2 * zt + expand(t, zt)) - 0.3 * zt


def eps_denoiser(schedule):
    """`network`, read as a prediction of eps, as a denoiser."""
    def denoise(zt, t, y):
        alpha, sigma = schedule(expand(t, zt))
        return (zt - sigma * network(zt, t)) / alpha

    return denoise


def grid_of(scheduler):
    """The times that our sampler needs to visit the scheduler's timesteps and then the data."""
    return torch.cat([knot(scheduler.timesteps), torch.zeros(1, dtype=torch.float64)])


# --------------------------------------------------------------------------------------------------- forward process

@EACH
def test_add_noise_and_velocity(betas):
    scheduler, schedule = oracle("DDPMScheduler", betas), from_betas(BETAS[betas])
    z0, eps, timesteps = normal(1, 5, 3, 4, 5), normal(2, 5, 3, 4, 5), torch.tensor([0, 1, 400, 998, 999])
    ours = add_noise(z0, eps, knot(timesteps), schedule)
    torch.testing.assert_close(ours, scheduler.add_noise(z0, eps, timesteps), rtol=0, atol=1e-12)
    a, b = TARGETS["v"](*schedule(expand(knot(timesteps), z0)))
    torch.testing.assert_close(a * z0 + b * eps, scheduler.get_velocity(z0, eps, timesteps), rtol=0, atol=1e-12)


def test_diffusers_own_float32_betas_are_ours():
    for name, options in [("linear", {}), ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012})]:
        theirs = diffusers.DDPMScheduler(beta_schedule=name, **options).alphas_cumprod.double()
        alpha, _ = from_betas(BETAS[name])(knot(range(T)))
        torch.testing.assert_close(alpha**2, theirs, rtol=2e-4, atol=0)


def test_flow_matching_noises_along_the_straight_line():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T)
    z0, eps, t = normal(1, 3, 3, 4, 5), normal(2, 3, 3, 4, 5), torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    theirs = scheduler.scale_noise(z0, (t * T).float(), eps)
    torch.testing.assert_close(add_noise(z0, eps, t, linear), theirs, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- DDPM

@EACH
@pytest.mark.parametrize("steps", [1000, 50])
def test_ddpm_step_mean_and_variance(betas, steps):
    """fixed_small is the posterior variance, our eta = 1. At its timestep 0 both add no noise."""
    scheduler = oracle("DDPMScheduler", betas, clip_sample=False, variance_type="fixed_small", prediction_type="sample",
                       timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule, times, zt, z0 = from_betas(BETAS[betas]), grid_of(scheduler), normal(1), normal(2)
    for i in (0, 1, steps // 2, steps - 2, steps - 1):
        k = int(scheduler.timesteps[i])
        noise = normal(7) if i < steps - 1 else 0.0
        ours = step(zt, z0, schedule(times[i]), schedule(times[i + 1]), 1.0, noise)
        theirs = scheduler.step(z0, k, zt, generator=torch.Generator().manual_seed(7)).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@EACH
@pytest.mark.parametrize("steps", [50, 8])
def test_a_whole_ddpm_run(betas, steps):
    scheduler = oracle("DDPMScheduler", betas, clip_sample=False, variance_type="fixed_small",
                       timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule, zt = from_betas(BETAS[betas]), normal(1)
    theirs, source = zt, torch.Generator().manual_seed(7)
    for k in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, knot(k).expand(2)), int(k), theirs, generator=source).prev_sample
    source = torch.Generator().manual_seed(7)
    *_, (ours, _) = sample(eps_denoiser(schedule), zt, None, schedule, grid_of(scheduler), 1.0, 1,
                           lambda: torch.randn(zt.shape, generator=source, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


# -------------------------------------------------------------------------------------------------------------- DDIM

@EACH
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [50, 8])
def test_a_whole_ddim_run(betas, eta, steps):
    scheduler = oracle("DDIMScheduler", betas, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule, zt, noises = from_betas(BETAS[betas]), normal(1), [normal(100 + i) for i in range(steps)]
    theirs = zt
    for k, noise in zip(scheduler.timesteps, noises):
        eps = network(theirs, knot(k).expand(2))
        theirs = scheduler.step(eps, int(k), theirs, eta=eta, variance_noise=noise if eta else None).prev_sample
    draws = iter(noises)
    *_, (ours, _) = sample(eps_denoiser(schedule), zt, None, schedule, grid_of(scheduler), eta, 1, lambda: next(draws))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_trailing_timesteps_are_our_uniform_grid_and_leading_ones_never_visit_the_noisiest():
    scheduler = oracle("DDIMScheduler", "linear", timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    torch.testing.assert_close(grid_of(scheduler), time_grid(50), rtol=0, atol=1e-14)
    leading = oracle("DDIMScheduler", "linear", timestep_spacing="leading")
    leading.set_timesteps(50)
    assert leading.timesteps.max() == 980 and scheduler.timesteps.max() == 999


# ------------------------------------------------------------------------------------------------------ DPM-Solver++

def dpm_solver(betas, algorithm, timesteps):
    scheduler = oracle("DPMSolverMultistepScheduler", betas, algorithm_type=algorithm, solver_order=2,
                       solver_type="midpoint", final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=timesteps)
    return scheduler


EVEN, UNEVEN = [999, 874, 749, 624, 499, 374, 249, 124], [999, 900, 640, 600, 333, 200, 90, 20]


@EACH
@pytest.mark.parametrize("timesteps", [EVEN, UNEVEN])
@pytest.mark.parametrize("algorithm, eta", [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_a_whole_dpm_solver_run_of_order_two(betas, timesteps, algorithm, eta):
    """diffusers keeps the state in float32 here, so the runs agree to 1e-5. First and last step are first order."""
    scheduler, schedule = dpm_solver(betas, algorithm, timesteps), from_betas(BETAS[betas])
    zt, noises = normal(1), [normal(100 + i) for i in timesteps]
    theirs = zt.float()
    for k, noise in zip(scheduler.timesteps, noises):
        eps = network(theirs, knot(k).float().expand(2))
        theirs = scheduler.step(eps, k, theirs, variance_noise=noise if eta else None).prev_sample
    draws = iter(noises)
    *_, (ours, _) = sample(eps_denoiser(schedule), zt, None, schedule, grid_of(scheduler), eta, 2, lambda: next(draws))
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("algorithm, eta", [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_one_dpm_solver_step_of_order_two_in_float64(betas, algorithm, eta):
    """The update itself, for z0_hat, its predecessor and the noise given: mean and noise both."""
    scheduler, schedule = dpm_solver(betas, algorithm, UNEVEN), from_betas(BETAS[betas])
    rates = [schedule(t) for t in knot(UNEVEN)]
    scheduler.sigmas = torch.stack([sigma / alpha for alpha, sigma in rates])
    zt, z0, before, noise = normal(1), normal(2), normal(3), normal(4)
    for i in range(1, len(UNEVEN) - 1):
        scheduler._step_index = i
        theirs = scheduler.multistep_dpm_solver_second_order_update([before, z0], sample=zt, noise=noise)
        h_last, h = (log_snr(*rates[j + 1]) - log_snr(*rates[j]) for j in (i - 1, i))
        ours = step(zt, z0 + h / (2 * h_last) * (z0 - before), rates[i], rates[i + 1], eta, noise)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        theirs = scheduler.dpm_solver_first_order_update(z0, sample=zt, noise=noise)
        torch.testing.assert_close(step(zt, z0, rates[i], rates[i + 1], eta, noise), theirs, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------------------------- flow matching

def test_a_whole_flow_matching_run_is_ddim_on_the_straight_line():
    times = torch.tensor([1.0, 0.9, 0.55, 0.5, 0.2, 0.0], dtype=torch.float64)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=1.0)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    zt = normal(1)
    theirs = zt.float()
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, (t / T).expand(2)), t, theirs).prev_sample

    def denoise(zt, t, y):
        return zt - expand(t, zt) * network(zt, t)  # z0 = z_t - t * velocity

    *_, (ours, _) = sample(denoise, zt, None, linear, times)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- time embedding

@pytest.mark.parametrize("dim", [2, 32, 64])
def test_time_embedding(dim):
    """Theirs takes step numbers, so it is asked about 1000 t; cosines come first, frequencies fall from 1."""
    from diffusers.models.embeddings import get_timestep_embedding
    t = torch.cat([torch.linspace(0, 1, 101), torch.tensor([0.0005, 0.999])])
    theirs = get_timestep_embedding(1000 * t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, dim), theirs, rtol=0, atol=2e-4)


# ------------------------------------------------------------------------------------------------- their cosine betas

def test_their_cosine_betas_stay_near_our_cosine():
    """squaredcos_cap_v2 has an offset of 0.008 and a clip at 0.999, moving it by less than 0.013 off our curve."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    t = knot(range(T))
    ours, _ = from_betas(scheduler.betas)(t)
    torch.testing.assert_close(ours**2, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)
    assert (ours - cosine(t)[0]).abs().max() < 0.013
