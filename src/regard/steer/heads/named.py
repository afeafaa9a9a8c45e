"""Layers and heads as settings name them, checked against the model that a session is on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.contract.errors import OptionError


def named_layer(session: Any, layer: int, heads: Sequence[int] = ()) -> int:
    """A layer, negative from the last, counted from the first. heads: of it. Raises OptionError for what is not there."""
    layers, count = len(session.anatomy.main.layers), session.facts()["heads"]
    if not -layers <= layer < layers or any(not 0 <= head < count for head in heads):
        of = f", heads {list(heads)}" if heads else ""
        raise OptionError(f"layer {layer}{of}: there are {layers} layers of {count} heads")
    return layer % layers
