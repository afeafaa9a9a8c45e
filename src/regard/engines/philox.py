"""Which weights dropout keeps: one random word per pair, the same whatever the engine and its block size.

Philox4x32-10 (Salmon et al., 2011) with the key (seed) and the counter (b, h, i, j div 4); of its four words, word j mod 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def random_words(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """One word per pair, int64 in [0, 2^32), by broadcast. seed: int64 scalar."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1, c2, c3 = (x.to(torch.int64) & _WORD for x in (b, h, i, j // 4))
    for turn in range(10):
        if turn:
            k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
        # the products wrap at 2^64, so that the sign bit is data: the shift is masked
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
    first, second = torch.where(j % 4 == 0, c0, c1), torch.where(j % 4 == 2, c2, c3)
    return torch.where(j % 4 < 2, first, second)


def keep(seed: Tensor, p: float, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Bool by broadcast: True where the weight of (batch row b, head h, query position i, key j) is kept."""
    return random_words(seed, b, h, i, j) >= int(p * 2**32)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's own generator, int64 scalar, so that `torch.manual_seed` repeats it."""
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
