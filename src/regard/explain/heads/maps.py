"""Views of attention weights: a table tokens x tokens for every head, and one number for every head and layer.

    sink = mean over rows of the weight on the first keys,      entropy = mean over rows of -sum w ln w

Views read what a tape holds, or weights as other tools give them: a tuple over layers of (B, H, N, M).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.hosts.tape import Tape
from regard.primitives.attention_stats import entropy

CARD = ExplanationCard(
    slug="maps",
    title="Views of heads: tables, sinks, entropies",
    exports=("head_view", "HeadView", "sink_map", "entropy_map", "HeadMap"),
    reads="llama",
    takes={"source": "tape"},
    figure=True,
    baseline=True,
)

# numbers in one figure; a page of more is too slow to open
_MOST = 30_000_000
# beyond so many tokens their names would cover each other
_NAMED = 64


@dataclass(frozen=True, eq=False)
class HeadView:
    """The weights of one text: layer -> (H, N, M), tokens (N) that ask, key_tokens (M) that are asked.

    boundary: where a second sentence starts, None without one.
    """

    weights: dict[int, Tensor]
    tokens: tuple[str, ...]
    key_tokens: tuple[str, ...]
    boundary: int | None = None

    def figure(self) -> Any:
        """A plotly figure: the heads of a layer beside each other, a menu of layers. Raises MissingExtra, OptionError."""
        count = sum(w.numel() for w in self.weights.values())
        if count > _MOST:
            raise OptionError(f"{count} weights are too many for one figure ({_MOST} at most): give layers= or heads=")
        go, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        heads = max(len(w) for w in self.weights.values())
        columns = min(heads, 4)
        rows = -(-heads // columns)
        figure = subplots.make_subplots(
            rows, columns, subplot_titles=[f"head {h}" for h in range(heads)], shared_xaxes="all", shared_yaxes="all",
            horizontal_spacing=0.02, vertical_spacing=0.06,
        )  # fmt: skip
        owners = []
        for layer, weights in self.weights.items():
            for head, table in enumerate(weights):
                owners.append(layer)
                trace = go.Heatmap(
                    z=table.float().cpu().numpy(), x=_labels(self.key_tokens), y=_labels(self.tokens), zmin=0, zmax=1,
                    coloraxis="coloraxis", visible=layer == next(iter(self.weights)), name=f"layer {layer}, head {head}",
                    hovertemplate="%{y} looks at %{x}: %{z:.3f}",
                )  # fmt: skip
                figure.add_trace(trace, head // columns + 1, head % columns + 1)
        named = max(len(self.tokens), len(self.key_tokens)) <= _NAMED
        figure.update_yaxes(autorange="reversed", showticklabels=named)
        figure.update_xaxes(showticklabels=named)
        if self.boundary is not None:
            figure.add_hline(self.boundary - 0.5, line_dash="dot")
            figure.add_vline(self.boundary - 0.5, line_dash="dot")
        buttons = [
            {"label": f"layer {layer}", "method": "restyle", "args": [{"visible": [o == layer for o in owners]}]}
            for layer in self.weights
        ]
        menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.12, "yanchor": "bottom"}
        figure.update_layout(
            updatemenus=[menu], coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1}, height=140 + 260 * rows
        )
        return figure

    def thumbnails(self) -> Any:
        """A plotly figure of everything at once: layers down, heads across, without names. Raises MissingExtra, OptionError."""
        count = sum(w.numel() for w in self.weights.values())
        if count > _MOST:
            raise OptionError(f"{count} weights are too many for one figure ({_MOST} at most): give layers= or heads=")
        go, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        heads = max(len(w) for w in self.weights.values())
        figure = subplots.make_subplots(
            len(self.weights), heads, row_titles=[f"layer {layer}" for layer in self.weights],
            column_titles=[f"head {h}" for h in range(heads)], horizontal_spacing=0.004, vertical_spacing=0.01,
        )  # fmt: skip
        for row, (layer, weights) in enumerate(self.weights.items(), 1):
            for head, table in enumerate(weights):
                trace = go.Heatmap(
                    z=table.float().cpu().numpy(), coloraxis="coloraxis", name=f"layer {layer}, head {head}"
                )
                figure.add_trace(trace, row, head + 1)
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False, autorange="reversed")
        scale = {"colorscale": "Viridis", "cmin": 0, "cmax": 1}
        return figure.update_layout(coloraxis=scale, height=120 + 110 * len(self.weights))

    def write(self, path: str | Path) -> None:
        """The figure as one page that needs no network."""
        self.figure().write_html(str(path), include_plotlyjs=True)


def head_view(
    source: Tape | Sequence[Tensor],
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    tokenizer: Any = None,
    row: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    step: int = 0,
    sentence_b_start: int | None = None,
) -> HeadView:
    """The weights of one text of a batch, pads left out.

    source: a tape with full weights, or a tuple over layers of (B, H, N, M). tokens: names of the queries, key_tokens of
    the keys where they are others (cross-attention); without them ids stand there, or what `tokenizer` calls them. row: of
    the batch. layers, heads: of which, None for all. step: of a tape, see `Tape`. Raises OptionError, ShapeError.
    """
    tape = source if isinstance(source, Tape) else None
    held = range(len(source)) if not isinstance(source, Tape) else source.layers("weights", step)
    last = max(held, default=-1)
    chosen = list(held) if layers is None else [layer if layer >= 0 else last + 1 + layer for layer in layers]
    found = {layer: source["weights", layer, step] if isinstance(source, Tape) else source[layer] for layer in chosen}
    if not found:
        raise OptionError('there are no weights to view: record with sites=("weights",)')
    for layer, weights in found.items():
        if not isinstance(weights, Tensor) or weights.dim() != 4:
            raise ShapeError(f"layer {layer} does not hold (B, H, N, M): record weights with reduce left out")
    batch, _, n, m = next(iter(found.values())).shape
    if not -batch <= row < batch:
        raise OptionError(f"row is {row}; the batch has {batch}")
    valid = torch.ones(m, dtype=torch.bool) if tape is None else real_keys(tape, batch, m)[row]
    # in self-attention the queries are the last of the keys, however many came before
    rows = valid[m - n :] if n <= m and key_tokens is None else torch.ones(n, dtype=torch.bool)
    ids = None if tape is None else tape.meta.get("ids")
    names = _names(ids, tokens, tokenizer, row, rows)
    others = tokens if key_tokens is None and n == m else key_tokens
    tables = {}
    for layer, weights in found.items():
        some = weights[row] if heads is None else weights[row, list(heads)]
        tables[layer] = some.detach().cpu()[:, rows][:, :, valid]
    return HeadView(tables, names, _names(ids, others, tokenizer, row, valid), sentence_b_start)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """One number for every head: values (L, H), NaN where a layer has no such head. title, unit: what it is."""

    values: Tensor
    title: str
    unit: str = ""

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise ShapeError(f"the values are {tuple(self.values.shape)}; they must be (layers, heads)")

    def top(self, count: int) -> list[tuple[int, int]]:
        """The (layer, head) of the largest values, the largest first."""
        flat = self.values.nan_to_num(nan=float("-inf")).flatten()
        places = flat.argsort(descending=True, stable=True)[:count].tolist()
        return [divmod(place, self.values.shape[1]) for place in places]

    def above(self, threshold: float) -> list[tuple[int, int]]:
        """The (layer, head) with at least `threshold`, the largest first."""
        return [place for place in self.top(self.values.numel()) if self.values[place] >= threshold]

    def figure(self) -> Any:
        """A plotly figure: layers down, heads across. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        unit = f" {self.unit}" if self.unit else ""
        heat = go.Heatmap(
            z=self.values.float().cpu().numpy(), colorscale="Viridis", colorbar={"title": self.unit},
            hovertemplate="layer %{y}, head %{x}: %{z:.3f}" + unit + "<extra></extra>",
        )  # fmt: skip
        figure = go.Figure(heat)
        figure.update_layout(title=self.title, xaxis={"title": "head", "dtick": 1})
        figure.update_yaxes(title="layer", autorange="reversed", dtick=1)
        return figure


