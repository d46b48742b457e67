"""The codebook: the nearest code, a gradient straight through the choice, an autoencoder that works like any other."""

import pytest
import torch

from helpers_theory import seeded, shake
from ldm_minimal import LatentDiffusion
from ldm_minimal.denoiser import DenoiserConfig
from ldm_minimal.latents import draw_latents, encode_moments, latent_scale
from ldm_minimal.pipeline import build_denoiser
from ldm_minimal.unet import UNet, UNetConfig
from ldm_minimal.vae import VAE, VAEConfig, vae_loss
from ldm_minimal.vq import VQVAE, VectorQuantizer, build_vae


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(codes=12, dim=3):
    torch.manual_seed(0)
    return VectorQuantizer(codes, dim)


def small(**k):
    torch.manual_seed(0)
    return shake(VQVAE(VAEConfig(**{"channels": (8, 8, 8), "codes": 16} | k))).eval()


def by_hand(book, z):
    """The number of the nearest code at each place, one by one in float64."""
    distance = (z.double().movedim(1, -1)[..., None, :] - book.double()).square().sum(-1)  # (B, h, w, K)
    return distance.argmin(-1)


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_choice_is_the_nearest_code_under_autocast_too(precision):
    codes, z = quantizer(512, 4), normal(4, 4, 7, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        q, index = codes(z)
    assert index.shape == (4, 7, 5) and q.shape == z.shape and q.dtype == torch.float32
    assert torch.equal(index, by_hand(codes.codebook.weight, z))


@torch.no_grad()
def test_what_comes_out_are_codes_bit_for_bit():
    codes, z = quantizer(), 100 * normal(2, 3, 4, 5)
    q, index = codes(z)
    for b, r, c in ((0, 0, 0), (1, 3, 2), (1, 0, 4)):
        assert torch.equal(q[b, :, r, c], codes.codebook.weight[index[b, r, c]])
    assert torch.equal(q, codes.codes(index))
    assert torch.equal(codes(q)[0], q), "a code is its own nearest code"


def test_the_gradient_goes_straight_through_and_not_to_the_codebook():
    codes, z, weight = quantizer(), normal(2, 3, 4, 5).requires_grad_(), normal(2, 3, 4, 5, seed=1)
    (weight * codes(z)[0]).sum().backward()
    assert torch.equal(z.grad, weight) and codes.codebook.weight.grad is None


@pytest.mark.parametrize("shape", [(1, 4, 7, 7), (3, 7, 7), (1, 7, 7, 3), (3,)], ids=str)
def test_latents_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError) as error:
        quantizer()(torch.zeros(shape))
    assert "(B, 3, h, w)" in str(error.value) and str(shape) in str(error.value)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_one_and_a_quarter_of_the_squared_distance_summed_over_each_image():
    codes, z = quantizer(), normal(2, 3, 4, 5)
    q = codes.codebook.weight[by_hand(codes.codebook.weight, z)].movedim(-1, 1)
    torch.testing.assert_close(codes.loss(z), 1.25 * (z - q).square().flatten(1).sum(1))


def test_codes_are_pulled_to_what_chose_them_four_times_as_strongly_as_the_encoder_to_its_codes():
    codes, z = quantizer(), normal(2, 3, 4, 5).requires_grad_()
    index, book = by_hand(codes.codebook.weight, z), codes.codebook.weight.detach()
    codes.loss(z).sum().backward()
    pull = z.detach() - book[index].movedim(-1, 1)  # from the code to what chose it
    torch.testing.assert_close(z.grad, 0.5 * pull)
    for k in range(12):
        mine = pull.movedim(1, -1)[index == k]
        torch.testing.assert_close(codes.codebook.weight.grad[k], -2 * mine.sum(0), atol=1e-5, rtol=1e-5)
    assert 1 < len(index.unique()) < 12, "some codes were chosen and some were not"


def test_the_codes_move_to_the_means_of_what_chose_them():
    codes, centres = quantizer(4, 3), torch.cat([4 * torch.eye(3), torch.full((1, 3), -4.0)])
    z = (centres.repeat(25, 1) + 0.3 * normal(100, 3)).reshape(4, 5, 5, 3).movedim(-1, 1)
    with torch.no_grad():
        codes.codebook.weight.copy_(centres + 0.5)
    index = codes.nearest(z)
    assert len(index.unique()) == 4
    optimizer = torch.optim.SGD(codes.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        codes.loss(z).sum().backward()
        optimizer.step()
    means = torch.stack([z.movedim(1, -1)[index == k].mean(0) for k in range(4)])
    torch.testing.assert_close(codes.codebook.weight.detach(), means, atol=1e-4, rtol=1e-4)


def test_choice_gradient_and_loss_equal_those_of_diffusers():
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    ours, z = quantizer(), normal(2, 3, 4, 5)
    theirs = vae.VectorQuantizer(12, 3, beta=0.25, legacy=False, sane_index_shape=True)
    theirs.embedding.weight.data = ours.codebook.weight.data.clone()
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    q, index = ours(a)
    other, mean, (_, _, numbers) = theirs(b)
    torch.testing.assert_close(q, other)
    assert torch.equal(index, numbers)
    loss = ours.loss(a).sum() / z.numel()  # theirs is a mean over all values
    torch.testing.assert_close(loss, mean)
    (q.sin().sum() + loss).backward(), (other.sin().sum() + mean).backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.codebook.weight.grad, theirs.embedding.weight.grad)


