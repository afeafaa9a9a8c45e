"""Wrong: the cache does not follow its beams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.contract.card import DecodingCard
from regard.steer.decoding.diverse_beam import DiverseBeam

CAUGHT_BY = "cache_changes_nothing"
CARD = DecodingCard(
    slug="loses_its_beams",
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
        cache = given.get("past_key_values")
        if cache is not None:
            cache.reorder_cache = lambda beams: None
        return super().__call__(*args, **given)
