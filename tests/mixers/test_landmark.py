from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import regard
from regard import LandmarkAttention, OptionError, ShapeError, Unsupported, insert_landmarks
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.primitives.positions import rope
from regard.primitives.state import State
from tests.notes import IGNORED, VOCAB, answered, note_rows, train_on
from tests.oracles import normal, softmax_row


def layer(**options):
    torch.manual_seed(0)
    return LandmarkAttention(16, 4, **{"block": 3, **options}).double()


def in_pieces(made, x, bounds, state=None):
    state, outs = made.init_state(len(x)) if state is None else state, []
    for start, stop in pairwise(bounds):
        out, state = made.prefill(x[:, start:stop], state)
        outs.append(out)
    return torch.cat(outs, 1), state


def heads(linear, x, count):
    return linear(x).unflatten(-1, (count, -1)).transpose(1, 2)


def stingy(made, x):
    """Row by row: which blocks, at which places, with which weights; everything in absolute positions."""
    period, n = made.block + 1, x.shape[1]
    q, k, v = heads(made.to_q, x, 4), heads(made.to_k, x, made.kv_heads), heads(made.to_v, x, made.kv_heads)
    out = torch.zeros_like(q)
    furthest = 0
    for b in range(len(x)):
        for h in range(4):
            g = h * made.kv_heads // 4
            for i in range(n):
                count = i // period
                kept = min(made.topk, count)
                # slot s begins at full - (kept + 1 - s) periods: slot kept ends where the open block begins
                begin = count * period
                slot = lambda s, begin=begin, kept=kept: begin - (kept + 1 - s) * period  # noqa: E731
                query = rope(q[b, h, i][None], torch.tensor([i]))[0] / q.shape[-1] ** 0.5

                def score(j, place, query=query, b=b, g=g):
                    nonlocal furthest
                    furthest = max(furthest, i - place)  # noqa: B023
                    return query @ rope(k[b, g, j][None], torch.tensor([place]))[0]

                gates = []
                for s in range(count):
                    late = s - (count - kept)
                    gates.append(score(s * period + made.block, slot(late + 1 if late >= 0 else 0) + made.block))
                best = sorted(sorted(range(count), key=lambda s: -gates[s])[:kept])
                own = [j for j in range(begin, i + 1) if j % period != made.block]
                first, blocks = [score(j, j) for j in own], []
                for t, s in enumerate(best):
                    start = slot(t + 1 if s >= count - kept else t)
                    inside = torch.stack([score(s * period + o, start + o) for o in range(period)])
                    first.append(inside[-1])
                    blocks.append(softmax_row(inside[:-1]) @ v[b, g, s * period : s * period + made.block])
                weights = softmax_row(torch.stack(first))
                out[b, h, i] = weights @ torch.cat((v[b, g, own], *(x[None] for x in blocks)))
    return made.to_out(out.transpose(1, 2).flatten(2)), furthest


@pytest.mark.parametrize("bounds", [(0, 19), (0, 4, 8, 19), (0, 1, 2, 3, 11, 19), tuple(range(20))])
@pytest.mark.parametrize(
    "options", [{}, {"topk": 2}, {"topk": 1, "kv_heads": 2}, {"topk": 9}, {"topk": 2, "rotary": False}]
)
def test_a_cache_with_true_places_gives_the_parallel_form(options, bounds):
    made, (x,) = layer(**options), normal((2, 19, 16))
    out, state = in_pieces(made, x, bounds)
    torch.testing.assert_close(out, made(x, is_causal=True))
    assert state.seen == 19 and state.landmarks.shape[2] == 4
    assert state.local.k.shape[2] == 3 and state.memory.k.shape[2] == 16


@pytest.mark.parametrize("options", [{"topk": 2}, {"topk": 1, "kv_heads": 2}, {"topk": 3, "block": 1}])
def test_stingy_places(options):
    made, (x,) = layer(positions="stingy", **options), normal((2, 23, 16))
    expected, furthest = stingy(made, x)
    torch.testing.assert_close(made(x, is_causal=True), expected)
    torch.testing.assert_close(in_pieces(made, x, (0, 5, 6, 23))[0], expected)
    # never further away than the slots and the open block reach
    assert furthest <= (made.topk + 1) * (made.block + 1) + made.block
    assert not torch.allclose(expected, layer(**options)(x, is_causal=True))


def test_stingy_places_are_true_ones_while_all_blocks_are_read():
    (x,) = normal((2, 15, 16))
    torch.testing.assert_close(
        layer(positions="stingy", topk=3)(x, is_causal=True), layer(topk=None)(x, is_causal=True)
    )


def test_keys_are_kept_before_rotation():
    made, (x,) = layer(topk=2), normal((2, 7, 16))
    _, state = in_pieces(made, x, (0, 7))
    k = heads(made.to_k, x, 4)
    torch.testing.assert_close(state.memory.k, k[:, :, :4])
    torch.testing.assert_close(state.landmarks, k[:, :, 3:4])
    torch.testing.assert_close(state.local.k, k[:, :, 4:])


