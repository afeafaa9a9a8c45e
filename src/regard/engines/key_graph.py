"""A graph over keys that is searched by inner product: its definition, in numpy, a key at a time.

    forward(p) = prune(keys that the queries list whose best key is p)
    links(p)   = prune(forward(p), keys that p is forward of)  + what joins the keys that nothing leads to
    prune      = the nearest; a candidate is passed over that is nearer to one already taken than to p; these fill up

`native/key_index.py` has the same three functions in C++. All tensors are on the CPU and contiguous: keys (M, D) float32,
half (M,), half of each key's squared norm; graphs are int32 (M, places), -1 behind the places in use. Ties go by key.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# places of a row that only joining fills: each key that is joined brings more than it takes
SPARE = 2
# keys near one that is to be joined, and how many of the best found are followed on the way to them
NEAR, NEAR_EFFORT = 16, 24

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def project(
    keys: Tensor, half: Tensor, lists: Tensor, pivots: Tensor, start: Tensor, rows: Tensor, forward: Tensor
) -> Tensor:
    """forward (M, F), with the rows of `pivots` int32 (P,) made anew from the lists int32 (Q, L) of their queries.

    The queries of pivot i are rows[start[i] : start[i + 1]]; start int64 (P + 1,), rows int32.
    """
    made = forward.clone()
    table, listed = _Table(keys, half), lists.numpy()
    for i, pivot in enumerate(pivots.tolist()):
        offered = listed[rows[int(start[i]) : int(start[i + 1])].numpy()].ravel()
        made[pivot] = torch.from_numpy(table.prune(pivot, offered, forward.shape[1]))
    return made


def link(keys: Tensor, half: Tensor, forward: Tensor, degree: int, entry: int) -> Tensor:
    """The graph (M, degree), in which every key can be reached from the entry."""
    table, ahead = _Table(keys, half), forward.numpy()
    behind: list[list[int]] = [[] for _ in ahead]
    for i, row in enumerate(ahead):
        for j in row[row >= 0]:
            behind[j].append(i)
    links = np.full((len(ahead), degree), -1, dtype=np.int32)
    for i, row in enumerate(ahead):
        offered = np.concatenate((row, np.array(behind[i], dtype=row.dtype)))
        links[i, : degree - SPARE] = table.prune(i, offered, degree - SPARE)
    _join(table, links, entry)
    return torch.from_numpy(links)


def search(
    keys: Tensor, half: Tensor, links: Tensor, entry: int, queries: Tensor, k: int, effort: int
) -> tuple[Tensor, Tensor]:
    """(ids int64 (N, k), best first, -1 where fewer can be reached; keys scored (N,)) for queries (N, D).

    Best first from the entry: the `effort` best that were found are followed, and more while fewer than k were found.
    """
    table, graph = _Table(keys, half), links.numpy()
    ids, scanned = np.full((len(queries), k), -1, dtype=np.int64), np.zeros(len(queries), dtype=np.int64)
    for i, query in enumerate(queries.numpy()):
        found, scanned[i] = table.walk(graph, entry, query, 0.0, k, effort, max(k, effort))
        ids[i, : len(found[:k])] = found[:k]
    return torch.from_numpy(ids), torch.from_numpy(scanned)


class _Table:
    def __init__(self, keys: Tensor, half: Tensor):
        self.keys: Floats = keys.numpy()
        self.half: Floats = half.numpy()

    def prune(self, pivot: int, offered: NDArray[np.int32], room: int) -> NDArray[np.int32]:
        """The keys that `pivot` is linked to, int32 (room,)."""
        others = np.unique(offered[(offered >= 0) & (offered != pivot)])
        near = self.keys[others] @ self.keys[pivot]
        order = np.lexsort((others, -(near - self.half[others])))
        others, bars = others[order], (near - self.half[pivot])[order]
        kept: list[int] = []
        left: list[int] = []
        for other, bar in zip(others.tolist(), bars, strict=True):
            if len(kept) == room:
                break
            hidden = kept and (self.keys[kept] @ self.keys[other] - self.half[kept] > bar).any()
            (left if hidden else kept).append(other)
        row = np.full(room, -1, dtype=np.int32)
        taken = (kept + left)[:room]
        row[: len(taken)] = taken
        return row

    def walk(
        self, graph: NDArray[np.int32], entry: int, query: Floats, by_half: float, least: int, effort: int, room: int
    ) -> tuple[Ints, int]:
        """(the best found, at most `room`; how many were scored), scores less by_half halves of squared norms."""
        seen = np.zeros(len(graph), dtype=bool)
        seen[entry] = True
        fresh = np.array([entry], dtype=np.int64)
        ids, scores, followed = fresh[:0], np.empty(0, dtype=np.float32), np.empty(0, dtype=bool)
        scanned = 0
        while True:
            scanned += len(fresh)
            ids = np.concatenate((ids, fresh))
            scores = np.concatenate((scores, self.keys[fresh] @ query - np.float32(by_half) * self.half[fresh]))
            followed = np.concatenate((followed, np.zeros(len(fresh), dtype=bool)))
            order = np.lexsort((ids, -scores))[:room]
            ids, scores, followed = ids[order], scores[order], followed[order]
            waiting = np.flatnonzero(~followed)
            if not len(waiting) or (waiting[0] >= effort and len(ids) >= least):
                return ids, scanned
            followed[waiting[0]] = True
            ahead = graph[ids[waiting[0]]].astype(np.int64)
            fresh = ahead[(ahead >= 0) & ~seen[ahead]]
            seen[fresh] = True


def _join(table: _Table, links: NDArray[np.int32], entry: int) -> None:
    reached, order = np.zeros(len(links), dtype=bool), list[int]()

    def reach(start: int) -> None:
        if reached[start]:
            return
        reached[start] = True
        at = len(order)
        order.append(start)
        while at < len(order):
            for other in links[order[at]].tolist():
                if other >= 0 and not reached[other]:
                    reached[other] = True
                    order.append(other)
            at += 1

    reach(entry)
    lost = np.flatnonzero(~reached).tolist()
    near = [table.walk(links, entry, table.keys[i], 1.0, 1, NEAR_EFFORT, NEAR_EFFORT)[0][:NEAR].tolist() for i in lost]
    free = 0
    for key, others in zip(lost, near, strict=True):
        # a lost key and those near it, which are reached, learn of each other
        for other in others:
            _add(links[key], other, links.shape[1] - SPARE)
        if reached[key]:
            continue
        if not _any_takes(links, others, key):
            while not _add(links[order[free]], key, links.shape[1]):
                free += 1
        reach(key)


def _any_takes(links: NDArray[np.int32], others: Iterable[int], key: int) -> bool:
    return any(_add(links[other], key, links.shape[1]) for other in others)


def _add(row: NDArray[np.int32], key: int, room: int) -> bool:
    for place in range(room):
        if row[place] in (key, -1):
            row[place] = key
            return True
    return False
