"""Processes that end or fall behind: the others stop in time and say why."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from regard.contract.errors import ShapeError
from regard.parallel import PeerLost, lasp2, ring_attention, shard
from regard.parallel.exchange import agree, pieces, ring_exchange
from tests.oracles import normal
from tests.parallel.worlds import facts, start

TIMEOUT_S = 3


def lose(rank: int, size: int, folder: str, what: str) -> None:
    """Rank 1 ends, or falls behind, before the second call; the others write what became of theirs."""
    # a group of its own, so that a busy machine has time to start its processes
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    q, k, v = (shard(x).requires_grad_() for x in normal((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4)))
    call = lasp2 if "lasp2" in what else ring_attention
    out = call(q, k, v, group=group)
    dist.barrier()
    if rank == 1:
        if "killed" in what:
            os.kill(os.getpid(), 9)
        time.sleep(TIMEOUT_S + 2)
        return
    begun = time.monotonic()
    try:
        if "backward" in what:
            out.sum().backward()
        else:
            call(q, k, v, group=group)
        said = "nothing"
    except PeerLost as error:
        said = str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps([time.monotonic() - begun, said]))


@pytest.mark.parametrize(
    "what",
    [
        "ring, killed",
        "lasp2, slow backward",
        pytest.param("lasp2, killed", marks=pytest.mark.slow),
        pytest.param("ring, slow", marks=pytest.mark.slow),
        pytest.param("ring, killed backward", marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_ends_the_others(tmp_path, what):
    codes = start(2, tmp_path, lose, str(tmp_path), what)
    assert codes == [0, -9 if "killed" in what else 0]
    took, said = json.loads((tmp_path / "0.json").read_text())
    assert said.startswith("rank 0 of 2 gave up") and "slower than the timeout" in said
    assert took < TIMEOUT_S + 2


def check_messages_do_not_mix(rank, size):
    """Two exchanges at the same time bring what belongs to each."""
    x = torch.full((3,), float(rank))
    first = ring_exchange([x, 10 + x], step=1)
    second = ring_exchange([100 + x], step=size - 1, tag=2)
    before, after = (rank - 1) % size, (rank + 1) % size
    assert [t[0].item() for t in second.wait()] == [100 + after if size > 1 else 100]
    assert [t[0].item() for t in first.wait()] == ([before, 10 + before] if size > 1 else [0, 10])


def check_what_was_agreed_is_not_asked_again(rank, size):
    calls = []
    original, dist.all_gather = dist.all_gather, lambda *a, **o: calls.append(0) or original(*a, **o)
    try:
        agree({"apples": 3})
        agree({"apples": 3})
        assert len(calls) == (size > 1)
        if size > 1:
            with pytest.raises(
                ShapeError, match=f"apples differ across ranks: {', '.join(map(str, range(10, 10 + size)))}"
            ):
                agree({"apples": 10 + rank})
    finally:
        dist.all_gather = original


def check_long_messages(rank, size):
    """Blocking sends of this length would wait for each other for ever."""
    x = torch.full((1 << 20,), float(rank))
    (received,) = ring_exchange([x]).wait()
    assert bool((received == (rank - 1) % size).all())


def test_one_process_needs_no_world():
    assert not dist.is_initialized()
    q, k, v = normal((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4))
    assert torch.equal(shard(q), q)
    assert (ring_attention(q, k, v) - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-12
    agree({"anything": 1})


def test_pieces_cover_the_sequence():
    for layout in ("contiguous", "zigzag"):
        found = sorted(
            position
            for rank in range(3)
            for piece in pieces(4, rank, 3, layout)
            for position in range(piece.start, piece.start + piece.length)
        )
        assert found == list(range(12))


test_fact = facts(sys.modules[__name__].__name__)
