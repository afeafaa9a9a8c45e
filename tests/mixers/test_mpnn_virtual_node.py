from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import (
    Edges,
    OptionError,
    ShapeError,
    Unsupported,
    VirtualNode,
    linear_attention,
    virtual_node_linear_attention,
)
from regard.mixers.tokens.mpnn_virtual_node import GINE, GatedGCN
from tests.oracles import normal

CONVS = ["gated", "gine", "identity"]


def layer(conv="gated", dim=6, **options):
    torch.manual_seed(1)
    return moved(VirtualNode(dim, conv=conv, **options))


def moved(module):
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm1d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return module


def some_graphs():
    """Three graphs whose nodes are mixed up, and one without nodes in between."""
    batch = torch.tensor([3, 0, 1, 0, 3, 1, 0, 3, 3])
    pairs = [(i, j) for i in range(9) for j in range(9) if batch[i] == batch[j] and (i * 7 + j * 3) % 4 == 0]
    return batch, torch.tensor(pairs).t()


def phi(x):
    return F.elu(x) + 1


def test_one_exchange_is_linear_attention_among_the_nodes_of_each_graph():
    x, wq, wk, wv = normal((9, 5), (5, 4), (5, 4), (5, 3))
    batch, _ = some_graphs()
    out = virtual_node_linear_attention(x, batch, wq, wk, wv, phi)
    for graph in (0, 1, 3):
        nodes = x[batch == graph][None, None]
        want = linear_attention(nodes @ wq, nodes @ wk, nodes @ wv, eps=0.0)
        assert (out[batch == graph] - want[0, 0]).abs().max() < 1e-10
    assert torch.autograd.gradcheck(
        lambda x, w: virtual_node_linear_attention(x, batch, w, wk, wv, phi), (x.requires_grad_(), wq.requires_grad_())
    )


def test_a_node_whose_weights_are_all_zero_gets_nothing():
    x, wq, wk, wv = normal((4, 5), (5, 4), (5, 4), (5, 3))
    batch = torch.zeros(4, dtype=torch.int64)
    out = virtual_node_linear_attention(x.requires_grad_(), batch, wq, 0 * wk, wv, torch.relu, graphs=3)
    assert (out == 0).all() and (torch.autograd.grad(out.sum(), x)[0] == 0).all()


@pytest.mark.parametrize("conv", CONVS)
def test_relabelling_the_nodes_relabels_the_output(conv):
    made, (x,) = layer(conv), normal((1, 9, 6))
    batch, edge_index = some_graphs()
    order = torch.randperm(9)
    back = torch.argsort(order)
    out = made(x, Edges(edge_index, batch))
    again = made(x[:, order], Edges(back[edge_index], batch[order]))
    torch.testing.assert_close(again, out[:, order])
    shuffled = torch.randperm(edge_index.shape[1])
    torch.testing.assert_close(made(x, Edges(edge_index[:, shuffled], batch)), out)


@pytest.mark.parametrize("conv", CONVS)
def test_graphs_in_a_batch_do_not_interact(conv):
    made, (x,) = layer(conv), normal((1, 9, 6))
    batch, edge_index = some_graphs()
    out = made(x, Edges(edge_index, batch))
    for graph in (0, 1, 3):
        nodes = (batch == graph).nonzero()[:, 0]
        place = torch.full((9,), -1)
        place[nodes] = torch.arange(len(nodes))
        inside = edge_index[:, batch[edge_index[0]] == graph]
        torch.testing.assert_close(made(x[:, nodes], Edges(place[inside])), out[:, nodes])
    other = x.clone()
    other[:, batch == 0] += 5
    assert torch.equal(made(other, Edges(edge_index, batch))[:, batch != 0], out[:, batch != 0])


def test_rows_are_graphs_and_edges_count_over_all_rows():
    made, (x,) = layer("gine"), normal((2, 4, 6))
    edge_index = torch.tensor([[0, 1, 6], [1, 2, 5]])
    out = made(x, Edges(edge_index))
    torch.testing.assert_close(out[:1], made(x[:1], Edges(edge_index[:, :2])))
    torch.testing.assert_close(out[1:], made(x[1:], Edges(edge_index[:, 2:] - 4)))


def test_without_edges_and_messages_it_is_a_deep_sets_layer():
    made, (x,) = layer("identity"), normal((3, 5, 6))
    torch.testing.assert_close(made(x), x + made.update(x.sum(1))[:, None])


def test_the_nodes_are_summed_not_averaged():
    made, (x,) = layer("identity"), normal((1, 3, 6))
    heard = []
    made.update.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    made(x)
    made(torch.cat((x, x), 1))
    torch.testing.assert_close(heard[1], 2 * heard[0])


