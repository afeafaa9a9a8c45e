from __future__ import annotations

import pytest
import torch

from regard import attend
from regard.layers.caches import KVState, PerHeadState, ShardState
from tests.oracles import coin, normal


def empty(batch=2, dtype=torch.float32):
    return KVState(torch.empty(batch, 3, 0, 4, dtype=dtype), torch.empty(batch, 3, 0, 5, dtype=dtype))


def tokens(n, seed, batch=2):
    return normal((batch, 3, n, 4), (batch, 3, n, 5), seed=seed, dtype=torch.float32)


@pytest.fixture(autouse=True, params=["no_grad", "grad"])
def mode(request):
    # room behind the newest state is written in place only where autograd does not look
    with torch.set_grad_enabled(request.param == "grad"):
        yield request.param


def test_appending_equals_joining_however_often_the_buffer_grows():
    state, ks, vs = empty(), [], []
    for seed, n in enumerate([1, 5, 60, 1, 200, 1, 1, 700]):
        k, v = tokens(n, seed)
        state = state.append(k, v, None)
        ks.append(k)
        vs.append(v)
        assert torch.equal(state.k, torch.cat(ks, 2))
        assert torch.equal(state.v, torch.cat(vs, 2))
        assert state.seen == state.k.shape[2]
        assert state.valid is None


def test_no_older_state_ever_changes():
    states, copies = [empty()], []
    for seed in range(150):
        k, v = tokens(1 + seed % 3, seed)
        states.append(states[-1].append(k, v, None))
        copies.append((states[-1].k.clone(), states[-1].v.clone(), states[-1].seen))
    for state, (k, v, seen) in zip(states[1:], copies, strict=True):
        assert torch.equal(state.k, k)
        assert torch.equal(state.v, v)
        assert state.seen == seen


def test_branches_from_an_old_state_do_not_meet():
    root = empty().append(*tokens(10, 0), None)
    left = root.append(*tokens(2, 1), None)
    right = root.append(*tokens(2, 2), None)
    again = left.append(*tokens(1, 3), None)
    other = left.append(*tokens(1, 4), None)
    for state, seeds in ((left, [(2, 1)]), (right, [(2, 2)]), (again, [(2, 1), (1, 3)]), (other, [(2, 1), (1, 4)])):
        want = torch.cat([tokens(10, 0)[0]] + [tokens(n, s)[0] for n, s in seeds], 2)
        assert torch.equal(state.k, want)
    assert torch.equal(root.k, tokens(10, 0)[0])


def test_the_newest_state_writes_into_its_room_instead_of_copying(mode):
    state = empty().append(*tokens(10, 0), None)
    longer = state.append(*tokens(1, 1), None)
    assert (longer.k.data_ptr() == state.k.data_ptr()) == (mode == "no_grad")


def test_chosen_rows_continue_on_their_own():
    state = empty().append(*tokens(10, 0), None)
    beams = state.select(torch.tensor([1, 1, 0]))
    longer = beams.append(*tokens(1, 5, batch=3), None)
    state.append(*tokens(1, 6), None)
    assert torch.equal(longer.k, torch.cat((tokens(10, 0)[0][[1, 1, 0]], tokens(1, 5, batch=3)[0]), 2))
    assert torch.equal(beams.k, tokens(10, 0)[0][[1, 1, 0]])
    assert longer.seen == 11


def test_bytes_count_what_is_held_and_not_the_room():
    state = empty().append(*tokens(10, 0), None)
    assert state.size_bytes == 4 * 2 * 3 * 10 * (4 + 5)
    assert state.append(*tokens(1, 1), None).size_bytes == 4 * 2 * 3 * 11 * (4 + 5)
    assert state.append(*tokens(1, 1), coin(2, 1)).size_bytes == 4 * 2 * 3 * 11 * (4 + 5) + 2 * 11
    assert state.to(torch.bfloat16).size_bytes == 2 * 2 * 3 * 10 * (4 + 5)


