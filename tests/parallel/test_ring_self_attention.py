"""Ring attention: what it must give, what it may send, what it refuses."""

from __future__ import annotations

import itertools
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.parallel import allgather_attention, position_ids, ring_attention, shard, unshard
from regard.parallel.blocks import meeting
from regard.parallel.exchange import Piece, pieces
from regard.patterns import Causal, SlidingWindow
from tests.oracles import coin, normal
from tests.parallel.sent import Largest, Sent
from tests.parallel.worlds import facts

# divides by the sizes of all worlds, and by twice that
N = 24
LAYOUTS = ("contiguous", "zigzag")


def example(n=N, dtype=torch.float64, seed=0, width=6) -> list[Tensor]:
    """q, k, v of a whole sequence with grouped heads, the same on every process."""
    return [x.requires_grad_() for x in normal((2, 4, n, 8), (2, 2, n, 8), (2, 2, n, width), seed=seed, dtype=dtype)]


def padding(n=N) -> Tensor:
    """The first row sees no key before the middle, the second none at all."""
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[0, : n // 2] = False
    valid[1] = False
    return valid


def allowed(n, causal, window=None, valid=None) -> Tensor:
    mask = torch.ones(n, n, dtype=torch.bool)
    if window is not None:
        mask = SlidingWindow(window).dense(n, n)[0, 0]
    if causal:
        mask = mask & Causal().dense(n, n)[0, 0]
    return mask[None, None] if valid is None else mask[None, None] & valid[:, None, None]


def whole(q, k, v, mask, scale=None) -> tuple[Tensor, list[Tensor]]:
    """(out, gradients) of one process, of the loss that `split_loss` cuts."""
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return out, list(torch.autograd.grad(loss(out), (q, k, v)))


def loss(out: Tensor) -> Tensor:
    return (out * out + out.sin()).sum()


def split(call, q, k, v, layout="contiguous") -> tuple[Tensor, list[Tensor]]:
    """(the whole output, the whole gradients) of a call whose parts are on all processes."""
    parts = [shard(x.detach(), 2, layout=layout).requires_grad_() for x in (q, k, v)]
    out = call(*parts)
    grads = torch.autograd.grad(loss(out), parts)
    return unshard(out.detach(), layout=layout), [unshard(g, layout=layout) for g in grads]


def near(found, expected, tolerance=1e-12, what="") -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), (found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        # gradients may be 0: one key alone has weight 1 whatever its score
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)
        assert error <= tolerance, f"{what} {name}: off by {error:.1e}"


def check_equals_one_process(rank, size):
    q, k, v = example()
    for causal, layout, algorithm, padded in itertools.product(
        (False, True), LAYOUTS, ("online", "rsa"), (False, True)
    ):
        valid = padding() if padded else None
        call = partial(
            ring_attention, is_causal=causal, algorithm=algorithm, layout=layout,
            key_valid=None if valid is None else shard(valid, 1, layout=layout),
        )  # fmt: skip
        what = f"{causal} {layout} {algorithm} {padded}"
        near(split(call, q, k, v, layout), whole(q, k, v, allowed(N, causal, None, valid)), what=what)


def check_rows_of_nothing_are_0(rank, size):
    for algorithm in ("online", "rsa"):
        parts = [shard(x.detach()).requires_grad_() for x in example()]
        out = ring_attention(*parts, key_valid=shard(padding(), 1), algorithm=algorithm)
        grads = torch.autograd.grad(loss(out) + out.exp().sum(), parts)
        assert not out[1].any() and not any(g[1].any() for g in grads)


def check_windows(rank, size):
    q, k, v = example()
    for causal, layout, window in itertools.product((False, True), LAYOUTS, (1, 2, 5, 9, N + 3)):
        expected = whole(q, k, v, allowed(N, causal, window))
        for algorithm in ("online", "rsa"):
            call = partial(ring_attention, is_causal=causal, window=window, layout=layout, algorithm=algorithm)
            near(split(call, q, k, v, layout), expected, what=f"{causal} {layout} {window} {algorithm}")


def check_scale(rank, size):
    q, k, v = example()
    near(split(partial(ring_attention, scale=0.7), q, k, v), whole(q, k, v, allowed(N, False), scale=0.7))


