"""Salient relevance: areas of an image in which the relevance of pixels stands out against its surroundings.

Layer-wise relevance propagation gives a grainy map of pixels; a saliency model of vision turns it into areas:

    S_i = 1 - exp(-mean over the K patches most like patch i of  d_value / (1 + c d_position)),   at several scales
    S_i (1 - distance to the nearest focus),   foci: S > 0.8 of the mean over scales

Departs from the released code, which ends with the relevance and leaves the areas to the saliency model's own; all constants
are that model's, and as there a map is first brought to 250 pixels, without which its patches of 7 would cover half of a
small one, and that of each scale between 0 and 1, without which nothing would pass 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.explain.saliency.lrp import Relevance, Rule, lrp
from regard.explain.saliency.map_view import MapView
from regard.primitives.maps import Target, enlarge, minmax

CARD = ExplanationCard(
    slug="salient_relevance",
    title="Salient relevance",
    paper="Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise relevance "
    "propagation",
    exports=("salient_relevance", "SalientRelevance", "context_aware_saliency"),
    reads="cnn",
    takes={"model": "model", "x": "images"},
    options={"size": None, "patch": 3, "step": 1, "neighbours": 8},
    figure=True,
    builds_on=("salient_relevance", "map_view"),
)

# the smallest scale of the map at which patches are looked for, and how many are compared at a time
_LEAST, _ROWS = 0.2, 512


@dataclass(frozen=True, eq=False)
class SalientRelevance:
    """saliency: areas that stand out, (B, 1, H, W) in 0 to 1; pixels: the map that they come from; relevance: its source."""

    saliency: Tensor
    pixels: Tensor
    relevance: Relevance

    def figure(self) -> Any:
        """The pixel maps above, the areas below. Raises MissingExtra without plotly."""
        return MapView(self.saliency, self.pixels).figure()


def salient_relevance(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    rules: Literal["paper"] | Mapping[str, Rule] = "paper",
    eps: float = 1e-9,
    size: int | None = 250,
    patch: int = 7,
    step: int = 3,
    neighbours: int = 64,
    c: float = 3.0,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    among: Sequence[float] = (1.0, 0.5, 0.25),
    focus: float = 0.8,
) -> SalientRelevance:
    """Areas of an image (B, C, H, W) that matter for a class. Arguments as of `lrp` and `context_aware_saliency`."""
    relevance = lrp(model, x, target, rules=rules, eps=eps)
    if relevance.relevance.dim() != 4:
        raise ShapeError(f"areas need images (B, C, H, W), not {tuple(x.shape)}")
    pixels = relevance.pixels
    areas = context_aware_saliency(
        pixels, size=size, patch=patch, step=step, neighbours=neighbours, c=c, scales=scales, among=among, focus=focus
    )
    return SalientRelevance(areas, pixels, relevance)


def context_aware_saliency(
    maps: Tensor,
    *,
    size: int | None = 250,
    patch: int = 7,
    step: int = 3,
    neighbours: int = 64,
    c: float = 3.0,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    among: Sequence[float] = (1.0, 0.5, 0.25),
    focus: float = 0.8,
) -> Tensor:
    """Places whose patch is unlike all others, above all those near by (Goferman et al., 2012, section 3): in 0 to 1.

    maps: (B, 1, h, w) or (h, w), and so is the result. size: longer side that they are brought to first, in pixels; None for
    as they are. patch: odd width. step: pixels from a patch to the next. neighbours: how many of the most similar other
    patches count. c: how much distance excuses. scales: of the map; the mean is taken, each between 0 and 1. among: scales,
    times its own, at which a patch is looked for, those above 0.2 of the map's. focus: places above it are foci, others lose
    with the distance to the nearest, the farthest all. A map that is the same everywhere gives 0. Time grows as
    (size / step)^4: seconds a map. Raises ShapeError, OptionError.
    """
    if patch < 1 or patch % 2 == 0 or min(neighbours, step) < 1 or c < 0 or (size is not None and size < 2):
        raise OptionError(
            f"patch is odd, neighbours and step at least 1, c 0 or more, size at least 2, not {patch}, {neighbours}, {step}, "
            f"{c}, {size}"
        )
    for name, given in (("scales", scales), ("among", among)):
        if not given or min(given) <= 0 or max(given) > 1:
            raise OptionError(f"{name} lie above 0 and up to 1, not {tuple(given)}")
    if not 0 <= focus <= 1 or 1.0 not in among:
        raise OptionError(f"focus lies in 0 to 1 and among has a patch's own scale, 1, not {focus}, {tuple(among)}")
    if maps.dim() == 2:
        found = context_aware_saliency(
            maps[None, None], size=size, patch=patch, step=step, neighbours=neighbours, c=c, scales=scales, among=among,
            focus=focus,
        )  # fmt: skip
        return found[0, 0]
    if maps.dim() != 4 or maps.shape[1] != 1 or min(maps.shape[2:]) < 2:
        raise ShapeError(f"maps are (B, 1, h, w) or (h, w), at least 2 x 2, not {tuple(maps.shape)}")
    h, w = maps.shape[2:]
    factor = 1.0 if size is None else size / max(h, w)
    whole = (max(round(h * factor), 2), max(round(w * factor), 2))
    high = minmax(_resized(maps.detach().to(torch.promote_types(maps.dtype, torch.float32)), whole))
    total = torch.zeros_like(high)
    for scale in scales:
        pyramid = [_resized(high, _side(whole, scale * part, step)) for part in _seen_at(scale, among)]
        unlike = torch.stack(
            [_unlikeness([level[i, 0] for level in pyramid], patch, step, neighbours, c) for i in range(len(maps))]
        )
        # the outermost patches stand on the border's pixels
        inner = F.interpolate(unlike.unsqueeze(1), pyramid[0].shape[2:], mode="bilinear", align_corners=True)
        total += minmax(enlarge(inner, whole)) / len(scales)
    return _resized(torch.stack([_focused(m[0], focus) for m in total]).unsqueeze(1), (h, w))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)


def _side(whole: tuple[int, int], scale: float, step: int) -> tuple[int, int]:
    """The sizes nearest to a scale on which patches reach both borders."""
    h, w = (step * max(round((n * scale - 1) / step), 1) + 1 for n in whole)
    return h, w


def _seen_at(scale: float, among: Sequence[float]) -> list[float]:
    """A patch's own scale, and the others that are not too small."""
    return [1.0, *(part for part in among if part != 1 and scale * part >= _LEAST - 1e-9)]