@pytest.mark.parametrize("residual", [False, True])
def test_the_virtual_node_goes_on_from_what_it_was_and_nothing_is_written_to(residual):
    made, (x, vn) = layer("identity", residual=residual), normal((2, 4, 6), (2, 6))
    kept, nodes = vn.clone(), x.clone()
    out, new = made.exchange(x, vn, None)
    assert torch.equal(vn, kept) and torch.equal(x, nodes)
    want = made.update(x.sum(1) + vn) + (vn if residual else 0)
    torch.testing.assert_close(new, want)
    torch.testing.assert_close(out, x + want[:, None])


def test_gated_messages_are_a_mean_weighted_by_gates():
    made, (x,) = moved(GatedGCN(6)), normal((9, 6))
    _, edge_index = some_graphs()
    out = made(x, *edge_index, None)
    for i in range(9):
        sources = [int(s) for s, t in edge_index.t() if t == i]
        total, heard = torch.zeros(6).double(), torch.zeros(6).double()
        for j in sources:
            gate = torch.sigmoid(made.gate_to(x[i]) + made.gate_from(x[j]))
            total, heard = total + gate, heard + gate * made.other(x[j])
        row = made.norm((made.own(x[i]) + heard / (total + 1e-6))[None])[0]
        torch.testing.assert_close(out[i], x[i] + F.relu(row))


def test_messages_of_an_isomorphism_network_are_sums():
    made, (x,) = moved(GINE(6)), normal((9, 6))
    _, edge_index = some_graphs()
    out = made(x, *edge_index, None)
    for i in range(9):
        heard = sum((F.relu(x[s]) for s, t in edge_index.t() if t == i), torch.zeros(6).double())
        torch.testing.assert_close(out[i], x[i] + made.mlp((1 + made.eps) * x[i] + heard))


@pytest.mark.parametrize("conv", CONVS)
def test_edges_of_padded_nodes_carry_nothing(conv):
    made, (x,) = layer(conv), normal((1, 6, 6))
    edge_index = torch.tensor([[0, 5, 1, 2, 5], [1, 0, 2, 5, 4]])
    padding = torch.tensor([[True] * 5 + [False]])
    out = made(x, Edges(edge_index), padding=padding)[:, :5]
    torch.testing.assert_close(out, made(x[:, :5], Edges(torch.tensor([[0, 1], [1, 2]]))))


@pytest.mark.parametrize("conv", ["gated", "gine"])
def test_with_edges_a_gradient_reaches_every_parameter(conv):
    made, (x,) = layer(conv), normal((1, 9, 6))
    batch, edge_index = some_graphs()
    out = made(x, Edges(edge_index, batch))
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in made.parameters())


def test_graphs_without_nodes_are_allowed():
    made, (x,) = layer("gine"), normal((1, 2, 6))
    none = torch.zeros(2, 0, dtype=torch.int64)
    _, vn = made.exchange(x, None, Edges(none, torch.tensor([2, 0]), graphs=5))
    assert vn.shape == (5, 6)
    torch.testing.assert_close(vn[1], made.update(torch.zeros(1, 6).double())[0])
    assert made(x[:, :0], Edges(none)).shape == (1, 0, 6)


def test_what_does_not_fit_is_refused():
    made, (x,) = layer(), normal((2, 4, 6))
    with pytest.raises(ShapeError, match=r"names the nodes 1 to 8; there are 0 … 7"):
        made(x, Edges(torch.tensor([[1, 2], [8, 1]])))
    with pytest.raises(ShapeError, match=r"the nodes -1 to 2"):
        made(x, Edges(torch.tensor([[1, 2], [-1, 1]])))
    with pytest.raises(ShapeError, match=r"int64 \(2, E\)"):
        Edges(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"int64 \(2, E\)"):
        Edges(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="one a node"):
        Edges(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    none = torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises(ShapeError, match="graphs of 7 nodes; there are 8"):
        made(x, Edges(none, torch.zeros(7, dtype=torch.int64)))
    with pytest.raises(ShapeError, match="from 0 to 3; with 2 segments"):
        made(x, Edges(none, torch.tensor([0, 0, 0, 0, 1, 1, 3, 3]), graphs=2))
    with pytest.raises(Unsupported, match="its context is Edges"):
        made(x, x)
    with pytest.raises(Unsupported, match="hears every node"):
        made(x, is_causal=True)
    with pytest.raises(Unsupported, match="not document starts"):
        made(x, reset=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(OptionError, match="'gated', 'gine' or 'identity'"):
        VirtualNode(6, conv="gat")
    with pytest.raises(OptionError, match=r"in \[0, 1\)"):
        VirtualNode(6, dropout=1.0)
    (nodes,) = normal((4, 5))
    with pytest.raises(ShapeError, match=r"\(C, D\)"):
        virtual_node_linear_attention(nodes, torch.zeros(4, dtype=torch.int64), *[torch.zeros(6, 2).double()] * 3, phi)
