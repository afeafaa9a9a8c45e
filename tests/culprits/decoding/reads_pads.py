"""Wrong: pads are read as if they were text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.contract.card import DecodingCard
from regard.steer.decoding.diverse_beam import DiverseBeam

CAUGHT_BY = "rows_are_written_alone"
CARD = DecodingCard(
    slug="reads_pads",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    options={"num_groups": 3, "diversity": 2.0},
    generate={"num_beams": 6, "num_return_sequences": 6},
    off={},
    padding=True,
)


@dataclass(frozen=True)
class Wrong(DiverseBeam):
    """Write."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        return super().__call__(*args, **{**given, "attention_mask": None})
