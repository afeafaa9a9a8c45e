"""Similarity of layers and the blocks that follow from it."""

from itertools import combinations, pairwise

import plotly.graph_objects as graphs
import pytest
import torch
import torch.nn.functional as F

from regard import LayerSimilarity, OptionError, ShareAttention, attention_similarity, propose_blocks, record, steer
from regard.hosts.transformers.specimens import make, prompt


@pytest.mark.parametrize("padded", [0, 4])
def test_similarity_is_the_mean_cosine_over_texts_and_heads(padded):
    inputs = prompt(length=10, padded=padded)
    tape = record(make("llama"), inputs, sites=("weights",))
    found = attention_similarity(tape).values
    for a in range(3):
        for b in range(3):
            cosines = []
            for row, start in enumerate((padded, 0)):
                parts = (tape["weights", layer][row, :, start:, start:].flatten(1) for layer in (a, b))
                cosines.append(F.cosine_similarity(*parts, dim=-1))
            torch.testing.assert_close(found[a, b], torch.stack(cosines).mean())


def test_layers_that_share_are_alike():
    model = make("llama")
    with steer(model, ShareAttention(((1, 2),))):
        shared = attention_similarity(record(model, prompt(), sites=("weights",))).values
    assert shared[1, 2] > 1 - 1e-5 > shared[0, 1]


def test_blocks_cover_the_inner_layers_in_order():
    table = LayerSimilarity(torch.ones(10, 10))
    assert propose_blocks(table, 4) == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert propose_blocks(table, 2, head=3, tail=2) in (
        [(3, 4), (5, 6), (7,)],
        [(3,), (4, 5), (6, 7)],
        [(3, 4), (5,), (6, 7)],
    )
    assert propose_blocks(table, 1, head=4, tail=4) == [(4,), (5,)]
    assert propose_blocks(table, 99, head=0, tail=0) == [tuple(range(10))]


def test_the_cut_is_the_best_of_all():
    draw = torch.Generator().manual_seed(0)
    for k in (2, 3, 4, 7):
        values = torch.rand(9, 9, generator=draw, dtype=torch.float64)
        values = (values + values.T) / 2
        inner, count = list(range(1, 8)), -(-7 // k)
        cuts = [(0, *ends, 7) for ends in combinations(range(1, 7), count - 1)]
        cuts = [[tuple(inner[a:b]) for a, b in pairwise(cut)] for cut in cuts]
        worth = {
            tuple(cut): sum(float(values[block[0], i]) for block in cut for i in block[1:])
            for cut in cuts
            if all(len(block) <= k for block in cut)
        }
        assert tuple(propose_blocks(LayerSimilarity(values), k)) == max(worth, key=worth.get)


def test_the_table_is_drawn():
    assert isinstance(LayerSimilarity(torch.eye(3)).figure(), graphs.Figure)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(OptionError, match="record all of them"):
        attention_similarity(record(make("llama"), prompt(), sites=("weights",), layers=(0, 2)))
    with pytest.raises(OptionError, match="k is at least 1"):
        propose_blocks(LayerSimilarity(torch.eye(4)), 0)
    with pytest.raises(OptionError, match="between head and tail"):
        propose_blocks(LayerSimilarity(torch.eye(4)), 2, head=2, tail=2)
