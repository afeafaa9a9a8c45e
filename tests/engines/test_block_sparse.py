from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad

from regard import (
    L1,
    Causal,
    Documents,
    Explicit,
    Full,
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
from regard.contract.dispatch import listen
from regard.engines import block_ops, chunks, native
from regard.engines.block_sparse import block_sparse
from regard.engines.dense import dense
from regard.patterns import Empty
from regard.patterns.algebra import PerHead
from regard.patterns.selection import BlockSelection, Permuted, TokenSelection
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import Exp, Grouped, Normaliser
from tests.oracles import attention, coin, normal

NATIVE = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
WAYS = ["block_sparse:torch", pytest.param("block_sparse:native", marks=NATIVE)]
N = 150
PATTERNS = {
    "all": None,
    "nothing": Empty(),
    "causal": Causal(),
    "strict": Causal(strict=True),
    "window": Causal() & SlidingWindow(20),
    "sinks": Causal() & SlidingWindow(9) | Sinks(3),
    "both sides": SlidingWindow(70),
    "per head": PerHead((Causal(), SlidingWindow(3), Full(), Sinks(5))),
    "documents": Causal() & Documents().bind(doc=(torch.arange(N) // 41)[None]),
    "padding": KeyValid(rows=True).bind(key_valid=torch.stack((torch.arange(N) < 100, torch.arange(N) >= 70))),
    "explicit": Explicit().bind(mask=coin(2, 4, N, N, p=0.02)),
}
NORMALISERS = [Softmax(), Sigmoid(-1.0), L1(), L1("exp"), ReLUOverN(), Linear(), Exp(), Grouped(7), Sharpen(L1(), 3.0)]
# float32 against float64
NEAR = {"atol": 2e-5, "rtol": 2e-5}


def qkv(n=N, m=N, heads=4, groups=2, dtype=torch.float64, seed=0, d=8, e=6):
    return [
        x.requires_grad_()
        for x in normal((2, heads, n, d), (2, groups, m, d), (2, groups, m, e), dtype=dtype, seed=seed)
    ]


def dtype_of(engine):
    return torch.float32 if engine.endswith("native") else torch.float64


def near(engine):
    return NEAR if engine.endswith("native") else {}


def gradients(out, inputs, lse=None, *, keep=True):
    total = (out * normal(tuple(out.shape), seed=9, dtype=out.dtype)[0]).sum()
    if lse is not None:
        seen = lse.masked_fill(torch.isneginf(lse), 0.0)
        total = total + (seen * normal(tuple(lse.shape), seed=8, dtype=lse.dtype)[0]).sum()
    found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def compare(engine, inputs, run, **options):
    """`run` on an engine against the definition in float64, with gradients; the scale of an error is the largest gradient."""
    dtype = dtype_of(engine)
    results = []
    for name, kind in ((engine, dtype), ("block_sparse:reference", torch.float64)):
        given = [x.detach().to(kind).requires_grad_() for x in inputs]
        got = run(given, engine=name, **options)
        results.append([got.out, *([] if got.lse is None else [got.lse]), *gradients(got.out, given, got.lse)])
    for got, want in zip(*results, strict=True):
        size = want.masked_fill(torch.isinf(want), 0.0).abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(got.double() / size, want / size, **near(engine))
    return results[0]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("engine", WAYS)
def test_every_pattern_is_attended_as_by_the_definition(name, engine):
    compare(engine, qkv(), lambda x, engine: block_sparse(*x, PATTERNS[name], return_lse=True, engine=engine))


def test_the_definition_is_attention_row_by_row():
    q, k, v = qkv(20, 20)
    pattern = Causal() & SlidingWindow(5)
    got = block_sparse(q, k, v, pattern, return_lse=True, engine="reference")
    want, lse = attention(q, k, v, allowed=pattern.dense(20, 20))
    torch.testing.assert_close(got.out, want)
    torch.testing.assert_close(got.lse, lse)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("engine", WAYS)
def test_grouped_heads_share_keys_and_values(heads, groups, engine):
    compare(engine, qkv(heads=heads, groups=groups), lambda x, engine: block_sparse(*x, Causal(), engine=engine))


@pytest.mark.parametrize(
    "n, m, q_offset", [(1, 1, 0), (1, 150, 149), (5, 150, 100), (130, 64, 0), (64, 128, 7), (3, 200, 0)]
)
@pytest.mark.parametrize("engine", WAYS)
def test_ragged_sizes_and_offsets(n, m, q_offset, engine):
    compare(
        engine,
        qkv(n, m),
        lambda x, engine: block_sparse(
            *x, Causal() & SlidingWindow(40) | Sinks(2), q_offset=q_offset, return_lse=True, engine=engine
        ),
    )


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=repr)
@pytest.mark.parametrize("engine", WAYS)
def test_every_normaliser(normaliser, engine):
    def run(x, engine):
        return block_sparse(*x, Causal() & SlidingWindow(50), normaliser=normaliser, scale=0.3, engine=engine)

    if engine.endswith("native") and type(normaliser) in (Exp, Grouped, Sharpen):
        with pytest.raises(Unsupported, match="no kernel for the normaliser"):
            run([x.float() for x in qkv()], engine)
        return
    compare(engine, qkv(), run)


@pytest.mark.parametrize("shape", [(150,), (1, 150), (150, 1), (2, 1, 1, 150), (1, 4, 150, 1), (2, 4, 150, 150), (1,)])
@pytest.mark.parametrize("engine", WAYS)
def test_biases_of_every_broadcastable_shape(shape, engine):
    bias = normal(shape, seed=3)[0].masked_fill(~coin(*shape, p=0.9, seed=1), float("-inf"))
    compare(
        engine,
        [*qkv(), bias],
        lambda x, engine: block_sparse(*x[:3], Causal(), bias=x[3], return_lse=True, engine=engine),
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 1, 150), (2, 4, 150)])
@pytest.mark.parametrize("engine", WAYS)
def test_indexed_biases_and_their_gradients(shape, engine):
    rows, columns = torch.arange(N, dtype=torch.int32) // 12, torch.arange(N, dtype=torch.int32) % 12
    tables = normal((*shape, 25), (*shape, 23), seed=5)

    def run(x, engine):
        terms = [Indexed(x[3], rows + 12, rows), Indexed(x[4], columns + 11, columns)]
        return block_sparse(*x[:3], SlidingWindow(60), indexed=terms, engine=engine)

    compare(engine, [*qkv(), *tables], run)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 1, 150), (2, 4, 150)])
