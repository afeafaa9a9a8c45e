"""Heads made to look at given places: how a circuit is repaired, or what a head does when it looks elsewhere.

    A_ij <- weight r_i / |targets| for targets j,   A_ij (1 - weight) r_i / sum_others A_i for the others,   r_i = sum_j A_ij

Weights are set, not scores or outputs (which of them the paper's repair sets could not be checked in its code).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.attach import AttentionCall, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, ShapeError
from regard.steer.heads.named import named_layer
from regard.steer.scores.reweight import AttentionReweight

CARD = InterventionCard(
    slug="circuit_reuse",
    title="Heads made to look at given places",
    part_of="circuit_reuse",
    exports=("SetAttention",),
    options={"heads": {0: (0, 2), 1: (1,)}, "target": (2, 5)},
    sites=("weights",),
    off={"heads": {}},
    spares={"heads": {1: (1,)}},
    padding=True,
)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class SetAttention:
    """Let chosen heads look at target places of the prompt, all of them alike.

    heads: layer -> heads, layers negative from the last. target: places for all rows, or for each row its own, counted
    from the row's first token that is no pad, or negative from the prompt's last; of a prompt in pieces from the last
    so far, and targets lie in the first piece. weight: what the targets get of a row, 0 to 1. queries: "last", the last
    one of each pass, or "all"; a row that sees no target stays as it is. Raises OptionError, ShapeError where there are
    other rows than targets.
    """

    heads: Mapping[int, Sequence[int]]
    target: Sequence[int] | Sequence[Sequence[int]]
    weight: float = 1.0
    queries: Literal["last", "all"] = "last"

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise OptionError(f"weight is what the targets get of a row, 0 to 1, not {self.weight}")
        if self.queries not in ("last", "all"):
            raise OptionError(f'queries is "last" or "all", not {self.queries!r}')
        if not self.target or not all(self._of_row(row) for row in range(len(self.target))):
            raise OptionError("target is empty: name at least one place of every row")

    def start(self, session: Any) -> AttentionReweight:
        """What acts in one session. Raises OptionError for heads that the model lacks."""
        chosen = {named_layer(session, layer, heads): tuple(heads) for layer, heads in self.heads.items()}
        return AttentionReweight(rule=self._looking, heads=chosen, queries=self.queries)

    def _looking(self, call: AttentionCall, weights: Tensor) -> Tensor:
        target, visible = self._columns(call, weights), call.visible()
        if visible is not None:
            target = target & visible
        high = weights.to(torch.promote_types(weights.dtype, torch.float32))
        whole, count = high.sum(-1, keepdim=True), target.sum(-1, keepdim=True)
        others = high.masked_fill(target, 0.0)
        rest = others.sum(-1, keepdim=True)
        # a row with nothing else gives all of it to its targets
        share = torch.where(rest == 0, torch.ones_like(rest), torch.full_like(rest, self.weight))
        kept = others * ((1 - share) * whole / torch.where(rest == 0, torch.ones_like(rest), rest))
        new = kept + target * (share * whole / count.clamp(min=1))
        return torch.where(count > 0, new, high).to(weights.dtype)

    def _columns(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """bool (B, 1 or H, 1, M): the keys that are targets."""
        batch, heads, _, keys = weights.shape
        first, end = _prompt(call.step, batch)
        places = torch.zeros(batch, end, dtype=torch.bool)
        for row, start in enumerate(first):
            for place in self._of_row(row, batch):
                at = start + place if place >= 0 else end + place
                if not start <= at < end:
                    raise OptionError(f"target {place} of row {row}: its prompt has {end - start} tokens")
                places[row, at] = True
        places = places.to(weights.device)
        if call.positions is None:
            # a sliding cache hands on the last keys, one of fixed size more than there are
            total = call.step.start + call.step.tokens
            padded = F.pad(places, (0, max(keys, total) - end))
            return padded[:, None, None, max(total - keys, 0) :]
        # the keys of a cache that gave up others
        there = places.unsqueeze(1).expand(-1, call.positions.shape[1], -1)
        found = there.gather(2, call.positions.clamp(0, end - 1)) & (call.positions >= 0) & (call.positions < end)
        return found.repeat_interleave(heads // found.shape[1], 1).unsqueeze(2)

    def _of_row(self, row: int, batch: int | None = None) -> tuple[int, ...]:
        if isinstance(self.target[0], int):
            return tuple(self.target)  # type: ignore[arg-type]
        if batch is not None and len(self.target) != batch:
            raise ShapeError(f"there are targets for {len(self.target)} rows, and {batch} came")
        return tuple(self.target[row])  # type: ignore[arg-type]


def _prompt(step: Step, batch: int) -> tuple[list[int], int]:
    """Where each row's first token stands that is no pad, and where the prompt ends."""
    end = step.start + step.tokens - step.decoded
    if step.padding is None:
        return [0] * batch, end
    return step.padding[:, :end].to(torch.uint8).argmax(1).tolist(), end
