"""Titans: neural long-term memory beside a short attention, in three ways, or alone.

    MAC   h = M(x) read at the memory before the segment;  y = rms(attention([P; h; x])) in it;  o = y (x) M(y)
    MAG   o = window([P; x]) (x) M([P; x])        MAL   o = window(M([P; x]))        LMM   o = M(x)
    y (x) m = rms(y) g1 sigmoid(rms(m) g2),       P learned tokens

Departs from the paper: it leaves the gate's sigmoid, positions and sizes open (here rotary, and what is usual); row i
of a MAC segment sees h up to i only and M(y) is read token by token, since h_j and the memory after the segment know
tokens behind i; y has a norm before it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, Unsupported
from regard.layers.attention import AnyPattern, OpAttention, check_tokens
from regard.layers.caches import ConvState, KVState
from regard.mixers.tokens.titans import NeuralMemory, NeuralMemoryState, refuse_masks
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.ops.softmax import softmax_attention
from regard.patterns import Causal, Pattern, Sinks, SlidingWindow
from regard.primitives.positions import rope
from regard.primitives.state import State

CARD = ModelCard(
    slug="titans",
    title="Titans: memory as context, gate or layer",
    part_of="titans",
    builds_on=("titans", "softmax"),
    exports=("Titans", "TitansSettings", "MemoryAsContext", "MemoryAsGate", "MemoryAsLayer"),
    example="b=2 n=12 v=11",
    options={"vocab": 11, "dim": 16, "heads": 2, "hidden": 24, "segment": 5, "window": 4, "chunk_size": 3},
    task="token ids to logits",
    decode=True,
)

VARIANTS = ("mac", "mag", "mal", "lmm")


@dataclass(frozen=True, kw_only=True)
class TitansSettings:
    """What a Titans model is made of.

    vocab: tokens. dim: model width. depth: blocks of [norm, layer, norm, feed-forward]. heads: of the attention.
    hidden: inner width of the feed-forward. variant: "mac", "mag", "mal" or "lmm". segment: tokens that attend to one
    another in a MAC. window: keys of a token in a MAG or MAL, its own among them. persistent: learned tokens P, at
    least 0. memory_heads, memory_depth, expansion, chunk_size, theta_max, max_grad_norm: see `NeuralMemory`.
    """

    vocab: int
    dim: int = 128
    depth: int = 2
    heads: int = 4
    hidden: int = 344
    variant: Literal["mac", "mag", "mal", "lmm"] = "mac"
    segment: int = 128
    window: int = 128
    persistent: int = 4
    memory_heads: int = 2
    memory_depth: int = 2
    expansion: int = 4
    chunk_size: int = 16
    theta_max: float = 0.1
    max_grad_norm: float | None = None

    @property
    def memory(self) -> dict[str, Any]:
        """Options of the memories."""
        return {
            "depth": self.memory_depth,
            "expansion": self.expansion,
            "chunk_size": self.chunk_size,
            "theta_max": self.theta_max,
            "max_grad_norm": self.max_grad_norm,
        }


# not published: sizes for two cores
SIZES = {f"titans_{v}_tiny": TitansSettings(vocab=256, variant=v) for v in ("mac", "mag", "mal", "lmm")}  # type: ignore[arg-type]


class Titans(SequenceModel):
    """Token ids (B, N) to logits (B, N, vocab); decodes in a state that stops growing. Raises OptionError."""

    def __init__(self, settings: TitansSettings):
        if settings.variant not in VARIANTS:
            raise OptionError(f"the variant is {settings.variant!r}; it is one of {', '.join(VARIANTS)}")
        super().__init__(
            SequenceSettings(
                vocab=settings.vocab, dim=settings.dim, depth=settings.depth, heads=settings.memory_heads,
                hidden=settings.hidden, mixer="titans", options={"titans": settings.memory},
            )
        )  # fmt: skip
        self.titans = settings
        for block in self.blocks:
            block.mixer = _layer(settings, block.mixer)  # type: ignore[arg-type]
        self._initialise()


def _layer(s: TitansSettings, memory: NeuralMemory) -> nn.Module:
    if s.variant == "mac":
        return MemoryAsContext(memory, s.heads, segment=s.segment, persistent=s.persistent)
    if s.variant == "mag":
        return MemoryAsGate(memory, s.heads, window=s.window, persistent=s.persistent)
    if s.variant == "mal":
        return MemoryAsLayer(memory, s.heads, window=s.window, persistent=s.persistent)
    return memory


class _Layer(nn.Module):
    """What the three have in common: a memory, persistent tokens, and one way to run, from any state."""

    def __init__(self, memory: NeuralMemory, persistent: int):
        super().__init__()
        if persistent < 0:
            raise OptionError(f"there are at least 0 persistent tokens, not {persistent}")
        self.memory = memory
        self.persistent = nn.Parameter(torch.randn(persistent, memory.dim) * 0.02) if persistent else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally. Raises Unsupported for a context, padding, reset and is_causal=False."""
        if context is not None or not is_causal:
            raise Unsupported("titans is causal and reads no context: pass is_causal=True; softmax does both")
        refuse_masks(padding, reset)
        return self.prefill(x, self.init_state(x.shape[0], dtype=x.dtype, device=x.device))[0]

    def init_state(self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
        """The state before the first token."""
        raise NotImplementedError

    def prefill(self, x: Tensor, state: Any, *, padding: Tensor | None = None) -> tuple[Tensor, Any]:
        """N >= 1 tokens after the state. Raises Unsupported for padding."""
        refuse_masks(padding, None)
        check_tokens(type(self).__name__, self.memory.dim, x, None, None, None, True)
        return self._run(x, state)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token (B, 1, C)."""
        return self.prefill(x, state)

    def _run(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _prefix(self, batch: int, dtype: torch.dtype | None, device: torch.device | None) -> Tensor | None:
        if self.persistent is None:
            return None
        return self.persistent.to(dtype=dtype, device=device).expand(batch, -1, -1)


@dataclass(frozen=True)
class ContextState(State):
    """Of a MAC: its memory, the weights that the open segment reads, and the keys and values in it, h and x in turns.

    conv: of the queries of h.
    """

    memory: NeuralMemoryState
    read: tuple[Tensor, ...]
    conv: ConvState
    segment: KVState
    seen: int = 0


class MemoryAsContext(_Layer):
    """MAC (section 4.1): tokens attend to their segment, to what the memory knew before it, and to persistent tokens.

    memory: reads and learns. heads: of the attention. segment: tokens, at least 1. persistent: tokens, at least 0.
    Raises OptionError.
    """

    def __init__(self, memory: NeuralMemory, heads: int, *, segment: int = 128, persistent: int = 4):
        super().__init__(memory, persistent)
        if segment < 1:
            raise OptionError(f"a segment has at least 1 token, not {segment}")
        self.segment = segment
        self.attention = OpAttention(memory.dim, heads, op=softmax_attention)
        self.norm = nn.RMSNorm(memory.dim, eps=1e-6)
        self.gate = Gate(memory.dim)

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> ContextState:
        """The state before the first token."""
        memory = self.memory.init_state(batch, dtype=dtype, device=device)
        keys = self.attention.init_state(batch, dtype=dtype, device=device)
        return ContextState(memory, memory.memory.weights, memory.convs[0], keys)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens: it is never larger than with a whole segment."""
        memory = self.memory.init_state(1)
        fixed = memory.convs[0].size_bytes + sum(w.nbytes for w in memory.memory.weights)
        keys = self.attention.state_bytes(batch, 2 * (length % self.segment))
        return self.memory.state_bytes(batch, length) + batch * fixed + keys

    def _run(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        n = x.shape[1]
        bounds = [0, *range(self.segment - state.seen % self.segment, n, self.segment), n]
        outs = []
        for piece in x.split([stop - start for start, stop in pairwise(bounds)], 1):
            recalled, conv = self.memory.recall(piece, state.read, state.conv)
            y, segment = self._attend(piece, recalled, state)
            # a memory reads normed tokens everywhere else
            y = self.norm(y)
            known, memory = self.memory.prefill(y, state.memory)
            outs.append(self.gate(y, known))
            seen = state.seen + piece.shape[1]
            state = replace(state, memory=memory, conv=conv, segment=segment, seen=seen)
            if seen % self.segment == 0:
                empty = segment.k.new_empty(*segment.k.shape[:2], 0, segment.k.shape[3])
                state = replace(state, read=memory.memory.weights, segment=KVState(empty, empty))
        return torch.cat(outs, 1), state

    def _attend(self, x: Tensor, recalled: Tensor, state: ContextState) -> tuple[Tensor, KVState]:
        """Tokens of one segment; in [P; h; x] h begins at position `persistent`, x a segment behind it."""
        a, past, n = self.attention, state.seen % self.segment, x.shape[1]
        prefix = self._prefix(x.shape[0], x.dtype, x.device)
        count = 0 if prefix is None else prefix.shape[1]
        at = torch.arange(count + past, count + past + n, device=x.device)
        q, *own = a._project(x, x)
        _, *read = a._project(recalled, recalled)
        q, own[0] = (rope(t, at + self.segment, base=a.rotary_base) for t in (q, own[0]))
        read[0] = rope(read[0], at, base=a.rotary_base)
        pairs = [torch.stack(both, 3).flatten(2, 3) for both in zip(read, own, strict=True)]
        segment = state.segment.append(pairs[0], pairs[1], None)
        k, v = segment.k, segment.v
        if prefix is not None:
            _, k_prefix, v_prefix = a._project(prefix, prefix)
            k_prefix = rope(k_prefix, torch.arange(count, device=x.device), base=a.rotary_base)
            k, v = torch.cat((k_prefix, k), 2), torch.cat((v_prefix, v), 2)
        token = torch.arange(2 * (past + n), device=x.device) // 2
        mask = token <= torch.arange(past, past + n, device=x.device)[:, None]
        mask = torch.nn.functional.pad(mask, (count, 0), value=True)
        return a._merge_heads(softmax_attention(q, k, v, mask=mask[None, None])), segment


@dataclass(frozen=True)
class BesideState(State):
    """Of a MAG or MAL: its memory, and the keys and values of the persistent tokens and of the window."""

    memory: NeuralMemoryState
    window: KVState
    seen: int = 0


class _Beside(_Layer):
    """A memory and a window over [P; x]."""

    def __init__(self, memory: NeuralMemory, heads: int, *, window: int, persistent: int, always: bool):
        super().__init__(memory, persistent)
        self.window = PrefixWindow(memory.dim, heads, window=window, prefix=persistent if always else 0)

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> BesideState:
        """The state before the first token, behind the persistent ones."""
        state = BesideState(
            self.memory.init_state(batch, dtype=dtype, device=device),
            self.window.init_state(batch, dtype=dtype, device=device),
        )
        prefix = self._prefix(batch, dtype, device)
        return state if prefix is None else replace(self._run(prefix, state)[1], seen=0)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens: it stops growing at the window."""
        before = 0 if self.persistent is None else self.persistent.shape[0]
        return self.memory.state_bytes(batch, length) + self.window.state_bytes(batch, before + length)


class MemoryAsGate(_Beside):
    """MAG (section 4.2): a window that always sees the persistent tokens, gated by the memory.

    memory: reads and learns [P; x]. heads: of the window. window: keys, at least 1. persistent: tokens, at least 0.
    Raises OptionError.
    """

    def __init__(self, memory: NeuralMemory, heads: int, *, window: int = 128, persistent: int = 4):
        super().__init__(memory, heads, window=window, persistent=persistent, always=True)
        self.gate = Gate(memory.dim)

    def _run(self, x: Tensor, state: BesideState) -> tuple[Tensor, BesideState]:
        y, window = self.window.prefill(x, state.window)
        known, memory = self.memory.prefill(x, state.memory)
        return self.gate(y, known), BesideState(memory, window, state.seen + x.shape[1])


class MemoryAsLayer(_Beside):
    """MAL (section 4.3): a window over what the memory answers to [P; x].

    memory: reads and learns. heads: of the window. window: keys, at least 1. persistent: tokens, at least 0.
    Raises OptionError.
    """

    def __init__(self, memory: NeuralMemory, heads: int, *, window: int = 128, persistent: int = 4):
        super().__init__(memory, heads, window=window, persistent=persistent, always=False)

    def _run(self, x: Tensor, state: BesideState) -> tuple[Tensor, BesideState]:
        known, memory = self.memory.prefill(x, state.memory)
        y, window = self.window.prefill(known, state.window)
        return y, BesideState(memory, window, state.seen + x.shape[1])


class PrefixWindow(OpAttention):
    """Causal softmax attention to the first `prefix` tokens and to `window` keys, the own one among them."""

    def __init__(self, dim: int, heads: int, *, window: int, prefix: int):
        super().__init__(dim, heads, op=softmax_attention)
        near = Causal() & SlidingWindow(window)
        self.pattern: Pattern = near | Sinks(prefix) if prefix else near
        self.width, self.prefix = window, prefix

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return softmax_attention(q, k, v, pattern=self.pattern, q_offset=q_offset)

    def prefill(self, x: Tensor, state: KVState, *, padding: Tensor | None = None) -> tuple[Tensor, KVState]:
        """N >= 1 tokens after the state; the cache keeps the prefix and what the next token sees of the window."""
        out, whole = super().prefill(x, state, padding=padding)
        cut = whole.k.shape[2] - (self.width - 1)
        if cut <= self.prefix:
            return out, whole
        k, v = (torch.cat((t[:, :, : self.prefix], t[:, :, cut:]), 2) for t in (whole.k, whole.v))
        return out, KVState(k, v, seen=whole.seen)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens, those of the prefix counted."""
        return super().state_bytes(batch, min(length, self.prefix + self.width - 1))


class Gate(nn.Module):
    """rms(y) g1 sigmoid(rms(m) g2): one branch gated by another, both (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.norm_gate = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.norm(y) * torch.sigmoid(self.norm_gate(m))
