"""The autoencoder: its sizes, its Gaussian, its loss, and that both terms are sums over one image.

Random tests use fixed seeds and bands of at least 5.5 standard errors: with other seeds, fewer than one in a million
would fail.
"""

from math import exp

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from helpers_theory import seeded, shake
from ldm_minimal.layers import ResBlock, Upsample
from ldm_minimal.vae import VAE, DiagonalGaussian, VAEConfig, vae_loss, vae_terms


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(channels=(8, 8, 8), **k):
    torch.manual_seed(0)
    return VAE(VAEConfig(channels=channels, **k)).eval()


def gaussian(seed=0):
    return DiagonalGaussian(2 * normal(3, 4, 5, 6, seed=seed), normal(3, 4, 5, 6, seed=seed + 1))


# --- the Gaussian ----------------------------------------------------------------------------------------------------


def test_kl_equals_that_of_torch_distributions_summed_over_each_latent():
    q = gaussian()
    exact = kl_divergence(Normal(q.mean.double(), (q.logvar.double() / 2).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    assert q.kl().shape == (3,)
    torch.testing.assert_close(q.kl().double(), exact, atol=1e-3, rtol=1e-5)


def test_kl_of_twice_the_latent_is_twice_the_kl():
    q = gaussian()
    double = DiagonalGaussian(q.mean.repeat(1, 1, 2, 1), q.logvar.repeat(1, 1, 2, 1))
    torch.testing.assert_close(double.kl(), 2 * q.kl())


def test_kl_of_one_image_does_not_see_the_others():
    q = gaussian()
    for i in range(3):
        torch.testing.assert_close(DiagonalGaussian(q.mean[i : i + 1], q.logvar[i : i + 1]).kl(), q.kl()[i : i + 1])


def test_kl_is_zero_for_the_prior_and_positive_for_anything_else():
    zero = torch.zeros(2, 4, 7, 7)
    assert torch.equal(DiagonalGaussian(zero, zero).kl(), torch.zeros(2))
    for mean, logvar in ((zero + 0.1, zero), (zero, zero + 0.1), (zero, zero - 0.1), (zero - 0.1, zero)):
        assert DiagonalGaussian(mean, logvar).kl().min() > 0.1


@pytest.mark.parametrize("logvar", [-4.0, -1.0, 0.0, 2.0])
def test_samples_have_the_mean_and_the_standard_deviation_exp_of_half_logvar(logvar):
    n, std = 40_000, torch.tensor(logvar / 2).exp().item()
    z = DiagonalGaussian(torch.full((n, 1, 1, 1), 3.0), torch.full((n, 1, 1, 1), logvar)).sample(seeded(5))
    assert abs(z.mean().item() - 3) < 5.5 * std / n**0.5
    assert abs(z.std().item() / std - 1) < 5.5 / (2 * n) ** 0.5  # the estimate's standard error is 1 / sqrt(2n)


def test_samples_of_different_values_are_independent():
    n = 20_000
    z = DiagonalGaussian(torch.zeros(n, 2, 1, 2), torch.zeros(n, 2, 1, 2)).sample(seeded(6)).flatten(1)
    off = torch.corrcoef(z.T) - torch.eye(4)
    assert off.abs().max() < 5.5 / n**0.5


def test_a_generator_decides_the_sample():
    q = gaussian()
    assert torch.equal(q.sample(seeded(1)), q.sample(seeded(1)))
    assert not torch.equal(q.sample(seeded(1)), q.sample(seeded(2)))
    generator = seeded(1)
    assert not torch.equal(q.sample(generator), q.sample(generator))
    assert not torch.equal(q.sample(), q.sample())


def test_the_mode_is_the_mean():
    q = gaussian()
    assert torch.equal(q.mode(), q.mean)


def test_the_sample_is_differentiable_in_mean_and_logvar():
    mean, logvar = normal(2, 4, 3, 3).requires_grad_(), normal(2, 4, 3, 3, seed=1).requires_grad_()
    z = DiagonalGaussian(mean, logvar).sample(seeded(3))
    by_mean, by_logvar = torch.autograd.grad(z.sum(), (mean, logvar))
    assert torch.equal(by_mean, torch.ones_like(mean))
    half = (z - mean).detach() / 2  # the derivative of exp(logvar / 2) * eps is half of it
    torch.testing.assert_close(by_logvar, half, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_kl_is_the_mean_and_half_of_the_variance_minus_one():
    mean, logvar = normal(2, 4, 3, 3).requires_grad_(), normal(2, 4, 3, 3, seed=1).requires_grad_()
    by_mean, by_logvar = torch.autograd.grad(DiagonalGaussian(mean, logvar).kl().sum(), (mean, logvar))
    torch.testing.assert_close(by_mean, mean.detach())
    torch.testing.assert_close(by_logvar, (logvar.detach().exp() - 1) / 2)


@pytest.mark.parametrize("logvar", [1e4, 90.0, -1e4])
def test_an_extreme_logvar_stays_finite(logvar):
    q = DiagonalGaussian(torch.zeros(1, 4, 7, 7), torch.full((1, 4, 7, 7), logvar))
    assert q.kl().isfinite().all() and q.sample(seeded()).isfinite().all()


def test_a_logvar_that_float16_could_not_exponentiate_is_handled_in_float32():
    q = DiagonalGaussian(torch.zeros(1, 4, 7, 7).half(), torch.full((1, 4, 7, 7), 15.0).half())  # exp(15) > 65504
    assert q.mean.dtype == q.logvar.dtype == q.kl().dtype == q.sample().dtype == torch.float32
    assert q.kl().item() == pytest.approx(196 * 0.5 * (exp(15) - 16), rel=1e-5)


def test_float64_moments_keep_their_digits():
    mean, logvar = normal(2, 4, 3, 3).double() / 3, normal(2, 4, 3, 3, seed=1).double() / 3
    q = DiagonalGaussian(mean, logvar)
    exact = (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1) / 2
    assert q.kl().dtype == q.sample(seeded()).dtype == torch.float64
    torch.testing.assert_close(q.kl(), exact, atol=0, rtol=1e-13)


def test_ordinary_logvars_are_not_touched():
    logvar = torch.linspace(-25, 15, 4).reshape(1, 4, 1, 1)
    assert torch.equal(DiagonalGaussian(torch.zeros_like(logvar), logvar).logvar, logvar)


def test_mean_and_logvar_of_different_shapes_are_refused_with_both():
    with pytest.raises(ValueError, match=r"\(1, 4, 7, 7\).*\(1, 4, 7, 6\)"):
        DiagonalGaussian(torch.zeros(1, 4, 7, 7), torch.zeros(1, 4, 7, 6))


# --- the network -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_784_values_become_196_and_784_again():
    vae, x = VAE(), normal(2, 1, 28, 28)
    q = vae.encode(x)
    assert vae.config.factor == 4 and q.mean.shape == q.logvar.shape == (2, 4, 7, 7)
    assert (x[0].numel(), q.mean[0].numel()) == (784, 196)
    assert vae.decode(q.mode()).shape == x.shape


def test_the_decoder_may_have_more_blocks_than_the_encoder():
    def blocks(part):
        return sum(isinstance(layer, ResBlock) for layer in part.layers)

    same, deeper = small(blocks=2), small(blocks=1, decoder_blocks=3)
    assert (blocks(same.encoder), blocks(same.decoder)) == (6, 6), "0: as many as in the encoder"
    assert (blocks(deeper.encoder), blocks(deeper.decoder)) == (3, 9)
    x = normal(2, 1, 8, 8)
    assert deeper.decode(deeper.encode(x).mode()).shape == x.shape
    with pytest.raises(ValueError, match="decoder_blocks must be .*>= 0, got -1"):
        VAEConfig(decoder_blocks=-1)


@torch.no_grad()
@pytest.mark.parametrize("channels, factor", [((8,), 1), ((8, 12), 2), ((4, 8, 12), 4), ((4, 4, 8, 8), 8)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_other_factors_work_and_images_need_not_be_square(channels, factor, blocks):
    vae, x = small(channels, blocks=blocks, latent_channels=3, in_channels=2), normal(2, 2, 16, 24)
    assert vae.config.factor == factor
    q = vae.encode(x)
    assert q.mean.shape == (2, 3, 16 // factor, 24 // factor) and vae.decode(q.sample(seeded())).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("channels, factors, factor", [
    ((8, 12), (7,), 7), ((4, 8, 12), (2, 7), 14), ((4, 8, 8), (7, 2), 14), ((8, 8), (1,), 1), ((8, 8), (4,), 4),
], ids=str)
def test_factors_say_how_many_times_smaller_each_further_resolution_is(channels, factors, factor):
    vae, x = small(channels, factors=factors), normal(2, 1, 28, 56)
    q = vae.encode(x)
    assert vae.config.factor == factor and vae.config.steps == factors
    assert q.mean.shape == (2, 4, 28 // factor, 56 // factor) and vae.decode(q.mode()).shape == x.shape
    with pytest.raises(ValueError, match=f"multiples of {factor + 1}"):
        small((8, 8), factors=(factor + 1,)).encode(torch.zeros(1, 1, 28, factor + 2))


@torch.no_grad()
def test_without_factors_each_resolution_is_half_of_the_one_before():
    a, b, x = small((4, 8, 12)), small((4, 8, 12), factors=(2, 2)), normal(2, 1, 8, 12)
    assert torch.equal(a.encode(x).mean, b.encode(x).mean)
    assert torch.equal(a.decode(a.encode(x).mean), b.decode(b.encode(x).mean))


@pytest.mark.parametrize("channels, factors", [
    ((8, 8, 8), (7,)), ((8,), (2,)), ((8, 8), (0,)), ((8, 8), (-2,)), ((), ()),
], ids=str)
def test_factors_that_do_not_fit_the_channels_are_refused_with_both(channels, factors):
    with pytest.raises(ValueError) as error:
        VAEConfig(channels=channels, factors=factors)
    assert f"channels {channels}" in str(error.value) and f"factors {factors}" in str(error.value)


def test_the_decoder_is_the_mirror_image_of_the_encoder():
    vae = small((4, 8, 12), blocks=2)
    down, up = ([m.conv1.in_channels for m in part.modules() if isinstance(m, ResBlock)]
                for part in (vae.encoder, vae.decoder))
    assert (down, up) == ([4, 4, 8, 8, 12, 12], [12, 12, 8, 8, 4, 4])
    factors = [m.factor for m in small((4, 8, 12), factors=(2, 7)).decoder.modules() if isinstance(m, Upsample)]
    assert factors == [7, 2]


@pytest.mark.parametrize("shape", [(1, 1, 30, 28), (1, 1, 28, 26), (1, 1, 27, 27)], ids=str)
def test_sizes_that_the_factor_does_not_divide_are_refused_with_both_numbers(shape):
    with pytest.raises(ValueError) as error:
        small().encode(torch.zeros(shape))
    assert "multiples of 4" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (1, 28, 28), (28, 28)], ids=str)
def test_images_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError) as error:
        small().encode(torch.zeros(shape))
    assert "(B, 1, H, W)" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (4, 7, 7)], ids=str)
