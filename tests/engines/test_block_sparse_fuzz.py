"""Random patterns, sizes and options against the dense definition, forward and backward."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from regard import (
    L1,
    Causal,
    Documents,
    Explicit,
    Full,
    KeyValid,
    Linear,
    Prefix,
    ReLUOverN,
    Sharpen,
    Sigmoid,
    Sinks,
    SlidingWindow,
    Softmax,
    Unsupported,
)
from regard.engines.block_sparse import block_sparse
from regard.engines.gather import gather
from regard.patterns import Band, BlockCausal, BlockLocal, Blocks, DilatedWindow, Empty, PerHead, Strided
from regard.patterns.selection import BlockSelection, TokenSelection
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import Exp, Grouped

small = st.integers(1, 80)
PURE = st.one_of(
    st.just(Full()),
    st.just(Empty()),
    st.booleans().map(Causal),
    small.map(SlidingWindow),
    st.tuples(small, small).map(lambda x: Band(*x)),
    st.tuples(st.integers(1, 20), st.integers(1, 6)).map(lambda x: DilatedWindow(*x)),
    st.integers(1, 9).map(Strided),
    small.map(Sinks),
    small.map(Prefix),
    small.map(Blocks),
    small.map(BlockCausal),
    st.tuples(small, st.integers(0, 2), st.integers(0, 2)).map(lambda x: BlockLocal(*x)),
)
COMPOSED = st.recursive(
    PURE,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda x: x[0] & x[1]),
        st.tuples(inner, inner).map(lambda x: x[0] | x[1]),
        st.tuples(inner, inner).map(lambda x: x[0] - x[1]),
        inner.map(lambda x: ~x),
    ),
    max_leaves=4,
)
NORMALISERS = [Softmax()] * 4 + [
    Sigmoid(-1.0),
    L1(),
    L1("relu"),
    ReLUOverN(),
    Linear(),
    Exp(),
    Grouped(5),
    Sharpen(L1(), 3.0),
]
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@st.composite
def calls(draw):
    """One call: what the engines need, drawn by numbers; the tensors themselves come from a seed."""
    groups, share = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    heads, batch = groups * share, draw(st.integers(1, 2))
    pattern = draw(COMPOSED)
    if draw(st.booleans()) and heads > 1:
        pattern = PerHead([pattern, *(draw(PURE) for _ in range(heads - 1))])
    return {
        "sizes": (batch, heads, groups, draw(st.integers(1, 300)), draw(st.integers(1, 300))),
        "widths": (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        "q_offset": draw(st.sampled_from([0, 0, 1, 70])),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        "pattern": pattern,
        "bound": draw(st.sampled_from(["", "", "padding", "documents", "explicit", "blocks", "tokens"])),
        "normaliser": draw(st.sampled_from(NORMALISERS)),
        "bias": draw(st.sampled_from([None, (1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 1), (1, 0, 0, 0)])),
        "indexed": draw(st.sampled_from([None, None, (1, 0, 1), (0, 1, 0)])),
        "sinks": draw(st.sampled_from([None, None, (1, 0, 1), (0, 0, 0)])),
        "extra": draw(st.sampled_from([0, 0, 3, 70])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "seed": draw(st.integers(0, 2**31)),
    }  # fmt: skip


def cut(shape, axes):
    """Axes named by 1 become of size 1."""
    return tuple(1 if one else size for size, one in zip(shape, axes, strict=True))


def prepare(call):
    """(tensors with gradients in float64, the options as a function of them, the pattern)."""
    generator = torch.Generator().manual_seed(call["seed"])
    batch, heads, groups, n, m = call["sizes"]
    d, e = call["widths"]
    make = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = {"q": make(batch, heads, n, d), "k": make(batch, groups, m, d), "v": make(batch, groups, m, e)}
    normaliser = call["normaliser"]
    if call["bias"] is not None:
        bias = make(*cut((batch, heads, n, m), call["bias"]))
        tensors["bias"] = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.05, float("-inf"))
    if call["indexed"] is not None:
        tensors["table"] = make(*cut((batch, heads, n), call["indexed"]), n + m)
    if call["sinks"] is not None and isinstance(normaliser, Softmax):
        tensors["sinks"] = make(*cut((batch, heads, n), call["sinks"]))
    if call["extra"] and (
        isinstance(normaliser, Softmax) or (normaliser.kind == "additive" and not normaliser.needs_counts)
    ):
        tensors["extra_k"], tensors["extra_v"] = (
            make(batch, groups, call["extra"], d),
            make(batch, groups, call["extra"], e),
        )
    pattern, reach = call["pattern"], max(m, call["q_offset"] + n)
    if call["bound"] == "padding":
        pattern = pattern & KeyValid().bind(key_valid=torch.rand(batch, m, generator=generator) < 0.7)
    elif call["bound"] == "documents" and reach == m:
        pattern = pattern & Documents().bind(doc=torch.randint(0, 4, (batch, reach), generator=generator).sort(-1)[0])
    elif call["bound"] == "explicit":
        pattern = pattern | Explicit().bind(mask=torch.rand(1, 1, reach, m, generator=generator) < 0.05)
    elif call["bound"] == "blocks":
        block_q, block_k = [(64, 64), (1, 16), (128, 32), (7, 100)][call["seed"] % 4]
        rows, columns = -(-n // block_q), -(-m // block_k)
        picked = torch.rand(batch, groups, rows, columns, generator=generator).argsort(-1)[..., :2].int()
        pattern = BlockSelection(block_q, block_k, picked, within=pattern)
    elif call["bound"] == "tokens":
        picked = torch.rand(batch, heads, n, m, generator=generator).argsort(-1)[..., :5]
        picked = picked.masked_fill(torch.rand(picked.shape, generator=generator) < 0.3, -1).int()
        pattern = TokenSelection(picked, within=pattern)
    return tensors, pattern


def run(engine, call, tensors, pattern):
    _, _, _, n, m = call["sizes"]
    softmax = isinstance(call["normaliser"], Softmax)
    options = {name: tensors[name] for name in ("bias", "sinks", "extra_k", "extra_v") if name in tensors}
    if "table" in tensors:
        options["indexed"] = [Indexed(tensors["table"], torch.arange(m) + n, torch.arange(n))]
    attend = gather if engine.startswith("gather") else block_sparse
    got = attend(
        tensors["q"], tensors["k"], tensors["v"], pattern, q_offset=call["q_offset"], normaliser=call["normaliser"],
        dropout_p=call["dropout_p"], seed=call["seed"], return_lse=softmax, engine=engine, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    total = (got.out.double() * torch.randn(got.out.shape, generator=generator, dtype=torch.float64)).sum()
    results = {"out": got.out}
    if softmax:
        lse = got.lse.masked_fill(torch.isneginf(got.lse), 0.0).double()
        results["lse"] = lse
        total = total + (lse * torch.randn(lse.shape, generator=generator, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    for name, tensor, grad in zip(tensors, tensors.values(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(tensor) if grad is None else grad
    return {name: x.detach().double() for name, x in results.items()}


def check(call):
    tensors, pattern = prepare(call)
    # every engine sees the numbers as the dtype rounds them
    rounded = {name: x.to(call["dtype"]) for name, x in tensors.items()}
    want = run("block_sparse:reference", call, {k: x.double().requires_grad_() for k, x in rounded.items()}, pattern)
    engines = ["block_sparse:torch", "block_sparse:native"]
    if call["normaliser"] == L1("relu") and call["dtype"].itemsize == 2:
        # the kernels take dO.out from the rounded out, and a row sum near 0 magnifies that rounding without bound
        engines.remove("block_sparse:native")
    engines += ["gather:torch"] if isinstance(pattern, TokenSelection) else []
    # gradients are sums: their error is that of their largest part
    size = max(1.0, *(x.abs().max().item() for x in want.values() if x.numel()))
    # numbers that the dtype does not hold
    assume(size < torch.finfo(call["dtype"]).max / 4)
    for engine in engines:
        try:
            got = run(engine, call, {k: x.detach().requires_grad_() for k, x in rounded.items()}, pattern)
        except Unsupported:
            assert engine.endswith("native")
            continue
        for name, expected in want.items():
            error = (got[name] - expected).abs().max().item() if expected.numel() else 0.0
            assert error <= DTYPES[call["dtype"]] * size, f"{engine}, {name}: off by {error:.3g} of {size:.3g}"


SETTINGS = {
    "deadline": None, "database": None, "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}  # fmt: skip


@settings(max_examples=200, **SETTINGS)
@given(calls())
def test_random_calls_equal_the_definition(call):
    check(call)


@pytest.mark.slow
def test_thousands_of_random_calls_equal_the_definition(record):
    count = {"random calls": 0, "of them float64, float32, bfloat16, float16": [0, 0, 0, 0]}

    @settings(max_examples=5000, **SETTINGS)
    @given(calls())
    def many(call):
        check(call)
        count["random calls"] += 1
        count["of them float64, float32, bfloat16, float16"][list(DTYPES).index(call["dtype"])] += 1

    many()
    record(count)
    assert count["random calls"] >= 5000
