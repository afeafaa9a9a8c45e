"""Recency: the last keys stay, and none else. The baseline that every way of giving up keys must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard
from regard.steer.cache.evict import KVSelect

CARD = InterventionCard(
    slug="recency",
    title="Most recent keys",
    exports=("Recency",),
    options={"budget": 8, "window": 0},
    sites=("kv",),
    owns=("kv",),
    off={"budget": 4096},
    spares={"layers": (1,)},
    padding=True,
    baseline=True,
)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class Recency(KVSelect):
    """Keep the last `budget` keys of each head, at every step. Raises OptionError."""

    window: int = 0
    always: ClassVar[bool] = True

    def scores(self, layer: int, kept: Any) -> Tensor:
        """Where each key stands."""
        return kept.positions_of_all()
