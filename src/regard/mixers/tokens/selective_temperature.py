"""Selective self-attention: every token chooses the temperature of its query and the weight of its value.

    q_i <- tau_q(x_i, n_i) q_i,    v_j <- tau_v(x_j, n_j) v_j,    tau(x, n) = tanh(w . act(W x)) + 1 + gate(alpha) ln n

W x is the layer's own query (value) projection, act is silu, n_i the number of keys that token i may see.
Departs from the paper: w and the position gate start at 0 and near 0, so that a layer starts as plain attention.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError
from regard.layers.attention import AnyPattern, Attention
from regard.ops.softmax import softmax_attention
from regard.primitives.length_scale import log_scale

CARD = MixerCard(
    slug="selective_temperature",
    title="Selective self-attention (token-wise temperature)",
    paper="Selective Attention: Enhancing Transformer through Principled Context Control",
    builds_on=("softmax",),
    exports=("SelectiveTemperatureAttention", "SelectiveTemperature"),
    example="b=2 n=10 c=16 h=4",
    attends=("self", "causal_self", "cross", "causal_cross"),
    padding=True,
    documents=True,
    decode=True,
    time="n m c",
    memory="n c",
)

# gate -> (the gate of its learned scalar, where that scalar starts), so that the layer starts near plain attention
_GATES = {
    "sigmoid": (torch.sigmoid, -7.0),
    "double_exp": (lambda beta: torch.exp(-torch.exp(beta)), 2.0),
    "linear": (lambda beta: beta, 1e-5),
}


class SelectiveTemperature(nn.Module):
    """tau of each token and head: projected tokens (B, H, N, D), counts (B|1, 1, N) -> (B, H|1, N, 1).

    heads, head_dim: of the projection. token: the part tanh(w . silu(projection)). position: the part gate ln n.
    gate: "sigmoid" (the paper), "double_exp" exp(-exp(beta)) (the released code), "linear" beta.
    per_head: one w of D numbers a head, else one w over all heads. clamp_min: the least tau, None for no limit (a
    negative tau prefers what it would avoid; the paper allows it). Raises OptionError, ShapeError.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        token: bool = True,
        position: bool = True,
        gate: Literal["sigmoid", "double_exp", "linear"] = "sigmoid",
        per_head: bool = False,
        clamp_min: float | None = None,
    ):
        super().__init__()
        if gate not in _GATES:
            raise OptionError(f"the gate is {gate!r}; it is one of {', '.join(_GATES)}")
        self.heads, self.head_dim, self.per_head, self.clamp_min = heads, head_dim, per_head, clamp_min
        self.gate, start = _GATES[gate]
        self.w = nn.Parameter(torch.zeros(heads, head_dim)) if token else None
        self.alpha = nn.Parameter(torch.tensor(start)) if position else None

    def forward(self, projected: Tensor, counts: Tensor) -> Tensor:
        if projected.shape[1] != self.heads or projected.shape[-1] != self.head_dim:
            raise ShapeError(
                f"the temperature is made for {self.heads} heads of {self.head_dim}, "
                f"not for a projection {tuple(projected.shape)}"
            )
        tau = torch.ones_like(projected[:, :1, :, :1])
        if self.alpha is not None:
            growth = log_scale(counts).to(projected.dtype)[..., None]
            tau = tau + self.gate(self.alpha) * growth
        if self.w is not None:
            score = (F.silu(projected) * self.w[:, None]).sum(-1, keepdim=True)
            tau = tau + torch.tanh(score if self.per_head else score.sum(1, keepdim=True))
        return tau if self.clamp_min is None else tau.clamp(min=self.clamp_min)


class SelectiveTemperatureAttention(Attention):
    """Softmax attention whose queries and values are scaled token by token (sections 3 and 4).

    on: which of "q", "v" are scaled. token, position, gate, per_head, clamp_min: of the `SelectiveTemperature` of
    each. The other options are those of the attention layer. Raises OptionError.
    """

    needs_counts = True

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        on: tuple[str, ...] = ("q", "v"),
        token: bool = True,
        position: bool = True,
        gate: Literal["sigmoid", "double_exp", "linear"] = "sigmoid",
        per_head: bool = False,
        clamp_min: float | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rotary: bool = True,
        rotary_base: float = 1e4,
        context_dim: int | None = None,
    ):
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm, rotary=rotary,
            rotary_base=rotary_base, context_dim=context_dim,
        )  # fmt: skip
        if not on or any(which not in ("q", "v") for which in on):
            raise OptionError(f"on is {on!r}; it names 'q', 'v' or both")
        counted = {"q": self.heads, "v": self.kv_heads}
        self.temperatures = nn.ModuleDict(
            {
                which: SelectiveTemperature(
                    counted[which], self.head_dim, token=token, position=position, gate=gate, per_head=per_head,
                    clamp_min=clamp_min,
                )
                for which in on
            }
        )  # fmt: skip

    def modulate(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert counts is not None
        if "q" in self.temperatures:
            q = q * self.temperatures["q"](q, counts)
        if "v" in self.temperatures:
            # in cross-attention values have no row of their own; every row sees the same keys
            own = counts if v.shape[2] == counts.shape[-1] else counts[..., :1].expand(*counts.shape[:-1], v.shape[2])
            v = v * self.temperatures["v"](v, own)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return softmax_attention(q, k, v, pattern=pattern, q_offset=q_offset)
