"""Neighbourhood attention: every place of a grid attends to the `kernel` places nearest to it on each axis.

    out_i = softmax over j in the neighbourhood of i, and the extra keys, of scale q_i.k_j + rpb[j - i], applied to v_j

Departs from the paper: relative biases stay, which the fused kernels dropped; a kernel of 1 and axes of length 1 work.
"""

from __future__ import annotations

import functools
import math
from typing import TypeVar

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.operator import operator
from regard.engines.block_sparse import block_sparse
from regard.engines.gather import gather
from regard.patterns import Neighborhood
from regard.patterns.selection import TokenSelection
from regard.patterns.tiled import Tiled, block_cells
from regard.primitives.biases import Indexed

CARD = OpCard(
    slug="neighborhood",
    title="Fused neighborhood attention",
    paper="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
    exports=("neighborhood_attention",),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=20 m=20 d=8 e=6",
    options={"shape": (4, 5), "kernel": 3},
    attends=("self", "causal_self"),
    accepts=("scale", "dropout"),
    time="n w",
    memory="n",
    engines=("block_sparse", "gather"),
)

Sizes = int | tuple[int, ...]
T = TypeVar("T")


@operator(CARD)
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shape: tuple[int, ...],
    kernel: Sizes,
    dilation: Sizes = 1,
    stride: Sizes = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    dropout_p: float = 0.0,
    engine: str | None = None,
) -> Tensor:
    """Attend within neighbourhoods on a grid (sections 2 and 3; the exact windows stand at `Neighborhood`).

    shape: places on each axis; q, k, v hold them row by row, the last axis fastest. kernel: keys on each axis;
    dilation: their distance; stride: how many queries share a window (section 3 of Generalized Neighborhood
    Attention); is_causal: no key after the query on that axis; each one value or one an axis. scale: D^-1/2 if None.
    rpb: (H, 2 kernel - 1 on each axis), added by offset in steps of the dilation, with gradient. extra_k (B, G, X, D),
    extra_v (B, G, X, E): further keys that every query sees, in the same softmax. engine: "block_sparse" works on tiles
    of the grid, "gather" on the list of keys of each query, "reference" on the whole table.
    Raises OptionError for kernel * dilation > side, stride > kernel, and a relative bias with a stride or an even kernel
    (one that spans its axis may be even); ShapeError.
    """
    pattern = Neighborhood(tuple(shape), kernel, dilation, stride, is_causal)
    n, m = q.shape[2], k.shape[2]
    if n != math.prod(shape) or m != n:
        raise ShapeError(
            f"the grid {tuple(shape)} has {math.prod(shape)} places, but q has {n} and k {m} tokens; both must hold the "
            "grid, other tokens go into extra_k, extra_v"
        )
    if engine == "reference" or (engine is not None and engine.partition(":")[0] == "gather"):
        place = torch.arange(n, device=q.device)
        steps = _steps(place, pattern)
        indexed = () if rpb is None else (_relative(rpb, pattern, q.shape[1], steps, steps),)
        if engine == "reference":
            return block_sparse(
                q, k, v, pattern, indexed=indexed, scale=scale, extra_k=extra_k, extra_v=extra_v, dropout_p=dropout_p,
                engine=engine,
            ).out  # fmt: skip
        return gather(
            q, k, v, TokenSelection(neighbours(pattern).to(q.device)), indexed=indexed, scale=scale, extra_k=extra_k,
            extra_v=extra_v, dropout_p=dropout_p, engine=engine,
        ).out  # fmt: skip
    tiled = Tiled.best(pattern, cells=block_cells(q.device), dilation=pattern.dilation)  # type: ignore[arg-type]
    if rpb is not None:
        rows, keys = (tiled.places(of_queries=of, device=q.device) for of in (True, False))
        indexed = (_relative(rpb, pattern, q.shape[1], rows, keys),)
    else:
        indexed = ()
    out = block_sparse(
        tiled.to_queries(q), tiled.to_keys(k), tiled.to_keys(v), tiled, indexed=indexed, scale=scale, extra_k=extra_k,
        extra_v=extra_v, dropout_p=dropout_p, engine=engine,
    ).out  # fmt: skip
    return tiled.from_queries(out)


def per_axis(name: str, value: T | tuple[T, ...], axes: int) -> tuple[T, ...]:
    """One value for each axis. Raises OptionError if there are others than `axes`."""
    found = tuple(value) if isinstance(value, tuple) else (value,) * axes
    if len(found) != axes:
        raise OptionError(f"{name} is {value}: the grid has {axes} axes; give one value, or one an axis")
    return found


def _steps(place: Tensor, pattern: Neighborhood) -> list[Tensor]:
    """Coordinates of places in row-major order on each axis, in steps of the dilation."""
    found = []
    for length, d in zip(reversed(pattern.shape), reversed(pattern.dilation), strict=True):  # type: ignore[arg-type]
        found.append(place % length // d)
        place = place // length
    return found[::-1]


def _relative(rpb: Tensor, pattern: Neighborhood, heads: int, rows: list[Tensor], keys: list[Tensor]) -> Indexed:
    """The relative bias as a table over offsets; rows, keys: coordinates of queries and keys on each axis."""
    axes = zip(pattern.kernel, pattern.stride, pattern.shape, strict=True)  # type: ignore[arg-type]
    if any(s != 1 or (k % 2 == 0 and k != side) for k, s, side in axes):
        raise OptionError(
            f"the relative bias needs odd kernels and stride 1, not kernel {pattern.kernel} and stride {pattern.stride}"
        )
    sides = tuple(2 * k - 1 for k in pattern.kernel)  # type: ignore[union-attr]
    if rpb.shape != (heads, *sides):
        raise ShapeError(f"the relative bias is {tuple(rpb.shape)}; it must be {(heads, *sides)}")
    # numbers whose differences are the places of offsets in the table
    middle = sum(side // 2 * math.prod(sides[axis + 1 :]) for axis, side in enumerate(sides))
    query, key = (
        torch.stack([x * math.prod(sides[axis + 1 :]) for axis, x in enumerate(places)]).sum(0).int()
        for places in (rows, keys)
    )
    return Indexed(rpb.reshape(1, heads, 1, -1), key, query - middle)


@functools.lru_cache(maxsize=32)
def neighbours(pattern: Neighborhood) -> Tensor:
    """The keys of every query, -1 where a causal window is cut: int32 (1, 1, N, product of the kernels)."""
    keys = torch.zeros(1, 1, dtype=torch.int64)
    for axis, side in enumerate(pattern.shape):
        kernel, dilation, stride = (v[axis] for v in (pattern.kernel, pattern.dilation, pattern.stride))  # type: ignore[index]
        one = Neighborhood((side,), kernel, dilation, stride, pattern.is_causal[axis])  # type: ignore[index]
        seen = one.dense(side, side)[0, 0]
        line = torch.where(seen, torch.arange(side), side).sort(-1).values[:, :kernel]
        # places of the axes so far, then this one: queries and keys are both products
        before, now = keys[:, None, :, None], line[None, :, None, :]
        keys = torch.where((before < 0) | (now == side), -1, before * side + now).flatten(2).flatten(0, 1)
    return keys.int()[None, None]
