"""MoA's analysis: what the loss gains or loses when a pair is no longer attended, and a window for every head from it.

    E_ij = A_ij (sum_n G_in A_in - G_ij) / (1 - A_ij),      A = softmax(scale q k'),  G = dL/dA = dz v'

E is the change of the loss, to first order in the head's output, when A_ij goes and its row is normalised again; where
nothing is left in the row, E_ij = -G_ij A_ij. A rule (alpha, beta) gives a head one block of sinks and a band of
alpha + beta N tokens; its predicted loss is the sum of E over what it masks. A mixed integer programme chooses the rules.
Departs from the released code: 1 - A_ij is summed from what is left, without an eps; the grid also has the narrowest
rule (block, 0); there is no lower bound on the density (there 0.9 of the budget); the other losses have upper limits
only; HiGHS solves, not Gurobi.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.optional import need
from regard.engines.precision import accumulator
from regard.engines.readout import readout
from regard.explain.heads.rule_choice import RuleChoice
from regard.layers.attention import Attention
from regard.patterns import Bound, Causal, Pattern
from regard.patterns.elastic import SINK_BLOCKS, MoAPlan, band_blocks, block_count, check_rule, seen_blocks

CARD = ExplanationCard(
    slug="moa",
    part_of="moa",
    title="What windows of heads are worth, and a plan of them",
    exports=("attention_influence", "fit_moa", "moa_front", "predicted_loss", "Influence"),
    reads="sequence",
    takes={"model": "model", "batches": "answered ids"},
    options={"block": 4},
    figure=True,
)

Layer: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
Rule: TypeAlias = tuple[float, float]
_BETAS = tuple(i / 8 for i in range(9))


@dataclass(frozen=True, eq=False)
class Influence:
    """What each pair of blocks is worth. tables: length -> (layers, heads, n, n), n = ceil(length / block).

    block: tokens. Rows are queries, columns keys. Raises ShapeError, OptionError.
    """

    tables: Mapping[int, Tensor]
    block: int

    def __post_init__(self) -> None:
        if self.block < 1:
            raise OptionError(f"block is a number of tokens, at least 1, not {self.block}")
        if not self.tables:
            raise OptionError("there is no table: an influence needs at least one length")
        first = next(iter(self.tables.values())).shape[:2]
        for length, table in self.tables.items():
            n = block_count(length, self.block)
            if table.shape != (*first, n, n) or 0 in table.shape:
                raise ShapeError(
                    f"the table of {length} tokens is {tuple(table.shape)}; with {tuple(first)} layers and heads and "
                    f"blocks of {self.block} it must be {(*first, n, n)}"
                )
            if not torch.isfinite(table).all():
                raise OptionError(f"the table of {length} tokens is not finite")

    def figure(self) -> Any:
        """A plotly figure: for every head what hangs on keys so far back, without those of the sinks; a menu of lengths.

        Raises MissingExtra.
        """
        graphs = need("plotly.graph_objects", "explain")
        layers, heads = next(iter(self.tables.values())).shape[:2]
        names = [f"layer {layer}, head {head}" for layer in range(layers) for head in range(heads)]
        figure, lengths = graphs.Figure(), sorted(self.tables)
        for length in lengths:
            sums = _by_distance(self.tables[length])[:, :-1]
            back = [self.block * blocks for blocks in range(sums.shape[1])]
            trace = graphs.Heatmap(
                z=sums.numpy(), x=back, y=names, coloraxis="coloraxis", visible=length == lengths[-1],
                hovertemplate="%{y}, %{x} tokens back and more: %{z:.3g}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(trace)
        buttons = [
            {"label": f"{length} tokens", "method": "restyle", "args": [{"visible": [o == length for o in lengths]}]}
            for length in lengths
        ]
        signed = any(bool((table < 0).any()) for table in self.tables.values())
        colours = {"colorscale": "RdBu", "cmid": 0} if signed else {"colorscale": "Viridis"}
        menu = {
            "buttons": buttons,
            "active": len(lengths) - 1,
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
        }
        figure.update_yaxes(autorange="reversed")
        return figure.update_layout(
            updatemenus=[menu], coloraxis={**colours, "colorbar": {"title": "influence"}},
            xaxis_title="tokens back", height=200 + 22 * len(names),
        )  # fmt: skip


def attention_influence(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, block: int = 64, magnitude: bool = True
) -> Influence:
    """The influence of every pair of blocks in every attention layer of a model, averaged over sequences by length.

    model: called with token ids, causal, its `Attention` layers plain softmax; layers count in the order they run.
    batches: (ids, answers), both (B, N), answers bool: True = this token's loss counts (`own_answers` makes them).
    The loss of a sequence is the mean over its answers. block: tokens. magnitude: see `layer_influence`. The model is
    left as it was, gradients of its weights too. Raises ShapeError, OptionError, Unsupported.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for ids, answers in batches:
        _check_batch(ids, answers)
        found = layer_influence(_layers(model, ids, answers), block=block, magnitude=magnitude)
        batch, length = ids.shape
        sums[length] = sums.get(length, 0.0) + found * batch
        counts[length] = counts.get(length, 0) + batch
    if not sums:
        raise OptionError("there is no batch to measure the influence on")
    return Influence({length: total / counts[length] for length, total in sums.items()}, block)


