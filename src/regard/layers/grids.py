"""What mixers of grids have in common: checks of what they are given, and the cut into regions."""

from __future__ import annotations

from torch import Tensor

from regard.contract.errors import OptionError, ShapeError, Unsupported


def check_grid(
    system: str,
    dim: int,
    x: Tensor,
    context: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    is_causal: bool = False,
    axes: int = 2,
) -> None:
    """Raise ShapeError if x is not (B, *grid, dim) with so many axes; Unsupported for a context, padding, causality."""
    if x.dim() != axes + 2 or x.shape[-1] != dim:
        names = ", ".join(("T", "H", "W")[-axes:])
        raise ShapeError(f"{system}: the grid is {tuple(x.shape)}; it must be (B, {names}, C) with C = {dim}")
    if context is not None:
        raise Unsupported(f"{system} reads no context: it mixes the places of one grid; softmax reads a context")
    if padding is not None:
        raise Unsupported(f"{system} takes no padding: crop the grid, or use softmax on its places as tokens")
    if is_causal:
        raise Unsupported(f"{system} is not causal; neighborhood is, along every axis")


def head_width(dim: int, heads: int, head_dim: int | None = None) -> int:
    """The width of a head: head_dim, or dim / heads. Raises OptionError."""
    if heads < 1 or (head_dim is None and dim % heads) or (head_dim is not None and head_dim < 1):
        raise OptionError(f"a width of {dim} does not divide into {heads} heads: give head_dim=")
    return dim // heads if head_dim is None else head_dim


def to_regions(x: Tensor, regions: int) -> Tensor:
    """A grid as regions x regions pieces in row-major order: (B, H, W, C) -> (B, regions^2, places, C)."""
    x = x.unflatten(2, (regions, -1)).unflatten(1, (regions, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_regions(x: Tensor, regions: int, side: tuple[int, int]) -> Tensor:
    """The inverse of `to_regions`; side: places of a region, y and x."""
    return x.unflatten(2, side).unflatten(1, (regions, regions)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
