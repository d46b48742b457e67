"""The moving average follows ema <- d ema + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)). Parameters are
averaged, buffers copied, and the average asks for no gradient."""

import pytest
import torch
from torch import nn

from ldm_minimal.ema import EMA


class Model(nn.Module):
    """One weight, one float buffer, one integer buffer."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def follow(decay, weights, start=0.0):
    """The averages that EMA gives after each of `weights`."""
    model = Model(start)
    ema, found = EMA(model, decay), []
    for weight in weights:
        model.weight.data.fill_(weight)
        ema.update(model)
        found.append(ema.model.weight.item())
    return found


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.9999])
def test_the_average_follows_the_scalar_recurrence_with_warm_up(decay):
    weights = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, -6.0] * 40
    average, expected = 1.0, []
    for n, weight in enumerate(weights):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
        expected.append(average)
    assert follow(decay, weights, start=1.0) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_first_update_keeps_one_tenth_of_the_start():
    assert follow(0.9999, [0.0], start=1.0) == pytest.approx([0.1], rel=1e-14)


def test_warm_up_forgets_the_random_start_where_a_constant_decay_would_not():
    """Of the start, 0.9999^5000 = 0.61 would be left. With warm-up 9! n! / (n + 9)! is left after n steps."""
    assert 0.9999**5000 == pytest.approx(0.61, abs=0.005)
    left = follow(0.9999, [0.0] * 500, start=1.0)
    assert left[4] == pytest.approx(1 / 2002, rel=1e-12, abs=0)  # 9! 5! / 14!
    assert left[-1] < 1e-15


def test_late_updates_use_the_stated_decay():
    """(1 + n) / (10 + n) passes 0.9 at n = 80."""
    left = follow(0.9, [1.0] * 79 + [0.0] * 40)
    ratios = [after / before for before, after in zip(left[79:], left[80:])]
    assert ratios == pytest.approx([0.9] * len(ratios), rel=1e-9)
    assert follow(0.9, [1.0] * 40 + [0.0], start=1.0)[-1] == pytest.approx(41 / 50, rel=1e-12)  # still warming up


def test_constant_weights_stay_exactly_as_they_are():
    assert set(follow(0.99, [0.1] * 300, start=0.1)) == {0.1}


def test_buffers_are_copied_and_not_averaged():
    model = Model()
    ema = EMA(model, 0.999)
    model.mean.fill_(8.0)
    model.count.fill_(5)
    ema.update(model)
    assert ema.model.mean.item() == 8.0 and ema.model.count.item() == 5
    model.mean.fill_(-3.0)
    assert ema.model.mean.item() == 8.0  # a copy, not the same memory


def test_the_average_is_a_separate_model_in_eval_mode_without_gradients():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    ema = EMA(model)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())
    before = ema.model[0].weight.clone()
    model[0].weight.data.add_(1.0)
    assert torch.equal(ema.model[0].weight, before)
    kept = model[0].weight.clone()
    ema.update(model)
    assert torch.equal(model[0].weight, kept)
    assert not torch.equal(ema.model[0].weight, before)
    assert not any(p.requires_grad or p.grad_fn for p in ema.model.parameters())


def test_updates_are_counted():
    model = Model()
    ema = EMA(model)
    for _ in range(3):
        ema.update(model)
    assert ema.updates == 3


@pytest.mark.parametrize("decay", [1.0, 1.5, -0.1, float("nan")])
def test_a_decay_outside_zero_to_one_raises(decay):
    with pytest.raises(ValueError, match=str(decay)):
        EMA(Model(), decay)


def test_the_default_decay_is_0_9999():
    assert EMA(Model()).decay == 0.9999