def check_float32_goes_through_the_kernels(rank, size):
    n = 72 * size
    q, k, v = example(n, torch.float32)
    valid = coin(2, n, p=0.8)
    for causal, layout, window in itertools.product((False, True), LAYOUTS, (None, 40)):
        call = partial(
            ring_attention, is_causal=causal, window=window, layout=layout, key_valid=shard(valid, 1, layout=layout)
        )
        expected = whole(*(x.double() for x in (q, k, v)), allowed(n, causal, window, valid))
        near(split(call, q, k, v, layout), expected, 1e-5, f"{causal} {layout} {window}")


def check_bf16_is_as_near_as_two_steps(rank, size):
    n = 72 * size
    q, k, v = example(n, torch.bfloat16)
    found = split(partial(ring_attention, is_causal=True, layout="zigzag"), q, k, v, "zigzag")
    assert {found[0].dtype, *(g.dtype for g in found[1])} == {torch.bfloat16}
    expected = whole(q, k, v, allowed(n, True))
    near(found, expected, 2 * torch.finfo(torch.bfloat16).eps)


def check_what_is_sent(rank, size):
    parts = [shard(x.detach()).requires_grad_() for x in example(width=8)]
    block = parts[1].numel() * parts[1].element_size()
    for causal in (False, True):
        # the first call of a shape asks whether all have it
        ring_attention(*parts, is_causal=causal)
        with Sent() as forward:
            out = ring_attention(*parts, is_causal=causal)
        assert forward.bytes == 2 * (size - 1) * block, (forward.calls, block)
        # backward runs on a thread that the mode does not see
        with Sent() as both, torch.autograd.set_multithreading_enabled(False):
            loss(ring_attention(*parts, is_causal=causal)).backward()
        assert both.bytes - forward.bytes == 4 * (size - 1) * block <= 4 * size * block
        assert set(both.names) <= {"send", "recv"}, both.names
        assert out.shape == parts[0].shape


def check_hops_beyond_the_window_are_not_made(rank, size):
    parts = [shard(x.detach()) for x in example(width=8)]
    block = parts[1].numel() * parts[1].element_size()
    length = parts[0].shape[2]
    for causal, window, hops in (
        (True, 1, 0),
        (True, 2, 1),
        (True, length + 1, 1),
        (True, length + 2, 2),
        (False, 2, 2),
    ):
        ring_attention(*parts, is_causal=causal, window=window)
        with Sent() as sent:
            ring_attention(*parts, is_causal=causal, window=window)
        assert sent.bytes == 2 * min(hops, size - 1) * block, (causal, window, sent.calls)


def check_nothing_grows_with_the_square(rank, size):
    """The largest tensor of forward and backward is a few times a part of q, where RSA makes tables of C x N."""
    n = 128 * size
    largest = {}
    for algorithm in ("online", "rsa"):
        parts = [shard(x.detach()).requires_grad_() for x in example(n, torch.float32)]
        ring_attention(*parts, algorithm=algorithm)
        with Largest() as made, torch.autograd.set_multithreading_enabled(False):
            loss(ring_attention(*parts, is_causal=True, algorithm=algorithm)).backward()
        largest[algorithm] = made.numbers
    part = 2 * 4 * 128 * 8
    assert largest["online"] <= 2 * part
    assert largest["rsa"] >= 2 * 4 * 128 * n


