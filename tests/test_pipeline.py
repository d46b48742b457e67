"""The whole model behind one object: the scale stays inside it, a sample depends on its own seed alone, errors are clear."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ldm_minimal import LatentDiffusion
from ldm_minimal.data import load, to_float, to_uint8
from ldm_minimal.denoiser import TARGETS, DenoiserConfig
from ldm_minimal.evaluate import balanced, classify, compare, draw, evaluate, reconstruct
from ldm_minimal.metrics import frechet_distance, kid, memorisation, prdc
from ldm_minimal.pipeline import WEIGHTS, SampleConfig, build_denoiser, load_classifier
from ldm_minimal.sampler import SOLVERS, sample, sample_noise
from ldm_minimal.schedule import GRIDS, SCHEDULES, time_grid
from ldm_minimal.unet import UNet, UNetConfig
from ldm_minimal.vae import VAE, DiagonalGaussian, VAEConfig


def build(seed: int) -> LatentDiffusion:
    torch.manual_seed(seed)
    net = UNet(UNetConfig(channels=(16, 32), blocks=1))
    for p in net.parameters():  # away from the zero-initialised output, so that label and time matter
        torch.nn.init.normal_(p, std=0.05)
    config = DenoiserConfig()
    return LatentDiffusion(VAE(VAEConfig(channels=(8, 8, 8))), build_denoiser(net, config), 0.5, (4, 7, 7), config=config)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build(seed=0)


@pytest.fixture
def other(model) -> LatentDiffusion:
    """Another denoiser of the same latents."""
    return LatentDiffusion(model.vae, build(seed=1).denoiser, model.scale, model.latent_shape, config=model.config)


class Identity(torch.nn.Module):
    """An autoencoder that changes nothing: what encode and decode do is then what the pipeline adds."""

    config = SimpleNamespace(latent_channels=1)

    def encode(self, x):
        return DiagonalGaussian(x, torch.full_like(x, -30.0))

    def decode(self, z):
        return z


def test_the_scale_is_applied_in_encode_and_undone_in_decode(model):
    bare = LatentDiffusion(Identity(), model.denoiser, 0.25, (1, 28, 28))
    x = torch.rand(3, 1, 28, 28) * 2 - 1
    assert torch.equal(bare.encode(x), 0.25 * x)
    torch.testing.assert_close(bare.decode(bare.encode(x)), x)
    torch.testing.assert_close(bare.encode(x, torch.Generator().manual_seed(0)), 0.25 * x, atol=1e-5, rtol=0)


def test_decoded_images_stay_in_range(model):
    x = model.decode(100 * torch.randn(2, 4, 7, 7))
    assert x.min() >= -1 and x.max() <= 1 and x.shape == (2, 1, 28, 28)


def test_a_sample_depends_on_its_seed_and_place_alone(model):
    labels = torch.arange(7)
    whole = model.sample(labels, steps=3)
    for batch in (1, 3):
        torch.testing.assert_close(model.sample(labels, steps=3, batch=batch), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.sample(labels[:4], steps=3), whole[:4], atol=1e-5, rtol=1e-4)
    assert not torch.equal(model.sample(labels, steps=3, seed=1), whole)
    torch.manual_seed(5)
    assert torch.equal(model.sample(labels, steps=3), whole), "the global random state does not matter"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", GRIDS)
def test_every_solver_and_grid_gives_finite_images(model, solver, spacing):
    x = model.sample(["Bag"], steps=3, solver=solver, spacing=spacing, guidance=1.5)
    assert x.shape == (1, 1, 28, 28) and torch.isfinite(x).all()


def test_names_ids_and_tensors_name_the_same_classes(model):
    a = model.sample(["Sneaker", "bag", "top"], steps=2)
    assert torch.equal(a, model.sample([7, 8, 0], steps=2)) and torch.equal(a, model.sample(torch.tensor([7, 8, 0]), steps=2))
    assert torch.equal(model.sample("Bag", steps=2), model.sample([8], steps=2))


def test_guidance_may_be_a_function_of_time_and_an_interval(model):
    constant = model.sample([1, 2], steps=3, guidance=2.0)
    torch.testing.assert_close(model.sample([1, 2], steps=3, guidance=lambda t: torch.full_like(t, 2.0)), constant)
    conditional = model.sample([1, 2], steps=3, guidance=1.0)
    torch.testing.assert_close(model.sample([1, 2], steps=3, guidance=9.0, interval=(0.0, 0.0)), conditional)
    assert not torch.equal(constant, conditional)


def test_autoguidance_by_the_model_itself_changes_nothing_and_by_another_one_does(model, other):
    plain = model.sample([1, 2], steps=3, guidance=1.0)
    torch.testing.assert_close(model.sample([1, 2], steps=3, guidance=3.0, weak=model), plain, rtol=0, atol=1e-5)
    guided = model.sample([1, 2], steps=3, guidance=2.0, weak=other)
    assert (guided - plain).abs().max() > 1e-3
    torch.testing.assert_close(model.sample([1, 2], steps=3, guidance=0.0, weak=other), other.sample([1, 2], steps=3, guidance=1.0))
    one_by_one = torch.cat([model.decode(list(model.trajectory(torch.tensor([c]), [i], 3, 2.0, weak=other))[-1][0]) for i, c in enumerate((1, 2))])
    torch.testing.assert_close(one_by_one, guided, rtol=0, atol=1e-5)


def test_a_weak_model_of_other_latents_is_refused(model, other):
    for name, value in (("scale", 2 * model.scale), ("latent_shape", (4, 8, 8)), ("dataset", "mnist"), ("vae", build(seed=1).vae),
                        ("config", replace(model.config, schedule="linear"))):
        known = getattr(other, name)
        setattr(other, name, value)
        with pytest.raises(ValueError, match="weak model.*same data set, encoder"):
            model.sample([1], steps=1, weak=other)
        setattr(other, name, known)
    other.vae = copy.deepcopy(model.vae)
    torch.nn.init.zeros_(other.vae.decoder.layers[0].weight)  # a decoder of its own is no obstacle
    model.sample([1], steps=1, weak=other)
    other.denoiser.to("meta")
    with pytest.raises(ValueError, match="weak model is on meta, this one on cpu"):
        model.sample([1], steps=1, weak=other)


@pytest.mark.parametrize("options, words", [
    ({"steps": 0}, "steps.*0"), ({"steps": -3}, "steps.*-3"), ({"guidance": -1.0}, "guidance.*-1"), ({"guidance": float("nan")}, "guidance.*nan"),
    ({"solver": "euler"}, "unknown solver 'euler'.*dpm"), ({"spacing": "karras"}, "unknown spacing 'karras'.*log_snr"),
])
def test_wrong_options_are_refused_with_the_valid_ones(model, options, words):
    with pytest.raises(ValueError, match=words):
        model.sample([1], **options)


def test_wrong_classes_and_shapes_are_refused(model):
    with pytest.raises(ValueError, match="unknown class 'Hat'.*Sneaker"):
        model.sample(["Hat"])
    with pytest.raises(ValueError, match="unknown class 10"):
        model.sample([10])
    with pytest.raises(ValueError, match="empty"):
        model.sample([])
    with pytest.raises(ValueError, match=r"\(N, 4, 7, 7\), got \(1, 4, 8, 8\)"):
        model.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="scale"):
        LatentDiffusion(model.vae, model.denoiser, float("nan"), (4, 7, 7))


def test_draw_takes_the_classes_in_turn_and_counts_its_cost(model):
    images, labels, cost = draw(model, 23, SampleConfig(steps=2, guidance=1.0))
    assert images.dtype == torch.uint8 and images.shape == (23, 1, 28, 28)
    assert labels.bincount().tolist() == [3, 3, 3] + [2] * 7
    assert cost["evaluations_per_image"] == cost["forward_passes_per_image_at_most"] == 2
    assert draw(model, 2, SampleConfig(steps=2, guidance=2.0))[2]["forward_passes_per_image_at_most"] == 4


def test_balanced_takes_as_many_of_each_class_as_it_can():
    labels = load(split="test").labels
    rows = balanced(labels, 100)
    assert labels[rows].bincount().tolist() == [10] * 10 and len(set(rows.tolist())) == 100
    assert len(balanced(labels, len(labels))) == len(labels)
    assert balanced(torch.tensor([0, 0, 0, 1]), 4).sort().values.tolist() == [0, 1, 2, 3]


# -- what ships -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net, share", [("unet", 0.8), ("dit", 0.8), ("weak", 0.6), ("best", 0.8), ("best/weak", 0.6)])
def test_the_shipped_models_draw_what_they_are_asked_for(net, share, generator):
    shipped = LatentDiffusion.pretrained(net)
    labels = torch.arange(10).repeat(4)
    images, _, _ = draw(shipped, 40, SampleConfig(steps=10))
    _, found = classify(load_classifier(WEIGHTS / "classifier-fashion-mnist.json"), images)
    assert (found == labels).double().mean() > share, "most samples are recognised as the class that was asked for"


# the best model alone is nearer to what 200 real images score, so there is less to gain
@pytest.mark.parametrize("net, weak, share", [("unet", "weak", 0.9), ("best", "best/weak", 0.95)])
def test_away_from_the_shipped_weak_model_samples_come_closer_to_real_images(net, weak, share):
    good, weak = LatentDiffusion.pretrained(net), LatentDiffusion.pretrained(weak)
    classifier = load_classifier(WEIGHTS / "classifier-fashion-mnist.json")
    reference, _ = classify(classifier, load(split="test").images)
    apart = {}
    for name, model, guidance, other in (("weak", weak, 1.0, None), ("good", good, 1.0, None), ("both", good, 1.5, weak)):
        images, _, _ = draw(model, 200, SampleConfig(steps=8, guidance=guidance), weak=other)
        apart[name] = frechet_distance(classify(classifier, images)[0], reference)
    assert apart["both"] < share * apart["good"] and apart["good"] < apart["weak"], apart


def test_the_shipped_autoencoder_rebuilds_test_images():
    from ldm_minimal.metrics import psnr

    shipped, test = LatentDiffusion.pretrained(), load(split="test")
    images = test.images[:200]
    assert psnr(images, reconstruct(shipped, images)).mean() > 25
    z = shipped.encode(to_float(load().images[:2000]), torch.Generator().manual_seed(0))
    assert abs(z.std().item() - 1) < 0.03, "scaled latents have unit variance"


def test_an_unknown_shipped_model_lists_those_that_ship():
    with pytest.raises(ValueError, match="unknown model 'gan'.*unet, dit, weak, best, best/weak"):
        LatentDiffusion.pretrained("gan")


def test_the_autoencoder_of_the_best_model_rebuilds_better_with_latents_of_its_own():
    from ldm_minimal.metrics import psnr, ssim

    shipped, better = (LatentDiffusion.pretrained(net).vae for net in ("unet", "best"))
    images, scores = load(split="test").images[:500], []
    for vae in (shipped, better):
        with torch.no_grad():
            z = vae.encode(to_float(images)).mode()
            rebuilt = to_uint8(vae.decode(z))
        scores.append((psnr(images, rebuilt).mean(), ssim(images, rebuilt).mean()))
    assert scores[1][0] > scores[0][0] and scores[1][1] > scores[0][1], scores
    assert (shipped.encode(to_float(images)).mode() - better.encode(to_float(images)).mode()).std() > 0.5, (
        "a denoiser of the one cannot work on the latents of the other")


# -- each option does what it says, and each row is of the set that it names --------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_denoiser_is_built_as_its_configuration_says(schedule, target):
    net = UNet(UNetConfig(channels=(16, 32), blocks=1))
    made = build_denoiser(net, DenoiserConfig(schedule, target, "logit_normal", 0.3))
    assert (made.net, made.schedule, made.target, made.times, made.drop) == (net, SCHEDULES[schedule], target, "logit_normal", 0.3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_solver_asked_for_is_the_one_that_draws(model, solver):
    labels, schedule = torch.tensor([1, 8]), model.denoiser.schedule
    *_, (found, _) = model.trajectory(labels, [0, 1], 4, 1.0, solver, seed=5)
    randn = sample_noise(5, [0, 1], model.latent_shape)
    *_, (expected, _) = sample(model.denoise, randn(), labels, schedule, time_grid(4, schedule, "middle"), *SOLVERS[solver], randn)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_row_has_its_precision_from_the_samples_and_its_recall_from_the_real_images(generator):
    one, other, drawn = torch.randn(3, 100, 2, generator=generator)
    real = torch.cat([one[:50], other[:50] + 50])
    row = compare(drawn, real, real)  # one mode out of two
    assert row["precision"] > 0.7 and row["recall"] <= 0.5


def test_each_row_of_the_table_is_of_the_set_that_it_names(model):
    train, test = (replace(d, images=d.images[:100], labels=d.labels[:100]) for d in (load(), load(split="test")))
    judge, config = load_classifier(WEIGHTS / "classifier-fashion-mnist.json"), SampleConfig(steps=2, guidance=1.0, seed=3)
    result = evaluate(model, judge, train, test, 40, config, seeds=2)
    real, rows, mine = classify(judge, test.images)[0], balanced(test.labels, 40), balanced(train.labels, 40)
    sets = {"floor": (train.images[mine], train.labels[mine]), "ceiling": (reconstruct(model, test.images)[rows], test.labels[rows]),
            "samples": draw(model, 40, config)[:2], "samples, seed 4": draw(model, 40, replace(config, seed=4))[:2]}
    for name, (images, labels) in sets.items():
        row, (x, found) = (result["table"] | result["more_seeds"])[name], classify(judge, images)
        assert row["fd"] == pytest.approx(frechet_distance(x, real), rel=1e-3)
        assert row["kid_x1000"] == pytest.approx(1000 * kid(x, real)[0], rel=1e-3, abs=1e-3)
        assert {k: row[k] for k in ("precision", "recall", "density", "coverage")} == pytest.approx(prdc(real[rows], x), abs=0.03)
        assert row["class_accuracy"] == pytest.approx((found == labels).double().mean().item())
    assert result["table"]["floor"]["class_accuracy"] > 0.8
    assert result["memorisation"] == pytest.approx(memorisation(sets["samples"][0], test.images[:40], train.images), rel=1e-3)
