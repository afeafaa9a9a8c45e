"""NormGrad: how much each place of an image would move the weights of a layer that does nothing.

Put a layer that is the identity behind activations x; the gradient of its weights is a sum over places u of

    bias g_u,   scaling g_u x_u,   conv1x1 g_u x_u',   conv3x3 g_u x_N(u)',   depthwise3x3 g_u[c] x_N(u)[c]

with g = d score / d x, so that positive helps. One number a place is left of each by norm, filter_norm (the norm of the
positive part), sum or max. NormGrad is conv1x1 and norm, |g_u| |x_u|; other known methods are other cells of this grid.
Tables of C x C numbers are never made: what is left of an outer product follows from its two factors.

Departs from the released code: g has the sign of the score, not of the loss; scaling and max are told as they are, without
an absolute value; every row of a batch has a map of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, near
from regard.explain.saliency.places import Inputs, Site, places
from regard.primitives.maps import Target, enlarge, minmax

CARD = ExplanationCard(
    slug="normgrad",
    title="NormGrad: saliency as norms of spatial gradients",
    paper="There and Back Again: Revisiting Backpropagation Saliency Methods",
    exports=("normgrad", "saliency", "linear_approx", "identity_gradients", "combine_layers"),
    reads="vit_classifier",
    takes={"model": "model", "x": "images"},
    options={"layer": 0},
)

Extract = Literal["conv1x1", "conv3x3", "depthwise3x3", "scaling", "bias"]
Reduce = Literal["norm", "filter_norm", "sum", "max"]


def normgrad(
    model: Any,
    x: Inputs,
    target: Target = None,
    *,
    layer: str | int,
    site: Site = "resid_post",
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    upsample: tuple[int, int] | None = None,
    normalize: bool = False,
) -> Tensor:
    """|g_u| |x_u| (section 4.1): (B, 1, h, w), 0 or more. Arguments as of `saliency`."""
    return saliency(
        model, x, target, layer=layer, site=site, grid=grid, prefix_tokens=prefix_tokens, upsample=upsample,
        normalize=normalize,
    )  # fmt: skip


def linear_approx(
    model: Any,
    x: Inputs,
    target: Target = None,
    *,
    layer: str | int,
    site: Site = "resid_post",
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    upsample: tuple[int, int] | None = None,
    normalize: bool = False,
) -> Tensor:
    """Gradient times activation, g_u' x_u: (B, 1, h, w), negative where a place speaks against. Arguments as of `saliency`."""
    return saliency(
        model, x, target, layer=layer, extract="scaling", reduce="sum", site=site, grid=grid,
        prefix_tokens=prefix_tokens, upsample=upsample, normalize=normalize,
    )  # fmt: skip


def saliency(
    model: Any,
    x: Inputs,
    target: Target = None,
    *,
    layer: str | int,
    extract: Extract = "conv1x1",
    reduce: Reduce = "norm",
    site: Site = "resid_post",
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
    upsample: tuple[int, int] | None = None,
    normalize: bool = False,
) -> Tensor:
    """One cell of the grid of methods (table 1) at a layer: (B, 1, h, w), unnormalised.

    model: any torch module, run as it stands (eval mode is the caller's). x: its one argument, (B, …), or its keywords.
    target: a class, one a row (B,), a function of the output that gives (B,), or None for the likeliest class. layer: a
    module's name, which gives (B, C, h, w), or (B, N, C) with grid=; or for models of transformers the number of a layer, at
    `site`. extract, reduce: see above. grid, prefix_tokens: how tokens lie, see `token_grid`; known of transformers' image
    models. upsample: bilinear, to this height and width. normalize: each map between 0 and 1. No weight's gradient changes.
    Raises OptionError, ShapeError, Unsupported.
    """
    for name, value, kinds in (("extract", extract, get_args(Extract)), ("reduce", reduce, get_args(Reduce))):
        if value not in kinds:
            raise OptionError(f"{name}={value!r} is not known{near(value, kinds)}; there are {', '.join(kinds)}")
    found = places(model, x, target, layer, site, grid, prefix_tokens).heard()
    maps = _reduced(found.activation, found.gradient, extract, reduce)
    maps = maps if upsample is None else enlarge(maps, upsample)
    return minmax(maps) if normalize else maps


def identity_gradients(activation: Tensor, gradient: Tensor, extract: Extract) -> Tensor:
    """The share of each place in the gradient of an identity layer's weights: (B, K, h, w) of (B, C, h, w) both.

    K is C for bias and scaling, C C for conv1x1, 9 C C for conv3x3, 9 C for depthwise3x3; order of torch's weights (output,
    input, y, x). Borders are padded with zeros. Summed over B and places it is that gradient.
    """
    if extract == "bias":
        return gradient
    if extract == "scaling":
        return gradient * activation
    if extract == "depthwise3x3":
        return (gradient.unsqueeze(2) * _around(activation).unflatten(1, (-1, 9))).flatten(1, 2)
    source = activation if extract == "conv1x1" else _around(activation)
    return (gradient.unsqueeze(2) * source.unsqueeze(1)).flatten(1, 2)


def combine_layers(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    *,
    how: Literal["product", "weighted"] = "product",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Maps of several layers as one (B, 1, *size): each enlarged and brought between 0 and 1, then multiplied.

    how: "weighted" raises each to its share of `weights` (0 or more, one a map; equal if None) before. Raises OptionError.
    """
    if how not in ("product", "weighted"):
        raise OptionError(f'how is "product" or "weighted", not {how!r}')
    if not maps or (weights is not None and (how != "weighted" or len(weights) != len(maps))):
        raise OptionError(
            f'give maps, and weights= one for each of them with how="weighted"; there are {len(maps)} maps'
        )
    if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
        raise OptionError(f"weights are 0 or more, and not all 0: {list(weights)}")
    parts = [minmax(enlarge(m, size)) for m in maps]
    given = [1.0] * len(parts) if weights is None else list(weights)
    shares = [w / sum(given) for w in given] if how == "weighted" else given
    return torch.stack([part**share for part, share in zip(parts, shares, strict=True)]).prod(0)


def _reduced(x: Tensor, g: Tensor, extract: Extract, reduce: Reduce) -> Tensor:
    """What is left of `identity_gradients`, (B, 1, h, w); of an outer product by its factors."""
    if extract not in ("conv1x1", "conv3x3"):
        parts = identity_gradients(x, g, extract)
        if reduce == "sum":
            return parts.sum(1, keepdim=True)
        if reduce == "max":
            return parts.amax(1, keepdim=True)
        return (parts if reduce == "norm" else F.relu(parts)).norm(dim=1, keepdim=True)
    x = x if extract == "conv1x1" else _around(x)
    if reduce == "norm":
        return _norm(g) * _norm(x)
    if reduce == "sum":
        return g.sum(1, keepdim=True) * x.sum(1, keepdim=True)
    if reduce == "max":
        ends = [(t.amax(1, keepdim=True), t.amin(1, keepdim=True)) for t in (g, x)]
        return torch.stack([a * b for a in ends[0] for b in ends[1]]).amax(0)
    # positive entries are those of two factors of the same sign
    same = _norm(F.relu(g)) * _norm(F.relu(x))
    return torch.hypot(same, _norm(F.relu(-g)) * _norm(F.relu(-x)))


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=1, keepdim=True)


def _around(x: Tensor) -> Tensor:
    """The 3 x 3 places around each, (B, 9 C, h, w), zeros beyond the border."""
    return F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:])
