"""The causal scan by flash-linear-attention, where it is installed: its `chunk_simple_gla`, asked for by name."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from regard.contract.optional import installed
from regard.engines.scan_native import outside_transforms


def missing() -> str | None:
    """Why there is no flash-linear-attention; None if there is."""
    found = installed("fla")
    return None if found else "flash-linear-attention is not installed: pip install flash-linear-attention"


# torch.compile cannot look into it, and need not: the answer never changes
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cannot(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, segment: Tensor | None) -> list[str]:
    """Why the library cannot run a call."""
    absent = missing()
    reasons = outside_transforms([absent] if absent else [])
    if {x.device.type for x in (q, k, v)} != {"cuda"}:
        reasons.append(f"the tensors are on {q.device}, not on CUDA")
    # it rounds the factors of a float32 product to TF32
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        reasons.append(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, not all bfloat16 or float16")
    if g is not None and g.dim() == 4:
        reasons.append("the decay is by key channel")
    if segment is not None:
        reasons.append("there are document starts")
    return reasons


def scan(q: Tensor, k: Tensor, v: Tensor, scale: float, g: Tensor | None, s0: Tensor | None) -> tuple[Tensor, Tensor]:
    """The causal scan: (out (B, H, N, E), final state (B, G, D, E) float32); see `scan_chunks`."""
    library = import_module("fla.ops.simple_gla")
    (_, heads, n, _), groups = q.shape, k.shape[1]
    repeats = heads // groups
    # heads that share keys share a state: the library keeps one for each
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    if s0 is not None:
        s0 = s0.float().repeat_interleave(repeats, 1)
    if g is not None:
        g = g.expand(q.shape[0], heads, n).transpose(1, 2)
    out, state = library.chunk_simple_gla(
        *(x.transpose(1, 2) for x in (q, k, v)), g=g, scale=scale, initial_state=s0, output_final_state=True
    )
    return out.transpose(1, 2), state[:, ::repeats].float()