@torch.no_grad()
def layer_influence(
    layers: Iterable[Layer],
    *,
    pattern: Pattern | Bound | None = None,
    scale: float | None = None,
    block: int = 64,
    magnitude: bool = True,
) -> Tensor:
    """E of layers given by (q, k, v, dz), summed over blocks and averaged over the batch: (layers, H, n, m) blocks.

    q, dz (B, H, N, D), k, v (B, G, M, D), as the softmax meets them; dz: gradient of the head outputs, of each
    sequence's own loss. pattern: Causal() if None. scale: D^-1/2 if None. magnitude: sum |E|, as the released code
    plans with (pairs that help do not pay for pairs that hurt), else E itself. Memory: tiles of rows, never N x M.
    Raises ShapeError, OptionError.
    """
    if block < 1:
        raise OptionError(f"block is a number of tokens, at least 1, not {block}")
    pattern = Causal() if pattern is None else pattern
    found = [_blocks_of(layer, pattern, scale, block, magnitude).mean(0) for layer in layers]
    if not found:
        raise OptionError("there is no layer to measure the influence in")
    if len({table.shape for table in found}) > 1:
        raise ShapeError(f"the layers differ in heads or length: {[tuple(table.shape) for table in found]}")
    return torch.stack(found)


def own_answers(model: Any, prompts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """A batch of prompts (B, P) with the model's own likeliest continuations as answers: (ids, answers), (B, P + tokens).

    model: with `generate(ids, tokens, temperature=0)`. The paper calibrates on answers of the dense model, not of people.
    """
    ids = model.generate(prompts, tokens, temperature=0)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, prompts.shape[1] :] = True
    return ids, answers


def fit_moa(
    influence: Influence,
    lengths: Sequence[int],
    budget: float,
    *,
    validation: int | None = None,
    rules: Sequence[Rule] | None = None,
    distinct: int | None = None,
    gap: float = 0.0,
) -> MoAPlan:
    """The plan of `moa_front` with the least predicted loss at `validation`, or in all (relative) if that is None.

    To choose by a measured loss: `min(moa_front(...), key=...)`. Raises OptionError, MissingExtra.
    """
    front = moa_front(influence, lengths, budget, validation=validation, rules=rules, distinct=distinct, gap=gap)
    judged = [n for n in lengths if n in influence.tables] if validation is None else [validation]
    most = {n: float(influence.tables[n].abs().sum()) or 1.0 for n in judged}
    return min(front, key=lambda plan: sum(predicted_loss(influence, plan, n) / most[n] for n in judged))


