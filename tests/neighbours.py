"""Neighbourhood attention written as loops over coordinates: what the fused forms are compared with."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from torch import Tensor


def each(value, axes: int) -> tuple:
    return value if isinstance(value, tuple) else (value,) * axes


def neighbours(length: int, kernel: int, dilation: int = 1, stride: int = 1, causal: bool = False) -> list[list[int]]:
    """The keys of every query on one axis."""
    found = []
    for x in range(length):
        group, u = x % dilation, x // dilation
        size = len(range(group, length, dilation))
        first = u // stride * stride
        if causal:
            leader = min(first + stride - 1, size - 1)
            inside = [t for t in range(max(leader - kernel + 1, 0), u + 1)]
        else:
            leader = min(first + stride // 2, size - 1)
            start = min(max(leader - kernel // 2, 0), size - kernel)
            inside = [t for t in range(start, start + kernel)]
        found.append([group + t * dilation for t in inside])
    return found


def neighbourhood_mask(shape, kernel, dilation=1, stride=1, causal=False) -> Tensor:
    """Bool (N, N) over a row-major grid."""
    axes = len(shape)
    options = zip(shape, *(each(value, axes) for value in (kernel, dilation, stride, causal)), strict=True)
    tables = [neighbours(*one) for one in options]
    places = list(product(*(range(length) for length in shape)))
    rank = {place: i for i, place in enumerate(places)}
    mask = torch.zeros(prod(shape), prod(shape), dtype=torch.bool)
    for i, place in enumerate(places):
        for key in product(*(table[x] for table, x in zip(tables, place, strict=True))):
            mask[i, rank[key]] = True
    return mask


def relative_bias(rpb: Tensor, shape, kernel, dilation=1) -> Tensor:
    """rpb (H, 2K-1, …) over all pairs of one dilation group: (H, N, N); 0 where the offset is outside the table."""
    axes = len(shape)
    kernel, dilation = each(kernel, axes), each(dilation, axes)
    places = list(product(*(range(length) for length in shape)))
    bias = torch.zeros(rpb.shape[0], len(places), len(places), dtype=rpb.dtype)
    for i, x in enumerate(places):
        for j, y in enumerate(places):
            offset = [b // d - a // d + k - 1 for a, b, k, d in zip(x, y, kernel, dilation, strict=True)]
            if all(0 <= o < 2 * k - 1 for o, k in zip(offset, kernel, strict=True)):
                bias[:, i, j] = rpb[(slice(None), *offset)]
    return bias


def attend_by_mask(q, k, v, mask, *, bias=None, scale=None, extra_k=None, extra_v=None):
    """Softmax over the visible keys (and the extra ones), by the whole table; a row of nothing is 0."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, float("-inf"))
    if extra_k is not None:
        extra_k, extra_v = extra_k.repeat_interleave(share, 1), extra_v.repeat_interleave(share, 1)
        scores = torch.cat((scores, scale * q @ extra_k.transpose(-1, -2)), -1)
        v = torch.cat((v, extra_v), 2)
    some = (scores > float("-inf")).any(-1, keepdim=True)
    return torch.where(some, scores, 0.0).softmax(-1) * some @ v