@pytest.mark.parametrize("engine", WAYS)
def test_sinks_also_in_rows_without_keys(shape, engine):
    sinks = normal(shape, seed=5)[0]
    compare(
        engine,
        [*qkv(), sinks],
        lambda x, engine: block_sparse(
            *x[:3], Causal(strict=True) & SlidingWindow(30), sinks=x[3], return_lse=True, engine=engine
        ),
    )


@pytest.mark.parametrize("normaliser", [Softmax(), Sigmoid(-1.0), Linear()], ids=repr)
@pytest.mark.parametrize("engine", WAYS)
def test_extra_keys_stand_in_the_same_normalisation(normaliser, engine):
    extra = normal((2, 2, 70, 8), (2, 2, 70, 6), seed=4)
    softmax = isinstance(normaliser, Softmax)

    def run(x, engine):
        return block_sparse(
            *x[:3], Causal(strict=True), extra_k=x[3], extra_v=x[4], normaliser=normaliser, dropout_p=0.3, seed=11,
            return_lse=softmax, engine=engine,
        )  # fmt: skip

    compare(engine, [*qkv(), *extra], run)


@pytest.mark.parametrize("normaliser", [Softmax(), Sigmoid(-1.0), L1()], ids=repr)
@pytest.mark.parametrize("engine", WAYS)
def test_dropout_drops_the_same_weights_in_every_engine(normaliser, engine):
    compare(
        engine,
        qkv(),
        lambda x, engine: block_sparse(
            *x, Causal(), normaliser=normaliser, dropout_p=0.4, seed=2**40 + 17, q_offset=3, engine=engine
        ),
    )


@pytest.mark.parametrize("engine", WAYS)
def test_dropout_follows_torchs_generator(engine):
    q, k, v = qkv(dtype=dtype_of(engine))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(block_sparse(q, k, v, Causal(), dropout_p=0.5, engine=engine).out)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (32, 128), (1, 64), (150, 7)])
