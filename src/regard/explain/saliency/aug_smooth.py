"""A saliency map as the mean over slightly changed images: mirrored, brighter and darker.

Details that hang on one way of showing an image are averaged away. After the option of that name in pytorch-grad-cam.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.primitives.maps import Target, class_scores

CARD = ExplanationCard(
    slug="aug_smooth",
    title="Saliency maps averaged over changed images",
    exports=("aug_smooth",),
    reads="cnn",
    takes={"method": "method", "model": "model", "x": "images"},
    baseline=True,
)


def aug_smooth(
    method: Callable[[Any, Tensor, Target], Tensor],
    model: Any,
    x: Tensor,
    target: Target = None,
    *,
    factors: Sequence[float] = (0.9, 1.0, 1.1),
    mirror: bool = True,
) -> Tensor:
    """The mean of a method's maps of an image times each factor, as it is and mirrored; mirrored maps are turned back.

    method: `partial(normgrad, layer="layer4")`, or any (model, x, target) -> (B, 1, h, w). x: (B, C, H, W). target: as of
    `saliency`; None is the likeliest class of the image as it is. Raises OptionError, ShapeError.
    """
    if not factors:
        raise OptionError("factors are what images are multiplied by, at least one")
    if x.dim() != 4:
        raise ShapeError(f"images are (B, C, H, W), not {tuple(x.shape)}")
    if target is None:
        with torch.no_grad():
            target = class_scores(model(x))[1]
    maps = []
    for flipped in (False, True) if mirror else (False,):
        for factor in factors:
            changed = factor * (x.flip(3) if flipped else x)
            found = method(model, changed, target)
            if found.dim() != 4 or found.shape[:2] != (len(x), 1):
                raise ShapeError(f"the method gives {tuple(found.shape)}; ({len(x)}, 1, h, w) is needed")
            maps.append(found.flip(3) if flipped else found)
    return torch.stack(maps).mean(0)