def check_shard_and_unshard(rank, size):
    x = torch.arange(2 * N).view(2, N).double().requires_grad_()
    for layout in LAYOUTS:
        part = shard(x, 1, layout=layout)
        assert part.shape == (2, N // size)
        assert torch.equal(part[0], position_ids(N, layout=layout).double())
        assert torch.equal(unshard(part, 1, layout=layout), x)
        own = shard(x.detach(), 1, layout=layout).requires_grad_()
        # every process reads the whole, so every part gets the sum of what all make of it
        (unshard(own, 1, layout=layout) * (rank + 1) * x.detach()).sum().backward()
        assert torch.equal(own.grad, shard(x.detach(), 1, layout=layout) * sum(range(1, size + 1)))


def check_bad_input(rank, size):
    q, k, v = (shard(x.detach()) for x in example())
    with pytest.raises(OptionError, match="algorithm"):
        ring_attention(q, k, v, algorithm="offline")
    with pytest.raises(OptionError, match="layout"):
        ring_attention(q, k, v, layout="spiral")
    with pytest.raises(OptionError, match="window"):
        ring_attention(q, k, v, window=0)
    with pytest.raises(ShapeError, match="key_valid"):
        ring_attention(q, k, v, key_valid=padding()[:, : N // size].float())
    with pytest.raises(ShapeError, match="same tokens"):
        ring_attention(q, k[:, :, 1:], v[:, :, 1:])
    with pytest.raises(ShapeError, match=f"multiple of {2 * size}"):
        ring_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], layout="zigzag")
    with pytest.raises(ShapeError, match="hide the padding"):
        shard(torch.zeros(1, 2 * size - 1), 1, layout="zigzag")
    with pytest.raises(TypeError):
        ring_attention(q, k, v, dropout_p=0.1)


def check_lengths_that_differ(rank, size):
    if size == 1:
        return
    # lengths that no other check has agreed on
    lengths = [31 if r == 1 else 30 for r in range(size)]
    q, k, v = normal((2, 4, lengths[rank], 8), (2, 2, lengths[rank], 8), (2, 2, lengths[rank], 6))
    said = f"local sequence lengths differ across ranks: {', '.join(map(str, lengths))}"
    for call in (ring_attention, partial(ring_attention, algorithm="rsa"), allgather_attention):
        with pytest.raises(ShapeError, match=said):
            call(q, k, v)
    with pytest.raises(ShapeError, match="sizes of axis 2 differ"):
        unshard(q)
    # and the world goes on
    q, k, v = example()
    near(split(ring_attention, q, k, v), whole(q, k, v, None))


def check_groups_within_the_world(rank, size):
    """A ring of some processes; the others are told that they are not in it."""
    if size == 1:
        return
    group = dist.new_group(list(range(1, size)))
    q, k, v = normal((1, 2, 2 * (size - 1), 4), (1, 2, 2 * (size - 1), 4), (1, 2, 2 * (size - 1), 4))
    if rank == 0:
        with pytest.raises(OptionError, match="not in the group"):
            ring_attention(q, k, v, group=group)
        return
    out = ring_attention(*(shard(x, group=group) for x in (q, k, v)), group=group)
    expected = F.scaled_dot_product_attention(q, k, v)
    assert (unshard(out, group=group) - expected).abs().max() < 1e-12


def test_meeting_is_the_pattern_of_the_pair():
    for size, causal, window, layout in itertools.product((1, 2, 3), (False, True), (None, 1, 4, 11), LAYOUTS):
        seen = allowed(4 * size, causal, window)[0, 0]
        held = [p for r in range(size) for p in pieces(4, r, size, layout)]
        for a, b in itertools.product(held, held):
            expected = seen[a.start : a.start + a.length, b.start : b.start + b.length]
            pattern = meeting(a, b, causal, window)
            found = torch.zeros_like(expected) if pattern is None else pattern.dense(a.length, b.length)[0, 0]
            assert torch.equal(found, expected), (a, b, causal, window)
            if pattern is not None:
                layout_of = pattern.layout(a.length, b.length)
                assert torch.equal(layout_of.dense()[0, 0], expected)


def test_zigzag_evens_out_causal_work():
    for size in (2, 3, 4):
        held = [pieces(8, r, size, "zigzag") for r in range(size)]
        for hop in range(size):
            work = {
                sum(
                    int(p.dense(a.length, b.length).sum())
                    for a in held[r]
                    for b in held[(r - hop) % size]
                    if (p := meeting(a, b, True, None)) is not None
                )
                for r in range(size)
            }
            assert len(work) == 1 or hop == 0, (size, hop, work)


def test_pieces():
    assert pieces(4, 1, 3, "zigzag") == (Piece(0, 2, 2), Piece(2, 8, 2))
    assert position_ids(8, layout="zigzag").tolist() == list(range(8))


test_fact = facts(sys.modules[__name__].__name__)
