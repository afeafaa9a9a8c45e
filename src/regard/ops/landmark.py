"""Landmark attention: the last token of every block opens the gate to its block.

    a landmark follows every L tokens;  row i: softmax 1 over the ordinary tokens of its own block up to i and the
    landmarks of earlier blocks;  softmax 2 inside each earlier block over its L ordinary tokens
    weight of token j of block b = p1(landmark_b) p2(j | b),   of an own token p1(j),   of a landmark 0

Retrieval from a cache may move blocks to stingy places: with k = min(topk, blocks in the cache) they stand, in order, in
the slots 0 … k before the open block: slot t for the t-th, t + 1 if it is one of the last k; older landmarks are scored
in slot 0.
Departs from the paper: the dropout of whole blocks is left out; a landmark that stands where the period does not put
it is refused instead of sharing a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.operator import operator
from regard.engines.block_sparse import block_sparse
from regard.engines.precision import accumulator, without_autocast
from regard.patterns import Blocks, BlockSelection, Bound, Causal, Pattern, SlidingWindow, Strided
from regard.patterns.algebra import Not
from regard.primitives.merge import merge
from regard.primitives.normalisers import Grouped

CARD = OpCard(
    slug="landmark",
    title="Landmark attention",
    paper="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    exports=("landmark_attention", "landmark_select", "landmark_merge"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=10 m=10 d=8 e=6",
    options={"block": 10},
    attends=("causal_self",),
    accepts=("pattern", "scale"),
    decode="kv",
    time="n m d",
    memory="n d",
    engines=("block_sparse",),
)


# vectors (B, H, …, N, D) that stand at some places -> as they are at others; places int64 (N,) or (B, H, …, N)
Move = Callable[[Tensor, Tensor, Tensor], Tensor]


@operator(CARD)
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    is_landmark: Tensor | None = None,
    topk: int | None = None,
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_offset: int = 0,
    engine: str | None = None,
) -> Tensor:
    """Causal attention with grouped weights (section 3.1); every (block + 1)-th key is a landmark.

    block: ordinary tokens before each landmark, at least 1. is_landmark: bool (M,) or (B, M), checked against that
    period. topk: each row and head reads only the earlier blocks of its topk best landmarks (section 3.2), at least
    1; None: all. pattern: Causal(). scale: D^-1/2 if None. q_offset: position of the first query. A landmark's own
    value is never read, and its row sees the tokens of its block. Raises OptionError, ShapeError, Unsupported.
    """
    if is_causal and pattern is not None:
        raise OptionError("is_causal together with a pattern says it twice: leave one of them out")
    if pattern is not None and pattern != Causal():
        raise Unsupported(f"landmark groups keys by their place and follows Causal() alone, not {pattern}")
    if is_landmark is not None:
        check_landmarks(is_landmark, block, k.shape[2])
    seen: Pattern | BlockSelection
    if topk is None:
        seen = _seen(block)
    else:
        seen = landmark_select(q, k, block=block, topk=topk, scale=scale, q_offset=q_offset)
    normaliser = Grouped(_period(block))
    return block_sparse(q, k, v, seen, scale=scale, q_offset=q_offset, normaliser=normaliser, engine=engine).out


@torch.no_grad()
def landmark_select(
    q: Tensor, k: Tensor, *, block: int, topk: int, scale: float | None = None, q_offset: int = 0
) -> BlockSelection:
    """The blocks of each row's topk best landmarks and its own block, for every query head.

    q (B, H, N, D), k (B, G, M, D), rotated as they meet. Raises OptionError.
    """
    period = _period(block)
    if topk < 1:
        raise OptionError(f"landmark needs a topk of at least 1 block, not {topk}")
    batch, heads, n, d = q.shape
    kind = accumulator(q.dtype)
    with without_autocast(q.device):
        landmarks = k[:, :, block::period].to(kind)
        by_group = q.to(kind).reshape(batch, k.shape[1], -1, n, d) * (d**-0.5 if scale is None else scale)
        scores = (by_group @ landmarks[:, :, None].transpose(-1, -2)).reshape(batch, heads, n, -1)
    own = torch.arange(q_offset, q_offset + n, device=q.device)[:, None] // period
    earlier = torch.arange(landmarks.shape[2], device=q.device) < own
    best = scores.masked_fill(~earlier, float("-inf")).topk(min(topk, landmarks.shape[2]), -1).indices
    indices = torch.where(best < own, best, -1).to(torch.int32)
    return BlockSelection(1, period, indices, force=Blocks(period), within=_seen(block))


def landmark_merge(
    own: Tensor, own_lse: Tensor, scores: Tensor, landmarks: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """The streaming form: blocks join a row one by one, each as one key, its landmark, with its own attention as value.

    own (B, H, N, E), own_lse (B, H, N): plain attention over the own block. scores (B, H, N, S, L): of the ordinary
    keys of S earlier blocks; landmarks (B, H, N, S): of their landmarks, -inf for a block that takes no part; values
    (B, H, N, S, L, E). Returns the output and the log-sum-exp of softmax 1.
    """
    inside = (torch.softmax(scores, -1)[..., None, :] @ values).squeeze(-2)
    return merge((own, *inside.unbind(3)), (own_lse, *landmarks.unbind(3)))


def landmark_retrieve(
    q: Tensor,
    local: tuple[Tensor, Tensor],
    memory: tuple[Tensor, Tensor],
    landmarks: Tensor,
    *,
    block: int,
    topk: int,
    positions: Literal["true", "stingy"],
    retrieve: Literal["row", "call"] = "row",
    move: Move,
    scale: float | None = None,
) -> Tensor:
    """Landmark attention (section 3.2) of rows q (B, H, N, D) that end the open block: (B, H, N, E).

    local: keys and values (B, G, M, D) of the open block, the rows' own among them. memory: those of S closed blocks of
    block + 1 places, perhaps on another device. landmarks (B, G, S, D): their last keys. Vectors stand at their places in
    the text, or are not turned yet, if `move` knows that. scale: D^-1/2 if None.
    """
    period, count, n = block + 1, landmarks.shape[2], q.shape[2]
    kept = min(topk, count)
    # places are differences only: stingy ones count from the front of slot 0, which all blocks together leave out
    begin = min(kept + 1, count) if positions == "stingy" else count
    inside = local[0].shape[2] - n
    here = torch.arange(inside + n, device=q.device)
    q = move(q, here[inside:] + count * period, here[inside:] + begin * period)
    k = move(local[0], here + count * period, here + begin * period)
    own = block_sparse(q, k, local[1], own_block(block), scale=scale, q_offset=inside, return_lse=True)
    if not kept:
        return own.out
    assert own.lse is not None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with without_autocast(q.device):
        return _retrieve(q, own.out, own.lse, memory, landmarks, period, kept, begin, positions, retrieve, move, scale)


def own_block(block: int) -> Pattern:
    """The ordinary keys of a row's own block up to the row itself."""
    return Blocks(_period(block)) & _seen(block)


