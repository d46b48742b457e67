"""Classifier-free guidance is uncond + s (cond - uncond): s = 0 is unconditional, s = 1 conditional, both at one
evaluation, all else at two. The rule commutes with the choice of target. Scales that are no number >= 0 raise. With a weak
denoiser it is weak + s (cond - weak)."""

import pytest
import torch

from helpers_theory import TinyNet, normal
from ldm_minimal.denoiser import TARGETS, Denoiser, to_z0
from ldm_minimal.guidance import guide
from ldm_minimal.schedule import SCHEDULES, cosine, expand

NULL = 3


class Counter:
    """Wraps a denoiser and keeps what it was called with."""

    def __init__(self, denoise):
        self.denoise, self.calls = denoise, []

    def __call__(self, zt, t, y):
        assert len(zt) == len(t) == len(y)
        self.calls.append((zt, t, y))
        return self.denoise(zt, t, y)


def inputs():
    """Latents of unequal height and width, a time for each sample as a sampler gives it, and labels."""
    return normal(3, 2, 4, 5), torch.full((3,), 0.6, dtype=torch.float64), torch.tensor([0, 1, 2])


def both(denoise, zt, t, y):
    return denoise(zt, t, torch.full_like(y, NULL)), denoise(zt, t, y)


@pytest.fixture
def denoise():
    return Counter(Denoiser(TinyNet(num_classes=NULL), cosine))


def test_scale_zero_is_the_unconditional_estimate_at_one_evaluation(denoise):
    zt, t, y = inputs()
    z0 = guide(denoise, NULL, 0.0)(zt, t, y)
    assert [len(call[0]) for call in denoise.calls] == [3]
    assert torch.equal(z0, both(denoise, zt, t, y)[0])


@pytest.mark.parametrize("scale", [1, 1.0, torch.ones_like])
def test_scale_one_is_the_conditional_estimate_at_one_evaluation(denoise, scale):
    zt, t, y = inputs()
    z0 = guide(denoise, NULL, scale)(zt, t, y)
    assert [len(call[0]) for call in denoise.calls] == [3]
    assert torch.equal(z0, both(denoise, zt, t, y)[1])


@pytest.mark.parametrize("scale", [0.5, 1.5, 4, 7.5])
def test_any_other_scale_moves_from_unconditional_through_conditional_at_two_evaluations(denoise, scale):
    zt, t, y = inputs()
    z0 = guide(denoise, NULL, scale)(zt, t, y)
    assert [len(call[0]) for call in denoise.calls] == [6]  # one call, twice the batch
    uncond, cond = both(denoise, zt, t, y)
    assert not torch.allclose(uncond, cond)
    torch.testing.assert_close(z0, uncond + scale * (cond - uncond), rtol=0, atol=1e-13)
    w = scale - 1  # the papers' weight
    torch.testing.assert_close(z0, (1 + w) * cond - w * uncond, rtol=0, atol=1e-12)


def test_both_halves_see_the_same_latents_and_times_and_only_the_labels_differ(denoise):
    zt, t, y = inputs()
    guide(denoise, NULL, 2.0)(zt, t, y)
    (latents, times, labels), = denoise.calls
    assert torch.equal(latents[:3], zt) and torch.equal(latents[3:], zt)
    assert torch.equal(times[:3], t) and torch.equal(times[3:], t)
    assert sorted(labels.reshape(2, 3).tolist()) == [[0, 1, 2], [NULL] * 3]
    assert y.tolist() == [0, 1, 2]


