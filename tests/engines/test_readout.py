from __future__ import annotations

import pytest
import torch

from regard import (
    L1,
    Causal,
    Explicit,
    OptionError,
    ReLUOverN,
    ShapeError,
    Sigmoid,
    Sinks,
    SlidingWindow,
    Softmax,
    Unsupported,
)
from regard.engines import native
from regard.engines.block_sparse import block_sparse
from regard.engines.dense import dense
from regard.engines.readout import Top, readout
from regard.patterns.selection import BlockSelection
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import Grouped
from tests.oracles import coin, normal

N, M = 150, 170
WHATS = {
    "rows": {"rows": [3, 149, 77]},
    "heads": {"heads": [2, 0]},
    "column_sums": {},
    "column_sums of rows": {"rows": torch.arange(100, 150)},
    "entropy": {},
    "sink_mass": {"count": 5},
    "block_max": {"block": (16, 32)},
    "block_sum": {"block": (64, 64)},
    "top_k": {"count": 7},
    "top_k of more than there are": {"count": 200},
}
PATTERNS = {
    "all": None,
    "window": Causal() & SlidingWindow(40),
    "sinks": Sinks(3),
    "explicit": Explicit().bind(mask=coin(2, 1, N, M, p=0.05)),
}


def qk(dtype=torch.float64):
    return normal((2, 4, N, 8), (2, 2, M, 8), dtype=dtype)


def expected(name, weights, mask, options):
    """The answers from the whole table."""
    what = name.partition(" ")[0]
    rows = options.get("rows", slice(None))
    tall, wide = options.get("block", (1, 1))
    count = options.get("count", 1)
    if what == "rows":
        return weights[:, :, rows]
    if what == "heads":
        return weights[:, options["heads"]]
    if what == "column_sums":
        return weights[:, :, rows].sum(2)
    if what == "entropy":
        return torch.stack([-(r[r > 0] * r[r > 0].log()).sum() for r in weights.reshape(-1, M)]).view(2, 4, N)
    if what == "sink_mass":
        return weights[..., :count].sum(-1)
    if what == "top_k":
        return weights.sort(-1, descending=True).values[..., :count]
    blocks = [[weights[:, :, i : i + tall, j : j + wide] for j in range(0, M, wide)] for i in range(0, N, tall)]
    reduce = (lambda x: x.amax((2, 3))) if what == "block_max" else (lambda x: x.sum((2, 3)))
    return torch.stack([torch.stack([reduce(x) for x in line], -1) for line in blocks], -2)


