"""A graph over keys on the CPU: plain tensors in and out. The three steps are those of `engines/key_graph.py`."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from regard.engines import native

VERSION = 1


class IndexProblem(ctypes.Structure):
    _fields_ = (
        *((x, c_int64) for x in ("count", "width", "degree", "spread", "listed", "affected", "entry", "rows", "k")),
        ("effort", c_int64),
        *((x, c_void_p) for x in ("keys", "half", "lists", "pivots", "pivot_row", "pivot_start", "forward", "links")),
        *((x, c_void_p) for x in ("query", "ids", "scanned")),
        *((x, c_int32) for x in ("isa", "threads")),
    )


def missing() -> str | None:
    """Why there is no native index; None if there is."""
    reason = native.missing()
    if reason:
        return reason
    library = native.library()
    if not hasattr(library, "regard_index_abi"):
        return "the native library was built before it had an index of keys"
    found, wanted = library.regard_index_abi(), VERSION * 65536 + ctypes.sizeof(IndexProblem)
    if found != wanted:
        return f"the native library was built from another version of regard (its index is {found}, not {wanted})"
    return None


def project(
    keys: Tensor, half: Tensor, lists: Tensor, pivots: Tensor, start: Tensor, rows: Tensor, forward: Tensor,
    isa: str | None = None,
) -> Tensor:  # fmt: skip
    """`key_graph.project`."""
    forward = forward.clone()
    problem = _problem(keys, half, isa)
    problem.listed, problem.affected, problem.spread = lists.shape[1], len(pivots), forward.shape[1]
    problem.lists, problem.pivots, problem.pivot_row = lists.data_ptr(), pivots.data_ptr(), rows.data_ptr()
    problem.pivot_start, problem.forward = start.data_ptr(), forward.data_ptr()
    native.check(native.library().regard_index_project(ctypes.byref(problem)))
    return forward


def link(
    keys: Tensor, half: Tensor, forward: Tensor, degree: int, entry: int, isa: str | None = None
) -> Tensor:  # fmt: skip
    """`key_graph.link`."""
    links = torch.empty(len(keys), degree, dtype=torch.int32)
    problem = _problem(keys, half, isa)
    problem.degree, problem.spread, problem.entry = degree, forward.shape[1], entry
    problem.forward, problem.links = forward.data_ptr(), links.data_ptr()
    native.check(native.library().regard_index_link(ctypes.byref(problem)))
    return links


def search(
    keys: Tensor, half: Tensor, links: Tensor, entry: int, queries: Tensor, k: int, effort: int,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`key_graph.search`."""
    ids, scanned = torch.empty(len(queries), k, dtype=torch.int64), torch.empty(len(queries), dtype=torch.int64)
    problem = _problem(keys, half, isa)
    problem.degree, problem.entry, problem.rows, problem.k, problem.effort = (
        links.shape[1], entry, len(queries), k, effort,
    )  # fmt: skip
    problem.links, problem.query = links.data_ptr(), queries.data_ptr()
    problem.ids, problem.scanned = ids.data_ptr(), scanned.data_ptr()
    native.check(native.library().regard_index_search(ctypes.byref(problem)))
    return ids, scanned


def _problem(keys: Tensor, half: Tensor, isa: str | None) -> IndexProblem:
    problem = IndexProblem(count=len(keys), width=keys.shape[1], isa=native.isa_code(isa), threads=native.threads())
    problem.keys, problem.half = keys.data_ptr(), half.data_ptr()
    return problem
