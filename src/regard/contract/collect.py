"""Auxiliary losses: layers add them, whoever trains collects them.

The stack below is the one piece of module state in the library: context variables break full-graph compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_stack: list[dict[str, list[Tensor]]] = []


@contextmanager
def collect_losses() -> Iterator[dict[str, list[Tensor]]]:
    """Collect what layers add inside the block: name -> list of scalar tensors, one per call.

    Leave the block before backward: a checkpointed layer that is recomputed would add its loss again.
    """
    losses: dict[str, list[Tensor]] = {}
    _stack.append(losses)
    try:
        yield losses
    finally:
        _stack.pop()


def add_loss(name: str, value: Tensor | Callable[[], Tensor]) -> None:
    """Hand a scalar loss to the innermost collector; without one it is dropped, and a function is not called."""
    if _stack:
        _stack[-1].setdefault(name, []).append(value() if callable(value) else value)
