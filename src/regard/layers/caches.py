"""States of layers that keep keys and values, or the last inputs of a convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from regard.primitives.state import State


@dataclass(eq=False)
class _Buffer:
    """Room behind the views of the newest state of a chain; `filled` positions are taken."""

    k: Tensor
    v: Tensor
    filled: int


@dataclass(frozen=True)
class KVState(State):
    """Keys and values of the last positions, oldest first. k (B, G, M, D), v (B, G, M, E).

    valid: bool (B, M), False = padding, or None. The positions are seen - M … seen - 1.
    """

    k: Tensor
    v: Tensor
    valid: Tensor | None = None
    seen: int = 0
    _buffer: _Buffer | None = None

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, *, keep: int | None = None) -> Self:
        """A new state with N more positions, of which the last `keep` stay (None: all). This state stays as it is."""
        if valid is not None or self.valid is not None:
            valid = torch.cat((_ones(self.valid, self.k), _ones(valid, k)), 1)
        seen = self.seen + k.shape[2]
        if keep is None and _may_write():
            return replace(self._write(k, v), valid=valid, seen=seen)
        keys, values = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        state = replace(self, k=keys, v=values, valid=valid, seen=seen, _buffer=None)
        return state if keep is None else state.last(keep)

    def last(self, keep: int) -> Self:
        """Only the last `keep` positions."""
        cut = max(self.k.shape[2] - keep, 0)
        valid = None if self.valid is None else self.valid[:, cut:]
        return replace(self, k=self.k[:, :, cut:], v=self.v[:, :, cut:], valid=valid, _buffer=None)

    def _write(self, k: Tensor, v: Tensor) -> Self:
        old, new = self.k.shape[2], self.k.shape[2] + k.shape[2]
        buffer = self._buffer
        # only the newest state of a chain may write behind its end; an older one gets its own copy
        if buffer is None or buffer.filled != old or buffer.k.shape[2] < new or _is_frozen(buffer.k):
            room = max(2 * new, 64)
            wide = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (self.k, self.v)]
            buffer = _Buffer(wide[0], wide[1], old)
            buffer.k[:, :, :old], buffer.v[:, :, :old] = self.k, self.v
        buffer.k[:, :, old:new], buffer.v[:, :, old:new] = k, v
        buffer.filled = new
        return replace(self, k=buffer.k[:, :, :new], v=buffer.v[:, :, :new], _buffer=buffer)

    def _map(self, change: Any) -> Self:
        return super(KVState, replace(self, _buffer=None))._map(change)


@dataclass(frozen=True)
class ConvState(State):
    """The last inputs of a causal convolution, oldest first: tail (B, kernel - 1, C); zeros at the start."""

    tail: Tensor
    seen: int = 0


def _ones(valid: Tensor | None, k: Tensor) -> Tensor:
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if valid is None else valid


def _may_write() -> bool:
    # writing in place is for inference: tracing needs values, and so does autograd, which may have kept the older views
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _is_frozen(buffer: Tensor) -> bool:
    # torch refuses to write into a tensor of inference mode outside of it
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
