"""Wrong: the model keeps the number of beams as its default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.contract.card import DecodingCard
from regard.steer.decoding.diverse_beam import DiverseBeam

CAUGHT_BY = "leaves_the_model"
CARD = DecodingCard(
    slug="sets_a_default",
    title="A culprit",
    exports=("Wrong",),
    baseline=True,
    options={"num_groups": 3, "diversity": 2.0},
    generate={"num_beams": 6, "num_return_sequences": 6},
    off={},
    padding=False,
)


@dataclass(frozen=True)
class Wrong(DiverseBeam):
    """Write."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        model = args[0]
        model.generation_config.num_beams = given["generation_config"].num_beams
        return super().__call__(*args, **given)
