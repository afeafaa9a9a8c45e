"""Terminator: blocks of slow and fast nets without residual connections.

    x_0 = W image;   x_i = drop(gelu(G-IBS(branches(x_{i-1}, maps of the two blocks before))) + b);   logits = W mean(x)

Consecutive global kernels are held together by the auxiliary loss "slow_neural". Departs from the released code, which
lacks the network itself: earlier maps are joined as they are, not repeated to the width; a linear map stands before the
blocks; batch statistics are kept for evaluation.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.collect import add_loss
from regard.contract.errors import OptionError, ShapeError
from regard.layers.conv_blocks import BatchNorm
from regard.mixers.grid.hyperzzw import HyperZZW, standardised

CARD = ModelCard(
    slug="hyperzzw",
    part_of="hyperzzw",
    title="Terminator",
    builds_on=("hyperzzw",),
    exports=("Terminator", "GroupStandardisation", "slow_neural_loss"),
    example="b=4 c=3 y=6 x=6",
    options={"size": 6, "classes": 5, "dims": (12, 24, 24), "kernels": (3, 3, 3, 3), "hidden": 4},
    task="images to logits",
)


class Terminator(nn.Module):
    """Square images (B, channels, size, size) to logits (B, classes), section 3.

    dims: widths, the stem's and one a block; each a multiple of the one before, those of blocks multiples of 12.
    kernels, hidden, batch_mean: see `HyperZZW`. dropout: after each block. Raises OptionError.
    """

    def __init__(
        self,
        size: int,
        classes: int,
        *,
        channels: int = 3,
        dims: tuple[int, ...] = (24, 24, 48),
        kernels: tuple[int, ...] = (3, 5, 7, 9),
        hidden: int = 16,
        dropout: float = 0.0,
        batch_mean: bool = False,
    ):
        super().__init__()
        if len(dims) < 2 or any(after % before for before, after in pairwise(dims)):
            raise OptionError(f"dims are {dims}: the stem's width and one a block, each a multiple of the one before")
        self.channels, self.size = channels, size
        self.stem = nn.Linear(channels, dims[0])
        self.blocks = nn.ModuleList(
            Block(dims[i], dims[i + 1], sum(dims[max(i - 2, 0) : i]), size, kernels, hidden, dropout, batch_mean)
            for i in range(len(dims) - 1)
        )
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; adds the mean of `slow_neural_loss` over consecutive blocks as "slow_neural". Raises ShapeError."""
        if images.dim() != 4 or tuple(images.shape[1:]) != (self.channels, self.size, self.size):
            wanted = f"(B, {self.channels}, {self.size}, {self.size})"
            raise ShapeError(f"images are {tuple(images.shape)}; they must be {wanted}")
        maps, kernels = [self.stem(images.permute(0, 2, 3, 1))], []
        for block in self.blocks:
            # the block's own input, and the inputs of the two before it
            x, kernel = block(maps[-1], maps[-3:-1])
            maps.append(x)
            kernels.append(kernel)
        if len(kernels) > 1:
            add_loss("slow_neural", lambda: torch.stack([slow_neural_loss(a, b) for a, b in pairwise(kernels)]).mean())
        return self.head(maps[-1].mean((1, 2)))


class Block(nn.Module):
    """Branches, standardisation, GELU, a bias and dropout: (B, size, size, dim) -> (B, size, size, out) and a kernel."""

    def __init__(
        self, dim: int, out: int, earlier: int, size: int, kernels: tuple[int, ...], hidden: int, dropout: float,
        batch_mean: bool,
    ):  # fmt: skip
        super().__init__()
        # what is standardised next needs no bias
        self.mixer = HyperZZW(
            dim, size=size, kernels=kernels, hidden=hidden, dim_out=out, earlier=earlier, bias=False,
            batch_mean=batch_mean,
        )  # fmt: skip
        self.norm = GroupStandardisation(out)
        self.bias = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, earlier: list[Tensor]) -> tuple[Tensor, Tensor]:
        mixed, kernel = self.mixer.branches(x, earlier)
        return self.dropout(F.gelu(self.norm(mixed)) + self.bias), kernel


class GroupStandardisation(nn.Module):
    """G-IBS: channels in 12 groups, standardised in turn over the batch and over each map: (B, H, W, C) -> the same.

    Nothing is learned; evaluation takes running statistics for the batch. Raises OptionError.
    """

    def __init__(self, dim: int, groups: int = 12):
        super().__init__()
        if groups < 1 or dim % groups:
            raise OptionError(f"{dim} channels do not divide into {groups} groups")
        self.groups = groups
        even = (groups + 1) // 2
        self.norm = BatchNorm(even * dim // groups, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(self.groups, -1))
        width = parts[0].shape[-1]
        parts[0::2] = self.norm(torch.cat(parts[0::2], -1)).split(width, -1)
        if self.groups > 1:
            parts[1::2] = standardised(torch.cat(parts[1::2], -1)).split(width, -1)
        return torch.cat(parts, -1)


def slow_neural_loss(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of two global kernels (1, C, H, W) and (1, r C, H, W), the first repeated. ShapeError."""
    repeats = second.shape[1] // max(first.shape[1], 1)
    if first.shape[1] * repeats != second.shape[1] or first.shape[2:] != second.shape[2:]:
        raise ShapeError(
            f"the kernels are {tuple(first.shape)} and {tuple(second.shape)}; the second must have the places of the "
            "first and a multiple of its channels"
        )
    return F.mse_loss(first.repeat(1, repeats, 1, 1), second)
