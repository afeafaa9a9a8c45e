"""Whether a saliency map points at what a model uses: pixels are taken away, or the map is compared with a known place.

    deletion    score without the most relevant share s of the pixels, s from 0 to 1: it should fall at once
    insertion   score without the least relevant share s: it should stay
    ROAD        mean over s of (insertion - deletion) / 2, gaps filled by their neighbours' weighted mean

A gap is itself a mark that a network may read; "linear" leaves the least of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.primitives.maps import Target, class_scores, enlarge

CARD = ExplanationCard(
    slug="faithfulness",
    title="Faithfulness of saliency maps: deletion, insertion, ROAD, the pointing game",
    paper="A Consistent and Efficient Evaluation Strategy for Attribution Methods",
    exports=("faithfulness", "Faithfulness", "pointing_game", "PointingGame"),
    reads="cnn",
    takes={"model": "model", "x": "images", "maps": "maps"},
    options={"steps": 4},
    figure=True,
    baseline=True,
)

Fill = Literal["linear", "mean", "blur"]
# of the straight and of the slanting neighbours (ROAD, section 3.3)
_WEIGHTS = ((1 / 12, 1 / 6, 1 / 12), (1 / 6, 0.0, 1 / 6), (1 / 12, 1 / 6, 1 / 12))
# where filling stops: of the squared size of the first error
_SMALL = 1e-10


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """shares (S + 1,) of pixels taken away; deletion, insertion (B, S + 1): the score then, see the head of this file."""

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> Tensor:
        """Below the curve, (B,): low is faithful."""
        return torch.trapezoid(self.deletion, self.shares)

    @property
    def insertion_area(self) -> Tensor:
        """Below the curve, (B,): high is faithful."""
        return torch.trapezoid(self.insertion, self.shares)

    @property
    def road(self) -> Tensor:
        """(B,), high is faithful, about 0 for a map that says nothing: over all shares but none and all."""
        return (self.insertion - self.deletion)[:, 1:-1].mean(1) / 2

    def figure(self) -> Any:
        """A plotly figure: both curves, the mean over rows. Raises MissingExtra."""
        go = need("plotly.graph_objects", "bench")
        figure = go.Figure()
        for name, first in (("deletion", "most"), ("insertion", "least")):
            y = getattr(self, name).mean(0).tolist()
            figure.add_trace(
                go.Scatter(x=self.shares.tolist(), y=y, mode="lines+markers", name=f"{first} relevant first")
            )
        title = f"deletion {float(self.deletion_area.mean()):.3f}, insertion {float(self.insertion_area.mean()):.3f}"
        return figure.update_layout(title=title, xaxis_title="share of pixels taken away", yaxis_title="score")


@torch.no_grad()
def faithfulness(
    model: Callable[[Tensor], Any],
    x: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    steps: int = 20,
    fill: Fill | float = "linear",
    noise: float = 0.01,
    batch: int = 64,
    seed: int = 0,
) -> Faithfulness:
    """Take pixels of images away in the order of their maps, and in the opposite one.

    model: run as it stands. x: (B, C, H, W). maps: (B, 1, h, w), enlarged to the images. target: a class or one a row, whose
    probability is the score, None for the likeliest of the whole image; or a function of the output that gives (B,). steps:
    as many equal shares. fill: what stands there instead: "linear", the weighted mean of the neighbours, of gaps too (ROAD),
    with `noise` of that standard deviation; the "mean" of the image, of each channel; a "blur" of a tenth of its side; or a
    number. batch: images at a time. seed: of noise, and of the order of equal places. Raises OptionError, ShapeError.
    """
    if x.dim() != 4 or maps.dim() != 4 or maps.shape[:2] != (len(x), 1):
        raise ShapeError(f"images are (B, C, H, W) and maps (B, 1, h, w), not {tuple(x.shape)} and {tuple(maps.shape)}")
    if steps < 2 or batch < 1 or noise < 0:
        raise OptionError(
            f"steps is at least 2, batch at least 1 and noise 0 or more, not {steps}, {batch} and {noise}"
        )
    if isinstance(fill, str) and fill not in get_args(Fill):
        raise OptionError(f"fill is one of {', '.join(get_args(Fill))}, or a number, not {fill!r}")
    if not bool(maps.isfinite().all()):
        raise OptionError("the maps are not finite")
    score = _scorer(model, x, target)
    count = x.shape[2] * x.shape[3]
    draw = torch.Generator().manual_seed(seed)
    # equal places in no order of theirs, such as row by row
    mixed = torch.randperm(count, generator=draw).to(maps.device)
    values = enlarge(maps.float(), (x.shape[2], x.shape[3])).flatten(1)
    order = mixed[values[:, mixed].argsort(descending=True, stable=True)]
    rank = order.argsort().view(len(x), 1, *x.shape[2:]).to(x.device)
    curves: list[list[Tensor]] = [[], []]
    for step in range(steps + 1):
        gone = round(count * step / steps)
        for curve, hidden in zip(curves, (rank < gone, rank >= count - gone), strict=True):
            rows = range(0, len(x), batch)
            parts = [
                score(_without(x[i : i + batch], hidden[i : i + batch], fill, noise, draw), slice(i, i + batch))
                for i in rows
            ]
            curve.append(torch.cat(parts))
    deletion, insertion = (torch.stack(curve, 1).float().cpu() for curve in curves)
    return Faithfulness(torch.arange(steps + 1) / steps, deletion, insertion)


@dataclass(frozen=True, eq=False)
class PointingGame:
    """hits: bool (B,), whether the largest place of a map is on the object; mass (B,): the share of its positive sum there."""

    hits: Tensor
    mass: Tensor

    @property
    def accuracy(self) -> float:
        """The share of hits."""
        return float(self.hits.float().mean())

    def figure(self) -> Any:
        """A plotly figure: the masses, hits and misses apart. Raises MissingExtra."""
        go = need("plotly.graph_objects", "bench")
        figure = go.Figure()
        for name, rows in (("hit", self.hits), ("miss", ~self.hits)):
            figure.add_trace(
                go.Histogram(x=self.mass[rows].tolist(), xbins={"start": 0, "end": 1, "size": 0.05}, name=name)
            )
        return figure.update_layout(
            title=f"{self.accuracy:.0%} of the maps point at the object", xaxis_title="share of the map on it",
            yaxis_title="images", barmode="stack",
        )  # fmt: skip


def pointing_game(maps: Tensor, objects: Tensor, *, tolerance: float = 0.0) -> PointingGame:
    """Compare maps with where things are (Zhang et al., 2018; the mass of Wang et al., 2020).

    maps: (B, 1, h, w), enlarged to the objects'. objects: bool (B, 1, H, W). tolerance: how many pixels beside the object
    still hit (15 in the paper, on photographs). Raises OptionError, ShapeError.
    """
    if objects.dim() != 4 or objects.dtype != torch.bool or maps.shape[:2] != objects.shape[:2] or maps.shape[1] != 1:
        raise ShapeError(
            f"maps are (B, 1, h, w) and objects bool (B, 1, H, W), not {tuple(maps.shape)} and {tuple(objects.shape)} "
            f"{objects.dtype}"
        )
    if tolerance < 0 or not bool(objects.flatten(1).any(1).all()):
        raise OptionError(f"tolerance is 0 or more, not {tolerance}, and every row has an object")
    h, w = objects.shape[2:]
    large = enlarge(maps.detach().float(), (h, w)).cpu()
    best = large.flatten(1).argmax(1)
    hits = []
    for place, there in zip(best.tolist(), objects.cpu(), strict=True):
        away = there[0].nonzero() - torch.tensor(divmod(place, w))
        hits.append(bool((away.square().sum(1) <= tolerance**2).any()))
    positive = large.clamp(min=0)
    total = positive.sum((1, 2, 3))
    inside = (positive * objects.cpu()).sum((1, 2, 3))
    return PointingGame(torch.tensor(hits), inside / torch.where(total == 0, torch.ones_like(total), total))


def _scorer(model: Callable[[Tensor], Any], x: Tensor, target: Target) -> Callable[[Tensor, slice], Tensor]:
    """Scores of some rows; the class of the whole image stays the one that is asked for."""
    if callable(target) and not isinstance(target, Tensor):
        return lambda images, rows: class_scores(model(images), target)[0]
    classes = class_scores(model(x), target)[1]
    assert classes is not None

    def probability(images: Tensor, rows: slice) -> Tensor:
        output = model(images)
        logits = output if isinstance(output, Tensor) else output.logits
        return logits.float().softmax(-1).gather(1, classes[rows, None])[:, 0]

    return probability


def _without(x: Tensor, hidden: Tensor, fill: Fill | float, noise: float, draw: torch.Generator) -> Tensor:
    """Images (B, C, H, W) with something else where hidden (B, 1, H, W)."""
    if fill == "linear":
        new = _filled(x, hidden) + noise * torch.randn(x.shape, generator=draw).to(x)
    elif fill == "mean":
        new = x.mean((2, 3), keepdim=True)
    elif fill == "blur":
        new = _blurred(x)
    else:
        new = torch.full_like(x, float(fill))
    return torch.where(hidden, new, x)


def _filled(x: Tensor, hidden: Tensor) -> Tensor:
    """Every hidden place as the weighted mean of those around it, by conjugate gradients; the mean where all are hidden."""
    known, gap = torch.where(hidden, torch.zeros_like(x), x), hidden.to(x)
    around = _neighbours(torch.ones_like(gap))
    nothing = hidden.flatten(1).all(1)[:, None, None, None]
    start = known.sum((2, 3), keepdim=True) / (1 - gap).sum((2, 3), keepdim=True).clamp(min=1)
    found = torch.where(nothing, x.mean((2, 3), keepdim=True), start) * gap

    def apart(y: Tensor) -> Tensor:
        return gap * (around * y - _neighbours(y))

    left = gap * _neighbours(known) - apart(found)
    left = torch.where(nothing, torch.zeros_like(left), left)
    along, size = left, left.square().sum((2, 3), keepdim=True)
    enough = _SMALL * size
    for _ in range(4 * sum(x.shape[2:])):
        if bool((size <= enough).all()):
            break
        changed = apart(along)
        across = (along * changed).sum((2, 3), keepdim=True)
        rate = torch.where(size <= enough, torch.zeros_like(size), size / across.clamp(min=1e-30))
        found, left = found + rate * along, left - rate * changed
        new = left.square().sum((2, 3), keepdim=True)
        along = left + new / size.clamp(min=1e-30) * along
        size = new
    return known + found


def _neighbours(x: Tensor) -> Tensor:
    """The weighted sum over the eight around each place; beyond the border there is nothing."""
    weights = x.new_tensor(_WEIGHTS).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, weights, padding=1, groups=x.shape[1])


def _blurred(x: Tensor) -> Tensor:
    """By a Gaussian of a tenth of the longer side."""
    for axis, size in ((2, x.shape[2]), (3, x.shape[3])):
        deviation = max(x.shape[2:]) / 10
        reach = min(int(3 * deviation), size - 1)
        kernel = (-torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device).square() / (2 * deviation**2)).exp()
        shape, pad = ((1, 1, -1, 1), (0, 0, reach, reach)) if axis == 2 else ((1, 1, 1, -1), (reach, reach, 0, 0))
        weights = (kernel / kernel.sum()).view(shape).expand(x.shape[1], 1, *(-1, 1) if axis == 2 else (1, -1))
        x = F.conv2d(F.pad(x, pad, mode="reflect"), weights, groups=x.shape[1])
    return x
