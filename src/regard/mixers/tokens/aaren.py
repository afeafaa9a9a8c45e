"""Aaren: attention with one learned query is a recurrent network.

    o_t = softmax over j <= t of (q . k_j / sqrt d), applied to v_j,      q = Wq (a learned vector)

Every prefix is computed at once by a scan; decoding keeps a fixed state. Departs from the paper: none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.engines.scan import SoftmaxState, softmax_scan
from regard.layers.scanning import ScanMixer

CARD = MixerCard(
    slug="aaren",
    title="Aaren: attention as a recurrent network",
    paper="Attention as an RNN",
    exports=("Aaren",),
    example="b=2 n=10 c=16 h=4",
    attends=("causal_self",),
    padding=True,
    documents=True,
    decode=True,
    constant_state=True,
    time="n c",
    memory="n c",
)


class Aaren(ScanMixer):
    """Softmax attention of one learned query over every prefix (section 3.3).

    The weights do not depend on the token that asks, so a layer alone cannot recall: depth brings the dependence.
    A prefix that is all padding gives 0. dim: model width. heads: H. head_dim: dim / heads if None.
    Raises OptionError.
    """

    def __init__(self, dim: int, heads: int, *, head_dim: int | None = None):
        width = dim // max(heads, 1) if head_dim is None else head_dim
        super().__init__(dim, heads, feature_dim=width, value_dim=head_dim, feature_size=1, divided=False)
        self.query = nn.Parameter(torch.randn(dim) * dim**-0.5)

    def init_state(self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Any:
        """The state before the first token: (lse, out), float32 at least."""
        start = super().init_state(batch, dtype=dtype, device=device)
        return SoftmaxState(torch.full_like(start.s[:, :, 0, 0], -1e30), start.s[:, :, 0])

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state: the same for every length."""
        return super().state_bytes(batch, length) // self.value_dim * (self.value_dim + 1)

    def _run(self, x: Tensor, state: Any, padding: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Any]:
        q = self.to_q(self.query).unflatten(-1, (self.heads, -1))
        k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_k, self.to_v))
        scores = (k * q[:, None]).sum(-1) * q.shape[-1] ** -0.5
        out, state = softmax_scan(scores, v, key_valid=padding, reset=reset, initial_state=state)
        return self.read_out(out.transpose(1, 2).flatten(2), x), state
