"""Cosines of all pairs and mutual neighbours, by hand."""

import torch
import torch.nn.functional as F

from regard.primitives.similarity import cosine, mutual


def test_cosines_of_all_pairs():
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(cosine(x, y), F.cosine_similarity(x[:, :, None], y[:, None], dim=-1))
    assert cosine(x[0], y).shape == (2, 4, 5)


def test_a_vector_of_zeros_is_like_nothing():
    x = torch.rand(3, 4, requires_grad=True)
    c = cosine(x * torch.tensor([[1.0], [0.0], [1.0]]), x)
    assert not c[1].any() and bool((c[0] > 0).all())
    c.sum().backward()
    assert x.grad.isfinite().all()


def test_pairs_that_are_each_others_best_keep_their_value():
    table = torch.tensor([[4.0, 2.0, 0.0], [1.0, 8.0, 0.0]])
    expected = torch.tensor([[4.0, 2 * (2 / 4) * (2 / 8), 0], [1 * (1 / 8) * (1 / 4), 8, 0]])
    torch.testing.assert_close(mutual(table), expected)
    assert not mutual(torch.zeros(2, 3)).any()
