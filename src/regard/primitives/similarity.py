"""How alike sets of vectors are: cosines of all pairs, and which pairs prefer each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of all pairs of x (…, N, D) and y (…, M, D): (…, N, M). A vector of zeros is like nothing, 0."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(-2, -1)


def mutual(similarities: Tensor) -> Tensor:
    """Similarities of 0 or more, (…, N, M), times their shares of the largest of their row and of their column.

    Pairs that are each other's best keep their value; the others fall. Source: soft mutual neighbours of NCNet, section 3.3.
    """
    shares = torch.ones_like(similarities)
    for axis in (-1, -2):
        most = similarities.amax(axis, keepdim=True)
        shares = shares * similarities / torch.where(most == 0, torch.ones_like(most), most)
    return similarities * shares