def test_the_size_of_the_blocks_changes_nothing(block):
    q, k, v = qkv()
    pattern = Causal() & SlidingWindow(37) | Sinks(2)
    layout = pattern.layout(N, N, block=block)
    got = block_sparse(q, k, v, layout, dropout_p=0.2, seed=3, return_lse=True, engine="block_sparse:torch")
    want = block_sparse(q, k, v, pattern, dropout_p=0.2, seed=3, return_lse=True, engine="reference")
    for a, b in zip(
        (got.out, got.lse, *gradients(got.out, (q, k, v), got.lse)),
        (want.out, want.lse, *gradients(want.out, (q, k, v), want.lse)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("engine", WAYS)
def test_a_layout_carries_its_own_offset(engine):
    layout = Causal().layout(50, N, q_offset=90)
    compare(engine, qkv(50, N), lambda x, engine: block_sparse(*x, layout, dropout_p=0.2, seed=1, engine=engine))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", WAYS)
def test_half_precision_accumulates_in_float32(dtype, engine):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv(n=64, m=600, d=64, e=64))
    got = block_sparse(q, k, v, SlidingWindow(500), return_lse=True, engine=engine)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = block_sparse(*exact, SlidingWindow(500), return_lse=True, engine="reference")
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    torch.testing.assert_close(got.lse.double(), want.lse, atol=2e-3, rtol=1e-4)
    # the rounding of the result and of the weights
    tolerance = 3e-2 if dtype == torch.bfloat16 else 4e-3
    for a, b in zip(gradients(got.out, (q, k, v)), gradients(want.out, exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() < tolerance * b.abs().max()
    assert (got.out.double() - want.out).abs().max() < tolerance * want.out.abs().max()


@pytest.mark.parametrize("engine", WAYS)
def test_half_precision_biases_get_gradients_of_their_own_dtype(engine):
    q, k, v = qkv(dtype=torch.float32)
    bias = torch.zeros(1, 4, 1, N, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(block_sparse(q, k, v, bias=bias, engine=engine).out.sum(), bias)
    assert grad.dtype == torch.bfloat16 and grad.shape == bias.shape


@pytest.mark.parametrize("engine", WAYS)
def test_large_scores_do_not_overflow(engine):
    q, k, v = (x.detach() * 30 for x in qkv(dtype=torch.float32))
    got = block_sparse(q, k, v, Causal(), return_lse=True, engine=engine)
    want = block_sparse(q.double(), k.double(), v.double(), Causal(), return_lse=True, engine="reference")
    assert got.out.isfinite().all()
    assert (got.out - want.out).abs().max() < 1e-3 * want.out.abs().max()
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("engine", WAYS)
def test_a_row_of_nothing_is_exactly_zero_and_so_is_its_gradient(engine):
    q, k, v = qkv(dtype=dtype_of(engine))
    seen = coin(2, 4, N, N, p=0.1)
    seen[:, :, 40:70] = False
    bias = torch.zeros(1, 1, N, N, dtype=q.dtype)
    bias[:, :, 100] = float("-inf")
    bias.requires_grad_()
    got = block_sparse(q, k, v, Explicit().bind(mask=seen), bias=bias, return_lse=True, engine=engine)
    rows = [*range(40, 70), 100]
    assert (got.out[:, :, rows] == 0).all() and torch.isneginf(got.lse[:, :, rows]).all()
    grads = torch.autograd.grad(got.out.square().sum() + got.lse.masked_fill(got.lse.isinf(), 0).sum(), (q, k, v, bias))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, rows] == 0).all() and (grads[3][:, :, rows] == 0).all()
    # even the log-sum-exp of nothing gives no gradient
    got = block_sparse(q, k, v, Explicit().bind(mask=seen), bias=bias, return_lse=True, engine=engine)
    grads = torch.autograd.grad(got.lse[:, :, rows].sum(), (q, k, bias))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("engine", WAYS)
def test_no_output_depends_on_a_later_key(engine):
    for pattern in (Causal(), Causal() & SlidingWindow(40) | Sinks(2)):
        q, k, v = qkv(dtype=dtype_of(engine))
        out = block_sparse(q, k, v, pattern, engine=engine).out
        for row in (0, 63, 64, 100):
            grads = torch.autograd.grad(out[:, :, row].sum(), (k, v), retain_graph=True)
            assert all((g[:, :, row + 1 :] == 0).all() and (g[:, :, row] != 0).any() for g in grads)


@pytest.mark.parametrize("engine", WAYS)
def test_what_padding_holds_changes_nothing(engine):
    q, k, v = (x.detach() for x in qkv(dtype=dtype_of(engine)))
    valid = torch.stack((torch.arange(N) < 100, torch.arange(N) % 3 > 0))
    pattern = Causal() & KeyValid().bind(key_valid=valid)
    want = block_sparse(q, k, v, pattern, engine=engine).out
    hidden = ~valid[:, None, :, None]
    other = [torch.where(hidden, torch.full_like(x, 1e4), x) for x in (k, v)]
    torch.testing.assert_close(block_sparse(q, *other, pattern, engine=engine).out, want, atol=0, rtol=0)


@pytest.mark.parametrize("engine", WAYS)
def test_a_decoded_row_is_the_row_of_the_whole(engine):
    q, k, v = (x.detach() for x in qkv(dtype=dtype_of(engine)))
    for pattern in (Causal(), Causal() & SlidingWindow(30) | Sinks(4)):
        whole = block_sparse(q, k, v, pattern, engine=engine).out
        for t in (0, 63, 64, 149):
            row = block_sparse(
                q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], pattern, q_offset=t, engine=engine
            ).out
            torch.testing.assert_close(row, whole[:, :, t : t + 1], **near(engine))


@pytest.mark.parametrize("engine", WAYS)
def test_unwritten_memory_is_never_read(engine):
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if engine.endswith("native"):
        native.poison(True)
    try:
        for pattern in (Empty(), Causal() & SlidingWindow(20), PATTERNS["explicit"]):
            compare(engine, qkv(), lambda x, engine: block_sparse(*x, pattern, return_lse=True, engine=engine))  # noqa: B023
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
        if engine.endswith("native"):
            native.poison(False)


@pytest.mark.parametrize("engine", WAYS)
def test_strided_and_expanded_tensors(engine):
    q, k, v = (x.detach().to(dtype_of(engine)) for x in qkv())
    want = block_sparse(q, k, v, Causal(), engine=engine).out
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(block_sparse(*turned, Causal(), engine=engine).out, want)
    sliced = [torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0] for x in (q, k, v)]
    torch.testing.assert_close(block_sparse(*sliced, Causal(), engine=engine).out, want)
    one = [x[:1].expand(3, -1, -1, -1) for x in (q, k, v)]
    torch.testing.assert_close(block_sparse(*one, Causal(), engine=engine).out, want[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    "engine", ["block_sparse:torch", "block_sparse:reference", pytest.param("block_sparse:native", marks=NATIVE)]
)
@pytest.mark.parametrize("sizes", [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 2)])
def test_sizes_of_zero(sizes, engine):
    n, m, batch = sizes
    q, k, v = (torch.zeros(batch, 2, length, w, requires_grad=True) for length, w in ((n, 8), (m, 8), (m, 6)))
    got = block_sparse(q, k, v, Causal(), return_lse=True, engine=engine)
    assert got.out.shape == (batch, 2, n, 6) and (got.out == 0).all()
    assert got.lse.shape == (batch, 2, n) and torch.isneginf(got.lse).all()
    assert all(
        g.shape == x.shape for g, x in zip(torch.autograd.grad(got.out.sum(), (q, k, v)), (q, k, v), strict=True)
    )


