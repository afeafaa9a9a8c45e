"""Class activation maps, of vision transformers as of convolutions: which places of an image speak for a class.

    CAM       map(p) = P sum_c g_c(p) a_c(p),               where every place has the same gradient g, P places
    Grad-CAM  map(p) = relu(sum_c a_c(p) mean over places of g_c),    or along the first principal component of its terms

a are the activations inside the model, g the gradient of the class's score there. Tokens become a grid without a reshaping
written by hand: the tape knows how they lie, and what stands before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import Unsupported
from regard.explain.saliency.places import Inputs, Site, places
from regard.primitives.maps import Target, enlarge, minmax
from regard.primitives.maps import gradcam as weigh

CARD = ExplanationCard(
    slug="cam",
    title="Class activation maps",
    paper="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    exports=("gradcam", "cam"),
    reads="vit_classifier",
    takes={"model": "model", "inputs": "images"},
    baseline=True,
)


def gradcam(
    model: Any,
    inputs: Inputs,
    target: Target = None,
    *,
    layer: int | str = -1,
    site: Site = "resid_pre",
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    upsample: tuple[int, int] | None = None,
    normalize: bool = False,
    eigen_smooth: bool = False,
) -> Tensor:
    """Grad-CAM (equations 1 and 2): (B, 1, h, w), 0 or more.

    inputs: images (B, 3, H, W), or the model's keywords. target: a class, one a row (B,), a function of the model's output
    that gives a number for each row, or None for the likeliest class. layer: of a vision transformer, whose stream at `site`
    is read (what leaves the last layer is read at its class token alone in many models, so that what enters it is the
    default); or the name of a module of any model, whose output (B, C, h, w) or (B, N, C) is read. grid, prefix_tokens: what
    holds instead of the model's own, see `token_grid`. upsample: bilinear, to this height and width. normalize: each map
    between 0 and 1. eigen_smooth: channels are not summed; of what each adds at each place the first principal component is
    kept, with the sum's sign, which leaves out what single channels add here and there. Gradients of the model's weights stay
    as they were. Raises OptionError, ShapeError, Unsupported.
    """
    found = places(model, inputs, target, layer, site, grid, prefix_tokens).heard()
    maps = weigh(found.activation, found.gradient)
    if eigen_smooth:
        maps = _first_component(found.activation * found.gradient.mean((2, 3), keepdim=True)).relu()
    return _finished(maps, upsample, normalize)


def cam(
    model: Any,
    inputs: Inputs,
    target: Target = None,
    *,
    layer: int | str = -1,
    site: Site = "resid_post",
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    upsample: tuple[int, int] | None = None,
    normalize: bool = False,
) -> Tensor:
    """The first class activation map (Zhou et al., 2016): what each place adds to a score that is linear in their mean.

    (B, 1, h, w), negative where a place speaks against the class; the mean over places is the score, up to its bias.
    Arguments as of `gradcam`. Raises Unsupported where places differ in their gradient, so that the score is not linear in
    their mean.
    """
    found = places(model, inputs, target, layer, site, grid, prefix_tokens)
    gradient = found.gradient
    spread = (gradient - gradient.mean((2, 3), keepdim=True)).abs().amax()
    if found.silent or float(spread) > 1e-3 * float(gradient.abs().amax()):
        raise Unsupported(
            f"{type(model).__name__} does not read the mean over places at {found.name}, as class activation maps "
            "require; gradcam takes any model"
        )
    patches = gradient.shape[2] * gradient.shape[3]
    return _finished((found.activation * gradient).sum(1, keepdim=True) * patches, upsample, normalize)


def _first_component(terms: Tensor) -> Tensor:
    """Terms (B, C, h, w) along the direction in which places differ most: (B, 1, h, w)."""
    rows = terms.flatten(2).mT
    direction = torch.linalg.svd(rows - rows.mean(1, keepdim=True), full_matrices=False).Vh[:, :1]
    along, sums = rows @ direction.mT, rows.sum(2, keepdim=True)
    # a component has no sign of its own
    agree = ((along - along.mean(1, keepdim=True)) * (sums - sums.mean(1, keepdim=True))).sum(1, keepdim=True)
    return torch.where(agree < 0, -along, along).mT.unflatten(2, terms.shape[2:])


def _finished(maps: Tensor, upsample: tuple[int, int] | None, normalize: bool) -> Tensor:
    maps = maps if upsample is None else enlarge(maps, upsample)
    return minmax(maps) if normalize else maps
