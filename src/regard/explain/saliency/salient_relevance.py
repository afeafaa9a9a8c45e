"""Salient relevance: areas of an image in which the relevance of pixels stands out against its surroundings.

Layer-wise relevance propagation gives a grainy map of pixels; a saliency model of vision turns it into areas:

    S_i = 1 - exp(-mean over the K patches most like patch i of  d_value / (1 + c d_position)),   at several scales
    S_i (1 - distance to the nearest focus),   foci: S > 0.8 of the mean over scales

Departs from the released code, which ends with the relevance; the constants are those of the saliency model, and as there
the map of each scale is brought between 0 and 1 before the mean, without which nothing would pass 0.8.
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
    options={"patch": 3, "neighbours": 8},
    figure=True,
    builds_on=("salient_relevance", "map_view"),
)


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
    patch: int = 7,
    neighbours: int = 64,
    c: float = 3.0,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    focus: float = 0.8,
) -> SalientRelevance:
    """Areas of an image (B, C, H, W) that matter for a class. Arguments as of `lrp` and `context_aware_saliency`."""
    relevance = lrp(model, x, target, rules=rules, eps=eps)
    if relevance.relevance.dim() != 4:
        raise ShapeError(f"areas need images (B, C, H, W), not {tuple(x.shape)}")
    pixels = relevance.pixels
    areas = context_aware_saliency(pixels, patch=patch, neighbours=neighbours, c=c, scales=scales, focus=focus)
    return SalientRelevance(areas, pixels, relevance)


def context_aware_saliency(
    maps: Tensor,
    *,
    patch: int = 7,
    neighbours: int = 64,
    c: float = 3.0,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    focus: float = 0.8,
) -> Tensor:
    """Places whose patch is unlike all others, above all those near by (Goferman et al., 2012, section 3): in 0 to 1.

    maps: (B, 1, h, w) or (h, w), and so is the result. patch: odd width. neighbours: how many of the most similar other
    patches count. c: how much distance excuses. scales: of the map; the mean is taken, each between 0 and 1. focus: places
    above it are foci, others lose with the distance to the nearest. A map that is the same everywhere gives 0. Time grows as
    (h w)^2. Raises ShapeError, OptionError.
    """
    if patch < 1 or patch % 2 == 0 or neighbours < 1 or c < 0:
        raise OptionError(f"patch is odd, neighbours at least 1, c 0 or more, not {patch}, {neighbours}, {c}")
    if not scales or min(scales) <= 0 or max(scales) > 1 or not 0 <= focus <= 1:
        raise OptionError(f"scales lie above 0 and up to 1, focus in 0 to 1, not {tuple(scales)}, {focus}")
    if maps.dim() == 2:
        found = context_aware_saliency(
            maps[None, None], patch=patch, neighbours=neighbours, c=c, scales=scales, focus=focus
        )
        return found[0, 0]
    if maps.dim() != 4 or maps.shape[1] != 1 or min(maps.shape[2:]) < 2:
        raise ShapeError(f"maps are (B, 1, h, w) or (h, w), at least 2 x 2, not {tuple(maps.shape)}")
    h, w = maps.shape[2:]
    high = minmax(maps.detach().to(torch.promote_types(maps.dtype, torch.float32)))
    total = torch.zeros_like(high)
    for scale in scales:
        size = (max(round(h * scale), 2), max(round(w * scale), 2))
        shrunk = high if size == (h, w) else F.interpolate(high, size, mode="bilinear", antialias=True)
        unlike = torch.stack([_unlikeness(m[0], patch, neighbours, c) for m in shrunk]).unsqueeze(1)
        total += minmax(enlarge(unlike, (h, w))) / len(scales)
    return torch.stack([_focused(m[0], focus) for m in total]).unsqueeze(1)


def _unlikeness(image: Tensor, patch: int, neighbours: int, c: float) -> Tensor:
    """1 - exp(-mean of the smallest distances) of every place of (h, w)."""
    h, w = image.shape
    around = F.pad(image[None, None], (patch // 2,) * 4, mode="replicate")
    patches = F.unfold(around, patch)[0].T
    positions = _positions(h, w, image)
    count = len(patches)
    # products of matrices are quick, but blur small distances
    mode = "donot_use_mm_for_euclid_dist" if count <= 4096 else "use_mm_for_euclid_dist"
    found = []
    for start in range(0, count, 512):
        rows = slice(start, start + 512)
        # values lie in 0 to 1, so that no distance of patches exceeds their width
        value = torch.cdist(patches[rows], patches, compute_mode=mode) / patch
        distance = value / (1 + c * torch.cdist(positions[rows], positions))
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = torch.inf
        nearest = distance.topk(min(neighbours, count - 1), largest=False).values
        found.append(1 - (-nearest.mean(1)).exp())
    return torch.cat(found).view(h, w)


def _focused(saliency: Tensor, focus: float) -> Tensor:
    """Each place times 1 - its distance to the nearest focus; as it is where there is none."""
    foci = (saliency > focus).flatten()
    if not bool(foci.any()):
        return saliency
    positions = _positions(saliency.shape[0], saliency.shape[1], saliency)
    nearest = torch.cat([torch.cdist(some, positions[foci]).amin(1) for some in positions.split(512)])
    return saliency * (1 - nearest.view_as(saliency)).clamp(min=0)


def _positions(h: int, w: int, like: Tensor) -> Tensor:
    """(h w, 2), in units of the longer side."""
    y, x = (torch.arange(size, dtype=like.dtype, device=like.device) for size in (h, w))
    return torch.cartesian_prod(y, x) / max(h, w)
