"""What all changes of attention at chosen layers, heads and queries share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, ShapeError

Rule: TypeAlias = Callable[[AttentionCall, Tensor], Tensor]


@intervention(
    InterventionCard(
        slug="reweight",
        title="Attention under a rule",
        exports=("AttentionReweight",),
        sites=("scores", "weights"),
        baseline=True,
    )
)
@dataclass(frozen=True, kw_only=True)
class AttentionReweight:
    """Let a rule change scores or weights; what it says of other layers, heads and queries is not heard.

    rule(call, table) -> table, both (B, H, N, M). layers: None for all. heads: "all", some of every layer, or layer ->
    heads. queries: "all", or "last", the last one of each pass. stage: "scores", before mask and normaliser, so that rows
    still sum to 1, or "weights", after both; keys that a row may not see stay at 0. renormalise: bring rows of weights
    back to the sums they had. Raises OptionError; ShapeError where the rule returns another shape.
    """

    rule: Rule
    layers: Sequence[int] | None = None
    heads: Literal["all"] | Sequence[int] | Mapping[int, Sequence[int]] = "all"
    queries: Literal["all", "last"] = "all"
    stage: Literal["scores", "weights"] = "weights"
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.stage not in ("scores", "weights") or self.queries not in ("all", "last"):
            raise OptionError(
                f'stage is "scores" or "weights" and queries "all" or "last", not {self.stage!r}, {self.queries!r}'
            )
        if self.renormalise and self.stage == "scores":
            raise OptionError("rows sum to 1 after a change of scores anyway: leave renormalise out")

    def wants(self, call: AttentionCall) -> bool:
        """The layers of the main stack that were chosen."""
        if not call.main:
            return False
        if isinstance(self.heads, Mapping) and not self.heads.get(call.layer):
            return False
        return self.layers is None or call.layer in self.layers

    def on_scores(self, call: AttentionCall, scores: Tensor) -> Tensor:
        """The scores under the rule."""
        return self._changed(call, scores) if self.stage == "scores" else scores

    def on_weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """The weights under the rule."""
        return self._changed(call, weights) if self.stage == "weights" else weights

    def _changed(self, call: AttentionCall, table: Tensor) -> Tensor:
        new = self.rule(call, table)
        if new.shape != table.shape:
            raise ShapeError(f"the rule returned {tuple(new.shape)} for a table of {tuple(table.shape)}")
        if self.stage == "weights":
            visible = call.visible()
            new = new if visible is None else new.masked_fill(~visible, 0.0)
            if self.renormalise:
                sums = new.sum(-1, keepdim=True)
                new = new * (table.sum(-1, keepdim=True) / torch.where(sums == 0, torch.ones_like(sums), sums))
        return torch.where(self._chosen(call, table), new, table)

    def _chosen(self, call: AttentionCall, table: Tensor) -> Tensor:
        heads = self.heads[call.layer] if isinstance(self.heads, Mapping) else self.heads
        chosen = torch.ones(1, *table.shape[1:3], 1, dtype=torch.bool, device=table.device)
        if heads != "all":
            chosen[:] = False
            chosen[:, list(heads)] = True  # type: ignore[arg-type]
        if self.queries == "last":
            chosen[:, :, :-1] = False
        return chosen
