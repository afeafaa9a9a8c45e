"""Gated lightning attention: the token mixer of TransNormerLLM.

    y = Wo( srmsnorm(o) * (x Wu) ),    o = lightning attention of silu(x Wq), silu(x Wk), x Wv

With `lrpe` the first layer turns silu(x Wq) and silu(x Wk) by learned angles, which doubles their width.
Departs from the paper: none of the released model's; the low-rank gate of the example module is not built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.split import token_positions
from regard.engines.scan import ScanState
from regard.layers.scanning import ScanMixer
from regard.ops.lightning import lightning_attention_step, lightning_decay
from regard.primitives.positions import lrpe as turn

CARD = MixerCard(
    slug="lightning",
    title="Gated lightning attention",
    part_of="lightning",
    builds_on=("lightning",),
    exports=("LightningAttention",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
    time="n c d",
    memory="n c",
)


class LightningAttention(ScanMixer):
    """Causal linear attention with a fixed decay a head, a norm and an output gate (TransNormerLLM, section 3).

    dim: model width. heads: H. layer, layers: which of how many layers this is, from 0; deeper layers decay less.
    head_dim: dim / heads if None. lrpe: learned relative positions in layer 0; later layers take no notice.
    Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        layer: int = 0,
        layers: int = 1,
        head_dim: int | None = None,
        lrpe: bool = False,
    ):
        width = dim // max(heads, 1) if head_dim is None else head_dim
        turned = lrpe and layer == 0
        size = 2 * width if turned else width
        super().__init__(dim, heads, feature_dim=width, value_dim=head_dim, feature_size=size, divided=False)
        # plain numbers, so that casting the layer leaves them exact
        self.decay = tuple(lightning_decay(heads, layer, layers).tolist())
        self.to_gate = nn.Linear(dim, heads * self.value_dim, bias=False)
        self.theta: nn.Parameter | None = None
        if turned:
            places = torch.arange(heads * width).view(heads, width)
            self.theta = nn.Parameter(1e4 ** (-2 * places / (heads * width)))
        self.norm = nn.RMSNorm(heads * self.value_dim, elementwise_affine=False)

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
        q, k = F.silu(q), F.silu(k)
        if self.theta is not None:
            seen = 0 if state is None else state.seen
            positions = token_positions(seen, q.shape[2], q.device)
            q, k = turn(q, positions, self.theta), turn(k, positions, self.theta)
        return lightning_attention_step(q, k, v, decay=self.decay, state=state, key_valid=key_valid, reset=reset)

    def read_out(self, out: Tensor, x: Tensor) -> Tensor:
        return self.to_out(self.norm(out) * self.to_gate(x))
