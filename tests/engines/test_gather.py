from __future__ import annotations

import pytest
import torch

from regard import (
    L1,
    Causal,
    KeyValid,
    OptionError,
    ShapeError,
    Sharpen,
    Sigmoid,
    Sinks,
    SlidingWindow,
    Softmax,
    Unsupported,
)
from regard.engines import chunks
from regard.engines.block_sparse import block_sparse
from regard.engines.gather import gather
from regard.patterns.selection import BlockSelection, TokenSelection
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import Grouped
from tests.engines.test_block_sparse import gradients
from tests.oracles import normal

N, M = 37, 53


def qkv(dtype=torch.float64, d=8):
    return [x.requires_grad_() for x in normal((2, 4, N, d), (2, 2, M, d), (2, 2, M, 6), dtype=dtype)]


def listed(heads=2, count=6, seed=0):
    """Random keys for every query, about a third of the slots empty."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(2, heads, N, M, generator=generator).argsort(-1)[..., :count]
    return keys.masked_fill(torch.rand(keys.shape, generator=generator) < 0.3, -1).int()


VALID = torch.stack((torch.arange(M) < 40, torch.arange(M) % 3 > 0))
LIMITS = {
    "free": {},
    "causal": {"within": Causal()},
    "padding": {"within": Causal() & KeyValid().bind(key_valid=VALID)},
    "forced": {"force": SlidingWindow(3)},
    "forced within": {"force": Sinks(2) | SlidingWindow(2), "within": Causal()},
}


def same(first, second, inputs):
    for a, b in zip(
        (first.out, *gradients(first.out, inputs, first.lse)),
        (second.out, *gradients(second.out, inputs, second.lse)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    if first.lse is not None:
        torch.testing.assert_close(first.lse, second.lse)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gathered_keys_are_attended_as_the_mask_and_as_blocks(name, heads):
    q, k, v = qkv()
    selection = TokenSelection(listed(heads), **LIMITS[name])
    options = {"q_offset": 9, "return_lse": True}
    got = gather(q, k, v, selection, engine="gather:torch", **options)
    for engine in ("block_sparse:reference", "block_sparse:torch"):
        same(got, block_sparse(q, k, v, selection, engine=engine, **options), (q, k, v))
    same(got, gather(q, k, v, selection, engine="reference", **options), (q, k, v))


@pytest.mark.parametrize("normaliser", [Softmax(), Sigmoid(-1.0), L1(), Grouped(5), Sharpen(Softmax(), 2.0)], ids=repr)
def test_every_option(normaliser):
    softmax = isinstance(normaliser, Softmax)
    q, k, v = qkv()
    bias, sinks, table, more_k, more_v = (
        x.requires_grad_()
        for x in normal((2, 4, 1, M), (1, 4, 1), (1, 4, 1, N + M), (2, 2, 3, 8), (2, 2, 3, 6), seed=3)
    )
    options = {
        "bias": bias, "indexed": [Indexed(table, torch.arange(M) + N, torch.arange(N))], "scale": 0.4,
        "normaliser": normaliser, "dropout_p": 0.3, "seed": 6, "return_lse": softmax,
    }  # fmt: skip
    inputs = [q, k, v, bias, table]
    if softmax:
        options |= {"sinks": sinks}
        inputs += [sinks]
    if type(normaliser) in (Softmax, Sigmoid):
        options |= {"extra_k": more_k, "extra_v": more_v}
        inputs += [more_k, more_v]
    selection = TokenSelection(listed(), within=Causal())
    runs = [gather(q, k, v, selection, engine=e, **options) for e in ("gather:torch", "reference")]
    same(*runs, inputs)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_bias_of_the_listed_keys_has_a_gradient(heads):
    q, k, v = qkv()
    keys = listed(heads)
    added = normal(tuple(keys.shape), seed=4)[0].requires_grad_()
    selection = TokenSelection(keys, added, within=Causal())
    runs = [gather(q, k, v, selection, return_lse=True, engine=e) for e in ("gather:torch", "reference")]
    same(*runs, (q, k, v, added))
    (grad,) = torch.autograd.grad(runs[0].out.sum(), added, retain_graph=True)
    assert (grad[keys < 0] == 0).all() and grad.abs().max() > 0
    with pytest.raises(Unsupported, match="gather takes it"):
        block_sparse(q, k, v, selection, engine="block_sparse:torch")


def test_the_budget_changes_nothing(monkeypatch):
    q, k, v = qkv()
    selection = TokenSelection(listed(), within=Causal())
    whole = gather(q, k, v, selection, dropout_p=0.2, seed=1, return_lse=True, engine="gather:torch")
    grads = gradients(whole.out, (q, k, v), whole.lse)
    monkeypatch.setattr(chunks, "GATHERED", 100)
    got = gather(q, k, v, selection, dropout_p=0.2, seed=1, return_lse=True, engine="gather:torch")
    torch.testing.assert_close(got.out, whole.out)
    for a, b in zip(gradients(got.out, (q, k, v), got.lse), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_order_of_the_slots_means_nothing():
    q, k, v = qkv()
    keys = listed()
    out = gather(q, k, v, TokenSelection(keys), normaliser=Grouped(5), engine="gather:torch").out
    shuffled = keys[..., torch.randperm(keys.shape[-1])]
    torch.testing.assert_close(
        gather(q, k, v, TokenSelection(shuffled), normaliser=Grouped(5), engine="gather:torch").out, out
    )


def test_queries_without_keys_are_exactly_zero():
    q, k, v = qkv()
    keys = listed()
    keys[:, :, 4] = -1
    got = gather(q, k, v, TokenSelection(keys), return_lse=True, engine="gather:torch")
    grads = torch.autograd.grad(got.out.sum(), (q, k, v))
    assert (got.out[:, :, 4] == 0).all() and torch.isneginf(got.lse[:, :, 4]).all() and (grads[0][:, :, 4] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    none = gather(q, k, v, TokenSelection(keys[..., :0]), return_lse=True, engine="gather:torch")
    assert (none.out == 0).all() and torch.isneginf(none.lse).all()


def test_gradients_against_finite_differences():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 5, 2), (1, 1, 7, 2), (1, 1, 7, 2)))
    keys = torch.rand(1, 2, 5, 7, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :3].int()
    added = normal((1, 2, 5, 3), seed=2)[0].requires_grad_()

    def read(q, k, v, added):
        got = gather(q, k, v, TokenSelection(keys, added), return_lse=True, engine="gather:torch")
        return got.out, got.lse

    assert torch.autograd.gradcheck(read, (q, k, v, added))


def test_gradients_are_the_same_bits_every_time():
    q, k, v = qkv(torch.float32)
    selection = TokenSelection(listed())
    first = gradients(gather(q, k, v, selection, engine="gather:torch").out, (q, k, v))
    again = gradients(gather(q, k, v, selection, engine="gather:torch").out, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_half_precision_gradients_are_added_up_in_float32():
    q, k, v = (torch.ones(1, 1, length, 4, dtype=torch.bfloat16, requires_grad=True) for length in (3000, 2, 2))
    keys = torch.zeros(1, 1, 3000, 1, dtype=torch.int32)
    out = gather(q, k, v, TokenSelection(keys), engine="gather:torch").out
    (grad,) = torch.autograd.grad(out.sum(), v)
    # adding one at a time in bfloat16 ends at 256
    torch.testing.assert_close(grad[0, 0, 0].float(), torch.full((4,), 3000.0), atol=8, rtol=0)


def test_vmap_and_one_graph():
    q, k, v = (x.detach() for x in qkv())
    keys = listed()
    run = lambda q, keys: gather(q, k, v, TokenSelection(keys, within=Causal()), engine="gather:torch").out  # noqa: E731
    many = normal((3, *q.shape), seed=5)[0]
    want = torch.stack([run(x, keys) for x in many])
    torch.testing.assert_close(torch.func.vmap(run, in_dims=(0, None))(many, keys), want)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, keys), run(q, keys))


@pytest.mark.parametrize(
    "selection, options, error, text",
    [
        (
            BlockSelection(64, 64, listed()[:, :, :1]),
            {},
            OptionError,
            "gather takes a TokenSelection, not a BlockSelection",
        ),
        (TokenSelection(listed()[:, :, :5]), {}, ShapeError, r"must be \(B, H, 37, K\)"),
        (TokenSelection(listed(heads=3)), {}, ShapeError, "3 heads"),
        (TokenSelection(listed() + 30), {}, OptionError, "names key"),
        (TokenSelection(torch.zeros(1, 1, N, 2, dtype=torch.int32)), {}, OptionError, "twice"),
        (TokenSelection(listed(), force=Sinks(1)), {"normaliser": L1()}, Unsupported, "does not add up"),
        (TokenSelection(listed()), {"normaliser": L1(), "return_lse": True}, Unsupported, "L1 has no log-sum-exp"),
        (
            TokenSelection(listed(), torch.zeros(listed().shape), force=Sinks(1)),
            {"engine": "gather:torch"},
            Unsupported,
            "some of the keys that are forced",
        ),
    ],
)
def test_bad_calls_are_refused_with_the_reason(selection, options, error, text):
    with pytest.raises(error, match=text):
        gather(*qkv(), selection, **{"engine": "gather:torch", **options})
