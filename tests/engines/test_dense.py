from __future__ import annotations

import pytest
import torch

from regard import (
    L1,
    Causal,
    Documents,
    Explicit,
    KeyValid,
    Linear,
    OptionError,
    ReLUOverN,
    ShapeError,
    Sharpen,
    Sigmoid,
    Sinks,
    SlidingWindow,
    Softmax,
    Unsupported,
)
from regard.engines.dense import dense
from regard.primitives.biases import Indexed
from tests.oracles import attention, coin, normal

ENGINES = ["dense:sdpa", "dense:reference"]
INDEX = torch.arange(9, dtype=torch.int32)
PATTERNS = {
    "all": None,
    "causal": Causal(),
    "strict": Causal(strict=True),
    "window": Causal() & SlidingWindow(3),
    "sinks": Causal() & SlidingWindow(2) | Sinks(1),
    "both sides": SlidingWindow(2),
    "documents": Causal() & Documents().bind(doc=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])),
    "padding": KeyValid().bind(key_valid=torch.tensor([[True] * 6 + [False] * 3, [False] * 4 + [True] * 5])),
    "explicit": Explicit().bind(mask=coin(2, 4, 9, 9, p=0.4)),
}


def qkv(n=9, m=9, heads=4, groups=2, dtype=torch.float64, seed=0):
    return normal((2, heads, n, 8), (2, groups, m, 8), (2, groups, m, 6), dtype=dtype, seed=seed)


