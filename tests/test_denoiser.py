"""Each target can be solved back to (z0, eps) on each schedule. The loss starts at 1 (eps), 1 (x0), 1 (v), 2 (flow), is
one number for each sample, hides labels by itself at the stated rate, and draws stratified times. noise_loss is the
error of the noise prediction whatever the target. The band of each statistical check has a false-alarm probability
below 1e-6."""

from statistics import NormalDist

import pytest
import torch

from helpers_theory import BestNet, Gaussian, TinyNet, ZeroNet, normal
from ldm_minimal.denoiser import TARGETS, Denoiser, draw_times, drop_labels, to_z0
from ldm_minimal.schedule import SCHEDULES, add_noise, cosine, ddpm, expand

EVERY = pytest.mark.parametrize("target", list(TARGETS))
EACH = pytest.mark.parametrize("name", list(SCHEDULES))
BAND = 5.0  # standard errors of a mean, two-sided probability 6e-7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def times64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ targets

def test_the_four_targets_are_the_mixtures_of_the_papers():
    alpha, sigma = times64(0.6), times64(0.8)
    z0, eps = normal(5, seed=1), normal(5, seed=2)
    expected = {"eps": eps, "x0": z0, "v": 0.6 * eps - 0.8 * z0, "flow": eps - z0}
    assert set(expected) == set(TARGETS)
    for target, value in expected.items():
        a, b = TARGETS[target](alpha, sigma)
        torch.testing.assert_close(a * z0 + b * eps, value, rtol=0, atol=1e-15)


def test_v_is_the_motion_along_the_quarter_turn_and_flow_the_motion_along_the_straight_line():
    z0, eps, t, h = normal(1, 5, seed=1), normal(1, 5, seed=2), times64(0.3), 1e-5
    for name, target, speed in [("cosine", "v", torch.pi / 2), ("linear", "flow", 1.0)]:
        schedule = SCHEDULES[name]
        motion = (add_noise(z0, eps, t + h, schedule) - add_noise(z0, eps, t - h, schedule)) / (2 * h)
        a, b = TARGETS[target](*schedule(t))
        torch.testing.assert_close(motion, speed * (a * z0 + b * eps), rtol=1e-8, atol=1e-8)


@EACH
@EVERY
def test_every_target_solves_back_to_z0_and_eps_on_every_schedule(name, target):
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    z0, eps = normal(7, 2, 4, 5, seed=1), normal(7, 2, 4, 5, seed=2)
    zt = add_noise(z0, eps, t, SCHEDULES[name])
    alpha, sigma = SCHEDULES[name](expand(t, z0))
    a, b = TARGETS[target](alpha, sigma)
    found = to_z0(a * z0 + b * eps, zt, alpha, sigma, target)
    torch.testing.assert_close(found, z0, rtol=0, atol=1e-10)
    torch.testing.assert_close((zt - alpha * found) / sigma, eps, rtol=0, atol=1e-10)


@EACH
@EVERY
def test_forward_finds_z0_when_the_network_is_right(name, target):
    """The network is the best one for N(m, s^2), so that the answer is E[z0 | z_t]; height and width differ."""
    gaussian, schedule, t = Gaussian(), SCHEDULES[name], times64(0.05, 0.5, 0.95)
    zt = normal(3, 2, 4, 5)
    z0 = Denoiser(BestNet(gaussian, schedule, target), schedule, target)(zt, t, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(z0, gaussian.best_z0(zt, *schedule(expand(t, zt))), rtol=0, atol=1e-11)


@EACH
@EVERY
def test_forward_is_finite_at_pure_noise(name, target):
    """Also for eps, where alpha is 0 and nothing can be said of z0; v and flow do not amplify at all."""
    denoiser = Denoiser(TinyNet(), SCHEDULES[name], target)
    zt = normal(4, 2, 4, 5)
    z0 = denoiser(zt, torch.ones(4, dtype=torch.float64), torch.tensor([0, 1, 2, 3]))
    assert bool(z0.isfinite().all())
    assert z0.abs().max() < (4e3 if target == "eps" else 5)


@EVERY
def test_forward_at_time_zero_returns_the_latents_and_for_x0_what_the_network_says(target):
    zt, t, y, net = normal(2, 2, 4, 5), times64(0.0, 0.0), torch.tensor([0, 1]), TinyNet()
    assert torch.equal(Denoiser(net, cosine, target)(zt, t, y), net(zt, t, y) if target == "x0" else zt)


def test_the_schedule_is_evaluated_in_float64_and_handed_on_in_the_latents_precision():
    """cos in float32 near pi / 2 has a relative error of 3e-4 at t = 0.9999, and is negative at t = 1."""
    t = torch.tensor([0.9999, 1.0])
    alpha, sigma = Denoiser(ZeroNet(), cosine).rates(t, torch.zeros(2, 1, 4, 5))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1) and alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha.flatten().double(), cosine(t.double())[0], rtol=1e-6, atol=0)
    assert alpha.min() > 0


