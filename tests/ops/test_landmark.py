from __future__ import annotations

import dataclasses

import pytest
import torch

from regard import (
    Causal,
    OptionError,
    ShapeError,
    SlidingWindow,
    Unsupported,
    landmark_attention,
    landmark_merge,
    landmark_select,
    softmax_attention,
)
from regard.checks.battery import checks, run, subjects
from tests.oracles import attention, normal, softmax_row


def qkv(n=23, heads=4, groups=2, d=8, batch=2, seed=0):
    return normal((batch, heads, n, d), (batch, groups, n, d), (batch, groups, n, 6), seed=seed)


def weights_of_row(scores, i, block, blocks=None):
    """The definition for one row: scores of all keys -> weights of keys 0 … i; `blocks`: which earlier ones are read."""
    period = block + 1
    own = i // period
    blocks = range(own) if blocks is None else blocks
    tokens = [j for j in range(own * period, i + 1) if j % period != block]
    gates = [b * period + block for b in blocks]
    first = softmax_row(scores[tokens + gates])
    weights = torch.zeros_like(scores)
    weights[tokens] = first[: len(tokens)]
    for p, b in zip(first[len(tokens) :], blocks, strict=True):
        inside = list(range(b * period, b * period + block))
        weights[inside] = p * softmax_row(scores[inside])
    return weights


