"""The attention layer: projections, norms, rotary positions, cache. What meets what is left to one method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError, Unsupported, near
from regard.contract.split import token_positions
from regard.layers.caches import KVState
from regard.patterns import Bound, Causal, Documents, Full, KeyValid, Pattern, SlidingWindow
from regard.primitives.positions import rope

AnyPattern = Pattern | Bound


class Attention(nn.Module):
    """Multi-head attention over tokens: (B, N, C) -> (B, N, C). Subclasses write `attend`.

    dim: model width C. heads, kv_heads, head_dim: all free; kv_heads defaults to heads, head_dim to dim / heads.
    bias: biases in the projections. qk_norm: LayerNorm over the head width of q and k. rotary: rotate q and k.
    rotary_base: of the rotary angles. context_dim: width of `context`, C if None.
    reach: how many keys the cache keeps, None for all. Raises OptionError.
    """

    reach: int | None = None
    # whether it may read a context
    crosses = True
    # whether `modulate` reads the number of visible keys
    needs_counts = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rotary: bool = True,
        rotary_base: float = 1e4,
        context_dim: int | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise OptionError(f"{heads} query heads cannot share {kv_heads} key heads: it must be a multiple of them")
        if head_dim is None:
            if dim % heads:
                raise OptionError(f"a width of {dim} does not divide into {heads} heads: give head_dim=")
            head_dim = dim // heads
        if rotary and head_dim % 2:
            raise OptionError(f"rotary positions need an even head_dim, not {head_dim}")
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.rotary, self.rotary_base = rotary, rotary_base
        source = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.to_k = nn.Linear(source, kv_heads * head_dim, bias=bias)
        self.to_v = nn.Linear(source, kv_heads * head_dim, bias=bias)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=bias)
        self.norm_q = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        """q (B, H, N, D), k, v (B, G, M, D) -> (B, H, N, D). The one method of a subclass."""
        raise NotImplementedError

    def modulate(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A change of q, k, v before they are rotated; counts (B|1, 1, N): visible keys of each of these tokens."""
        return q, k, v

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C), or read from context (B, M, C').

        padding: bool (B, M), True = takes part. reset: bool (B, N), True where a document starts (self-attention).
        Raises ShapeError, OptionError; Unsupported for a context where there is no cross-attention.
        """
        check_tokens(type(self).__name__, self.dim, x, context, padding, reset, is_causal)
        if context is not None and not self.crosses:
            raise Unsupported(f"{self.extra_repr() or type(self).__name__} reads no context; softmax does")
        q, k, v = self._project(x, x if context is None else context)
        pattern: AnyPattern = Causal() if is_causal else Full()
        if padding is not None:
            pattern = pattern & KeyValid().bind(key_valid=padding)
        if reset is not None:
            pattern = pattern & Documents().bind(doc=reset.cumsum(-1))
        q, k, v = self.modulate(q, k, v, self._counts(pattern, q.shape[2], k.shape[2], 0, x.device))
        if context is None:
            q, k = self._rotate(q, k, 0)
        return self._merge_heads(self.attend(q, k, v, pattern=pattern, q_offset=0))

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> KVState:
        """The state before the first token."""
        weight = self.to_k.weight
        empty = torch.empty(
            batch, self.kv_heads, 0, self.head_dim, dtype=dtype or weight.dtype, device=device or weight.device
        )
        return KVState(empty, empty)

    def prefill(self, x: Tensor, state: KVState, *, padding: Tensor | None = None) -> tuple[Tensor, KVState]:
        """Causal attention of N >= 1 tokens to themselves and to the state. padding: bool (B, N), for left padding."""
        check_tokens(type(self).__name__, self.dim, x, None, padding, None, True)
        q, k, v = self._project(x, x)
        pattern: AnyPattern = Causal()
        past, n = state.k.shape[2], x.shape[1]
        if padding is not None or state.valid is not None:
            old = x.new_ones(x.shape[0], past, dtype=torch.bool) if state.valid is None else state.valid
            new = x.new_ones(x.shape[:2], dtype=torch.bool) if padding is None else padding
            pattern = pattern & KeyValid().bind(key_valid=torch.cat((old, new), 1))
        counts = self._counts(pattern, n, past + n, past, x.device)
        q, k, v = self.modulate(q, k, v, counts)
        q, k = self._rotate(q, k, state.seen)
        whole = state.append(k, v, padding)
        out = self.attend(q, whole.k, whole.v, pattern=pattern, q_offset=past)
        return self._merge_heads(out), whole if self.reach is None else whole.last(self.reach)

    def step(self, x: Tensor, state: KVState) -> tuple[Tensor, KVState]:
        """One token (B, 1, C)."""
        return self.prefill(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens without padding, in the dtype of the weights."""
        kept = length if self.reach is None else min(length, self.reach)
        return 2 * batch * self.kv_heads * kept * self.head_dim * self.to_k.weight.element_size()

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.norm_q(_heads(self.to_q(x), self.heads))
        k = self.norm_k(_heads(self.to_k(source), self.kv_heads))
        return q, k, _heads(self.to_v(source), self.kv_heads)

    def _rotate(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        if not self.rotary:
            return q, k
        positions = token_positions(start, q.shape[2], q.device)
        return rope(q, positions, base=self.rotary_base), rope(k, positions, base=self.rotary_base)

    def _counts(self, pattern: AnyPattern, n: int, m: int, q_offset: int, device: torch.device) -> Tensor | None:
        return pattern.row_counts(n, m, q_offset=q_offset, device=device) if self.needs_counts else None

    def _merge_heads(self, out: Tensor) -> Tensor:
        return self.to_out(out.transpose(1, 2).flatten(2))


class OpAttention(Attention):
    """The attention layer over an op that decodes from keys and values, given by its function.

    op: a function of q, k, v with a card. Further keywords are settings of the layer, or the op's own options.
    Raises OptionError for an option that neither has; Unsupported for an op without `decode="kv"`.
    """

    def __init__(self, dim: int, heads: int, *, op: Any, **options: Any):
        card = op.card
        if card.decode != "kv":
            raise Unsupported(
                f"{card.slug} does not decode from keys and values, so the attention layer cannot wrap it"
            )
        layer = {**card.mixer, **{o: options.pop(o) for o in _parameters(Attention.__init__) if o in options}}
        own = [o for o in _parameters(op) if o not in _LAYER_GIVES]
        for option in options:
            if option not in own:
                known = [*own, *_parameters(Attention.__init__)]
                raise OptionError(
                    f"{card.slug} has no option {option!r}{near(option, known)}; it has {', '.join(known)}"
                )
        missing = [o for o in card.options if o not in options]
        if missing:
            raise OptionError(f"{card.slug} needs {', '.join(f'{o}=' for o in missing)}")
        super().__init__(dim, heads, **layer)
        self.op, self.options = op, options
        self.crosses = "cross" in card.attends
        self.reach = options.get(card.reach)
        if self.reach is not None:
            # refuses a window below 1 here, not at the first call
            SlidingWindow(self.reach)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return self.op(q, k, v, pattern=pattern, q_offset=q_offset, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([self.op.card.slug, *(f"{name}={value!r}" for name, value in self.options.items())])


def check_tokens(
    system: str,
    dim: int,
    x: Tensor,
    context: Tensor | None,
    padding: Tensor | None,
    reset: Tensor | None,
    is_causal: bool,
) -> None:
    """Raise ShapeError or OptionError if tokens, padding or document starts do not fit."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ShapeError(f"{system}: tokens are {tuple(x.shape)}; they must be (B, N, C) with C = {dim}")
    if context is not None:
        if context.dim() != 3 or context.shape[0] != x.shape[0]:
            raise ShapeError(
                f"{system}: context is {tuple(context.shape)}; it must be (B, M, C') with B = {x.shape[0]}"
            )
        if reset is not None:
            raise OptionError(f"{system}: reset separates documents of the tokens themselves, not of a context")
        if is_causal:
            raise OptionError(f"{system}: is_causal is about the tokens themselves; with a context there is no order")
    source = x if context is None else context
    for name, mask in (("padding", padding), ("reset", reset)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != source.shape[:2]):
            raise ShapeError(
                f"{system}: {name} is {mask.dtype} {tuple(mask.shape)}; it must be bool {tuple(source.shape[:2])}"
            )


# what the layer hands to an op itself
_LAYER_GIVES = ("self", "q", "k", "v", "pattern", "mask", "bias", "is_causal", "q_offset", "dropout_p", "engine")


def _parameters(function: Callable[..., Any]) -> list[str]:
    import inspect

    return [name for name in inspect.signature(function).parameters if name not in ("self", "dim", "heads")]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
