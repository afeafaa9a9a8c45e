"""What a mixer keeps between tokens: frozen values with the batch as first axis.

A call returns a new state and leaves the old one usable, so beams gather states and autograd flows through them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class State:
    """Base of all states. Fields are tensors (batch first), None, ints, states, or tuples of states.

    seen: positions consumed so far; it offsets positions and patterns.
    """

    def select(self, index: Tensor) -> Self:
        """Keep these batch rows, in this order; rows may repeat (beam search). index: int64 (rows,)."""
        return self._map(lambda t: t.index_select(0, index))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast every floating tensor, as torch's `Tensor.to` does."""
        return self._map(lambda t: t.to(*args, **kwargs) if t.is_floating_point() else t.to(t.device))

    def detach(self) -> Self:
        """The same state, cut from the graph."""
        return self._map(Tensor.detach)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(_bytes(getattr(self, f.name)) for f in fields(self))

    def _map(self, change: Any) -> Self:
        return replace(self, **{f.name: _map_value(getattr(self, f.name), change) for f in fields(self)})


@dataclass(frozen=True)
class StackState(State):
    """A model's state: one per layer, and `seen`, the tokens consumed."""

    layers: tuple[Any, ...]
    seen: int = 0


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, State):
        return value.size_bytes
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0


def _map_value(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, State):
        return value._map(change)
    if isinstance(value, tuple):
        return tuple(_map_value(v, change) for v in value)
    return value
