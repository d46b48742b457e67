"""U-Net and DiT under one call, net(zt, t, y) -> like zt.

Zero at the start, any size, no batch statistics, every input used. The tests of the first part run on both networks,
at two depths or two patch sizes each.
"""

import pytest
import torch
from torch import nn

from ldm_minimal.dit import DiT, DiTConfig, position_table
from ldm_minimal.layers import LabelEmbedding, ResBlock, timestep_embedding
from ldm_minimal.unet import UNet, UNetConfig

BUILD = {
    "unet, 1 block": lambda **k: UNet(UNetConfig(channels=(8, 32), blocks=1, **k)),
    "unet, 2 blocks": lambda **k: UNet(UNetConfig(channels=(8, 32), blocks=2, **k)),
    "dit, patch 1": lambda **k: DiT(DiTConfig(width=16, depth=2, heads=2, patch=1, **k)),
    "dit, patch 2": lambda **k: DiT(DiTConfig(width=16, depth=2, heads=2, patch=2, **k)),
}
SIZES = [(7, 7), (7, 5), (5, 7), (4, 7), (14, 14), (28, 28), (1, 1), (1, 3), (9, 2), (3, 3)]
every_net = pytest.mark.parametrize("kind", BUILD)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch=4, height=7, width=7, seed=0):
    t = torch.linspace(0.05, 0.95, batch)
    return normal(batch, 4, height, width, seed=seed), t, (torch.arange(batch) * 3 + 1) % 10


def fresh(kind, **k):
    torch.manual_seed(0)
    return BUILD[kind](**k).eval()


@torch.no_grad()
def shake(net, std=0.15):
    """Random numbers on top of every parameter: a stand-in for a trained network."""
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)
    return net


def shaken(kind, **k):
    return shake(fresh(kind, **k)).requires_grad_(False)


def differ(a, b):
    """The smallest over the batch of the largest change in an image."""
    return (a - b).abs().amax(dim=(1, 2, 3)).min().item()


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- both networks ---------------------------------------------------------------------------------------------------


@every_net
def test_the_first_prediction_is_exactly_zero(kind):
    out = fresh(kind)(*inputs())
    assert out.shape == (4, 4, 7, 7) and not out.any()


@every_net
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_output_is_like_the_input_at_any_size(kind, size):
    zt, t, y = inputs(2, *size)
    out = shaken(kind)(zt, t, y)
    assert out.shape == zt.shape and out.isfinite().all()
    assert (out.abs().amax(dim=1) > 0).all()  # no pixel is left out


@every_net
def test_other_numbers_of_channels_and_classes_work(kind):
    net = shaken(kind, in_channels=3, num_classes=5)
    y = torch.tensor([0, 5])
    assert net.num_classes == 5
    assert net(normal(2, 3, 7, 7), torch.rand(2), y).shape == (2, 3, 7, 7)
    with pytest.raises(ValueError, match=r"0 \.\.\. 5"):
        net(normal(2, 3, 7, 7), torch.rand(2), y + 1)


@every_net
def test_an_output_does_not_depend_on_the_rest_of_the_batch(kind):
    net, (zt, t, y) = shaken(kind), inputs(6)
    together = net(zt, t, y)
    for i in range(6):
        close(net(zt[i : i + 1], t[i : i + 1], y[i : i + 1]), together[i : i + 1])
    close(torch.cat([net(zt[:2], t[:2], y[:2]), net(zt[2:], t[2:], y[2:])]), together)