def test_gradients_against_finite_differences():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 7, 2), (1, 1, 7, 2), (1, 1, 7, 2)))
    bias, table, sinks, more_k, more_v = (
        x.requires_grad_() for x in normal((1, 2, 1, 7), (1, 2, 1, 13), (1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 2), seed=3)
    )
    places = torch.arange(7, dtype=torch.int32)

    def read(q, k, v, bias, table, sinks, more_k, more_v):
        got = block_sparse(
            q, k, v, Causal() & SlidingWindow(4), bias=bias, indexed=[Indexed(table, places + 6, places)], sinks=sinks,
            extra_k=more_k, extra_v=more_v, dropout_p=0.2, seed=5, return_lse=True, engine="block_sparse:torch",
        )  # fmt: skip
        return got.out, got.lse

    assert torch.autograd.gradcheck(read, (q, k, v, bias, table, sinks, more_k, more_v), fast_mode=True)
    for normaliser in (Sigmoid(-1.0), L1(), Grouped(4), Sharpen(L1(), 3.0)):
        assert torch.autograd.gradcheck(
            lambda *x: block_sparse(*x, Causal(), normaliser=normaliser, engine="block_sparse:torch").out,  # noqa: B023
            (q, k, v),
            fast_mode=True,
        )


@pytest.mark.parametrize("engine", WAYS)
def test_second_derivatives_and_forward_mode_are_refused(engine):
    q, k, v = qkv(20, 20, dtype=dtype_of(engine))
    out = block_sparse(q, k, v, Causal(), engine=engine).out
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match="use engine='reference'"):
        torch.autograd.grad(first.sum(), q)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q.detach(), torch.ones_like(q))
        with pytest.raises(NotImplementedError):
            block_sparse(dual, k.detach(), v.detach(), Causal(), engine=engine)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(
            lambda q: block_sparse(q, k.detach(), v.detach(), Causal(), engine=engine).out, (q.detach(),), (q.detach(),)
        )


