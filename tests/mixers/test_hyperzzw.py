from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import HyperZZW, HyperZZWLocal, OptionError, ShapeError, SlowNet, Unsupported, hyper_zzw_global
from regard.mixers.grid.hyperzzw import standardised
from tests.oracles import normal


def layer(**options):
    torch.manual_seed(1)
    return HyperZZW(6, size=5, kernels=(1, 3, 3, 5), hidden=4, **options).double().eval()


def test_the_global_form_is_a_product_over_the_axes_of_the_grid():
    z, w, z2 = normal((2, 3, 5, 5), (1, 3, 5, 5), (2, 3, 5, 5))
    out = hyper_zzw_global(z, w, z2)
    torch.testing.assert_close(out, torch.einsum("bchw,bcwv->bchv", z * w, z2))
    torch.testing.assert_close(hyper_zzw_global(z, torch.ones_like(w)), z @ z)
    torch.testing.assert_close(hyper_zzw_global(z, w.expand(2, -1, -1, -1)), hyper_zzw_global(z, w, z))
    tensors = [t[:, :2, :3, :3].clone().requires_grad_() for t in (z, w, z2)]
    assert torch.autograd.gradcheck(hyper_zzw_global, tensors)


def test_the_global_form_needs_a_square():
    z, w = normal((2, 3, 5, 4), (1, 3, 5, 4))
    with pytest.raises(ShapeError, match=r"must be \(B, C, H, H\)"):
        hyper_zzw_global(z, w)
    square, small = normal((2, 3, 5, 5), (1, 3, 4, 4))
    with pytest.raises(ShapeError, match="one shape"):
        hyper_zzw_global(square, small)
    with pytest.raises(ShapeError, match="one shape"):
        hyper_zzw_global(square, square, square[:1])


