"""Dynamic mask attention: a learned score of each key decides which keys every query may see.

    out_i = softmax over S_i of (scale q_i k_j' + delta_j) v_j,     delta_j = exp(A softplus(W v_j)),
    S_i = the `window` visible keys of the largest delta_j; among equal ones the earlier come first

The score belongs to the key alone, so the sets are those of a running best list: a key that fell out never returns.
Departs from the paper: a row with fewer visible keys than the window sees these and nothing else (the released code
also marked hidden ones); block smoothing counts the keys of a block that a row may see, not those still to come.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.operator import operator
from regard.engines.block_sparse import block_sparse
from regard.engines.gather import gather
from regard.engines.precision import accumulator
from regard.engines.scan import as_scan
from regard.patterns import Bound, Causal, Pattern, TokenSelection

CARD = OpCard(
    slug="dynamic_mask",
    title="Dynamic mask attention",
    paper="Trainable Dynamic Mask Sparse Attention",
    exports=("dynamic_mask_attention", "dynamic_mask_score", "dynamic_mask_keys"),
    spec="q: b h n d, k: b g m d, v: b g m e, key_score: b g m -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    options={"window": 6, "is_causal": False},
    attends=("self", "causal_self"),
    accepts=("pattern", "scale", "dropout"),
    padding=True,
    documents=True,
    decode="kv",
    time="n w",
    memory="n w",
    engines=("gather", "block_sparse"),
)

# rows that are selected at once, at least; more with a larger window, whose list every chunk sorts again
_CHUNK = 64


@operator(CARD)
def dynamic_mask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_score: Tensor,
    *,
    window: int,
    is_causal: bool | None = None,
    pattern: Pattern | Bound | None = None,
    scale: float | None = None,
    q_offset: int = 0,
    block_smooth: int | None = None,
    dropout_p: float = 0.0,
    engine: str | None = None,
) -> Tensor:
    """Attend to the `window` keys of the largest score, which is also added to the logits (section 3).

    key_score: delta (B, G, M), such as `dynamic_mask_score` gives; it has a gradient through the logits, the choice of
    keys has none. window: keys a query, at least 1. is_causal: must be said, unless a pattern with Causal() says it;
    False: one set for all queries. pattern: an intersection of Causal(), KeyValid() and Documents(). q_offset: position
    of the first query, for caches. block_smooth: size of key blocks; a block is seen whole if more than half of the
    keys of it that the row may see were chosen, else not at all (2 window keys at most).
    Raises OptionError, ShapeError; Unsupported for another pattern.
    """
    _check_window(window)
    if block_smooth is not None and block_smooth < 1:
        raise OptionError(f"block_smooth is the size of a block of keys, at least 1, not {block_smooth}")
    if is_causal is None and (pattern is None or not pattern.causal):
        raise OptionError(
            "dynamic mask attention chooses keys from the past: pass is_causal=True, or is_causal=False for one set of "
            "keys for all queries"
        )
    causal, key_valid, reset = as_scan(pattern, bool(is_causal), CARD.slug)
    within = Causal() if is_causal else pattern
    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    bias = key_score.repeat_interleave(heads // k.shape[1], 1)[:, :, None]
    if m <= window and block_smooth is None and not (engine or "").startswith("gather"):
        return block_sparse(
            q, k, v, within, bias=bias, scale=scale, q_offset=q_offset, dropout_p=dropout_p, engine=engine
        ).out
    indices = _chosen(key_score, window, q_offset, n, causal, key_valid, reset, block_smooth)
    selection = TokenSelection(indices) if within is None else TokenSelection(indices, within=within)
    run = block_sparse if (engine or "").startswith("block_sparse") else gather
    return run(
        q, k, v, selection, bias=bias, scale=scale, q_offset=q_offset, dropout_p=dropout_p, engine=engine
    ).out  # fmt: skip


def dynamic_mask_score(v: Tensor, weight: Tensor, a: Tensor, *, exp: bool = True) -> Tensor:
    """delta (B, G, M) of keys from their values v (B, G, M, E): exp(a softplus(weight v)), v of all heads joined.

    weight: (G, G E). a: (G,), 0 at the start, which prefers no key. exp: False is the later released code,
    a softplus(weight v). Raises ShapeError.
    """
    groups, width = v.shape[1], v.shape[1] * v.shape[3]
    if weight.shape != (groups, width) or a.shape != (groups,):
        raise ShapeError(
            f"dynamic_mask_score: weight is {tuple(weight.shape)} and a is {tuple(a.shape)}; for values "
            f"{tuple(v.shape)} they must be {(groups, width)} and {(groups,)}"
        )
    rate = F.softplus(F.linear(v.transpose(1, 2).flatten(2), weight).to(accumulator(v.dtype)))
    delta = rate * a
    return (delta.exp() if exp else delta).transpose(1, 2).to(v.dtype)


def dynamic_mask_keys(key_score: Tensor, window: int, *, key_valid: Tensor | None = None) -> Tensor:
    """The keys that queries after the last one can still see: int64 (B, G, min(window, M)), ascending, -1 = none.

    A cache may forget all others for good. key_valid: bool (B, M).
    """
    _check_window(window)
    m = key_score.shape[2]
    everything = torch.arange(m, device=key_score.device).expand(key_score.shape)
    last = torch.full((1,), m - 1, device=key_score.device)
    return _best(key_score, everything, last, min(window, m), key_valid, None)[:, :, 0].sort(-1).values


def _check_window(window: int) -> None:
    if window < 1:
        raise OptionError(f"dynamic mask attention needs a window of at least 1 key, not {window}")


@torch.no_grad()
def _chosen(
    score: Tensor,
    window: int,
    start: int,
    n: int,
    causal: bool,
    key_valid: Tensor | None,
    reset: Tensor | None,
    block: int | None,
) -> Tensor:
    """The chosen keys of the rows at positions start … start + n - 1: int32 (B, G, n, K), -1 = no more."""
    m, device = score.shape[2], score.device
    document = None if reset is None else reset.long().cumsum(-1)
    everything = torch.arange(m, device=device).expand(score.shape)

    def pick(keys: Tensor, rows: Tensor) -> Tensor:
        return _best(score, keys, rows, min(window, m), key_valid, document)

    if not causal:
        rows = torch.full((1,), m - 1, device=device)
        best = pick(everything, rows)
        whole = best if block is None else _smooth(best, rows, block, m, key_valid, document)
        return whole.int().expand(-1, -1, n, -1)
    held = everything[..., :start]
    if start:
        held = pick(held, torch.full((1,), start - 1, device=device))[:, :, 0].sort(-1).values
    size = max(_CHUNK, min(window, 4 * _CHUNK))
    found = []
    for first in range(start, start + n, size):
        last = min(first + size, start + n)
        rows = torch.arange(first, last, device=device)
        best = pick(torch.cat((held, everything[..., first:last]), -1), rows)
        held = best[:, :, -1].sort(-1).values
        found.append((best if block is None else _smooth(best, rows, block, m, key_valid, document)).int())
    return torch.cat(found, 2)


def _best(
    score: Tensor, keys: Tensor, rows: Tensor, width: int, key_valid: Tensor | None, document: Tensor | None
) -> Tensor:
    """Of candidate keys (B, G, S), ascending, -1 = none, the best that each row may see: (B, G, R, width), -1 = none."""
    order = score.detach().gather(-1, keys.clamp(min=0)).argsort(dim=-1, descending=True, stable=True)
    keys = keys.gather(-1, order)
    seen = _visible(keys, rows, key_valid, document)
    place = seen.cumsum(-1, dtype=torch.int32)
    # those behind the width all land in one more column, which is cut off
    place = torch.where(seen & (place <= width), place.long() - 1, width)
    best = keys.new_full((*place.shape[:-1], width + 1), -1)
    return best.scatter(-1, place, keys[:, :, None].expand(place.shape))[..., :width]


def _visible(keys: Tensor, rows: Tensor, key_valid: Tensor | None, document: Tensor | None) -> Tensor:
    """May each row see each of the keys (B, G, S): bool (B, G, R, S)."""
    places = keys.clamp(min=0)
    seen = (keys >= 0)[:, :, None] & (keys[:, :, None] <= rows[:, None])
    if key_valid is not None:
        seen = seen & key_valid[:, None].expand(*keys.shape[:2], -1).gather(-1, places)[:, :, None]
    if document is not None:
        own = document[:, rows.clamp(max=document.shape[1] - 1)][:, None, :, None]
        theirs = document[:, None].expand(*keys.shape[:2], -1).gather(-1, places)
        seen = seen & (theirs[:, :, None] == own)
    return seen


def _smooth(
    best: Tensor, rows: Tensor, block: int, m: int, key_valid: Tensor | None, document: Tensor | None
) -> Tensor:
    """Whole blocks of keys in the place of chosen keys: (B, G, R, min(2 window, M))."""
    batch, groups, count, window = best.shape
    blocks = -(-m // block)
    everything = torch.arange(blocks * block, device=best.device)
    everything = everything.masked_fill(everything >= m, -1).expand(batch, groups, -1)
    seen = _visible(everything, rows, key_valid, document).unflatten(-1, (blocks, block))
    chosen = best.new_zeros(batch, groups, count, blocks + 1)
    chosen.scatter_add_(-1, torch.where(best < 0, blocks, best // block), torch.ones_like(best))
    kept = (seen & (2 * chosen[..., :blocks] > seen.sum(-1))[..., None]).flatten(-2)
    width = min(2 * window, m)
    place = torch.where(kept, kept.cumsum(-1) - 1, width)
    out = best.new_full((batch, groups, count, width + 1), -1)
    return out.scatter(-1, place, everything[:, :, None].expand(place.shape))[..., :width]