def check_landmarks(is_landmark: Tensor, block: int, m: int, first: int = 0) -> None:
    """Raise unless landmarks, bool (M,) or (B, M), stand behind every `block` tokens and nowhere else.

    first: tokens before these.
    """
    if is_landmark.dtype != torch.bool or is_landmark.dim() not in (1, 2) or is_landmark.shape[-1] != m:
        raise ShapeError(
            f"is_landmark is {is_landmark.dtype} {tuple(is_landmark.shape)}; it must be bool (M,) or (B, M), M = {m}"
        )
    period = _period(block)
    if torch.compiler.is_compiling() or is_landmark.is_meta:
        return
    wanted = torch.arange(first, first + m, device=is_landmark.device) % period == block
    if bool(wanted.any()) and not bool(is_landmark.any()):
        raise OptionError(f"no landmark found in {m} tokens: pass the ids through insert_landmarks(ids, {block}, …)")
    wrong = is_landmark != wanted
    if bool(wrong.any()):
        raise OptionError(
            f"landmarks must stand behind every {block} tokens, at positions {block}, {block + period}, …; position "
            f"{first + int(wrong.nonzero()[0, -1])} is wrong"
        )


def _retrieve(
    q: Tensor, own: Tensor, own_lse: Tensor, memory: tuple[Tensor, Tensor], landmarks: Tensor, period: int, kept: int,
    begin: int, positions: str, retrieve: str, move: Move, scale: float,
) -> Tensor:  # fmt: skip
    batch, heads, n, d = q.shape
    kind, device, (groups, count) = accumulator(q.dtype), q.device, landmarks.shape[1:3]
    rows = q.to(kind) * scale
    every = torch.arange(count, device=device)
    slots = (every - count + begin).clamp(min=0)
    moved = move(landmarks.to(kind), every * period + period - 1, slots * period + period - 1)
    by_group = rows.view(batch, groups, heads // groups, n, d)
    scores = (by_group @ moved[:, :, None].transpose(-1, -2)).reshape(batch, heads, n, count)
    if retrieve == "call":
        scores = torch.softmax(scores, -1).amax(2, keepdim=True)
    best = scores.detach().topk(kept, -1).indices.sort(-1).values
    slots = best
    if positions == "stingy":
        slots = torch.arange(kept, device=device) + (best >= count - kept) + begin - kept - 1
    place = torch.arange(period, device=device)
    keys, values = (_gather(x.unflatten(2, (-1, period)), best).to(device, kind) for x in memory)
    origin, places = ((x[..., None] * period + place).flatten(3) for x in (best, slots))
    keys = move(keys.flatten(3, 4), origin, places).unflatten(3, (kept, period))
    scores = (keys @ rows[:, :, :, None, :, None]).squeeze(-1)
    values = values[..., :-1, :].expand(*scores.shape[:-1], -1, -1)
    out, _ = landmark_merge(own.to(kind), own_lse, scores[..., :-1], scores[..., -1], values)
    return out.to(own.dtype)


def _gather(blocks: Tensor, index: Tensor) -> Tensor:
    """Blocks (B, G, S, L, D) at index (B, H, R, K) -> (B, H, R, K, L, D)."""
    batch, heads = index.shape[:2]
    b = torch.arange(batch, device=blocks.device).view(-1, 1, 1, 1)
    g = (torch.arange(heads, device=blocks.device) * blocks.shape[1] // heads).view(1, -1, 1, 1)
    return blocks[b, g, index.to(blocks.device)]


def _seen(block: int) -> Pattern:
    period = _period(block)
    # a landmark is not seen from its own block, of which only its own row could see it
    own_landmark = SlidingWindow(1) & Strided(period, offset=block, of="key")
    # torch.compile cannot trace ~
    return Causal() & Not(own_landmark)


def _period(block: int) -> int:
    if block < 1:
        raise OptionError(f"landmark needs a block of at least 1 token, not {block}")
    return block + 1
