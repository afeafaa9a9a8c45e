"""States of layers that keep keys and values, or the last inputs of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
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
class LandmarkState(State):
    """Closed blocks behind their landmarks, and the open one; all keys before rotation.

    memory: keys and values of S closed blocks of `period` positions each, perhaps on another device. landmarks
    (B, G, S, D): the keys of their last positions. local: the open block, fewer than `period` positions.
    """

    memory: KVState
    landmarks: Tensor
    local: KVState
    seen: int = 0

    def append(self, k: Tensor, v: Tensor, period: int) -> Self:
        """A new state with more positions, at most up to the end of the open block; a full block is closed."""
        local = self.local.append(k, v, None)
        seen = self.seen + k.shape[2]
        if local.k.shape[2] < period:
            return replace(self, local=local, seen=seen)
        place = self.memory.k.device
        memory = self.memory.append(local.k.to(place), local.v.to(place), None)
        landmarks = torch.cat((self.landmarks, local.k[:, :, -1:]), 2)
        return replace(self, memory=memory, landmarks=landmarks, local=local.last(0), seen=seen)


@dataclass(frozen=True)
class PerHeadState(State):
    """Keys and values that each key head chose for itself: keys (B, G, S, D), values (B, G, S, E).

    positions: int32 (B, G, S), ascending, -1 = an empty slot. marks: (B, G, S), what the owner remembers of each key
    (a score, a cluster; -1 in an empty slot), or None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    marks: Tensor | None = None
    seen: int = 0

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, marks: Tensor | None = None) -> Self:
        """A new state with the next N positions in every head. valid: bool (B, N), False = padding, an empty slot."""
        places = torch.arange(self.seen, self.seen + k.shape[2], dtype=torch.int32, device=k.device)
        new = places.expand(k.shape[0], -1) if valid is None else places.masked_fill(~valid, -1)
        positions = torch.cat((self.positions, new[:, None].expand(*k.shape[:2], -1)), 2)
        keys, values = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        if self.marks is not None and marks is not None:
            marks = torch.cat((self.marks, marks), 2)
        return replace(
            self, keys=keys, values=values, positions=positions, marks=marks, seen=self.seen + k.shape[2]
        )  # fmt: skip

    def keep(self, index: Tensor) -> Self:
        """Only these slots: int64 (B, G, S'), -1 = an empty slot."""
        place = index.clamp(min=0)
        return replace(
            self,
            keys=_slots(self.keys, place),
            values=_slots(self.values, place),
            positions=self.positions.gather(2, place).masked_fill(index < 0, -1),
            marks=None if self.marks is None else self.marks.gather(2, place).masked_fill(index < 0, -1),
        )


@dataclass(frozen=True)
class ShardState(State):
    """Keys and values of which every key head holds another number: one (B, S, D), (B, S, E) for each, oldest first."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    seen: int = 0

    def append(self, k: Tensor, v: Tensor) -> Self:
        """A new state with the next N positions, k (B, G, N, D), v (B, G, N, E), in every head."""
        keys, values = (
            tuple(torch.cat((old, x), 1) for old, x in zip(held, new.unbind(1), strict=True))
            for held, new in ((self.keys, k), (self.values, v))
        )
        return replace(self, keys=keys, values=values, seen=self.seen + k.shape[2])

    def keep(self, masks: Sequence[Tensor]) -> Self:
        """Only the positions where the mask of the head, bool (S,), is True."""
        keys, values = (
            tuple(x[:, mask] for x, mask in zip(held, masks, strict=True)) for held in (self.keys, self.values)
        )
        return replace(self, keys=keys, values=values)


@dataclass(frozen=True)
class CoreState(State):
    """One key and value for each closed group of positions, and the positions since that are still met one by one.

    core_k (B, H, P, D), core_v (B, H, P, E). k (B, G, R, D), v (B, G, R, E): the positions seen - R … seen - 1, from
    the start of a group. q (B, H, R, D): their queries, where a group is closed with all of them, or None.
    """

    core_k: Tensor
    core_v: Tensor
    k: Tensor
    v: Tensor
    q: Tensor | None = None
    seen: int = 0


@dataclass(frozen=True)
class ConvState(State):
    """The last inputs of a causal convolution, oldest first: tail (B, kernel - 1, C); zeros at the start."""

    tail: Tensor
    seen: int = 0


def _slots(table: Tensor, place: Tensor) -> Tensor:
    return table.gather(2, place[..., None].expand(*place.shape, table.shape[3]))


def _ones(valid: Tensor | None, k: Tensor) -> Tensor:
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if valid is None else valid


def _may_write() -> bool:
    # writing in place is for inference: tracing needs values, and so does autograd, which may have kept the older views
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _is_frozen(buffer: Tensor) -> bool:
    # torch refuses to write into a tensor of inference mode outside of it
    return buffer.is_inference() and not torch.is_inference_mode_enabled()