def moa_front(
    influence: Influence,
    lengths: Sequence[int],
    budget: float,
    *,
    validation: int | None = None,
    rules: Sequence[Rule] | None = None,
    distinct: int | None = None,
    gap: float = 0.0,
) -> tuple[MoAPlan, ...]:
    """Plans that no plan found beats at every profiled length, all within the budget at every length.

    lengths: tokens; the loss is minimised at those with a table, and the budget holds at all. budget: mean density,
    in (0, 1]. validation: an unseen length with a table, not minimised; the budget holds there too. rules: (alpha,
    beta) to choose from, the released code's grid if None. distinct: most rules a layer may mix, None for any number.
    gap: share of the loss by which a solution may miss the optimum; 0 proves it, which takes long for hundreds of heads.
    Raises OptionError, naming the smallest density there is if the budget is below it; MissingExtra.
    """
    _check_fit(influence, lengths, budget, validation, rules, distinct, gap)
    block, profiled = influence.block, sorted({n for n in lengths if n in influence.tables})
    bounded = sorted({*lengths, *(() if validation is None else (validation,))})
    rules = _grid(bounded, profiled, block) if rules is None else [(float(a), float(b)) for a, b in rules]
    losses = torch.stack([_losses(influence.tables[n], rules, n, block) for n in profiled])
    seen = [[seen_blocks(band_blocks(*rule, n, block), n, block) for rule in rules] for n in bounded]
    layers = influence.tables[profiled[0]].shape[0]
    choice = RuleChoice(losses.numpy(), seen, [block_count(n, block) for n in bounded], budget, layers, distinct, gap)
    front = choice.front()
    if not front:
        least = choice.least_density()
        raise OptionError(
            f"infeasible: the smallest plan has density {least:.4g} at some length of {bounded}, more than the budget "
            f"of {budget:g}; raise the budget, make the blocks smaller or give narrower rules"
        )
    return tuple(_plan(chosen, rules, layers, block) for chosen in front)


def predicted_loss(influence: Influence, plan: MoAPlan, length: int) -> float:
    """The influence of everything that a plan masks at a length with a table. Raises OptionError."""
    if length not in influence.tables:
        raise OptionError(f"there is no table of {length} tokens; there are {sorted(influence.tables)}")
    table = influence.tables[length]
    if (plan.layers, plan.heads) != table.shape[:2] or plan.block != influence.block:
        raise OptionError(
            f"the plan is for {plan.layers} layers of {plan.heads} heads in blocks of {plan.block}, the influence for "
            f"{table.shape[0]} of {table.shape[1]} in blocks of {influence.block}"
        )
    tails = _tails(table).unflatten(0, table.shape[:2])
    return sum(
        float(tails[layer, head, min(band, table.shape[2])])
        for layer in range(plan.layers)
        for head, band in enumerate(plan.band_blocks(layer, length))
    )


def _check_batch(ids: Tensor, answers: Tensor) -> None:
    if ids.dim() != 2 or 0 in ids.shape or answers.dtype != torch.bool or answers.shape != ids.shape:
        raise ShapeError(
            f"a batch is token ids and bool answers, both (B, N); ids are {tuple(ids.shape)}, answers {answers.dtype} "
            f"{tuple(answers.shape)}"
        )
    if not answers[:, 1:].any(1).all():
        raise OptionError("every sequence needs an answer behind its first token, which nothing predicts")


def _layers(model: nn.Module, ids: Tensor, answers: Tensor) -> Iterator[Layer]:
    """(q, k, v, dz) of the attention layers in the order they ran."""
    with torch.enable_grad(), _watched(model) as calls:
        logits = model(ids)
        counted = answers[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2).to(accumulator(logits.dtype)), ids[:, 1:], reduction="none"
        )
        # of each sequence by itself, so that a batch is as many sequences
        loss = ((losses * counted).sum(1) / counted.sum(1)).sum()
        gradients = torch.autograd.grad(loss, [call.out for call in calls], materialize_grads=True)
    for call, dz in zip(calls, gradients, strict=True):
        call.check()
        yield call.q, call.k, call.v, dz