def same_gradients(got, want, inputs, **tolerance):
    (seeds,) = normal(tuple(got.shape), seed=9, dtype=got.dtype)
    for g, w in zip(
        torch.autograd.grad((got * seeds).sum(), inputs), torch.autograd.grad((want * seeds).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(g, w, **tolerance)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_pattern_is_attended_as_row_by_row(name, engine):
    q, k, v = (x.requires_grad_() for x in qkv())
    pattern = PATTERNS[name]
    out = dense(q, k, v, pattern, engine=engine).out
    want, _ = attention(q, k, v, allowed=None if pattern is None else pattern.dense(9, 9))
    torch.testing.assert_close(out, want)
    same_gradients(out, want, (q, k, v))


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("engine", ENGINES)
def test_grouped_heads_share_keys_and_values(heads, groups, engine):
    q, k, v = qkv(heads=heads, groups=groups)
    out = dense(q, k, v, Causal(), engine=engine).out
    repeated = [x.repeat_interleave(heads // groups, 1) for x in (k, v)]
    torch.testing.assert_close(out, dense(q, *repeated, Causal(), engine=engine).out)
    torch.testing.assert_close(out, attention(q, k, v, allowed=Causal().dense(9, 9))[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(7,), (5, 7), (1, 7), (5, 1), (2, 1, 1, 7), (1, 4, 5, 1), (2, 4, 5, 7), (1,)])
def test_masks_and_biases_of_every_broadcastable_shape(shape, engine):
    q, k, v = qkv(5, 7)
    mask = coin(*shape)
    (bias,) = normal(shape, seed=3)
    for kwargs in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}):
        out = dense(q, k, v, engine=engine, **kwargs).out
        torch.testing.assert_close(out, attention(q, k, v, allowed=kwargs.get("mask"), bias=kwargs.get("bias"))[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_pattern_mask_bias_and_offset_all_hold_at_once(engine):
    q, k, v = (x.requires_grad_() for x in qkv(4, 9))
    mask = coin(2, 1, 4, 9)
    bias = normal((1, 4, 4, 9), seed=3)[0].requires_grad_()
    out = dense(q, k, v, Causal(), mask=mask, bias=bias, q_offset=4, scale=0.7, engine=engine).out
    allowed = Causal().dense(4, 9, q_offset=4) & mask
    want, _ = attention(q, k, v, allowed=allowed, bias=bias, scale=0.7)
    torch.testing.assert_close(out, want)
    same_gradients(out, want, (q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["mask", "bias", "pattern", "padding"])
def test_a_row_without_keys_is_exactly_zero_and_so_is_its_gradient(how, engine, dtype):
    q, k, v = (x.requires_grad_() for x in qkv(5, 5, dtype=dtype))
    bias = torch.zeros(2, 1, 5, 5, dtype=dtype)
    bias[:, :, 2] = float("-inf")
    bias.requires_grad_()
    options = {
        "mask": {"mask": ~torch.isneginf(bias)},
        "bias": {"bias": bias},
        "pattern": {"pattern": Explicit().bind(mask=~torch.isneginf(bias))},
        "padding": {"pattern": KeyValid(rows=True).bind(key_valid=torch.tensor([[True, True, False, True, True]]))},
    }[how]
    out = dense(q, k, v, engine=engine, **options).out
    inputs = (q, k, v, bias) if how == "bias" else (q, k, v)
    gradients = torch.autograd.grad((out * normal((2, 4, 5, 6), seed=5, dtype=dtype)[0]).sum(), inputs)
    assert (out[:, :, 2] == 0).all()
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, :, 2] == 0).all()
    if how == "bias":
        assert (gradients[3][:, :, 2] == 0).all()
    others = [0, 1, 3, 4]
    want, _ = attention(
        *(x.detach() for x in (q, k, v)), allowed=None if how != "padding" else options["pattern"].dense(5, 5)
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(out[:, :, others].double(), want[:, :, others], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "normaliser", [Softmax(), Sigmoid(-1.0), L1(), L1(eps=0.0), ReLUOverN(), Linear(), Sharpen(Softmax())], ids=repr
)
def test_a_key_hidden_by_minus_infinity_weighs_nothing_for_every_normaliser(normaliser):
    q, k, v = (x.requires_grad_() for x in qkv(5, 5))
    seen = coin(2, 4, 5, 5)
    seen[:, :, 2] = False
    bias = torch.zeros(2, 4, 5, 5, dtype=torch.float64).masked_fill(~seen, float("-inf")).requires_grad_()
    by_bias = dense(q, k, v, bias=bias, normaliser=normaliser, return_weights=True)
    by_mask = dense(q, k, v, mask=seen, normaliser=normaliser, return_weights=True)
    torch.testing.assert_close(by_bias.out, by_mask.out)
    assert (by_bias.weights[~seen] == 0).all()
    assert (by_bias.out[:, :, 2] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(by_bias.out.sum(), (q, k, v, bias)))


@pytest.mark.parametrize("normaliser", [ReLUOverN(), Sharpen(Softmax(), 2.0)], ids=repr)
def test_visible_keys_are_counted_after_broadcasting_the_mask(normaliser):
    q, k, v = qkv(5, 7)
    rows = torch.tensor([True, True, False, True, True])[:, None]
    out = dense(q, k, v, mask=rows, normaliser=normaliser).out
    torch.testing.assert_close(out, dense(q, k, v, mask=rows.expand(5, 7), normaliser=normaliser).out)
    assert (out[:, :, 2] == 0).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_weights_and_log_sum_exp_are_those_of_the_rows(name):
    q, k, v = qkv()
    pattern = PATTERNS[name]
    got = dense(q, k, v, pattern, return_lse=True, return_weights=True)
    want, lse = attention(q, k, v, allowed=None if pattern is None else pattern.dense(9, 9))
    torch.testing.assert_close(got.lse, lse)
    torch.testing.assert_close(got.out, want)
    torch.testing.assert_close(got.weights @ v.repeat_interleave(2, 1), want)
    if pattern is not None:
        assert (got.weights.masked_select(~pattern.dense(9, 9).expand(2, 4, 9, 9)) == 0).all()
    sums = got.weights.sum(-1)
    torch.testing.assert_close(sums, (~torch.isneginf(lse)).double())


def test_the_log_sum_exp_has_a_gradient():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2)))
    bias = normal((1, 2, 4, 5), seed=2)[0].requires_grad_()
    seen = coin(1, 2, 4, 5)
    seen[:, :, 1] = False

    def read(q, k, v, bias):
        got = dense(q, k, v, mask=seen, bias=bias, return_lse=True)
        return got.out, got.lse.masked_fill(torch.isneginf(got.lse), 0.0)

    assert torch.autograd.gradcheck(read, (q, k, v, bias))
    lse = dense(q, k, v, mask=seen, bias=bias, return_lse=True).lse
    gradients = torch.autograd.grad(lse[~torch.isneginf(lse)].sum(), (q, k, bias))
    assert (gradients[0][:, :, 1] == 0).all()
    assert (gradients[2][:, :, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    q, k, v = (x.to(dtype) for x in normal((1, 1, 4, 64), (1, 1, 2048, 64), (1, 1, 2048, 16)))
    got = dense(q, k, v, return_lse=True)
    want, lse = attention(q, k, v)
    assert got.out.dtype == dtype
    assert got.lse.dtype == torch.float32
    torch.testing.assert_close(got.lse.double(), lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.out.double(), want, atol=1e-3, rtol=1e-2)


def test_float32_noise_is_small():
    q, k, v = normal((1, 2, 16, 64), (1, 2, 512, 64), (1, 2, 512, 32))
    want, _ = attention(q, k, v)
    for engine in ENGINES:
        out = dense(q.float(), k.float(), v.float(), engine=engine).out
        assert (out.double() - want).abs().max() < 1e-6


@pytest.mark.parametrize("normaliser", [Sigmoid(-2.0), Linear()], ids=repr)
def test_additive_normalisers_add_over_any_partition_of_the_keys(normaliser):
    q, k, v = qkv()
    seen = Causal().dense(9, 9) & coin(2, 4, 9, 9)
    owner = torch.randint(3, (9,), generator=torch.Generator().manual_seed(0))
    parts = [dense(q, k, v, mask=seen & (owner == p), normaliser=normaliser).out for p in range(3)]
    torch.testing.assert_close(sum(parts), dense(q, k, v, mask=seen, normaliser=normaliser).out)


def test_row_normalisers_do_not_add():
    q, k, v = qkv()
    left = torch.arange(9) < 4
    parts = [dense(q, k, v, mask=side, normaliser=Softmax()).out for side in (left, ~left)]
    assert not torch.allclose(sum(parts), dense(q, k, v).out)


def test_a_score_mod_sees_absolute_positions():
    q, k, v = qkv(3, 9)
    out = dense(
        q, k, v, Causal(), q_offset=6, score_mod=lambda s, b, h, i, j: s - 0.3 * (i - j) * (h + 1) + 0.1 * b
    ).out
    i, j = torch.arange(6, 9)[:, None], torch.arange(9)
    bias = -0.3 * (i - j) * torch.arange(1, 5).view(1, 4, 1, 1) + torch.zeros(2, 1, 1, 1)
    torch.testing.assert_close(out, attention(q, k, v, allowed=j <= i, bias=bias.double())[0])


@pytest.mark.parametrize("normaliser", [None, Sigmoid(-1.0), L1(), Sharpen(L1())], ids=repr)
def test_second_derivatives_exist(normaliser):
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 3, 3), (1, 1, 4, 3), (1, 1, 4, 2)))
    mask = coin(1, 2, 3, 4, p=0.8)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: dense(q, k, v, mask=mask, normaliser=normaliser, engine="reference").out, (q, k, v)
    )


