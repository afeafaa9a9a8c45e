"""One piece of attention work, and how many multiply-adds it needs at least."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.contract.errors import OptionError, near
from regard.patterns import Causal, Full, Neighborhood, Pattern, SlidingWindow

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PATTERNS = ("causal", "full", "window:WIDTH", "neighborhood:KERNEL", "decode")


@dataclass(frozen=True)
class Work:
    """pattern: as on the command line. length: keys. dtype: "fp32", "bf16", "fp16". backward: with the gradients.

    normaliser: "softmax", "sigmoid" or "softplus". bias: None, "dense" (H, N, M) or "key" (B, 1, 1, M).
    Raises OptionError for a pattern, a dtype or a length that does not exist.
    """

    pattern: str
    length: int
    dtype: str = "fp32"
    backward: bool = False
    heads: int = 8
    dim: int = 64
    normaliser: str = "softmax"
    bias: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"no dtype {self.dtype!r}{near(self.dtype, DTYPES)}; there are {', '.join(DTYPES)}")
        if self.length < 1:
            raise OptionError(f"a length is at least 1 token, not {self.length}")
        self.what()

    @property
    def key(self) -> str:
        options = [f"d{self.dim}"] if self.dim != 64 else []
        options += [self.normaliser] if self.normaliser != "softmax" else []
        options += [f"{self.bias} bias"] if self.bias else []
        direction = "forward+backward" if self.backward else "forward"
        return " ".join([self.pattern, str(self.length), self.dtype, direction, *options])

    @property
    def queries(self) -> int:
        return 1 if self.pattern == "decode" else self.length

    @property
    def q_offset(self) -> int:
        return self.length - self.queries

    def grid(self) -> tuple[int, int]:
        """The sides of a square picture of `length` tokens. Raises OptionError if there is none."""
        side = math.isqrt(self.length)
        if side * side != self.length:
            raise OptionError(f"a neighbourhood needs a square number of tokens, not {self.length}; try {side * side}")
        return side, side

    def what(self) -> Pattern:
        """The pattern itself. Raises OptionError."""
        name, _, size = self.pattern.partition(":")
        if name in ("window", "neighborhood") and not size.isdecimal():
            raise OptionError(f"{self.pattern!r} lacks its size: write {name}:{256 if name == 'window' else 15}")
        if name == "window":
            return Causal() & SlidingWindow(int(size))
        if name == "neighborhood":
            return Neighborhood(self.grid(), (int(size), int(size)))
        if self.pattern in ("causal", "decode"):
            return Causal()
        if self.pattern == "full":
            return Full()
        raise OptionError(f"no pattern {self.pattern!r}{near(self.pattern, _PATTERNS)}; write {', '.join(_PATTERNS)}")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of normal numbers, requiring gradients if `backward`."""
        generator = torch.Generator().manual_seed(0)
        out = []
        for n in (self.queries, self.length, self.length):
            x = torch.randn(1, self.heads, n, self.dim, generator=generator).to(DTYPES[self.dtype])
            out.append(x.requires_grad_(self.backward))
        return out[0], out[1], out[2]

    def flops(self) -> float:
        """Of the matrix products over the pairs that may meet: 2 products forward, 5 backward."""
        pairs = 0
        pattern = self.what()
        for begin in range(0, self.queries, 512):
            rows = min(512, self.queries - begin)
            pairs += int(pattern.row_counts(rows, self.length, q_offset=self.q_offset + begin).sum())
        return 2.0 * pairs * self.heads * self.dim * (7 if self.backward else 2)
