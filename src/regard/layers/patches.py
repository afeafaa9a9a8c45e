"""Patches of an image as tokens, and learned tables of absolute positions that can be resized."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError


class PatchEmbed(nn.Module):
    """Every patch of `patch` x `patch` pixels through one linear map: (B, channels, Y, X) -> (B, H, W, C).

    Raises ShapeError for an image that does not divide into patches.
    """

    def __init__(self, dim: int, patch: int, *, channels: int = 3, bias: bool = True):
        super().__init__()
        if patch < 1:
            raise OptionError(f"a patch has at least 1 pixel a side, not {patch}")
        self.patch, self.channels = patch, channels
        self.proj = nn.Conv2d(channels, dim, patch, patch, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ShapeError(f"images are {tuple(images.shape)}; they must be (B, {self.channels}, Y, X)")
        if images.shape[2] % self.patch or images.shape[3] % self.patch:
            raise ShapeError(
                f"an image of {images.shape[2]}x{images.shape[3]} pixels does not divide into patches of {self.patch}"
            )
        return self.proj(images).permute(0, 2, 3, 1)


class PositionTable(nn.Module):
    """A learned vector for every place of a grid, added: (B, H, W, C) -> (B, H, W, C).

    shape: the grid (H, W). Another grid gets the table resized (bicubic). std: of the first values.
    """

    def __init__(self, dim: int, shape: tuple[int, int], *, std: float = 0.02):
        super().__init__()
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape, dim), std=std))

    def forward(self, x: Tensor) -> Tensor:
        return x + resize_table(self.table, (x.shape[1], x.shape[2]))


def resize_table(table: Tensor, shape: tuple[int, int]) -> Tensor:
    """A table of positions (H, W, C) for another grid: (*shape, C), bicubic; the table itself if the grid is the same."""
    if tuple(table.shape[:2]) == tuple(shape):
        return table
    image = table.permute(2, 0, 1)[None]
    return F.interpolate(image, size=shape, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
