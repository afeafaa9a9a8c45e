"""HiP attention: every block of queries finds its best key blocks by a search in a tree of ranges.

    n = ceil(budget / block_k) ranges cover the keys 0 … e - recent, e the last row of the query block;
    each range is halved, a half is worth max (q . k) over its representative key block, the n best halves stay,
    until every range is one key block;    out = softmax attention over these, the recent keys and the sinks, causal

Departs from the released code: the bounds of the ranges are integers (floats lose the last block for many sizes), all
queries of a block are scored (there: every second one, none of a single one), scores may be negative everywhere.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, Unsupported
from regard.contract.operator import operator
from regard.engines.block_sparse import block_sparse
from regard.engines.precision import accumulator, without_autocast
from regard.patterns import BlockSelection, Bound, Causal, KeyValid, Pattern, Sinks, SlidingWindow

CARD = OpCard(
    slug="hip",
    title="HiP attention: hierarchically pruned key blocks",
    paper="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
    exports=("hip_attention", "hip_select"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=14 m=14 d=8 e=6",
    options={"budget": 4, "block_q": 1, "block_k": 2, "recent": 2, "sinks": 1},
    attends=("causal_self",),
    accepts=("pattern", "scale"),
    decode="kv",
    time="n log(n) d",
    memory="n d",
    engines=("block_sparse",),
)

# how many numbers of gathered keys and their scores are in memory at a time
GATHERED = 1 << 23


@operator(CARD)
def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    recent: int = 128,
    sinks: int = 16,
    representative: Literal["first", "center"] = "first",
    oracle: bool = False,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """Causal softmax attention over the keys of `hip_select` (section 3), which gets no gradient.

    With block_q > 1 the choice of a row depends on the later rows of its block: it is causal block by block, and
    decoding equals the whole only with block_q=1. pattern: Causal(). scale: D^-1/2 if None. q_offset: position of the
    first query. The other options are those of `hip_select`. Raises ShapeError, OptionError, Unsupported.
    """
    if is_causal and pattern is not None:
        raise OptionError("is_causal together with a pattern says it twice: leave one of them out")
    if pattern is not None and pattern != Causal():
        raise Unsupported(f"hip searches all keys before a block of rows: it follows Causal() alone, not {pattern}")
    selection = hip_select(
        -q if scale is not None and scale < 0 else q, k, budget=budget, block_q=block_q, block_k=block_k, recent=recent,
        sinks=sinks, representative=representative, oracle=oracle, q_offset=q_offset,
    )  # fmt: skip
    return block_sparse(q, k, v, selection, scale=scale, q_offset=q_offset, engine=engine).out


@torch.no_grad()
def hip_select(
    q: Tensor,
    k: Tensor,
    *,
    budget: int = 512,
    block_q: int = 32,
    block_k: int = 2,
    recent: int = 128,
    sinks: int = 16,
    representative: Literal["first", "center"] = "first",
    oracle: bool = False,
    key_valid: Tensor | None = None,
    q_offset: int = 0,
) -> BlockSelection:
    """Which key blocks every block of queries attends to: q (B, H, N, D), k (B, G, M, D), rotated as they meet.

    budget: keys found by the search, at least block_k; where there are no more, all of them. block_q, block_k: rows
    and keys of a block. recent: last keys up to each row that are always seen, at least 1. sinks: first keys that are
    always seen. representative: the block of a range that is scored. oracle: score every block of a range, which finds
    the best blocks exactly, at full cost. key_valid: bool (B, M); hidden keys are never read, but padding in front
    moves the bounds of the ranges. q_offset: position of the first query, a multiple of block_q. Raises OptionError.
    """
    _check(budget, block_q, block_k, recent, sinks, representative, q_offset)
    n, m = q.shape[2], k.shape[2]
    kept = -(-budget // block_k)
    ends = [min(q_offset + first + block_q, q_offset + n) for first in range(0, n, block_q)]
    held = [-(-min(max(end - recent, 0), m) // block_k) for end in ends]
    # a block of queries never has fewer key blocks than the one before it
    whole = sum(count <= kept for count in held)
    slot = torch.arange(min(kept, max([0, *held])), dtype=torch.int64, device=q.device)
    counts = torch.tensor(held[:whole], dtype=torch.int64, device=q.device)[:, None]
    found = [slot.masked_fill(slot >= counts, -1).expand(*q.shape[:2], -1, -1)]
    with without_autocast(q.device):
        search = _Search(q, k, block_q, block_k, ends, key_valid)
        step = max(1, GATHERED // (q.shape[0] * q.shape[1] * 2 * kept * block_k * (q.shape[3] + block_q)))
        for begin in range(whole, len(held), step):
            found.append(search.find(begin, held[begin : begin + step], kept, representative, oracle))
    force: Pattern = SlidingWindow(recent)
    if sinks:
        force = force | Sinks(sinks)
    within: Pattern | Bound = Causal()
    if key_valid is not None:
        within = within & KeyValid().bind(key_valid=key_valid)
    indices = torch.cat(found, 2).to(torch.int32)
    return BlockSelection(block_q, block_k, indices, force=force, within=within)


class _Search:
    """q and k cut into blocks, and the value of a key block for a block of queries."""

    def __init__(self, q: Tensor, k: Tensor, block_q: int, block_k: int, ends: list[int], key_valid: Tensor | None):
        kind = accumulator(q.dtype)
        batch, heads, n, _ = q.shape
        groups, m = k.shape[1], k.shape[2]
        self.least = torch.finfo(kind).min
        self.q = F.pad(q.to(kind), (0, 0, 0, len(ends) * block_q - n)).unflatten(2, (-1, block_q))
        self.k = F.pad(k.to(kind), (0, 0, 0, -m % block_k)).unflatten(2, (-1, block_k))
        row = torch.arange(len(ends) * block_q, device=q.device).view(-1, block_q, 1)
        self.missing = row >= n
        self.end = torch.tensor([min(end, m) for end in ends], device=q.device)
        seen = q.new_ones(1, m, dtype=torch.bool) if key_valid is None else key_valid
        self.hidden = ~F.pad(seen, (0, -m % block_k)).unflatten(1, (-1, block_k))
        self.batch = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
        self.group = (torch.arange(heads, device=q.device) * groups // heads).view(1, -1, 1, 1)

    def find(self, begin: int, held: list[int], kept: int, representative: str, oracle: bool) -> Tensor:
        """The chosen key blocks (B, H, C, kept) of the query blocks begin …, which have held[c] > kept key blocks."""
        device = self.q.device
        counts = torch.tensor(held, dtype=torch.int64, device=device)[:, None]
        bounds = torch.arange(kept + 1, device=device) * counts // kept
        shape = (*self.q.shape[:2], len(held), kept)
        start = bounds[:, :-1].expand(shape)
        size = bounds.diff(dim=1).expand(shape)
        # the largest range halves, rounded up, at every level
        levels = [(-(-count // kept) - 1).bit_length() for count in held]
        for level in range(levels[-1]):
            done = sum(depth <= level for depth in levels)
            first, whole = start[:, :, done:], size[:, :, done:]
            half = whole // 2
            child, extent = torch.cat((first, first + half), -1), torch.cat((half, whole - half), -1)
            if oracle:
                value = self.best(child, extent, begin + done, -(-held[-1] // kept))
            else:
                shift = extent // 2 if representative == "center" else torch.zeros_like(extent)
                value = self.value((child + shift).clamp(max=self.k.shape[2] - 1), begin + done)
            # an empty half is behind everything, also behind hidden keys
            chosen = value.masked_fill(extent == 0, float("-inf")).topk(kept, -1).indices
            start = torch.cat((start[:, :, :done], child.gather(-1, chosen)), 2)
            size = torch.cat((size[:, :, :done], extent.gather(-1, chosen)), 2)
        return start.sort(-1).values

    def value(self, block: Tensor, begin: int) -> Tensor:
        """max (q . k) of key blocks (B, H, C, W) for the query blocks begin …; the least number if all is hidden."""
        rows = slice(begin, begin + block.shape[2])
        keys = self.k[self.batch, self.group, block]
        scores = self.q[:, :, rows] @ keys.flatten(3, 4).transpose(-1, -2)
        scores = scores.masked_fill(self.missing[rows], self.least).amax(3).view(keys.shape[:-1])
        place = block[..., None] * keys.shape[4] + torch.arange(keys.shape[4], device=block.device)
        batch = self.batch if self.hidden.shape[0] > 1 else torch.zeros_like(self.batch)
        hidden = self.hidden[batch, block] | (place >= self.end[rows].view(1, 1, -1, 1, 1))
        return scores.masked_fill(hidden, self.least).amax(-1)

    def best(self, start: Tensor, extent: Tensor, begin: int, longest: int) -> Tensor:
        """The largest value in the ranges start …, of `extent` blocks each."""
        every = torch.arange(self.k.shape[2], device=start.device).expand(*start.shape[:3], -1)
        values = self.value(every, begin)
        inside = torch.arange(longest, device=start.device)
        place = (start[..., None] + inside).clamp(max=self.k.shape[2] - 1)
        found = values.gather(-1, place.flatten(3)).view(place.shape)
        return found.masked_fill(inside >= extent[..., None], float("-inf")).amax(-1)


def _check(
    budget: int, block_q: int, block_k: int, recent: int, sinks: int, representative: str, q_offset: int
) -> None:
    if block_q < 1 or block_k < 1:
        raise OptionError(f"hip needs blocks of at least one row and one key, not {block_q} and {block_k}")
    if budget < block_k:
        raise OptionError(f"hip needs a budget of at least one block of {block_k} keys, not {budget}")
    if recent < 1:
        raise OptionError(f"hip needs at least 1 recent key, the row's own, not {recent}: a row may find no other")
    if sinks < 0:
        raise OptionError(f"sinks is a number of keys, at least 0, not {sinks}")
    if representative not in ("first", "center"):
        raise OptionError(f"representative is {representative!r}; it is 'first' or 'center'")
    if q_offset % block_q:
        raise OptionError(
            f"the queries start at {q_offset}, inside a block of {block_q}: start at a multiple of block_q, or decode "
            "with block_q=1"
        )
