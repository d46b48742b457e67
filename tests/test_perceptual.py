"""The two further judges of the autoencoder: what each one measures, whom each one teaches, and from when on.

Gradients are compared with those of the formula, term by term. The pictures are small, the networks random: what is
tested holds for any weights.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers_theory import seeded, shake
from ldm_minimal.classifier import classifier_loss
from ldm_minimal.data import load, to_float
from ldm_minimal.perceptual import (
    FeatureNet, PatchDiscriminator, PerceptualConfig, PerceptualVAE, hinge_loss, perceptual_distance,
)
from ldm_minimal.train import TrainConfig, TrainState, train
from ldm_minimal.vae import VAE, VAEConfig, vae_loss, vae_terms
from ldm_minimal.vq import VQVAE

SMALL = VAEConfig(channels=(8, 8, 8))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed=0):
    torch.manual_seed(seed)
    return FeatureNet().eval().requires_grad_(False)


def judged(vae=None, **config):
    torch.manual_seed(0)
    return shake(PerceptualVAE(vae or VAE(SMALL), PerceptualConfig(**config)))


def gradients(loss, module):
    found = torch.autograd.grad(loss.sum(), list(module.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), found)]


def assert_same(a, b, **tolerance):
    assert len(a) == len(b) > 0 and any(v.any() for v in b)
    for mine, theirs in zip(a, b):
        torch.testing.assert_close(mine, theirs, **tolerance)


# --- the network and its distance ------------------------------------------------------------------------------------


@torch.no_grad()
def test_maps_at_three_resolutions_and_logits_from_the_last_one():
    net = network()
    assert [tuple(m.shape) for m in net.maps(normal(2, 1, 28, 20))] == [(2, 16, 28, 20), (2, 32, 14, 10), (2, 64, 7, 5)]
    assert net(normal(2, 1, 28, 28)).shape == (2, 10)
    net.head.weight.zero_()
    assert torch.equal(net(normal(2, 1, 28, 28)), net.head.bias.expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_at_the_start_a_signal_keeps_its_size_through_all_layers(seed):
    sizes = [m.square().mean().sqrt().item() for m in network(seed).maps(normal(8, 1, 16, 16))]
    assert 0.3 < min(sizes) and max(sizes) < 5 and 0.3 < sizes[2] / sizes[0] < 4


def test_the_network_learns_classes():
    data = load()
    x, y, net = to_float(data.images[:64]), data.labels[:64], network().requires_grad_(True)
    optimizer, losses = torch.optim.Adam(net.parameters(), 2e-3), []
    for step in range(25):
        loss = classifier_loss(net, x, y, seeded(step)).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.1 and sum(losses[-3:]) / 3 < 1.8, losses


def test_the_distance_is_the_sum_over_layers_of_the_mean_squared_difference_of_directions():
    net, x, y = network(), normal(3, 1, 8, 12), normal(3, 1, 8, 12, seed=1)
    found = perceptual_distance(net, x, y)
    assert found.shape == (3,)
    for i in range(3):
        expected = 0.0
        for a, b in zip(net.maps(x), net.maps(y)):
            places = zip(a[i].flatten(1).T.double(), b[i].flatten(1).T.double())  # two vectors at each place
            unit = [(u / u.norm().clamp(min=1e-3), v / v.norm().clamp(min=1e-3)) for u, v in places]
            expected += sum(((u - v) ** 2).sum().item() for u, v in unit) / len(unit)
        assert found[i].item() == pytest.approx(expected, rel=1e-4)


def test_equal_images_are_at_distance_0_and_no_two_are_further_apart_than_2_for_each_layer():
    net, x, y = network(), normal(8, 1, 8, 8), 5 * normal(8, 1, 8, 8, seed=1)
    assert perceptual_distance(net, x, x.clone()).max() < 1e-9
    there, back = perceptual_distance(net, x, y), perceptual_distance(net, y, x)
    torch.testing.assert_close(there, back)
    assert 0.01 < there.min() and there.max() <= 6


def test_the_strength_of_a_layers_maps_does_not_matter():
    net, x, y = network(), normal(3, 1, 8, 8), normal(3, 1, 8, 8, seed=1)
    before = perceptual_distance(net, x, y)
    last = net.stages[-1][2]
    with torch.no_grad():
        last.weight.mul_(50), last.bias.mul_(50)
    torch.testing.assert_close(perceptual_distance(net, x, y), before, atol=1e-3, rtol=1e-3)


def test_the_distance_teaches_only_the_second_image():
    x, y = normal(2, 1, 8, 8).requires_grad_(), normal(2, 1, 8, 8, seed=1).requires_grad_()
    perceptual_distance(network(), x, y).sum().backward()
    assert x.grad is None and (y.grad.flatten(1) != 0).float().mean() > 0.9


def test_maps_without_a_signal_give_no_nan():
    net, y = network(), normal(2, 1, 8, 8, seed=1).requires_grad_()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    distance = perceptual_distance(net, normal(2, 1, 8, 8), y)
    distance.sum().backward()
    assert torch.equal(distance.detach(), torch.zeros(2)) and torch.equal(y.grad, torch.zeros_like(y))


# --- the discriminator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(28, 28), (28, 20), (8, 16)])
def test_one_logit_for_each_four_by_four_pixels(height, width):
    assert PatchDiscriminator()(normal(2, 1, height, width)).shape == (2, 1, height // 4, width // 4)


def test_the_convolutions_of_a_logit_see_18_x_18_pixels():
    torch.manual_seed(0)
    net, x = PatchDiscriminator(), normal(1, 1, 40, 44).requires_grad_()
    net.layers = nn.Sequential(*(layer for layer in net.layers if not isinstance(layer, nn.GroupNorm)))
    (grad,) = torch.autograd.grad(net(x)[0, 0, 5, 4], x)
    seen = grad[0, 0] != 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    assert seen.sum() == 18 * 18 and (len(rows), len(columns)) == (18, 18)
    assert (rows[0], columns[0]) == (4 * 5 - 7, 4 * 4 - 7)  # around the four by four pixels of its place


def test_the_hinge_is_2_for_a_silent_judge_0_for_a_sure_one_and_4_for_one_that_is_wrong():
    one = torch.ones(3, 1, 2, 5)
    for real, fake, loss in ((0, 0, 2), (1, -1, 0), (7, -9, 0), (-1, 1, 4), (0.5, 0, 1.5), (0, -0.25, 1.75)):
        assert torch.equal(hinge_loss(real * one, fake * one), torch.full((3,), float(loss)))


def test_each_image_has_a_hinge_of_its_own():
    real, fake = normal(3, 1, 2, 5), normal(3, 1, 2, 5, seed=1)
    expected = [sum(max(0, 1 - r) + max(0, 1 + f) for r, f in zip(a.flatten().tolist(), b.flatten().tolist())) / 10
                for a, b in zip(real, fake)]
    torch.testing.assert_close(hinge_loss(real, fake), torch.tensor(expected))


def test_the_discriminator_learns_to_tell_blurred_clothes_from_real_ones():
    torch.manual_seed(0)
    x, net = to_float(load().images[:16]), PatchDiscriminator()
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=-1.0), 3, 1)
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for _ in range(25):
        loss = hinge_loss(net(x), net(blurred)).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - 2) < 0.3 and losses[-1] < 1, losses
    with torch.no_grad():
        assert net(x).mean() > 0 > net(blurred).mean(), "above 0 means real"


# --- the loss --------------------------------------------------------------------------------------------------------


def test_with_both_weights_0_it_is_the_loss_of_the_vae_and_there_is_no_discriminator():
    model, x = judged(), normal(3, 1, 8, 12)
    terms = model.loss(x, generator=seeded(4))
    reconstruction, kl = vae_loss(model.vae, x, seeded(4))
    assert terms.keys() == {"loss", "reconstruction", "kl"} and model.discriminator is None
    assert torch.equal(terms["loss"], reconstruction + SMALL.beta * kl)
    assert torch.equal(terms["reconstruction"], reconstruction) and torch.equal(terms["kl"], kl)


@torch.no_grad()
@pytest.mark.parametrize("kind", [VAE, VQVAE])
def test_the_loss_is_the_formula_for_each_image(kind):
    torch.manual_seed(0)
    vae = kind(VAEConfig(channels=(8, 8, 8), beta=0.3, codes=5))
    model, net, x = judged(vae, perceptual=0.7, adversarial=3.0, start=0.5), network(), normal(3, 1, 8, 12)
    terms = model.loss(x, net, 0.5, seeded(4))
    x_hat, reconstruction, regularization = vae_terms(vae, x, seeded(4))
    real, fake = model.discriminator(x), model.discriminator(x_hat)
    expected = (reconstruction + 0.3 * regularization + 0.7 * 96 * perceptual_distance(net, x, x_hat)
                - 3.0 * fake.mean(dim=(1, 2, 3)) + hinge_loss(real, fake))
    assert terms["loss"].shape == (3,)
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["discriminator"], hinge_loss(real, fake))
    torch.testing.assert_close(terms["perceptual"], perceptual_distance(net, x, x_hat))


def test_the_vae_learns_from_its_own_terms_and_the_discriminator_from_the_hinge_alone():
    model, net, x = judged(perceptual=0.7, adversarial=30.0, start=0.5), network(), normal(3, 1, 8, 12)
    vae, judge = model.vae, model.discriminator

    def formula(adversarial):
        x_hat, reconstruction, kl = vae_terms(vae, x, seeded(4))
        own = reconstruction + SMALL.beta * kl + 0.7 * 96 * perceptual_distance(net, x, x_hat)
        return own - adversarial * judge(x_hat).mean(dim=(1, 2, 3)), hinge_loss(judge(x), judge(x_hat.detach()))

    for progress, adversarial in ((0.0, 0.0), (0.49, 0.0), (0.5, 30.0), (1.0, 30.0)):
        loss = model.loss(x, net, progress, seeded(4))["loss"]
        loss.sum().backward()
        own, hinge = formula(adversarial)
        close = dict(atol=1e-3, rtol=1e-4)
        assert_same([p.grad for p in vae.parameters()], gradients(own, vae), **close)
        assert_same([p.grad for p in judge.parameters()], gradients(hinge, judge), **close)
        model.zero_grad()
    quiet, loud = (gradients(formula(a)[0], vae) for a in (0.0, 30.0))
    assert max((a - b).abs().max() for a, b in zip(quiet, loud)) > 0.1  # or the comparison above would say nothing


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_decoders_turn_leaves_no_trace_in_the_discriminator(precision):
    model, x, found = judged(adversarial=30.0, start=0.5), normal(3, 1, 8, 12), []
    for progress in (0.0, 1.0):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = model.loss(x, None, progress, seeded(4))["loss"]
        loss.sum().backward()
        found.append([p.grad.clone() for p in model.discriminator.parameters()])
        assert all(p.requires_grad for p in model.discriminator.parameters())
        model.zero_grad()
    assert any(g.any() for g in found[0]) and all(torch.equal(a, b) for a, b in zip(*found))


@torch.no_grad()
def test_under_bfloat16_autocast_every_term_comes_out_in_float32():
    model, net, x = judged(perceptual=0.7, adversarial=3.0), network(), normal(3, 1, 8, 12)
    exact = model.loss(x, net, 1.0, seeded(4))
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.loss(x, net, 1.0, seeded(4))
    assert {v.dtype for v in terms.values()} == {torch.float32}
    for name, value in terms.items():
        torch.testing.assert_close(value, exact[name], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("wrong", [{"perceptual": -1.0}, {"adversarial": float("nan")}, {"perceptual": float("inf")},
                                   {"speed": -1.0}, {"width": 0}, {"start": 1.1}, {"start": -0.1}, {"start": float("nan")}], ids=str)
def test_impossible_weights_are_refused_by_name(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        PerceptualConfig(**wrong)


# --- in training -----------------------------------------------------------------------------------------------------


def trained(vae, steps=6, **config):
    x, torch_config = normal(16, 1, 8, 8), TrainConfig(steps=steps, batch=8, lr=1e-3, warmup=1, ema=0.5, clip=1e6)
    torch.manual_seed(1)
    state = TrainState(PerceptualVAE(vae, PerceptualConfig(**config)), torch_config)
    net = network()
    for _ in train(state, lambda model, index, noise: model.loss(x[index], net, 1.0, noise), 16, torch_config):
        pass
    return state


def test_the_discriminator_takes_steps_as_much_longer_as_its_speed_says():
    def moved(speed):
        torch.manual_seed(0)
        vae = VAE(SMALL)
        torch.manual_seed(1)
        before = copy.deepcopy(PerceptualVAE(vae, PerceptualConfig(adversarial=1.0)).state_dict())
        after = trained(vae, steps=1, adversarial=1.0, speed=speed).model.state_dict()  # the same start: seeds 0 and 1
        return {name: after[name] - before[name] for name in before}

    slow, fast = moved(1.0), moved(4.0)
    for name, step in slow.items():
        times = 4.0 if name.startswith("discriminator.") else 1.0
        assert step.any() or not name.startswith("discriminator."), name
        torch.testing.assert_close(fast[name], times * step, rtol=1e-3, atol=2e-7)  # atol: rounding of weights near 1


def test_the_discriminator_is_as_wide_as_asked_for():
    for width in (8, 48):
        judge = PerceptualVAE(VAE(SMALL), PerceptualConfig(adversarial=1.0, width=width)).discriminator
        widths = [layer.out_channels for layer in judge.layers if isinstance(layer, torch.nn.Conv2d)]
        assert widths == [width, 2 * width, 4 * width, 1]


@pytest.mark.parametrize("decoder_only", [True, False])
def test_decoder_only_leaves_the_encoder_bit_for_bit_and_everything_else_moves(decoder_only):
    torch.manual_seed(0)
    vae = VAE(SMALL)
    before = copy.deepcopy(vae.state_dict())
    state = trained(vae, perceptual=0.1, adversarial=1.0, decoder_only=decoder_only)
    for model in (state.model, state.ema.model):
        for name, now in model.vae.state_dict().items():
            assert torch.equal(now, before[name]) == (decoder_only and name.startswith("encoder.")), name
    torch.manual_seed(1)
    fresh = PatchDiscriminator().state_dict()
    assert not any(torch.equal(now, fresh[name]) for name, now in state.model.discriminator.state_dict().items())


def test_after_a_training_of_the_decoder_alone_the_whole_vae_can_be_trained_again():
    torch.manual_seed(0)
    vae = VAE(SMALL)
    PerceptualVAE(vae, PerceptualConfig(decoder_only=True))
    assert not any(p.requires_grad for p in vae.encoder.parameters())
    assert all(p.requires_grad for p in vae.decoder.parameters())
    PerceptualVAE(vae, PerceptualConfig())
    assert all(p.requires_grad for p in vae.parameters())


def test_the_decoder_alone_trained_with_an_interruption_ends_with_the_same_weights(tmp_path):
    def state(steps):
        torch.manual_seed(0)
        vae = VAE(SMALL)
        torch.manual_seed(1)
        model = PerceptualVAE(vae, PerceptualConfig(adversarial=1.0, start=0.5, decoder_only=True))
        return TrainState(model, TrainConfig(steps=steps, batch=8, warmup=1, clip=1e6))

    def run(state, to):
        config, x = TrainConfig(steps=6, batch=8, warmup=1, clip=1e6), normal(16, 1, 8, 8)

        def objective(model, index, noise):
            return model.loss(x[index], None, state.step / 6, noise)

        loop = train(state, objective, 16, config)
        while state.step < to:
            next(loop)
        return state

    whole, first = run(state(6), 6), run(state(6), 4)
    first.save(tmp_path / "state.safetensors")
    second = state(6)
    second.load(tmp_path / "state.safetensors")
    a, b = whole.model.state_dict(), run(second, 6).model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_perceptual_term_without_its_network_is_refused():
    with pytest.raises(ValueError, match="needs a FeatureNet"):
        judged(perceptual=0.7).loss(normal(3, 1, 8, 12))
