"""The training loop: resume equals no interruption bit for bit, the order of its parts, fp16's scaler, divergence."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm_minimal.checkpoint import CheckpointError
from ldm_minimal.data import batch_index
from ldm_minimal.denoiser import Denoiser, draw_times
from ldm_minimal.schedule import SCHEDULES, cosine
from ldm_minimal.train import (
    Diverged, Meter, Recorded, Step, TrainConfig, TrainState, compile_or_not, learning_rate, step_generator, train,
)
from ldm_minimal.unet import UNet, UNetConfig

CONFIG = TrainConfig(steps=10, batch=8, lr=1e-3, warmup=3, ema=0.9)
LABELS = torch.arange(40) % 10
DATA = torch.randn(10, 4, 7, 7, generator=torch.Generator().manual_seed(1))[LABELS]  # one pattern for each label


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(UNet(UNetConfig(channels=(16, 32), blocks=1)), cosine, "v")


def objective(model, index, noise):
    t = draw_times(len(index), noise)
    return {"loss": model.loss(DATA[index], LABELS[index], noise, t=t), "t": t}


def tensors_of(state: TrainState) -> dict:
    moments = {f"{i}.{k}": v for i, m in state.optimizer.state_dict()["state"].items() for k, v in m.items()}
    return state.model.state_dict() | {f"ema.{k}": v for k, v in state.ema.model.state_dict().items()} | moments


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_equal_five_a_restart_and_five_more_bit_for_bit(tmp_path, precision):
    whole = TrainState(denoiser(), CONFIG, precision)
    losses = [s.values["loss"] for s in train(whole, objective, 40, CONFIG)]

    first = TrainState(denoiser(), CONFIG, precision)
    loop = train(first, objective, 40, CONFIG)
    early = [next(loop).values["loss"] for _ in range(5)]
    first.save(tmp_path / "state.safetensors", {"note": 7})
    torch.manual_seed(99)  # another process has another global random state, and other initial weights
    second = TrainState(Denoiser(UNet(UNetConfig(channels=(16, 32), blocks=1)), cosine, "v"), CONFIG, precision)
    assert second.load(tmp_path / "state.safetensors") == {"note": 7}
    assert second.step == 5 and second.ema.updates == 5
    late = [s.values["loss"] for s in train(second, objective, 40, CONFIG)]

    assert torch.equal(torch.stack(losses), torch.stack(early + late))
    a, b = tensors_of(whole), tensors_of(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_loop_yields_after_the_step_and_after_the_ema():
    state = TrainState(denoiser(), CONFIG)
    before = copy.deepcopy(state.model.state_dict())
    step = next(train(state, objective, 40, CONFIG))
    assert step.step == state.step == state.ema.updates == 1
    assert any(not torch.equal(before[k], v) for k, v in state.model.state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in state.ema.model.state_dict().items())


def test_step_and_seed_alone_decide_batch_and_noise():
    a, b = (torch.randn(3, generator=step_generator(0, 7, "cpu")) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.randn(3, generator=step_generator(0, 8, "cpu")))
    assert not torch.equal(a, torch.randn(3, generator=step_generator(1, 7, "cpu")))
    assert not torch.equal(batch_index(0, 8, 40, seed=0), batch_index(0, 8, 40, seed=1))


def test_every_step_of_the_loop_has_noise_of_its_own():
    def times(seed):
        return torch.stack([step.values["t"] for step in train(TrainState(denoiser(), CONFIG), objective, 40, CONFIG, seed)])

    assert len({tuple(t) for t in times(0).tolist()}) == CONFIG.steps
    assert torch.equal(times(0), times(0)) and not torch.equal(times(0), times(1))


class Tape:
    """In place of a CUDA graph: recording runs the step once (a graph would not), each replay runs it again."""

    def __init__(self):
        self.replays = 0

    def register_generator_state(self, noise):
        self.noise, self.state = noise, noise.get_state()

    def replay(self):
        if self.replays == 0:
            self.noise.set_state(self.state)  # as if recording had drawn no numbers
        self.replays += 1
        (values, norm), (new, new_norm) = self.recorded.result, self.recorded.step(self.recorded.index)
        for mine, theirs in zip([*values.values(), norm], [*new.values(), new_norm]):
            mine.copy_(theirs)  # a graph writes into the same memory each time


def test_a_recorded_step_reads_new_indices_and_noise_and_its_results_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(wait_stream=lambda other: None))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **named: nullcontext())
    noise = torch.Generator()

    def step(index):
        loss = index + torch.rand(3, generator=noise)
        return {"loss": loss, "double": 2 * loss}, loss.norm()

    def run(step):
        found = []
        for number in range(7):
            noise.manual_seed(number)
            found.append(step(torch.arange(3) + 10 * number))
        return found

    recorded = Recorded(step, noise)
    recorded.graph.recorded = recorded
    for (values, norm), (expected, expected_norm) in zip(run(recorded), run(step)):
        assert torch.equal(norm, expected_norm) and values.keys() == expected.keys()
        assert all(torch.equal(values[name], expected[name]) for name in values)
    assert recorded.graph.replays == 7 - Recorded.WARM_UP


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_on_a_gpu_recorded_steps_end_with_the_weights_of_plain_ones_bit_for_bit(schedule):
    data, labels = DATA.cuda(), LABELS.cuda()

    def objective(model, index, noise):
        t = draw_times(len(index), noise, device="cuda")
        loss = model.loss(data[index], labels[index], noise, t=t)
        return {"loss": loss, "eps_mse": model.noise_loss(loss.detach(), t)}

    def weights(record):
        state = TrainState(Denoiser(denoiser().net, SCHEDULES[schedule]).cuda(), CONFIG, "bf16")
        for _ in train(state, objective, 40, CONFIG, record=record):
            pass
        return tensors_of(state)

    plain, recorded = weights(False), weights(True)
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_rate_is_a_tensor_that_a_recorded_step_reads():
    state = TrainState(nn.Linear(1, 1).cuda(), CONFIG)
    assert all(isinstance(group["lr"], torch.Tensor) and group["lr"].is_cuda for group in state.optimizer.param_groups)


def test_every_step_is_taken_at_the_rate_of_the_schedule():
    state, rates = TrainState(nn.Linear(1, 1), CONFIG), []
    state.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: rates.append(optimizer.param_groups[0]["lr"]))
    for _ in train(state, lambda model, index, noise: {"loss": model(torch.ones(len(index), 1)).square().flatten()}, 40, CONFIG):
        pass
    assert rates == [learning_rate(step, CONFIG) for step in range(CONFIG.steps)]


def test_weights_decay_at_the_rate_asked_for_whatever_the_gradient():
    config = TrainConfig(steps=1, batch=8, lr=0.1, warmup=0, weight_decay=0.5)
    state = TrainState(net := nn.Linear(3, 1), config)
    before = net.weight.detach().clone()
    next(train(state, lambda model, index, noise: {"loss": 0 * model(torch.ones(8, 3)).flatten()}, 40, config))
    torch.testing.assert_close(net.weight.detach(), 0.95 * before)  # 1 - 0.1 * 0.5; Adam's L2 would move each by 0.1
    assert state.optimizer.defaults["betas"] == (0.9, 0.99)


def test_the_loss_is_scaled_in_fp16_alone_and_the_scale_is_kept(tmp_path):
    made = {precision: TrainState(nn.Linear(1, 1), CONFIG, precision) for precision in ("fp32", "bf16", "fp16")}
    assert [state.scaler.is_enabled() for state in made.values()] == [False, False, True]
    half, again = made["fp16"], TrainState(nn.Linear(1, 1), CONFIG, "fp16")
    half.scaler.load_state_dict(half.scaler.state_dict() | {"scale": 8.0})
    half.save(tmp_path / "state.safetensors")
    again.load(tmp_path / "state.safetensors")
    assert again.scaler.get_scale() == 8.0


def test_the_meter_bins_the_noise_prediction_error_where_it_is_known():
    meter, values = Meter(), {"loss": [1.0, 3.0], "eps_mse": [5.0, 7.0], "t": [0.1, 0.9]}
    meter.add(Step(1, {name: torch.tensor(each) for name, each in values.items()}, torch.tensor(1.0)))
    assert meter.summary()["by_t"] == [5.0, None, None, None, 7.0]


def test_training_lowers_the_loss():
    config = replace(CONFIG, steps=150, lr=3e-3, batch=20)
    losses = [s.values["loss"].mean().item() for s in train(TrainState(denoiser(), config), objective, 40, config)]
    assert abs(losses[0] - 1) < 0.2, "a zero-initialised network on unit-variance latents begins at 1"
    assert sum(losses[-10:]) / 10 < 0.85, "and ends well below"


def test_learning_rate_rises_linearly_and_falls_to_zero_along_half_a_cosine():
    config = TrainConfig(steps=110, lr=2.0, warmup=10)
    rates = [learning_rate(s, config) for s in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0, abs=1e-9)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(0, TrainConfig(steps=5, warmup=0, lr=1.0)) == 1.0


def test_the_gradient_is_clipped_to_the_norm_asked_for():
    torch.manual_seed(0)
    steep = nn.Linear(4, 1)
    seen = []

    def objective(model, index, noise):
        seen.append([p.grad for p in model.parameters()])
        return {"loss": 1000 * model(torch.ones(8, 4)).square().flatten()}

    config = TrainConfig(steps=1, batch=8, clip=0.5, warmup=0)
    state = TrainState(steep, config)
    norms = []
    state.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: norms.append(torch.cat([p.grad.flatten() for p in steep.parameters()]).norm()))
    step = next(train(state, objective, 40, config))
    assert step.norm > 0.5, "the norm that is reported is the one before clipping"
    assert norms[0].item() == pytest.approx(0.5, rel=1e-4)


class ScalerThatOverflowsTwice:
    """The interface of GradScaler; the first two steps count as overflowed, as in fp16 with too large a scale."""

    def __init__(self):
        self.value, self.calls = 4.0, []

    def scale(self, loss):
        self.calls.append("scale")
        return loss * self.value

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad /= self.value

    def get_scale(self):
        return self.value

    def step(self, optimizer):
        self.calls.append("step")
        if self.value == 1.0:
            optimizer.step()

    def update(self):
        self.calls.append("update")
        self.value = max(1.0, self.value / 2)


def test_a_step_that_overflowed_in_fp16_is_repeated_and_not_counted():
    plain = TrainState(denoiser(), CONFIG)
    expected = next(train(plain, objective, 40, CONFIG))
    state = TrainState(denoiser(), CONFIG)
    state.scaler = ScalerThatOverflowsTwice()
    step = next(train(state, objective, 40, CONFIG))
    assert step.step == state.step == state.ema.updates == 1
    assert state.scaler.calls == ["scale", "unscale", "step", "update"] * 3
    assert torch.equal(step.values["loss"], expected.values["loss"]), "the same batch and noise again"
    for a, b in zip(plain.model.parameters(), state.model.parameters()):
        torch.testing.assert_close(a, b)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_loss_by_t():
    meter = Meter()
    t = torch.tensor([0.1, 0.3, 0.95])
    for number in range(1, 6):
        loss = torch.tensor([0.1, 0.2, float("nan") if number == 4 else 0.3])
        meter.add(Step(number, {"loss": loss, "t": t}, torch.tensor(1.0)))
    with pytest.raises(Diverged, match=r"step 4: .*\[0.1, 0.2, None, None, nan\]"):
        meter.summary()


def test_a_gradient_that_is_not_finite_stops_too():
    meter = Meter()
    meter.add(Step(1, {"loss": torch.ones(2)}, torch.tensor(float("inf"))))
    with pytest.raises(Diverged, match="step 1"):
        meter.summary()


def test_the_meter_averages_and_bins_by_t():
    meter = Meter()
    meter.add(Step(1, {"loss": torch.tensor([1.0, 3.0]), "t": torch.tensor([0.0, 1.0])}, torch.tensor(2.0)))
    meter.add(Step(2, {"loss": torch.tensor([2.0, 6.0]), "t": torch.tensor([0.19, 0.5])}, torch.tensor(4.0)))
    assert meter.summary() == {"loss": 3.0, "norm": 3.0, "by_t": [1.5, None, 6.0, None, 3.0]}
    assert meter.steps == []


def test_a_state_file_of_another_precision_or_network_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    TrainState(denoiser(), CONFIG, "fp32").save(path)
    with pytest.raises(CheckpointError, match="--precision fp32"):
        TrainState(denoiser(), CONFIG, "bf16").load(path)
    wider = Denoiser(UNet(UNetConfig(channels=(16, 64), blocks=1)), cosine, "v")
    with pytest.raises(CheckpointError, match="another architecture"):
        TrainState(wider, CONFIG, "fp32").load(path)


@pytest.mark.parametrize("field, value", [("steps", 0), ("batch", -1), ("lr", float("nan")), ("lr", 0.0), ("clip", float("inf")),
                                          ("ema", 1.0), ("warmup", -1), ("minutes", -2.0)])
def test_impossible_training_options_are_refused_with_their_value(field, value):
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


def test_compile_falls_back_with_a_message(monkeypatch):
    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = module(x)

    def broken(self):
        self._compiled_call_impl = lambda *args: (_ for _ in ()).throw(RuntimeError("no compiler here"))

    monkeypatch.setattr(nn.Module, "compile", broken)
    assert "RuntimeError" in compile_or_not(module, x)
    torch.testing.assert_close(module(x), expected)