@dataclass(frozen=True, eq=False)
class _Call:
    """What one attention layer did."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    pattern: Pattern | Bound

    @torch.no_grad()
    def check(self) -> None:
        """Raise Unsupported unless the last rows are plain causal softmax attention."""
        causal = isinstance(self.pattern, Causal) and not self.pattern.strict
        if causal and self.q.shape[2] == self.k.shape[2]:
            n = self.q.shape[2]
            rows = torch.arange(max(0, n - 64), n, device=self.q.device)
            weights = readout(self.q, self.k, None, self.pattern, what="rows", rows=rows)
            out = _over_groups(weights, self.v.to(weights.dtype))
            error = (out - self.out[:, :, rows]).abs().max()
            if error <= torch.finfo(self.out.dtype).eps ** 0.5 * out.abs().max():
                return
        raise Unsupported(
            f"the layer {self.name} is not plain causal softmax attention of a sequence to itself, which the influence "
            "is about; softmax and sqa are"
        )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[_Call]]:
    """Note what the attention layers of a model do while the context lasts."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not layers:
        raise Unsupported(f"{type(model).__name__} has no attention layer (regard.layers.attention.Attention)")
    calls: list[_Call] = []
    before = {name: layer.__dict__.get("attend") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.__dict__["attend"] = partial(_note, layer.attend, name, calls)
    try:
        yield calls
    finally:
        for name, layer in layers.items():
            del layer.__dict__["attend"]
            if before[name] is not None:
                layer.__dict__["attend"] = before[name]


def _note(
    attend: Callable[..., Tensor],
    name: str,
    calls: list[_Call],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Bound,
    q_offset: int,
) -> Tensor:
    out = attend(q, k, v, pattern=pattern, q_offset=q_offset)
    if not out.requires_grad:
        # nothing before it is trained, yet its gradient is asked for
        out = out.detach().requires_grad_()
    calls.append(_Call(name, q.detach(), k.detach(), v.detach(), out, pattern))
    return out


def _blocks_of(layer: Layer, pattern: Pattern | Bound, scale: float | None, block: int, magnitude: bool) -> Tensor:
    """E of one layer in blocks (B, H, n, m)."""
    q, k, v, dz = layer
    n, m = q.shape[2], k.shape[2]
    if dz.shape != (*q.shape[:3], v.shape[-1]) or v.shape[:3] != k.shape[:3]:
        raise ShapeError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and dz {tuple(dz.shape)}; v must have the "
            "keys of k, and dz the rows of q in the width of v"
        )
    # one layout for all tiles of rows, which hold whole blocks of the sum
    layout = pattern.layout(n, m, device=q.device)
    tall = max(1, 64 // block) * block
    tiles = []
    for start in range(0, n, tall):
        rows = torch.arange(start, min(start + tall, n), device=q.device)
        weights = readout(q, k, None, layout, what="rows", rows=rows, scale=scale)
        gradient = _over_groups(dz[:, :, rows].to(weights.dtype), v.to(weights.dtype).transpose(-1, -2))
        removed = _removal(weights, gradient)
        removed = removed.abs() if magnitude else removed
        padded = F.pad(removed, (0, -m % block, 0, -len(rows) % block))
        tiles.append(padded.unflatten(3, (-1, block)).unflatten(2, (-1, block)).sum((3, 5)))
    return torch.cat(tiles, 2)


def _over_groups(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, R, S) @ y (B, G, S, T), query heads of a group sharing y."""
    return (x.unflatten(1, (y.shape[1], -1)) @ y.unsqueeze(2)).flatten(1, 2)


def _removal(weights: Tensor, gradient: Tensor) -> Tensor:
    """E from A and G (B, H, R, M)."""
    # the largest weight may leave next to nothing, so what is left is summed, not subtracted from 1
    largest, place = weights.max(-1, keepdim=True)
    rest = weights.scatter(-1, place, 0.0)
    left = rest.sum(-1, keepdim=True)
    others = (rest * gradient).sum(-1, keepdim=True)
    own = gradient.gather(-1, place)
    removed = rest * (others + largest * own - gradient) / (1.0 - rest)
    return removed.scatter(-1, place, largest * (others / left.masked_fill(left == 0, 1.0) - own))


def _check_fit(
    influence: Influence,
    lengths: Sequence[int],
    budget: float,
    validation: int | None,
    rules: Sequence[Rule] | None,
    distinct: int | None,
    gap: float,
) -> None:
    there = sorted(influence.tables)
    if not 0 < budget <= 1:
        raise OptionError(f"the budget is a mean density in (0, 1], not {budget}")
    for length in lengths:
        block_count(length, influence.block)
    if not any(length in influence.tables for length in lengths):
        raise OptionError(f"none of the lengths {list(lengths)} has a table; there are tables of {there}")
    if validation is not None and (validation not in influence.tables or validation in lengths):
        raise OptionError(f"validation must be a length with a table ({there}) that is not among the lengths")
    if distinct is not None and distinct < 1:
        raise OptionError(f"distinct is a number of rules, at least 1, not {distinct}")
    if not 0 <= gap < 1:
        raise OptionError(f"gap is a share of the loss in [0, 1), not {gap}")
    if rules is not None and not rules:
        raise OptionError("there is no rule to choose from")
    for alpha, beta in rules or ():
        check_rule(alpha, beta)
    for length, table in influence.tables.items():
        if table.triu(1).any():
            raise OptionError(f"at {length} tokens there is influence of later keys; plans are for causal attention")


def _grid(lengths: Sequence[int], profiled: Sequence[int], block: int) -> list[Rule]:
    """alpha every 1024 tokens (fewer if short, at most some 16 steps), beta every eighth; spans of 1 to N tokens."""
    low, high = lengths[0], profiled[-1]
    step = max(min(1024, low), (low + high) // 16)
    alphas = range(-(low // step) * step, high + 1, step)
    pairs = [(float(block), 0.0), *((float(alpha), beta) for alpha in alphas for beta in _BETAS)]
    return [
        (alpha, beta)
        for alpha, beta in dict.fromkeys(pairs)
        if (alpha, beta) == pairs[0]
        or (alpha + beta * low > 0 and all(alpha + beta * n <= n for n in (high, lengths[-1])))
    ]


def _losses(table: Tensor, rules: Sequence[Rule], length: int, block: int) -> Tensor:
    """The predicted loss of every rule for every head, float64 (layers * H, rules)."""
    bands = torch.tensor([band_blocks(*rule, length, block) for rule in rules])
    return _tails(table)[:, bands.clamp(max=table.shape[2])]


def _tails(table: Tensor) -> Tensor:
    """The sum of a table (layers, H, n, n) at `w` or more blocks before the query, behind the sinks: (layers * H, w)."""
    return _by_distance(table).flip(1).cumsum(1).flip(1)


def _by_distance(table: Tensor) -> Tensor:
    """The sum of a table (layers, H, n, n) at `w` blocks before the query, behind the sinks: (layers * H, w)."""
    table = table.detach().to("cpu", torch.float64).flatten(0, 1)
    n = table.shape[1]
    place = torch.arange(n)
    apart = place[:, None] - place[None, :]
    masked = table * ((apart >= 0) & (place >= SINK_BLOCKS))
    return table.new_zeros(len(table), n + 1).index_add(1, apart.clamp(min=0).flatten(), masked.flatten(1))


def _plan(choice: NDArray[np.int64], rules: Sequence[Rule], layers: int, block: int) -> MoAPlan:
    rows = [[rules[rule] for rule in row] for row in choice.reshape(layers, -1).tolist()]
    return MoAPlan(
        tuple(tuple(alpha for alpha, _ in row) for row in rows), tuple(tuple(beta for _, beta in row) for row in rows),
        block,
    )  # fmt: skip
