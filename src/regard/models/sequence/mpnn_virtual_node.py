"""A message passing network with a virtual node: rounds of messages with one exchange between each two.

    x_0 = W x;   x_1 = conv_1(x_0 + vn_0);   vn_l = MLP_l(vn_{l-1} + sum x_l),   x_{l+1} = conv_{l+1}(x_l + vn_l)

vn_0 is learned and starts at 0; there is no exchange after the last round.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, ShapeError
from regard.mixers.tokens.mpnn_virtual_node import Edges, VirtualNode, ends, graphs_of, message_passing
from regard.primitives.segments import segment_sum

CARD = ModelCard(
    slug="mpnn_virtual_node",
    part_of="mpnn_virtual_node",
    title="Message passing network with a virtual node",
    builds_on=("mpnn_virtual_node",),
    exports=("MPNNVirtualNode",),
    example="b=3 n=7 c=5",
    options={"features": 5, "classes": 4, "dim": 16, "depth": 3, "conv": "gine"},
    task="graphs to logits",
)


class MPNNVirtualNode(nn.Module):
    """Nodes (B, N, features) and their edges to logits of graphs (graphs, classes) or of nodes (B, N, classes).

    dim: width. depth: rounds of messages. conv: "gated", "gine" or "identity". level: "graph" reads the sum over the
    nodes, "node" each node. virtual_node: without, only messages remain. residual, dropout: see `VirtualNode`.
    Raises OptionError.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        dim: int = 64,
        depth: int = 4,
        conv: Literal["gated", "gine", "identity"] = "gated",
        level: Literal["graph", "node"] = "graph",
        virtual_node: bool = True,
        residual: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if depth < 1:
            raise OptionError(f"a network needs at least one round of messages, not {depth}")
        if level not in ("graph", "node"):
            raise OptionError(f"level is {level!r}; it is 'graph' or 'node'")
        self.features, self.level = features, level
        self.embed = nn.Linear(features, dim)
        self.start = nn.Parameter(torch.zeros(dim)) if virtual_node else None
        self.first = message_passing(conv, dim)
        later = range(depth - 1)
        self.exchanges = nn.ModuleList(
            VirtualNode(dim, conv=conv, residual=residual, dropout=dropout) for _ in (later if virtual_node else ())
        )
        self.rounds = nn.ModuleList(message_passing(conv, dim) for _ in (() if virtual_node else later))
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor, edges: Edges | None = None, *, padding: Tensor | None = None) -> Tensor:
        """edges: see `Edges`; without, each row is a graph without edges. padding: bool (B, N), True = a node.

        Raises ShapeError.
        """
        if x.dim() != 3 or x.shape[2] != self.features:
            raise ShapeError(f"nodes are {tuple(x.shape)}; they must be (B, N, {self.features}), one graph as B = 1")
        if padding is not None and (padding.dtype != torch.bool or padding.shape != x.shape[:2]):
            raise ShapeError(f"padding is {padding.dtype} {tuple(padding.shape)}; it must be bool {tuple(x.shape[:2])}")
        graph, graphs = graphs_of(x, edges)
        keep = None if padding is None else padding.flatten()
        nodes = self.embed(x).flatten(0, 1)
        messages = ends(nodes, edges, keep)
        nodes = self.first(nodes if self.start is None else nodes + self.start, *messages)
        for conv in self.rounds:
            nodes = conv(nodes, *messages)
        hidden = nodes.unflatten(0, x.shape[:2])
        vn = None if self.start is None else self.start.expand(graphs, -1)
        for exchange in self.exchanges:
            hidden, vn = exchange.exchange(hidden, vn, edges, padding)  # type: ignore[operator]
        if self.level == "node":
            return self.head(hidden)
        nodes = hidden.flatten(0, 1)
        return self.head(segment_sum(nodes if keep is None else nodes.masked_fill(~keep[:, None], 0.0), graph, graphs))
