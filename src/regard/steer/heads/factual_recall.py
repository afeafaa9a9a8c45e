"""The last layer held back, where it keeps a model from being sure: its parts say less.

    attn_out <- attention attn_out,   mlp_out <- mlp mlp_out,   z_h <- heads[h] z_h,      of the last layer

Only scaling is built: how the paper chooses what it takes away could not be checked in its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard
from regard.steer.heads.scale import ScaleComponents

CARD = InterventionCard(
    slug="factual_recall",
    title="The last layer held back",
    part_of="factual_recall",
    exports=("SuppressLastLayer",),
    builds_on=("scale",),
    options={"mlp": 0.5, "attention": 0.8, "heads": {1: 0.0}},
    sites=("z", "attn_out", "mlp_out"),
    off={"mlp": 1.0, "attention": 1.0, "heads": {}},
    spares={"mlp": 0.5},
    padding=True,
)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class SuppressLastLayer:
    """Scale what the parts of the last layer say; 1 leaves a part as it is.

    mlp, attention: factors of the feed-forward part and of attention. heads: head -> factor, within attention. Raises
    OptionError for heads that the model lacks.
    """

    mlp: float = 1.0
    attention: float = 1.0
    heads: Mapping[int, float] = field(default_factory=dict)

    def start(self, session: Any) -> Any:
        """What acts in one session."""
        scales: dict[tuple[Any, ...], float] = {("head", -1, head): factor for head, factor in self.heads.items()}
        scales |= {(kind, -1): x for kind, x in (("attn", self.attention), ("mlp", self.mlp)) if x != 1.0}
        return ScaleComponents(scales).start(session)
