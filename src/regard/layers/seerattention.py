"""The gate of SeerAttention: pooled queries and keys, before rotation, tell which blocks a row of blocks needs.

    q_b = avg over the block,  k_b = (max, min, avg) over the block;  S = rot(q_b W_q) . rot(k_b W_k) / sqrt(hidden)

one W a head, rotated by the position of the first token of each block; block-causal, the own block among them.
Departs from the released code: padding takes no part in the pools, and a chosen row always holds its own block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError
from regard.engines.precision import accumulator
from regard.patterns import Blocks, BlockSelection, Causal, Pattern
from regard.primitives.normalisers import Softmax
from regard.primitives.positions import rope

POOLS = ("avg", "max", "min")


class SeerGate(nn.Module):
    """Scores of key blocks for query blocks: q (B, H, N, D), k (B, G, N, D) -> (B, H, n, n), n = ceil(N / block).

    heads, kv_heads, head_dim: of the attention it looks at. block: tokens. hidden: width of its own queries and keys,
    even. pool_q, pool_k: of "avg", "max", "min", in the order in which they are joined. rotary_base: of the positions,
    None for none. A loaded gate must have the same block, hidden and pools. Raises OptionError.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        block: int = 64,
        hidden: int = 128,
        pool_q: tuple[str, ...] = ("avg",),
        pool_k: tuple[str, ...] = ("max", "min", "avg"),
        rotary_base: float | None = 1e4,
    ):
        super().__init__()
        if block < 1:
            raise OptionError(f"a gate needs blocks of at least 1 token, not {block}")
        if hidden < 1 or (rotary_base is not None and hidden % 2):
            raise OptionError(f"rotary positions need an even hidden width of the gate, not {hidden}")
        for pools in (pool_q, pool_k):
            if not pools or len(set(pools)) < len(pools) or any(pool not in POOLS for pool in pools):
                raise OptionError(f"the pools are {pools}; they are different ones of {', '.join(POOLS)}, at least one")
        if kv_heads < 1 or heads % kv_heads:
            raise OptionError(f"{heads} query heads cannot share {kv_heads} key heads: it must be a multiple of them")
        self.block, self.hidden, self.rotary_base = block, hidden, rotary_base
        self.pool_q, self.pool_k = tuple(pool_q), tuple(pool_k)
        self.weight_q = nn.Parameter(_uniform(heads, len(pool_q) * head_dim, hidden))
        self.weight_k = nn.Parameter(_uniform(kv_heads, len(pool_k) * head_dim, hidden))
        # travels with the weights: their shapes do not tell the block
        self.register_buffer("settings", torch.tensor(self._settings()))

    def forward(self, q: Tensor, k: Tensor, *, key_valid: Tensor | None = None) -> Tensor:
        """Logits by `seer_gate`; q, k before rotation. key_valid: bool (B, N), True = takes part."""
        return seer_gate(
            q, k, self.weight_q, self.weight_k, block=self.block, pool_q=self.pool_q, pool_k=self.pool_k,
            rotary_base=self.rotary_base, key_valid=key_valid,
        )  # fmt: skip

    def select(
        self, q: Tensor, k: Tensor, *, ratio: float | None = None, threshold: float | None = None, dense_last: int = 2
    ) -> BlockSelection | Pattern:
        """What `seer_select` chooses by these logits; Causal() for a sequence shorter than a block."""
        if q.shape[2] < self.block:
            return Causal()
        logits = self(q, k)
        return seer_select(logits, block=self.block, ratio=ratio, threshold=threshold, dense_last=dense_last)

    def _settings(self) -> list[int]:
        places = [[POOLS.index(p) for p in pools] + [-1] * (3 - len(pools)) for pools in (self.pool_q, self.pool_k)]
        return [self.block, self.hidden, *places[0], *places[1]]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(prefix + "settings")
        if found is not None and found.tolist() != self._settings():
            block, hidden, *places = found.tolist()
            pools = [tuple(POOLS[p] for p in part if p >= 0) for part in (places[:3], places[3:])]
            raise OptionError(
                f"the gate to load has block {block}, hidden {hidden}, pools {pools[0]} of queries and {pools[1]} of "
                f"keys; this one has block {self.block}, hidden {self.hidden}, pools {self.pool_q} and {self.pool_k}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def seer_gate(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    *,
    block: int = 64,
    pool_q: tuple[str, ...] = ("avg",),
    pool_k: tuple[str, ...] = ("max", "min", "avg"),
    rotary_base: float | None = 1e4,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Logits (B, H, n, n) of key blocks, -inf above the diagonal and at blocks of padding; float32, or float64.

    q (B, H, N, D), k (B, G, N, D) before rotation. weight_q (H, len(pool_q) D, E), weight_k (G, len(pool_k) D, E).
    The last block may be short. key_valid: bool (B, N), True = takes part. Raises ShapeError.
    """
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"the gate reads one sequence: q has {q.shape[2]} tokens, k has {k.shape[2]}")
    if key_valid is not None and (key_valid.dtype != torch.bool or key_valid.shape != (q.shape[0], q.shape[2])):
        raise ShapeError(
            f"key_valid is {key_valid.dtype} {tuple(key_valid.shape)}; it must be bool {(q.shape[0], q.shape[2])}"
        )
    kind = accumulator(q.dtype)
    queries, some = _pooled(q.to(kind), block, pool_q, key_valid)
    keys, _ = _pooled(k.to(kind), block, pool_k, key_valid)
    for name, pooled, weight in (("q", queries, weight_q), ("k", keys, weight_k)):
        if weight.dim() != 3 or weight.shape[:2] != (pooled.shape[1], pooled.shape[3]):
            raise ShapeError(
                f"weight_{name} is {tuple(weight.shape)}; it must be (heads, pooled width, hidden), and {name} has "
                f"{pooled.shape[1]} heads and a pooled width of {pooled.shape[3]}"
            )
    queries, keys = queries @ weight_q.to(kind), keys @ weight_k.to(kind)
    count = queries.shape[2]
    if rotary_base is not None:
        first = torch.arange(count, device=q.device) * block
        queries, keys = rope(queries, first, base=rotary_base), rope(keys, first, base=rotary_base)
    by_group = queries.unflatten(1, (keys.shape[1], -1)) * queries.shape[-1] ** -0.5
    logits = (by_group @ keys[:, :, None].transpose(-1, -2)).flatten(1, 2)
    seen = _causal_blocks(count, q.device) & some[:, None, None]
    return logits.masked_fill(~seen, float("-inf"))


@torch.no_grad()
def seer_select(
    logits: Tensor,
    *,
    block: int = 64,
    ratio: float | None = None,
    threshold: float | None = None,
    dense_last: int = 2,
) -> BlockSelection:
    """The blocks that logits (B, H, n, n) choose, and each row's own block.

    ratio: share of the causal blocks that is kept, in (0, 1]: the int((1 - sqrt(1 - ratio)) n) best of every row, at
    least 1, the own block one of them. threshold: keep blocks of at least this softmax weight, at least 0. One of the
    two. dense_last: so many last rows of blocks keep all. Raises OptionError.
    """
    check_choice(ratio, threshold, dense_last)
    count = logits.shape[-1]
    causal = _causal_blocks(count, logits.device)
    own = torch.eye(count, dtype=torch.bool, device=logits.device)
    visible = causal & ~torch.isneginf(logits)
    if ratio is not None:
        # 1e-9: 1 - sqrt(0.64) times 5 is 0.9999999999999998 in floats
        kept = max(int((1 - (1 - ratio) ** 0.5) * count + 1e-9), 1)
        best = logits.masked_fill(own, float("inf")).topk(kept, -1).indices
        chosen = torch.zeros_like(visible).scatter(-1, best, True)
    elif threshold is not None:
        chosen = Softmax()(logits.to(accumulator(logits.dtype)), visible, None) >= threshold
    last = torch.arange(count, device=logits.device)[:, None] >= count - dense_last
    chosen = ((chosen | last) & visible) | own
    slot = torch.arange(count, dtype=torch.int32, device=logits.device)
    indices = torch.where(chosen, slot, count).sort(-1).values
    indices = indices.masked_fill(indices == count, -1)[..., : int(chosen.sum(-1).max())]
    return BlockSelection(block, block, indices, force=Blocks(block), within=Causal())


def check_choice(ratio: float | None, threshold: float | None, dense_last: int) -> None:
    """Raise OptionError for settings by which no blocks can be chosen."""
    if (ratio is None) is (threshold is None):
        raise OptionError("blocks are chosen by ratio= or by threshold=: give one of them")
    if ratio is not None and not 0 < ratio <= 1:
        raise OptionError(f"ratio is a share of the blocks in (0, 1], not {ratio}")
    if threshold is not None and threshold < 0:
        raise OptionError(f"threshold is a weight, at least 0, not {threshold}")
    if dense_last < 0:
        raise OptionError(f"dense_last is a number of rows of blocks, at least 0, not {dense_last}")


def _pooled(x: Tensor, block: int, pools: tuple[str, ...], valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(pools joined (B, H, n, len(pools) D), which blocks hold a token that takes part (B|1, n))."""
    missing = -x.shape[2] % block
    if valid is None:
        valid = x.new_ones(1, x.shape[2], dtype=torch.bool)
    inside = F.pad(valid, (0, missing)).unflatten(1, (-1, block))
    x = F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block))
    some = inside.any(-1)
    parts = []
    for pool in pools:
        at = inside[:, None, :, :, None]
        if pool == "avg":
            part = x.masked_fill(~at, 0.0).sum(3) / inside.sum(-1).clamp(min=1)[:, None, :, None]
        elif pool == "max":
            part = x.masked_fill(~at, float("-inf")).amax(3)
        else:
            part = x.masked_fill(~at, float("inf")).amin(3)
        parts.append(part.masked_fill(~some[:, None, :, None], 0.0))
    return torch.cat(parts, -1), some


def _causal_blocks(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool, device=device).tril()


def _uniform(heads: int, inner: int, outer: int) -> Tensor:
    # xavier for every head on its own; torch's takes the heads for outputs
    bound = (6 / (inner + outer)) ** 0.5
    return torch.empty(heads, inner, outer).uniform_(-bound, bound)
