"""Wrong: its settings can be changed after it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.contract.card import DecodingCard
from regard.steer.decoding.diverse_beam import DiverseBeam

CAUGHT_BY = "decoding_is_a_frozen_value"
CARD = DecodingCard(
    slug="can_be_changed",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    options={"num_groups": 3, "diversity": 2.0},
    generate={"num_beams": 6, "num_return_sequences": 6},
    off={},
    padding=False,
)


@dataclass
class Wrong:
    """Write."""

    num_groups: int
    diversity: float

    def __call__(self, *args: Any, **given: Any) -> Any:
        return DiverseBeam(self.num_groups, self.diversity)(*args, **given)