def test_dropout_keeps_the_expectation_and_depends_on_the_seed():
    q, k, v = qkv(9, 64)
    torch.manual_seed(0)
    outs = [dense(q, k, v, dropout_p=0.3).out for _ in range(600)]
    assert not torch.equal(outs[0], outs[1])
    torch.testing.assert_close(sum(outs) / 600, dense(q, k, v).out, atol=0.06, rtol=0)


def test_no_keys_at_all_give_zero():
    q, k, v = qkv(3, 5)
    none = (k[:, :, :0], v[:, :, :0])
    for engine in ENGINES:
        assert (dense(q, *none, engine=engine).out == torch.zeros(2, 4, 3, 6)).all()
    assert torch.isneginf(dense(q, *none, return_lse=True).lse).all()
    assert (dense(q, *none, normaliser=Sharpen(L1())).out == 0).all()


def test_autocast_does_not_lower_the_accumulation():
    q, k, v = qkv(dtype=torch.float32)
    want = dense(q, k, v, engine="reference").out
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense(q, k, v, engine="reference").out, want)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"is_causal": True, "pattern": SlidingWindow(2)}, OptionError, r"write Causal\(\) & pattern"),
        ({"is_causal": True, "q_offset": 2}, OptionError, r"write pattern=Causal\(\)"),
        ({"mask": torch.ones(9, 9)}, ShapeError, "a mask is bool"),
        ({"mask": coin(9, 8)}, ShapeError, r"must broadcast to \(B, H, N, M\) = \(2, 4, 9, 9\)"),
        ({"mask": coin(3, 1, 9, 9)}, ShapeError, "must broadcast"),
        ({"mask": coin(1, 2, 4, 9, 9)}, ShapeError, "must broadcast"),
        ({"bias": torch.zeros(9, 8)}, ShapeError, "must broadcast"),
        ({"bias": torch.zeros(9, 9, dtype=torch.int64)}, ShapeError, "must be a floating dtype"),
        ({"bias": torch.full((9, 9), float("nan"))}, OptionError, "holds NaN"),
        ({"pattern": Documents()}, OptionError, r"needs data: call .bind\(doc="),
        ({"pattern": KeyValid().bind(key_valid=coin(3, 9))}, ShapeError, "is for batch 3"),
        ({"pattern": Explicit().bind(mask=coin(1, 3, 9, 9))}, ShapeError, "3 heads"),
        ({"engine": "flash"}, OptionError, "no engine 'flash'"),
        ({"engine": "dense:sdpa", "return_lse": True}, Unsupported, "log-sum-exp is asked for"),
        ({"engine": "dense:sdpa", "normaliser": Linear()}, Unsupported, "Linear, not Softmax"),
        ({"engine": "dense:sdpa", "dropout_p": 0.1}, Unsupported, "torch drops other weights"),
        ({"dropout_p": 1.0}, OptionError, r"in \[0, 1\), not 1.0"),
        ({"q_offset": -1}, OptionError, "at least 0, not -1"),
        ({"sinks": torch.zeros(4)}, ShapeError, "must broadcast to"),
        ({"sinks": torch.zeros(1, 4, 1), "normaliser": Sigmoid()}, Unsupported, "Sigmoid has no place for it"),
        ({"sinks": torch.zeros(1, 4, 1, dtype=torch.int64)}, ShapeError, "a floating dtype"),
        ({"extra_k": torch.zeros(2, 2, 3, 8)}, OptionError, "give both"),
        ({"extra_k": torch.zeros(2, 2, 3, 8), "extra_v": torch.zeros(2, 2, 4, 6)}, ShapeError, "extra_v is"),
        ({"indexed": [Indexed(torch.zeros(1, 3, 1, 17), INDEX, INDEX)]}, ShapeError, "its first axes must be 1 or"),
        ({"indexed": [Indexed(torch.zeros(1, 4, 1, 17), INDEX[1:], INDEX)]}, ShapeError, "key_index has 8 places"),
        ({"indexed": [Indexed(torch.zeros(1, 4, 1, 9), INDEX, INDEX)]}, OptionError, "outside its table of 9"),
        ({"return_lse": True, "normaliser": Sigmoid()}, Unsupported, "Sigmoid has no log-sum-exp"),
    ],
)
def test_bad_calls_are_refused_with_the_reason(options, error, text):
    with pytest.raises(error, match=text):
        dense(*qkv(), **options)


