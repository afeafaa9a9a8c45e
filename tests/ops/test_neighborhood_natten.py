"""Parity with NATTEN itself, where it is installed (its CPU build needs no CUDA)."""

from __future__ import annotations

import random
import warnings
from math import prod

import pytest
import torch

from regard import neighborhood_attention

CASES = 300


def draw(rng):
    """(shape, kernel, dilation, stride, causal) of a random neighbourhood in one, two or three dimensions."""
    axes = rng.choice((1, 2, 3))
    shape = tuple(rng.randint(2, (60, 12, 6)[axes - 1]) for _ in range(axes))
    kernel = tuple(rng.randint(2, side) for side in shape)
    dilation = tuple(rng.randint(1, side // k) for side, k in zip(shape, kernel, strict=True))
    stride = tuple(rng.randint(1, k) for k in kernel)
    causal = tuple(rng.random() < 0.4 for _ in shape)
    return shape, kernel, dilation, stride, causal


@pytest.mark.slow
def test_neighbourhoods_equal_natten(record):
    natten = pytest.importorskip("natten", reason="NATTEN is not installed")
    attention = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}
    rng = random.Random(0)
    worst, strided, dilated, causals = 0.0, 0, 0, 0
    by_axes = {1: 0, 2: 0, 3: 0}
    warnings.simplefilter("ignore")
    for case in range(CASES):
        shape, kernel, dilation, stride, causal = draw(rng)
        extra = rng.choice((0, 0, 3))
        torch.manual_seed(case)
        # NATTEN takes powers of two and (B, places, H, D)
        q, k, v = torch.randn(3, 2, *shape, 2, 16)
        more_k, more_v = torch.randn(2, 2, extra, 2, 16) if extra else (None, None)
        theirs = attention[len(shape)](
            q, k, v, kernel_size=kernel, dilation=dilation, stride=stride, is_causal=causal, backend="flex-fna",
            additional_keys=more_k, additional_values=more_v,
        )  # fmt: skip
        mine = [t.flatten(1, -3).transpose(1, 2) for t in (q, k, v)]
        beside = {"extra_k": more_k.transpose(1, 2), "extra_v": more_v.transpose(1, 2)} if extra else {}
        out = neighborhood_attention(
            *mine, shape=shape, kernel=kernel, dilation=dilation, stride=stride, is_causal=causal, **beside
        )
        wanted = theirs.flatten(1, -3).transpose(1, 2)
        assert wanted.shape[2] == prod(shape)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=2e-6, msg=lambda m, s=(shape, kernel): f"{s}: {m}")
        worst = max(worst, float((out - wanted).abs().max()))
        by_axes[len(shape)] += 1
        strided += max(stride) > 1
        dilated += max(dilation) > 1
        causals += any(causal)
    record(
        {
            "natten": natten.__version__,
            "backend": "flex-fna",
            "cases": CASES,
            "by_axes": by_axes,
            "with_stride": strided,
            "with_dilation": dilated,
            "with_causal_axis": causals,
            "largest_difference": worst,
        }
    )
