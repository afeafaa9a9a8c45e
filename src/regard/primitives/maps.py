"""Maps of an image, (B, 1, h, w) of numbers a place: from tokens, from activations and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError

# height and width of a grid of patches, and how many tokens stand before it
Grid = tuple[int, int, int]
# what a map explains: a class, one a row (B,), a function of the output that gives (B,), or None for the likeliest class
Target = int | Tensor | Callable[[Any], Tensor] | None


def token_grid(
    tokens: int,
    known: Sequence[int] | None = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | None = None,
) -> Grid:
    """(h, w, prefix): how tokens of an image lie, the patches row after row behind the prefix.

    known: what is known of the model, (h, w, prefix). grid, prefix_tokens: what holds instead; with grid alone the tokens
    left over are the prefix. Raises OptionError, ShapeError.
    """
    if grid is None and known is None:
        raise OptionError("the grid of patches is not known: give grid=(h, w)")
    h, w = grid if grid is not None else tuple(known or ())[:2]
    if prefix_tokens is None:
        prefix_tokens = tokens - h * w if grid is not None or known is None else known[2]
    if h < 1 or w < 1 or prefix_tokens < 0 or prefix_tokens + h * w != tokens:
        raise ShapeError(
            f"{tokens} tokens are not {max(prefix_tokens, 0)} and a grid of {h} x {w}: give grid=(h, w), and "
            "prefix_tokens= for the class, distillation and register tokens before it"
        )
    return h, w, prefix_tokens


def to_grid(x: Tensor, grid: Grid) -> Tensor:
    """The patches among tokens (B, N, C) as an image (B, C, h, w)."""
    h, w, prefix = grid
    return x[:, prefix : prefix + h * w].transpose(1, 2).unflatten(2, (h, w))


def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """relu(sum_c mean(g_c) a_c) of activations a and gradients g (B, C, h, w): (B, 1, h, w) (Grad-CAM, equations 1, 2)."""
    return F.relu((activation * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))


def minmax(x: Tensor) -> Tensor:
    """Each map (…, h, w) between 0 and 1; one that is the same everywhere is 0."""
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    spread = high - low
    return (x - low) / torch.where(spread == 0, torch.ones_like(spread), spread)


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinear."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def class_scores(output: Any, target: Target = None) -> tuple[Tensor, Tensor | None]:
    """(scores (B,), classes int64 (B,) or None): what of a model's output a map explains.

    output: logits (B, classes), or what has them as `.logits`. Raises OptionError for a class that is not there, and for a
    function that gives anything but one number a row.
    """
    if callable(target) and not isinstance(target, Tensor):
        scores = target(output)
        if not isinstance(scores, Tensor) or scores.dim() != 1:
            raise OptionError("the target gives no (B,); one number a row is needed")
        return scores, None
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.dim() != 2:
        raise OptionError("the model gives no logits (B, classes): give target= as a function of its output")
    rows, classes = logits.shape
    chosen = logits.argmax(-1) if target is None else torch.as_tensor(target, device=logits.device)
    if chosen.is_floating_point() or chosen.dim() > 1 or (chosen.dim() == 1 and len(chosen) != rows):
        raise OptionError(f"target is a class or one for each of {rows} rows, not {tuple(chosen.shape)} {chosen.dtype}")
    if int(chosen.min()) < 0 or int(chosen.max()) >= classes:
        raise OptionError(f"there are classes 0 to {classes - 1}, not {chosen.tolist()}")
    chosen = chosen.long().expand(rows)
    return logits.gather(1, chosen[:, None])[:, 0], chosen