def expected(q, k, v, block, topk=None, scale=None):
    batch, heads, n, d = q.shape
    share = heads // k.shape[1]
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, n, v.shape[-1]).double()
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                scores = scale * k[b, h // share] @ q[b, h, i]
                blocks = list(range(i // (block + 1)))
                if topk is not None:
                    blocks = sorted(blocks, key=lambda s: -scores[s * (block + 1) + block])[:topk]
                out[b, h, i] = weights_of_row(scores, i, block, blocks) @ v[b, h // share]
    return out


@pytest.mark.parametrize("engine", [None, "reference", "block_sparse:torch"])
@pytest.mark.parametrize("n, block", [(23, 4), (24, 3), (23, 1), (130, 30), (9, 8), (10, 9), (11, 9)])
def test_a_landmark_opens_its_block(n, block, engine):
    q, k, v = qkv(n)
    out = landmark_attention(q, k, v, block=block, is_causal=True, engine=engine)
    torch.testing.assert_close(out, expected(q, k, v, block))


@pytest.mark.parametrize("engine", [None, "reference", "block_sparse:torch"])
@pytest.mark.parametrize("n, block, topk", [(23, 4, 1), (24, 3, 2), (23, 1, 4), (130, 10, 2)])
def test_only_the_best_blocks_are_read(n, block, topk, engine):
    q, k, v = qkv(n)
    out = landmark_attention(q, k, v, block=block, topk=topk, is_causal=True, engine=engine)
    torch.testing.assert_close(out, expected(q, k, v, block, topk))


@pytest.mark.parametrize("topk", [None, 1, 2])
def test_rows_sum_to_one_and_landmarks_weigh_nothing(topk):
    q, k, _ = qkv(33)
    # values that are unit vectors give the weights themselves
    v = torch.eye(33).double().expand(2, 2, 33, 33)
    weights = landmark_attention(q, k, v, block=6, topk=topk, is_causal=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 33).double())
    assert not weights[..., 6::7].any()
    assert not weights.triu(1).any()


def test_landmarks_with_the_logit_of_their_block_give_plain_softmax():
    # scores are first coordinates of keys; each landmark's is the log-sum-exp of its block
    n, block = 29, 4
    (scores,) = normal((n,))
    for b in range(n // 5):
        scores[5 * b + 4] = scores[5 * b : 5 * b + 4].logsumexp(0)
    k = torch.stack((scores, torch.zeros(n).double()), -1)[None, None]
    q = torch.tensor([1.0, 0.0]).double().expand(1, 1, n, 2)
    v = normal((1, 1, n, 3))[0]
    ordinary = (torch.arange(n) % 5 != 4).expand(n, n) & torch.ones(n, n, dtype=torch.bool).tril()
    out = landmark_attention(q, k, v, block=block, is_causal=True, scale=1.0)
    torch.testing.assert_close(out, attention(q, k, v, allowed=ordinary, scale=1.0)[0])


@pytest.mark.parametrize("n, block", [(9, 9), (5, 9), (1, 1)])
def test_a_sequence_within_one_block_is_plain_causal_attention(n, block):
    q, k, v = qkv(n)
    out = landmark_attention(q, k, v, block=block, is_causal=True)
    torch.testing.assert_close(out, softmax_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("topk", [4, 5, 100])
def test_as_many_best_blocks_as_there_are_is_all_of_them(topk):
    q, k, v = qkv(23)
    out = landmark_attention(q, k, v, block=4, topk=topk, is_causal=True)
    torch.testing.assert_close(out, landmark_attention(q, k, v, block=4, is_causal=True))
    fewer = landmark_attention(q, k, v, block=4, topk=3, is_causal=True)
    assert not torch.allclose(fewer[:, :, 20:], out[:, :, 20:])
    torch.testing.assert_close(fewer[:, :, :20], out[:, :, :20])


def streamed(q, k, v, block):
    """One key block after the other joins with a running maximum and sum, as a kernel would do it."""
    period, n, scale = block + 1, q.shape[2], q.shape[3] ** -0.5
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    top = torch.full(q.shape[:3], float("-inf")).double()
    total, out = torch.zeros_like(top), torch.zeros(*q.shape[:3], v.shape[3]).double()

    def join(rows, logit, value):
        new = torch.maximum(top[:, :, rows], logit)
        old, fresh = (top[:, :, rows] - new).exp(), (logit - new).exp()
        top[:, :, rows] = new
        total[:, :, rows] = total[:, :, rows] * old + fresh
        out[:, :, rows] = out[:, :, rows] * old[..., None] + fresh[..., None] * value

    for begin in range(0, n, period):
        later = slice(begin + period, n)
        inside = torch.softmax(scale * q[:, :, later] @ k[:, :, begin : begin + block].transpose(-1, -2), -1)
        if begin + block < n:
            gate = scale * (q[:, :, later] * k[:, :, begin + block : begin + period]).sum(-1)
            join(later, gate, inside @ v[:, :, begin : begin + block])
        for j in range(begin, min(begin + block, n)):
            rows = slice(j, min(begin + period, n))
            logit = scale * (q[:, :, rows] * k[:, :, j : j + 1]).sum(-1)
            join(rows, logit, v[:, :, j : j + 1].expand(-1, -1, rows.stop - j, -1))
    return out / total[..., None]


@pytest.mark.parametrize("n, block", [(23, 4), (24, 3), (130, 30)])
def test_streaming_over_blocks_gives_what_grouping_a_whole_row_gives(n, block):
    q, k, v = qkv(n)
    torch.testing.assert_close(landmark_attention(q, k, v, block=block, is_causal=True), streamed(q, k, v, block))


def test_blocks_join_a_row_as_one_key_each():
    q, k, v = qkv(20, heads=2)
    # the last row: 4 closed blocks of 4 + 1, no open one but itself
    q, k, v = q[:, :, 15:], k, v
    scores = q @ k.transpose(-1, -2) / 8**0.5
    own, own_lse = attention(q, k[:, :, 15:19], v[:, :, 15:19], allowed=torch.ones(5, 4).tril().bool())
    grouped = scores[..., :15].unflatten(-1, (3, 5))
    values = v[:, :, :15].unflatten(2, (3, 5))[:, :, None, :, :4].expand(-1, -1, 5, -1, -1, -1)
    out, lse = landmark_merge(own, own_lse, grouped[..., :4], grouped[..., 4], values)
    torch.testing.assert_close(out, expected_rows(q, k, v, 15, 4))
    gates = torch.cat((scores[..., 4:15:5], own_lse[..., None]), -1)
    torch.testing.assert_close(lse, gates.logsumexp(-1))
    hidden = torch.full_like(grouped[..., 4], float("-inf"))
    alone, _ = landmark_merge(own, own_lse, grouped[..., :4], hidden, values)
    torch.testing.assert_close(alone, own)


def expected_rows(q, k, v, first, block):
    rows = [
        torch.stack([weights_of_row(k[b, h] @ q[b, h, r] / 8**0.5, first + r, block) for r in range(q.shape[2])])
        for b in range(q.shape[0])
        for h in range(q.shape[1])
    ]
    return torch.stack(rows).view(*q.shape[:3], -1) @ v


@pytest.mark.parametrize("engine", ["reference", "block_sparse:torch"])
@pytest.mark.parametrize("topk", [None, 2])
def test_the_gradient_is_that_of_finite_differences(topk, engine):
    tensors = [t.requires_grad_() for t in qkv(13, heads=2, groups=1, d=4, batch=1)]
    options = {"block": 3, "topk": topk, "is_causal": True, "engine": engine}
    assert torch.autograd.gradcheck(lambda *t: landmark_attention(*t, **options), tensors, fast_mode=True)


def test_the_landmark_of_the_own_block_is_hidden_also_from_its_own_row():
    q, k, v = (t.requires_grad_() for t in qkv(12))
    out = landmark_attention(q, k, v, block=3, is_causal=True)
    for i in range(12):
        dk, dv = torch.autograd.grad(out[:, :, i].square().sum(), (k, v), retain_graph=True)
        own = i // 4 * 4 + 3
        assert not dk[:, :, own].any() and not dv[:, :, 3::4].any()
        earlier = dk[:, :, 3 : i // 4 * 4 : 4]
        assert (earlier.abs().amax((0, 1, 3)) > 0).all()


def test_more_landmarks_than_the_released_group_numbers_do_not_collide():
    # there: 64 groups in all
    q, k, v = qkv(300, heads=2, groups=1, batch=1)
    out = landmark_attention(q, k, v, block=2, is_causal=True)
    torch.testing.assert_close(out, expected(q, k, v, 2))


def test_small_weights_in_a_block_are_not_taken_for_an_empty_block():
    # there: a block whose sum is below one half is empty
    q, k, v = qkv(10, heads=2)
    k = k.clone()
    k[:, :, 4] += 60 * q[:, ::1, 9]
    out = landmark_attention(50 * q, k, v, block=4, is_causal=True)
    torch.testing.assert_close(out, expected(50 * q, k, v, 4))


def test_large_half_precision_scores_stay_finite():
    q, k, v = (t.to(torch.float16) for t in qkv(40))
    out = landmark_attention(30 * q, 30 * k, v, block=7, is_causal=True)
    assert out.isfinite().all()
    exact = expected((30 * q).double(), (30 * k).double(), v.double(), 7)
    torch.testing.assert_close(out.double(), exact, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("topk", [None, 2])
def test_a_step_is_the_row_of_the_whole(topk):
    q, k, v = qkv(23)
    whole = landmark_attention(q, k, v, block=4, topk=topk, is_causal=True)
    for t in (0, 3, 4, 5, 14, 22):
        step = landmark_attention(
            q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], block=4, topk=topk, pattern=Causal(), q_offset=t
        )
        torch.testing.assert_close(step, whole[:, :, t : t + 1])


def test_the_selection_holds_the_best_landmarks_of_each_row_and_head():
    q, k, _ = qkv(23)
    selection = landmark_select(q, k, block=4, topk=2)
    for b in range(2):
        for h in range(4):
            for i in range(23):
                scores = k[b, h // 2, 4::5] @ q[b, h, i]
                best = sorted(range(i // 5), key=lambda s: -scores[s])[:2]
                assert sorted(int(s) for s in selection.indices[b, h, i] if s >= 0) == sorted(best)


@pytest.mark.parametrize("options", [{"block": 3}, {"block": 3, "topk": 1}, {"block": 1, "topk": 2}])
def test_the_claims_hold_with_landmarks_in_the_sequence(options):
    """The battery again: its own example stays within a block, since a landmark's output does not see its own key."""
    (subject,) = [s for s in subjects("landmark") if s.name == "ops/landmark"]
    subject = dataclasses.replace(subject, card=dataclasses.replace(subject.card, options=options))
    for check in checks():
        if check.kind == "op" and check.name not in ("card_is_attached", "attends_causal_self"):
            row = run(check, subject)
            assert row.status != "failed", f"{check.name}: {row.message}"


def test_landmarks_are_checked_against_their_places():
    q, k, v = qkv(10)
    right = torch.arange(10) % 5 == 4
    plain = landmark_attention(q, k, v, block=4, is_causal=True)
    out = landmark_attention(q, k, v, block=4, is_landmark=right.expand(2, 10), is_causal=True)
    torch.testing.assert_close(out, plain)
    # a text shorter than a block has none, rightly
    landmark_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], block=4, is_landmark=right[:4], is_causal=True)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"is_landmark": torch.arange(10) % 4 == 3}, OptionError, "behind every 4 tokens.*position 3 is wrong"),
        ({"is_landmark": torch.zeros(10, dtype=torch.bool)}, OptionError, "no landmark found in 10 tokens"),
        ({"is_landmark": torch.zeros(10)}, ShapeError, "bool"),
        ({"is_landmark": torch.zeros(9, dtype=torch.bool)}, ShapeError, "M = 10"),
        ({"topk": 0}, OptionError, "topk of at least 1"),
        ({"topk": -1}, OptionError, "topk of at least 1"),
        ({"block": 0}, OptionError, "block of at least 1"),
    ],
)
def test_bad_settings_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        landmark_attention(*qkv(10), is_causal=True, **{"block": 4, **options})


def test_other_patterns_are_refused():
    with pytest.raises(Unsupported, match="Causal\\(\\) alone"):
        landmark_attention(*qkv(10), block=4, pattern=Causal() & SlidingWindow(3))
