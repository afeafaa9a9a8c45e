from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from regard import NeighborhoodAttention, OptionError, ShapeError, Unsupported
from tests.neighbours import attend_by_mask, each, neighbourhood_mask, relative_bias
from tests.oracles import normal


def layer(dim=12, heads=3, seed=0, **options):
    torch.manual_seed(seed)
    made = NeighborhoodAttention(dim, heads, **{"kernel": 3, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.2 * torch.randn_like(p)
    return made


def by_hand(m, x, kernel=None, dilation=None, rpb=None):
    shape = tuple(x.shape[1:-1])
    kernel, dilation = kernel or m.kernel, dilation or m.dilation
    q, k, v = m.qkv(x.flatten(1, -2)).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    mask = neighbourhood_mask(shape, kernel, dilation, m.stride, m.causal)
    rpb = m.rpb if rpb is None else rpb
    bias = None if rpb is None else relative_bias(rpb, shape, kernel, dilation)
    out = attend_by_mask(q, k, v, mask, bias=bias)
    return m.proj(out.transpose(1, 2).flatten(2)).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((11,), {"axes": 1, "dilation": 2, "rpb": True}),
        ((6, 7), {"rpb": True}),
        ((7, 9), {"dilation": (2, 3), "causal": (True, False)}),
        ((4, 5, 6), {"axes": 3, "kernel": (2, 3, 4), "stride": (1, 1, 2), "causal": (True, False, False)}),
        ((4, 5, 6), {"axes": 3, "rpb": True, "bias": False, "head_dim": 5}),
    ],
)
def test_it_is_projections_around_the_op_with_all_gradients(shape, options):
    m = layer(**options)
    (x,) = normal((2, *shape, 12))
    leaves = [x.requires_grad_(), *m.parameters()]
    out, wanted = m(x), by_hand(m, x)
    torch.testing.assert_close(out, wanted)
    seeds = torch.randn_like(out)
    found, there = (torch.autograd.grad((y * seeds).sum(), leaves) for y in (out, wanted))
    for got, want in zip(found, there, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_causal_call_is_causal_on_every_axis():
    m, causal = layer(), layer(causal=True)
    (x,) = normal((1, 4, 5, 12))
    assert torch.equal(m(x, is_causal=True), causal(x))


def test_the_relative_bias_starts_small_and_is_only_there_if_asked_for():
    torch.manual_seed(0)
    m = NeighborhoodAttention(64, 8, kernel=7, rpb=True)
    assert m.rpb.shape == (8, 13, 13)
    assert m.rpb.std().item() == pytest.approx(0.02, rel=0.1)
    assert NeighborhoodAttention(64, 8).rpb is None


def test_dropout_drops_in_training_alone():
    for name in ("dropout", "out_dropout"):
        m = layer(**{name: 0.5})
        (x,) = normal((1, 5, 5, 12))
        assert (m(x) - m.eval()(x)).abs().max() > 1e-3
        assert torch.equal(m(x), m(x))


def test_legacy_padding_takes_part():
    m = layer(dilation=2, rpb=True, small_input="pad_legacy")
    (x,) = normal((2, 5, 8, 12))
    wide = F.pad(x, (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(m(x), by_hand(m, wide)[:, :5])
    enough = normal((2, 6, 8, 12))[0]
    torch.testing.assert_close(m(enough), by_hand(m, enough))


def test_shrinking_changes_dilation_first_then_the_kernel():
    m = layer(kernel=5, dilation=2, small_input="shrink")
    (x,) = normal((1, 7, 12, 12))
    torch.testing.assert_close(m(x), by_hand(m, x, (5, 5), (1, 2)))
    (x,) = normal((1, 3, 4, 12))
    torch.testing.assert_close(m(x), by_hand(m, x, (3, 4), (1, 1)))


def test_a_shrunk_window_keeps_the_bias_of_every_offset():
    m = layer(kernel=5, rpb=True, small_input="shrink")
    (x,) = normal((1, 3, 4, 12))
    q, k, v = m.qkv(x).flatten(1, 2).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    bias = torch.zeros(3, 12, 12).double()
    for (a, b), (c, d) in product(product(range(3), range(4)), repeat=2):
        bias[:, 4 * a + b, 4 * c + d] = m.rpb[:, c - a + 4, d - b + 4]
    out = F.scaled_dot_product_attention(q, k, v, bias[None]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x), m.proj(out).view_as(x))


def test_one_value_stands_for_all_axes():
    m = NeighborhoodAttention(12, 3, kernel=5, dilation=(1, 2))
    assert (m.kernel, m.dilation, m.stride, m.causal) == ((5, 5), (1, 2), (1, 1), (False, False))
    assert each(5, 2) == (5, 5)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: layer()(torch.zeros(1, 2, 8, 12).double()), OptionError, r"\(2, 8\).*kernel \(3, 3\).*small_input"),
        (lambda: layer(axes=4), OptionError, "1, 2 or 3 axes"),
        (lambda: layer(kernel=(3, 3, 3)), OptionError, "2 axes"),
        (lambda: layer(small_input="pad"), OptionError, "small_input is 'pad'"),
        (lambda: layer(heads=5), OptionError, "does not divide into 5 heads"),
        (lambda: layer(stride=2, rpb=True)(torch.zeros(1, 8, 8, 12).double()), OptionError, "odd kernels and stride 1"),
        (lambda: layer(kernel=4, rpb=True)(torch.zeros(1, 8, 8, 12).double()), OptionError, "odd kernels and stride 1"),
        (lambda: layer()(torch.zeros(1, 8, 12)), ShapeError, r"must be \(B, H, W, C\) with C = 12"),
        (lambda: layer()(torch.zeros(1, 8, 8, 12), torch.zeros(1, 3, 12)), Unsupported, "reads no context"),
        (lambda: layer()(torch.zeros(1, 8, 8, 12), padding=torch.ones(1, 64).bool()), Unsupported, "no padding"),
    ],
)
def test_what_cannot_be_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
