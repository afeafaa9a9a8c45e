"""Kernels for GPUs in Triton, and what is dispatched to libraries that are written in it.

Belongs here: kernels (`*_kernels.py`, the only files that import triton, when they first run), the functions on plain
tensors that launch them, and why they cannot run a call. With TRITON_INTERPRET=1 in the environment before the first
call they run on the CPU, for tests. Engines decide when to call them. An example: `blocks.py` with `block_kernels.py`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from regard.contract.errors import Unsupported
from regard.contract.optional import installed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cannot(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why no kernel can run on such tensors."""
    reasons = []
    absent = missing()
    if absent:
        reasons.append(absent)
    places = {x.device.type for x in (q, k, v)}
    if places != {"cuda"} and not (places == {"cpu"} and _interpreted()):
        reasons.append(
            f"the tensors are on {' and '.join(sorted(places))}, not on CUDA (TRITON_INTERPRET=1 runs the kernels on "
            "the CPU, for tests)"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        reasons.append(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, not all float32, bfloat16 or float16")
    if places == {"cpu"} and q.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter cannot multiply bfloat16")
    return reasons


def missing() -> str | None:
    """Why there is no Triton; None if there is."""
    return None if installed("triton") else "triton is not installed: pip install 'regard[triton]'"


def run(on: Tensor, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch on the device of a tensor. Raises Unsupported where that has too little shared memory."""
    from triton.runtime.errors import OutOfResources

    try:
        # Triton launches on the current device
        with torch.cuda.device_of(on):
            kernel[(programs,)](*arguments, **constants)
    except OutOfResources as error:
        raise Unsupported(
            f"the Triton kernels need more than {on.device} has: {error}. Use narrower heads, half precision or a "
            "layout of smaller blocks; block_sparse:torch and scan:torch have no such limit"
        ) from error


def lanes(size: int) -> int:
    """The power of two that holds a size, at least the 16 of a matrix instruction."""
    return max(16, 1 << (size - 1).bit_length())


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# torch.compile cannot look into either, and need not: the answers never change. This is what
# torch.compiler.assume_constant_result sets; calling it would import the compiler
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]
