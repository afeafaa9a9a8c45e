from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import OptionError, ShapeError
from regard.layers.conv_blocks import (
    SE,
    BatchNorm,
    BNLinear,
    Conv,
    ConvBN,
    ConvSpec,
    DropPath,
    LayerScale,
    MaxPool,
    MBConv,
    PoolSpec,
    RepDW,
    fuse,
)
from regard.layers.feed_forward import Mlp
from tests.oracles import normal


def stirred(module):
    """Every parameter and running statistic moved off its start, in evaluation."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
        for m in module.modules():
            if isinstance(m, BatchNorm):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 1.5)
    return module.eval()


def first(x):
    return x.permute(0, 3, 1, 2)


def last(x):
    return x.permute(0, 2, 3, 1)


def bn(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@pytest.mark.parametrize("k, s, groups, bias", [(3, 2, 1, True), (1, 1, 1, False), (1, 2, 1, True), (5, 1, 4, True)])
def test_a_convolution_is_torchs_on_the_other_layout(k, s, groups, bias):
    conv = stirred(Conv(4, ConvSpec(8, k, s, groups=groups, bias=bias)))
    (x,) = normal((2, 7, 6, 4))
    weight = conv.conv.weight.view(8, 4 // groups, k, k)
    want = F.conv2d(first(x), weight, conv.conv.bias, s, k // 2, groups=groups)
    torch.testing.assert_close(conv(x), last(want))
    assert isinstance(conv.conv, nn.Linear) is ((k, s, groups) == (1, 1, 1))


def test_norms_stand_where_the_spec_says():
    (x,) = normal((2, 6, 6, 4))
    before = stirred(Conv(4, ConvSpec(8, 2, 2, p=0, norm="ln", norm_first=True, norm_eps=1e-3)))
    want = F.conv2d(
        first(F.layer_norm(x, (4,), before.norm.weight, before.norm.bias, 1e-3)),
        before.conv.weight,
        before.conv.bias,
        2,
    )
    torch.testing.assert_close(before(x), last(want))
    after = stirred(Conv(4, ConvSpec(8, norm="bn", act="relu")))
    want = F.relu(bn(after.norm, F.conv2d(first(x), after.conv.weight, after.conv.bias, padding=1)))
    torch.testing.assert_close(after(x), last(want))


def test_batch_norm_counts_every_place_and_takes_pooled_vectors():
    norm, other = BatchNorm(4).double(), nn.BatchNorm2d(4).double()
    (x,) = normal((3, 5, 2, 4))
    torch.testing.assert_close(norm(x), last(other(first(x))))
    torch.testing.assert_close(norm.running_var, other.running_var)
    torch.testing.assert_close(norm.eval()(x[:, 0, 0]), bn(norm, x[:, 0, 0]))
    with pytest.raises(ShapeError, match="takes"):
        norm(x[0])


def test_pooling_takes_the_maximum_with_a_border():
    (x,) = normal((1, 5, 6, 3))
    torch.testing.assert_close(PoolSpec().build(3)(x), last(F.max_pool2d(first(x), 3, 2, 1)))


@pytest.mark.parametrize(
    "made, shape",
    [
        (lambda: ConvBN(4, 8, 3, 2), (2, 6, 6, 4)),
        (lambda: ConvBN(4, 8), (2, 6, 6, 4)),
        (lambda: Conv(4, ConvSpec(4, 3, groups=4, norm="bn", act="gelu")), (2, 6, 6, 4)),
        (lambda: RepDW(4, 7), (2, 9, 8, 4)),
        (lambda: RepDW(4, 7, 2, out=8), (2, 9, 8, 4)),
        (lambda: BNLinear(4, 3), (2, 4)),
        (lambda: BNLinear(4, 3, bias=False), (2, 5, 5, 4)),
        (lambda: nn.Sequential(ConvBN(4, 4, 3), nn.Sequential(RepDW(4), nn.GELU())), (2, 6, 6, 4)),
        (lambda: MBConv(4, 6, 2), (2, 6, 6, 4)),
    ],
)
def test_fusing_changes_no_output_and_leaves_the_original(made, shape):
    module = stirred(made())
    (x,) = normal(shape)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    fused = fuse(module)
    torch.testing.assert_close(fused(x), module(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    folded = sum(isinstance(m, BatchNorm) for m in fused.modules())
    assert folded == sum(isinstance(m, MBConv) for m in module.modules()), "only a norm before its convolution stays"
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in module.parameters())


def test_a_fused_depthwise_pair_is_one_kernel_with_a_bias():
    fused = fuse(RepDW(6, 7))
    assert sum(p.numel() for p in fused.parameters()) == 6 * 49 + 6


def test_a_convolution_without_batch_norm_is_not_touched_by_fusing():
    module = stirred(Conv(4, ConvSpec(4, norm="ln")))
    (x,) = normal((1, 4, 4, 4))
    torch.testing.assert_close(fuse(module)(x), module(x))
    stays = stirred(Conv(4, ConvSpec(4, norm="bn", norm_first=True)))
    torch.testing.assert_close(fuse(stays)(x), stays(x))


def test_a_gain_of_zero_closes_a_branch():
    conv = ConvBN(4, 4, 3, gain=0.0)
    assert (conv(torch.randn(2, 5, 5, 4)) == 0).all()


def test_squeeze_and_excitation_scales_channels_by_their_means():
    se = stirred(SE(4, 2))
    (x,) = normal((2, 3, 5, 4))
    gate = torch.sigmoid(se.fc2(F.relu(se.fc1(x.mean((1, 2))))))
    torch.testing.assert_close(se(x), x * gate[:, None, None])


@pytest.mark.parametrize("channels, out, s", [(4, 4, 1), (4, 6, 1), (4, 6, 2), (4, 4, 2)])
def test_an_inverted_bottleneck_is_its_equation(channels, out, s):
    block = stirred(MBConv(channels, out, s, act="silu"))
    (x,) = normal((2, 6, 8, channels))
    y = block.norm(x)
    y = F.silu(block.widen.norm(block.widen.conv(y)))
    assert y.shape[-1] == 4 * out
    y = F.conv2d(first(y), block.depthwise.conv.weight, None, s, 1, groups=4 * out)
    y = F.silu(bn(block.depthwise.norm, y))
    gate = block.gate.fc2(F.silu(block.gate.fc1(y.mean((2, 3)))))
    y = block.narrow(last(y * torch.sigmoid(gate)[..., None, None]))
    short = last(F.avg_pool2d(first(x), 2)) if s == 2 else x
    torch.testing.assert_close(block(x), y + (block.shortcut(short) if channels != out else short))


def test_dropped_paths_keep_the_mean_and_whole_rows():
    x = torch.ones(4000, 2, 3)
    drop = DropPath(0.25)
    out = drop(x)
    rows = out.flatten(1)
    assert ((rows == 0).all(1) | (rows == 1 / 0.75).all(1)).all()
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_a_layer_scale_is_one_factor_a_channel():
    scale = LayerScale(3, 0.5)
    assert torch.equal(scale(torch.ones(2, 3)), torch.full((2, 3), 0.5))
    assert scale.scale.shape == (3,)


def test_a_feed_forward_has_two_biased_maps():
    mlp = Mlp(4, 7).double()
    (x,) = normal((2, 4))
    torch.testing.assert_close(mlp(x), F.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match="4 channels in and 6 out do not divide into 4 groups"):
        Conv(4, ConvSpec(6, groups=4))
    with pytest.raises(OptionError, match=r"'layer'.*'ln', 'bn'"):
        Conv(4, ConvSpec(4, norm="layer"))
    with pytest.raises(OptionError, match=r"'swish'.*gelu"):
        Conv(4, ConvSpec(4, act="swish"))
    with pytest.raises(OptionError, match="must be odd"):
        RepDW(4, 6)
    with pytest.raises(OptionError, match="1 or 2, not 3"):
        MBConv(4, 4, 3)
    with pytest.raises(OptionError, match=r"\[0, 1\)"):
        DropPath(1.0)
    with pytest.raises(ShapeError, match=r"\(B, H, W, 4\)"):
        Conv(4, ConvSpec(4))(torch.randn(2, 4, 5, 5))
    assert isinstance(PoolSpec(2, 2).build(5), MaxPool)
