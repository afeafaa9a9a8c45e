"""The sequence that is split over processes, if there is one: who runs the engines, and where the tokens stand.

The stack below is module state for the reason that the stack of auxiliary losses is: context variables break full-graph
compilation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Split(Protocol):
    """What is asked while every process holds a part of the sequence."""

    def admit(self, slug: str) -> None:
        """Raise Unsupported for an op that cannot be split."""
        ...

    def implementation(self, implementations: Sequence[Any], requested: str | None, call: Any) -> Any:
        """The Implementation that runs a call of an engine, in place of these. Raises Unsupported with reasons."""
        ...

    def positions(self, start: int, n: int, device: torch.device) -> Tensor:
        """The positions of this process's n tokens in the whole sequence: int64 (n,)."""
        ...


_stack: list[Split | None] = []


def current() -> Split | None:
    """The split in force, or None."""
    return _stack[-1] if _stack else None


@contextmanager
def splitting(split: Split | None) -> Iterator[None]:
    """Hand the calls of engines inside the block to a split; None: to nobody, every process works alone."""
    _stack.append(split)
    try:
        yield
    finally:
        _stack.pop()


def token_positions(start: int, n: int, device: torch.device) -> Tensor:
    """Positions of n tokens, the first of them the `start`-th of this process: int64 (n,)."""
    import torch

    split = current()
    return torch.arange(start, start + n, device=device) if split is None else split.positions(start, n, device)