@every_net
def test_an_output_does_not_depend_on_the_order_of_the_batch(kind):
    net, (zt, t, y) = shaken(kind), inputs(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(net(zt[order], t[order], y[order]), net(zt, t, y)[order])


@every_net
def test_training_mode_and_evaluation_mode_are_the_same_function(kind):
    net, given = shaken(kind), inputs()
    assert torch.equal(net.train()(*given), net.eval()(*given))


@every_net
def test_there_is_no_batch_norm_and_no_dropout(kind):
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    assert not [name for name, module in fresh(kind).named_modules() if isinstance(module, kinds)]


@every_net
def test_the_same_input_gives_the_same_output_to_the_last_bit(kind):
    given = inputs()
    assert torch.equal(shaken(kind)(*given), shaken(kind)(*given))


@every_net
def test_time_label_and_latent_all_change_the_output(kind):
    net, (zt, t, y) = shaken(kind), inputs()
    out = net(zt, t, y)
    assert differ(out, net(zt, t + 0.01, y)) > 1e-3
    assert differ(out, net(zt, t, (y + 1) % 11)) > 1e-3
    assert differ(out, net(zt, t, torch.full_like(y, 10))) > 1e-3  # label 10 is the null label
    assert differ(out, net(zt + 0.1 * normal(*zt.shape, seed=2), t, y)) > 1e-3


@every_net
def test_neighbouring_times_out_of_a_thousand_are_told_apart(kind):
    net, (zt, _, y) = shaken(kind), inputs(8)
    later = torch.linspace(0, 0.999, 8)
    assert differ(net(zt, later, y), net(zt, later + 0.001, y)) > 2e-3  # 2e-4 or less where t is not scaled


@every_net
def test_times_in_float64_give_what_float32_gives(kind):
    net, (zt, t, y) = shaken(kind), inputs()  # a sampler's times are float64
    out = net(zt, t.double(), y)
    assert out.dtype == torch.float32 and torch.equal(out, net(zt, t, y))


@every_net
def test_a_float64_latent_is_refused_by_a_float32_network_and_not_rounded(kind):
    zt, t, y = inputs()
    with pytest.raises(RuntimeError, match="(?i)type.*(double|float)"):
        shaken(kind)(zt.double(), t, y)


@every_net
def test_under_bfloat16_autocast_the_output_stays_close_to_float32(kind):
    net, given = shaken(kind), inputs()
    exact = net(*given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(*given).float()
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.03


@every_net
def test_the_gradient_reaches_every_parameter_after_one_change(kind):
    net, (zt, t, _) = shake(fresh(kind)), inputs(11)
    (net(zt, t, torch.arange(11)) * normal(*zt.shape, seed=3)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    assert (net.label.table.weight.grad != 0).any(1).all()  # each of the 11 labels has its own row


@every_net
def test_the_gradient_is_the_slope_of_the_loss(kind):
    net, given = shake(fresh(kind)), inputs()
    weights, direction = normal(4, 4, 7, 7, seed=3), [normal(*p.shape, seed=4) for p in net.parameters()]
    (net(*given) * weights).sum().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(net.parameters(), direction)).item()
    with torch.no_grad():
        values = []
        for step in (1e-3, -2e-3):  # to one side of where the gradient was taken, then to the other
            for p, d in zip(net.parameters(), direction):
                p += step * d
            values.append((net(*given) * weights).sum().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02)  # nothing on the way is cut off


@every_net
def test_at_the_start_the_gradient_reaches_the_zero_output(kind):
    net, (zt, t, y) = fresh(kind), inputs()
    (net(zt, t, y) - zt).square().mean().backward()
    out = net.out[-1] if isinstance(net, UNet) else net.out
    assert out.bias.grad.abs().min() > 0
    assert out.weight.grad.any()


@every_net
def test_some_steps_of_training_lower_the_loss(kind):
    net, (zt, t, y) = fresh(kind).train(), inputs(8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = (net(zt, t, y) - zt).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(zt.square().mean().item(), rel=1e-5)  # the zero prediction
    assert losses[-1] < 0.5 * losses[0]


@every_net
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 4, 7), (4, 7, 7)], ids=str)
def test_a_latent_of_a_wrong_shape_is_refused_with_both_shapes(kind, shape):
    with pytest.raises(ValueError) as error:
        fresh(kind)(torch.zeros(shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert "(B, 4, h, w)" in str(error.value) and str(shape) in str(error.value)


@every_net
def test_times_and_labels_of_a_wrong_length_are_refused(kind):
    zt, t, y = inputs(4)
    for bad_t, bad_y in ((t[:3], y), (t, y[:3]), (t[:1], y), (t[0], y)):
        with pytest.raises(ValueError) as error:
            fresh(kind)(zt, bad_t, bad_y)
        assert str(tuple(bad_t.shape)) in str(error.value) and str(tuple(bad_y.shape)) in str(error.value)


@every_net
@pytest.mark.parametrize("bad", [-1, 11])
def test_a_label_out_of_range_is_refused(kind, bad):
    zt, t, y = inputs(4)
    with pytest.raises(ValueError, match=r"0 \.\.\. 10"):
        fresh(kind)(zt, t, torch.tensor([0, 1, 2, bad]))


@every_net
def test_the_weights_alone_make_the_network_again(kind):
    net, other = shaken(kind), fresh(kind)
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other(*inputs()), net(*inputs()))
    assert net.state_dict().keys() == dict(net.named_parameters()).keys()  # nothing but parameters is stored


@every_net
def test_rows_are_not_columns(kind):
    net, (zt, t, y) = shaken(kind), inputs(4, 5, 7)
    assert differ(net(zt, t, y), net(zt.transpose(2, 3), t, y).transpose(2, 3)) > 1e-3


# --- U-Net -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 5), (4, 7)], ids=str)
def test_the_unet_with_transposed_kernels_transposes_its_output(size):
    net, (zt, t, y) = shaken("unet, 2 blocks"), inputs(2, *size)
    straight = net(zt, t, y)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight.transpose(2, 3).clone())
    close(net(zt.transpose(2, 3), t, y).transpose(2, 3), straight, 1e-4)


