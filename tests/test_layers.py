"""The building blocks: what each one computes, and that it starts as the identity.

Height and width keep their places. Where diffusers has the same block with the same conventions, ours gives the same
numbers with the same weights.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_minimal.layers import (
    Attention, Downsample, LabelEmbedding, ResBlock, Upsample, attend, check_labels, check_latents, group_norm,
    timestep_embedding, zero_init,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shake(module, seed=0, std=0.2):
    """Random numbers on top of every parameter, so that nothing is at zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)
    return module.eval()


# --- time ------------------------------------------------------------------------------------------------------------


def test_the_time_embedding_is_the_formula_at_1000_t():
    t, dim = torch.tensor([0.0, 0.25, 0.777, 1.0]), 8
    for row, time in zip(timestep_embedding(t, dim), t.double().tolist()):
        angles = [1000 * time * 10_000 ** (-i / 4) for i in range(4)]
        expected = torch.tensor(angles, dtype=torch.float64)
        torch.testing.assert_close(row.double(), torch.cat([expected.cos(), expected.sin()]), atol=2e-4, rtol=0)


def test_neighbouring_times_are_told_apart():
    t = torch.linspace(0, 1, 1001)
    emb = timestep_embedding(t, 64)
    steps = (emb[1:] - emb[:-1]).norm(dim=1)
    assert steps.min() > 1.0  # unscaled, the same two embeddings would lie 0.0015 apart
    distances = torch.cdist(emb, emb) + 99 * torch.eye(1001)
    assert distances.min() > 1.0  # nor does any other pair of the thousand times look alike


def test_the_time_embedding_is_float32_whatever_the_format_of_t():
    for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert timestep_embedding(torch.tensor([0.5], dtype=kind), 16).dtype == torch.float32


def test_a_bfloat16_time_is_cast_up_before_it_is_multiplied():
    t = torch.linspace(0.5, 0.99, 30).bfloat16()
    assert torch.equal(timestep_embedding(t, 32), timestep_embedding(t.float(), 32))
    assert (1000 * t.float() - (1000 * t).float()).abs().max() > 0.5  # multiplied in bfloat16, they would move


def test_bfloat16_autocast_leaves_the_time_embedding_alone():
    t = torch.linspace(0.9, 1, 50)
    with torch.autocast("cpu", torch.bfloat16):
        inside = timestep_embedding(t, 32)
    assert torch.equal(inside, timestep_embedding(t, 32))


def test_an_odd_dimension_of_the_time_embedding_is_refused():
    with pytest.raises(ValueError, match="even.*7"):
        timestep_embedding(torch.zeros(1), 7)


# --- normalisation and initialisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 6, 8, 12, 13, 16, 20, 32, 64, 96, 128, 160, 192, 384])
def test_group_norm_has_at_least_four_channels_a_group_and_at_most_32_groups(channels):
    norm = group_norm(channels)
    assert channels % norm.num_groups == 0 and channels // norm.num_groups >= 4 and norm.num_groups <= 32
    assert norm.num_channels == channels


def test_group_norm_splits_wide_layers_into_several_groups():
    assert [group_norm(c).num_groups for c in (32, 96, 128, 256)] == [8, 24, 32, 32]


@pytest.mark.parametrize("channels", [8, 32, 64])
def test_group_norm_keeps_the_differences_between_channel_means(channels):
    x = normal(2, channels, 5, 5) + torch.arange(channels)[None, :, None, None] % 4
    means = group_norm(channels)(x).mean(dim=(2, 3))
    assert means.std(dim=1).min() > 0.3  # with one channel a group, every mean would be zero


def test_zero_init_sets_weights_and_bias_to_zero_and_returns_the_layer():
    layer = nn.Linear(3, 5)
    assert zero_init(layer) is layer
    assert not layer.weight.any() and not layer.bias.any()


def test_a_residual_block_is_its_skip_at_the_start():
    x, emb = normal(2, 8, 5, 7), normal(2, 6, seed=1)
    assert torch.equal(ResBlock(8, 8)(x), x)
    assert torch.equal(ResBlock(8, 8, 6)(x, emb), x)
    wider = ResBlock(8, 12, 6)
    assert torch.equal(wider(x, emb), wider.skip(x))


def test_attention_is_the_identity_at_the_start():
    x = normal(2, 32, 3, 5)
    assert torch.equal(Attention(32)(x), x)


def test_only_the_last_layers_of_a_block_start_at_zero():
    for block, zero in ((ResBlock(8, 8, 6), "conv2"), (Attention(32), "project")):
        for name, parameter in block.named_parameters():
            if name.startswith(zero):
                assert not parameter.any(), name
            elif name.endswith("weight"):
                assert parameter.any(), name


# --- residual block --------------------------------------------------------------------------------------------------


def copy(ours, theirs):
    theirs.weight.data, theirs.bias.data = ours.weight.data.reshape(theirs.weight.shape).clone(), ours.bias.data.clone()


