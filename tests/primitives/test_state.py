from __future__ import annotations

import dataclasses

import pytest
import torch

from regard.engines.scan import ScanState
from regard.layers.caches import ConvState
from regard.primitives.state import StackState
from tests.oracles import normal


def stack():
    s, z, tail = normal((3, 2, 4, 5), (3, 2, 4), (3, 2, 6), dtype=torch.float32)
    return StackState((ScanState(s, z, 7), ScanState(s + 1, None, 7), ConvState(tail, 7)), 7)


def test_states_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        stack().seen = 8


def test_select_gathers_rows_of_every_tensor_and_may_repeat_them():
    state = stack()
    index = torch.tensor([2, 0, 0, 1])
    chosen = state.select(index)
    assert torch.equal(chosen.layers[0].s, state.layers[0].s[index])
    assert torch.equal(chosen.layers[0].z, state.layers[0].z[index])
    assert torch.equal(chosen.layers[2].tail, state.layers[2].tail[index])
    assert chosen.layers[1].z is None
    assert chosen.seen == chosen.layers[0].seen == 7


def test_select_and_casts_leave_the_old_state_alone():
    state = stack()
    before = state.layers[0].s.clone()
    state.select(torch.tensor([1])).layers[0].s.zero_()
    assert state.to(torch.float64).layers[2].tail.dtype == torch.float64
    assert state.layers[2].tail.dtype == torch.float32
    assert torch.equal(state.layers[0].s, before)


def test_size_bytes_counts_every_tensor():
    assert stack().size_bytes == 4 * (3 * 2 * 4 * 5 * 2 + 3 * 2 * 4 + 3 * 2 * 6)
    assert stack().to(torch.bfloat16).size_bytes == stack().size_bytes // 2


def test_detach_cuts_the_graph():
    state = ConvState(torch.zeros(1, 2, 3, requires_grad=True) * 2)
    assert state.tail.requires_grad
    assert not state.detach().tail.requires_grad
