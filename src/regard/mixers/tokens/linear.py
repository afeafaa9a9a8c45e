"""Linear attention with elu + 1 as a layer: projections around the op."""

from __future__ import annotations

from torch import Tensor

from regard.contract.card import MixerCard
from regard.engines.scan import ScanState
from regard.layers.scanning import ScanMixer
from regard.ops.linear import linear_attention_step

CARD = MixerCard(
    slug="linear",
    title="Linear attention (elu + 1)",
    part_of="linear",
    builds_on=("linear",),
    exports=("LinearAttention",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
    time="n c d",
    memory="n c",
)


class LinearAttention(ScanMixer):
    """Causal linear attention with a state of H D (D + 1) numbers (Katharopoulos et al., 2020).

    dim: model width. heads: H. head_dim: D, dim / heads if None. Raises OptionError.
    """

    def __init__(self, dim: int, heads: int, *, head_dim: int | None = None):
        width = dim // max(heads, 1) if head_dim is None else head_dim
        super().__init__(dim, heads, feature_dim=width, value_dim=head_dim, feature_size=width, divided=True)

    def scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: ScanState | None,
        key_valid: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, ScanState]:
        return linear_attention_step(q, k, v, state=state, key_valid=key_valid, reset=reset)
