"""Wrong: with one group it is beam search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.contract.card import DecodingCard
from regard.steer.decoding.diverse_beam import DiverseBeam

CAUGHT_BY = "changes_what_is_written"
CARD = DecodingCard(
    slug="writes_as_the_library",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    options={"num_groups": 1, "diversity": 2.0},
    generate={"num_beams": 6, "num_return_sequences": 6},
    off={},
    padding=False,
)


@dataclass(frozen=True)
class Wrong(DiverseBeam):
    """Write."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        return super().__call__(*args, **given)
