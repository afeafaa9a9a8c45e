"""Softmax over a union of key sets, from the softmax over each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.contract.errors import OptionError


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key sets exactly: (out (B, H, N, E), lse (B, H, N)).

    outs, lses: per key set, the output and the log-sum-exp of its scores (-inf where a row had no key).
    A row without keys in any set gives (0, -inf), with gradient 0. Differentiable through both.
    """
    if not outs or len(outs) != len(lses):
        raise OptionError(f"merge needs as many outs as lses, at least one; got {len(outs)} and {len(lses)}")
    stacked = torch.stack(list(lses))
    empty = torch.isneginf(stacked)
    nothing = empty.all(0)
    top = torch.where(nothing, torch.zeros_like(stacked[0]), stacked.detach().amax(0))
    # a masked entry enters exp as 0 and is cut afterwards: exp(-inf) has a gradient of 0 * inf
    parts = torch.exp(torch.where(empty, torch.zeros_like(stacked), stacked) - top).masked_fill(empty, 0.0)
    total = parts.sum(0)
    safe = torch.where(nothing, torch.ones_like(total), total)
    shares = (parts / safe)[..., None]
    out = sum((share.to(o.dtype) * o for share, o in zip(shares, outs, strict=True)), torch.zeros_like(outs[0]))
    lse = torch.where(nothing, torch.full_like(total, float("-inf")), top + safe.log())
    return out, lse
