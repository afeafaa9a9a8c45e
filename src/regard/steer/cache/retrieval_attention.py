"""RetrievalAttention: a query reads the first and the last keys, and of the others those that an index finds for it.

    static  = first keys + last keys + keys that came since;    found = index.search(q, top_k) of each query head
    out     = softmax(q k') v over both, from the two log-sum-exps;    what was not found weighs nothing

Prompts are read in full; their queries make the index, one of every row and key head. All keys stay in the cache.

Departs from the paper: query heads of one key head read what any of them found; new keys enter the index once too many
wait, with the queries since; long prompts give a sample of their queries. Nothing is held on two devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported
from regard.engines.dense import dense
from regard.engines.key_index import KINDS, KeyIndex
from regard.primitives.merge import merge

CARD = InterventionCard(
    slug="retrieval_attention",
    title="RetrievalAttention",
    paper="RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval",
    exports=("RetrievalAttention",),
    options={"top_k": 2, "sinks": 2, "window": 4},
    sites=("scores", "kv"),
    owns=("kv",),
    off={"window": 4096},
    spares={"layers": (1,)},
    padding=True,
)

_ROW = "retrieval_attention"


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class RetrievalAttention:
    """Decode with the keys that an index finds, beside the first `sinks` and the last `window` (sections 3.2 and 3.3).

    top_k: keys that each query head asks for. index: a kind of `KeyIndex`. effort: how far it looks, None for its own
    measure. query_neighbours, degree: of the graph. bound: new keys that may wait before they enter the index. queries:
    how many of a prompt, of each key head, make the graph. layers: None for all full ones. Raises OptionError; Unsupported
    for scores that are no inner products, and caches that keep their keys in place.
    """

    top_k: int = 100
    sinks: int = 128
    window: int = 512
    index: Literal["flat", "ivf", "graph", "faiss_hnsw", "faiss_ivf", "faiss_pq", "hnswlib"] = "graph"
    effort: int | None = None
    query_neighbours: int = 100
    degree: int = 35
    bound: int = 512
    queries: int = 8192
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.top_k < 1 or (self.effort is not None and self.effort < 1):
            raise OptionError(f"top_k and effort are numbers from 1, not {self.top_k} and {self.effort}")
        if self.sinks < 0 or self.window < 1:
            raise OptionError(f"sinks is at least 0 and window 1, not {self.sinks} and {self.window}")
        if self.bound < 0 or self.queries < 1:
            raise OptionError(f"bound is at least 0 and queries 1, not {self.bound} and {self.queries}")
        if self.index not in KINDS:
            raise OptionError(f"index is one of {', '.join(KINDS)}, not {self.index!r}")

    def start(self, session: Session) -> _Indexes:
        """The indexes of one session."""
        return _Indexes(self)


@dataclass
class _Row:
    """What is known of one row of a cache, or of beams that are still alike.

    queries: (H, n, D) of those not yet given to the index. first: int64, the places of the first keys; places: those of
    the keys in the index, in its order. indexes: one for each key head, none while there are no other keys.
    """

    queries: list[Tensor] = field(default_factory=list)
    first: Tensor | None = None
    places: Tensor | None = None
    indexes: list[KeyIndex] = field(default_factory=list)


@dataclass
class _Layer:
    """One layer of a cache. rows: by the number that stands in the cache's marks. end: keys from here on are static."""

    rows: dict[int, _Row] = field(default_factory=dict)
    made: int = 0
    end: int = 0