def sink_map(tape: Tape, *, count: int = 1, step: int = 0) -> HeadMap:
    """What each head gives to the first `count` keys: the mean over rows of all texts, pads and the sinks' own rows apart.

    tape: with full weights; or with "sink_mass" of as many keys, if no text starts with pads. Raises OptionError.
    """
    if count < 1:
        raise OptionError(f"count is a number of keys, at least 1, not {count}")
    found, whole = _read(tape, "sink_mass", step)
    if not whole and tape.meta["count"] != count:
        raise OptionError(f"the tape holds the mass on the first {tape.meta['count']} keys, not on {count}")
    values = []
    for x in found:
        valid = real_keys(tape, len(x), x.shape[2]).to(x.device)
        place = valid.long().cumsum(-1)
        if whole:
            # the first keys of a text that are real
            x = (x.float() * (valid & (place <= count))[:, None, None]).sum(-1)
        elif not bool(valid[:, :1].all()):
            raise OptionError("some texts start with pads, which are the first keys: record full weights instead")
        values.append(_mean(x, valid & (place > count)))
    return HeadMap(torch.stack(values), f"weight on the first {count} keys" if count > 1 else "weight on the first key")


def entropy_map(tape: Tape, *, step: int = 0) -> HeadMap:
    """The entropy of each head's rows in nats: the mean over rows of all texts, pads apart.

    tape: with full weights or with "entropy". 0 is a head that looks at one key at a time. Raises OptionError.
    """
    found, whole = _read(tape, "entropy", step)
    values = [_mean(entropy(x) if whole else x, real_keys(tape, len(x), x.shape[2]).to(x.device)) for x in found]
    return HeadMap(torch.stack(values), "entropy of the weights", "nats")