def test_on_null_labels_every_scale_gives_the_unconditional_estimate(denoise):
    zt, t, _ = inputs()
    null = torch.full((3,), NULL)
    torch.testing.assert_close(guide(denoise, NULL, 5.0)(zt, t, null), denoise(zt, t, null), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("target", list(TARGETS))
def test_guiding_z0_and_guiding_the_networks_output_are_the_same(name, target):
    net, schedule = TinyNet(num_classes=NULL), SCHEDULES[name]
    zt, t, y = inputs()
    alpha, sigma = schedule(expand(t, zt))
    uncond, cond = both(net, zt, t, y)
    z0 = guide(Denoiser(net, schedule, target), NULL, 3.0)(zt, t, y)
    from_guided_output = to_z0(uncond + 3.0 * (cond - uncond), zt, alpha, sigma, target)
    torch.testing.assert_close(z0, from_guided_output, rtol=1e-11, atol=1e-11)


def test_guiding_z0_is_guiding_the_noise():
    denoise = Denoiser(TinyNet(num_classes=NULL), cosine, "v")
    zt, t, y = inputs()
    alpha, sigma = cosine(expand(t, zt))
    uncond, cond, guided = ((zt - alpha * z0) / sigma for z0 in (*both(denoise, zt, t, y),
                                                                 guide(denoise, NULL, 2.5)(zt, t, y)))
    torch.testing.assert_close(guided, uncond + 2.5 * (cond - uncond), rtol=0, atol=1e-12)


@pytest.mark.parametrize("time, inside", [(0.19, False), (0.2, True), (0.5, True), (0.7, True), (0.71, False)])
def test_outside_the_interval_the_scale_is_one_at_one_evaluation(denoise, time, inside):
    zt, _, y = inputs()
    t = torch.full((3,), time, dtype=torch.float64)
    z0 = guide(denoise, NULL, 2.0, (0.2, 0.7))(zt, t, y)
    assert [len(call[0]) for call in denoise.calls] == [6 if inside else 3]
    uncond, cond = both(denoise, zt, t, y)
    torch.testing.assert_close(z0, uncond + 2.0 * (cond - uncond) if inside else cond, rtol=0, atol=1e-13)


def test_the_default_interval_is_everywhere(denoise):
    zt, _, y = inputs()
    guide(denoise, NULL, 2.0)(zt, torch.tensor([0.0, 0.5, 1.0]).double(), y)
    guide(denoise, NULL, 2.0)(zt, torch.ones(3).double(), y)
    assert [len(call[0]) for call in denoise.calls] == [6, 6]


def test_a_scale_may_be_a_function_of_time_with_one_value_for_each_sample(denoise):
    zt, _, y = inputs()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z0 = guide(denoise, NULL, lambda t: 10 * t - 1)(zt, t, y)
    uncond, cond = both(denoise, zt, t, y)
    for i, scale in enumerate([0.0, 4.0, 8.0]):
        torch.testing.assert_close(z0[i], uncond[i] + scale * (cond[i] - uncond[i]), rtol=0, atol=1e-13)


def test_a_function_of_time_is_cut_by_the_interval_sample_by_sample(denoise):
    zt, _, y = inputs()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z0 = guide(denoise, NULL, lambda t: 5 * t, (0.3, 0.8))(zt, t, y)
    uncond, cond = both(denoise, zt, t, y)
    for i, scale in enumerate([1.0, 2.5, 1.0]):
        torch.testing.assert_close(z0[i], uncond[i] + scale * (cond[i] - uncond[i]), rtol=0, atol=1e-13)


def test_float32_latents_stay_float32_though_times_are_float64():
    net = TinyNet(num_classes=NULL, dtype=torch.float32)
    zt, t, y = inputs()
    assert guide(Denoiser(net, cosine), NULL, 2.0)(zt.float(), t, y).dtype == torch.float32


@pytest.mark.parametrize("scale, asked", [(0, (0, 1)), (1, (1, 0)), (0.5, (1, 1)), (2.5, (1, 1))])
def test_autoguidance_moves_from_the_weak_estimate_through_the_conditional_one(denoise, scale, asked):
    zt, t, y = inputs()
    weak = Counter(lambda zt, t, y: 0.3 * zt + y[:, None, None, None])  # it depends on the label: which one it is told matters
    z0 = guide(denoise, NULL, scale, weak=weak)(zt, t, y)
    assert (len(denoise.calls), len(weak.calls)) == asked, "nobody is asked in vain"
    worse, cond = weak(zt, t, y), denoise(zt, t, y)
    torch.testing.assert_close(z0, worse + scale * (cond - worse), rtol=0, atol=1e-13)


def test_autoguidance_removes_an_error_that_the_weak_denoiser_makes_larger_by_a_known_ratio():
    zt, t, y = inputs()
    right, error = normal(*zt.shape), normal(*zt.shape)
    good, weak = (lambda zt, t, y, size=size: right + size * error for size in (0.5, 1.5))
    torch.testing.assert_close(guide(good, NULL, 1.5, weak=weak)(zt, t, y), right, rtol=0, atol=1e-13)  # s = 1 / (1 - 1/3)


def test_outside_the_interval_the_weak_denoiser_is_not_asked(denoise):
    zt, t, y = inputs()
    weak = Counter(lambda zt, t, y: zt)
    assert torch.equal(guide(denoise, NULL, 2.0, (0.0, 0.5), weak)(zt, t, y), denoise(zt, t, y)) and not weak.calls


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), -0.5, -1, "2", None, [2.0]])
def test_a_scale_that_is_no_finite_number_above_zero_raises(denoise, scale):
    with pytest.raises(ValueError, match="guidance"):
        guide(denoise, NULL, scale)


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.5), (float("nan"), 1.0)])
def test_an_interval_that_is_not_inside_zero_to_one_raises(denoise, interval):
    with pytest.raises(ValueError, match="interval"):
        guide(denoise, NULL, 2.0, interval)
