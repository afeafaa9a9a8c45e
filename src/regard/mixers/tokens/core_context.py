"""Core context attention as a layer.

Decoding keeps one core for each closed group and fewer than window + group tokens. A core is made when its group
closes: the one query that it needs is that of the token which closes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract.card import MixerCard
from regard.contract.errors import Unsupported
from regard.layers.attention import AnyPattern, Attention, check_tokens
from regard.layers.caches import CoreState
from regard.ops.core_context import attend_cores, check_sizes, core_context_attention, core_count, core_pool

CARD = MixerCard(
    slug="core_context",
    title="Core context aware attention layer",
    part_of="core_context",
    builds_on=("core_context",),
    exports=("CoreContextAttention",),
    example="b=2 n=10 c=16 h=4",
    options={"group": 2, "window": 4},
    attends=("causal_self",),
    decode=True,
    time="n (n / group + window) c",
    memory="n c",
)


class CoreContextAttention(Attention):
    """Causal attention to cores of far groups and to near tokens (section 3).

    group, window: tokens, as of `core_context_attention`. The other options are those of the attention layer; cores
    are pooled from rotated keys. Raises OptionError, Unsupported.
    """

    crosses = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        group: int = 16,
        window: int = 1024,
        kv_heads: int | None = None,
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
        check_sizes(group, window)
        self.group, self.window = group, window

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally. Raises ShapeError; Unsupported for a context, padding, reset, is_causal=False."""
        _refuse(padding, reset)
        return super().forward(x, context, is_causal=is_causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return core_context_attention(q, k, v, group=self.group, window=self.window, is_causal=pattern.causal)

    def init_state(  # type: ignore[override]
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> CoreState:
        """The state before the first token."""
        near = super().init_state(batch, dtype=dtype, device=device)
        none = near.k.new_empty(batch, self.heads, 0, self.head_dim)
        return CoreState(none, none, near.k, near.v)

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: CoreState, *, padding: Tensor | None = None
    ) -> tuple[Tensor, CoreState]:
        """N >= 1 tokens after the state. Raises Unsupported for padding: groups are counted from the first token."""
        _refuse(padding, None)
        check_tokens(type(self).__name__, self.dim, x, None, None, None, True)
        q, k, v = self._project(x, x)
        q, k = self._rotate(q, k, state.seen)
        first, seen = state.seen - state.k.shape[2], state.seen + x.shape[1]
        k, v = torch.cat((state.k, k), 2), torch.cat((state.v, v), 2)
        cores = self._close(q, k, v, state, first)
        out = attend_cores(q, k, v, cores, group=self.group, window=self.window, first=first)
        cut = self._first_near(seen) - first
        # copies: views would hold on to the tokens that are left behind
        k, v = k[:, :, cut:].clone(), v[:, :, cut:].clone()
        return self._merge_heads(out), CoreState(*cores, k, v, None, seen)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens, in the dtype of the weights."""
        cores, near = length // self.group, length - self._first_near(length)
        vectors = 2 * (self.heads * cores + self.kv_heads * near)
        return batch * vectors * self.head_dim * self.to_k.weight.element_size()

    def _close(self, q: Tensor, k: Tensor, v: Tensor, state: CoreState, first: int) -> tuple[Tensor, Tensor]:
        # from the start of the group that was open; queries of its earlier tokens are not read
        begin = state.core_k.shape[2] * self.group
        inside = state.seen - begin
        if inside + q.shape[2] < self.group:
            return state.core_k, state.core_v
        padded = torch.cat((q.new_zeros(*q.shape[:2], inside, q.shape[3]), q), 2)
        core_k, core_v = core_pool(padded, k[:, :, begin - first :], v[:, :, begin - first :], self.group)
        return torch.cat((state.core_k, core_k), 2), torch.cat((state.core_v, core_v), 2)

    def _first_near(self, seen: int) -> int:
        """The first position that a token at position `seen` meets one by one."""
        return core_count(seen, self.group, self.window) * self.group


def _refuse(padding: Tensor | None, reset: Tensor | None) -> None:
    if padding is not None:
        raise Unsupported("core_context takes no padding: groups are counted from the first token; softmax does")
    if reset is not None:
        raise Unsupported("core_context takes no document starts; softmax does")
