"""The C interface in ctypes: the structures of abi.hpp, and which number says what."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64, c_void_p

import torch

VERSION = 4
INDEXED = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
ERRORS = {1: "out of memory for workspaces", 2: "this processor does not have the instruction set"}


class IndexedTable(ctypes.Structure):
    _fields_ = (
        ("table", c_void_p),
        ("grad", c_void_p),
        ("key", c_void_p),
        ("query", c_void_p),
        ("strides", c_int64 * 3),
        ("grad_strides", c_int64 * 3),
        ("size", c_int64),
        ("low", c_int64),
        ("high", c_int64),
    )


class Problem(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "heads", "groups", "n", "m", "d", "e", "q_offset")),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "lse")),
        *((name, c_int64 * 3) for name in ("qs", "ks", "vs", "os")),
        *((name, c_void_p) for name in ("dout", "dlse", "delta", "dq", "dk", "dv")),
        ("dos", c_int64 * 3),
        *((name, c_void_p) for name in ("crow", "col", "tile", "bits", "bits_t")),
        *((name, c_int64) for name in ("layout_batch", "layout_heads", "entries")),
        ("bias", c_void_p),
        ("dbias", c_void_p),
        ("bias_strides", c_int64 * 4),
        ("dbias_strides", c_int64 * 4),
        ("sinks", c_void_p),
        ("sink_strides", c_int64 * 3),
        ("indexed", IndexedTable * INDEXED),
        ("seed", c_uint64),
        ("dropout", c_double),
        ("scale", c_float),
        ("parameter", c_float),
        *((name, c_int32) for name in ("dtype", "bias_dtype", "isa", "threads", "normaliser")),
        *((name, c_int32) for name in ("indexed_count", "one_by_one")),
    )


class Reading(ctypes.Structure):
    _fields_ = (
        ("problem", Problem),
        *((name, c_void_p) for name in ("out", "index", "heads", "row_start", "row", "row_to")),
        *((name, c_int64) for name in ("head_count", "row_count", "top", "first")),
        ("what", c_int32),
    )


def version() -> int:
    """What `regard_abi()` of a library that fits says."""
    return VERSION * 65536 + ctypes.sizeof(Reading)


def open_library(path: str) -> ctypes.CDLL:
    """Open a library and declare its functions. Raises OSError with the reason if it cannot be used."""
    library = ctypes.CDLL(path)
    try:
        found = library.regard_abi()
    except AttributeError:
        raise OSError(f"{path} is not a library of regard: it has no regard_abi") from None
    if found != version():
        raise OSError(f"{path} was built from another version of regard (its interface is {found}, not {version()})")
    for name in ("regard_forward", "regard_backward"):
        getattr(library, name).argtypes = (ctypes.POINTER(Problem),)
    library.regard_readout.argtypes = (ctypes.POINTER(Reading),)
    library.regard_fma_rate.argtypes = (ctypes.c_int, ctypes.c_int, c_double)
    library.regard_fma_rate.restype = c_double
    library.regard_poison.argtypes = (ctypes.c_int,)
    return library
