"""What processes tell each other: the operators of torch.distributed, seen at the dispatcher."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sent(TorchDispatchMode):
    """Collects (name, bytes of the tensors handed in) of what is sent inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.name().removeprefix("c10d::").rstrip("_")
            given = args[1] if name == "allgather" else args[0]
            size = sum(t.numel() * t.element_size() for t in tree_leaves(given) if isinstance(t, Tensor))
            self.calls.append((name, size))
        return function(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    @property
    def bytes(self) -> int:
        """Of what was sent, not of what came in."""
        return sum(size for name, size in self.calls if not name.startswith("recv"))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside the block has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out