@pytest.mark.parametrize("size", [(4,), (3, 5), (2, 3, 4)])
def test_a_slow_net_is_waves_of_coordinates_multiplied(size):
    torch.manual_seed(0)
    net = SlowNet(3, size, hidden=4, layers=2, omega=1.0).double()
    with torch.no_grad():
        net.bias.normal_()
    out = net()
    assert out.shape == (1, 3, *size)
    places = [[-1 + 2 * i / (n - 1) for i in range(n)] for n in size]
    for index in ((0,) * len(size), tuple(n - 1 for n in size), tuple(n // 2 for n in size)):
        c = torch.tensor([axis[i] for axis, i in zip(places, index, strict=True)], dtype=torch.float64)
        h = torch.sin(net.waves[0](c))
        for wave, linear in zip(net.waves[1:], net.linears, strict=True):
            h = torch.sin(wave(c)) * linear(h) + net.bias[index]
        torch.testing.assert_close(out[(0, slice(None), *index)], net.last(h))


def test_equal_coordinates_give_equal_kernels():
    torch.manual_seed(0)
    net = SlowNet(3, (4, 4))
    assert torch.equal(net(), net())
    other = SlowNet(3, (4, 4))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(), other())
    # the centre of a larger odd grid is the centre of a smaller one
    wide, narrow = SlowNet(3, (5, 5)), SlowNet(3, (3, 3))
    narrow.load_state_dict({**wide.state_dict(), "bias": narrow.bias})
    torch.testing.assert_close(wide()[..., 2, 2], narrow()[..., 1, 1])


def test_frequencies_are_drawn_and_the_last_layer_starts_small():
    torch.manual_seed(0)
    net = SlowNet(3, (8, 8), hidden=4000, layers=1)
    deviation = 2 * torch.pi * 2000 * (1 / 6) ** 0.5
    for layer_, (shape, wave) in enumerate(zip((6.0, 3.0), net.waves, strict=True)):
        # a weight is uniform, of variance 1 / 6, times gamma, of second moment shape^2 + shape
        want = deviation * (shape**2 + shape) ** 0.5
        assert abs(wave.weight.std().item() / want - 1) < 0.05, layer_
        assert (wave.bias == 0).all()
    bound = (3 / 4000) ** 0.5 / 8
    assert 0.99 * bound < net.last.weight.abs().max() <= bound


def test_phases_are_computed_wide():
    torch.manual_seed(0)
    net = SlowNet(3, (8, 8))
    exact = SlowNet(3, (8, 8)).double()
    exact.load_state_dict(net.state_dict())
    torch.testing.assert_close(net().double(), exact(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(), net()) and net().dtype is torch.float32


def test_the_kernels_of_the_local_branch_follow_their_source_and_meet_the_other_map():
    torch.manual_seed(0)
    branch = HyperZZWLocal(3, 3, hidden=4).double().eval()
    branch.norm.running_mean.normal_()
    source, x = normal((2, 5, 5, 3), (2, 5, 5, 3))
    kernels = branch.kernels(source)
    assert kernels.shape == (2, 3, 3, 3)
    assert (kernels[0] - kernels[1]).abs().max() > 1e-3, "a kernel of its own for each row"
    found = torch.stack(
        [F.conv2d(x[b].permute(2, 0, 1), kernels[b, :, None], padding=1, groups=3) for b in range(2)]
    ).permute(0, 2, 3, 1)
    mixed = found @ branch.mix.weight.t()
    want = F.gelu((mixed - branch.norm.running_mean) * torch.rsqrt(branch.norm.running_var + 1e-5))
    torch.testing.assert_close(branch(source, x), want)
    torch.testing.assert_close(branch(source[1:], x[1:]), branch(source, x)[1:])


def test_with_the_mean_of_the_batch_rows_depend_on_each_other():
    source, x = normal((2, 5, 5, 3), (2, 5, 5, 3))
    torch.manual_seed(0)
    branch = HyperZZWLocal(3, 3, hidden=4, batch_mean=True).double().eval()
    assert branch.kernels(source).shape == (1, 3, 3, 3)
    assert (branch(source, x)[1:] - branch(source[1:], x[1:])).abs().max() > 1e-6


def test_what_modulates_the_kernels_is_trained():
    branch = HyperZZWLocal(3, 3, hidden=4).double()
    source, x = normal((2, 5, 5, 3), (2, 5, 5, 3))
    out = branch(source, x)
    (out * torch.randn_like(out)).sum().backward()
    for parameter in (branch.keep, branch.rescale, *branch.factors.parameters(), *branch.reduce.parameters()):
        assert parameter.grad.abs().max() > 0


def test_ten_branches_are_mixed():
    made, (x,) = layer(), normal((2, 5, 5, 6))
    out, kernel = made.branches(x)

    def product(other):
        return torch.einsum("bhwc,chw,bwvc->bhvc", x, kernel[0], other)

    fast = standardised(made.fast_context(x * kernel.permute(0, 2, 3, 1)) + made.fast_own(x))
    mixed = standardised(x @ made.mix.weight.t())
    mean = x.mean((1, 2))
    gated = standardised(x) * torch.sigmoid(mean * made.channels.slow()[0, 0] * mean)[:, None, None]
    first = product(fast)
    c = first.mean((1, 2))
    c = c * made.interact.channels.slow()[0, 0] * c
    s = first.mean(-1)
    s = s * made.interact.slow()[0] * s
    hyper = x * torch.sigmoid(s[..., None] * c[:, None, None])
    local = [made.local[i](a, b) for i, (a, b) in enumerate(((x, gated), (gated, x), (mixed, x), (x, mixed)))]
    parts = (
        first, local[1], fast, product(mixed), local[0], first * torch.sigmoid(first), local[2], product(gated),
        local[3], hyper,
    )  # fmt: skip
    torch.testing.assert_close(out, made.bottleneck(torch.cat(parts, -1)))
    assert torch.equal(out, made(x))


def test_earlier_maps_are_read():
    made, (x, before) = layer(earlier=4, dim_out=12), normal((2, 5, 5, 6), (2, 5, 5, 4))
    out, _ = made.branches(x, [before])
    assert out.shape == (2, 5, 5, 12)
    assert (made.branches(x, [2 * before])[0] - out).abs().max() > 1e-3


def test_standardised_maps_have_mean_zero_and_variance_one():
    (x,) = normal((2, 5, 4, 3))
    out = standardised(3 * x + 2)
    torch.testing.assert_close(out.mean((1, 2)), torch.zeros(2, 3).double())
    torch.testing.assert_close(out.var((1, 2), unbiased=False), torch.ones(2, 3).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(out, F.instance_norm((3 * x + 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    # which is why a positive gate a channel must come after it
    torch.testing.assert_close(
        standardised(x * torch.tensor([1.0, 2.0, 3.0]).double()), standardised(x), rtol=1e-4, atol=1e-4
    )


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    made = HyperZZW(2, size=3, kernels=(1, 1, 3, 3), hidden=2).double().eval()
    (x,) = normal((1, 3, 3, 2))
    assert torch.autograd.gradcheck(made, (x.requires_grad_(),))


def test_what_does_not_fit_is_refused():
    made, (x,) = layer(), normal((2, 5, 4, 6))
    with pytest.raises(ShapeError, match="the grid is 5x4; the slow net was made for 5x5"):
        made(x)
    with pytest.raises(Unsupported, match="not causal"):
        made(x, is_causal=True)
    with pytest.raises(Unsupported, match="takes no padding"):
        made(x, padding=torch.ones(2, 5, dtype=torch.bool))
    for options, text in (
        ({"kernels": (3, 3)}, "four local"),
        ({"size": 0}, "at least 1"),
        ({"kernels": (3, 3, 3, 4)}, "odd"),
    ):
        with pytest.raises(OptionError, match=text):
            HyperZZW(6, **{"size": 5, **options})
