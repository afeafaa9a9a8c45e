from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import Edges, MPNNVirtualNode, OptionError, ShapeError
from tests.mixers.test_mpnn_virtual_node import moved, some_graphs
from tests.oracles import normal

COLOURS, NODES = 4, 20


def test_it_is_rounds_of_messages_with_an_exchange_between():
    torch.manual_seed(0)
    model = moved(MPNNVirtualNode(5, 3, dim=6, depth=3))
    (x,) = normal((1, 9, 5))
    batch, edge_index = some_graphs()
    h = model.embed(x[0])
    vn = model.start.expand(4, -1)
    convs = [model.first, *(e.conv for e in model.exchanges)]
    for round_, conv in enumerate(convs):
        h = conv(h + vn[batch], *edge_index, None)
        if round_ < 2:
            pooled = torch.stack([h[batch == graph].sum(0) for graph in range(4)])
            vn = model.exchanges[round_].update(pooled + vn)
    want = model.head(torch.stack([h[batch == graph].sum(0) for graph in range(4)]))
    torch.testing.assert_close(model(x, Edges(edge_index, batch)), want)


def test_the_virtual_node_starts_at_zero_and_is_learned():
    model = MPNNVirtualNode(5, 3, dim=6, depth=2)
    assert (model.start == 0).all() and model.start.requires_grad
    plain = MPNNVirtualNode(5, 3, dim=6, depth=2, virtual_node=False)
    assert plain.start is None and len(plain.rounds) == 1 and not plain.exchanges


@pytest.mark.parametrize("virtual_node", [True, False])
@pytest.mark.parametrize("level", ["graph", "node"])
def test_padded_nodes_change_nothing(level, virtual_node):
    torch.manual_seed(0)
    model = moved(MPNNVirtualNode(5, 3, dim=6, depth=2, level=level, virtual_node=virtual_node))
    (x,) = normal((1, 6, 5))
    edge_index = torch.tensor([[0, 5, 1, 2, 5], [1, 0, 2, 5, 4]])
    padding = torch.tensor([[True] * 5 + [False]])
    out = model(x, Edges(edge_index), padding=padding)
    cut = model(x[:, :5], Edges(torch.tensor([[0, 1], [1, 2]])))
    torch.testing.assert_close(out if level == "graph" else out[:, :5], cut)


def test_nodes_far_apart_are_one_step_apart_over_the_virtual_node():
    for virtual_node in (True, False):
        torch.manual_seed(0)
        model = moved(MPNNVirtualNode(5, 3, dim=6, depth=2, level="node", virtual_node=virtual_node))
        (x,) = normal((1, NODES, 5))
        x.requires_grad_()
        (grad,) = torch.autograd.grad(model(x, path(1))[0, -1].sum(), x)
        reached = grad[0].abs().amax(-1) > 0
        assert reached[-3:].all()
        assert reached[:-3].any() == virtual_node


def test_bad_settings_are_refused():
    for options, text in (
        ({"depth": 0}, "one round"),
        ({"level": "edge"}, "'graph' or 'node'"),
        ({"conv": "x"}, "conv"),
    ):
        with pytest.raises(OptionError, match=text):
            MPNNVirtualNode(5, 3, **options)
    model = MPNNVirtualNode(5, 3, dim=6)
    with pytest.raises(ShapeError, match=r"\(B, N, 5\), one graph as B = 1"):
        model(torch.zeros(4, 5))
    with pytest.raises(ShapeError, match="must be bool"):
        model(torch.zeros(1, 4, 5), padding=torch.ones(1, 4))


def path(rows):
    """The edges, both ways, of a path in every row."""
    one = torch.stack((torch.arange(NODES - 1), torch.arange(1, NODES)))
    both = torch.cat((one, one.flip(0)), 1)
    return Edges(torch.cat([both + NODES * row for row in range(rows)], 1))


def coloured(rows, generator):
    """Paths of coloured nodes; the first and the last are marked. The label is the first one's colour."""
    colours = torch.randint(COLOURS, (rows, NODES), generator=generator)
    marks = torch.zeros(rows, NODES, 2)
    marks[:, 0, 0] = marks[:, -1, 1] = 1
    return torch.cat((F.one_hot(colours, COLOURS).float(), marks), -1), colours[:, 0]


def copying(virtual_node, steps):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = MPNNVirtualNode(COLOURS + 2, COLOURS, dim=32, depth=2, level="node", virtual_node=virtual_node)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    edges = path(64)
    for _ in range(steps):
        x, label = coloured(64, generator)
        loss = F.cross_entropy(model(x, edges)[:, -1], label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    x, label = coloured(1024, torch.Generator().manual_seed(2))
    with torch.no_grad():
        return (model(x, path(1024))[:, -1].argmax(-1) == label).float().mean().item()


@pytest.mark.slow
def test_the_last_node_of_a_path_tells_the_colour_of_the_first(record):
    scores = {"with a virtual node": copying(True, 600), "messages alone": copying(False, 600)}
    record({"task": "path of 20 nodes, 4 colours, 2 rounds of messages, 600 steps", "chance": 1 / COLOURS, **scores})
    assert scores["with a virtual node"] > 0.95, scores
    assert scores["messages alone"] < 1 / COLOURS + 0.05, scores
