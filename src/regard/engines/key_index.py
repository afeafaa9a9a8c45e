"""An index over the keys of one head: the keys with the largest inner products with a query, without scoring them all.

flat          every key is scored: the definition
ivf           keys in lists by the nearest of some centroids; the lists with the best centroids are scored
graph         keys linked where the same queries want them, followed from the best found to the next (RoarGraph)
faiss_hnsw, faiss_ivf     those of the faiss library, where it is installed
faiss_pq      its codes of four bits a number (product quantisation) of all keys; those with the best codes are scored
hnswlib       the graph of the hnswlib library, where it is installed

Queries of attention lie apart from keys, so the nearest keys of a key lead nowhere: the graph is made from queries. Its
nodes are keys alone; of each query the best keys are known exactly, and the best of all is linked to the others.

Whether the graph is made and searched in C++ is chosen as for engines of ops (`contract/dispatch.py`: `listen` tells). It is
no family of theirs: they compute a function of q, k and v, this finds keys for whoever does.

Departs from RoarGraph: the lists of all queries with the same best key are pruned together, where its code keeps those of
the query that came last; nearness of keys is by distance, not by inner product; keys that no query wanted are joined where
the nearest keys found by distance are, and their number of links stays within the degree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.dispatch import Implementation, choose
from regard.contract.errors import MissingExtra, OptionError, ShapeError
from regard.contract.optional import installed
from regard.engines import key_graph
from regard.engines.native import key_index as native_graph

Kind = Literal["flat", "ivf", "graph", "faiss_hnsw", "faiss_ivf", "faiss_pq", "hnswlib"]
KINDS = get_args(Kind)
# scores that are held at once
_BUDGET = 1 << 24
_ROUNDS = 10
# of the code of a number: faiss reads those of four at once
_BITS = 4


@dataclass(frozen=True, eq=False)
class KeyIndex(ABC):
    """Keys (M, D) that are found by inner product. A value: inserting gives another index. It is held in float32 on the CPU."""

    keys: Tensor
    width: int

    @staticmethod
    def build(
        keys: Tensor,
        queries: Tensor | None = None,
        kind: Kind = "flat",
        *,
        lists: int | None = None,
        query_neighbours: int = 100,
        degree: int = 35,
        engine: str | None = None,
    ) -> KeyIndex:
        """An index over keys (M, D), made for queries such as (Q, D), which the graph needs.

        lists: of ivf, the root of M if not given. query_neighbours: how many keys of each query the graph looks at.
        degree: the most links of a key, 4 at least. engine: of the graph, "native" or "torch". Raises ShapeError,
        OptionError; Unsupported for an engine that cannot run; MissingExtra without the library of a kind.
        """
        if keys.dim() != 2 or 0 in keys.shape:
            raise ShapeError(f"keys are (M, D) with at least one key, not {tuple(keys.shape)}")
        if queries is not None:
            _check(queries, keys.shape[1])
        if kind not in KINDS:
            raise OptionError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
        # what the caller does with its memory does not reach the index
        keys = _held(keys).clone()
        if kind == "flat":
            return Flat(keys, keys.shape[1])
        if kind == "ivf":
            return Inverted.of(keys, lists)
        if kind == "hnswlib":
            return Hnswlib.of(keys, degree)
        if kind != "graph":
            return Faiss.of(keys, kind, lists, degree)
        if queries is None or not len(queries):
            raise OptionError("prefill queries are needed for a graph; use kind='ivf' without them")
        if degree < 4 or query_neighbours < 2:
            raise OptionError(f"degree is at least 4 and query_neighbours 2, not {degree} and {query_neighbours}")
        return Graph.of(keys, _held(queries).clone(), query_neighbours, degree, engine)

    def __len__(self) -> int:
        return len(self.keys)

    def search(self, queries: Tensor, k: int, *, effort: int | None = None) -> tuple[Tensor, Tensor]:
        """The k best keys of each query (N, D): (ids int64 (N, min(k, M)), best first; keys scored (N,) int64).

        effort: how far to look: lists of ivf that are scored (8); best found keys that a graph follows (k, 32 at least); keys
        with the best codes that are scored (4 k); hnswlib and faiss_pq take k where it is less. Centroids and codewords count
        as keys scored, codes do not; -1 where the library, hnswlib, does not tell. Where k is all keys, all are scored. The
        indexes of libraries find fewer than k at times, and fill up with -1. Raises ShapeError, OptionError.
        """
        _check(queries, self.width)
        if k < 1 or (effort is not None and effort < 1):
            raise OptionError(f"k and effort are numbers from 1, not {k} and {effort}")
        wanted = _held(queries)
        if k >= len(self):
            ids, scanned = (
                _best(wanted, self.keys[:, : self.width], len(self))[1],
                torch.full((len(queries),), len(self)),
            )
        else:
            ids, scanned = self._search(wanted, k, effort)
        return ids.to(queries.device), scanned.to(queries.device)

    def insert(self, keys: Tensor, queries: Tensor | None = None) -> KeyIndex:
        """The index with more keys (N, D), numbered on, and for more queries; this one stays as it is."""
        for x in (keys, queries):
            if x is not None:
                _check(x, self.width)
        return self._insert(_held(keys), None if queries is None else _held(queries))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    @abstractmethod
    def _search(self, queries: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _insert(self, keys: Tensor, queries: Tensor | None) -> KeyIndex: ...


class Flat(KeyIndex):
    """Every key is scored."""

    def _search(self, queries: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        return _best(queries, self.keys, k)[1], torch.full((len(queries),), len(self))

    def _insert(self, keys: Tensor, queries: Tensor | None) -> KeyIndex:
        return Flat(torch.cat((self.keys, keys)), self.width)


@dataclass(frozen=True, eq=False)
class Inverted(KeyIndex):
    """centroids (C, D) of the keys; home: int64 (M,), the centroid of each key."""

    centroids: Tensor
    home: Tensor

    @staticmethod
    def of(keys: Tensor, lists: int | None) -> Inverted:
        """Centroids by Lloyd's rounds from keys at even places."""
        count = round(len(keys) ** 0.5) if lists is None else lists
        if not 1 <= count <= len(keys):
            raise OptionError(f"lists is 1 to the number of keys, {len(keys)}, not {lists}")
        centroids = keys[torch.linspace(0, len(keys) - 1, count).long()]
        for _ in range(_ROUNDS):
            home = _nearest(keys, centroids)
            sizes = home.bincount(minlength=count)[:, None]
            sums = torch.zeros_like(centroids).index_add_(0, home, keys)
            centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
        return Inverted(keys, keys.shape[1], centroids, _nearest(keys, centroids))

    def _search(self, queries: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        members = self.home.sort(stable=True).indices
        ends = self.home.bincount(minlength=len(self.centroids)).cumsum(0)
        sizes = ends.diff(prepend=ends.new_zeros(1))
        ranked = (queries @ self.centroids.T).sort(dim=-1, descending=True, stable=True).indices
        ids, scanned = torch.empty(len(queries), k, dtype=torch.int64), torch.empty(len(queries), dtype=torch.int64)
        for i, order in enumerate(ranked):
            # more lists than asked for while they hold too few keys
            enough = int((sizes[order].cumsum(0) < k).sum()) + 1
            probed = order[: max(8 if effort is None else effort, enough)].tolist()
            found = torch.cat([members[int(ends[c] - sizes[c]) : int(ends[c])] for c in probed])
            ids[i] = found[(self.keys[found] @ queries[i]).topk(k).indices]
            scanned[i] = len(found) + len(self.centroids)
        return ids, scanned

    def _insert(self, keys: Tensor, queries: Tensor | None) -> KeyIndex:
        home = torch.cat((self.home, _nearest(keys, self.centroids)))
        return Inverted(torch.cat((self.keys, keys)), self.width, self.centroids, home)


@dataclass(frozen=True, eq=False)
class Graph(KeyIndex):
    """The graph and what it was made from; D is filled up to a multiple of 16.

    half (M,): halves of the keys' squared norms. queries (Q, D); best_scores (Q, L), best int32 (Q, L): their best keys.
    forward int32 (M, degree), links int32 (M, degree): `engines/key_graph.py`. entry: the key where searching begins.
    """

    half: Tensor
    queries: Tensor
    best_scores: Tensor
    best: Tensor
    forward: Tensor
    links: Tensor
    entry: int
    neighbours: int
    engine: str | None

    @staticmethod
    def of(keys: Tensor, queries: Tensor, neighbours: int, degree: int, engine: str | None) -> Graph:
        """The graph of all keys and queries at once."""
        width, keys, queries = keys.shape[1], _wide(keys), _wide(queries)
        scores, best = _best(queries, keys, min(neighbours, len(keys)))
        nothing = torch.full((len(keys), degree), -1, dtype=torch.int32)
        empty = Graph(
            keys, width, (keys * keys).sum(-1) / 2, queries, scores, best.int(), nothing, nothing, 0, neighbours, engine
        )
        return empty._linked(best[:, 0].unique())

    def _search(self, queries: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        follow = max(k, 32) if effort is None else effort
        return _steps(self.engine).search(self.keys, self.half, self.links, self.entry, _wide(queries), k, follow)

    def _insert(self, keys: Tensor, queries: Tensor | None) -> KeyIndex:
        keys, before = _wide(keys), len(self)
        room = min(self.neighbours, before + len(keys))
        merged: list[Tensor] = []
        for rows in _blocks(self.queries, keys):
            scores = torch.cat((self.best_scores[rows], self.queries[rows] @ keys.T), 1)
            new = torch.arange(before, before + len(keys), dtype=torch.int32).expand(len(scores), -1)
            top = scores.topk(room)
            merged += [top.values, torch.cat((self.best[rows], new), 1).gather(1, top.indices)]
        scores, best = torch.cat(merged[::2]), torch.cat(merged[1::2])
        changed = (best >= before).any(1) | (best.shape[1] > self.best.shape[1])
        affected = torch.cat((self.best[changed, 0], best[changed, 0]))
        grown = torch.cat((self.keys, keys))
        wanted = self.queries
        if queries is not None:
            more = _best(_wide(queries), grown, room)
            scores, best = torch.cat((scores, more[0])), torch.cat((best, more[1].int()))
            affected, wanted = torch.cat((affected, more[1][:, 0].int())), torch.cat((wanted, _wide(queries)))
        forward = F.pad(self.forward, (0, 0, 0, len(keys)), value=-1)
        half = torch.cat((self.half, (keys * keys).sum(-1) / 2))
        return replace(
            self, keys=grown, half=half, queries=wanted, best_scores=scores, best=best, forward=forward
        )._linked(affected.unique())

    def _linked(self, affected: Tensor) -> Graph:
        """With the links of some pivots made anew, and all that follows."""
        steps = _steps(self.engine)
        order = self.best[:, 0].sort(stable=True)
        start = torch.searchsorted(order.values, affected.int(), right=False)
        end = torch.searchsorted(order.values, affected.int(), right=True)
        sizes = end - start
        starts = F.pad(sizes.cumsum(0), (1, 0))
        places = torch.arange(int(starts[-1])) + (start - starts[:-1]).repeat_interleave(sizes)
        rows = order.indices[places].int()
        forward = steps.project(self.keys, self.half, self.best, affected.int(), starts, rows, self.forward)
        # the key that queries want most
        entry = int((self.keys @ self.queries.mean(0)).argmax())
        links = steps.link(self.keys, self.half, forward, self.links.shape[1], entry)
        return replace(self, forward=forward, links=links, entry=entry)


@dataclass(frozen=True, eq=False)
class Faiss(KeyIndex):
    """An index of the faiss library by inner product; of each query it tells the mean number of keys scored."""

    own: Any
    kind: str

    @staticmethod
    def of(keys: Tensor, kind: str, lists: int | None, degree: int) -> Faiss:
        """Raises MissingExtra without faiss."""
        faiss = _library("faiss", "faiss-cpu", kind)
        width = keys.shape[1]
        if kind == "faiss_hnsw":
            own = faiss.IndexHNSWFlat(width, max(degree // 2, 2), faiss.METRIC_INNER_PRODUCT)
        elif kind == "faiss_pq":
            own = faiss.IndexPQFastScan(width, width, _BITS, faiss.METRIC_INNER_PRODUCT)
            own.pq.cp.min_points_per_centroid = 1
        else:
            count = round(len(keys) ** 0.5) if lists is None else lists
            own = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, count, faiss.METRIC_INNER_PRODUCT)
            own.cp.min_points_per_centroid = 1
        # not fewer keys than codewords
        own.train(keys[torch.arange(max(len(keys), 1 << _BITS)) % len(keys)].numpy())
        own.add(keys.numpy())
        return Faiss(keys, width, own, kind)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, what faiss holds as it writes it down."""
        import faiss

        return super().nbytes + int(faiss.serialize_index(self.own).nbytes)

    def _search(self, queries: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        import faiss

        if self.kind == "faiss_pq":
            return self._by_codes(queries, k, max(4 * k if effort is None else effort, k))
        hnsw = self.kind == "faiss_hnsw"
        counters: Any = faiss.cvar
        stats = counters.hnsw_stats if hnsw else counters.indexIVF_stats
        stats.reset()
        if hnsw:
            self.own.hnsw.efSearch = max(k, 32) if effort is None else effort
        else:
            self.own.nprobe = 8 if effort is None else effort
        ids = torch.from_numpy(self.own.search(queries.numpy(), k)[1])
        scored = stats.ndis // max(len(queries), 1) + (0 if hnsw else self.own.nlist)
        return ids, torch.full((len(queries),), scored)

    def _by_codes(self, queries: Tensor, k: int, most: int) -> tuple[Tensor, Tensor]:
        found = torch.from_numpy(self.own.search(queries.numpy(), min(most, len(self)))[1])
        scores = torch.einsum("nd,nkd->nk", queries, self.keys[found])
        ids, scanned = (
            found.gather(1, scores.topk(k).indices),
            torch.full((len(queries),), found.shape[1] + (1 << _BITS)),
        )
        # faiss finds nothing where the codes of all keys are the same
        alike = (found < 0).any(1)
        ids[alike], scanned[alike] = _best(queries[alike], self.keys, k)[1], len(self)
        return ids, scanned

    def _insert(self, keys: Tensor, queries: Tensor | None) -> KeyIndex:
        import faiss

        # faiss adds in place, and this index stays as it is
        own = faiss.clone_index(self.own)
        own.add(keys.numpy())
        return replace(self, keys=torch.cat((self.keys, keys)), own=own)


@dataclass(frozen=True, eq=False)
class Hnswlib(KeyIndex):
    """A graph of the hnswlib library by inner product."""

    own: Any

    @staticmethod
    def of(keys: Tensor, degree: int) -> Hnswlib:
        """Raises MissingExtra without hnswlib."""
        own = _library("hnswlib", "hnswlib", "hnswlib").Index("ip", keys.shape[1])
        own.init_index(len(keys), M=max(degree // 2, 2), random_seed=0)
        own.add_items(keys.numpy(), num_threads=torch.get_num_threads())
        return Hnswlib(keys, keys.shape[1], own)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, what hnswlib holds as it writes it down."""
        return super().nbytes + int(self.own.index_file_size())

    def _search(self, queries: Tensor, k: int, effort: int | None) -> tuple[Tensor, Tensor]:
        self.own.set_ef(max(k, 32) if effort is None else effort)
        ids = torch.empty(len(queries), k, dtype=torch.int64)
        if not self._finds(queries, ids):
            for query, row in zip(queries.split(1), ids.split(1), strict=True):
                most = self._most(query, row)
                row[:, most:] = -1
                self._finds(query, row[:, :most])
        return ids, torch.full((len(queries),), -1)

    def _most(self, query: Tensor, row: Tensor) -> int:
        """How many keys are found of a query: links may not lead to all from where the search begins."""
        return bisect_left(range(1, row.shape[1] + 1), True, key=lambda n: not self._finds(query, row[:, :n]))

    def _finds(self, queries: Tensor, ids: Tensor) -> bool:
        """Write what is found into ids (N, k); whether so many are."""
        try:
            found = self.own.knn_query(queries.numpy(), ids.shape[1], num_threads=torch.get_num_threads())[0]
        except RuntimeError as error:
            if "2D array" not in str(error):
                raise
            return False
        ids.copy_(torch.from_numpy(found.astype("int64")))
        return True

    def _insert(self, keys: Tensor, queries: Tensor | None) -> KeyIndex:
        # hnswlib adds in place, and this index stays as it is
        own, grown = deepcopy(self.own), torch.cat((self.keys, keys))
        own.resize_index(len(grown))
        ids = torch.arange(len(self), len(grown))
        own.add_items(keys.numpy(), ids.numpy(), num_threads=torch.get_num_threads())
        return replace(self, keys=grown, own=own)


def _library(module: str, package: str, kind: str) -> Any:
    if not installed(module):
        raise MissingExtra(f"kind={kind!r} needs {module!r}, which is not installed: pip install {package}")
    return import_module(module)


def _check(x: Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width:
        raise ShapeError(f"queries and new keys are (N, {width}), as the keys are, not {tuple(x.shape)}")


def _held(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32).contiguous()


def _wide(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[1] % 16)).contiguous()


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[slice]:
    step = max(_BUDGET // max(len(keys), 1), 1)
    return (slice(i, i + step) for i in range(0, len(queries), step))


def _best(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(scores, ids int64), both (N, k), of the best keys of each query, by scoring all."""
    top = [(queries[rows] @ keys.T).topk(k) for rows in _blocks(queries, keys)]
    if not top:
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat([x.values for x in top]), torch.cat([x.indices for x in top])


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    half = (centroids * centroids).sum(-1) / 2
    return torch.cat([(keys[rows] @ centroids.T - half).argmax(-1) for rows in _blocks(keys, centroids)])


def _steps(engine: str | None) -> ModuleType:
    """The module with the graph's three functions."""
    return choose(IMPLEMENTATIONS, engine, None).run(None)


def _no_native(_: Any) -> list[str]:
    reason = native_graph.missing()
    return [reason] if reason else []


IMPLEMENTATIONS = (
    Implementation("key_index:native", _no_native, lambda _: native_graph),
    Implementation("key_index:torch", lambda _: [], lambda _: key_graph),
)
