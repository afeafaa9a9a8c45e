"""Taylor linear attention as a layer: narrow queries and keys, no positions.

The exact window that BASED sets beside it is the mixer `sliding_window`, the short convolution `short_conv`.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError
from regard.engines.scan import ScanState
from regard.layers.scanning import ScanMixer
from regard.ops.based import taylor_linear_attention_step
from regard.primitives.feature_maps import taylor2

CARD = MixerCard(
    slug="based",
    title="BASED: Taylor linear attention",
    part_of="based",
    builds_on=("based",),
    exports=("TaylorLinearAttention",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
    time="n c d^2",
    memory="n d^2",
)


class TaylorLinearAttention(ScanMixer):
    """Causal Taylor linear attention (section 4.1).

    dim: model width. heads: H. feature_dim: width d' of q and k a head, 1 to 32; the state has
    (1 + d' + d'(d'+1)/2)(head_dim + 1) numbers a head. head_dim: of the values, dim / heads if None.
    Raises OptionError; warns above 32, where the state outgrows most key-value caches.
    """

    def __init__(self, dim: int, heads: int, *, feature_dim: int = 16, head_dim: int | None = None):
        if feature_dim < 1:
            raise OptionError(f"based needs a feature_dim of at least 1, not {feature_dim}")
        size = taylor2.size(feature_dim)
        if feature_dim > 32:
            warnings.warn(f"feature_dim {feature_dim} makes a state of {size} keys a head", stacklevel=2)
        super().__init__(dim, heads, feature_dim=feature_dim, value_dim=head_dim, feature_size=size, divided=True)

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
        return taylor_linear_attention_step(q, k, v, state=state, key_valid=key_valid, reset=reset)