def test_the_definition_has_second_derivatives():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 2)))
    assert torch.autograd.gradgradcheck(
        lambda *x: block_sparse(*x, Causal().layout(5, 5, block=(2, 2)), engine="reference").out, (q, k, v)
    )


@pytest.mark.parametrize("engine", WAYS)
def test_vmap_and_gradients_under_it(engine):
    dtype = dtype_of(engine)
    q, k, v = (x.detach() for x in qkv(80, 80, dtype=dtype))
    many = normal((3, *q.shape), dtype=dtype, seed=4)[0]
    bias, sinks, table = normal((2, 1, 1, 80), (1, 4, 1), (1, 4, 1, 159), dtype=dtype, seed=6)
    places = torch.arange(80, dtype=torch.int32)
    pattern = Causal() & Documents().bind(doc=(torch.arange(80) // 30)[None].expand(2, -1))

    def loss(q, bias, sinks, table):
        got = block_sparse(
            q, k, v, pattern, bias=bias, sinks=sinks, indexed=[Indexed(table, places + 79, places)], return_lse=True,
            engine=engine,
        )  # fmt: skip
        return got.out.square().sum() + got.lse.sum()

    slope = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {}
    got = torch.func.vmap(slope, in_dims=(0, None, None, None))(many, bias, sinks, table)
    for place, found in enumerate(got):
        torch.testing.assert_close(found, torch.stack([slope(x, bias, sinks, table)[place] for x in many]), **tolerance)
    biases = normal((3, *bias.shape), dtype=dtype, seed=7)[0]
    got = torch.func.vmap(slope, in_dims=(0, 0, None, None))(many, biases, sinks, table)
    for place, found in enumerate(got):
        want = torch.stack([slope(x, b, sinks, table)[place] for x, b in zip(many, biases, strict=True)])
        torch.testing.assert_close(found, want, **tolerance)
    plain = torch.func.vmap(lambda k: block_sparse(q, k, v, Causal().layout(80, 80), engine=engine).out, in_dims=1)
    keys = normal((2, 3, 2, 80, 8), dtype=dtype, seed=8)[0]
    want = torch.stack([block_sparse(q, keys[:, i], v, Causal(), engine=engine).out for i in range(3)])
    torch.testing.assert_close(plain(keys), want, **tolerance)


@pytest.mark.parametrize("engine", WAYS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(engine, backend):
    if backend == "inductor" and not engine.endswith("torch"):
        pytest.skip("the operator is opaque: one engine is enough")
    torch._dynamo.reset()
    q, k, v = qkv(100, 100, dtype=dtype_of(engine))
    doc = (torch.arange(100) // 30)[None]
    table, places = (
        normal((1, 4, 1, 199), dtype=q.dtype, seed=2)[0].requires_grad_(),
        torch.arange(100, dtype=torch.int32),
    )

    def call(q, k, v, table, doc, window):
        pattern = Causal() & SlidingWindow(window) & Documents().bind(doc=doc)
        indexed = [Indexed(table, places + 99, places)]
        got = block_sparse(q, k, v, pattern, indexed=indexed, return_lse=True, engine=engine)
        return got.out, got.lse

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for window in (20, 40):
        got, want = compiled(q, k, v, table, doc, window), call(q, k, v, table, doc, window)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            gradients(got[0], (q, k, v, table), got[1], keep=False),
            gradients(want[0], (q, k, v, table), want[1], keep=False),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, k, v, table, doc, window), want)


@pytest.mark.parametrize("engine", WAYS)
def test_torchs_own_check_of_operators(engine):
    dtype = dtype_of(engine)
    q, k, v = (x.detach() for x in qkv(70, 70, dtype=dtype))
    bias, sinks = normal((1, 4, 1, 70), (1, 4, 1), dtype=dtype, seed=2)
    places = torch.arange(70, dtype=torch.int32)
    for normaliser in (Softmax(), Sigmoid(-1.0)):
        parcel = block_ops.pack(
            engine.partition(":")[2], Causal() & Documents().bind(doc=places[None] // 9), bias=bias,
            indexed=[Indexed(normal((1, 4, 1, 139), dtype=dtype)[0], places + 69, places)],
            sinks=sinks if isinstance(normaliser, Softmax) else None, normaliser=normaliser, scale=None, q_offset=0,
            dropout_p=0.1, seed=torch.tensor(3),
        )  # fmt: skip
        tail = (
            parcel.bias, parcel.sinks, parcel.seed, list(parcel.tables), list(parcel.data), list(parcel.code),
            list(parcel.numbers), parcel.scale,
        )  # fmt: skip
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.regard.block_sparse_forward.default, (q, k, v, *tail), test_utils=tests)
        out, lse = torch.ops.regard.block_sparse_forward(q, k, v, *tail)
        given = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, *tail)
        torch.library.opcheck(torch.ops.regard.block_sparse_backward.default, given, test_utils=tests)


@pytest.mark.parametrize("engine", WAYS)
def test_tensors_without_data_give_tensors_without_data(engine):
    q, k, v = (x.detach().to("meta", dtype_of(engine)) for x in qkv())
    got = block_sparse(q, k, v, Causal(), return_lse=True, engine=engine)
    assert got.out.is_meta and got.out.shape == (2, 4, N, 6)
    assert got.lse.is_meta and got.lse.shape == (2, 4, N)


@pytest.mark.parametrize("engine", WAYS)
def test_autocast_lowers_the_inputs_and_nothing_else(engine):
    q, k, v = (x.detach().float() for x in qkv())
    lowered = block_sparse(*(x.bfloat16() for x in (q, k, v)), Causal(), engine=engine).out
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block_sparse(q, k, v, Causal(), engine=engine).out, lowered)
        if not engine.endswith("native"):
            assert block_sparse(q.double(), k.double(), v.double(), Causal(), engine=engine).out.dtype == torch.float64


