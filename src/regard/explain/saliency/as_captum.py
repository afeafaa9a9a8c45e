"""Saliency methods where captum's are wanted: its metrics, its noise tunnel, code that calls `attribute`.

A map (B, 1, h, w) becomes an attribution of the input's shape: bilinear, each place's number shared out among the channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import MissingExtra, ShapeError
from regard.contract.optional import installed
from regard.primitives.maps import Target, enlarge

CARD = ExplanationCard(
    slug="as_captum",
    title="Saliency methods as captum's attributions",
    exports=("as_captum",),
    baseline=True,
)


def as_captum(method: Callable[[Any, Tensor, Target], Tensor], model: Any) -> Any:
    """A `captum.attr.Attribution` of a model: `attribute(inputs, target=None)` gives the input's shape.

    method: (model, x, target) to (B, 1, h, w) or to x's shape, such as `partial(normgrad, layer="features")`, or for what
    returns more `lambda model, x, target: lrp(model, x, target).relevance`. inputs: (B, C, H, W), or a tuple of one such, and
    then so is the result. target: a class, one a row, or None for the likeliest. Sums over channels are the map. Raises
    MissingExtra without captum, ShapeError for several inputs and for maps of another shape.
    """
    if not installed("captum"):
        raise MissingExtra("as_captum needs 'captum', which is not installed: pip install captum")
    from captum.attr import Attribution

    def read(self: Any, inputs: Any, target: Target = None) -> Any:
        if not isinstance(inputs, tuple):
            return _spread(method(model, inputs, target), inputs)
        if len(inputs) != 1:
            raise ShapeError(f"one input is read, not {len(inputs)}")
        return (_spread(method(model, inputs[0], target), inputs[0]),)

    class Method(Attribution):  # type: ignore[misc]
        # captum's noise tunnel asks for what stands behind `attribute`
        @functools.wraps(read)
        def attribute(self, inputs: Any, target: Target = None) -> Any:
            return read(self, inputs, target)

    return Method(model)


def _spread(maps: Tensor, x: Tensor) -> Tensor:
    if maps.shape == x.shape:
        return maps
    if maps.dim() != 4 or x.dim() != 4 or maps.shape[:2] != (len(x), 1):
        raise ShapeError(
            f"the method gives {tuple(maps.shape)} for {tuple(x.shape)}; (B, 1, h, w) or the same is needed"
        )
    # captum takes views of it
    return (enlarge(maps, (x.shape[2], x.shape[3])) / x.shape[1]).expand_as(x).contiguous()
