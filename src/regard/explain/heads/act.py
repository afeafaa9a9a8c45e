"""Attention sinks as ACT finds them: keys that get far more weight than their share from the rows that may see them.

c_j = mean of A_ij over the rows i that may see j;   above: c_j > alpha / N
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.hosts.tape import Tape
from regard.primitives.attention_stats import column_means, column_sinks, sink_bar

CARD = ExplanationCard(
    slug="act",
    title="Attention sinks found",
    part_of="act",
    paper="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
    "Attention Calibration",
    exports=("find_sinks", "read_sinks", "SinkReading"),
    reads="llama",
    takes={"tape": "tape"},
    calls="read_sinks",
    figure=True,
)


@dataclass(frozen=True, eq=False)
class SinkReading:
    """What keys get in every layer and head. means: (L, B, H, M); sinks: bool, the same shape, without the first of each.

    layers: which layers of the model they are.
    """

    means: Tensor
    sinks: Tensor
    layers: tuple[int, ...]

    def positions(self, layer: int, head: int, row: int = 0) -> list[int]:
        """Where the sinks of a head stand in a row of the batch."""
        return self.sinks[self.layers.index(layer), row, head].nonzero().flatten().tolist()

    @property
    def counts(self) -> Tensor:
        """How many sinks each head has, the mean over rows of the batch: (L, H)."""
        return self.sinks.float().sum(-1).mean(1)

    def figure(self) -> Any:
        """The counts as a plotly figure. Raises MissingExtra without plotly."""
        graphs = need("plotly.graph_objects", "bench")
        figure = graphs.Figure(graphs.Heatmap(z=self.counts.tolist(), y=[str(layer) for layer in self.layers]))
        return figure.update_layout(title="Attention sinks", xaxis_title="head", yaxis_title="layer")


def find_sinks(weights: Tensor, *, alpha: float | None = 5.0, threshold: float | None = None) -> list[int]:
    """The keys of one head that are sinks and not its first one: weights (N, M), causal, of one row without pads.

    alpha: they get more than alpha / M on average; or threshold, with alpha=None, the bar itself. Raises ShapeError,
    OptionError.
    """
    if weights.dim() != 2:
        raise ShapeError(f"find_sinks takes the weights (N, M) of one head, not {tuple(weights.shape)}; see read_sinks")
    bar = sink_bar(torch.tensor(weights.shape[1]), alpha, threshold)
    return column_sinks(column_means(weights), bar).nonzero().flatten().tolist()


def read_sinks(tape: Tape, *, alpha: float | None = 5.0, threshold: float | None = None, step: int = 0) -> SinkReading:
    """The sinks of every layer and head on a tape that holds full weights of a causal model.

    alpha, threshold: as in `find_sinks`; N counts a row's tokens without pads. Raises OptionError.
    """
    layers = tape.layers("weights", step)
    if not layers:
        raise OptionError('the tape holds no full weights: record with sites=("weights",) and reduce="full"')
    weights = tape.stack("weights", step=step)
    n, m = weights.shape[-2:]
    padding = tape.meta.get("padding")
    real = torch.ones(weights.shape[1], m, dtype=torch.bool) if padding is None else padding[:, :m].cpu()
    real = real.to(weights.device)
    seen = real[:, -n:, None] & real[:, None, :] & torch.ones(n, m, dtype=torch.bool, device=real.device).tril(m - n)
    means = column_means(weights, seen[None, :, None])
    bar = sink_bar(real.sum(-1), alpha, threshold)
    sinks = column_sinks(means, bar if bar.dim() == 0 else bar[None, :, None, None])
    return SinkReading(means, sinks, tuple(layers))
