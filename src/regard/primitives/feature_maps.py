"""Feature maps phi with phi(q).phi(k) in the place of exp(q.k)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureMap:
    """non_negative: all features are at least 0. size(d): the width it makes of d channels."""

    apply: Callable[[Tensor], Tensor]
    non_negative: bool
    size: Callable[[int], int]

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x)


def _elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def taylor_features(x: Tensor) -> Tensor:
    """[1, x / d^(1/4), upper triangle of x x' / (sqrt 2 sqrt d)]: phi(q).phi(k) = 1 + a + a^2/2, a = q.k / sqrt d.

    Off-diagonal products stand once, without the 1/sqrt 2: the packed form has the kernel of the full one.
    """
    d = x.shape[-1]
    rows, columns = torch.triu_indices(d, d, device=x.device)
    weight = torch.where(rows == columns, 2**-0.5, 1.0).to(x.dtype) * d**-0.5
    squares = x[..., rows] * x[..., columns] * weight
    return torch.cat((torch.ones_like(x[..., :1]), x * d**-0.25, squares), -1)


elu1 = FeatureMap(_elu1, True, lambda d: d)
relu = FeatureMap(torch.relu, True, lambda d: d)
silu = FeatureMap(F.silu, False, lambda d: d)
taylor2 = FeatureMap(taylor_features, False, lambda d: 1 + d + d * (d + 1) // 2)
