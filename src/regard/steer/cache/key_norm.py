"""Key norm: keys of small norm stay, since those are attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard
from regard.steer.cache.evict import KVSelect

CARD = InterventionCard(
    slug="key_norm",
    title="Smallest key norms",
    paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    exports=("KeyNorm",),
    options={"budget": 8, "window": 3},
    sites=("kv",),
    owns=("kv",),
    off={"budget": 4096},
    spares={"layers": (1,)},
    padding=True,
    baseline=True,
)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class KeyNorm(KVSelect):
    """Keep the keys of the smallest L2 norm, once the prompt is complete (section 3). Raises OptionError."""

    def scores(self, layer: int, kept: Any) -> Tensor:
        """Minus the norm of each key."""
        return -kept.keys.float().norm(dim=-1)