class _Indexes:
    """The indexes of a session. A cache's rows move with its marks, and so carry the numbers of their indexes."""

    card = CARD

    def __init__(self, settings: RetrievalAttention):
        self.settings = settings
        self.layers: WeakKeyDictionary[Any, _Layer] = WeakKeyDictionary()

    def on_kv(self, step: Step, layer: int, kept: Any) -> None:
        """Nothing is given up; the site makes the host's cache one that carries marks."""

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        """Read a prompt in full; decode with what the indexes find."""
        layers = self.settings.layers
        if call.kept is None or (layers is not None and call.layer not in layers):
            return follow()
        layer = self._layer(call)
        if call.step.phase == "prefill":
            self._remember(layer, call)
            return follow()
        seen = _who_is_seen(call)
        self._file(layer, call, seen)
        self._remember(layer, call)
        rows = [layer.rows[number] for number in _numbers(call.kept)]
        if not any(row.indexes for row in rows):
            return follow()
        _refuse(call)
        return follow(call.instead_of(self._attend(call, rows, layer.end, seen), "retrieval_attention"))

    def _layer(self, call: AttentionCall) -> _Layer:
        kept = call.kept
        if _ROW not in kept.marks or kept not in self.layers:
            batch, keys = call.q.shape[0], kept.keys.shape[2]
            numbers = torch.arange(batch, device=call.q.device)[:, None, None]
            kept.marks[_ROW] = numbers.expand(batch, kept.keys.shape[1], keys).clone()
            self.layers[kept] = _Layer({number: _Row() for number in range(batch)}, batch)
        return self.layers[kept]

    def _remember(self, layer: _Layer, call: AttentionCall) -> None:
        """Keep the queries of the call's real tokens, at most as many as are wanted, at even distances."""
        if self.settings.index != "graph":
            return
        rows = max(self.settings.queries // (call.q.shape[1] // call.k.shape[1]), 1)
        n = call.q.shape[2]
        padding = call.step.padding
        for b, number in enumerate(_numbers(call.kept)):
            real = torch.arange(n, device=call.q.device)
            if padding is not None and call.positions is None:
                real = padding[b, -n:].nonzero()[:, 0]
            if len(real):
                chosen = real[torch.linspace(0, len(real) - 1, min(rows, len(real)), device=real.device).long()]
                layer.rows[number].queries.append(call.q[b, :, chosen].detach().float().cpu())

    def _file(self, layer: _Layer, call: AttentionCall, seen: Tensor) -> None:
        """Put the keys between the first and the last into the indexes, once there are too many of them."""
        settings, held = self.settings, call.k.shape[2]
        end = held - 1 - settings.window if layer.end == 0 else held - settings.window
        if end <= layer.end or (layer.end and held - layer.end <= settings.window + settings.bound):
            return
        # rows that were alike until now hold different keys from here on
        marks, rows = call.kept.marks[_ROW].clone(), {}
        for b, number in enumerate(_numbers(call.kept)):
            layer.made += 1
            rows[layer.made] = self._filed(layer.rows[number], call, b, seen[b], layer.end, end)
            marks[b] = layer.made
        call.kept.marks[_ROW], layer.rows, layer.end = marks, rows, end

    def _filed(self, row: _Row, call: AttentionCall, b: int, seen: Tensor, start: int, end: int) -> _Row:
        new = start + seen[start:end].nonzero()[:, 0]
        first = new[:0] if row.first is None else row.first
        room = self.settings.sinks - len(first)
        first, new = torch.cat((first, new[:room])), new[room:]
        places = new if row.places is None else torch.cat((row.places, new))
        if not len(new):
            return _Row(row.queries, first, places, row.indexes)
        queries = self._queries(row, call)
        if queries is None and not row.indexes and self.settings.index == "graph":
            raise OptionError("prefill queries are needed, and this cache was filled before; use index='ivf'")
        keys, of = call.k[b].index_select(1, new), self.settings
        indexes = []
        for g, of_head in enumerate(keys):
            wanted = None if queries is None else queries[g]
            if row.indexes:
                indexes.append(row.indexes[g].insert(of_head, wanted))
            else:
                indexes.append(
                    KeyIndex.build(of_head, wanted, of.index, query_neighbours=of.query_neighbours, degree=of.degree)
                )
        return _Row([], first, places, indexes)

    def _queries(self, row: _Row, call: AttentionCall) -> Tensor | None:
        """The queries kept of a row, (G, Q, D)."""
        if not row.queries:
            return None
        grouped = torch.cat(row.queries, 1).unflatten(0, (call.k.shape[1], -1)).flatten(1, 2)
        return _thinned(grouped, self.settings.queries)

    def _attend(self, call: AttentionCall, rows: list[_Row], end: int, seen: Tensor) -> Tensor:
        device = call.k.device
        first = _filled([row.first for row in rows], device)
        static_k, static_v = (torch.cat((_taken(x, first[:, None]), x[:, :, end:]), 2) for x in (call.k, call.v))
        static = torch.cat((first >= 0, seen[:, end:]), 1)[:, None, None]
        found = self._found(call, rows)
        groups = call.q.shape[1] // call.k.shape[1]
        mask = (found >= 0).repeat_interleave(groups, 1).unsqueeze(2)
        sinks = None if call.sinks is None else call.sinks[..., 0]
        found_k, found_v = _taken(call.k, found), _taken(call.v, found)
        parts = [
            dense(call.q, static_k, static_v, mask=static, scale=call.scale, sinks=sinks, return_lse=True),
            dense(call.q, found_k, found_v, mask=mask, scale=call.scale, return_lse=True),
        ]
        return merge([part.out for part in parts], [part.lse for part in parts if part.lse is not None])[0]

    def _found(self, call: AttentionCall, rows: list[_Row]) -> Tensor:
        """The places of what the query heads of each key head found together: int64 (B, G, U), -1 to fill up."""
        groups = call.k.shape[1]
        queries = call.q[:, :, 0].unflatten(1, (groups, -1))
        found: list[Tensor | None] = []
        for b, row in enumerate(rows):
            for g in range(groups):
                if not row.indexes or row.places is None:
                    found.append(None)
                    continue
                ids, _ = row.indexes[g].search(queries[b, g], self.settings.top_k, effort=self.settings.effort)
                found.append(row.places[ids[ids >= 0].unique()])
        return _filled(found, call.k.device).unflatten(0, (len(rows), groups))


def _numbers(kept: Any) -> list[int]:
    """The number of each row of a cache: that of its first key, since new ones have none yet."""
    return kept.marks[_ROW][:, 0, 0].tolist()  # type: ignore[no-any-return]


def _who_is_seen(call: AttentionCall) -> Tensor:
    """Which keys the one query may attend to: bool (B, M). Raises Unsupported where heads differ."""
    visible = call.visible()
    shape = call.q.shape[0], call.k.shape[2]
    if visible is None:
        return torch.ones(shape, dtype=torch.bool, device=call.k.device)
    if visible.dim() < 4:
        return visible.reshape(-1, visible.shape[-1])[-1:].expand(shape)
    if not bool((visible == visible[:, :1]).all()):
        raise Unsupported("the heads see different keys, and retrieval_attention indexes those of all")
    return visible[:, 0, -1].expand(shape)


def _refuse(call: AttentionCall) -> None:
    reasons = {
        "adds a bias to its scores": call.bias is not None, "caps its scores": call.softcap is not None,
        f"runs {call.instead}": bool(call.instead), "drops weights": call.dropout_p > 0,
    }  # fmt: skip
    for reason, holds in reasons.items():
        if holds:
            raise Unsupported(f"layer {call.layer} {reason}; retrieval_attention finds keys by inner products alone")


def _thinned(x: Tensor, most: int) -> Tensor:
    return x if x.shape[1] <= most else x[:, torch.linspace(0, x.shape[1] - 1, most).long()]


def _filled(places: list[Tensor | None], device: torch.device) -> Tensor:
    """int64 (len(places), most), -1 behind the shorter ones."""
    given = [torch.empty(0, dtype=torch.int64, device=device) if x is None else x for x in places]
    return torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=-1)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """x (B, G, M, D) at places (B, G|1, U), anything at -1: (B, G, U, D)."""
    index = places.clamp(min=0).unsqueeze(-1).expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)
