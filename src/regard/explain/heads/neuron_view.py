"""Why a head looks where it looks: the product of query and key, number by number.

score of a key = scale * sum over d of q[d] k[d]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError
from regard.contract.optional import need
from regard.explain.heads.maps import HeadView, head_view
from regard.hosts.tape import Tape

CARD = ExplanationCard(
    slug="neuron_view",
    title="Queries and keys, number by number",
    exports=("neuron_view", "NeuronView"),
    reads="llama",
    takes={"tape": "tape"},
    options={"layer": 1, "head": 2},
    figure=True,
    builds_on=("maps",),
    baseline=True,
)


@dataclass(frozen=True, eq=False)
class NeuronView:
    """One query (D) of a head and all keys (M, D), as they meet; scale; weights (M) that came of it.

    token, key_tokens (M): their names. What else a score had, of biases, caps and masks, is in the weights alone.
    """

    query: Tensor
    keys: Tensor
    scale: float
    weights: Tensor
    token: str
    key_tokens: tuple[str, ...]
    title: str = ""

    @property
    def products(self) -> Tensor:
        """What each number adds to each score, (M, D)."""
        return self.scale * self.query * self.keys

    @property
    def scores(self) -> Tensor:
        """(M,)"""
        return self.products.sum(-1)

    def figure(self) -> Any:
        """A plotly figure: query, keys, products and weights beside each other, a line a key. Raises MissingExtra."""
        go, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        titles = [f"query of {self.token!r}", "keys", "products", "weight"]
        figure = subplots.make_subplots(
            1, 4, subplot_titles=titles, shared_yaxes=True, column_widths=[0.3, 0.3, 0.3, 0.1], horizontal_spacing=0.02
        )
        names = [f"{i} {token}" for i, token in enumerate(self.key_tokens)]
        query = self.query.expand_as(self.keys)
        for column, values in enumerate((query, self.keys, self.products), 1):
            most = float(values.abs().max())
            heat = go.Heatmap(
                z=values.float().numpy(), y=names, colorscale="RdBu", zmin=-most, zmax=most, showscale=False
            )
            figure.add_trace(heat, 1, column)
        figure.add_trace(go.Bar(x=self.weights.tolist(), y=names, orientation="h", showlegend=False), 1, 4)
        figure.update_yaxes(autorange="reversed")
        return figure.update_layout(title=self.title, height=160 + 18 * len(names))


def neuron_view(
    tape: Tape,
    *,
    layer: int,
    head: int,
    place: int = -1,
    row: int = 0,
    tokens: Sequence[str] | None = None,
    tokenizer: Any = None,
    step: int = 0,
) -> NeuronView:
    """One query of a head against all keys of its text, pads left out.

    tape: with q, k and full weights of all heads. place: of the query among the tokens that are no pads, negative from the
    end. row: of the batch. tokens, tokenizer, step: as of `head_view`. Raises OptionError, ShapeError.
    """
    if not tape.layers("q", step) or not tape.layers("k", step):
        raise OptionError('the tape lacks queries and keys: record with sites=("q", "k", "weights")')
    q, k = tape["q", layer, step], tape["k", layer, step]
    if not 0 <= head < q.shape[1] or q.shape[1] != tape.meta["heads"]:
        raise OptionError(f"head is {head}; the tape holds {q.shape[1]} of {tape.meta['heads']} heads, all are needed")
    view: HeadView = head_view(tape, tokens, tokenizer=tokenizer, row=row, layers=(layer,), heads=(head,), step=step)
    (weights,) = next(iter(view.weights.values()))
    if not -len(weights) <= place < len(weights):
        raise OptionError(f"place is {place}; there are {len(weights)} queries")
    place %= len(weights)
    padding = tape.meta.get("padding")
    real = torch.ones(k.shape[2], dtype=torch.bool)
    if padding is not None:
        # what is decoded after a prompt is no pad
        real[: padding.shape[1]] = padding[row].cpu()[: len(real)]
    own = head // (q.shape[1] // k.shape[1])
    queries = q[row, head].detach().cpu()[real[-q.shape[2] :]]
    return NeuronView(
        queries[place], k[row, own].detach().cpu()[real], float(tape.meta["scale"]), weights[place], view.tokens[place],
        view.key_tokens, f"layer {layer}, head {head}",
    )  # fmt: skip