@pytest.mark.parametrize("engine", ["readout:torch", "readout:reference"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", WHATS)
def test_readouts_are_those_of_the_whole_table(name, pattern, engine):
    q, k = qk()
    got = dense(q, k, k, PATTERNS[pattern], return_weights=True, return_lse=True)
    mask = torch.ones(N, M, dtype=torch.bool) if PATTERNS[pattern] is None else PATTERNS[pattern].dense(N, M)
    want = expected(name, got.weights, mask, WHATS[name])
    for lse in (None, got.lse):
        found = readout(q, k, lse, PATTERNS[pattern], what=name.partition(" ")[0], engine=engine, **WHATS[name])
        if isinstance(found, Top):
            keys, found = found.keys, found.weights
            assert ((keys >= 0).sum(-1) == mask.expand(2, 4, N, M).sum(-1).clamp(max=keys.shape[-1])).all()
            named = got.weights.gather(-1, keys.clamp(min=0)).masked_fill(keys < 0, 0.0)
            torch.testing.assert_close(named, found)
            assert all(
                len(set(r)) == len(r)
                for r in [[x for x in row if x >= 0] for row in keys.view(-1, keys.shape[-1]).tolist()]
            )
            found, want_here = found[..., : want.shape[-1]], want
        else:
            want_here = want
        torch.testing.assert_close(found, want_here)


@pytest.mark.skipif(native.missing() is not None, reason="no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normaliser", [Softmax(), Sigmoid(-1.0), L1(), ReLUOverN()], ids=repr)
@pytest.mark.parametrize("name", WHATS)
def test_the_native_kernels_read_the_same(name, normaliser, dtype):
    q, k = qk(dtype)
    options = {"bias": normal((1, 4, 1, M), seed=3, dtype=dtype)[0], "q_offset": 5, "normaliser": normaliser}
    for pattern in (Causal() & SlidingWindow(60), PATTERNS["sinks"]):
        read = lambda engine, p=pattern: readout(  # noqa: E731
            q, k, None, p, what=name.partition(" ")[0], engine=engine, **WHATS[name], **options
        )
        no_entropy = name == "entropy" and type(normaliser) not in (Softmax, L1)
        if name in ("column_sums of rows", "block_max") or no_entropy:
            with pytest.raises(Unsupported, match=r"all rows|64 x 64|no entropy"):
                read("readout:native")
            return
        found = read("readout:native")
        want = read("readout:torch")
        if isinstance(found, Top):
            assert ((found.keys < 0) == (want.keys < 0)).all()
            found, want = found.weights, want.weights
        # in half precision the kernels take an exponential that is good to 1e-4
        tolerance = 2e-5 if dtype == torch.float32 else 2e-4
        torch.testing.assert_close(found, want, atol=tolerance, rtol=2e-4)


@pytest.mark.parametrize("normaliser", [Sigmoid(-1.0), L1(), ReLUOverN(), Grouped(7)], ids=repr)
@pytest.mark.parametrize("name", WHATS)
def test_readouts_of_other_normalisers(name, normaliser):
    q, k = qk()
    pattern = Causal() & SlidingWindow(40)
    weights = dense(q, k, k, pattern, normaliser=normaliser, return_weights=True).weights
    want = expected(name, weights, pattern.dense(N, M), WHATS[name])
    found = readout(
        q, k, None, pattern, what=name.partition(" ")[0], normaliser=normaliser, engine="readout:torch", **WHATS[name]
    )
    found = found.weights[..., : want.shape[-1]] if isinstance(found, Top) else found
    torch.testing.assert_close(found, want)


def test_biases_offsets_layouts_and_selections_count():
    q, k = qk()
    bias, table = normal((1, 4, 1, M), (1, 4, 1, N + M), seed=3)
    bias = bias.masked_fill(coin(1, 4, 1, M, p=0.1), float("-inf"))
    indexed = [Indexed(table, torch.arange(M) + N, torch.arange(N))]
    pattern = Causal() & SlidingWindow(60)
    options = {"bias": bias, "indexed": indexed, "scale": 0.7, "q_offset": 20}
    want = dense(q, k, k, pattern, return_weights=True, **options).weights.sum(2)
    for p in (pattern, pattern.layout(N, M, q_offset=20)):
        torch.testing.assert_close(readout(q, k, None, p, what="column_sums", **options), want)
    selection = BlockSelection(64, 64, torch.tensor([0, 2]).expand(1, 1, 3, 2).int(), within=Causal())
    want = dense(q, k, k, mask=selection.dense(N, M, heads=4), return_weights=True).weights.sum(2)
    torch.testing.assert_close(readout(q, k, None, selection, what="column_sums"), want)


def test_the_log_sum_exp_brings_in_sinks_and_extra_keys():
    q, k = qk()
    sinks, more = normal((1, 4, 1), (2, 2, 9, 8), seed=4)
    options = {"sinks": sinks, "extra_k": more, "extra_v": more}
    lse = block_sparse(q, k, k, Causal(), return_lse=True, **options).lse
    want = dense(q, k, k, Causal(), return_weights=True, **options).weights
    torch.testing.assert_close(readout(q, k, lse, Causal(), what="heads", heads=range(4)), want)


def test_rows_of_nothing_weigh_nothing():
    q, k = qk()
    lse = block_sparse(q, k, k, Causal(strict=True), return_lse=True).lse
    for given in (None, lse):
        assert (readout(q, k, given, Causal(strict=True), what="rows", rows=[0]) == 0).all()
        assert (readout(q, k, given, Causal(strict=True), what="entropy")[:, :, 0] == 0).all()


def test_half_precision_is_read_in_float32_and_nothing_has_a_gradient():
    q, k = (x.bfloat16().requires_grad_() for x in qk())
    found = readout(q, k, what="entropy")
    assert found.dtype == torch.float32 and not found.requires_grad
    exact = readout(q.detach().float(), k.detach().float(), what="entropy", engine="reference")
    for engine, tolerance in (("readout:torch", 1e-5), (None, 2e-4)):
        found = readout(q, k, what="entropy", engine=engine)
        torch.testing.assert_close(found, exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"what": "columns"}, OptionError, "no readout 'columns'"),
        ({"what": "rows"}, OptionError, "needs rows="),
        ({"what": "rows", "rows": [150]}, OptionError, "0 to 149"),
        ({"what": "rows", "rows": [2, 2]}, OptionError, "twice"),
        ({"what": "entropy", "rows": [2]}, OptionError, "no meaning"),
        ({"what": "entropy", "lse": torch.zeros(2, 4, 3)}, ShapeError, "lse is"),
        ({"what": "entropy", "lse": torch.zeros(2, 4, N), "normaliser": L1()}, OptionError, "leave lse out"),
        ({"what": "top_k", "count": 0}, OptionError, "at least 1"),
        ({"what": "block_max", "block": (0, 64)}, OptionError, "at least 1"),
        (
            {"what": "block_max", "block": (32, 32), "pattern": Causal().layout(N, M)},
            OptionError,
            "the layout has blocks of 64",
        ),
    ],
)
def test_bad_calls_are_refused_with_the_reason(options, error, text):
    with pytest.raises(error, match=text):
        readout(*qk(), engine="readout:torch", **options)
