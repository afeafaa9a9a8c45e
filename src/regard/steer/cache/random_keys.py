"""Random keys: what stays is drawn. The floor that a way of choosing must stand above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard
from regard.steer.cache.evict import KVSelect

CARD = InterventionCard(
    slug="random_keys",
    title="Random keys",
    exports=("RandomKeysKept",),
    options={"budget": 8, "window": 3},
    sites=("kv",),
    owns=("kv",),
    off={"budget": 4096},
    spares={"layers": (1,)},
    baseline=True,
)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class RandomKeysKept(KVSelect):
    """Keep keys drawn at random, once the prompt is complete. seed: of the draw, with the layer. Raises OptionError."""

    seed: int = 0

    def scores(self, layer: int, kept: Any) -> Tensor:
        """A number drawn for each key."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        return torch.rand(kept.keys.shape[:3], generator=generator).to(kept.keys.device)
