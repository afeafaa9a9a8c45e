"""Normalised attention: linear attention divided by a learned number of the asking token, not by the sum of its weights.

    out_i = sum over j <= i of phi(q_i).phi(k_j) v_j / eta_i,      eta_i = exp, softplus or sigmoid of eta_logit_i

eta_logit is a projection of the token, one number a head. phi(x) = elu(x) + 1, where the paper leaves the map open.
Departs from the paper: 1 / eta stays below the largest number of the dtype.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError
from regard.contract.operator import operator
from regard.engines.precision import accumulator, without_autocast
from regard.engines.scan import ScanState, as_scan, linear_scan
from regard.patterns import Bound, Pattern
from regard.primitives.feature_maps import elu1

CARD = OpCard(
    slug="dynamical_systems",
    part_of="dynamical_systems",
    title="Normalised attention",
    exports=("normalised_linear_attention", "normalised_linear_attention_step"),
    spec="q: b h n d, k: b g m d, v: b g m e, eta_logit: b h n -> b h n e",
    example="b=2 h=4 g=2 n=10 m=12 d=8 e=6",
    attends=("self", "causal_self", "cross", "causal_cross"),
    accepts=("pattern",),
    padding=True,
    documents=True,
    decode="state",
    time="n d e",
    memory="n d",
    engines=("scan",),
)

Kind = Literal["exp", "softplus", "sigmoid"]
_KINDS = ("exp", "softplus", "sigmoid")


@operator(CARD)
def normalised_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta_logit: Tensor,
    *,
    kind: Kind = "exp",
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    engine: str | None = None,
) -> Tensor:
    """Normalised attention (section 4.2; equation 21 of the published paper).

    kind: what makes eta of its logit. pattern: an intersection of Causal(), KeyValid() and, where causal, Documents().
    Raises OptionError, Unsupported, ShapeError.
    """
    is_causal, key_valid, reset = as_scan(pattern, is_causal, "dynamical_systems")
    return _attend(q, k, v, eta_logit, kind, None, is_causal, key_valid, reset, engine)[0]


def normalised_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta_logit: Tensor,
    *,
    kind: Kind = "exp",
    state: ScanState | None = None,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    engine: str | None = None,
) -> tuple[Tensor, ScanState]:
    """Continue causal normalised attention by any N >= 1 steps from a state (None: from the start): (out, state)."""
    return _attend(q, k, v, eta_logit, kind, state, True, key_valid, reset, engine)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta_logit: Tensor,
    kind: str,
    state: ScanState | None,
    is_causal: bool,
    key_valid: Tensor | None,
    reset: Tensor | None,
    engine: str | None,
) -> tuple[Tensor, ScanState]:
    if kind not in _KINDS:
        raise OptionError(f"kind is {kind!r}; it is one of {', '.join(_KINDS)}")
    wide = accumulator(q.dtype)
    with without_autocast(q.device):
        # the sum stays wide until it is divided
        out, state = linear_scan(
            elu1(q.to(wide)), elu1(k.to(wide)), v.to(wide), is_causal=is_causal, key_valid=key_valid, reset=reset,
            initial_state=state, engine=engine,
        )  # fmt: skip
        return (out * _inverse(eta_logit.to(wide), kind)[..., None]).to(q.dtype), state


def _inverse(logit: Tensor, kind: str) -> Tensor:
    """1 / eta, finite for every logit."""
    logit = logit.clamp(min=math.log(torch.finfo(logit.dtype).tiny))
    if kind == "exp":
        return torch.exp(-logit)
    return 1 / F.softplus(logit) if kind == "softplus" else 1 + torch.exp(-logit)
