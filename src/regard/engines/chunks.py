"""Sparse attention in plain torch: some queries at a time, with all the keys that they may see.

Whole rows of scores are there, so any normaliser will do. Either query blocks meet the key blocks of a layout (those
with about equally many tiles share a batched product), or every query meets its own gathered keys. The backward pass
computes the scores again from q and k (and the weights of the softmax from the log-sum-exp): nothing of size N x M is
kept, and gradients of keys are added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError
from regard.engines.philox import keep
from regard.engines.precision import accumulator
from regard.patterns.algebra import Bound, Pattern
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import L1, Normaliser, ReLUOverN, Softmax

if TYPE_CHECKING:
    from regard.patterns.layout import BlockLayout

# scores that are in memory at a time: a few copies of this stay in the caches
SCORES = 1 << 19
# gathered numbers of k that are in memory at a time
GATHERED = 1 << 21
# tiles whose bits are unpacked once, beforehand
UNPACKED = 1 << 10


@dataclass(frozen=True)
class Options:
    """What a call takes beside q, k, v and its pattern.

    bias (B|1, H|1, N|1, M|1), sinks (B|1, H|1, N|1); selected (B|1, H', N, K): added to the scores of gathered keys.
    bias_grad: whether the backward pass is to give the bias a gradient.
    """

    scale: float
    q_offset: int
    normaliser: Normaliser
    bias: Tensor | None = None
    indexed: tuple[Indexed, ...] = ()
    sinks: Tensor | None = None
    selected: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    bias_grad: bool = True


@dataclass(frozen=True)
class Gradients:
    """Gradients in the dtypes and shapes of what they belong to."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    tables: tuple[Tensor, ...]
    sinks: Tensor | None
    selected: Tensor | None


def keeps_statistic(normaliser: type[Normaliser]) -> bool:
    """Whether a number of every row is kept for the backward pass: the log-sum-exp, what the row was divided by."""
    return normaliser in (Softmax, L1, ReLUOverN)


def unpack(bits: Tensor, width: int) -> Tensor:
    """Bool (..., width) from int64 words (..., ceil(width / 64))."""
    places = torch.arange(64, device=bits.device)
    return ((bits[..., None] >> places) & 1).bool().flatten(-2)[..., :width]


def forward(work: Work) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, E), statistic (B, H, N), or (0,) where the normaliser keeps none)."""
    options, q, width = work.options, work.q, work.v.shape[2]
    batch, heads, n, kind = work.batch, work.heads, work.n, work.kind
    out = torch.zeros(work.items, work.block_q, width, dtype=q.dtype, device=q.device)
    statistic = torch.zeros(0, dtype=kind, device=q.device)
    softmax = type(options.normaliser) is Softmax
    if softmax:
        lse = torch.full((work.items, work.block_q), float("-inf"), dtype=kind, device=q.device)
        if options.sinks is not None:
            lse = work.in_blocks(options.sinks.to(kind).expand(batch, heads, n)[..., None])[..., 0]
    elif keeps_statistic(type(options.normaliser)):
        statistic = torch.zeros(batch, heads, n, dtype=kind, device=q.device)
    for chunk in work.chunks():
        scores, mask = chunk.scores()
        if softmax:
            weights, lse[chunk.item] = _softmax(scores, mask, chunk.sinks())
        else:
            weights = chunk.weigh(scores, mask)
        kept = chunk.kept()
        if kept is not None:
            weights = weights * kept
        out[chunk.item] = (weights @ chunk.values()).to(out.dtype)
    if softmax:
        statistic = lse.view(batch, heads, -1)[:, :, :n].contiguous()
    return out.view(batch, heads, -1, width)[:, :, :n].contiguous(), statistic


def backward(work: Work, dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    """The gradients of `forward`, from its results; dlse is the gradient of the statistic, read for the softmax."""
    options, q, kind = work.options, work.q, work.kind
    batch, heads, n, d = work.batch, work.heads, work.n, q.shape[2]
    softmax = type(options.normaliser) is Softmax
    d_out = work.in_blocks(dout)
    dq = torch.zeros(work.items, work.block_q, d, dtype=kind, device=q.device)
    dk = torch.zeros(work.k.shape, dtype=kind, device=q.device)
    dv = torch.zeros(work.v.shape, dtype=kind, device=q.device)
    dbias, dselected = (
        None if x is None else torch.zeros(x.shape, dtype=kind, device=q.device)
        for x in (options.bias if options.bias_grad else None, options.selected)
    )
    dtables = tuple(torch.zeros(t.table.shape, dtype=kind, device=q.device) for t in options.indexed)
    dsinks = None
    if softmax:
        nothing = torch.isneginf(lse)
        # rows of nothing have no log-sum-exp to differentiate
        delta = (dout.to(kind) * out.to(kind)).sum(-1) - dlse.to(kind).masked_fill(nothing, 0.0)
        # exp(score - inf) is 0: rows of nothing weigh nothing
        safe = lse.masked_fill(nothing, float("inf"))
        if options.sinks is not None:
            share = torch.exp(options.sinks.to(kind) - safe)
            dsinks = (-share * delta).sum_to_size(options.sinks.shape).to(options.sinks.dtype)
        row_lse = work.in_blocks(safe[..., None], float("inf"))
        row_delta = work.in_blocks(delta[..., None])
    for chunk in work.chunks():
        scores, mask = chunk.scores()
        kept = chunk.kept()
        given = d_out[chunk.item].to(kind)
        dweights = given @ chunk.values().transpose(1, 2)
        if kept is not None:
            dweights = dweights * kept
        if softmax:
            weights = torch.exp(scores.masked_fill_(~mask, float("-inf")) - row_lse[chunk.item])
            dscores = weights * (dweights - row_delta[chunk.item])
        else:
            with _autograd_here(), torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                weights = chunk.weigh(leaf, mask)
                (dscores,) = torch.autograd.grad(weights, leaf, dweights)
            weights = weights.detach()
        if kept is not None:
            weights = weights * kept
        scaled = dscores * options.scale
        dq[chunk.item] = scaled @ chunk.gathered_keys()
        chunk.add_to_keys(dk, scaled, q[chunk.item].to(kind))
        chunk.add_to_keys(dv, weights, given)
        if dbias is not None:
            chunk.add_to_bias(dbias, dscores)
        for term, dtable in zip(options.indexed, dtables, strict=True):
            dtable.index_put_(chunk.table_places(term), dscores, accumulate=True)
        if dselected is not None:
            dselected.index_put_(chunk.slots(), dscores, accumulate=True)
    whole = dq.view(batch, heads, -1, d)[:, :, :n]
    return Gradients(
        whole.to(q.dtype, copy=True, memory_format=torch.contiguous_format),
        work.out_of_blocks(dk).to(work.k.dtype, copy=True, memory_format=torch.contiguous_format),
        work.out_of_blocks(dv).to(work.v.dtype, copy=True, memory_format=torch.contiguous_format),
        None if dbias is None or options.bias is None else dbias.to(options.bias.dtype),
        tuple(g.to(t.table.dtype) for g, t in zip(dtables, options.indexed, strict=True)),
        dsinks,
        None if dselected is None or options.selected is None else dselected.to(options.selected.dtype),
    )


@contextmanager
def _autograd_here() -> Iterator[None]:
    """Autograd also below the place where an operator has it switched off, as under torch's dispatch modes."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        if hasattr(torch._C.DispatchKey, key):
            excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def _softmax(scores: Tensor, mask: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = scores.masked_fill_(~mask, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    lse = (top + total.log())[..., 0]
    return weights / torch.where(total == 0, torch.ones_like(total), total), lse


class Work:
    """q, k, v cut into blocks: q (items, block_q, D) with items = B H nQ, k and v (B G nK, block_k, width)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, options: Options):
        self.options, self.block_q, self.block_k = options, block_q, block_k
        self.batch, self.heads, self.n, _ = q.shape
        self.groups, self.m = k.shape[1], k.shape[2]
        self.n_q, self.n_k = -(-self.n // block_q), -(-self.m // block_k)
        self.items = self.batch * self.heads * self.n_q
        self.kind = accumulator(q.dtype)
        self.q = self.in_blocks(q)
        self.k, self.v = (
            F.pad(x, (0, 0, 0, self.n_k * block_k - self.m)).reshape(
                self.batch * self.groups * self.n_k, block_k, x.shape[3]
            )
            for x in (k, v)
        )

    def in_blocks(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, N, W) -> (items, block_q, W)."""
        return F.pad(x, (0, 0, 0, self.n_q * self.block_q - self.n), value=fill).reshape(
            self.items, self.block_q, x.shape[3]
        )

    def out_of_blocks(self, x: Tensor) -> Tensor:
        """(B G nK, block_k, W) -> (B, G, M, W)."""
        return x.view(self.batch, self.groups, self.n_k * self.block_k, x.shape[2])[:, :, : self.m]

    def chunks(self, items: Tensor | None = None) -> Iterator[Chunk]:
        """The items that may attend to anything (of those given), some at a time."""
        raise NotImplementedError


class Chunk:
    """Some items (C) and the blocks of keys that each of them may see (S, padded).

    b, h: int64 (C,). row: int64 (C, block_q), of q. source: int64 (C, S), the blocks in k and v. column: int64
    (C, S block_k), positions of the keys, ascending.
    """

    def __init__(self, work: Work, item: Tensor):
        self.work, self.item = work, item
        self.b = item // (work.heads * work.n_q)
        self.h = item // work.n_q % work.heads
        block = item % work.n_q
        self.row = block[:, None] * work.block_q + torch.arange(work.block_q, device=item.device)
        self.source = self.column = self.row

    def mask(self) -> Tensor:
        """Bool, broadcastable to the scores."""
        raise NotImplementedError

    def slots(self) -> tuple[Tensor, ...]:
        """Where `selected` is read for every score."""
        raise NotImplementedError

    def look_at(self, block: Tensor) -> None:
        """Set source and column for the key blocks (C, S)."""
        work = self.work
        first = (self.b * work.groups + self.h * work.groups // work.heads) * work.n_k
        self.source = first[:, None] + block
        self.column = (block[..., None] * work.block_k + torch.arange(work.block_k, device=block.device)).flatten(1)

    def gathered_keys(self) -> Tensor:
        return self.work.k[self.source].flatten(1, 2).to(self.work.kind)

    def values(self) -> Tensor:
        return self.work.v[self.source].flatten(1, 2).to(self.work.kind)

    def add_to_keys(self, total: Tensor, by_pair: Tensor, by_row: Tensor) -> None:
        parts = by_pair.transpose(1, 2) @ by_row
        total.index_add_(0, self.source.flatten(), parts.view(self.source.numel(), self.work.block_k, total.shape[2]))

    def sinks(self) -> Tensor | None:
        sinks = self.work.options.sinks
        return None if sinks is None else sinks[self._at(sinks)[:3]].to(self.work.kind)

    def weigh(self, scores: Tensor, mask: Tensor) -> Tensor:
        normaliser = self.work.options.normaliser
        counts = mask.sum(-1) if normaliser.needs_counts else None
        return normaliser.weigh(scores, mask, counts, self.column[:, None])

    def scores(self) -> tuple[Tensor, Tensor]:
        """Scores and mask, (C, block_q, S block_k)."""
        work, options = self.work, self.work.options
        scores = (work.q[self.item].to(work.kind) * options.scale) @ self.gathered_keys().transpose(1, 2)
        mask = self.mask().expand(scores.shape)
        for bias in self._biases():
            hidden = torch.isneginf(bias)
            scores = scores + bias.masked_fill(hidden, 0.0).to(work.kind)
            mask = mask & ~hidden
        return scores, mask

    def kept(self) -> Tensor | None:
        """What dropout multiplies the weights with."""
        options = self.work.options
        if not options.dropout_p or options.seed is None:
            return None
        b, h, i = self.b[:, None, None], self.h[:, None, None], self.row[..., None] + options.q_offset
        kept = keep(options.seed, options.dropout_p, b, h, i, self.column[:, None])
        return kept.to(self.work.kind) / (1 - options.dropout_p)

    def add_to_bias(self, total: Tensor, dscores: Tensor) -> None:
        # reduced first over the axes that the bias does not have
        if total.shape[2] == 1:
            dscores = dscores.sum(1, keepdim=True)
        if total.shape[3] == 1:
            dscores = dscores.sum(2, keepdim=True)
        first, *others = self._at(total)
        total.index_put_((first.expand(dscores.shape), *others), dscores, accumulate=True)

    def table_places(self, term: Indexed) -> tuple[Tensor, ...]:
        b, h, i, _ = self._at(term.table)
        keys = term.key_index.long()[self.column.clamp(max=self.work.m - 1)][:, None]
        place = keys - term.query_index.long()[self.row.clamp(max=self.work.n - 1)][..., None]
        return b, h, i, place.clamp(0, term.table.shape[3] - 1)

    def _biases(self) -> Iterator[Tensor]:
        options = self.work.options
        if options.bias is not None:
            yield options.bias[self._at(options.bias)]
        for term in options.indexed:
            yield term.table[self.table_places(term)]
        if options.selected is not None:
            yield options.selected[self.slots()]

    def _at(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Where (B|1, H|1, N|1, M|1) is read for every score; an axis of size 1 is read at 0 and not spread."""
        whole = (
            self.b[:, None, None],
            self.h[:, None, None],
            self.row.clamp(max=self.work.n - 1)[..., None],
            self.column.clamp(max=self.work.m - 1)[:, None],
        )
        sizes = (*tensor.shape, 1)[:4]
        return tuple(
            x if size > 1 else torch.zeros((1, 1, 1), dtype=torch.int64, device=x.device)
            for x, size in zip(whole, sizes, strict=True)
        )


class TileWork(Work):
    """Query blocks and the key blocks of a layout."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, options: Options):
        super().__init__(q, k, v, layout.block_q, layout.block_k, options)
        self.layout = layout
        crow = layout.crow.long().expand(self.batch, self.heads, -1)
        first_b, first_h, width = layout.col.shape
        b = torch.arange(first_b, device=crow.device).view(-1, 1, 1)
        h = torch.arange(first_h, device=crow.device).view(1, -1, 1)
        base = ((b * first_h + h) * width).expand(self.batch, self.heads, 1)
        self.start = (crow[..., :-1] + base).flatten()
        self.count = (crow[..., 1:] - crow[..., :-1]).flatten()
        self.col, self.tile = layout.col.flatten().long(), layout.tile.flatten().long()
        few = layout.bits.shape[0] <= UNPACKED
        self.unpacked = unpack(layout.bits, layout.block_k) if few else None

    def chunks(self, items: Tensor | None = None) -> Iterator[Chunk]:
        # the longest lists first
        order = torch.argsort(self.count if items is None else self.count[items], descending=True, stable=True)
        order = order if items is None else items[order]
        counts = self.count[order].tolist()
        size = self.block_q * self.block_k
        begin = 0
        while begin < len(counts) and counts[begin]:
            length = max(1, SCORES // (size * counts[begin]))
            yield _Tiles(self, order[begin : begin + length], counts[begin])
            begin += length


class _Tiles(Chunk):
    work: TileWork

    def __init__(self, work: TileWork, item: Tensor, longest: int):
        super().__init__(work, item)
        slot = torch.arange(longest, device=item.device)
        count = work.count[item][:, None]
        self.filled = slot < count
        # a padded slot looks at the last tile of the list again, hidden: key positions stay in ascending order
        place = work.start[item][:, None] + torch.minimum(slot, (count - 1).clamp(min=0))
        place = place.clamp(max=work.tile.shape[0] - 1)
        self.tile = work.tile[place]
        self.look_at(work.col[place].clamp(min=0))

    def mask(self) -> Tensor:
        work = self.work
        filled = self.filled[..., None].expand(-1, -1, work.block_k).flatten(1)
        mask = (filled & (self.column < work.m))[:, None]
        if bool((self.tile > 0).any()):
            index = (self.tile - 1).clamp(min=0)
            seen = unpack(work.layout.bits[index], work.block_k) if work.unpacked is None else work.unpacked[index]
            mask = mask & (seen | (self.tile == 0)[..., None, None]).transpose(1, 2).flatten(2)
        if work.n % work.block_q:
            mask = mask & (self.row < work.n)[..., None]
        return mask


class RowWork(Work):
    """Single queries and the keys that are listed for each: indices (B|1, H', N, K), -1 = empty slot.

    A key that is in `force` or not in `within` is left out.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        force: Pattern | Bound | None,
        within: Pattern | Bound | None,
        options: Options,
    ):
        super().__init__(q, k, v, 1, 1, options)
        # keys in ascending order, as some normalisers need them; empty slots last
        far = indices.long().masked_fill(indices < 0, self.m)
        self.indices, self.slot = far.sort(-1)
        if indices.numel() and (int(indices.max()) >= self.m or int(indices.min()) < -1):
            raise OptionError(f"the selection names key {int(indices.max())}, there are {self.m}; -1 is an empty slot")
        if bool(((self.indices[..., 1:] == self.indices[..., :-1]) & (self.indices[..., 1:] < self.m)).any()):
            raise OptionError("the selection names a key twice in one row, which would count it twice")
        self.force, self.within = force, within

    def chunks(self, items: Tensor | None = None) -> Iterator[Chunk]:
        if not self.indices.shape[3]:
            return
        items = torch.arange(self.items, device=self.q.device) if items is None else items
        length = max(1, GATHERED // (self.indices.shape[3] * max(self.q.shape[2], self.v.shape[2])))
        for begin in range(0, len(items), length):
            yield _Rows(self, items[begin : begin + length])


class _Rows(Chunk):
    work: RowWork

    def __init__(self, work: RowWork, item: Tensor):
        super().__init__(work, item)
        batch, heads, _, _ = work.indices.shape
        self.place = (self.b if batch > 1 else self.b * 0, self.h * heads // work.heads, self.row[:, 0])
        found = work.indices[self.place]
        self.there = (found < work.m)[:, None]
        self.look_at(found.clamp(max=work.m - 1))

    def mask(self) -> Tensor:
        work, mask = self.work, self.there
        b, h, i = self.b[:, None, None], self.h[:, None, None], self.row[..., None] + self.work.options.q_offset
        if work.within is not None:
            mask = mask & allowed(work.within, b, h, i, self.column[:, None])
        if work.force is not None:
            mask = mask & ~allowed(work.force, b, h, i, self.column[:, None])
        return mask

    def slots(self) -> tuple[Tensor, ...]:
        b, h, i = (x[:, None, None] for x in self.place)
        return b, h, i, self.work.slot[self.place][:, None]


def allowed(pattern: Pattern | Bound, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """What a pattern says of pairs, data and all."""
    if isinstance(pattern, Bound):
        return pattern.pattern.allowed(b, h, i, j, pattern.data)
    return pattern.allowed(b, h, i, j, {})
