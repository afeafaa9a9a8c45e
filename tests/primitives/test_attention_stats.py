"""Figures of weights against loops."""

import torch
import torch.nn.functional as F

from regard.primitives.attention_stats import column_means, column_sinks, layer_similarity
from tests.oracles import coin, normal


def test_column_means_count_the_rows_that_may_see_a_key():
    (scores,) = normal((2, 3, 5, 7))
    seen = coin(2, 1, 5, 7) & torch.ones(5, 7, dtype=torch.bool).tril(2)
    for visible, given in ((seen.expand_as(scores), seen), (torch.ones(5, 7).bool().tril(2).expand_as(scores), None)):
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
        found = column_means(weights, given)
        for b in range(2):
            for h in range(3):
                for j in range(7):
                    rows = [weights[b, h, i, j] for i in range(5) if visible[b, h, i, j]]
                    wanted = sum(rows) / len(rows) if rows else 0.0
                    torch.testing.assert_close(found[b, h, j].item(), float(wanted), rtol=0, atol=1e-12)


def test_means_of_half_precision_are_taken_in_float32():
    weights = torch.full((4096, 2), 0.01, dtype=torch.bfloat16)
    found = column_means(weights, torch.ones(4096, 2, dtype=torch.bool))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weights[0].float(), rtol=1e-5, atol=0)


def test_the_first_sink_is_left_out():
    means = torch.tensor([[0.5, 0.1, 0.4, 0.3], [0.0, 0.3, 0.1, 0.2], [0.1, 0.1, 0.1, 0.9]])
    assert column_sinks(means, 0.25).tolist() == [[False, False, True, True], [False] * 4, [False] * 4]
    assert column_sinks(means, torch.tensor([[0.35], [0.15], [0.05]])).tolist() == [
        [False, False, True, False],
        [False, False, False, True],
        [False, True, True, True],
    ]


def test_layer_similarity_is_the_mean_cosine():
    (scores,) = normal((3, 2, 4, 5, 5))
    weights = scores.softmax(-1)
    found = layer_similarity(weights)
    for a in range(3):
        for b in range(3):
            cosines = F.cosine_similarity(weights[a].flatten(2), weights[b].flatten(2), dim=-1)
            torch.testing.assert_close(found[a, b], cosines.mean())
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))


def test_pads_and_empty_heads_count_as_nothing():
    (scores,) = normal((2, 2, 3, 6, 6))
    weights = scores.softmax(-1)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, :2] = False
    both = layer_similarity(weights, valid)
    alone = [layer_similarity(weights[:, :1, :, 2:, 2:]), layer_similarity(weights[:, 1:])]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    weights[0, 0, 0] = 0
    torch.testing.assert_close(layer_similarity(weights)[0, 0], torch.tensor(5 / 6, dtype=torch.float64))
