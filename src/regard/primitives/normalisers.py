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

    def weigh(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None, keys: Tensor) -> Tensor:
        """What an engine calls: keys int64, broadcastable to the scores, is the position of each column."""
        return self(scores, mask, counts)


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
class Exp(Normaliser):
    """exp(score), each key on its own, without division: overflows where scores are large."""

    kind: ClassVar[Literal["row", "additive"]] = "additive"

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        # exp of a hidden score may overflow, and its slope would then be inf * 0
        hidden = scores if mask is None else scores.masked_fill(~mask, 0.0)
        return _hide(torch.exp(hidden), mask)


@dataclass(frozen=True)
class Grouped(Normaliser):
    """A softmax over representatives, shared out inside the group of each by another softmax.

    Keys stand in groups of `block`, the last of each is its representative. Where a row sees the representative, the
    keys of the group share its weight by a softmax of their own, and it keeps nothing itself; the keys of a group
    whose representative is hidden stand for themselves in the outer softmax. A representative without other visible
    keys in its group takes no part. block: keys, the representative among them, at least 2.
    """

    mask_value: ClassVar[float] = float("-inf")
    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 2:
            raise OptionError(f"Grouped needs groups of at least 2 keys, not {self.block}")

    def __call__(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None) -> Tensor:
        return self.weigh(scores, mask, counts, torch.arange(scores.shape[-1], device=scores.device))

    def weigh(self, scores: Tensor, mask: Tensor | None, counts: Tensor | None, keys: Tensor) -> Tensor:
        keys = keys.expand(scores.shape)
        seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
        # columns stand in ascending order, but some are missing: groups are numbered as they come
        group = keys // self.block
        group = F.pad((group[..., 1:] != group[..., :-1]).long().cumsum(-1), (1, 0))
        shape = tuple(scores.shape)
        last = (keys + 1) % self.block == 0
        ordinary = seen & ~last
        some = _in_groups(ordinary.to(scores.dtype), group, shape, "sum") > 0
        closed = (_in_groups((seen & last).to(scores.dtype), group, shape, "sum") > 0) & some
        inside = closed.gather(-1, group)
        outer = Softmax()(scores, torch.where(inside, seen & last, ordinary), None)
        shared = _in_groups(outer * (last & inside), group, shape, "sum").gather(-1, group)
        hidden = scores.masked_fill(~ordinary, float("-inf"))
        top = _in_groups(hidden.detach(), group, shape, "amax").gather(-1, group)
        raised = torch.exp(hidden - torch.where(top.isinf(), torch.zeros_like(top), top))
        total = _in_groups(raised, group, shape, "sum").gather(-1, group)
        inner = raised / torch.where(total == 0, torch.ones_like(total), total)
        return torch.where(inside, shared * inner, outer)


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


def _in_groups(values: Tensor, group: Tensor, shape: tuple[int, ...], how: str) -> Tensor:
    if how == "sum":
        return values.new_zeros(shape).scatter_add(-1, group, values)
    return values.new_full(shape, float("-inf")).scatter_reduce(-1, group, values, "amax")


def _hide(weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights if mask is None else weights.masked_fill(~mask, 0.0)
