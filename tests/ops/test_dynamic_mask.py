from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import (
    OptionError,
    ShapeError,
    Unsupported,
    dynamic_mask_attention,
    dynamic_mask_keys,
    dynamic_mask_score,
)
from regard.patterns import Causal, Documents, KeyValid, SlidingWindow
from tests.oracles import attention, coin, normal


def sets(score, window, *, causal=True, valid=None, doc=None, rows=None):
    """The keys of each row by the definition, bool (B, G, N, M): sort what is visible, take the first `window`."""
    batch, groups, m = score.shape
    rows = range(m) if rows is None else rows
    out = torch.zeros(batch, groups, len(rows), m, dtype=torch.bool)
    for b in range(batch):
        for g in range(groups):
            for r, i in enumerate(rows):
                seen = [j for j in range(m) if j <= i or not causal]
                seen = [j for j in seen if valid is None or valid[b, j]]
                seen = [j for j in seen if doc is None or doc[b, j] == doc[b, i]]
                for j in sorted(seen, key=lambda j: (-score[b, g, j].item(), j))[:window]:
                    out[b, g, r, j] = True
    return out


def expected(q, k, v, score, chosen, scale=None):
    share = q.shape[1] // k.shape[1]
    allowed, bias = chosen.repeat_interleave(share, 1), score.repeat_interleave(share, 1)[:, :, None]
    return attention(q, k, v, allowed=allowed, bias=bias, scale=scale)[0]


def inputs(n=19, groups=2, heads=4, batch=2, seed=0):
    q, k, v, score = normal(
        (batch, heads, n, 8), (batch, groups, n, 8), (batch, groups, n, 6), (batch, groups, n), seed=seed
    )
    return q, k, v, score


def ties(n=19, groups=2, batch=2, levels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, levels, (batch, groups, n), generator=generator).double()


def weights_of(score, **options):
    """Which keys a row reads: the values are the unit vectors."""
    batch, groups, m = score.shape
    n = options.pop("n", m)
    q, k = normal((batch, groups, n, 4), (batch, groups, m, 4))
    v = torch.eye(m, dtype=torch.float64).expand(batch, groups, m, m)
    return dynamic_mask_attention(q, k, v, score, **options) > 0