def _unlikeness(pyramid: Sequence[Tensor], patch: int, step: int, neighbours: int, c: float) -> Tensor:
    """1 - exp(-mean of the smallest distances) of every patch of the first of (h, w), to those of all."""
    patches, positions = zip(*(_patches(image, patch, step) for image in pyramid), strict=True)
    others, places = torch.cat(patches), torch.cat(positions)
    found = []
    for start in range(0, len(patches[0]), _ROWS):
        rows = slice(start, start + _ROWS)
        # no distance of values in 0 to 1 exceeds the width
        distance = _apart(patches[0][rows], others) / patch / (1 + c * _apart(positions[0][rows], places))
        own = torch.arange(len(distance), device=distance.device)
        distance[own, start + own] = torch.inf
        nearest = distance.topk(min(neighbours, len(others) - 1), largest=False).values
        found.append(1 - (-nearest.mean(1)).exp())
    return torch.cat(found).view([(n - 1) // step + 1 for n in pyramid[0].shape])


def _patches(image: Tensor, patch: int, step: int) -> tuple[Tensor, Tensor]:
    """(patches, patch^2) of (h, w), and where they stand."""
    around = F.pad(image[None, None], (patch // 2,) * 4, mode="replicate")
    places = _positions(image.shape[0], image.shape[1], image).view(*image.shape, 2)[::step, ::step]
    return F.unfold(around, patch, stride=step)[0].T, places.reshape(-1, 2)


def _focused(saliency: Tensor, focus: float) -> Tensor:
    """Each place times 1 - its distance to the nearest focus, in units of the largest; as it is where there is none."""
    foci = (saliency > focus).flatten()
    if not bool(foci.any()):
        return saliency
    positions = _positions(saliency.shape[0], saliency.shape[1], saliency)
    nearest = torch.cat([_apart(some, positions[foci]).amin(1) for some in positions.split(_ROWS)])
    most = nearest.amax()
    return saliency * (1 - nearest.view_as(saliency) / torch.where(most == 0, torch.ones_like(most), most))


def _apart(a: Tensor, b: Tensor) -> Tensor:
    # products of matrices would blur small distances
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _positions(h: int, w: int, like: Tensor) -> Tensor:
    """(h w, 2): middles of pixels, in units of the longer side."""
    y, x = (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5 for size in (h, w))
    return torch.cartesian_prod(y, x) / max(h, w)
