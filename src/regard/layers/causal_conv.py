"""Short causal convolutions over the sequence, with state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.errors import OptionError
from regard.layers.caches import ConvState


class CausalConv1d(nn.Module):
    """A depthwise convolution that sees the token and the kernel - 1 before it: (B, N, C) -> (B, N, C).

    channels: C. kernel: tokens, at least 1. bias: whether to add one.
    """

    def __init__(self, channels: int, kernel: int = 3, *, bias: bool = True):
        super().__init__()
        if kernel < 1:
            raise OptionError(f"a convolution needs a kernel of at least 1 token, not {kernel}")
        self.kernel = kernel
        self.conv = nn.Conv1d(channels, channels, kernel, groups=channels, bias=bias)

    def forward(self, x: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """reset: bool (B, N), True where a document starts: taps do not reach over it."""
        if reset is None:
            return self._convolve(F.pad(x, (0, 0, self.kernel - 1, 0)))
        document = reset.cumsum(-1)
        out = x * self.conv.weight[:, 0, -1]
        for back in range(1, min(self.kernel, x.shape[1])):
            same = F.pad(document[:, back:] == document[:, :-back], (back, 0))
            shifted = F.pad(x[:, :-back], (0, 0, back, 0))
            out = out + shifted * same[..., None] * self.conv.weight[:, 0, -1 - back]
        return out if self.conv.bias is None else out + self.conv.bias

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> ConvState:
        weight = self.conv.weight
        tail = torch.zeros(
            batch, self.kernel - 1, weight.shape[0], dtype=dtype or weight.dtype, device=device or weight.device
        )
        return ConvState(tail)

    def prefill(self, x: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        """x (B, N, C), any N >= 1, after the tokens of the state."""
        both = torch.cat((state.tail.to(x.dtype), x), 1)
        tail = both[:, both.shape[1] - (self.kernel - 1) :]
        return self._convolve(both), ConvState(tail, state.seen + x.shape[1])

    def _convolve(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)
