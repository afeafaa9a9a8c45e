"""Kinds of heads, told by where they look in random tokens that come twice.

    begin x1 … xn x1 … xn:   previous = w[i, i-1],   duplicate = w[i, i-n],   induction = w[i, i-n+1]

Each is the mean over rows i; of the last two, over rows of the second time. Random tokens leave nothing else to go by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError
from regard.contract.optional import need
from regard.explain.heads.maps import HeadMap
from regard.hosts.tape import record

CARD = ExplanationCard(
    slug="kinds",
    title="Induction, duplicate-token and previous-token heads",
    exports=("head_kinds", "HeadKinds"),
    reads="llama",
    takes={"model": "model"},
    options={"period": 8, "rows": 2},
    figure=True,
    builds_on=("maps",),
    baseline=True,
)

Kind = Literal["previous", "duplicate", "induction"]


@dataclass(frozen=True, eq=False)
class HeadKinds:
    """How much every head is of each kind, (L, H) between 0 and 1.

    uniform: what a head that looks at all keys alike gets, for the kinds in their order. period: tokens that come twice.
    """

    previous: Tensor
    duplicate: Tensor
    induction: Tensor
    uniform: tuple[float, float, float]
    period: int

    def heads(self, kind: Kind, *, threshold: float = 0.4) -> list[tuple[int, int]]:
        """The (layer, head) of a kind with at least `threshold`, the surest first. Raises OptionError."""
        return HeadMap(self._of(kind), kind).above(threshold)

    def figure(self) -> Any:
        """A plotly figure: the kinds beside each other, layers down, heads across. Raises MissingExtra."""
        go, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        kinds = get_args(Kind)
        figure = subplots.make_subplots(1, len(kinds), subplot_titles=kinds, shared_yaxes=True)
        for column, kind in enumerate(kinds, 1):
            z = self._of(kind).cpu().numpy()
            text = kind + ", layer %{y}, head %{x}: %{z:.3f}<extra></extra>"
            figure.add_trace(go.Heatmap(z=z, coloraxis="coloraxis", hovertemplate=text), 1, column)
        figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1})
        figure.update_yaxes(autorange="reversed", dtick=1)
        figure.update_xaxes(title="head", dtick=1)
        figure.update_yaxes(title="layer", col=1)
        return figure

    def _of(self, kind: Kind) -> Tensor:
        if kind not in get_args(Kind):
            raise OptionError(f"there is no kind {kind!r}; there are {', '.join(get_args(Kind))}")
        value: Tensor = getattr(self, kind)
        return value


def head_kinds(
    model: Any,
    *,
    period: int = 50,
    rows: int = 4,
    tokens: Sequence[int] | Tensor | None = None,
    begin: int | None = None,
    seed: int = 0,
) -> HeadKinds:
    """Read every head of a language model on rows of random tokens that come twice.

    period: how many tokens, at least 2. rows: of how many such texts the mean is taken. tokens: ids to draw from, the whole
    vocabulary but for the model's own signs if None; more than `period` ids are drawn without repetition. begin: the id that
    stands first, the model's own (`bos_token_id`) if None, where it has one. Raises OptionError, Unsupported.
    """
    if period < 2 or rows < 1:
        raise OptionError(f"period and rows are at least 2 and 1, not {period} and {rows}")
    config = model.config.get_text_config()
    if tokens is None:
        signs = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")]
        own = {i for sign in signs if sign is not None for i in (sign if isinstance(sign, list) else [sign])}
        tokens = [i for i in range(config.vocab_size) if i not in own]
    known = torch.as_tensor(tokens, dtype=torch.int64)
    if len(known) < 2 or int(known.min()) < 0 or int(known.max()) >= config.vocab_size:
        raise OptionError(f"tokens are at least 2 ids below {config.vocab_size}, the size of the vocabulary")
    first = config.bos_token_id if begin is None else begin
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack([_drawn(known, period, generator) for _ in range(rows)])
    start = once[:, :0] if first is None else torch.full((rows, 1), first)
    ids = torch.cat((start, once, once), 1)
    shift = start.shape[1]
    second = torch.arange(shift + period, shift + 2 * period)
    every = torch.arange(max(shift, 1), shift + 2 * period)
    looked = {"previous": (every, 1), "duplicate": (second, period), "induction": (second, period - 1)}
    tape = record(model, ids.to(model.device))
    found: dict[str, Tensor] = {}
    for kind, (queries, back) in looked.items():
        of_layers = [tape["weights", layer][:, :, queries, queries - back] for layer in tape.layers("weights")]
        found[kind] = torch.stack([weights.float().mean((0, 2)).cpu() for weights in of_layers])
    causal = bool((tape["weights", 0].triu(1) == 0).all())
    uniform = [
        float((1 / (queries + 1 if causal else torch.tensor([ids.shape[1]]))).mean()) for queries, _ in looked.values()
    ]
    return HeadKinds(**found, uniform=(uniform[0], uniform[1], uniform[2]), period=period)


def _drawn(known: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(known) > count:
        return known[torch.randperm(len(known), generator=generator)[:count]]
    return known[torch.randint(len(known), (count,), generator=generator)]