def test_bound_layouts_are_kept_while_their_data_lives_and_is_unwritten():
    q, k, v = (x.detach() for x in qkv())
    valid = torch.ones(2, N, dtype=torch.bool)
    pattern = KeyValid().bind(key_valid=valid)

    def run(pattern=pattern):
        return block_sparse(q, k, v, pattern, engine="block_sparse:torch").out

    run()
    held = [layout for _, _, layout in block_ops._remembered.values()]
    run()
    assert [layout for _, _, layout in block_ops._remembered.values()] == held
    valid[:, 100:] = False
    torch.testing.assert_close(run(), block_sparse(q, k, v, pattern, engine="reference").out)
    # the memory of layouts does not keep the data alive
    gone = weakref.ref(valid)
    del valid, pattern, run
    gc.collect()
    assert gone() is None


def test_memory_grows_with_the_length_and_not_with_its_square():
    largest = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.seen = max(getattr(self, "seen", 0), x.untyped_storage().nbytes())
            return out

    for n in (2048, 8192):
        q, k, v = (torch.randn(1, 1, n, 8) for _ in range(3))
        layout = (Causal() & SlidingWindow(100)).layout(n, n)
        options = chunks.Options(0.3, 0, Softmax())
        with Watch() as watch:
            work = chunks.TileWork(q, k, v, layout, options)
            out, lse = chunks.forward(work)
            chunks.backward(work, out, lse, out, lse)
        largest[n] = watch.seen
    # the chunks have a size of their own
    assert largest[8192] <= max(largest[2048] * 4, 64 * chunks.SCORES)
    assert largest[8192] < 4 * 8192 * 8192 / 4


