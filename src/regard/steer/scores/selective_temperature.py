"""Position temperature: queries grow with the number of keys that they see, in a pretrained model.

    q_i <- (1 + beta ln n_i) q_i,      so that s_ij = scale q_i k_j' <- (1 + beta ln n_i) s_ij

The part of selective self-attention that needs no token's content; the learned scalar of the paper is beta =
sigmoid(alpha), that of the released code exp(-exp(alpha)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from regard.contract.attach import AttentionCall, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError
from regard.primitives.length_scale import log_scale

CARD = InterventionCard(
    slug="selective_temperature",
    title="Position temperature",
    part_of="selective_temperature",
    paper="Selective Attention: Enhancing Transformer through Principled Context Control",
    exports=("PositionTemperature",),
    options={"beta": 0.3},
    sites=("q",),
    off={"beta": 0.0},
    spares={"layers": (1,)},
    padding=True,
)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class PositionTemperature:
    """Sharpen attention as the context grows (section 3.2); the first token stays as it is.

    beta: the growth, 0 for none; below 0 attention flattens. n_i counts the keys that a row may see, without pads; in a
    sliding layer those of its window. layers: None for all. Raises OptionError.
    """

    beta: float
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise OptionError(f"beta is a finite number, not {self.beta}")

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        """The call with other queries."""
        if not call.main or self.beta == 0 or (self.layers is not None and call.layer not in self.layers):
            return follow()
        visible = call.visible()
        counts = call.q.new_full((1, 1, 1), call.k.shape[2]) if visible is None else visible.sum(-1)
        return follow(call.replace(q=call.q * (1 + self.beta * log_scale(counts)[..., None]).to(call.q.dtype)))