def test_one_set_of_blocks_for_the_rows_of_a_call():
    made, one, (x,) = layer(topk=1), layer(topk=1, retrieve="call"), normal((1, 20, 16))
    # single rows choose for themselves either way
    alone, _ = in_pieces(one, x, range(21))
    torch.testing.assert_close(alone, made(x, is_causal=True))
    _, state = in_pieces(one, x, (0, 16))
    together, _ = one.prefill(x[:, 16:20], state)
    # by hand: the block whose landmark has the largest softmaxed score over the four rows, for each head
    q = rope(heads(one.to_q, x, 4), torch.arange(20))[:, :, 16:] / 2
    k = rope(heads(one.to_k, x, 4), torch.arange(20))
    v = heads(one.to_v, x, 4)
    scores = q @ k.transpose(-1, -2)
    best = torch.softmax(scores[..., 3:16:4], -1).amax(2).argmax(-1)[0]
    out = torch.zeros(1, 4, 4, 4).double()
    for h in range(4):
        s = int(best[h])
        for r in range(4):
            row = scores[0, h, r]
            own = [j for j in range(16, 17 + r) if j != 19]
            weights = softmax_row(row[[*own, 4 * s + 3]])
            inside = softmax_row(row[4 * s : 4 * s + 3]) @ v[0, h, 4 * s : 4 * s + 3]
            out[0, h, r] = weights[:-1] @ v[0, h, own] + weights[-1] * inside
    torch.testing.assert_close(together, one.to_out(out.transpose(1, 2).flatten(2)))
    assert len({int(s) for s in best}) > 1


def test_closed_blocks_may_live_elsewhere():
    made, (x,) = layer(topk=2, memory_device="meta"), normal((1, 4, 16))
    _, state = made.prefill(x, made.init_state(1))
    assert state.memory.k.is_meta and state.memory.v.is_meta and not state.landmarks.is_meta
    here, (x,) = layer(topk=2, memory_device="cpu"), normal((2, 19, 16))
    torch.testing.assert_close(in_pieces(here, x, (0, 7, 19))[0], layer(topk=2)(x, is_causal=True))


@pytest.mark.parametrize("options", [{}, {"topk": 2}, {"topk": 2, "positions": "stingy"}])
def test_a_state_is_a_value(options):
    made, (x, other) = layer(**options), normal((2, 19, 16), (2, 19, 16))
    with torch.no_grad():
        _, state = in_pieces(made, x, (0, 14))
        assert isinstance(state, State)
        left, _ = in_pieces(made, x, (14, 19), state)
        right, _ = in_pieces(made, other, (14, 15, 19), state)
        torch.testing.assert_close(in_pieces(made, x, (14, 19), state)[0], left)
        beams = in_pieces(made, x[[1, 0, 1]], (14, 19), state.select(torch.tensor([1, 0, 1])))[0]
    torch.testing.assert_close(beams, left[[1, 0, 1]])
    assert not torch.allclose(left, right)
    assert made.state_bytes(2, 14) == state.size_bytes


def test_gradients_flow_through_the_cache():
    made, (x,) = layer(topk=2), normal((2, 19, 16))
    whole = torch.autograd.grad(made(x, is_causal=True).square().sum(), list(made.parameters()))
    pieces = torch.autograd.grad(in_pieces(made, x, (0, 6, 19))[0].square().sum(), list(made.parameters()))
    torch.testing.assert_close(pieces, whole)


def test_a_landmark_follows_every_block():
    ids = torch.arange(7)
    assert insert_landmarks(ids, 3, 99).tolist() == [0, 1, 2, 99, 3, 4, 5, 99, 6]
    assert insert_landmarks(ids[:6], 3, 99).tolist() == [0, 1, 2, 99, 3, 4, 5, 99]
    assert insert_landmarks(ids[:2], 3, 99).tolist() == [0, 1]
    both = insert_landmarks(torch.stack((ids, ids + 10)), 3, 99)
    assert both.shape == (2, 9) and both[1].tolist() == [10, 11, 12, 99, 13, 14, 15, 99, 16]


