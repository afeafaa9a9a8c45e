"""Message passing with a virtual node: one more node that every node of a graph speaks to and hears from.

    vn = MLP(vn + sum over nodes of x),      x = conv(x + vn, edges)

One exchange is enough for linear attention: the virtual node sums phi(k) v' and phi(k) over the nodes, and each reads
them with its own phi(q). Departs from the released code: edges carry no features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.layers.attention import check_tokens
from regard.layers.feed_forward import Mlp
from regard.primitives.segments import segment_sum

CARD = MixerCard(
    slug="mpnn_virtual_node",
    title="Message passing with a virtual node",
    paper="On the Connection Between MPNN and Graph Transformer",
    exports=("VirtualNode", "Edges", "virtual_node_linear_attention"),
    example="b=2 n=10 c=16 h=4",
    options={"conv": "gine"},
    attends=("self",),
    padding=True,
    time="(n + edges) c^2",
    memory="(n + edges) c",
)


@dataclass(frozen=True, eq=False)
class Edges:
    """The graphs that tokens are nodes of. Node i of row b counts as b N + i.

    edge_index: int64 (2, E), from and to. batch: int64 (B N,), the graph of each node, in any order; the row if None.
    graphs: how many there are, the largest number in batch and one if None. Raises ShapeError.
    """

    edge_index: Tensor
    batch: Tensor | None = None
    graphs: int | None = None

    def __post_init__(self) -> None:
        index = self.edge_index
        if index.dtype != torch.int64 or index.dim() != 2 or index.shape[0] != 2:
            raise ShapeError(f"edge_index is {index.dtype} {tuple(index.shape)}; it must be int64 (2, E)")
        if self.batch is not None and (self.batch.dtype != torch.int64 or self.batch.dim() != 1):
            raise ShapeError(f"batch is {self.batch.dtype} {tuple(self.batch.shape)}; it must be int64, one a node")


class VirtualNode(nn.Module):
    """One exchange over the virtual node and one round of messages: (B, N, C) -> (B, N, C).

    dim: C. heads: taken for the frame's sake and not used. conv: "gated" (GatedGCN), "gine" (GINE without edge
    features) or "identity". residual: the virtual node keeps what it knew. dropout: of its update. The nodes are
    summed, not averaged: the sum grows with the graph. Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        conv: Literal["gated", "gine", "identity"] = "gated",
        residual: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise OptionError(f"dropout is a share in [0, 1), not {dropout}")
        self.dim, self.residual = dim, residual
        self.conv = message_passing(conv, dim)
        self.update = nn.Sequential(
            nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU()
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: Edges | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix the nodes (B, N, C) of graphs. context: their `Edges`; without, each row is a graph without edges.

        padding: bool (B, N), True = there is a node. The virtual node starts at 0. Raises Unsupported for a causal call,
        reset= and a context of tokens; ShapeError.
        """
        if context is not None and not isinstance(context, Edges):
            raise Unsupported(
                "mpnn_virtual_node reads no context of tokens: its context is Edges; softmax reads tokens"
            )
        if is_causal:
            raise Unsupported("mpnn_virtual_node is not causal: its virtual node hears every node; softmax is")
        if reset is not None:
            raise Unsupported("mpnn_virtual_node knows graphs, not document starts: give Edges(edge_index, batch)")
        check_tokens("VirtualNode", self.dim, x, None, padding, None, False)
        return self.exchange(x, None, context, padding)[0]

    def exchange(
        self, x: Tensor, vn: Tensor | None, edges: Edges | None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(nodes, virtual nodes) from both: x (B, N, C), vn (graphs, C), 0 if None."""
        nodes, keep = x.flatten(0, 1), None if padding is None else padding.flatten()
        graph, graphs = graphs_of(x, edges)
        shown = nodes if keep is None else nodes.masked_fill(~keep[:, None], 0.0)
        heard = segment_sum(shown, graph, graphs)
        new = self.dropout(self.update(heard if vn is None else heard + vn))
        if self.residual and vn is not None:
            new = vn + new
        return self.conv(nodes + new[graph], *ends(nodes, edges, keep)).view(x.shape), new


class GatedGCN(nn.Module):
    """x + relu(norm(A x_i + sum over j of g_ij B x_j / (sum of g_ij + 1e-6))), g_ij = sigmoid(D x_i + E x_j)."""

    def __init__(self, dim: int):
        super().__init__()
        self.own, self.other = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gate_to, self.gate_from = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """x (N, C), source, target (E,), weight (E,) of 0 and 1 or None -> (N, C)."""
        gate = torch.sigmoid(self.gate_to(x)[target] + self.gate_from(x)[source])
        if weight is not None:
            gate = gate * weight[:, None]
        total = segment_sum(gate, target, len(x))
        heard = segment_sum(gate * self.other(x)[source], target, len(x)) / (total + 1e-6)
        return x + F.relu(self.norm(self.own(x) + heard))


class GINE(nn.Module):
    """x + MLP((1 + eps) x_i + sum over j of relu(x_j)), eps learned."""

    def __init__(self, dim: int):
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.mlp = Mlp(dim, dim, act=nn.ReLU)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """As for `GatedGCN`."""
        message = F.relu(x)[source]
        if weight is not None:
            message = message * weight[:, None]
        return x + self.mlp((1 + self.eps) * x + segment_sum(message, target, len(x)))


class NoMessages(nn.Module):
    """The nodes as they are."""

    def forward(self, x: Tensor, source: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """As for `GatedGCN`."""
        return x


def virtual_node_linear_attention(
    x: Tensor,
    batch: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    phi: Callable[[Tensor], Tensor],
    *,
    graphs: int | None = None,
) -> Tensor:
    """Linear attention among the nodes of each graph by one exchange over a virtual node (theorem 4.1): (N, E).

    x (N, C), batch int64 (N,), w_q, w_k (C, D), w_v (C, E). phi: a feature map, non-negative. The virtual node is as
    wide as D (E + 1), whatever the number of nodes. A node whose weights are all 0 gets 0. Raises ShapeError.
    """
    if x.dim() != 2 or any(w.dim() != 2 or w.shape[0] != x.shape[1] for w in (w_q, w_k, w_v)):
        shapes = [tuple(t.shape) for t in (x, w_q, w_k, w_v)]
        raise ShapeError(f"x, w_q, w_k, w_v are {shapes}; they must be (N, C), (C, D), (C, D) and (C, E)")
    graphs = _count(batch) if graphs is None else graphs
    features, values = phi(x @ w_k), x @ w_v
    together = torch.cat((values, torch.ones_like(values[:, :1])), -1)
    known = segment_sum(features[:, :, None] * together[:, None], batch, graphs)
    read = (phi(x @ w_q)[:, None] @ known[batch]).squeeze(1)
    total = read[:, -1:]
    return read[:, :-1] / total.masked_fill(total == 0, 1.0)


def message_passing(name: str, dim: int) -> nn.Module:
    """A round of messages by name: "gated", "gine" or "identity". Raises OptionError."""
    if name == "identity":
        return NoMessages()
    if name not in ("gated", "gine"):
        raise OptionError(f"conv is {name!r}; it is 'gated', 'gine' or 'identity'")
    return GatedGCN(dim) if name == "gated" else GINE(dim)


def graphs_of(x: Tensor, edges: Edges | None) -> tuple[Tensor, int]:
    """The graph of each node of x (B, N, C), int64 (B N,), and how many graphs there are. Raises ShapeError."""
    rows, n = x.shape[:2]
    if edges is None or edges.batch is None:
        return torch.arange(rows, device=x.device).repeat_interleave(n), rows
    if len(edges.batch) != rows * n:
        raise ShapeError(f"batch names the graphs of {len(edges.batch)} nodes; there are {rows * n}")
    return edges.batch, _count(edges.batch) if edges.graphs is None else edges.graphs


def ends(nodes: Tensor, edges: Edges | None, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Source, target and weight of every edge between nodes (B N, C); 0 at nodes that are not there. Raises ShapeError."""
    if edges is None:
        none = torch.zeros(0, dtype=torch.int64, device=nodes.device)
        return none, none, None
    source, target = edges.edge_index
    if source.numel() and not torch.compiler.is_compiling():
        least, most = (int(edge) for edge in torch.aminmax(edges.edge_index))
        if least < 0 or most >= len(nodes):
            raise ShapeError(f"edge_index names the nodes {least} to {most}; there are 0 … {len(nodes) - 1}")
    return source, target, None if keep is None else (keep[source] & keep[target]).float()


def _count(batch: Tensor) -> int:
    return int(batch.max()) + 1 if batch.numel() else 0
