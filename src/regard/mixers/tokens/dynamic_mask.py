"""The layer of dynamic mask attention: the score of a key is read from its values, those of all key heads joined.

    delta_j = exp(A softplus(W v_j)),     A = 0 at the start: no key is preferred

Departs from the paper: none; queries and keys have an RMS norm a head before the rotation, as in its Doge models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, Unsupported
from regard.layers.attention import AnyPattern, Attention, check_tokens
from regard.layers.caches import PerHeadState
from regard.ops.dynamic_mask import dynamic_mask_attention, dynamic_mask_keys, dynamic_mask_score
from regard.patterns import Causal, KeyValid

CARD = MixerCard(
    slug="dynamic_mask",
    part_of="dynamic_mask",
    title="Dynamic mask attention layer",
    builds_on=("dynamic_mask",),
    exports=("DynamicMaskAttention",),
    example="b=2 n=13 c=16 h=4",
    options={"window": 4, "kv_heads": 2},
    attends=("causal_self",),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
    time="n w c",
    memory="n w",
)


class DynamicMaskAttention(Attention):
    """Causal attention of every query to the `window` earlier keys of the largest learned score (section 3).

    window: keys a query, at least 1; the cache of each key head holds so many. exp: False for the later released code,
    delta = A softplus(W v). qk_norm: an RMS norm of each head's q and k. The other options are those of the attention
    layer. Raises OptionError.
    """

    crosses = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        window: int = 2048,
        exp: bool = True,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = True,
        rotary: bool = True,
        rotary_base: float = 1e4,
    ):
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, rotary=rotary, rotary_base=rotary_base
        )
        if window < 1:
            raise OptionError(f"dynamic mask attention needs a window of at least 1 key, not {window}")
        self.window, self.exp = window, exp
        if qk_norm:
            self.norm_q = nn.RMSNorm(self.head_dim, eps=1e-6)  # type: ignore[assignment]
            self.norm_k = nn.RMSNorm(self.head_dim, eps=1e-6)  # type: ignore[assignment]
        self.to_score = nn.Linear(self.kv_heads * self.head_dim, self.kv_heads, bias=False)
        self.a = nn.Parameter(torch.zeros(self.kv_heads))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally. padding: bool (B, N), True = takes part. reset: bool (B, N), document starts.

        Raises Unsupported for a context and for is_causal=False; ShapeError.
        """
        if context is None and not is_causal:
            raise Unsupported("the dynamic_mask layer is causal only: pass is_causal=True; softmax works both ways")
        return super().forward(x, context, padding=padding, reset=reset, is_causal=is_causal)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return dynamic_mask_attention(
            q, k, v, self._score(v), window=self.window, pattern=pattern, q_offset=q_offset
        )  # fmt: skip

    def init_state(  # type: ignore[override]
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> PerHeadState:
        """The state before the first token."""
        weight = self.to_k.weight
        empty = torch.empty(
            batch, self.kv_heads, 0, self.head_dim, dtype=dtype or weight.dtype, device=device or weight.device
        )
        positions = torch.empty(empty.shape[:3], dtype=torch.int32, device=empty.device)
        return PerHeadState(empty, empty, positions, empty[..., 0])

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: PerHeadState, *, padding: Tensor | None = None
    ) -> tuple[Tensor, PerHeadState]:
        """N >= 1 tokens after the state. padding: bool (B, N), for left padding."""
        check_tokens(type(self).__name__, self.dim, x, None, padding, None, True)
        q, k, v = self._project(x, x)
        q, k = self._rotate(q, k, state.seen)
        whole = state.append(k, v, padding, self._score(v))
        assert whole.marks is not None
        valid = None
        if state.seen or padding is not None:
            # empty slots are padded tokens, and padded tokens are empty in all heads
            valid = whole.positions[:, 0] >= 0
        pattern: AnyPattern = Causal() if valid is None else Causal() & KeyValid().bind(key_valid=valid)
        out = dynamic_mask_attention(
            q, whole.keys, whole.values, whole.marks, window=self.window, pattern=pattern,
            q_offset=state.keys.shape[2],
        )  # fmt: skip
        if whole.keys.shape[2] > self.window:
            whole = whole.keep(dynamic_mask_keys(whole.marks, self.window, key_valid=valid))
        return self._merge_heads(out), whole

    def step(self, x: Tensor, state: PerHeadState) -> tuple[Tensor, PerHeadState]:  # type: ignore[override]
        """One token (B, 1, C)."""
        return self.prefill(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens: it stops growing at the window."""
        size = self.to_k.weight.element_size()
        return batch * self.kv_heads * min(length, self.window) * ((2 * self.head_dim + 1) * size + 4)

    def _score(self, v: Tensor) -> Tensor:
        return dynamic_mask_score(v, self.to_score.weight, self.a, exp=self.exp)
