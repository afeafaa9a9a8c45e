"""Sparsely-sharded attention: near tokens in every head, far ones in blocks that the heads share out among them.

    query block P, key block R, key head m:   P - R < local   or   (R + m step + offset) % vstride == 0

A key outside the near blocks and the shard of its head is never read again, so the cache of a head forgets it.
Departs from the paper: none in what is seen; step="cover" (1) is the default, because the released step leaves blocks
that no head sees wherever there are fewer key heads than vstride. Positions count from the first token of the batch
row, so there is no left padding.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from regard.contract.card import MixerCard
from regard.contract.errors import Unsupported
from regard.engines.block_sparse import block_sparse
from regard.engines.dense import dense
from regard.layers.attention import AnyPattern, Attention, check_tokens
from regard.layers.caches import ShardState
from regard.patterns import StridedBlocks

CARD = MixerCard(
    slug="s2_attention",
    title="Sparsely-sharded attention (S2, DKernel)",
    paper="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    exports=("ShardedAttention",),
    example="b=2 n=40 c=16 h=4",
    options={"kv_heads": 2, "block": 16, "local": 1, "vstride": 2},
    attends=("causal_self",),
    decode=True,
    time="n^2 c / vstride",
    memory="n c",
)


class ShardedAttention(Attention):
    """Causal attention in which each key head keeps the near blocks and every vstride-th block (section 3).

    block: positions, a power of two from 16 on. local: near blocks, the own one among them. vstride: every how many
    blocks a head keeps one, another phase in every head. dense_heads: so many last key heads see everything. step:
    blocks from one head's phase to the next: "cover" (1), "official" (max(1, vstride // heads)) or a number. offset: of
    all phases. homo: one phase for all heads. Warns if the heads together do not see every block: then other layers
    must be dense. The other options are those of the attention layer. Raises OptionError.
    """

    crosses = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        block: int = 64,
        local: int = 16,
        vstride: int = 8,
        dense_heads: int = 0,
        step: int | Literal["cover", "official"] = "cover",
        offset: int = 0,
        homo: bool = False,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rotary: bool = True,
        rotary_base: float = 1e4,
    ):
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm, rotary=rotary,
            rotary_base=rotary_base,
        )  # fmt: skip
        self.pattern = StridedBlocks(
            block, local, vstride, dense_heads, step, offset, homo, heads=self.heads, kv_heads=self.kv_heads
        )
        if not self.pattern.covers():
            warnings.warn(
                f"the {self.kv_heads} key heads of {self.pattern} do not see every block between them: what lies in the "
                "others is lost to this layer. Let other layers be dense, or use step='cover' with at least vstride "
                "key heads",
                stacklevel=2,
            )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally.

        Raises Unsupported for a context, for is_causal=False, and for padding= and reset=, which would move the blocks
        (padding at the end of a row needs no mask: no earlier token sees it). Raises ShapeError.
        """
        if context is None and not is_causal:
            raise Unsupported("s2_attention is causal only: pass is_causal=True; softmax works both ways")
        for name, mask in (("padding", padding), ("reset", reset)):
            if mask is not None:
                raise Unsupported(f"s2_attention {_COUNTED} and takes no {name}; sliding_window does")
        return super().forward(x, context, is_causal=is_causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        # the pattern that is given is Causal(), which this one implies
        return block_sparse(q, k, v, self.pattern, q_offset=q_offset).out

    def init_state(  # type: ignore[override]
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> ShardState:
        """The state before the first token."""
        weight = self.to_k.weight
        empty = torch.empty(batch, 0, self.head_dim, dtype=dtype or weight.dtype, device=device or weight.device)
        return ShardState((empty,) * self.kv_heads, (empty,) * self.kv_heads)

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: ShardState, *, padding: Tensor | None = None
    ) -> tuple[Tensor, ShardState]:
        """N >= 1 tokens after the state. Raises Unsupported for padding=."""
        if padding is not None:
            raise Unsupported(f"s2_attention {_COUNTED} and takes no padding; sliding_window does")
        check_tokens(type(self).__name__, self.dim, x, None, None, None, True)
        q, k, v = self._project(x, x)
        past, n = state.seen, x.shape[1]
        q, k = self._rotate(q, k, past)
        held = self._held(past)
        whole = state.append(k, v)
        if n == 1:
            # what is held is what the next query sees
            share = self.heads // self.kv_heads
            out = torch.cat(
                [
                    dense(q[:, g * share : (g + 1) * share], whole.keys[g][:, None], whole.values[g][:, None]).out
                    for g in range(self.kv_heads)
                ],
                1,
            )
        else:
            keys, values = _spread(state.keys, held, k), _spread(state.values, held, v)
            out = self.attend(q, keys, values, pattern=self.pattern, q_offset=past)
        if (past + n) // self.pattern.block > past // self.pattern.block:
            had = torch.cat((held, held.new_ones(self.kv_heads, n)), 1)
            whole = whole.keep([still[old] for still, old in zip(self._held(past + n), had, strict=True)])
        return self._merge_heads(out), whole

    def step(self, x: Tensor, state: ShardState) -> tuple[Tensor, ShardState]:  # type: ignore[override]
        """One token (B, 1, C)."""
        return self.prefill(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens: the near blocks, and of the others each head's own."""
        return 2 * batch * int(self._held(length).sum()) * self.head_dim * self.to_k.weight.element_size()

    def _held(self, seen: int) -> Tensor:
        """The tokens before position `seen` that each key head still needs: bool (G, seen)."""
        device = self.to_k.weight.device
        heads = torch.arange(0, self.heads, self.heads // self.kv_heads, device=device)[:, None]
        row, keys = torch.full((1, 1), seen, device=device), torch.arange(seen, device=device)[None]
        return self.pattern.allowed(heads, heads, row, keys, {}).expand(self.kv_heads, seen)


_COUNTED = "counts its blocks from the first token of a row"


def _spread(old: tuple[Tensor, ...], held: Tensor, new: Tensor) -> Tensor:
    """Kept rows at their own positions, zeros where a head has forgotten, then the new ones: (B, G, M, D)."""
    past = held.shape[1]
    if not past:
        return new
    empty = new.new_zeros(new.shape[0], past, new.shape[3])
    rows = [empty.index_copy(1, where.nonzero()[:, 0], kept) for where, kept in zip(held, old, strict=True)]
    return torch.cat((torch.stack(rows, 1), new), 2)