@pytest.mark.parametrize("selected_heads", [1, 2, 4])
@pytest.mark.parametrize("engine", WAYS)
def test_selected_blocks_are_attended_as_their_mask(selected_heads, engine):
    generator = torch.Generator().manual_seed(0)
    for block_q, block_k in ((64, 64), (1, 7), (128, 16), (10, 100)):
        rows, columns = -(-N // block_q), -(-N // block_k)
        picked = torch.rand(2, selected_heads, rows, columns, generator=generator).argsort(-1)[..., :2]
        picked[..., 1].masked_fill_(picked[..., 1] % 2 == 0, -1)
        selection = BlockSelection(block_q, block_k, picked.int(), force=SlidingWindow(2), within=Causal())
        compare(engine, qkv(), lambda x, engine: block_sparse(*x, selection, return_lse=True, engine=engine))  # noqa: B023
        want = dense(*qkv(), mask=selection.dense(N, N, heads=4)).out
        torch.testing.assert_close(block_sparse(*qkv(), selection, engine="reference").out, want)


@pytest.mark.parametrize("engine", WAYS)
def test_selected_tokens_are_attended_as_their_mask(engine):
    picked = torch.rand(2, 2, N, N, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :5].int()
    valid = torch.stack((torch.arange(N) < 100, torch.arange(N) % 3 > 0))
    selection = TokenSelection(picked, within=Causal() & KeyValid().bind(key_valid=valid))
    compare(engine, qkv(), lambda x, engine: block_sparse(*x, selection, return_lse=True, engine=engine))


@pytest.mark.parametrize("reduce", ["disjoint", "mean", "lse"])
@pytest.mark.parametrize("selected_heads", [1, 2, 4])
def test_permuted_groups(reduce, selected_heads):
    q, k, v = qkv(40, 40)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(2, selected_heads, 40, generator=generator).argsort(-1)
    q_index = order[..., :36].unflatten(-1, (4, 9))
    if reduce != "disjoint":
        q_index = torch.cat((q_index, order[..., 5:14].unsqueeze(2)), 2)
    k_index = torch.rand(2, selected_heads, q_index.shape[2], 40, generator=generator).argsort(-1)[..., :12]
    k_index[..., 11] = -1
    selection = Permuted(q_index.int(), k_index.int(), Causal(), reduce)
    got = block_sparse(q, k, v, selection, engine="block_sparse:groups").out
    want = torch.zeros_like(got)
    for b in range(2):
        for h in range(4):
            s = h * selected_heads // 4
            parts = [[] for _ in range(40)]
            for group in range(q_index.shape[2]):
                for i in q_index[b, s, group].tolist():
                    keys = [j for j in k_index[b, s, group].tolist() if 0 <= j <= i]
                    scores = (q[b, h, i] * k[b, h // 2, keys]).sum(-1) / 8**0.5
                    parts[i].append((scores, v[b, h // 2, keys]))
            for i, found in enumerate(parts):
                if reduce == "lse":
                    scores, values = (
                        (torch.cat(x) for x in zip(*found, strict=True)) if found else (torch.zeros(0), None)
                    )
                    if len(scores):
                        want[b, h, i] = scores.softmax(0) @ values
                elif found:
                    rows = [s.softmax(0) @ x if len(s) else 0 for s, x in found]
                    want[b, h, i] = sum(rows) / len(rows)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, (q, k, v)), gradients(want, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(block_sparse(q, k, v, selection, engine="reference").out, want)
    if reduce == "disjoint":
        mask = selection.dense(40, 40, heads=4)
        whole = block_sparse(q, k, v, selection, return_lse=True)
        plain = dense(q, k, v, mask=mask, return_lse=True)
        torch.testing.assert_close(whole.out, plain.out)
        torch.testing.assert_close(whole.lse, plain.lse)


class Strange(Normaliser):
    def __call__(self, scores, mask, counts):
        return scores


BAD = torch.zeros(2, 4, 3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"pattern": Causal().layout(N, N - 1)}, ShapeError, r"for 150 queries and 149 keys, q and k have 150 and 150"),
        ({"pattern": Causal().layout(N, N, q_offset=3), "q_offset": 4}, OptionError, "q_offset=3, but q_offset=4"),
        ({"pattern": PerHead((Causal(), Full(), Full())).layout(N, N)}, ShapeError, "3 heads; q has 2 and 4"),
        ({"pattern": KeyValid().bind(key_valid=coin(3, N)).layout(N, N)}, ShapeError, "batch 3"),
        ({"pattern": BlockSelection(64, 64, BAD[:, :, :2])}, ShapeError, r"must be \(B, H, 3, K\)"),
        ({"pattern": BlockSelection(64, 64, BAD[:, :3])}, ShapeError, "3 heads"),
        ({"pattern": BlockSelection(64, 64, BAD[:, :1] + 3)}, ShapeError, "names"),
        ({"pattern": BlockSelection(64, 64, BAD)}, OptionError, "twice"),
        ({"pattern": TokenSelection(BAD)}, ShapeError, r"must be \(B, H, 150, K\)"),
        ({"pattern": Causal(), "engine": "block_sparse:sdpa"}, OptionError, "no engine 'block_sparse:sdpa'"),
        (
            {"score_mod": lambda s, b, h, i, j: s, "engine": "block_sparse:torch"},
            Unsupported,
            "a score_mod is a Python",
        ),
        ({"normaliser": Strange(), "engine": "block_sparse:torch"}, Unsupported, "Strange is unknown to the blocks"),
        ({"normaliser": Sigmoid(), "return_lse": True}, Unsupported, "Sigmoid has no log-sum-exp"),
        ({"normaliser": Sigmoid(), "sinks": torch.zeros(1, 4, 1)}, Unsupported, "no place for it"),
        (
            {
                "normaliser": L1(),
                "extra_k": torch.zeros(2, 2, 3, 8),
                "extra_v": torch.zeros(2, 2, 3, 6),
                "engine": "block_sparse:torch",
            },
            Unsupported,
            "L1 does not add up",
        ),
        ({"bias": torch.zeros(N, N - 1)}, ShapeError, "must broadcast"),
        ({"dropout_p": -0.1}, OptionError, r"in \[0, 1\)"),
        ({"pattern": Documents()}, OptionError, "needs data"),
        ({"engine": "block_sparse:flex"}, Unsupported, "FlexAttention is for CUDA"),
        ({"engine": "block_sparse:groups"}, Unsupported, "not a Permuted"),
    ],
)
def test_bad_calls_are_refused_with_the_reason(options, error, text):
    q, k, v = (x.detach().float() for x in qkv())
    pattern = options.pop("pattern", None)
    if error is None:
        assert block_sparse(q, k, v, pattern, **options).out.shape == (2, 4, N, 6)
        return
    with pytest.raises(error, match=text):
        block_sparse(q, k, v, pattern, **options)


@pytest.mark.parametrize(
    "shapes, text",
    [
        (((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 6)), "4 query heads cannot share 3 key heads"),
        (((2, 4, 5, 8), (2, 2, 5, 7), (2, 2, 5, 6)), "axis d"),
        (((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 4, 6)), "axis m"),
        (((4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 6)), "it must have 4"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(shapes, text):
    with pytest.raises(ShapeError, match=text):
        block_sparse(*(torch.zeros(s) for s in shapes), Causal())


def test_positions_beyond_int32_are_refused():
    q, k, v = (torch.empty(1, 1, 2**31, 1, device="meta") for _ in range(3))
    with pytest.raises(ShapeError, match=r"below 2\^31"):
        block_sparse(q, k, v, Causal(), engine="block_sparse:torch")


def test_vmap_over_what_must_be_shared_is_refused():
    q, k, v = (x.detach() for x in qkv(20, 20))
    table, places = torch.zeros(1, 4, 1, 40, dtype=torch.float64), torch.arange(20, dtype=torch.int32)
    with pytest.raises(Unsupported, match="cannot vmap over seeds, index rows or layouts"):
        torch.func.vmap(
            lambda rows: block_sparse(q, k, v, indexed=[Indexed(table, rows, places)], engine="block_sparse:torch").out
        )(places.expand(2, -1) + 20)


def test_the_first_that_can_run_is_chosen_and_the_others_say_why_not():
    q, k, v = (x.detach().float() for x in qkv())
    with listen() as verdicts:
        block_sparse(q, k, v, Causal(), normaliser=Exp())
    said = {v.name: v for v in verdicts}
    assert said["block_sparse:torch"].chosen
    assert "no kernel for the normaliser Exp" in " ".join(said["block_sparse:native"].reasons) or native.missing()