@pytest.mark.parametrize("channels, emb_dim", [((16, 16), None), ((16, 24), None), ((16, 16), 10), ((16, 24), 10)])
@pytest.mark.parametrize("std", [1.0, 1e-3], ids=["unit input", "tiny input"])  # the tiny one tells eps 1e-6 from 1e-5
def test_the_residual_block_equals_that_of_diffusers(channels, emb_dim, std):
    resnet = pytest.importorskip("diffusers.models.resnet")
    into, out = channels
    ours = shake(ResBlock(into, out, emb_dim))
    theirs = resnet.ResnetBlock2D(
        in_channels=into, out_channels=out, temb_channels=emb_dim, groups=ours.norm1.num_groups,
        groups_out=ours.norm2.num_groups, eps=1e-6, non_linearity="swish",
        time_embedding_norm="scale_shift" if emb_dim else "default",
    ).eval()
    for name in ("norm1", "conv1", "norm2", "conv2"):
        copy(getattr(ours, name), getattr(theirs, name))
    if emb_dim:
        copy(ours.emb, theirs.time_emb_proj)
    if into != out:
        copy(ours.skip, theirs.conv_shortcut)
    x, emb = std * normal(2, into, 5, 7), normal(2, emb_dim, seed=1) if emb_dim else None
    torch.testing.assert_close(ours(x, emb), theirs(x, emb), atol=1e-5, rtol=1e-5)


def test_a_residual_block_treats_rows_and_columns_alike():
    block, x, emb = shake(ResBlock(8, 12, 6)), normal(2, 8, 4, 7), normal(2, 6, seed=1)
    straight = block(x, emb)
    assert straight.shape == (2, 12, 4, 7)
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.copy_(conv.weight.transpose(2, 3).clone())
    torch.testing.assert_close(block(x.transpose(2, 3), emb).transpose(2, 3), straight, atol=1e-5, rtol=1e-5)


def test_each_image_gets_its_own_embedding():
    block, x, emb = shake(ResBlock(8, 8, 6)), normal(3, 8, 4, 4), normal(3, 6, seed=1)
    together = block(x, emb)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], block(x[i : i + 1], emb[i : i + 1]), atol=1e-5, rtol=1e-5)
    assert (together - block(x, emb.flip(0))).abs().amax(dim=(1, 2, 3))[[0, 2]].min() > 1e-2


# --- attention -------------------------------------------------------------------------------------------------------


def test_attend_equals_pytorchs_scaled_dot_product_attention():
    q, k, v = (2 * normal(2, 3, 10, 8, seed=i) for i in range(3))
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_attend_takes_another_number_of_keys_than_of_queries():
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 8, seed=2)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_attend_permutes_with_its_queries_and_ignores_the_order_of_its_keys():
    q, k, v = (normal(2, 3, 10, 8, seed=i) for i in range(3))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    out = attend(q, k, v)
    torch.testing.assert_close(attend(q[:, :, order], k, v), out[:, :, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attend(q, k[:, :, order], v[:, :, order]), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)], ids=["square", "not square"])
def test_attention_equals_that_of_diffusers(heads, size):
    processor = pytest.importorskip("diffusers.models.attention_processor")
    width = 8 * heads
    ours = shake(Attention(width, head_dim=8), std=0.4)
    theirs = processor.Attention(
        width, heads=heads, dim_head=8, bias=True, eps=1e-6, norm_num_groups=ours.norm.num_groups,
        residual_connection=True, _from_deprecated_attn_block=True,
    ).eval()
    copy(ours.norm, theirs.group_norm), copy(ours.project, theirs.to_out[0])
    parts = zip(ours.qkv.weight.data.chunk(3), ours.qkv.bias.data.chunk(3), (theirs.to_q, theirs.to_k, theirs.to_v))
    for weight, bias, linear in parts:
        linear.weight.data, linear.bias.data = weight.flatten(1).clone(), bias.clone()
    x = normal(2, width, *size)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_attention_follows_any_permutation_of_the_pixels():
    block, x = shake(Attention(32, head_dim=16)), normal(2, 32, 3, 5)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    moved = x.flatten(2)[:, :, order].reshape(x.shape)
    torch.testing.assert_close(block(moved), block(x).flatten(2)[:, :, order].reshape(x.shape), atol=1e-5, rtol=1e-5)


def test_attention_lets_every_pixel_see_every_other():
    block, x = shake(Attention(32), std=0.5), normal(1, 32, 3, 5).requires_grad_()
    block.norm = nn.Identity()  # the norm alone would already mix the pixels
    (grad,) = torch.autograd.grad(block(x)[0, :, 0, 0].square().sum(), x)
    assert (grad[0].abs().sum(0) > 0).all()


