"""Feed-forwards: the part of a block that works on each token alone."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """act(x W1 + b1) W2 + b2: (…, C) -> (…, C). hidden: inner width. act: made without arguments."""

    def __init__(self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.GELU, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """(silu(x W1) * x W3) W2 without biases: (…, C) -> (…, C). hidden: inner width."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate(x)) * self.up(x))

    def activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate)


class SGLU(SwiGLU):
    """(x W1 * x W3) W2: the gated unit without an activation, of TransNormerLLM."""

    def activate(self, gate: Tensor) -> Tensor:
        return gate
