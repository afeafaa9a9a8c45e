from __future__ import annotations

import math
import random

import pytest
import torch

from regard import Explicit, OptionError, merge
from regard.engines.dense import dense
from tests.oracles import attention, coin, normal


def parts(q, k, v, masks):
    done = [dense(q, k, v, Explicit().bind(mask=m), return_lse=True) for m in masks]
    return [d.out for d in done], [d.lse for d in done]


def split(seen, sets, seed=1):
    """Every allowed pair goes to one of the sets; some rows of some sets stay empty."""
    owner = torch.randint(sets, seen.shape, generator=torch.Generator().manual_seed(seed))
    return [seen & (owner == s) for s in range(sets)]


@pytest.mark.parametrize("sets", [1, 2, 3, 7])
def test_a_union_of_disjoint_key_sets_is_attended_exactly(sets):
    q, k, v = normal((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    seen = coin(2, 4, 5, 7)
    seen[:, :, 3] = False
    outs, lses = parts(q, k, v, split(seen, sets))
    assert sets == 1 or any(torch.isneginf(lse[:, :, 0]).any() for lse in lses), "some set must be empty for some row"
    out, lse = merge(outs, lses)
    want, want_lse = attention(q, k, v, allowed=seen)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert (out[:, :, 3] == 0).all()
    assert torch.isneginf(lse[:, :, 3]).all()


def test_a_set_without_any_key_changes_nothing():
    q, k, v = normal((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    whole, none = dense(q, k, v, return_lse=True), dense(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    out, lse = merge([none.out, whole.out], [none.lse, whole.lse])
    torch.testing.assert_close(out, whole.out)
    torch.testing.assert_close(lse, whole.lse)


def test_gradients_flow_through_outs_and_log_sum_exps():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3)))
    seen = coin(1, 2, 3, 5)
    seen[:, :, 1] = False
    masks = split(seen, 3)
    assert torch.autograd.gradcheck(lambda q, k, v: merge(*parts(q, k, v, masks))[0], (q, k, v))
    got = torch.autograd.grad(merge(*parts(q, k, v, masks))[0].square().sum(), (q, k, v))
    want = torch.autograd.grad(dense(q, k, v, mask=seen, engine="reference").out.square().sum(), (q, k, v))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert (got[0][:, :, 1] == 0).all()


def test_treating_the_log_sum_exp_as_a_constant_would_give_another_gradient():
    q, k, v = (x.requires_grad_() for x in normal((1, 1, 3, 4), (1, 1, 6, 4), (1, 1, 6, 3)))
    halves = [dense(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 3), slice(3, 6))]
    with_lse, _ = merge([h.out for h in halves], [h.lse for h in halves])
    without, _ = merge([h.out for h in halves], [h.lse.detach() for h in halves])
    right, wrong = (torch.autograd.grad(o.square().sum(), k, retain_graph=True)[0] for o in (with_lse, without))
    assert not torch.allclose(right, wrong)


def test_the_order_and_bracketing_of_the_merge_do_not_matter():
    q, k, v = normal((1, 2, 3, 4), (1, 2, 9, 4), (1, 2, 9, 4))
    want = dense(q, k, v).out
    leaves = [dense(q, k[:, :, j : j + 1], v[:, :, j : j + 1], return_lse=True) for j in range(9)]
    for seed in range(10):
        dice = random.Random(seed)
        left = [(leaf.out, leaf.lse) for leaf in leaves]
        while len(left) > 1:
            i, j = dice.sample(range(len(left)), 2)
            a, b = left[i], left[j]
            left = [x for at, x in enumerate(left) if at not in (i, j)] + [merge([a[0], b[0]], [a[1], b[1]])]
        torch.testing.assert_close(left[0][0], want, atol=1e-12, rtol=0)


def test_large_scores_do_not_overflow():
    outs = [torch.ones(1, 1, 1, 2), 3 * torch.ones(1, 1, 1, 2)]
    out, lse = merge(outs, [torch.full((1, 1, 1), 1e4), torch.full((1, 1, 1), 1e4)])
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 2.0))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 1e4 + math.log(2)))


def test_as_many_outs_as_log_sum_exps_are_asked_for():
    with pytest.raises(OptionError, match="at least one"):
        merge([], [])
    with pytest.raises(OptionError, match="got 1 and 2"):
        merge([torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 1, 1)] * 2)