def test_channels_that_no_head_divides_are_refused():
    with pytest.raises(ValueError, match="48.*32"):
        Attention(48, head_dim=32)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_downsample_halves_and_rounds_up():
    x = normal(1, 2, 28, 28)
    sizes = []
    for seed in range(4):
        x = Downsample(2, 2)(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes == [(14, 14), (7, 7), (4, 4), (2, 2)]
    assert Downsample(2, 3)(normal(1, 2, 7, 10)).shape == (1, 3, 4, 5)


def test_upsample_doubles_or_goes_to_a_given_size():
    up = Upsample(2, 3)
    assert up(normal(1, 2, 4, 5)).shape == (1, 3, 8, 10)
    assert up(normal(1, 2, 4, 4), size=(7, 7)).shape == (1, 3, 7, 7)
    assert up(normal(1, 2, 4, 3), size=(7, 5)).shape == (1, 3, 7, 5)


def test_upsample_repeats_pixels_and_keeps_rows_and_columns():
    up, x = Upsample(1, 1), torch.arange(6.0).reshape(1, 1, 2, 3)
    with torch.no_grad():
        zero_init(up.conv).weight[0, 0, 1, 1] = 1.0  # the convolution does nothing
    assert torch.equal(up(x)[0, 0], x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(up(x, size=(4, 5))[0, 0, :, 4], torch.tensor([2.0, 2.0, 5.0, 5.0]))


def test_downsample_looks_at_every_pixel():
    x = normal(1, 1, 7, 6).requires_grad_()
    (grad,) = torch.autograd.grad(shake(Downsample(1, 1))(x).sum(), x)
    assert (grad != 0).all()


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 7, 14])
def test_any_factor_makes_it_that_much_smaller_looks_at_every_pixel_and_leaves_none_of_them_far_away(factor):
    x = normal(1, 1, 2 * factor, 3 * factor).requires_grad_()
    down = shake(Downsample(1, 1, factor))
    out = down(x)
    assert out.shape == (1, 1, 2, 3)
    (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert (grad != 0).all()
    (grad,) = torch.autograd.grad(out[0, 0, 1, 2], x)
    seen = (grad[0, 0] != 0).nonzero()
    assert seen.max(0).values.tolist() == [2 * factor - 1, 3 * factor - 1], "its own pixels, up to the last"
    assert (seen.min(0).values >= torch.tensor([factor, 2 * factor]) - 1).all(), "and one row of its neighbours at most"
    assert down.conv.kernel_size[0] % 2 == 1


@pytest.mark.parametrize("factor", [1, 3, 7])
def test_any_factor_makes_it_that_much_larger(factor):
    up, x = Upsample(1, 1, factor), torch.arange(6.0).reshape(1, 1, 2, 3)
    with torch.no_grad():
        zero_init(up.conv).weight[0, 0, 1, 1] = 1.0  # the convolution does nothing
    assert torch.equal(up(x)[0, 0], x[0, 0].repeat_interleave(factor, 0).repeat_interleave(factor, 1))


# --- labels and arguments --------------------------------------------------------------------------------------------


def test_the_label_table_has_one_row_more_than_there_are_classes():
    labels = LabelEmbedding(10, 6)
    assert labels.table.weight.shape == (11, 6)
    rows = labels(torch.arange(11))
    assert torch.equal(rows, labels.table.weight)
    assert len(rows.unique(dim=0)) == 11  # the null label has a row of its own


@pytest.mark.parametrize("bad", [[-1], [11], [0, 3, 11], [3, -1]])
def test_labels_out_of_range_are_refused_and_the_range_is_named(bad):
    shown = f"{min(bad)} ... {max(bad)}"
    with pytest.raises(ValueError, match=r"0 \.\.\. 10") as error:
        LabelEmbedding(10, 6)(torch.tensor(bad))
    assert shown in str(error.value)


@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.bool, torch.uint8])
def test_labels_of_another_type_are_refused(kind):
    with pytest.raises(ValueError, match="int64"):
        check_labels(torch.ones(2).to(kind), 10)


def test_an_empty_batch_of_labels_is_allowed():
    check_labels(torch.zeros(0, dtype=torch.long), 10)
    with pytest.raises(ValueError, match="none"):
        check_labels(torch.zeros(0), 10)


@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 7, 7), (4, 7, 7), (1, 2, 4, 7, 7)])
def test_latents_of_a_wrong_shape_are_refused_with_both_shapes(shape):
    b = shape[0]
    with pytest.raises(ValueError) as error:
        check_latents(torch.zeros(shape), torch.zeros(b), torch.zeros(b, dtype=torch.long), 4)
    assert "(B, 4, h, w)" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("t_shape, y_shape", [((3,), (2,)), ((2,), (3,)), ((), (2,)), ((2, 1), (2,)), ((1,), (1,))])
def test_times_and_labels_must_have_one_entry_for_each_latent(t_shape, y_shape):
    with pytest.raises(ValueError) as error:
        check_latents(torch.zeros(2, 4, 7, 7), torch.zeros(t_shape), torch.zeros(y_shape, dtype=torch.long), 4)
    assert str(t_shape) in str(error.value) and str(y_shape) in str(error.value) and "2 latents" in str(error.value)
