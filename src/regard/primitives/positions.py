"""Positions: rotary, its learned linear form, sinusoids, ALiBi slopes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from regard.contract.errors import OptionError


def rope(
    x: Tensor,
    positions: Tensor,
    *,
    dims: int | None = None,
    base: float = 1e4,
    layout: Literal["half", "interleaved"] = "half",
) -> Tensor:
    """Rotate the first `dims` channels of x (..., N, D) by angles position * base^(-2c/dims).

    positions: (N,) or broadcastable to (..., N). dims: even, at most D; all of D if None.
    layout: "half" pairs channel c with c + dims/2 (Llama), "interleaved" pairs 2c with 2c + 1 (GPT-J).
    """
    dims = x.shape[-1] if dims is None else dims
    if dims % 2 or not 0 <= dims <= x.shape[-1]:
        raise OptionError(f"rotary positions need an even number of channels up to {x.shape[-1]}, not {dims}")
    if dims == 0:
        return x
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, dims, 2, dtype=dtype, device=x.device) / dims
    angles = positions.to(dtype)[..., None] * base**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned, rest = x[..., :dims], x[..., dims:]
    if layout == "half":
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((out, rest), -1)


def lrpe(x: Tensor, positions: Tensor, theta: Tensor) -> Tensor:
    """[x cos(position theta), x sin(position theta)]: (B, H, N, D) -> (B, H, N, 2 D) (linearised relative positions).

    positions: (N,). theta: angles a position, (H, D). Two turned vectors have the product
    sum over c of x_c y_c cos((i - j) theta_c): it depends on the distance alone.
    """
    # far out a float32 angle is off by more than a digit of its cosine
    angles = positions.to(torch.float64)[:, None] * theta.to(torch.float64)[:, None]
    return torch.cat((x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)), -1)


def sinusoid(positions: Tensor, dim: int, *, base: float = 1e4) -> Tensor:
    """Sines then cosines of position * base^(-2c/dim): positions (..., N) -> (..., N, dim). dim: even."""
    if dim % 2:
        raise OptionError(f"sinusoidal positions need an even width, not {dim}")
    rates = base ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angles = positions.to(torch.float32)[..., None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1)


def alibi_slopes(heads: int) -> Tensor:
    """The slopes 2^(-8(h+1)/H) of ALiBi, float64 (H,); other head counts interleave those of the powers of two around."""
    if heads < 1:
        raise OptionError(f"ALiBi needs at least one head, not {heads}")
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8.0 * torch.arange(1, power + 1, dtype=torch.float64, device="cpu") / power)
    if power == heads:
        return slopes
    between = 2.0 ** (-8.0 * torch.arange(1, 2 * power + 1, 2, dtype=torch.float64, device="cpu") / (2 * power))
    return torch.cat((slopes, between[: heads - power]))
