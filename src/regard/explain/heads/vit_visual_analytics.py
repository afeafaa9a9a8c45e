"""Heads of vision transformers: which ones matter, how far they look over the grid of patches, and in which patterns.

    importance = what pruning a head changes,      hop profile s(k) = mean over patches p of sum of w[p, q] with hop(p, q) = k

hop is the ring of patches around p (Chebyshev). `PatternMap` places heads by their patterns. The paper's exact list of
importances could not be checked; here are the fall of the true class's probability and of accuracy, the rise of the loss,
and the divergence of the predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.attach import open_session
from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.explain.heads.maps import HeadMap
from regard.explain.heads.pattern_map import PatternMap, tables_of
from regard.hosts.patch import Edit, patch
from regard.hosts.tape import Tape, record
from regard.primitives.attention_stats import attention_distance
from regard.primitives.attention_stats import hop_profile as ring_sums
from regard.primitives.attention_stats import hops as ring_of
from regard.primitives.maps import token_grid

CARD = ExplanationCard(
    slug="vit_visual_analytics",
    title="Visual analytics of vision transformers",
    paper="How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
    exports=(
        "head_importance",
        "HeadImportance",
        "joint_importance",
        "hop_profile",
        "HopProfile",
        "mean_attention_distance",
        "PatternMap",
        "vit_page",
    ),
    reads="vit_classifier",
    takes={"model": "model", "batches": "labelled images"},
    options={"metrics": ("prob", "kl"), "mode": "mean"},
    figure=True,
    builds_on=("maps",),
)

Metric = Literal["prob", "loss", "kl", "acc"]
Mode = Literal["zero", "mean", "taylor"]
Batches = Iterable[tuple[Tensor, Tensor]]
Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class HeadImportance:
    """What each head is worth: metric -> (L, H), the mean over images; per_image: metric -> (images, L, H).

    Positive is important, for every metric. whole: the metrics of the model as it is.
    """

    values: dict[str, Tensor]
    per_image: dict[str, Tensor]
    whole: dict[str, float]

    def figure(self) -> Any:
        """A plotly figure: the metrics beside each other, layers down, heads across. Raises MissingExtra."""
        go, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        figure = subplots.make_subplots(1, len(self.values), subplot_titles=list(self.values), shared_yaxes=True)
        for column, (metric, values) in enumerate(self.values.items(), 1):
            text = metric + " of layer %{y}, head %{x}: %{z:.4f}<extra></extra>"
            heat = go.Heatmap(z=values.numpy(), colorscale="Viridis", showscale=False, hovertemplate=text)
            figure.add_trace(heat, 1, column)
        figure.update_yaxes(autorange="reversed", dtick=1)
        figure.update_xaxes(title="head", dtick=1)
        return figure


def head_importance(
    model: Any, batches: Batches, *, metrics: Sequence[Metric] = ("prob", "loss", "kl", "acc"), mode: Mode = "zero"
) -> HeadImportance:
    """Prune one head after the other, and measure what changes.

    model: a classifier with `logits`. batches: (images as the model takes them, labels (B,)), gone through once. metrics:
    "prob" fall of the true class's probability, "loss" rise of its cross-entropy, "kl" of the predictions with all heads from
    those without, "acc" fall of accuracy. mode: what stands where the head was, "zero" or its "mean" over images and tokens;
    "taylor" prunes nothing and gives |d loss / d gate| of each image's own loss, of a gate of 1 on the head. Raises
    OptionError.
    """
    kept = _check(batches, metrics, mode)
    if mode == "taylor":
        slopes = torch.cat([_slopes(model, images, labels) for images, labels in kept]).abs()
        loss = float(torch.cat([_measure(_logits(model, x), y)["loss"] for x, y in kept]).mean())
        return HeadImportance({"loss": slopes.mean(0)}, {"loss": slopes}, {"loss": loss})
    stand_in = _means(model, [images for images, _ in kept]) if mode == "mean" else None
    layers, heads = _size(model)
    plain = [_logits(model, images) for images, _ in kept]
    found: dict[str, Tensor] = {metric: torch.zeros(sum(len(y) for _, y in kept), layers, heads) for metric in metrics}
    for layer in range(layers):
        for head in range(heads):
            for metric, values in _change(model, kept, plain, [(layer, head)], metrics, stand_in).items():
                found[metric][:, layer, head] = values
    before = [_measure(logits, labels) for logits, (_, labels) in zip(plain, kept, strict=True)]
    whole: dict[str, float] = {m: float(torch.cat([each[m] for each in before]).mean()) for m in metrics if m != "kl"}
    return HeadImportance({metric: values.mean(0) for metric, values in found.items()}, found, whole)


def joint_importance(
    model: Any,
    batches: Batches,
    heads: Sequence[Head],
    *,
    metrics: Sequence[Metric] = ("prob", "loss", "kl", "acc"),
    mode: Literal["zero", "mean"] = "zero",
) -> dict[str, float]:
    """What pruning several heads (layer, head) at once changes, the mean over images; see `head_importance`."""
    kept = _check(batches, metrics, mode)
    if mode == "taylor":
        raise OptionError("slopes of several heads only add up: prune them, by zero or mean")
    layers, count = _size(model)
    if not heads or any(not (0 <= layer < layers and 0 <= head < count) for layer, head in heads):
        raise OptionError(f"heads are pairs of a layer below {layers} and a head below {count}, not {list(heads)}")
    stand_in = _means(model, [images for images, _ in kept]) if mode == "mean" else None
    plain = [_logits(model, images) for images, _ in kept]
    changes = _change(model, kept, plain, heads, metrics, stand_in)
    return {metric: float(values.mean()) for metric, values in changes.items()}


@dataclass(frozen=True, eq=False)
class HopProfile:
    """How much patches give to patches k hops away: values (L, H, K), NaN where a layer has no such head.

    hop 0 is the patch itself. prefix (L, H): what they give to tokens before the grid; with `beyond` (L, H), rings after the
    last that is shown, all sums to 1. from_prefix (L, H): what the first token gives to patches, NaN without one. sizes (K,):
    keys in a ring, the mean over patches. grid: (h, w). window: whether the grid is that of a window of the model.
    """

    values: Tensor
    prefix: Tensor
    beyond: Tensor
    from_prefix: Tensor
    sizes: Tensor
    grid: tuple[int, int]
    window: bool = False

    def per_key(self) -> Tensor:
        """The values by keys of a ring (L, H, K), since wide rings hold more of them."""
        return self.values / self.sizes

    def figure(self) -> Any:
        """A plotly figure: a line for every head, a panel for every layer. Raises MissingExtra."""
        go, subplots = need("plotly.graph_objects", "explain"), need("plotly.subplots", "explain")
        layers = len(self.values)
        columns = min(layers, 4)
        titles = [f"layer {layer}" for layer in range(layers)]
        figure = subplots.make_subplots(-(-layers // columns), columns, subplot_titles=titles, shared_yaxes="all")
        for layer, lines in enumerate(self.values):
            for head, line in enumerate(lines):
                trace = go.Scatter(
                    y=line.numpy(), mode="lines+markers", name=f"layer {layer}, head {head}", showlegend=False
                )
                figure.add_trace(trace, layer // columns + 1, layer % columns + 1)
        where = "inside windows" if self.window else f"on a grid of {self.grid[0]} x {self.grid[1]}"
        figure.update_layout(title=f"attention by hops, {where}")
        figure.update_xaxes(title="hops")
        return figure


def hop_profile(
    tape: Tape | Sequence[Tensor],
    *,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    window: tuple[int, int] | None = None,
    max_hop: int | None = None,
) -> HopProfile:
    """The hop profile of every head, the mean over images.

    tape: with full weights, or a tuple over layers of (B, H, N, N). grid, prefix_tokens: where the tape does not know them
    (its model is not square, or has more than a class token), see `token_grid`. window: of models that attend inside windows,
    its height and width. max_hop: the last ring shown. Raises ShapeError, OptionError.
    """
    layers = tables_of(tape)
    h, w, prefix = _grid(tape, layers[0], grid, prefix_tokens, window)
    rings = max(h, w) if max_hop is None else min(max_hop + 1, max(h, w))
    if rings < 1:
        raise OptionError(f"max_hop is a number of hops, at least 0, not {max_hop}")
    most = max(weights.shape[1] for weights in layers)
    rows: list[tuple[Tensor, ...]] = []
    for weights in layers:
        mean = weights.float().mean(0).cpu()
        profile = ring_sums(mean[:, prefix:, prefix:], (h, w))
        first = mean[:, 0, prefix:].sum(-1) if prefix else torch.full((len(mean),), torch.nan)
        parts = (profile[:, :rings], mean[:, prefix:, :prefix].sum(-1).mean(-1), profile[:, rings:].sum(-1), first)
        missing = most - len(mean)
        rows.append(tuple(F.pad(x, (*(0, 0) * (x.dim() - 1), 0, missing), value=torch.nan) for x in parts))
    values, to_prefix, beyond, first = (torch.stack(part) for part in zip(*rows, strict=True))
    sizes = ring_of((h, w)).flatten().bincount(minlength=max(h, w))[:rings] / (h * w)
    return HopProfile(values, to_prefix, beyond, first, sizes, (h, w), window is not None)


def mean_attention_distance(
    tape: Tape | Sequence[Tensor],
    *,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    window: tuple[int, int] | None = None,
) -> HeadMap:
    """How far patches look in patches (Euclidean), the mean over patches and images; arguments as of `hop_profile`."""
    layers = tables_of(tape)
    h, w, prefix = _grid(tape, layers[0], grid, prefix_tokens, window)
    most = max(weights.shape[1] for weights in layers)
    found = [attention_distance(x[:, :, prefix:, prefix:], (h, w)).mean(0).cpu() for x in layers]
    values = torch.stack([F.pad(x, (0, most - len(x)), value=torch.nan) for x in found])
    return HeadMap(values, "mean attention distance", "patches")


def vit_page(
    tape: Tape,
    path: str | Path,
    *,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    importance: HeadImportance | None = None,
    clusters: int = 4,
) -> None:
    """Write one page that needs no network: hops, distances, patterns and, if given, importances. Raises MissingExtra."""
    options: dict[str, Any] = {"grid": grid, "prefix_tokens": prefix_tokens}
    figures = {
        "How far heads look": hop_profile(tape, **options).figure(),
        "Mean distance": mean_attention_distance(tape, **options).figure(),
        "Patterns": PatternMap.fit(tape, arch="pca").figure(clusters),
    }
    if importance is not None:
        figures["What pruning a head changes"] = importance.figure()
    parts = []
    for number, (title, figure) in enumerate(figures.items()):
        # the library itself goes in once
        drawn = figure.to_html(full_html=False, include_plotlyjs=number == 0)
        parts.append(f"<h2>{title}</h2>\n{drawn}")
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Heads of a vision transformer</title></head>'
    )
    Path(path).write_text(f"{head}<body>{''.join(parts)}</body></html>", encoding="utf-8")


def _check(batches: Batches, metrics: Sequence[str], mode: str) -> list[tuple[Tensor, Tensor]]:
    for metric in metrics:
        if metric not in get_args(Metric):
            raise OptionError(f"there is no metric {metric!r}; there are {', '.join(get_args(Metric))}")
    if mode not in get_args(Mode):
        raise OptionError(f'mode is "zero", "mean" or "taylor", not {mode!r}')
    kept = [(images, labels) for images, labels in batches]
    if not kept:
        raise OptionError("there is no batch of images and labels")
    return kept


def _size(model: Any) -> tuple[int, int]:
    return len(open_session(model, ()).anatomy.main.layers), model.config.num_attention_heads


@torch.no_grad()
def _logits(model: Any, images: Tensor) -> Tensor:
    return model(images).logits.float().cpu()  # type: ignore[no-any-return]


def _measure(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """prob, loss and acc of every image."""
    labels = labels.cpu()
    prob = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    loss = F.cross_entropy(logits, labels, reduction="none")
    return {"prob": prob, "loss": loss, "acc": (logits.argmax(-1) == labels).float()}


def _change(
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
    plain: Sequence[Tensor],
    heads: Sequence[Head],
    metrics: Sequence[str],
    stand_in: Tensor | None,
) -> dict[str, Tensor]:
    """metric -> (images,): what pruning these heads at once changes."""
    edits = [Edit("z", at, heads=(h,), value=0.0 if stand_in is None else stand_in[at, h]) for at, h in heads]
    found: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
    with patch(model, edits):
        changed = [_logits(model, images) for images, _ in batches]
    for before, after, (_, labels) in zip(plain, changed, batches, strict=True):
        old, new = _measure(before, labels), _measure(after, labels)
        changes = {
            "prob": old["prob"] - new["prob"],
            "loss": new["loss"] - old["loss"],
            "acc": old["acc"] - new["acc"],
            "kl": F.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1),
        }
        for metric in metrics:
            found[metric].append(changes[metric])
    return {metric: torch.cat(values) for metric, values in found.items()}


@torch.no_grad()
def _means(model: Any, batches: Sequence[Tensor]) -> Tensor:
    """What each head puts out on average over images and tokens: (L, H, E)."""
    total, count = torch.zeros(()), 0
    for images in batches:
        z = record(model, {"pixel_values": images}, sites=("z",)).stack("z").float()
        total, count = total + z.sum((1, 2)), count + z.shape[1] * z.shape[2]
    return total / count


def _slopes(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    """d loss / d gate of every image's own loss: (B, L, H)."""
    layers, heads = _size(model)
    gates = torch.ones(layers, len(images), heads, device=images.device, requires_grad=True)
    with torch.enable_grad():
        edits = [Edit("z", at, fn=partial(_gated, gates[at])) for at in range(layers)]
    with patch(model, edits), torch.enable_grad():
        logits = model(images).logits.float()
        # of each image by itself: the sum keeps them apart
        loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
        (slopes,) = torch.autograd.grad(loss, gates)
    return slopes.transpose(0, 1).cpu()


def _gated(gate: Tensor, z: Tensor) -> Tensor:
    """z (B, N, H, E) times a gate (B, H)."""
    return z * gate[:, None, :, None].to(z)


def _grid(
    tape: Tape | Sequence[Tensor],
    weights: Tensor,
    grid: tuple[int, int] | None,
    prefix_tokens: int | None,
    window: tuple[int, int] | None,
) -> tuple[int, int, int]:
    known = tape.meta.get("grid") if isinstance(tape, Tape) else None
    if window is not None:
        if grid is not None:
            raise OptionError("give grid= or window=, not both")
        return token_grid(weights.shape[-1], grid=window, prefix_tokens=prefix_tokens or 0)
    try:
        return token_grid(weights.shape[-1], known, grid=grid, prefix_tokens=prefix_tokens)
    except ShapeError as error:
        raise ShapeError(f"{error}; or window=(height, width) of a model that attends inside windows") from None