@pytest.mark.parametrize("window", [1, 4, 18, 19, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_softmax_over_the_best_keys_with_their_score_as_bias(window, causal):
    q, k, v, score = inputs()
    out = dynamic_mask_attention(q, k, v, score, window=window, is_causal=causal)
    torch.testing.assert_close(out, expected(q, k, v, score, sets(score, window, causal=causal)))


@pytest.mark.parametrize("n, window", [(19, 5), (200, 7), (300, 90)])
def test_the_choice_is_that_of_sorting_each_row_and_ties_go_to_the_earlier_key(n, window):
    score = ties(n)
    assert torch.equal(weights_of(score, window=window, is_causal=True), sets(score, window))


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_as_long_as_the_keys_is_dense_attention_with_a_key_bias(causal):
    q, k, v, score = inputs()
    dense = regard.softmax_attention(q, k, v, bias=score.repeat_interleave(2, 1)[:, :, None], is_causal=causal)
    for engine in (None, "gather", "block_sparse", "reference"):
        out = dynamic_mask_attention(q, k, v, score, window=19, is_causal=causal, engine=engine)
        torch.testing.assert_close(out, dense)


def test_without_preference_it_is_plain_attention_while_all_keys_fit():
    q, k, v, _ = inputs()
    (weight,) = normal((2, 12))
    score = dynamic_mask_score(v, weight, torch.zeros(2).double())
    assert torch.equal(score, torch.ones_like(score))
    plain = regard.softmax_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(dynamic_mask_attention(q, k, v, score, window=19, is_causal=True), plain)
    # beyond that, equal scores keep the first keys
    first = weights_of(score, window=5, is_causal=True)
    assert first[..., :5].sum() == first.sum()


def test_the_score_is_that_of_the_paper_head_by_head():
    # as many keys as heads: a factor a key instead of a factor a head would not show in shapes
    v, weight, a = normal((2, 3, 3, 4), (3, 12), (3,))
    for exp in (True, False):
        score = dynamic_mask_score(v, weight, a, exp=exp)
        for b in range(2):
            for j in range(3):
                joined = torch.cat([v[b, g, j] for g in range(3)])
                for g in range(3):
                    want = a[g] * F.softplus(weight[g] @ joined)
                    torch.testing.assert_close(score[b, g, j], want.exp() if exp else want)


@pytest.mark.parametrize("window", [1, 3, 6])
@pytest.mark.parametrize("at", [0, 7, 18])
def test_a_later_token_changes_no_earlier_output(window, at):
    q, k, v, _ = inputs()
    weight, a = normal((2, 12), (2,), seed=3)

    def run(k, v):
        return dynamic_mask_attention(q, k, v, dynamic_mask_score(v, weight, a), window=window, is_causal=True)

    before = run(k, v)
    k, v = k.clone(), v.clone()
    k[:, :, at] += 5
    v[:, :, at] -= 5
    after = run(k, v)
    assert torch.equal(before[:, :, :at], after[:, :, :at])
    assert not torch.allclose(before[:, :, at:], after[:, :, at:])


@pytest.mark.parametrize("engine", [None, "gather", "block_sparse"])
def test_gradients_are_those_of_the_dense_definition(engine):
    q, k, v, _ = inputs()
    weight, a = normal((2, 12), (2,), seed=3)
    given = [t.requires_grad_() for t in (q, k, v, weight, a)]
    chosen = sets(dynamic_mask_score(v, weight, a).detach(), 5)
    (upstream,) = normal((2, 4, 19, 6), seed=5)

    def grads(run):
        score = dynamic_mask_score(v, weight, a)
        return torch.autograd.grad((run(score) * upstream).sum(), given)

    ours = grads(lambda score: dynamic_mask_attention(q, k, v, score, window=5, is_causal=True, engine=engine))
    theirs = grads(lambda score: expected(q, k, v, score, chosen))
    for got, want in zip(ours, theirs, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_never_chosen(causal):
    score, valid = ties(), coin(2, 19)
    valid[:, 0] = True
    pattern = KeyValid().bind(key_valid=valid)
    seen = weights_of(
        score + 50.0 * ~valid[:, None], window=5, pattern=Causal() & pattern if causal else pattern,
        is_causal=None if causal else False,
    )  # fmt: skip
    assert torch.equal(seen, sets(score, 5, causal=causal, valid=valid))
    assert not (seen & ~valid[:, None, None]).any()


def test_documents_have_lists_of_their_own():
    score, doc = ties(200), (torch.arange(200) // 70).expand(2, 200)
    seen = weights_of(score, window=9, pattern=Causal() & Documents().bind(doc=doc))
    assert torch.equal(seen, sets(score, 9, doc=doc))


def test_a_row_may_do_without_its_own_key():
    score = torch.tensor([[[5.0, 4.0, 3.0, 2.0]]]).double()
    seen = weights_of(score, window=2, is_causal=True)[0, 0]
    assert seen.tolist() == [
        [True, False, False, False], [True, True, False, False], [True, True, False, False], [True, True, False, False],
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_fewer_keys_than_the_window_see_these_alone_and_stay_finite(dtype):
    q, k, v, score = (t.to(dtype) for t in inputs())
    # gather is the engine of this op; scores near the end of the range of float32 are no hidden keys to it
    for engine, low in (("gather", 3e38), ("block_sparse", 1e9)):
        large = score - min(low, 3e4 if dtype is torch.float16 else low)
        out = dynamic_mask_attention(q, k, v, large, window=12, is_causal=True, engine=engine)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, :, 0], v[:, :, 0].repeat_interleave(2, 1))


@pytest.mark.parametrize("start, n", [(0, 19), (7, 12), (18, 1), (3, 4)])
def test_late_queries_are_their_rows_of_the_whole(start, n):
    q, k, v, score = inputs()
    whole = dynamic_mask_attention(q, k, v, score, window=4, is_causal=True)[:, :, start : start + n]
    stop = start + n
    late = dynamic_mask_attention(
        q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], score[..., :stop], window=4, pattern=Causal(),
        q_offset=start,
    )  # fmt: skip
    torch.testing.assert_close(late, whole)


def test_a_key_that_fell_out_never_returns_so_the_list_of_the_last_row_is_enough():
    score = ties(80, levels=6)
    chosen = sets(score, 7)
    seen_before, gone = torch.zeros_like(chosen[:, :, 0]), torch.zeros_like(chosen[:, :, 0])
    for i in range(80):
        now = chosen[:, :, i]
        assert not (now & gone).any()
        gone |= seen_before & ~now
        seen_before |= now
        gone[..., i] |= ~now[..., i]
    for n in (3, 30, 80):
        keys = dynamic_mask_keys(score[..., :n], 7)
        held = torch.zeros(2, 2, n, dtype=torch.bool).scatter(-1, keys, True)
        assert torch.equal(held, chosen[:, :, n - 1, :n])
        assert (keys.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, block", [(5, 1), (5, 4), (9, 8), (17, 5), (40, 4)])
def test_smoothing_keeps_blocks_of_which_most_visible_keys_were_chosen(window, block, causal):
    score, valid = ties(31), coin(2, 31, p=0.8)
    valid[:, 0] = True
    pattern = KeyValid().bind(key_valid=valid)
    seen = weights_of(
        score, window=window, block_smooth=block, pattern=Causal() & pattern if causal else pattern,
        is_causal=None if causal else False,
    )  # fmt: skip
    chosen = sets(score, window, causal=causal, valid=valid)
    want = torch.zeros_like(chosen)
    for b in range(2):
        for i in range(31):
            visible = [j for j in range(31) if valid[b, j] and (j <= i or not causal)]
            for start in range(0, 31, block):
                mine = [j for j in visible if start <= j < start + block]
                for g in range(2):
                    if 2 * int(chosen[b, g, i, mine].sum()) > len(mine):
                        want[b, g, i, mine] = True
    assert torch.equal(seen, want)


def test_blocks_of_one_key_change_nothing():
    q, k, v, score = inputs()
    plain, smooth = (
        dynamic_mask_attention(q, k, v, score, window=5, is_causal=True, block_smooth=block) for block in (None, 1)
    )
    torch.testing.assert_close(smooth, plain)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"window": 0, "is_causal": True}, OptionError, "window of at least 1 key, not 0"),
        ({"window": 4}, OptionError, "pass is_causal=True, or is_causal=False"),
        ({"window": 4, "pattern": KeyValid().bind(key_valid=torch.ones(2, 19, dtype=torch.bool))}, OptionError,
         "pass is_causal=True"),
        ({"window": 4, "is_causal": True, "block_smooth": 0}, OptionError, "at least 1, not 0"),
        ({"window": 4, "pattern": Causal() & SlidingWindow(3)}, Unsupported, "cannot follow the pattern"),
        ({"window": 4, "is_causal": True, "pattern": Causal()}, OptionError, "says it twice"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        dynamic_mask_attention(*inputs(), **options)


def test_a_score_of_other_heads_is_refused():
    q, k, v, score = inputs()
    with pytest.raises(ShapeError, match="axis g"):
        dynamic_mask_attention(q, k, v, score.repeat_interleave(2, 1), window=4, is_causal=True)
    with pytest.raises(ShapeError, match="must be"):
        dynamic_mask_score(v, torch.zeros(2, 6).double(), torch.zeros(2).double())
    with pytest.raises(ShapeError, match="must be"):
        dynamic_mask_score(v, torch.zeros(2, 12).double(), torch.zeros(4).double())
    with pytest.raises(OptionError, match="at least 1"):
        dynamic_mask_keys(score, 0)