def test_latents_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError) as error:
        small().decode(torch.zeros(shape))
    assert "(B, 4, h, w)" in str(error.value) and str(shape) in str(error.value)


@torch.no_grad()
def test_mean_and_logvar_are_the_two_halves_of_the_encoders_channels():
    vae, x = shake(small()), normal(2, 1, 8, 8)
    q, out = vae.encode(x), vae.encoder(x)
    assert torch.equal(q.mean, out[:, :4]) and torch.equal(q.logvar, out[:, 4:])


@torch.no_grad()
def test_rows_stay_rows_and_columns_stay_columns():
    vae, x = shake(small()), normal(2, 1, 8, 12)
    q = vae.encode(x)
    straight = vae.decode(q.mode())
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight.transpose(2, 3).clone())
    turned = vae.encode(x.transpose(2, 3))
    torch.testing.assert_close(turned.mean.transpose(2, 3), q.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(turned.mode()).transpose(2, 3), straight, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_image_is_encoded_and_decoded_alike_in_any_batch_and_mode():
    vae, x = shake(small()), normal(4, 1, 8, 8)
    q = vae.encode(x)
    out = vae.decode(q.mode())
    for i in range(4):
        alone = vae.encode(x[i : i + 1])
        torch.testing.assert_close(alone.mean, q.mean[i : i + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.logvar, q.logvar[i : i + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(alone.mode()), out[i : i + 1], atol=1e-5, rtol=1e-5)
    assert torch.equal(vae.train().encode(x).mean, q.mean)


@torch.no_grad()
def test_under_bfloat16_autocast_moments_images_and_loss_come_out_in_float32():
    vae, x = shake(small()), normal(2, 1, 8, 8)
    exact = vae.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        q = vae.encode(x)
        image = vae.decode(q.mode())
        reconstruction, kl = vae_loss(vae, x, seeded())
    assert {v.dtype for v in (q.mean, q.logvar, image, reconstruction, kl)} == {torch.float32}
    assert 0 < (q.mean - exact.mean).norm() / exact.mean.norm() < 0.05


# --- the loss --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_reconstruction_term_is_half_the_square_plus_the_absolute_error_summed_over_each_image():
    vae, x = shake(small()), normal(3, 1, 8, 12)
    reconstruction, kl = vae_loss(vae, x, seeded(4))
    q = vae.encode(x)
    error = (vae.decode(q.sample(seeded(4))) - x).double()  # of a sample, not of the mean
    expected = torch.stack([sum(0.5 * e**2 + abs(e) for e in image.flatten()) for image in error])
    assert reconstruction.shape == kl.shape == (3,)
    torch.testing.assert_close(reconstruction.double(), expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(kl, q.kl())
    assert torch.equal(vae_terms(vae, x, seeded(4))[0], vae.decode(q.sample(seeded(4))))


def test_the_loss_reaches_every_parameter():
    vae = shake(small())
    reconstruction, kl = vae_loss(vae, normal(3, 1, 8, 8), seeded(4))
    (reconstruction + 0.02 * kl).sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_the_decoders_error_reaches_logvar_through_the_sample():
    vae = shake(small())
    reconstruction, _ = vae_loss(vae, normal(3, 1, 8, 8), seeded(4))
    reconstruction.sum().backward()
    assert vae.encoder.layers[-1].bias.grad[4:].abs().min() > 0


@torch.no_grad()
def test_a_collapsed_encoder_shows_in_the_kl_and_in_reconstructions_that_ignore_the_image():
    vae, x = shake(small()), normal(4, 1, 8, 8)
    _, kl = vae_loss(vae, x, seeded())
    assert kl.min() > 1 and vae.encode(x).mean.std(dim=0).min() > 0.01
    for parameter in vae.encoder.layers[-1].parameters():
        parameter.zero_()  # mean 0, variance 1, whatever the image
    reconstruction, kl = vae_loss(vae, x, seeded())
    assert torch.equal(kl, torch.zeros(4))
    shown = vae.decode(vae.encode(x).sample(seeded()))
    assert torch.equal(shown, vae.decode(vae.encode(x.flip(0)).sample(seeded())))
