"""Attention sinks: the first keys and the last ones stay, so that a stream can go on for ever.

Departs from the paper: keys keep the positions that they were written with (its code renumbers them in the cache).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard
from regard.steer.cache.evict import KVSelect

CARD = InterventionCard(
    slug="attention_sinks",
    title="Sinks and window (StreamingLLM)",
    paper="Efficient Streaming Language Models with Attention Sinks",
    exports=("AttentionSinks",),
    options={"budget": 8, "window": 0, "sinks": 2},
    sites=("kv",),
    owns=("kv",),
    off={"budget": 4096},
    spares={"layers": (1,)},
    padding=True,
    baseline=True,
)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class AttentionSinks(KVSelect):
    """Keep the first `sinks` keys and the last ones up to `budget`, at every step (section 3.2). Raises OptionError."""

    window: int = 0
    sinks: int = 4
    always: ClassVar[bool] = True

    def scores(self, layer: int, kept: Any) -> Tensor:
        """Where each key stands; the sinks stay anyhow."""
        return kept.positions_of_all()