def test_the_unet_with_one_or_two_blocks_has_as_many_on_the_way_down_and_one_more_on_the_way_up():
    for blocks in (1, 2):
        net = UNet(UNetConfig(channels=(8, 32), blocks=blocks))
        down, up = ([m for m in part.modules() if isinstance(m, ResBlock)] for part in (net.down, net.up))
        assert (len(down), len(up)) == (2 * blocks, 2 * (blocks + 1))


def test_the_unets_output_layer_and_every_second_convolution_start_at_zero():
    net = fresh("unet, 2 blocks")
    assert not net.out[-1].weight.any() and not net.out[-1].bias.any()
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    assert len(blocks) == 12
    for block in blocks:
        assert not block.conv2.weight.any() and block.conv1.weight.any() and block.emb.weight.any()
    assert not net.middle[1].project.weight.any() and net.middle[1].qkv.weight.any()


def test_each_block_on_the_way_up_takes_the_last_output_that_is_left_on_the_stack():
    net, down, up = shaken("unet, 2 blocks"), [], []
    for part in [net.stem, *net.down]:
        last = part[1] if isinstance(part, nn.ModuleList) else part  # a block's output is that of its attention
        last.register_forward_hook(lambda module, given, out: down.append(out))
    for part in net.up:
        if isinstance(part, nn.ModuleList):
            part[0].register_forward_pre_hook(lambda module, given: up.append(given[0]))
    net(*inputs())
    assert len(down) == len(up) == 6
    for skip, given in zip(reversed(down), up):
        assert torch.equal(given[:, -skip.shape[1]:], skip)


def test_three_resolutions_without_attention_work_too():
    net = shake(UNet(UNetConfig(channels=(8, 16, 32), blocks=1, attention=False)))
    assert net(*inputs(2, 7, 9)).shape == (2, 4, 7, 9)
    assert not any("qkv" in name for name, _ in net.down.named_parameters())


# --- DiT -------------------------------------------------------------------------------------------------------------


