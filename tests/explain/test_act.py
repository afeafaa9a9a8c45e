"""Sinks that are found are those of loops."""

import plotly.graph_objects as graphs
import pytest
import torch

from regard import OptionError, ShapeError, find_sinks, read_sinks, record
from regard.hosts.transformers.specimens import make, prompt
from tests.oracles import normal


def sinks(weights, bar):
    n = len(weights)
    above = [j for j in range(n) if sum(float(weights[i, j]) for i in range(j, n)) / (n - j) > bar]
    return above[1:]


def test_one_heads_sinks_equal_a_loop():
    (scores,) = normal((12, 12))
    scores[:, 5] += 4
    scores[:, 0] += 4
    weights = scores.masked_fill(~torch.ones(12, 12).bool().tril(), float("-inf")).softmax(-1)
    assert find_sinks(weights) == sinks(weights, 5 / 12) == [5]
    assert find_sinks(weights, alpha=None, threshold=0.1) == sinks(weights, 0.1)
    assert find_sinks(weights, alpha=12.0) == []


@pytest.mark.parametrize("padded", [0, 4])
def test_a_tapes_sinks_are_those_of_each_row_without_its_pads(padded):
    model, inputs = make("llama"), prompt(length=14, padded=padded)
    tape = record(model, inputs, sites=("weights",), layers=(0, 2))
    reading = read_sinks(tape, alpha=1.5)
    assert reading.layers == (0, 2)
    some = 0
    for layer in reading.layers:
        for head in range(4):
            for row, start in enumerate((padded, 0)):
                weights = tape["weights", layer][row, head, start:, start:]
                wanted = [j + start for j in sinks(weights, 1.5 / (14 - start))]
                assert reading.positions(layer, head, row) == wanted
                some += len(wanted)
    assert some == int(reading.sinks.sum()) > 0
    torch.testing.assert_close(reading.counts.sum(), torch.tensor(some / 2))
    behind = {name: torch.cat((x[:, padded:], x[:, :padded]), 1) for name, x in inputs.items()}
    if padded:
        turned = read_sinks(record(model, behind, sites=("weights",)), alpha=1.5)
        assert turned.positions(0, 1, 0) == [j - padded for j in reading.positions(0, 1, 0)]


def test_a_reading_is_drawn():
    reading = read_sinks(record(make("llama"), prompt(), sites=("weights",)))
    figure = reading.figure()
    assert isinstance(figure, graphs.Figure)
    assert torch.tensor(figure.data[0].z).shape == (3, 4)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ShapeError, match="one head"):
        find_sinks(torch.zeros(2, 3, 3))
    with pytest.raises(OptionError, match="give alpha="):
        find_sinks(torch.zeros(3, 3), threshold=0.1)
    with pytest.raises(OptionError, match="no full weights"):
        read_sinks(record(make("llama"), prompt(), sites=("z",)))