# --- the autoencoder -------------------------------------------------------------------------------------------------


def test_codes_alone_decide_which_autoencoder_is_built():
    assert type(build_vae(VAEConfig())) is VAE and type(build_vae(VAEConfig(codes=8))) is VQVAE
    assert build_vae(VAEConfig(codes=8)).quantizer.codebook.weight.shape == (8, 4)
    with pytest.raises(ValueError, match="codes.*-3"):
        VAEConfig(codes=-3)


@torch.no_grad()
def test_the_encoder_has_no_spread_and_its_mean_is_not_quantized():
    vae, x = small(), normal(2, 1, 8, 12)
    q = vae.encode(x)
    assert torch.equal(q.mean, vae.encoder(x)[:, :4]) and q.mean.shape == (2, 4, 2, 3)
    torch.testing.assert_close(q.sample(seeded()), q.mean, atol=3e-6, rtol=0)
    assert (vae.quantizer(q.mean)[0] - q.mean).abs().max() > 0.05


@torch.no_grad()
def test_the_decoder_sees_the_nearest_codes_and_nothing_else():
    vae, index = small(), torch.randint(16, (2, 3, 5), generator=seeded())
    vae.quantizer.codebook.weight.mul_(5)  # far apart
    z = vae.quantizer.codes(index)
    image = vae.decode(z)
    assert image.shape == (2, 1, 12, 20)
    assert torch.equal(vae.decode(z + 0.05 * normal(*z.shape)), image)
    assert not torch.equal(vae.decode(vae.quantizer.codes((index + 1) % 16)), image)
    torch.testing.assert_close(image, VAE.decode(vae, z))


def test_wrong_shapes_are_named_before_anything_is_multiplied():
    for shape in ((1, 3, 7, 7), (4, 7, 7)):
        with pytest.raises(ValueError, match=r"\(B, 4, h, w\)"):
            small().decode(torch.zeros(shape))


def test_the_loss_has_the_codebooks_loss_in_the_place_of_the_kl_and_reaches_every_parameter():
    vae, x = small(), normal(3, 1, 8, 12)
    reconstruction, regularization = vae_loss(vae, x, seeded())
    torch.testing.assert_close(regularization, vae.quantizer.loss(vae.encode(x).mean))
    (reconstruction + 0.02 * regularization).sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert not vae.encoder.layers[-1].bias.grad[4:].any(), "the half that would be logvar is not used"


def test_it_learns_to_rebuild_images_with_several_of_its_codes():
    torch.manual_seed(0)
    vae = VQVAE(VAEConfig(channels=(8, 8), latent_channels=2, codes=16, beta=1.0))
    index = torch.arange(16) % 4
    x = torch.nn.functional.interpolate(normal(4, 1, 2, 2), scale_factor=4)[index].clamp(-1, 1)
    optimizer, losses = torch.optim.Adam(vae.parameters(), 5e-3), []
    for step in range(80):
        reconstruction, regularization = vae_loss(vae, x, seeded(step))
        optimizer.zero_grad(), (reconstruction + regularization).mean().backward(), optimizer.step()
        losses.append(reconstruction.mean().item())
    used = vae.quantizer.nearest(vae.encode(x).mean).unique()
    assert sum(losses[-5:]) / 5 < 0.4 * losses[0], losses
    assert 3 <= len(used) <= 16


# --- in the whole model ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_scale_save_load_and_sample_work_as_with_any_other_autoencoder(tmp_path):
    torch.manual_seed(0)
    config, vae = DenoiserConfig(), small()
    images = torch.randint(256, (40, 1, 28, 28), generator=seeded(), dtype=torch.uint8)
    moments = torch.cat(list(encode_moments(vae, images, batch=16)))
    scale = latent_scale(moments)
    assert scale == pytest.approx(1 / moments[:, 0].double().std(correction=0).item(), rel=1e-4)
    torch.testing.assert_close(draw_latents(moments, scale, seeded()), scale * moments[:, 0], atol=1e-5, rtol=0)

    net = shake(UNet(UNetConfig(channels=(16, 32), blocks=1)), 0.05)
    model = LatentDiffusion(vae, build_denoiser(net, config), scale, (4, 7, 7), config=config)
    x = images[:3] / 127.5 - 1
    rebuilt = vae.decode(vae.encode(x).mean).clamp(-1, 1)
    torch.testing.assert_close(model.decode(model.encode(x)), rebuilt, atol=1e-4, rtol=0)
    model.save(tmp_path)
    again = LatentDiffusion.load(tmp_path)
    assert type(again.vae) is VQVAE and again.vae.config == vae.config
    assert torch.equal(again.encode(x), model.encode(x))
    assert torch.equal(again.sample([1, 7], steps=2), model.sample([1, 7], steps=2))