def test_sinks_and_extra_keys_stand_in_the_same_softmax():
    q, k, v = (x.requires_grad_() for x in qkv())
    sinks, more_k, more_v = (x.requires_grad_() for x in normal((1, 4, 1), (2, 2, 3, 8), (2, 2, 3, 6), seed=4))
    seen = Causal(strict=True).dense(9, 9)
    got = dense(
        q, k, v, Causal(strict=True), sinks=sinks, extra_k=more_k, extra_v=more_v, return_lse=True, return_weights=True
    )
    # a sink is a key with score `sink` and value 0: k = 0, bias = sink
    zeros = torch.zeros(2, 2, 1, 1, dtype=torch.float64)
    all_k, all_v = (torch.cat((a, b, zeros.expand(2, 2, 1, a.shape[3])), 2) for a, b in ((k, more_k), (v, more_v)))
    bias = torch.cat((torch.zeros(2, 4, 9, 12, dtype=torch.float64), sinks.expand(2, 4, 9)[..., None]), -1)
    allowed = torch.cat((seen.expand(2, 4, 9, 9), torch.ones(2, 4, 9, 4, dtype=torch.bool)), -1)
    want, lse = attention(q, all_k, all_v, allowed=allowed, bias=bias)
    torch.testing.assert_close(got.out, want)
    torch.testing.assert_close(got.lse, lse)
    assert got.weights.shape == (2, 4, 9, 9)
    same_gradients(got.out, want, (q, k, v, sinks, more_k, more_v))


