"""Wrong: the best comes last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.contract.card import DecodingCard
from regard.steer.decoding.diverse_beam import DiverseBeam

CAUGHT_BY = "off_is_the_library"
CARD = DecodingCard(
    slug="worst_first",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    options={"num_groups": 3, "diversity": 2.0},
    generate={"num_beams": 6, "num_return_sequences": 6},
    off={"num_groups": 1},
    padding=False,
)


@dataclass(frozen=True)
class Wrong(DiverseBeam):
    """Write."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        return super().__call__(*args, **given).flip(0)
