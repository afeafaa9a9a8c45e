from __future__ import annotations

import pytest
import torch

from regard import ShapeError
from regard.primitives.segments import segment_softmax, segment_sum
from tests.oracles import normal

INDEX = torch.tensor([2, 0, 2, 4, 0, 2, 4])


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 3)])
def test_rows_are_summed_by_segment_in_any_order(shape):
    (x,) = normal(shape)
    out = segment_sum(x, INDEX, 6)
    for s in range(6):
        torch.testing.assert_close(out[s], x[INDEX.eq(s)].sum(0))
    assert (out[[1, 3, 5]] == 0).all()


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 3)])
def test_softmax_runs_over_the_rows_of_a_segment(shape):
    (x,) = normal(shape)
    out = segment_softmax(100 * x, INDEX, 6)
    for s in (0, 2, 4):
        torch.testing.assert_close(out[INDEX.eq(s)], torch.softmax(100 * x[INDEX.eq(s)], 0))


def test_hidden_scores_have_no_part_and_a_segment_of_them_gives_nothing():
    (x,) = normal((7, 2))
    hidden = torch.zeros(7, 2, dtype=torch.bool)
    hidden[[0, 1, 4], 0] = True
    masked = x.masked_fill(hidden, float("-inf")).requires_grad_()
    out = segment_softmax(masked, INDEX, 5)
    assert (out[hidden] == 0).all()
    torch.testing.assert_close(out[[2, 5], 0], torch.softmax(x[[2, 5], 0], 0))
    (grad,) = torch.autograd.grad(out.square().sum(), masked)
    assert grad.isfinite().all() and (grad[hidden] == 0).all()


def test_sums_of_half_precision_are_added_in_float32():
    x = torch.ones(4096, dtype=torch.bfloat16)
    out = segment_sum(x, torch.zeros(4096, dtype=torch.int64), 1)
    assert out.dtype is torch.bfloat16 and out.item() == 4096
    assert torch.zeros(1, dtype=torch.bfloat16).index_add(0, torch.zeros(4096, dtype=torch.int64), x).item() < 4096


def test_gradients_are_those_of_finite_differences():
    (x,) = (t.requires_grad_() for t in normal((7, 2)))
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, INDEX, 5), (x,))
    assert torch.autograd.gradcheck(lambda x: segment_softmax(x, INDEX, 5), (x,))


def test_nothing_to_sum():
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(segment_sum(torch.zeros(0, 3), none, 2), torch.zeros(2, 3))
    assert segment_softmax(torch.zeros(0, 3), none, 0).shape == (0, 3)


def test_an_index_that_does_not_fit_is_refused():
    x = torch.zeros(7, 2)
    for function in (segment_sum, segment_softmax):
        with pytest.raises(ShapeError, match="from 0 to 4; with 4 segments"):
            function(x, INDEX, 4)
        with pytest.raises(ShapeError, match="from -1 to 3"):
            function(x, INDEX - 1, 4)
        for index in (INDEX.int(), INDEX[:3], INDEX[None]):
            with pytest.raises(ShapeError, match="int64, one number a row"):
                function(x, index, 5)