def test_the_network_gets_times_and_latents_of_one_dtype_and_the_labels_untouched():
    net = ZeroNet()
    zt, y = normal(2, 1, 4, 5).float(), torch.tensor([3, 10])
    z0 = Denoiser(net, cosine, drop=1.0)(zt, times64(0.25, 0.5), y)
    assert torch.equal(net.seen[0], zt) and torch.equal(net.seen[2], y)
    assert net.seen[1].dtype == torch.float32 and net.seen[1].tolist() == [0.25, 0.5]
    assert z0.dtype == torch.float32


@pytest.mark.parametrize("bad", [{"target": "score"}, {"drop": -0.1}, {"drop": 1.1}, {"drop": float("nan")}])
def test_an_unknown_target_or_a_drop_that_is_no_probability_raises(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Denoiser(ZeroNet(), cosine, **bad)


# --------------------------------------------------------------------------------------------------------------- loss

@EACH
@pytest.mark.parametrize("target, expected", [("eps", 1), ("x0", 1), ("v", 1), ("flow", 2)])
def test_the_initial_loss_of_a_zero_network_on_unit_variance_latents(name, target, expected):
    """v needs alpha^2 + sigma^2 = 1; on the straight line its mean is E[(1-t)^2 + t^2] = 2/3."""
    if (name, target) == ("linear", "v"):
        expected = 2 / 3
    z0 = normal(256, 4, 7, 7, seed=1, dtype=torch.float32)
    loss = Denoiser(ZeroNet(), SCHEDULES[name], target).loss(z0, torch.zeros(256, dtype=torch.long), seeded(2))
    assert loss.shape == (256,) and loss.dtype == torch.float32
    assert loss.mean().item() == pytest.approx(expected, rel=BAND * (2 / z0.numel()) ** 0.5)


@EVERY
def test_the_loss_is_the_mean_over_the_dimensions_of_each_sample(target):
    """One number for each sample, unaffected by its neighbours."""
    z0, eps, t = normal(3, 2, 4, 5, seed=1), normal(3, 2, 4, 5, seed=2), times64(0.2, 0.5, 0.9)
    net, y = TinyNet(), torch.tensor([0, 1, 2])
    loss = Denoiser(net, cosine, target, drop=0.0).loss(z0, y, t=t, eps=eps)
    assert loss.shape == (3,)
    for i in range(3):
        alpha, sigma = cosine(t[i])
        wanted = {"eps": eps, "x0": z0, "v": alpha * eps - sigma * z0, "flow": eps - z0}[target][i]
        out = net((alpha * z0 + sigma * eps)[i:i + 1], t[i:i + 1], y[i:i + 1])[0]
        assert loss[i].item() == pytest.approx(((out - wanted) ** 2).sum().item() / 40, rel=1e-12)


def test_a_network_that_answers_in_half_precision_is_scored_and_solved_in_float32():
    class HalfNet(ZeroNet):
        def forward(self, zt, t, y):
            return zt.bfloat16()

    z0, y, denoiser = normal(2, 2, 4, 5).float(), torch.tensor([0, 1]), Denoiser(HalfNet(), cosine, drop=0.0)
    t, eps = torch.tensor([0.3, 0.6]), normal(2, 2, 4, 5, seed=1).float()
    zt, (alpha, sigma) = add_noise(z0, eps, t, cosine), cosine(expand(t, z0))
    loss = denoiser.loss(z0, y, t=t, eps=eps)
    expected = (zt.bfloat16().float() - (alpha * eps - sigma * z0)).square().flatten(1).mean(1)
    assert loss.dtype == denoiser(zt, t, y).dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@EVERY
def test_the_same_generator_seed_gives_the_same_loss_and_another_seed_another(target):
    denoiser, z0, y = Denoiser(TinyNet(), cosine, target), normal(6, 2, 4, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    first, again, other = (denoiser.loss(z0, y, seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_a_generator_the_loss_follows_the_global_seed():
    denoiser, z0, y = Denoiser(TinyNet(), cosine), normal(4, 2, 4, 5), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(1)
    first = denoiser.loss(z0, y)
    second = denoiser.loss(z0, y)
    torch.manual_seed(1)
    assert torch.equal(denoiser.loss(z0, y), first) and not torch.equal(first, second)


@EVERY
def test_loss_and_forward_leave_their_inputs_as_they_were(target):
    z0, eps = normal(4, 2, 4, 5, seed=1), normal(4, 2, 4, 5, seed=2)
    inputs = z0, torch.tensor([0, 1, 2, 0]), times64(0.2, 0.4, 0.6, 0.8), eps
    z0, y, t, eps = (x.clone() for x in inputs)
    denoiser = Denoiser(TinyNet(), cosine, target, drop=1.0)
    denoiser.loss(z0, y, t=t, eps=eps)
    denoiser(z0, t, y)
    assert all(torch.equal(now, before) for now, before in zip((z0, y, t, eps), inputs))


def test_the_gradient_reaches_every_weight_of_the_network_and_not_the_latents():
    net, z0 = TinyNet(), normal(4, 2, 4, 5)
    Denoiser(net, cosine, drop=0.5).loss(z0, torch.tensor([0, 1, 2, 0]), seeded()).mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in net.parameters())
    assert not z0.requires_grad


@EACH
def test_on_standard_normal_latents_the_best_eps_error_at_time_t_is_alpha_bar(name):
    """Then E[eps | z_t] = sigma z_t / (alpha^2 + sigma^2), which leaves alpha^2 / (alpha^2 + sigma^2)."""
    schedule, z0 = SCHEDULES[name], normal(4, 20_000, seed=1)
    t = times64(0.1, 0.4, 0.6, 0.9)
    best = BestNet(Gaussian(0.0, 1.0), schedule, "eps")
    loss = Denoiser(best, schedule, "eps", drop=0.0).loss(z0, torch.zeros(4, dtype=torch.long), seeded(2), t=t)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(loss, alpha**2 / (alpha**2 + sigma**2), rtol=BAND * (2 / 20_000) ** 0.5, atol=0)


def test_over_ddpms_thousand_steps_the_best_possible_eps_error_is_0_276():
    """Not 0.01: structured latents reach lower, unit-variance noise does not."""
    z0, t = normal(1000, 200, seed=1), torch.arange(1, 1001, dtype=torch.float64) / 1000
    denoiser = Denoiser(BestNet(Gaussian(0.0, 1.0), ddpm, "eps"), ddpm, "eps")
    loss = denoiser.loss(z0, torch.zeros(1000, dtype=torch.long), seeded(2), t=t)
    spread = (2 * (ddpm(t)[0] ** 4).mean() / z0.numel()).sqrt().item()
    assert loss.mean().item() == pytest.approx(0.2755, abs=5e-4 + BAND * spread)


@EACH
@EVERY
def test_noise_loss_is_the_error_of_the_noise_prediction(name, target):
    """Directly: solve the network's output for z0, then for eps, and compare that with the true eps."""
    schedule, t = SCHEDULES[name], torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    z0, eps, y = normal(6, 2, 4, 5, seed=1), normal(6, 2, 4, 5, seed=2), torch.tensor([0, 1, 2, 3, 0, 1])
    denoiser = Denoiser(TinyNet(), schedule, target, drop=0.0)
    alpha, sigma = schedule(expand(t, z0))
    zt = add_noise(z0, eps, t, schedule)
    eps_hat = (zt - alpha * denoiser(zt, t, y)) / sigma
    found = denoiser.noise_loss(denoiser.loss(z0, y, t=t, eps=eps), t)
    assert found.shape == (6,)
    torch.testing.assert_close(found, (eps_hat - eps).square().flatten(1).mean(1), rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------------------- labels

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.1, 1.0])
def test_the_loss_hides_labels_at_the_stated_rate_also_in_eval_mode(training, drop):
    n, net = 20_000, ZeroNet()
    net.num_classes = 7
    y = torch.arange(n) % 7
    denoiser = Denoiser(net, cosine, drop=drop).train(training)
    denoiser.loss(torch.zeros(n, 1, 1, 1), y, seeded(3))
    hidden = net.seen[2] == 7  # the null label is num_classes, and not a class
    assert hidden.double().mean().item() == pytest.approx(drop, abs=BAND * (drop * (1 - drop) / n) ** 0.5)
    assert torch.equal(net.seen[2][~hidden], y[~hidden])
    assert denoiser.null == 7


def test_labels_are_hidden_by_default_one_time_in_ten():
    assert Denoiser(ZeroNet(), cosine).drop == 0.1


def test_labels_are_hidden_independently_of_their_neighbours_their_class_and_their_time():
    n, net = 20_000, ZeroNet()
    y = torch.arange(n) % 10
    Denoiser(net, cosine, drop=0.3).loss(torch.zeros(n, 1, 1, 1), y, seeded(4))
    hidden = (net.seen[2] == 10).double()
    both = (hidden[1:] * hidden[:-1]).mean().item()  # neighbouring pairs overlap: the band is widened by sqrt(3)
    assert both == pytest.approx(0.09, abs=BAND * 3**0.5 * (0.09 * 0.91 / n) ** 0.5)
    for group in [y == 0, y == 9, net.seen[1] < 0.1, net.seen[1] > 0.9]:
        share = hidden[group].mean().item()
        assert share == pytest.approx(0.3, abs=BAND * (0.21 / int(group.sum())) ** 0.5)


def test_drop_labels_gives_back_labels_of_the_same_type_and_leaves_its_input():
    y = torch.tensor([1, 2, 3])
    dropped = drop_labels(y, 9, 1.0, seeded())
    assert dropped.tolist() == [9, 9, 9] and dropped.dtype == torch.long and y.tolist() == [1, 2, 3]


# -------------------------------------------------------------------------------------------------------------- times

@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_every_slice_of_probability_holds_exactly_one_time(batch, kind):
    """Sorted, the k-th time lies between the k-th and the (k+1)-th quantile of its distribution."""
    for seed in range(20):
        t = draw_times(batch, seeded(seed), kind).double().sort().values
        assert t.shape == (batch,) and 0 < t[0] and t[-1] < 1
        if kind == "logit_normal":
            t = torch.tensor([NormalDist().cdf(x) for x in torch.logit(t).tolist()])
        slices = torch.arange(batch)
        assert bool((t * batch > slices - 1e-3).all()) and bool((t * batch < slices + 1 + 1e-3).all())


def test_inside_its_slice_a_time_is_uniform_and_free_of_its_neighbours():
    t = draw_times(20_000, seeded(1)).double() * 20_000
    place = t.sort().values - torch.arange(20_000)
    assert place.mean().item() == pytest.approx(0.5, abs=BAND * (1 / 12 / 20_000) ** 0.5)
    assert place.var().item() == pytest.approx(1 / 12, rel=BAND * (0.8 / 20_000) ** 0.5)
    assert torch.corrcoef(torch.stack([place[1:], place[:-1]]))[0, 1].abs() < BAND / 20_000**0.5


def test_a_time_does_not_depend_on_its_place_in_the_batch():
    """Without the permutation place i would always hold slice i. 4,000 batches hold each (place, slice) 500 times."""
    generator, count = seeded(2), torch.zeros(8, 8)
    for _ in range(4_000):
        count[torch.arange(8), (draw_times(8, generator) * 8).long()] += 1
    assert (count / 4_000 - 1 / 8).abs().max() < 5.7 * (1 / 8 * 7 / 8 / 4_000) ** 0.5  # 64 cells at 1.2e-8 each


def test_an_unknown_distribution_of_times_is_refused_and_the_known_ones_are_named():
    with pytest.raises(ValueError, match="'logit-normal'.*uniform, logit_normal"):
        draw_times(8, times="logit-normal")


def test_logit_normal_times_have_the_quantiles_of_a_sigmoid_of_a_normal():
    """Stratified, so that 10,000 times reproduce the quantiles to the width of a slice."""
    t = draw_times(10_000, seeded(3), "logit_normal").double()
    for share in (0.025, 0.25, 0.5, 0.75, 0.975):
        exact = torch.sigmoid(torch.tensor(NormalDist().inv_cdf(share), dtype=torch.float64))
        assert t.quantile(share).item() == pytest.approx(exact.item(), abs=3e-4)


def test_the_loss_draws_its_times_from_the_stated_distribution():
    for kind in ("uniform", "logit_normal"):
        net = ZeroNet()
        Denoiser(net, cosine, times=kind).loss(torch.zeros(64, 1, 1, 1), torch.zeros(64, dtype=torch.long), seeded(5))
        assert torch.equal(net.seen[1], draw_times(64, seeded(5), kind))


def test_the_network_is_trained_on_the_latents_of_the_forward_process():
    """On zero latents z_t is sigma(t) eps; on zero noise it is alpha(t) z0."""
    z0, t, y, net = normal(4, 2, 4, 5), times64(0.2, 0.4, 0.6, 0.8), torch.zeros(4, dtype=torch.long), ZeroNet()
    alpha, sigma = cosine(expand(t, z0))
    denoiser = Denoiser(net, cosine)
    denoiser.loss(z0, y, t=t, eps=torch.zeros_like(z0))
    torch.testing.assert_close(net.seen[0], alpha * z0, rtol=0, atol=1e-15)
    denoiser.loss(torch.zeros_like(z0), y, t=t, eps=z0)
    torch.testing.assert_close(net.seen[0], sigma * z0, rtol=0, atol=1e-15)
    assert torch.equal(net.seen[1], t)


def test_the_loss_takes_times_of_any_precision():
    denoiser, z0 = Denoiser(TinyNet(dtype=torch.float32), cosine), torch.randn(2, 2, 4, 5)
    eps, y, t = torch.randn_like(z0), torch.tensor([0, 1]), torch.tensor([0.25, 0.5])
    denoiser.drop = 0.0
    found = [denoiser.loss(z0, y, t=t.to(kind), eps=eps) for kind in (torch.float32, torch.float64)]
    torch.testing.assert_close(*found)