def test_the_position_table_is_a_buffer_and_neither_a_parameter_nor_in_the_state_dict():
    net = fresh("dit, patch 1")
    assert "position" in dict(net.named_buffers())
    assert "position" not in net.state_dict() and "position" not in dict(net.named_parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_position_of_each_patch_is_its_row_then_its_column():
    net, table = fresh("dit, patch 1"), position_table(64, 8)
    positions = net.positions(3, 5)
    assert positions.shape == (15, 16)
    for row in range(3):
        for column in range(5):
            assert torch.equal(positions[5 * row + column], torch.cat([table[row], table[column]]))
    assert len(net.positions(64, 64).unique(dim=0)) == 64 * 64


def test_positions_are_whole_numbers_in_the_time_embeddings_formula():
    angles = torch.arange(64, dtype=torch.float64)[:, None] * 10_000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(position_table(64, 8).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("axis", [2, 3], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", ["dit, patch 1", "dit, patch 2"])
def test_the_dit_knows_the_place_of_rows_and_of_columns(kind, axis):
    net, (zt, t, y) = shaken(kind), inputs(4, 6, 8)
    moved = net(zt.roll(2, axis), t, y)
    assert differ(moved, net(zt, t, y).roll(2, axis)) > 1e-3


@pytest.mark.parametrize("kind", ["dit, patch 1", "dit, patch 2"])
def test_without_positions_the_dit_would_follow_any_order_of_the_patches(kind):
    net, (zt, t, y) = shaken(kind), inputs(4, 6, 8)
    net.position.zero_()  # what the test above sees is the positions' work
    close(net(zt.roll((2, 4), (2, 3)), t, y), net(zt, t, y).roll((2, 4), (2, 3)))


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 6), (6, 12)], ids=str)
def test_each_patch_of_the_output_belongs_to_the_same_patch_of_the_input(patch, size):
    torch.manual_seed(0)
    net = DiT(DiTConfig(width=16, depth=2, heads=2, patch=patch)).eval()
    with torch.no_grad():
        net.out.weight.normal_()  # the gates of the blocks are still zero, so no patch sees another
    (zt, t, y), (height, width) = inputs(1, *size), size
    row, column = height - 1, width // 2
    changed = zt.clone()
    changed[0, :, row, column] += 1
    moved = (net(changed, t, y) - net(zt, t, y))[0].abs().amax(0) > 1e-6
    expected = torch.zeros(size, dtype=torch.bool)
    top, left = row // patch * patch, column // patch * patch
    expected[top : top + patch, left : left + patch] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("size", [(7, 7), (7, 4), (1, 5)], ids=str)
def test_a_dit_with_patch_2_pads_with_zeros_at_the_far_ends_and_crops_them_off(size):
    net, (zt, t, y) = shaken("dit, patch 2"), inputs(2, *size)
    height, width = size
    padded = torch.zeros(2, 4, height + height % 2, width + width % 2)
    padded[:, :, :height, :width] = zt
    close(net(zt, t, y), net(padded, t, y)[:, :, :height, :width])


def test_more_patches_than_positions_are_refused_with_both_numbers():
    net = shaken("dit, patch 1")
    assert net(*inputs(1, 1, 64)).shape == (1, 4, 1, 64)
    with pytest.raises(ValueError, match="1 x 65.*64"):
        net(*inputs(1, 1, 65))


def test_a_width_that_heads_and_positions_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="18.*8"):
        DiT(DiTConfig(width=18, heads=2))


def test_every_modulation_of_the_dit_starts_at_zero_and_so_does_its_output():
    net = fresh("dit, patch 1")
    for layer in [net.out, net.modulation, *(block.modulation for block in net.blocks)]:
        assert not layer.weight.any() and not layer.bias.any()
    for block in net.blocks:
        for layer in (block.qkv, block.project, block.mlp[0], block.mlp[2]):
            assert layer.weight.any()


def test_a_dit_block_is_the_identity_at_the_start():
    net, x, c = fresh("dit, patch 1"), normal(2, 9, 16), normal(2, 16, seed=1)
    assert torch.equal(net.blocks[0](x, c), x)


def test_a_dit_block_is_its_formula():
    block, x, c = shaken("dit, patch 1").blocks[0], normal(2, 9, 16), normal(2, 16, seed=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(nn.functional.silu(c))[:, None].chunk(6, dim=2)

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def attention(v):
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in block.qkv(v).chunk(3, dim=2))
        return block.project(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    middle = x + gate1 * attention(norm(x) * (1 + scale1) + shift1)
    close(block(x, c), middle + gate2 * block.mlp(norm(middle) * (1 + scale2) + shift2))


# --- what the networks are conditioned on ----------------------------------------------------------------------------


@every_net
def test_time_and_label_enter_as_one_sum(kind):
    net = shaken(kind)
    assert isinstance(net.label, LabelEmbedding) and len(net.label.table.weight) == 11
    dim = net.embed_dim if isinstance(net, UNet) else net.config.width
    zt, t, y = inputs(2)
    before = net(zt, t, y)
    shift = net.time(timestep_embedding(t, dim)) - net.time(timestep_embedding(t.flip(0), dim))
    net.label.table.weight[y] += shift  # what the other time takes away, the label gives back
    close(net(zt, t.flip(0), y), before)