def test_inserted_landmarks_are_where_the_op_looks_for_them():
    ids = insert_landmarks(torch.arange(17)[None], 4, 99)
    q, k, v = normal((1, 2, 21, 4), (1, 2, 21, 4), (1, 2, 21, 4))
    regard.landmark_attention(q, k, v, block=4, is_landmark=ids == 99, is_causal=True)
    with pytest.raises(OptionError, match="no landmark found in 21 tokens"):
        regard.landmark_attention(q, k, v, block=4, is_landmark=torch.arange(21) == 99, is_causal=True)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: layer(block=0), OptionError, "block of at least 1"),
        (lambda: layer(topk=0), OptionError, "topk of at least 1"),
        (lambda: layer(positions="near"), OptionError, "'true' or 'stingy'"),
        (lambda: layer(retrieve="token"), OptionError, "'row' or 'call'"),
        (lambda: layer()(torch.zeros(1, 4, 16).double()), Unsupported, "causal only"),
        (
            lambda: layer()(torch.zeros(1, 4, 16).double(), padding=torch.ones(1, 4).bool(), is_causal=True),
            Unsupported,
            "takes no padding",
        ),
        (
            lambda: layer()(torch.zeros(1, 4, 16).double(), reset=torch.ones(1, 4).bool(), is_causal=True),
            Unsupported,
            "takes no reset",
        ),
        (lambda: insert_landmarks(torch.tensor([1, 2, 9]), 2, 9), OptionError, "hold the landmark 9 already"),
        (lambda: insert_landmarks(torch.tensor([1, 2]), 0, 9), OptionError, "block of at least 1"),
        (lambda: insert_landmarks(torch.tensor([1.0]), 2, 9), ShapeError, "integers"),
    ],
)
def test_bad_settings_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


BLOCK, MARK = 15, VOCAB


def with_landmarks(ids, targets):
    """Landmarks among the tokens; a token before a landmark has no target, since the landmark comes next."""
    place = torch.arange(ids.shape[1])
    place = place + place // BLOCK
    marked = insert_landmarks(ids, BLOCK, MARK)
    wanted = torch.full_like(marked, IGNORED)
    wanted[:, place] = targets
    wanted[:, BLOCK - 1 :: BLOCK + 1] = IGNORED
    return marked, wanted


def reader(name, **options):
    """A short convolution and two layers of attention; every attention has the same weights by name."""
    torch.manual_seed(0)
    settings = SequenceSettings(
        vocab=VOCAB + 1, dim=64, depth=3, heads=2, mixer=("short_conv", name, name), options={name: options}, hidden=0
    )
    return SequenceModel(settings)


def educated(stages, make_model, marked):
    """(the model, running accuracy and steps of each stage); stages (length, notes and asks, tokens, steps, stop, lr)."""
    made, figures = None, {}
    for number, (length, notes, tokens, steps, stop, lr, options) in enumerate(stages):
        before, made = made, make_model(**options)
        if before is not None:
            made.load_state_dict(before.state_dict())

        def make(step, length=length, notes=notes, rows=tokens // length, number=number):
            ids, targets = note_rows(rows, length, notes=notes, asks=notes, seed=step + 10**5 * number)
            return with_landmarks(ids, targets) if marked else (ids, targets)

        figures[f"{length} tokens {options or ''}".strip()] = train_on(made, make, steps, lr=lr, stop=stop)
    return made, figures


def far_rows(rows, length, notes=8):
    """Notes in the first three quarters, one asked at the end."""
    return note_rows(rows, length, notes=notes, until=length * 3 // 4, seed=10**7)


@pytest.mark.slow
def test_trained_on_256_tokens_it_finds_a_note_among_4096(record):
    short = [(14, 3, 1024, 600, 0.95, 3e-3, {}), (30, 4, 2048, 400, 0.97, 3e-3, {}), (60, 8, 2048, 400, 0.9, 3e-3, {})]
    long = [(240, 8, 4096, 300, 0.99, 3e-3, {})]
    made, stages = educated(
        [*short, *long, (240, 8, 4096, 150, 0.95, 2e-3, {"topk": 2})],
        lambda **o: reader("landmark", block=BLOCK, **o),
        True,
    )
    local, local_stages = educated([*short, *long], lambda **o: reader("softmax", **o), False)
    figures = {
        "task": "8 notes in the first three quarters, one asked at the end; chance among them 0.125",
        "landmark, running accuracy and steps": stages,
        "local cache, running accuracy and steps": local_stages,
    }
    window = reader("sliding_window", window=240)
    for length, rows in ((240, 128), (3838, 64)):
        ids, targets = far_rows(rows, length)
        asked = with_landmarks(ids, targets)
        for positions in ("stingy", "true"):
            best = reader("landmark", block=BLOCK, topk=2, positions=positions)
            best.load_state_dict(made.state_dict())
            if positions == "stingy" or length == 240:
                figures[f"landmark, topk=2, {positions} places, {asked[0].shape[1]} tokens"] = answered(best, *asked)
        window.load_state_dict(local.state_dict())
        figures[f"local cache of 240 tokens, {length} tokens"] = answered(window, ids, targets)
    record(figures)
    assert figures["landmark, topk=2, stingy places, 4093 tokens"] >= 0.9
    assert figures["local cache of 240 tokens, 240 tokens"] >= 0.9
    assert figures["local cache of 240 tokens, 3838 tokens"] <= 0.2
