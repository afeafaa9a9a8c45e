"""Biases that are read from a table by the distance or the place of a key, never spread over all pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.contract.errors import ShapeError

# what every engine says of a bias that it cannot add
NAN_BIAS = "the bias (or float mask) holds NaN; use -inf to hide a key"


@dataclass(frozen=True, eq=False)
class Indexed:
    """A bias s[b, h, i, j] += table[b, h, i or 0, key_index[j] - query_index[i]], read for allowed pairs only.

    table: floating (B|1, H|1, N|1, R), with gradient. key_index: int32 (M,). query_index: int32 (N,), of the rows of
    q. A relative table over distances has N axis 1; one term of a decomposed relative bias has it full, and a
    query_index of the key index of its leftmost neighbour. Raises ShapeError.
    """

    table: Tensor
    key_index: Tensor
    query_index: Tensor

    def __post_init__(self) -> None:
        if self.table.dim() != 4 or not self.table.is_floating_point():
            raise ShapeError(
                f"the table of an indexed bias is {self.table.dtype} {tuple(self.table.shape)}; it must be floating "
                "(B|1, H|1, N|1, R)"
            )
        for name, index in (("key_index", self.key_index), ("query_index", self.query_index)):
            if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
                raise ShapeError(f"{name} is {index.dtype} {tuple(index.shape)}; it must be a row of integers")

    def check(self, batch: int, heads: int, n: int, m: int) -> None:
        """Raise ShapeError if it does not fit (B, H, N, M) scores."""
        whole = (batch, heads, n)
        if any(s not in (1, t) for s, t in zip(self.table.shape[:3], whole, strict=True)):
            raise ShapeError(
                f"the table of an indexed bias is {tuple(self.table.shape)}; its first axes must be 1 or "
                f"(B, H, N) = {whole}"
            )
        for name, index, length in (("key_index", self.key_index, m), ("query_index", self.query_index, n)):
            if index.shape[0] != length:
                raise ShapeError(f"{name} has {index.shape[0]} places; it must have {length}")

    def places(self) -> Tensor:
        """Where in the table each pair looks, int64 (N, M); outside it for pairs that may not meet."""
        return self.key_index.long()[None, :] - self.query_index.long()[:, None]

    def dense(self) -> Tensor:
        """The bias over all pairs, (B|1, H|1, N, M); pairs that look outside the table get its nearest entry."""
        batch, heads, n, last = self.table.shape
        places = self.places().clamp(0, last - 1)
        table = self.table.expand(batch, heads, places.shape[0], last) if n == 1 else self.table
        return torch.gather(table, 3, places.expand(batch, heads, *places.shape))
