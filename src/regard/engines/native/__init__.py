"""Kernels for CPUs in C++, behind a plain C interface and ctypes.

Belongs here: the library's loader, and functions on plain tensors without autograd. Engines decide when to call them.
It is built with the package (CMakeLists.txt); without a compiler `missing()` says so and the engines do without.
An example: `block_sparse.py` with `block_sparse.hpp`.
"""

from __future__ import annotations

import ctypes
import os
from importlib.resources import files

import torch
from torch import Tensor

from regard.contract.errors import OptionError, Unsupported
from regard.engines.native.abi import DTYPES, ERRORS, ISAS, open_library
from regard.primitives.biases import NAN_BIAS

_library: ctypes.CDLL | None = None
_reason: str | None = None
_forked = False


def missing() -> str | None:
    """Why there are no native kernels; None if there are."""
    global _library, _reason
    if _library is None and _reason is None:
        # torch is imported by now: its OpenMP runtime is the one that the library finds
        try:
            _library = open_library(_path())
        except OSError as error:
            _reason = str(error)
    return _reason


def outside(q: Tensor, k: Tensor, v: Tensor, widest: int) -> list[str]:
    """Why no kernel takes such q, k, v; tensors without data are taken to stand for some on the CPU."""
    reasons = []
    devices = {x.device.type for x in (q, k, v)}
    if devices not in ({"cpu"}, {"meta"}):
        reasons.append(f"the tensors are on {', '.join(sorted(devices))}, not on the CPU")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        reasons.append(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, not all float32, bfloat16 or float16")
    for name, width in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= width <= widest:
            reasons.append(f"the head width of {name} is {width}, not 1 to {widest}")
    return reasons


def refuse(kernels: str, reasons: list[str], q: Tensor) -> None:
    """Raise Unsupported if there are reasons, or no data to point at."""
    if q.is_meta:
        reasons = [*reasons, "the tensors have no data"]
    if reasons:
        raise Unsupported(f"the native {kernels} cannot run this: {'; '.join(reasons)}")


def library() -> ctypes.CDLL:
    """The loaded library. Raises Unsupported with the reason if there is none."""
    reason = missing()
    if _library is None:
        raise Unsupported(f"no native kernels: {reason}")
    return _library


def isas() -> tuple[str, ...]:
    """The instruction sets that this processor and this library can run, the best last."""
    bits = library().regard_isas()
    return tuple(name for i, name in enumerate(ISAS) if bits >> i & 1)


def fma_rate(isa: str | None = None, dtype: torch.dtype = torch.float32, seconds: float = 0.2) -> float:
    """Floating point operations a second of one thread that multiplies and adds in registers only."""
    return library().regard_fma_rate(isa_code(isa), DTYPES[dtype], seconds)


def isa_code(isa: str | None) -> int:
    """The number of an instruction set, -1 for the best. Raises OptionError, Unsupported."""
    if isa is None:
        return -1
    if isa not in ISAS:
        raise OptionError(f"there is no instruction set {isa!r}; there are {', '.join(ISAS)}")
    if isa not in isas():
        raise Unsupported(f"this processor cannot run {isa}; it runs {', '.join(isas())}")
    return ISAS.index(isa)


def threads() -> int:
    """How many threads a kernel may use: torch's number; one in a forked child, where more would hang."""
    return 1 if _forked else torch.get_num_threads()


def poison(on: bool) -> None:
    """Fill workspaces with NaN before use, so that a kernel that reads what it never wrote is found."""
    library().regard_poison(int(on))


def check(status: int) -> None:
    """Raise what a kernel returned, if it is an error."""
    if status == 3:
        raise OptionError(NAN_BIAS)
    if status:
        raise (MemoryError if status == 1 else Unsupported)(f"native kernel: {ERRORS.get(status, status)}")


def _path() -> str:
    # an editable install keeps the library beside the other packages, not beside this file
    for folder in (files("regard") / "engines" / "native", files("regard.engines.native")):
        library = folder / "regard_native.so"
        if library.is_file():
            return str(library)
    raise OSError(
        "the library was not built: regard was installed without a C++ compiler; "
        "install one, then pip install --force-reinstall regard (REGARD_NATIVE=require shows the compiler's errors)"
    )


def _in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
