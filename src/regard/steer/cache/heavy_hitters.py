"""Heavy hitters: the keys that were attended to most so far stay, with the last ones.

    worth_j = sum over all rows i so far of softmax(q_i k')_j

Departs from the paper: with shared key heads the sums of a group are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from regard.contract.attach import AttentionCall, Seen, intervention
from regard.contract.card import InterventionCard
from regard.steer.cache.evict import KVSelect, over_groups

CARD = InterventionCard(
    slug="heavy_hitters",
    title="Heavy hitters (H2O)",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    exports=("HeavyHitters",),
    options={"budget": 8, "window": 3},
    sites=("kv",),
    owns=("kv",),
    off={"budget": 4096},
    spares={"layers": (1,)},
    padding=True,
    baseline=True,
)

_SUMS = "heavy_hitters"


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class HeavyHitters(KVSelect):
    """Keep the keys with the largest sums of attention, at every step (algorithm 1). Raises OptionError."""

    always: ClassVar[bool] = True

    def on_read(self, call: AttentionCall, seen: Seen) -> None:
        """Add what each key got in this pass."""
        if call.kept is None or not self.acts_on(call.layer):
            return
        sums = over_groups(call.received(), call.kept.keys.shape[1], "mean")
        before = call.kept.marks.get(_SUMS)
        call.kept.marks[_SUMS] = sums if before is None else before + sums

    def scores(self, layer: int, kept: Any) -> Tensor | None:
        """The sums so far."""
        return kept.marks.get(_SUMS)
