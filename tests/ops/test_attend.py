from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from regard import (
    L1,
    Causal,
    Explicit,
    KeyValid,
    OptionError,
    ShapeError,
    Sigmoid,
    Sinks,
    SlidingWindow,
    Unsupported,
    attend,
)
from tests.oracles import attention, coin, normal

sdpa = F.scaled_dot_product_attention


def qkv(n=9, m=9, heads=4, groups=4, dtype=torch.float64, e=8):
    return normal((2, heads, n, 8), (2, groups, m, 8), (2, groups, m, e), dtype=dtype)


def test_the_positional_arguments_are_those_of_torch():
    q, k, v = qkv()
    names = list(inspect.signature(attend).parameters)
    assert names[:6] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    mask = coin(2, 1, 9, 9, p=0.9) | torch.eye(9, dtype=torch.bool)
    assert torch.equal(attend(q, k, v, mask, 0.0, False, scale=0.3), sdpa(q, k, v, mask, 0.0, False, scale=0.3))
    assert torch.equal(attend(query=q, key=k, value=v, is_causal=True), sdpa(query=q, key=k, value=v, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, m", [(9, 9), (5, 9), (9, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_plain_calls_equal_torch_bit_for_bit(dtype, n, m, causal):
    q, k, v = qkv(n, m, dtype=dtype)
    assert torch.equal(attend(q, k, v, is_causal=causal), sdpa(q, k, v, is_causal=causal))


def test_causal_with_other_keys_is_aligned_to_the_first_key_as_in_torch():
    q, k, v = qkv(4, 9)
    want, _ = attention(q, k, v, allowed=torch.ones(4, 9, dtype=torch.bool).tril())
    torch.testing.assert_close(attend(q, k, v, is_causal=True), want)
    torch.testing.assert_close(attend(q, k, v, is_causal=True, engine="reference"), want)
    assert not torch.allclose(attend(q, k, v, pattern=Causal(), q_offset=5), want)


def test_a_bool_mask_lets_through_and_a_float_mask_adds():
    q, k, v = qkv()
    mask = coin(2, 1, 9, 9) | torch.eye(9, dtype=torch.bool)
    (bias,) = normal((1, 4, 9, 9), seed=4)
    torch.testing.assert_close(attend(q, k, v, mask), sdpa(q, k, v, mask))
    torch.testing.assert_close(attend(q, k, v, bias), sdpa(q, k, v, bias))
    torch.testing.assert_close(attend(q, k, v, bias=bias), sdpa(q, k, v, bias))
    torch.testing.assert_close(attend(q, k, v, mask, bias=bias), sdpa(q, k, v, bias.masked_fill(~mask, float("-inf"))))
    torch.testing.assert_close(
        attend(q, k, v, torch.zeros(9, 9).masked_fill(~mask, float("-inf"))), sdpa(q, k, v, mask)
    )


def test_a_float_mask_gets_its_gradient():
    q, k, v = qkv()
    bias = normal((1, 4, 9, 9), seed=4)[0].requires_grad_()
    (got,) = torch.autograd.grad(attend(q, k, v, bias).square().sum(), bias)
    (want,) = torch.autograd.grad(sdpa(q, k, v, bias).square().sum(), bias)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("n, m", [(9, 9), (5, 9), (9, 5)])
def test_is_causal_and_a_mask_both_hold(kind, n, m):
    q, k, v = qkv(n, m)
    mask = coin(2, 1, n, m)
    given = mask if kind == "bool" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    want, _ = attention(q, k, v, allowed=mask & torch.ones(n, m, dtype=torch.bool).tril())
    torch.testing.assert_close(attend(q, k, v, given, is_causal=True), want)


def test_a_mask_that_contradicts_causal_leaves_empty_rows_of_zero():
    q, k, v = qkv()
    assert (attend(q, k, v, torch.ones(9, 9, dtype=torch.bool).triu(1), is_causal=True) == 0).all()


def test_three_axes_pass_through_the_plain_path():
    q, k, v = (x[0] for x in qkv())
    assert torch.equal(attend(q, k, v, is_causal=True), sdpa(q, k, v, is_causal=True))
    with pytest.raises(ShapeError, match="query has 3 axes"):
        attend(q, k, v, pattern=Causal())


@pytest.mark.parametrize("enable_gqa", [False, True])
def test_grouped_heads_are_seen_from_the_shapes(enable_gqa):
    q, k, v = qkv(heads=6, groups=2)
    want = sdpa(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(attend(q, k, v, is_causal=True, enable_gqa=enable_gqa), want)
    torch.testing.assert_close(attend(q, k, v, pattern=Causal()), want)


def test_decoding_with_an_offset_equals_the_last_rows():
    q, k, v = qkv(9, 9)
    pattern = Causal() & SlidingWindow(4) | Sinks(2)
    whole = attend(q, k, v, pattern=pattern)
    for rows in (1, 3):
        torch.testing.assert_close(
            attend(q[:, :, -rows:], k, v, pattern=pattern, q_offset=9 - rows), whole[:, :, -rows:]
        )


def test_an_engine_that_is_named_runs_or_raises():
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, engine="reference"), sdpa(q, k, v))
    torch.testing.assert_close(attend(q, k, v, engine="dense"), sdpa(q, k, v))
    with pytest.raises(Unsupported, match="Sigmoid, not Softmax"):
        attend(q, k, v, normaliser=Sigmoid(), engine="dense:sdpa")
    with pytest.raises(OptionError, match="did you mean"):
        attend(q, k, v, engine="dense:sdpaa")


NAN = torch.zeros(9, 9).masked_fill(torch.eye(9, dtype=torch.bool), float("nan"))


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"is_causal": True, "pattern": SlidingWindow(3)}, OptionError, r"write Causal\(\) & pattern"),
        ({"is_causal": True, "q_offset": 3}, OptionError, r"with q_offset write pattern=Causal\(\)"),
        ({"is_causal": True, "q_offset": 3, "attn_mask": coin(9, 9)}, OptionError, r"write pattern=Causal\(\)"),
        ({"attn_mask": NAN}, OptionError, "holds NaN; use -inf"),
        ({"bias": NAN, "engine": "reference"}, OptionError, "holds NaN"),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.int64)}, ShapeError, "must be a floating dtype"),
        ({"attn_mask": coin(8, 9)}, ShapeError, r"\(2, 4, 9, 9\)"),
        ({"attn_mask": torch.zeros(3, 1, 9, 9)}, ShapeError, "must broadcast"),
        ({"attn_mask": torch.zeros(9, 9), "bias": torch.zeros(9, 9)}, ShapeError, "a bias already"),
        ({"pattern": KeyValid()}, OptionError, r"\.bind\(key_valid="),
        ({"pattern": KeyValid().bind(key_valid=coin(2, 8))}, ShapeError, "8 positions, but there are 9 keys"),
    ],
)
def test_bad_calls_are_refused_with_the_reason(options, error, text):
    with pytest.raises(error, match=text):
        attend(*qkv(), **options)


