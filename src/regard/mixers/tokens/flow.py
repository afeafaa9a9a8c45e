"""Flow attention as a layer: projections around the causal op, with its sums as the state."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract.card import MixerCard
from regard.contract.errors import Unsupported
from regard.layers.scanning import ScanMixer
from regard.ops.flow import FlowState, flow_attention_step, flow_state

CARD = MixerCard(
    slug="flow",
    title="Flow attention",
    part_of="flow",
    builds_on=("flow",),
    exports=("FlowAttention",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
    padding=True,
    decode=True,
    constant_state=True,
    time="n c d",
    memory="n c",
)


class FlowAttention(ScanMixer):
    """Causal flow attention with a state of H (D^2 + 4 D + 1) numbers (section 3.2).

    dim: model width. heads: H. head_dim: D, dim / heads if None. Raises OptionError.
    """

    def __init__(self, dim: int, heads: int, *, head_dim: int | None = None):
        width = dim // max(heads, 1) if head_dim is None else head_dim
        super().__init__(dim, heads, feature_dim=width, value_dim=head_dim, feature_size=width, divided=False)

    def scan(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: FlowState | None,
        key_valid: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, FlowState]:
        if reset is not None:
            raise Unsupported("flow sums over the whole prefix and does not separate documents; linear does")
        return flow_attention_step(q, k, v, state=state, key_valid=key_valid)

    def init_state(  # type: ignore[override]
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> FlowState:
        """The state before the first token; float32 (float64 for a float64 layer), whatever dtype is asked for."""
        weight = self.to_k.weight
        kind = torch.promote_types(dtype or weight.dtype, torch.float32)
        device = device or weight.device
        return flow_state(batch, self.heads, self.feature_size, self.value_dim, dtype=kind, device=device)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state: the same for every length."""
        kind = torch.promote_types(self.to_k.weight.dtype, torch.float32)
        numbers = self.heads * (self.feature_size * (self.value_dim + 4) + 1)
        return batch * (numbers * kind.itemsize + torch.int64.itemsize)
