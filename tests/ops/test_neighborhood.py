from __future__ import annotations

import random
from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F

from regard import OptionError, ShapeError, neighborhood_attention
from tests.neighbours import attend_by_mask, each, neighbourhood_mask, neighbours, relative_bias
from tests.oracles import attention, normal

WAYS = (None, "gather", "reference")


def tensors(shape, heads=2, groups=1, d=4, e=3, batch=2, seed=0, extra=0):
    n = prod(shape)
    shapes = [(batch, heads, n, d), (batch, groups, n, d), (batch, groups, n, e)]
    if extra:
        shapes += [(batch, groups, extra, d), (batch, groups, extra, e)]
    return [t.requires_grad_() for t in normal(*shapes, seed=seed)]


def check(shape, kernel, dilation=1, stride=1, causal=False, *, engine=None, rpb=None, extra=0, **sizes):
    """The op against the whole table: forward and every gradient."""
    inputs = tensors(shape, extra=extra, **sizes)
    mask = neighbourhood_mask(shape, kernel, dilation, stride, causal)
    more = dict(zip(("extra_k", "extra_v"), inputs[3:], strict=False))
    bias = None if rpb is None else relative_bias(rpb, shape, kernel, dilation)
    wanted = attend_by_mask(*inputs[:3], mask, bias=bias, **more)
    out = neighborhood_attention(
        *inputs[:3], shape=shape, kernel=kernel, dilation=dilation, stride=stride, is_causal=causal, rpb=rpb,
        engine=engine, **more,
    )  # fmt: skip
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-11)
    seeds = torch.randn(wanted.shape, dtype=wanted.dtype)
    leaves = [*inputs, *([] if rpb is None else [rpb])]
    for got, want in zip(
        torch.autograd.grad((out * seeds).sum(), leaves),
        torch.autograd.grad((wanted * seeds).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def every_axis(longest):
    """(L, K, d, S, causal) of every neighbourhood up to a length."""
    for length in range(1, longest + 1):
        for kernel in range(1, length + 1):
            for dilation, stride in product(range(1, length // kernel + 1), range(1, kernel + 1)):
                yield from ((length, kernel, dilation, stride, causal) for causal in (False, True))


def test_the_loops_and_the_whole_table_say_the_same():
    q, k, v = tensors((7,), batch=1, groups=2)
    mask = neighbourhood_mask((7,), 3)
    torch.testing.assert_close(attend_by_mask(q, k, v, mask), attention(q, k, v, allowed=mask)[0])


@pytest.mark.parametrize("length", range(1, 10))
def test_every_neighbourhood_of_one_axis(length):
    for options in every_axis(length):
        if options[0] == length:
            check((length,), *options[1:], batch=1)


@pytest.mark.parametrize("engine", WAYS)
def test_sampled_neighbourhoods_of_two_and_three_axes(engine):
    draw = random.Random(0)
    for axes in (2, 2, 2, 2, 2, 3, 3, 3):
        choices = [draw.choice(list(every_axis(6 if axes == 2 else 4))) for _ in range(axes)]
        shape, kernel, dilation, stride, causal = zip(*choices, strict=True)
        check(
            shape,
            kernel,
            dilation,
            stride,
            causal,
            engine=engine,
            extra=draw.choice((0, 3)),
            groups=draw.choice((1, 2)),
        )


@pytest.mark.parametrize("engine", WAYS)
@pytest.mark.parametrize(
    "shape, kernel, dilation, causal",
    [
        ((9,), 3, 1, False),
        ((9,), 3, 2, True),
        ((5, 8), (3, 5), 1, False),
        ((7, 9), 3, (2, 3), False),
        ((3, 4, 5), 3, 1, (True, False, False)),
    ],
)
def test_a_relative_bias_with_its_gradient(engine, shape, kernel, dilation, causal):
    (rpb,) = normal((2, *(2 * k - 1 for k in each(kernel, len(shape)))), seed=5)
    check(shape, kernel, dilation, 1, causal, engine=engine, rpb=rpb.requires_grad_(), extra=2)


def test_the_whole_axis_is_full_attention():
    q, k, v = tensors((4, 5), groups=2)
    for stride in (1, 2, (4, 5)):
        out = neighborhood_attention(q, k, v, shape=(4, 5), kernel=(4, 5), stride=stride)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_dilation_is_the_same_attention_in_each_group_of_residues():
    shape, dilation = (8, 11), (2, 3)
    q, k, v = tensors(shape, groups=2)
    out = neighborhood_attention(q, k, v, shape=shape, kernel=3, dilation=dilation).unflatten(2, shape)
    for a, b in product(range(2), range(3)):
        parts = [t.unflatten(2, shape)[:, :, a::2, b::3] for t in (q, k, v)]
        alone = neighborhood_attention(*(t.flatten(2, 3) for t in parts), shape=tuple(parts[0].shape[2:4]), kernel=3)
        torch.testing.assert_close(out[:, :, a::2, b::3].flatten(2, 3), alone)


def test_inside_it_is_attention_over_unfolded_patches():
    side, kernel, d = 9, 5, 4
    q, k, v = tensors((side, side), groups=2, d=d, e=d)
    out = neighborhood_attention(q, k, v, shape=(side, side), kernel=kernel).unflatten(2, (side, side))
    patches = [F.unfold(t.transpose(2, 3).flatten(0, 1).view(4, d, side, side), kernel) for t in (k, v)]
    keys, values = (p.view(2, 2, d, kernel**2, 5, 5) for p in patches)
    inner = q.unflatten(2, (side, side))[:, :, 2:-2, 2:-2]
    weights = (torch.einsum("bhyxd,bhdkyx->bhyxk", inner, keys) * d**-0.5).softmax(-1)
    torch.testing.assert_close(out[:, :, 2:-2, 2:-2], torch.einsum("bhyxk,bhdkyx->bhyxd", weights, values))


def test_axes_may_be_exchanged():
    shape, kernel, dilation, stride, causal = (4, 6, 9), (2, 3, 4), (2, 1, 2), (1, 3, 2), (True, False, False)
    q, k, v = tensors(shape)
    out = neighborhood_attention(
        q, k, v, shape=shape, kernel=kernel, dilation=dilation, stride=stride, is_causal=causal
    )
    for order in ((1, 0, 2), (2, 0, 1)):

        def turned(t, order=order):
            return t.unflatten(2, shape).permute(0, 1, *(2 + a for a in order), 5).flatten(2, 4)

        there = {
            name: tuple(value[a] for a in order)
            for name, value in {
                "shape": shape, "kernel": kernel, "dilation": dilation, "stride": stride, "is_causal": causal,
            }.items()
        }  # fmt: skip
        torch.testing.assert_close(neighborhood_attention(*map(turned, (q, k, v)), **there), turned(out))


def test_two_causal_axes_see_nothing_later_on_either():
    shape = (5, 6)
    (x,) = normal((1, 1, 30, 4))
    x.requires_grad_()
    out = neighborhood_attention(x, x, x, shape=shape, kernel=3, is_causal=(True, True)).unflatten(2, shape)
    y, z = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
    for a, b in product(range(5), range(6)):
        (grad,) = torch.autograd.grad(out[0, 0, a, b].sum(), x, retain_graph=True)
        later = (y > a) | (z > b)
        assert (grad.view(5, 6, 4)[later] == 0).all()
        assert grad.view(5, 6, 4)[a, b].abs().max() > 0


@pytest.mark.parametrize("engine", WAYS)
def test_extra_keys_are_in_the_same_softmax(engine):
    check((6, 5), 3, extra=4, engine=engine)
    q, k, v = tensors((9,), groups=2)
    more_k, more_v = normal((2, 2, 3, 4), (2, 2, 3, 3), seed=9)
    out = neighborhood_attention(q, k, v, shape=(9,), kernel=9, extra_k=more_k, extra_v=more_v, engine=engine)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, torch.cat((k, more_k), 2), torch.cat((v, more_v), 2))
    )


def test_an_even_kernel_reaches_one_further_to_the_left():
    assert neighbours(9, 4)[4] == [2, 3, 4, 5]
    (x,) = normal((1, 1, 9, 4))
    x.requires_grad_()
    out = neighborhood_attention(x, x, x, shape=(9,), kernel=4)
    (grad,) = torch.autograd.grad(out[0, 0, 4].sum(), x)
    assert grad[0, 0].abs().amax(1).nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_windows_shift_at_borders_but_are_cut_where_causal():
    assert neighbours(7, 3)[0] == [0, 1, 2] and neighbours(7, 3)[6] == [4, 5, 6]
    assert neighbours(7, 3, causal=True)[0] == [0] and neighbours(7, 3, causal=True)[1] == [0, 1]
    counts = {len(row) for row in neighbours(11, 5, 2, 3)}
    assert counts == {5}


def test_a_scale_of_zero_is_a_scale():
    q, k, v = tensors((6,), groups=2)
    out = neighborhood_attention(q, k, v, shape=(6,), kernel=3, scale=0.0)
    mean = torch.stack([v[:, :, row].mean(2) for row in neighbours(6, 3)], 2)
    torch.testing.assert_close(out, mean)


def test_no_table_of_all_pairs_is_made():
    """Peak memory at 64 x 64, kernel 7, against the whole table."""
    n, heads, d = 64 * 64, 1, 32
    q, k, v = (t.float().requires_grad_() for t in normal((1, heads, n, d), (1, heads, n, d), (1, heads, n, d)))
    neighborhood_attention(q, k, v, shape=(64, 64), kernel=7)

    def peak(engine):
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            neighborhood_attention(q, k, v, shape=(64, 64), kernel=7, engine=engine).sum().backward()
        held = most = 0
        for event in run.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    assert peak(None) * 10 < peak("reference")


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"kernel": 5, "dilation": 2}, OptionError, "kernel"),
        ({"kernel": 3, "stride": 4}, OptionError, "stride"),
        ({"kernel": (3, 3, 3)}, OptionError, "2 axes"),
        ({"kernel": 0}, OptionError, "kernel"),
        ({"dilation": 0}, OptionError, "dilation"),
        ({"stride": 0}, OptionError, "stride"),
        ({"shape": (8, 5)}, ShapeError, "40 places.*48"),
        ({"is_causal": (True, False, True)}, OptionError, "causal"),
        ({"rpb": torch.zeros(2, 5, 5), "stride": 2}, OptionError, "relative bias needs odd kernels and stride 1"),
        ({"rpb": torch.zeros(2, 7, 7), "kernel": 4}, OptionError, "relative bias needs odd kernels and stride 1"),
        ({"rpb": torch.zeros(2, 5, 7)}, ShapeError, r"\(2, 5, 5\)"),
        ({"extra_k": torch.zeros(2, 2, 3, 4)}, OptionError, "extra_k and extra_v"),
    ],
)
def test_what_cannot_be_is_refused(change, error, text):
    q, k, v = (t.detach().float() for t in tensors((8, 6), groups=2))
    options = {"shape": (8, 6), "kernel": 3, **change}
    with pytest.raises(error, match=text) as raised:
        neighborhood_attention(q, k, v, **options)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_of_another_grid_are_refused_naming_what_to_do(causal):
    q, k, _ = (t.detach() for t in tensors((8, 6), groups=2))
    more = torch.cat((k, k[:, :, :4]), 2)
    with pytest.raises(Exception, match="extra_k, extra_v"):
        neighborhood_attention(q, more, more, shape=(8, 6), kernel=3, is_causal=causal)
