"""Pools: the tokens of a row as one vector. What all of them refuse, and the plain ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError


class Pool(nn.Module):
    """Tokens (B, N, C) as one vector (B, C); a row without tokens gives 0.

    dim: C. kind: "mean" of the tokens that take part, or the "last" of them. Raises OptionError, ShapeError.
    """

    def __init__(self, dim: int, kind: Literal["mean", "last"] = "mean"):
        super().__init__()
        if kind not in ("mean", "last"):
            raise OptionError(f'a pool takes the "mean" or the "last" of the tokens, not {kind!r}')
        self.dim, self.kind = dim, kind

    def forward(self, x: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """x (B, N, C); padding: bool (B, N), True for tokens that take part."""
        check_tokens(x, padding, self.dim)
        return masked_mean(x, padding) if self.kind == "mean" else last_token(x, padding)


def check_tokens(x: Tensor, padding: Tensor | None, dim: int, layers: int | None = None) -> None:
    """Raise ShapeError unless x is (B, N, dim), or (B, layers, N, dim), and padding bool (B, N)."""
    wanted = "(B, N, C)" if layers is None else f"(B, {layers}, N, C)"
    if x.dim() != (3 if layers is None else 4) or x.shape[-1] != dim or (layers is not None and x.shape[1] != layers):
        raise ShapeError(f"the pool takes tokens {wanted} with C = {dim}, not {tuple(x.shape)}")
    if padding is not None and (padding.dtype != torch.bool or padding.shape != (x.shape[0], x.shape[-2])):
        raise ShapeError(
            f"padding is {tuple(padding.shape)} of {padding.dtype}; it must be bool ({x.shape[0]}, {x.shape[-2]})"
        )


def masked_mean(x: Tensor, padding: Tensor | None) -> Tensor:
    """The mean over tokens that take part, (…, N, C) -> (…, C), summed in float32 at least; 0 where there are none.

    padding: bool, broadcastable to (…, N).
    """
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    if padding is None:
        return high.mean(-2).to(x.dtype)
    taken = padding.unsqueeze(-1)
    # values of pads may be anything, so they are replaced and not multiplied
    return (high.masked_fill(~taken, 0.0).sum(-2) / taken.sum(-2).clamp(min=1)).to(x.dtype)


def last_token(x: Tensor, padding: Tensor | None) -> Tensor:
    """The last token that takes part, (…, N, C) -> (…, C); 0 where there is none. padding: as for the mean."""
    if padding is None:
        return x[..., -1, :]
    last = (torch.arange(x.shape[-2], device=x.device) * padding).argmax(-1)
    place = last.expand(x.shape[:-2])[..., None, None].expand(*x.shape[:-2], 1, x.shape[-1])
    return blank_rows(x.gather(-2, place).squeeze(-2), padding)


def blank_rows(out: Tensor, padding: Tensor | None) -> Tensor:
    """0 in the rows (…, C) of which no token takes part. padding: bool (…, N), one for each row."""
    return out if padding is None else out.masked_fill(~padding.any(-1, keepdim=True), 0.0)