def real_keys(tape: Tape, batch: int, keys: int) -> Tensor:
    """Which keys are no pads, bool (B, M); tokens that are decoded after a prompt are none."""
    padding = tape.meta.get("padding")
    if padding is None:
        return torch.ones(batch, keys, dtype=torch.bool)
    return torch.nn.functional.pad(padding.cpu(), (0, max(keys - padding.shape[1], 0)), value=True)[:, :keys]


def _names(ids: Tensor | None, given: Sequence[str] | None, tokenizer: Any, row: int, valid: Tensor) -> tuple[str, ...]:
    if given is not None:
        names = list(given)
        if len(names) == int(valid.sum()):
            return tuple(names)
    elif ids is not None and ids.shape[1] == len(valid):
        here = ids[row].tolist()
        names = tokenizer.convert_ids_to_tokens(here) if tokenizer is not None else [str(i) for i in here]
    else:
        names = [str(i) for i in range(len(valid))]
    if len(names) != len(valid):
        raise ShapeError(
            f"there are {len(names)} names for {len(valid)} tokens, of which {int(valid.sum())} are no pads"
        )
    return tuple(name for name, real in zip(names, valid.tolist(), strict=True) if real)


def _labels(tokens: Sequence[str]) -> list[str]:
    # a name may stand there twice, and an axis of categories would draw it once
    return [f"{i} {token}" for i, token in enumerate(tokens)]


def _read(tape: Tape, reduced: str, step: int) -> tuple[list[Tensor], bool]:
    """What a map is made from at every layer: the reduced form (B, H, N), or all of the weights (True)."""
    kept = tape.meta.get("reduce", ())
    for reduce in (reduced, "full"):
        kind = "weights" if len(kept) == 1 else f"weights:{reduce}"
        layers = tape.layers(kind, step) if reduce in kept else []
        found = [tape[kind, layer, step] for layer in layers]
        if found and (reduce == reduced or all(x.shape[2] == x.shape[3] for x in found)):
            return found, reduce == "full"
    raise OptionError(
        f'step {step} of the tape holds neither "{reduced}" nor whole tables of weights: record with reduce="{reduced}"'
    )


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    """Over texts and real rows: (B, H, N) -> (H,)."""
    return (x.float() * valid[:, None]).sum((0, 2)) / valid.sum().clamp(min=1)
