"""How a row of scores becomes a row of weights.

A normaliser is called as `normaliser(scores, mask, counts) -> weights`: scores (B, H, N, M) with bias added, in the
dtype that accumulates; mask bool or None, True = may attend; counts (B|1, H|1, N) visible keys, given if
`needs_counts`. Masked weights are exactly 0, and so is a row that may attend nothing.

kind: "row" needs a statistic of the row; "additive" weighs every key on its own, so outputs over disjoint keys add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError


@dataclass(frozen=True)
class Normaliser:
    """Base: one method to write. mask_value: what a masked score becomes. empty_row: what a row of no keys weighs."""

    kind: ClassVar[Literal["row", "additive"]] = "row"
    mask_value: ClassVar[float] = 0.0
    empty_row: ClassVar[float] = 0.0
    needs_counts: ClassVar[bool] = False

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Softmax(Normaliser):
    """exp(score) over its sum."""

    mask_value: ClassVar[float] = float("-inf")

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        top = scores.detach().amax(-1, keepdim=True)
        # a row without keys has top = -inf: shift by 0 there, so that no -inf - -inf appears
        weights = torch.exp(scores - torch.where(top.isinf(), torch.zeros_like(top), top))
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total == 0, torch.ones_like(total), total)


@dataclass(frozen=True)
class Sigmoid(Normaliser):
    """sigmoid(score + bias), each key on its own. bias: a constant, -ln(n) for training length n."""

    kind: ClassVar[Literal["row", "additive"]] = "additive"
    bias: float = 0.0

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        return _hide(torch.sigmoid(scores + self.bias), mask)


@dataclass(frozen=True)
class L1(Normaliser):
    """phi(score) over its sum, for a positive phi. phi: "softplus", "exp" or "relu". eps: added to the sum."""

    phi: str = "softplus"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.phi not in _PHI:
            raise OptionError(f"L1 knows no phi {self.phi!r}; it knows {', '.join(_PHI)}")
        if self.eps < 0:
            raise OptionError(f"L1 needs eps >= 0, not {self.eps}")

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        weights = _hide(_PHI[self.phi](scores), mask)
        total = weights.sum(-1, keepdim=True)
        # without eps a row of no weight would be 0 / 0
        return weights / (torch.where(total == 0, torch.ones_like(total), total) + self.eps)


@dataclass(frozen=True)
class ReLUOverN(Normaliser):
    """relu(score) over the number of visible keys of the row."""

    kind: ClassVar[Literal["row", "additive"]] = "additive"
    needs_counts: ClassVar[bool] = True

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        assert counts is not None
        return _hide(torch.relu(scores), mask) / counts.clamp(min=1)[..., None].to(scores.dtype)


@dataclass(frozen=True)
class Linear(Normaliser):
    """The score itself is the weight."""

    kind: ClassVar[Literal["row", "additive"]] = "additive"

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        return _hide(scores, mask)


@dataclass(frozen=True)
class Sharpen(Normaliser):
    """Re-weights the rows of another normaliser: relu(n_i A - offset)^power, over its sum.

    inner: the normaliser whose rows A are sharpened. power: above 0; larger comes nearer to the arg max.
    offset: in units of the mean weight 1/n_i. free_rows: rows with at most so many keys keep offset 0.
    A row in which nothing survives keeps the weights A.
    """

    needs_counts: ClassVar[bool] = True
    inner: Normaliser
    power: float = 15.0
    offset: float = 1.0
    free_rows: int = 3
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise OptionError(f"Sharpen needs a power above 0, not {self.power}")
        if self.eps < 0:
            raise OptionError(f"Sharpen needs eps >= 0, not {self.eps}")

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        assert counts is not None
        weights = self.inner(scores, mask, counts)
        n = counts[..., None].to(scores.dtype)
        above = torch.relu(weights * n - self.offset * (n > self.free_rows).to(n.dtype))
        above = _hide(above, mask)
        top = above.detach().amax(-1, keepdim=True)
        # rounding alone lifts a uniform row above its mean by less than this: nothing stands out there
        flat = top <= 64 * torch.finfo(scores.dtype).eps
        # over the row's maximum first: the naive power overflows float16 at 15
        shares = above / torch.where(flat, torch.ones_like(top), top)
        # a power below 1 has an infinite slope at 0, which times a dead weight's slope of 0 is NaN
        dead = shares == 0
        sharp = (torch.where(dead, torch.ones_like(shares), shares) ** self.power).masked_fill(dead, 0.0)
        total = sharp.sum(-1, keepdim=True)
        return torch.where(flat, weights, sharp / (torch.where(flat, torch.ones_like(total), total) + self.eps))


_PHI: dict[str, Callable[[Tensor], Tensor]] = {"softplus": F.softplus, "exp": torch.exp, "relu": torch.relu}


def _hide(weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights if mask is None else weights.masked_fill(~mask, 0.0)
