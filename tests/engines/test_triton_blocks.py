"""Block-sparse attention in Triton: on a GPU if there is one, otherwise in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

from regard import (
    L1,
    Causal,
    Documents,
    Explicit,
    Full,
    KeyValid,
    Linear,
    ReLUOverN,
    Sharpen,
    Sigmoid,
    Sinks,
    SlidingWindow,
    Softmax,
    Unsupported,
)
from regard.contract.dispatch import listen
from regard.engines import block_ops
from regard.engines import triton as home
from regard.engines.block_sparse import IMPLEMENTATIONS, block_sparse
from regard.engines.dense import prepare
from regard.engines.triton import blocks
from regard.patterns import Empty
from regard.patterns.algebra import PerHead
from regard.patterns.selection import BlockSelection, TokenSelection
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import Exp
from tests.engines.triton_device import DEVICE, needs_triton, true_bfloat16
from tests.oracles import coin, normal

__all__ = ["true_bfloat16"]
TRITON = "block_sparse:triton"
N = 100
PATTERNS = {
    "all": None,
    "nothing": Empty(),
    "causal": Causal(),
    "strict": Causal(strict=True),
    "window and sinks": Causal() & SlidingWindow(20) | Sinks(3),
    "per head": PerHead((Causal(), SlidingWindow(3), Full(), Sinks(5))),
    "documents": Causal() & Documents().bind(doc=(torch.arange(N) // 41)[None]),
    "padding": KeyValid(rows=True).bind(key_valid=torch.stack((torch.arange(N) < 50, torch.arange(N) >= 70))),
    "explicit": Explicit().bind(mask=coin(2, 4, N, N, p=0.02)),
}
NORMALISERS = [Softmax(), Sigmoid(-1.0), L1(), L1("exp"), L1("relu"), ReLUOverN(), Linear(), Exp()]
# float32 against float64, of the largest value
NEAR = 1e-5


def qkv(n=N, m=N, heads=4, groups=2, d=8, e=6, dtype=torch.float32):
    return [x.to(DEVICE) for x in normal((2, heads, n, d), (2, groups, m, d), (2, groups, m, e), dtype=dtype)]


def gradients(out, lse, inputs):
    total = (out * normal(tuple(out.shape), seed=9, dtype=out.dtype)[0].to(out.device)).sum()
    if lse is not None:
        seen = lse.masked_fill(torch.isneginf(lse), 0.0)
        total = total + (seen * normal(tuple(lse.shape), seed=8, dtype=lse.dtype)[0].to(lse.device)).sum()
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def compare(inputs, run, limit=NEAR):
    """`run` by the kernels against the definition in float64, with all gradients, of the largest value of each."""
    results = []
    for engine, kind in ((TRITON, torch.float32), ("block_sparse:reference", torch.float64)):
        given = [x.detach().to(kind).to(DEVICE).requires_grad_() for x in inputs]
        got = run(given, engine)
        results.append([got.out, *([] if got.lse is None else [got.lse]), *gradients(got.out, got.lse, given)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(torch.isinf(got), torch.isinf(want))
        got, want = (x.masked_fill(torch.isinf(x), 0.0).double() for x in (got, want))
        assert (got - want).abs().max() <= limit * want.abs().max().clamp(min=1.0)
    return results[0]


@needs_triton
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("normaliser", [Softmax(), ReLUOverN()], ids=repr)
def test_every_pattern_is_attended_as_by_the_definition(name, normaliser):
    softmax = isinstance(normaliser, Softmax)
    compare(
        qkv(),
        lambda x, engine: block_sparse(
            *x, PATTERNS[name], normaliser=normaliser, return_lse=softmax, engine=engine
        ),
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4, "seed": 2**40 + 17, "q_offset": 3}], ids=["", "dropout"])
@pytest.mark.parametrize("normaliser", NORMALISERS, ids=repr)
def test_every_normaliser_with_and_without_dropout(normaliser, options):
    def run(x, engine):
        return block_sparse(
            *x, Causal() & SlidingWindow(50), normaliser=normaliser, scale=0.6, engine=engine, **options
        )  # fmt: skip

    compare(qkv(), run)


@needs_triton
def test_softplus_keeps_its_digits_where_scores_are_far_below_zero():
    q, k, v = qkv()
    bias = torch.full((1,), -30.0, device=DEVICE)
    compare([q, k, v], lambda x, e: block_sparse(*x, bias=bias.to(x[0].dtype), normaliser=L1(), scale=0.3, engine=e))


@needs_triton
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 1), (6, 3), (1, 1)])
def test_grouped_heads_share_keys_and_values(heads, groups):
    compare(
        qkv(heads=heads, groups=groups),
        lambda x, engine: block_sparse(*x, Causal(), normaliser=Sigmoid(), engine=engine),
    )


@needs_triton
@pytest.mark.parametrize("n, m, q_offset", [(1, 1, 0), (1, 70, 69), (5, 150, 100), (130, 64, 0), (64, 128, 7)])
@pytest.mark.parametrize("d, e", [(16, 16), (33, 70)])
def test_ragged_sizes_widths_and_offsets(n, m, q_offset, d, e):
    compare(
        qkv(n, m, d=d, e=e),
        lambda x, engine: block_sparse(
            *x, Causal() & SlidingWindow(40) | Sinks(2), normaliser=L1(), q_offset=q_offset, engine=engine
        ),
    )


@needs_triton
@pytest.mark.parametrize("shape", [(N,), (2, 1, 1, N), (1, 4, N, 1), (2, 1, 1, 1), (N, N), (1, 4, N, N), (2, 4, N, N)])
@pytest.mark.parametrize("normaliser", [Softmax(), Sigmoid(-1.0), ReLUOverN()], ids=repr)
def test_biases_of_every_broadcastable_shape(shape, normaliser):
    bias = normal(shape, seed=3)[0].masked_fill(~coin(*shape, p=0.9, seed=1), float("-inf"))
    compare(
        [*qkv(), bias],
        lambda x, engine: block_sparse(*x[:3], Causal(), bias=x[3], normaliser=normaliser, engine=engine),
    )


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1), (2, 4, N)])
def test_sinks_also_in_rows_without_keys(shape):
    sinks = normal(shape, seed=5)[0]
    compare(
        [*qkv(), sinks],
        lambda x, engine: block_sparse(
            *x[:3], Causal(strict=True) & SlidingWindow(30), sinks=x[3], return_lse=True, engine=engine
        ),
    )


@needs_triton
def test_a_sink_of_minus_infinity_is_none():
    q, k, v = qkv()
    sinks = torch.full((1, 1, 1), float("-inf"), device=DEVICE)
    got = block_sparse(q, k, v, Causal(strict=True), sinks=sinks, engine=TRITON).out
    assert torch.equal(got, block_sparse(q, k, v, Causal(strict=True), engine=TRITON).out)


@needs_triton
@pytest.mark.parametrize("normaliser", [Softmax(), Sigmoid(-1.0)], ids=repr)
def test_extra_keys_stand_in_the_same_normalisation(normaliser):
    extra = normal((2, 2, 30, 8), (2, 2, 30, 6), seed=4)

    def run(x, engine):
        return block_sparse(
            *x[:3], Causal(strict=True), extra_k=x[3], extra_v=x[4], normaliser=normaliser, dropout_p=0.3, seed=11,
            engine=engine,
        )  # fmt: skip

    compare([*qkv(), *extra], run)


@needs_triton
@pytest.mark.parametrize("block", [(16, 16), (32, 128), (128, 32), (5, 64), (70, 7)])
def test_the_size_of_the_blocks_changes_nothing(block):
    layout = (Causal() & SlidingWindow(37) | Sinks(2)).layout(70, 70, block=block)
    compare(
        qkv(70, 70, heads=2, groups=1),
        lambda x, engine: block_sparse(
            *x, layout.to(x[0].device), normaliser=L1(), dropout_p=0.2, seed=3, engine=engine
        ),
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("kind", ["blocks", "tokens"])
def test_selections_of_a_router(kind):
    if kind == "blocks":
        indices = torch.stack((torch.tensor([0, -1]), torch.tensor([1, 0])))[None, None].expand(2, 4, 2, 2)
        selection = BlockSelection(64, 64, indices.to(DEVICE), within=Causal())
    else:
        indices = torch.arange(N)[:, None] * torch.tensor([1, 2, 3]) % N
        indices = indices.masked_fill(torch.arange(N)[:, None] == torch.tensor([0, 50, 50]), -1)
        indices[0] = -1
        indices[50, 2] = -1
        selection = TokenSelection(indices[None, None].to(DEVICE), force=SlidingWindow(2), within=Causal())
    compare(qkv(), lambda x, engine: block_sparse(*x, selection, normaliser=Sigmoid(), engine=engine))


@needs_triton
@pytest.mark.parametrize("normaliser", [Softmax(), L1("exp"), Linear()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype, normaliser, true_bfloat16):
    q, k, v = (x.detach().requires_grad_() for x in qkv(32, 250, 2, 1, d=32, e=32, dtype=dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    # straight to the operators: a bfloat16 is refused in the interpreter
    parcel = block_ops.pack(
        "triton", SlidingWindow(200), bias=None, indexed=(), sinks=None, normaliser=normaliser, scale=None, q_offset=0,
        dropout_p=0.0, seed=None,
    )  # fmt: skip
    out, _ = block_ops.attend(q, k, v, parcel)
    want = block_sparse(*exact, SlidingWindow(200), normaliser=normaliser, engine="reference").out
    assert out.dtype == dtype
    # a few roundings of the factors of every product; a sum of 200 terms in bfloat16 would be off by 1e-1
    limit = 4 * torch.finfo(dtype).eps
    pairs = zip((out, *gradients(out, None, (q, k, v))), (want, *gradients(want, None, exact)), strict=True)
    for got, wanted in pairs:
        assert (got.double() - wanted).norm() <= limit * wanted.norm()


@needs_triton
def test_weights_beyond_float16_are_mixed():
    q, k, v = (x.detach() for x in qkv(20, 20, dtype=torch.float16))
    v = v / 1000
    q = q.masked_fill(torch.ones_like(q, dtype=torch.bool), 4.0)
    k = k.masked_fill(torch.ones_like(k, dtype=torch.bool), 4.0)
    # every score is 12, and exp(12) = 163 thousand
    got = block_sparse(q, k, v, normaliser=L1("exp"), scale=12 / 128, engine=TRITON).out
    want = block_sparse(q.double(), k.double(), v.double(), normaliser=L1("exp"), scale=12 / 128, engine="reference")
    torch.testing.assert_close(got.double(), want.out, atol=2e-6, rtol=2e-3)


@needs_triton
def test_tensors_are_read_in_place_whatever_their_strides():
    q, k, v = qkv()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    results = []
    for given in ((q, k, v), turned, columns):
        leaves = [x.detach().requires_grad_() for x in given]
        out = block_sparse(*leaves, Causal(), normaliser=Sigmoid(), engine=TRITON).out
        # a gradient that is one number everywhere has no strides
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_triton
def test_the_same_bits_in_every_run():
    bias = normal((N, N), dtype=torch.float32, seed=3)[0]
    first, second = (
        compare([*qkv(), bias], lambda x, e: block_sparse(*x[:3], bias=x[3], normaliser=L1(), engine=e))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@needs_triton
def test_a_compiled_call_goes_through_the_operators():
    q, k, v = qkv(40, 40)

    def run(q, k, v):
        return block_sparse(q, k, v, Causal(), normaliser=Sigmoid(), engine=TRITON).out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for way in (run, compiled):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = way(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    assert all(map(torch.equal, *results))


@needs_triton
def test_too_little_shared_memory_is_said():
    from triton.runtime.errors import OutOfResources

    class Greedy:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                raise OutOfResources(294912, 166912, "shared memory")

            return launch

    with pytest.raises(Unsupported, match=r"294912.*166912.*smaller blocks"):
        home.run(torch.zeros(1), Greedy(), 1)


@needs_triton
@pytest.mark.parametrize(
    "change, text",
    [
        ({"normaliser": Sharpen(L1(), 3.0)}, "no kernel for the normaliser Sharpen"),
        ({"q": torch.zeros(2, 4, N, 300), "k": torch.zeros(2, 2, N, 300)}, "width of q and k is 300, more than 256"),
        ({"v": torch.zeros(2, 2, N, 300)}, "width of v is 300"),
        ({"pattern": Causal().layout(N, N, block=(256, 64))}, "blocks of 256 x 64"),
        ({"q": torch.zeros(2, 4, N, 8).double(), "k": torch.zeros(2, 2, N, 8).double(),
          "v": torch.zeros(2, 2, N, 6).double()}, "not all float32"),
        ({"indexed": [Indexed(torch.zeros(1, 1, 1, 2 * N), torch.arange(N) + N, torch.arange(N))]}, "atomic"),
        ({"score_mod": lambda s, b, h, i, j: s}, "score_mod"),
    ],
)  # fmt: skip
def test_what_it_cannot_run_is_refused_with_the_reason(change, text):
    q, k, v = qkv()
    given = {"q": q, "k": k, "v": v, "pattern": Causal(), **change}
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    with pytest.raises(Unsupported, match=text):
        block_sparse(**given, engine=TRITON)


def test_it_says_why_it_does_not_run_here(monkeypatch):
    q, k, v = normal((1, 2, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), dtype=torch.float32)
    monkeypatch.setattr(home, "_interpreted", lambda: False)
    monkeypatch.setattr(home, "missing", lambda: None)
    with pytest.raises(Unsupported, match=r"on cpu, not on CUDA .TRITON_INTERPRET=1"):
        block_sparse(q, k, v, engine=TRITON)
    monkeypatch.undo()
    monkeypatch.setattr(home, "installed", lambda name: False)
    with pytest.raises(Unsupported, match=r"triton is not installed: pip install 'regard\[triton\]'"):
        block_sparse(q, k, v, engine=TRITON)
    monkeypatch.setattr(home, "_interpreted", lambda: True)
    monkeypatch.setattr(home, "missing", lambda: None)
    half = q.bfloat16()
    assert blocks.cannot(prepare(half, half, half)) == ["Triton's interpreter cannot multiply bfloat16"]


def test_the_choice_says_why_and_never_falls_on_it_unasked():
    q, k, v = normal((1, 2, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), dtype=torch.float32)
    with listen() as verdicts:
        block_sparse(q, k, v, Causal(), normaliser=Sigmoid())
    (verdict,) = [v for v in verdicts if v.name == TRITON]
    assert not verdict.chosen
    names = [i.name for i in IMPLEMENTATIONS]
    assert names.index("block_sparse:torch") < names.index(TRITON)
