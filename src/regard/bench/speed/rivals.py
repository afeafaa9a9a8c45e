"""Who can do a piece of work: the engines of this library, and what people use instead."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.bench.speed.work import DTYPES, Work
from regard.contract.dispatch import engine
from regard.contract.errors import Unsupported
from regard.contract.optional import installed
from regard.primitives.normalisers import L1, Normaliser, Sigmoid, Softmax

Attention = Callable[[], Tensor]


@dataclass(frozen=True)
class Rival:
    """name: as printed. prepare: makes the call from a work and its q, k, v; raises Unsupported with the reason."""

    name: str
    prepare: Callable[[Work, Tensor, Tensor, Tensor], Attention]


def rivals(engines: tuple[str, ...]) -> tuple[Rival, ...]:
    """The named engines of this library first, then the others."""
    ours = tuple(Rival(name, _regard(name)) for name in engines)
    return (
        *ours,
        Rival("torch SDPA", _sdpa),
        Rival("masked SDPA", _masked_sdpa),
        Rival("FlexAttention", _flex),
        Rival("local-attention", _local_attention),
        Rival("NATTEN", _natten),
    )


def call(work: Work, attention: Attention, leaves: tuple[Tensor, ...]) -> None:
    """The work once: forward, or forward and the gradients of q, k, v."""
    out = attention()
    if work.backward:
        torch.autograd.grad(out, leaves, torch.ones_like(out))


def _regard(name: str) -> Callable[[Work, Tensor, Tensor, Tensor], Attention]:
    def prepare(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Attention:
        pattern, bias = work.what(), _bias(work)
        run = engine("block_sparse").block_sparse
        options = {"bias": bias, "q_offset": work.q_offset, "normaliser": _normaliser(work), "engine": name}
        return lambda: run(q, k, v, pattern, **options).out

    return prepare


def _sdpa(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    _only_plain(work)
    if work.pattern not in ("causal", "full", "decode"):
        raise Unsupported("needs a mask")
    causal = work.pattern == "causal"
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _masked_sdpa(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    if work.normaliser != "softmax":
        raise Unsupported("knows softmax only")
    if work.bias is None and work.pattern in ("causal", "full", "decode"):
        raise Unsupported("needs no mask")
    mask = work.what().dense(work.queries, work.length, q_offset=work.q_offset)
    bias = _bias(work)
    table = mask if bias is None else torch.where(mask, bias, float("-inf"))
    return lambda: F.scaled_dot_product_attention(q, k, v, table)


def _flex(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    if work.backward and q.device.type == "cpu":
        raise Unsupported("has no backward pass on the CPU")
    _only_plain(work)
    if work.pattern in ("causal", "full", "decode"):
        raise Unsupported("is for masks")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    pattern = work.what()

    def see(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return pattern.allowed(b, h, i, j, {})

    # as its users do: the mask by create_block_mask, the call compiled
    mask = flex.create_block_mask(see, None, None, work.queries, work.length, device=q.device.type)
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def _local_attention(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    name, _, size = work.pattern.partition(":")
    _only_plain(work)
    if name != "window":
        raise Unsupported("knows windows only")
    if not installed("local_attention"):
        raise Unsupported("is not installed")
    module = importlib.import_module("local_attention").LocalAttention(
        window_size=int(size), causal=True, look_backward=1, exact_windowsize=True, use_rotary_pos_emb=False
    )
    return lambda: module(q, k, v)


def _natten(work: Work, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    name, _, size = work.pattern.partition(":")
    _only_plain(work)
    if name != "neighborhood":
        raise Unsupported("knows neighbourhoods only")
    if not installed("natten"):
        raise Unsupported("is not installed")
    if work.backward and q.device.type == "cpu":
        raise Unsupported("has no backward pass on the CPU")
    natten: Any = importlib.import_module("natten")
    # its layout is heads last
    grids = tuple(x.transpose(1, 2).reshape(1, *work.grid(), work.heads, work.dim).contiguous() for x in (q, k, v))
    return lambda: natten.na2d(*grids, kernel_size=int(size))


def _only_plain(work: Work) -> None:
    if work.normaliser != "softmax" or work.bias is not None:
        raise Unsupported("is timed without bias and with softmax only")


def _normaliser(work: Work) -> Normaliser:
    kinds: dict[str, Normaliser] = {"softmax": Softmax(), "sigmoid": Sigmoid(), "softplus": L1("softplus")}
    return kinds[work.normaliser]


def _bias(work: Work) -> Tensor | None:
    if work.bias is None:
        return None
    generator = torch.Generator().manual_seed(1)
    shape = (1, work.heads, work.queries, work.length) if work.bias == "dense" else (1, 1, 1, work.length)
    return torch.randn(shape, generator=generator).to(DTYPES[work.dtype])