def test_a_limited_state_keeps_the_last_positions():
    state = empty()
    for seed in range(6):
        state = state.append(*tokens(2, seed), None, keep=5)
    assert torch.equal(state.k, torch.cat([tokens(2, s)[0] for s in range(6)], 2)[:, :, -5:])
    assert state.seen == 12
    assert state.last(2).k.shape[2] == 2
    assert state.last(99).k.shape[2] == 5


def test_validity_is_remembered_from_the_first_padding_on():
    state = empty().append(*tokens(3, 0), None)
    state = state.append(*tokens(2, 1), torch.tensor([[True, False], [True, True]]))
    state = state.append(*tokens(1, 2), None)
    assert state.valid.tolist() == [[True, True, True, True, False, True], [True] * 6]
    assert state.last(2).valid.tolist() == [[False, True], [True, True]]


def test_gradients_flow_through_the_state():
    with torch.enable_grad():
        k, v = (x.requires_grad_() for x in tokens(4, 0))
        state = empty().append(k, v, None).append(*tokens(1, 1), None)
        (state.k.sum() + state.v.sum()).backward()
        assert (k.grad == 1).all()
        assert (v.grad == 1).all()


def test_frozen_keys_may_grow_between_a_forward_and_its_backward():
    with torch.enable_grad():
        q = torch.randn(2, 3, 1, 4, requires_grad=True)
        state, total = empty(), 0
        for seed in range(3):
            state = state.append(*tokens(1, seed), None)
            total = total + attend(q, state.k, state.v).sum()
        total.backward()
        assert q.grad.isfinite().all()


def test_a_state_made_in_inference_mode_goes_on_outside_of_it():
    with torch.inference_mode():
        state = empty().append(*tokens(3, 0), None)
    longer = state.append(*tokens(1, 1), None)
    assert torch.equal(longer.k, torch.cat((tokens(3, 0)[0], tokens(1, 1)[0]), 2))


def test_heads_keep_slots_of_their_own_and_empty_ones_are_marked():
    k, v, marks = normal((2, 2, 4, 3), (2, 2, 4, 5), (2, 2, 4))
    empty = PerHeadState(k[:, :, :0], v[:, :, :0], torch.empty(2, 2, 0, dtype=torch.int32), marks[..., :0])
    valid = torch.tensor([[True] * 4, [False] + [True] * 3])
    state = empty.append(k[:, :, :2], v[:, :, :2], valid[:, :2], marks[..., :2]).append(
        k[:, :, 2:], v[:, :, 2:], None, marks[..., 2:]
    )
    assert state.positions.tolist() == [[[0, 1, 2, 3]] * 2, [[-1, 1, 2, 3]] * 2]
    kept = state.keep(torch.tensor([[[0, 3], [1, 2]], [[-1, 2], [1, 3]]]))
    assert kept.positions.tolist() == [[[0, 3], [1, 2]], [[-1, 2], [1, 3]]]
    assert torch.equal(kept.keys[0, 0], k[0, 0, [0, 3]]) and torch.equal(kept.values[1, 1], v[1, 1, [1, 3]])
    assert kept.marks[1, 0, 0] == -1 and kept.marks[1, 0, 1] == marks[1, 0, 2]
    assert kept.seen == 4 and empty.keys.shape[2] == 0
    assert torch.equal(kept.select(torch.tensor([1, 1])).keys, kept.keys[[1, 1]])


def test_heads_keep_different_numbers_of_keys():
    k, v = normal((2, 2, 4, 3), (2, 2, 4, 5))
    state = ShardState((k[:, 0, :0],) * 2, (v[:, 0, :0],) * 2).append(k, v)
    masks = [torch.tensor([True, False, True, True]), torch.tensor([False, False, False, True])]
    kept = state.keep(masks)
    for g, mask in enumerate(masks):
        assert torch.equal(kept.keys[g], k[:, g, mask]) and torch.equal(kept.values[g], v[:, g, mask])
        assert torch.equal(kept.select(torch.tensor([1])).keys[g], k[1:, g, mask])
    assert kept.size_bytes == 2 * (3 + 1) * (3 + 5) * 8 and kept.seen == 4
    assert state.keys[0].shape[1] == 4
