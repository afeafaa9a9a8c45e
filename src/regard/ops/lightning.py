"""Lightning attention: causal linear attention with a fixed decay for each head, and no normaliser.

    out_i = sum over j <= i of decay_h^(i-j) (q_i . k_j) v_j

Departs from the paper: none. `lightning_decay` follows the released code (ALiBi slopes that shrink with depth); the
paper's formula is decay="paper" there.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.operator import operator
from regard.engines.scan import LEAST_LOG_DECAY, ScanState, as_scan, linear_scan
from regard.patterns import Bound, Pattern
from regard.primitives.positions import alibi_slopes

CARD = OpCard(
    slug="lightning",
    title="Lightning attention",
    paper="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    exports=("lightning_attention", "lightning_attention_step", "lightning_decay"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    options={"decay": (0.5, 0.7, 0.9, 1.0)},
    attends=("causal_self",),
    accepts=("pattern", "scale"),
    padding=True,
    documents=True,
    decode="state",
    time="n d e",
    memory="n d",
    engines=("scan",),
)


@operator(CARD)
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | tuple[float, ...],
    pattern: Pattern | Bound | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    engine: str | None = None,
) -> Tensor:
    """Lightning attention (section 3): the decayed products themselves, in a state of fixed size.

    decay: one factor a query head, in (0, 1]; 1 forgets nothing. scale: multiplies q, 1 if None. pattern: an
    intersection of Causal(), KeyValid() and Documents(). Raises OptionError for a decay outside (0, 1]; Unsupported.
    """
    is_causal, key_valid, reset = as_scan(pattern, is_causal, "lightning")
    return lightning_attention_step(q, k, v, decay=decay, key_valid=key_valid, reset=reset, scale=scale, engine=engine)[
        0
    ]


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | tuple[float, ...],
    state: ScanState | None = None,
    key_valid: Tensor | None = None,
    reset: Tensor | None = None,
    scale: float | None = None,
    engine: str | None = None,
) -> tuple[Tensor, ScanState]:
    """Continue `lightning_attention` by any N >= 1 steps from a state (None: from the start): (out, new state)."""
    log_decay = _log_decay(decay, q)
    return linear_scan(
        q, k, v, log_decay, scale=1.0 if scale is None else scale, key_valid=key_valid, reset=reset, initial_state=state,
        engine=engine,
    )  # fmt: skip


def lightning_decay(heads: int, layer: int, layers: int, *, decay: Literal["alibi", "paper"] = "alibi") -> Tensor:
    """The decay factors of layer `layer` of `layers` (from 0): float64 (H,).

    "alibi": exp(-slope_h (1 - layer / (layers - 1) + 1e-5)), as released; one layer alone decays in full.
    "paper": exp(-(8 h / H)(1 - layer / layers)), h from 1.
    """
    if not 0 <= layer < layers:
        raise OptionError(f"layer {layer} is not one of {layers} layers, counted from 0")
    if decay == "alibi":
        share = 1.0 if layers == 1 else 1 - layer / (layers - 1) + 1e-5
        return torch.exp(-alibi_slopes(heads) * share)
    if decay != "paper":
        raise OptionError(f"decay is {decay!r}; it is 'alibi' or 'paper'")
    return torch.exp(
        -8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu") / heads * (1 - layer / layers)
    )


def _log_decay(decay: Tensor | tuple[float, ...], q: Tensor) -> Tensor:
    if isinstance(decay, Tensor):
        if decay.shape != (q.shape[1],):
            raise ShapeError(
                f"decay is {tuple(decay.shape)}; it must have one factor for each of {q.shape[1]} query heads"
            )
        if not torch.compiler.is_compiling() and not decay.is_meta and not bool(((decay > 0) & (decay <= 1)).all()):
            raise OptionError("decay must be in (0, 1]")
        return decay.log()
    if len(decay) != q.shape[1]:
        raise ShapeError(f"decay has {len(decay)} factors; it must have one for each of {q.shape[1]} query heads")
    if any(not 0 < factor <= 1 for factor in decay):
        raise OptionError("decay must be in (0, 1]")
    # in float64 on the host: the cumulated log decays multiply its rounding
    logs = [max(math.log(factor), LEAST_LOG_DECAY) for factor in decay]
    return torch.tensor(logs, dtype=torch.float64, device=q.device)
