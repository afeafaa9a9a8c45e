"""Feed-forwards: the part of a block that works on each token alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
