"""Contrastive losses against loops."""

import math

import pytest
import torch

from regard import OptionError, ShapeError
from regard.primitives.contrastive import info_nce, retrieval_nce
from tests.oracles import normal


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def loop(queries, positives, negatives, temperature, in_batch):
    """-ln of the share of the right candidate, query by query."""
    losses = []
    for i, query in enumerate(queries):
        others = [x for j, x in enumerate(positives) if j != i] if in_batch else []
        rows = range(len(queries)) if in_batch else [i]
        others += [x for j in rows for x in (negatives[j] if negatives is not None else [])]
        right = math.exp(cosine(query, positives[i]) / temperature)
        losses.append(-math.log(right / (right + sum(math.exp(cosine(query, x) / temperature) for x in others))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("hard", [0, 1, 3])
@pytest.mark.parametrize("in_batch", [True, False])
def test_it_equals_a_loop_over_candidates(hard, in_batch):
    queries, positives, negatives = normal((4, 6), (4, 6), (4, hard, 6))
    given = negatives if hard else None
    if not hard and not in_batch:
        with pytest.raises(OptionError, match="give negatives="):
            retrieval_nce(queries, positives, given, temperature=0.1, in_batch=False)
        return
    found = retrieval_nce(queries, positives, given, temperature=0.1, in_batch=in_batch)
    assert float(found) == pytest.approx(loop(queries, positives, given, 0.1, in_batch), abs=1e-10)


def test_out_of_batch_other_rows_do_not_matter_and_in_batch_they_do():
    queries, positives, negatives = normal((4, 6), (4, 6), (4, 2, 6))
    for in_batch in (True, False):
        changed = positives.clone().requires_grad_()
        per_row = torch.stack(
            [
                retrieval_nce(q[None], p[None], n[None], temperature=0.1, in_batch=False)
                for q, p, n in zip(queries, changed, negatives, strict=True)
            ]
        ).mean()
        whole = retrieval_nce(queries, changed, negatives, temperature=0.1, in_batch=in_batch)
        assert torch.allclose(whole, per_row) is not in_batch


def test_the_symmetric_loss_is_that_of_the_transposed_table():
    (scores,) = normal((5, 5))
    torch.testing.assert_close(info_nce(scores, 0.1), info_nce(scores.T, 0.1))
    rows = -sum(math.log(row.exp()[i] / row.exp().sum()) for i, row in enumerate(scores / 0.1)) / 5
    assert float(info_nce(scores, 0.1, symmetric=False)) == pytest.approx(rows, abs=1e-10)
    assert float(info_nce(scores[:1, :1], 0.1)) == 0.0


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: info_nce(torch.randn(3, 4), 0.1), ShapeError, r"must be \(B, B\)"),
        (lambda: info_nce(torch.randn(4, 3), 0.1, symmetric=False), ShapeError, "M >= B"),
        (lambda: info_nce(torch.randn(3, 3), 0.0), OptionError, "above 0"),
        (lambda: retrieval_nce(torch.randn(3, 4), torch.randn(2, 4), temperature=1.0), ShapeError, r"\(2, 4\)"),
        (
            lambda: retrieval_nce(torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), temperature=1.0),
            ShapeError,
            r"\(B, K, C\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