@pytest.mark.parametrize("options", [{}, {"pattern": Causal()}, {"attn_mask": coin(9, 9)}])
@pytest.mark.parametrize("groups", [3, 8])
def test_head_counts_that_do_not_divide_are_refused(options, groups):
    with pytest.raises(ShapeError, match=f"4 query heads cannot share {groups} key heads"):
        attend(*qkv(heads=4, groups=groups), **options)


def test_dtypes_that_differ_are_refused():
    q, k, v = qkv()
    with pytest.raises(ShapeError, match=r"key is torch\.float32 but query is torch\.float64"):
        attend(q, k.float(), v, pattern=Causal())


WAYS = {
    "plain": {"is_causal": True},
    "pattern": {"pattern": Causal() & SlidingWindow(3)},
    "band": {"pattern": Causal() & SlidingWindow(2)},
    "mask": {"attn_mask": coin(9, 9) | torch.eye(9, dtype=torch.bool)},
    "bias": {"bias": normal((1, 1, 9, 9), seed=3)[0]},
    "reference": {"pattern": Causal(), "engine": "reference"},
    "sigmoid": {"pattern": Causal(), "normaliser": Sigmoid(-2.0)},
    "l1": {"pattern": Causal() | Sinks(2), "normaliser": L1()},
}


@pytest.mark.parametrize("way", WAYS)
def test_function_transforms_see_through(way):
    q, k, v = qkv(groups=2)

    def run(q, k, v):
        return attend(q, k, v, **WAYS[way])

    want = run(q, k, v)
    batched = torch.func.vmap(run)(*(x[:, None] for x in (q, k, v)))
    torch.testing.assert_close(batched[:, 0], want)
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf, k, v).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda q: run(q, k, v).square().sum())(q), gradient)


FUSED = ("plain", "pattern", "band", "mask", "bias")


def unless_refused(function, x):
    try:
        return function(x)
    except (NotImplementedError, RuntimeError) as error:
        if "implemented" not in str(error):
            raise
        return None


@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_and_second_derivatives_are_right_or_refused(way):
    q, k, v = qkv(groups=2)

    def energy(engine):
        return lambda q: attend(q, k, v, **{"engine": engine, **WAYS[way]}).square().sum()

    exact = energy("reference")
    gradient, hessian = torch.func.grad(exact)(q), torch.func.hessian(exact)(q)
    torch.testing.assert_close(torch.func.jacfwd(exact)(q), gradient)
    forward, second = torch.func.jacfwd(energy(None)), torch.func.jacrev(torch.func.jacrev(energy(None)))
    for derivative, want in ((forward, gradient), (second, hessian)):
        got = unless_refused(derivative, q)
        if got is None:
            # torch's own fused kernel has neither on the CPU and says so
            assert way in FUSED
        else:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("way", WAYS)
def test_the_whole_call_compiles_without_a_break(way):
    q, k, v = qkv(groups=2)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, **WAYS[way]), fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves)
    torch.testing.assert_close(out, attend(q, k, v, **WAYS[way]))
    want = torch.autograd.grad(attend(*leaves, **WAYS[way]).square().sum(), leaves)
    for g, w in zip(torch.autograd.grad(out.square().sum(), leaves), want, strict=True):
        torch.testing.assert_close(g, w)


def test_bound_data_compiles_without_a_break():
    q, k, v = qkv()
    valid, mask = coin(2, 9), coin(2, 1, 9, 9)

    def run(q, k, v, valid, mask):
        pattern = Causal() & KeyValid().bind(key_valid=valid) & Explicit().bind(mask=mask)
        return attend(q, k, v, pattern=pattern)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, valid, mask), run(q, k, v, valid, mask))