def test_a_row_with_nothing_but_a_sink_is_zero_and_its_log_sum_exp_is_the_sink():
    q, k, v = qkv()
    sinks = torch.tensor([0.5, -1.0, float("-inf"), 2.0], dtype=torch.float64).view(1, 4, 1).requires_grad_()
    got = dense(q, k, v, Causal(strict=True), sinks=sinks, return_lse=True)
    assert (got.out[:, :, 0] == 0).all()
    torch.testing.assert_close(got.lse[0, :, 0], sinks[0, :, 0])
    without = dense(q[:, 2:3], k[:, 1:], v[:, 1:], Causal(strict=True), return_lse=True)
    torch.testing.assert_close(got.out[:, 2:3], without.out)
    (grad,) = torch.autograd.grad(got.out.sum(), sinks)
    assert grad.isfinite().all() and grad[0, 2, 0] == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 1, 9), (2, 4, 9)])
def test_an_indexed_bias_is_the_bias_it_stands_for(shape):
    q, k, v = (x.requires_grad_() for x in qkv())
    table = normal((*shape, 12), seed=5)[0].requires_grad_()
    key, query = torch.arange(9, dtype=torch.int32) % 5, torch.arange(9, dtype=torch.int32) // 3 - 5
    bias = torch.stack([table[..., min(i, shape[2] - 1), :][..., (key - query[i]).long()] for i in range(9)], -2)
    got = dense(q, k, v, Causal(), indexed=[Indexed(table, key, query)]).out
    want = dense(q, k, v, Causal(), bias=bias).out
    torch.testing.assert_close(got, want)
    same_gradients(got, want, (q, k, v, table))


def test_an_indexed_bias_is_not_read_for_hidden_pairs():
    q, k, v = qkv()
    table = normal((1, 4, 1, 9), seed=5)[0]
    got = dense(q, k, v, Causal(), indexed=[Indexed(table, -INDEX, -INDEX)]).out
    bias = table[..., (INDEX[:, None] - INDEX[None]).clamp(min=0).long()][:, :, 0]
    torch.testing.assert_close(got, dense(q, k, v, Causal(), bias=bias).out)


@pytest.mark.parametrize(
    "table, key, text",
    [
        (torch.zeros(4, 1, 9), INDEX, r"must be floating \(B\|1, H\|1, N\|1, R\)"),
        (torch.zeros(1, 4, 1, 9, dtype=torch.int64), INDEX, "must be floating"),
        (torch.zeros(1, 4, 1, 9), INDEX.double(), "a row of integers"),
        (torch.zeros(1, 4, 1, 9), INDEX[None], "a row of integers"),
    ],
)
def test_a_malformed_indexed_bias_is_refused(table, key, text):
    with pytest.raises(ShapeError, match=text):
        Indexed(table, key, INDEX)


def test_one_seed_drops_the_same_weights_and_extra_keys_others():
    q, k, v = qkv()
    same = [dense(q, k, v, dropout_p=0.5, seed=s).out for s in (3, 3, 4)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    late = dense(q[:, :, 5:], k, v, dropout_p=0.5, seed=3, q_offset=5).out
    torch.testing.assert_close(late, same[0][:, :, 5:])
