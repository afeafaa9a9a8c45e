"""Numbers about the weights against the whole table."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.engines import native
from regard.engines.native import block_sparse
from regard.engines.native.readout import WHAT, readout
from regard.patterns import Causal
from regard.primitives.normalisers import L1, Normaliser, ReLUOverN, Sigmoid, Softmax
from tests.engines.test_native_block_sparse import masks
from tests.oracles import block_layout

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no native kernels: {native.missing()}")
ISAS = native.isas() if native.missing() is None else ()


@pytest.fixture(autouse=True)
def poisoned():
    native.poison(True)
    yield
    native.poison(False)


def table(q: Tensor, k: Tensor, mask: Tensor, normaliser: Normaliser, bias: Tensor | None) -> Tensor:
    share = q.shape[1] // k.shape[1]
    s = (q.double() @ k.double().repeat_interleave(share, 1).mT) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias.double()
    mask = mask.expand(s.shape)
    return normaliser(s, mask, mask.sum(-1))


def blocks(w: Tensor, reduce: str) -> Tensor:
    n, m = w.shape[-2:]
    padded = torch.nn.functional.pad(w, (0, -m % 64, 0, -n % 64)).unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64))
    return padded.amax((-3, -1)) if reduce == "max" else padded.sum((-3, -1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normaliser", [Softmax(), L1("softplus"), Sigmoid(-1.0), ReLUOverN()], ids=repr)
def test_equals_the_whole_table(isa, dtype, normaliser):
    rng = random.Random(f"{isa} {dtype} {normaliser}")
    for _ in range(4):
        torch.manual_seed(rng.randrange(2**31))
        batch, groups, share = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 2)
        heads, n, m, d = groups * share, rng.randint(1, 200), rng.randint(1, 200), rng.choice((16, 20, 64))
        q, k = torch.randn(batch, heads, n, d).to(dtype), torch.randn(batch, groups, m, d).to(dtype)
        mask = masks(rng, batch, heads, n, m)
        bias = torch.randn(heads, 1, m) if rng.random() < 0.5 else None
        w = table(q, k, mask, normaliser, bias)
        layout = block_layout(mask)
        options = {"normaliser": normaliser, "bias": bias, "isa": isa}
        _, lse = block_sparse.forward(q, k, k, layout, **options)
        picked = [rng.randrange(-heads, heads) for _ in range(2)]
        rows = [rng.randrange(n) for _ in range(5)]
        first = rng.randint(0, m)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-4

        def read(what: str, _=(q, k, lse, layout, options, picked), **more):
            return readout(q, k, lse, layout, what, heads=picked, **options, **more)  # noqa: B023

        chosen = w[:, picked]
        wanted = {
            "heads": chosen, "column_sum": chosen.sum(2), "sink_mass": chosen[..., :first].sum(-1),
            "block_max": blocks(chosen, "max"), "block_sum": blocks(chosen, "sum"), "rows": chosen[:, :, rows],
        }  # fmt: skip
        if not isinstance(normaliser, (Sigmoid, ReLUOverN)):
            wanted["entropy"] = -torch.xlogy(chosen, chosen).sum(-1)
        for what, value in wanted.items():
            more = {"rows": {"rows": rows}, "sink_mass": {"first": first}}.get(what, {})
            found = read(what, **more)
            assert found.shape == value.shape and found.dtype == torch.float32, what
            assert (found - value).abs().max() <= tolerance * max(1.0, value.abs().max().item()), what
        top = rng.choice((1, 3, m, m + 2))
        weights, keys = read("top_k", top=top)
        seen = mask.expand(w.shape)[:, picked]
        for place in torch.cartesian_prod(torch.arange(batch), torch.arange(2), torch.tensor(rows)).tolist():
            some = int(seen[tuple(place)].sum())
            row, at = weights[tuple(place)], keys[tuple(place)]
            assert (at[some:] == -1).all() and (row[some:] == 0).all()
            at = at[: min(some, top)]
            assert (at >= 0).all() and len(set(at.tolist())) == len(at) and seen[tuple(place)][at].all()
            best = chosen[tuple(place)][seen[tuple(place)]].sort(descending=True).values[: len(at)]
            assert (row[: len(at)] - best).abs().max() <= tolerance if len(at) else True
            assert (chosen[tuple(place)][at] - row[: len(at)]).abs().max() <= tolerance if len(at) else True


def test_all_heads_are_the_default_and_threads_do_not_matter():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16)
    layout = Causal().layout(150, 150)
    _, lse = block_sparse.forward(q, k, k, layout)
    for what in WHAT:
        more = {"rows": {"rows": torch.tensor([3, 149, 3])}, "top_k": {"top": 4}}.get(what, {})
        one = readout(q, k, lse, layout, what, **more)
        torch.set_num_threads(2)
        two = readout(q, k, lse, layout, what, **more)
        torch.set_num_threads(1)
        for a, b in zip(one, two, strict=True) if isinstance(one, tuple) else ((one, two),):
            assert torch.equal(a, b) and a.shape[:2] == (2, 4), what


def test_what_is_refused():
    q = torch.randn(1, 2, 70, 16)
    layout = Causal().layout(70, 70)
    _, lse = block_sparse.forward(q, q, q, layout)
    with pytest.raises(OptionError, match="knows no 'mean'; it knows rows, heads"):
        readout(q, q, lse, layout, "mean")
    with pytest.raises(OptionError, match='rows= goes with what="rows"'):
        readout(q, q, lse, layout, "rows")
    with pytest.raises(OptionError, match=r"heads are \[2\]; there are 2"):
        readout(q, q, lse, layout, "entropy", heads=[2])
    with pytest.raises(OptionError, match="Sigmoid are no distribution"):
        readout(q, q, None, layout, "entropy", normaliser=Sigmoid())
    with pytest.raises(OptionError, match="top >= 1, not 0"):
        readout(q, q, lse, layout, "top_k", top=0)
    with pytest.raises(ShapeError, match="lse is None; Softmax needs"):
        readout(q, q, None, layout, "entropy")


def test_memory_is_of_the_result_alone():
    q = torch.randn(1, 1, 8192, 16)
    layout = Causal().layout(8192, 8192)
    _, lse = block_sparse.forward(q, q, q, layout)
    readout(q, q, lse, layout, "column_sum")
    before = peak()
    readout(q, q, lse, layout, "column_sum")
    readout(q, q, lse, layout, "entropy")
    readout(q, q, lse, layout, "top_k", top=4)
    # the table would be 256 MiB
    assert peak() - before < 16 * 2**20


def peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
