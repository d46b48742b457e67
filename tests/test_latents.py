"""The latents of a data set: moments in order, one scale from all of them, and fresh samples of unit variance.

Random tests use fixed seeds and bands of at least 5.5 standard errors: with other seeds, fewer than one in a million
would fail.
"""

from types import GeneratorType

import numpy as np
import pytest
import torch

from ldm_minimal.data import to_float
from ldm_minimal.latents import draw_latents, encode_moments, latent_scale
from ldm_minimal.vae import VAE, DiagonalGaussian, VAEConfig


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_moments(n=2000, seed=0):
    """Means of unequal channels and unequal images, the first of them small; variances from .02 to 2.7."""
    generator = seeded(seed)
    mean = torch.randn(n, 4, 3, 3, generator=generator) * torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None, None] + 1.5
    mean *= torch.linspace(0.3, 1.5, n)[:, None, None, None]
    logvar = torch.rand(n, 4, 3, 3, generator=generator) * 5 - 4
    return torch.stack([mean, logvar], dim=1)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(VAEConfig(channels=(8, 8, 8))).eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (11, 1, 8, 12), generator=seeded(), dtype=torch.uint8)


# --- the scale -------------------------------------------------------------------------------------------------------


def test_the_scale_is_one_over_the_square_root_of_the_total_variance_in_float64():
    moments = some_moments()
    mean, logvar = moments.double().numpy()[:, 0], moments.double().numpy()[:, 1]
    exact = 1 / np.sqrt(np.mean((mean - mean.mean()) ** 2) + np.mean(np.exp(logvar)))
    assert isinstance(latent_scale(moments), float)
    assert latent_scale(moments) == pytest.approx(exact, rel=1e-12)  # float32 sums would agree to about 1e-7


def test_the_scale_is_that_of_samples_and_not_of_their_means():
    moments = some_moments()
    z = DiagonalGaussian(moments[:, 0], moments[:, 1]).sample(seeded(1)).double()
    measured = 1 / z.std().item()
    # 5.5 standard errors: the means are given, so only the noise's share of the variance is uncertain
    variance = moments[:, 1].double().exp()
    spread = 2 * (moments[:, 0].double() - moments[:, 0].double().mean()).square() * 2 * variance + 2 * variance**2
    band = 5.5 * spread.sum().sqrt().item() / z.numel() / (2 * z.var().item())
    assert band < 0.02
    assert latent_scale(moments) == pytest.approx(measured, rel=band)
    assert abs(latent_scale(moments) * moments[:, 0].std().item() - 1) > 3 * band


def test_the_scale_is_not_that_of_the_first_images():
    moments = some_moments()
    assert abs(latent_scale(moments[:200]) / latent_scale(moments) - 1) > 0.2
    turned = moments.flip(0)
    assert latent_scale(turned) == pytest.approx(latent_scale(moments), rel=1e-12)


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_latents_that_are_larger_by_a_factor_get_a_scale_that_is_smaller_by_it(factor):
    moments = some_moments()
    larger = torch.stack([moments[:, 0] * factor, moments[:, 1] + 2 * np.log(factor)], dim=1)
    assert latent_scale(larger) == pytest.approx(latent_scale(moments) / factor, rel=1e-5)


def test_the_scale_does_not_depend_on_where_the_latents_are_centred():
    moments = some_moments()
    moved = torch.stack([moments[:, 0] + 10, moments[:, 1]], dim=1)
    assert latent_scale(moved) == pytest.approx(latent_scale(moments), rel=1e-5)


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_drawn_latents_have_unit_variance():
    moments = some_moments()
    z0 = draw_latents(moments, latent_scale(moments), seeded(2))
    assert z0.shape == (2000, 4, 3, 3)
    assert z0.std().item() == pytest.approx(1, abs=0.02)


def test_a_drawn_latent_is_the_scale_times_a_posterior_sample():
    moments = some_moments(5)
    expected = 0.3 * (moments[:, 0] + (moments[:, 1] / 2).exp() * torch.randn(5, 4, 3, 3, generator=seeded(3)))
    torch.testing.assert_close(draw_latents(moments, 0.3, seeded(3)), expected)


def test_each_draw_is_fresh_and_each_seed_the_same():
    moments, generator = some_moments(5), seeded(4)
    first = draw_latents(moments, 1.0, generator)
    assert not torch.equal(first, draw_latents(moments, 1.0, generator))
    assert torch.equal(first, draw_latents(moments, 1.0, seeded(4)))
    assert not torch.equal(draw_latents(moments, 1.0), draw_latents(moments, 1.0))


# --- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 5, 11, 500])
def test_the_moments_are_those_of_encode_in_order_at_any_batch_size(vae, images, batch):
    chunks = list(encode_moments(vae, images, batch))
    assert [len(c) for c in chunks] == [len(c) for c in images.split(batch)]
    with torch.no_grad():
        q = vae.encode(to_float(images))
    torch.testing.assert_close(torch.cat(chunks), torch.stack([q.mean, q.logvar], dim=1), atol=1e-5, rtol=1e-5)
    assert torch.cat(chunks).shape == (11, 2, 4, 2, 3)


def test_encoding_is_lazy_and_keeps_no_graph(vae, images):
    moments = encode_moments(vae, images, 4)
    assert isinstance(moments, GeneratorType)
    first = next(moments)
    assert len(first) == 4 and not first.requires_grad
    assert torch.is_grad_enabled()  # between two batches the caller's own setting holds


def test_moments_are_float32_in_every_precision(vae, images):
    exact, rounded = (torch.cat(list(encode_moments(vae, images, 4, precision))) for precision in ("fp32", "bf16"))
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05  # in bf16 the convolutions are indeed rounded


def test_from_images_to_latents_of_unit_variance(vae, images):
    moments = torch.cat(list(encode_moments(vae, images.repeat(60, 1, 1, 1), 100)))
    z0 = draw_latents(moments, latent_scale(moments), seeded(5))
    assert z0.std().item() == pytest.approx(1, abs=0.05)
