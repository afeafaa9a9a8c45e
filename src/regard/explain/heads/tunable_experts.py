"""Which experts a behaviour uses: how often each is chosen on prompts that show it, against prompts that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.hosts.tape import Tape, recording

CARD = ExplanationCard(
    slug="tunable_experts",
    part_of="tunable_experts",
    title="Expert usage",
    exports=("expert_usage", "expert_contrast", "ExpertContrast"),
    reads="mixtral",
    takes={"model": "model", "prompts": "prompts"},
    options={"where": "answer", "tokens": 4},
)


@dataclass(frozen=True, eq=False)
class ExpertContrast:
    """relevance: (L, E), usage of a minus usage of b. ranked: (layer, expert, relevance), the largest first."""

    relevance: Tensor
    ranked: tuple[tuple[int, int, float], ...]

    def figure(self) -> Any:
        """Layers down, experts across. Raises MissingExtra without plotly."""
        objects = need("plotly.graph_objects", "bench")
        largest = float(self.relevance.abs().nan_to_num().max())
        heat = objects.Heatmap(z=self.relevance.tolist(), zmid=0, zmin=-largest, zmax=largest, colorscale="RdBu")
        return objects.Figure(heat).update_layout(xaxis_title="expert", yaxis_title="layer")


def expert_usage(
    model: Any, prompts: Sequence[Tensor], *, where: Literal["prompt", "answer"] = "prompt", tokens: int = 32
) -> Tensor:
    """How often each expert is chosen, a token, the mean over prompts: (L, E); layers without a router hold NaN.

    prompts: int64 (1, N) or (N,) each. where: over the prompt's tokens, or over `tokens` that are written greedily after
    it. A row with a router sums to how many experts a token gets. Raises OptionError, ShapeError, Unsupported.
    """
    if where not in ("prompt", "answer"):
        raise OptionError(f'where is "prompt" or "answer", not {where!r}')
    if not prompts:
        raise OptionError("there are no prompts to count over")
    total: Tensor | None = None
    for prompt in prompts:
        ids = prompt[None] if prompt.dim() == 1 else prompt
        if ids.dim() != 2 or len(ids) != 1:
            raise ShapeError(f"a prompt is {tuple(prompt.shape)}; it must be (N,) or (1, N)")
        with recording(model, sites=("router",)) as tape, torch.no_grad():
            if where == "prompt":
                model(ids)
            else:
                model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        usage = _count(tape, 0 if where == "prompt" else 1)
        total = usage if total is None else total + usage
    assert total is not None
    return total / len(prompts)


def expert_contrast(usage_a: Tensor, usage_b: Tensor, *, top: int = 10) -> ExpertContrast:
    """The experts that a uses more than b (section 2). Raises ShapeError."""
    if usage_a.shape != usage_b.shape:
        raise ShapeError(f"the usages are {tuple(usage_a.shape)} and {tuple(usage_b.shape)}; they must be of one model")
    relevance = usage_a - usage_b
    order = relevance.nan_to_num(nan=float("-inf")).flatten().argsort(descending=True)[:top].tolist()
    width = relevance.shape[1]
    ranked = tuple((i // width, i % width, float(relevance.flatten()[i])) for i in order)
    return ExpertContrast(relevance, tuple(r for r in ranked if r[2] == r[2]))


def _count(tape: Tape, first: int) -> Tensor:
    """Choices a token over the steps from `first` on."""
    chosen: dict[int, list[Tensor]] = {}
    sizes: dict[int, int] = {}
    for (kind, layer, step), value in tape.items():
        if kind == "router" and step >= first:
            logits, _, experts = value
            chosen.setdefault(layer, []).append(experts)
            sizes[layer] = logits.shape[-1]
    if not chosen:
        raise OptionError("nothing was written, so there is nothing to count")
    usage = torch.full((tape.meta["layers"], max(sizes.values())), float("nan"))
    for layer, parts in chosen.items():
        experts = torch.cat(parts)
        counts = torch.bincount(experts.flatten(), minlength=sizes[layer]).float()
        usage[layer, : sizes[layer]] = counts / len(experts)
    return usage
