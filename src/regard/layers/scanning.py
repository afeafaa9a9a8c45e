"""The layer under mixers that keep a scan state: projections into heads, one method for the scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.contract.errors import OptionError, Unsupported
from regard.engines.scan import ScanState
from regard.layers.attention import check_tokens


class ScanMixer(nn.Module):
    """Causal token mixing by a scan: (B, N, C) -> (B, N, C). Subclasses write `scan` and say what a state holds.

    dim: model width C. heads: H. feature_dim: width of q and k a head. value_dim: width of v a head.
    feature_size: width of a state's keys a head, after feature maps. divided: whether the state keeps a sum of keys.
    """

    def __init__(
        self, dim: int, heads: int, *, feature_dim: int, value_dim: int | None, feature_size: int, divided: bool
    ):
        super().__init__()
        if heads < 1 or (value_dim is None and dim % heads):
            raise OptionError(f"a width of {dim} does not divide into {heads} heads: give head_dim=")
        self.dim, self.heads, self.divided = dim, heads, divided
        self.value_dim = dim // heads if value_dim is None else value_dim
        self.feature_size = feature_size
        self.to_q = nn.Linear(dim, heads * feature_dim, bias=False)
        self.to_k = nn.Linear(dim, heads * feature_dim, bias=False)
        self.to_v = nn.Linear(dim, heads * self.value_dim, bias=False)
        self.to_out = nn.Linear(heads * self.value_dim, dim, bias=False)

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
        """q, k (B, H, N, feature_dim), v (B, H, N, value_dim) -> (out (B, H, N, value_dim), state)."""
        raise NotImplementedError

    def read_out(self, out: Tensor, x: Tensor) -> Tensor:
        """From the joined heads (B, N, H value_dim) and the layer's input to the layer's output."""
        return self.to_out(out)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally. padding: bool (B, N), True = takes part. reset: bool (B, N), document starts.

        Raises Unsupported for a context and for is_causal=False; ShapeError.
        """
        self._refuse(context, is_causal)
        check_tokens(type(self).__name__, self.dim, x, None, padding, reset, is_causal)
        return self._run(x, None, padding, reset)[0]

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> ScanState:
        """The state before the first token; float32 (float64 for a float64 layer), whatever dtype is asked for."""
        weight = self.to_k.weight
        kind = torch.promote_types(dtype or weight.dtype, torch.float32)
        s = torch.zeros(
            batch, self.heads, self.feature_size, self.value_dim, dtype=kind, device=device or weight.device
        )
        return ScanState(s, s[..., 0].clone() if self.divided else None)

    def prefill(self, x: Tensor, state: ScanState, *, padding: Tensor | None = None) -> tuple[Tensor, ScanState]:
        """N >= 1 tokens after the state. padding: bool (B, N)."""
        check_tokens(type(self).__name__, self.dim, x, None, padding, None, True)
        return self._run(x, state, padding, None)

    def step(self, x: Tensor, state: ScanState) -> tuple[Tensor, ScanState]:
        """One token (B, 1, C)."""
        return self._run(x, state, None, None)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state: the same for every length."""
        width = self.value_dim + (1 if self.divided else 0)
        kind = torch.promote_types(self.to_k.weight.dtype, torch.float32)
        return batch * self.heads * self.feature_size * width * kind.itemsize

    def _run(self, x: Tensor, state: Any, padding: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Any]:
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        out, state = self.scan(q, k, v, state=state, key_valid=padding, reset=reset)
        return self.read_out(out.transpose(1, 2).flatten(2), x), state

    def _refuse(self, context: Tensor | None, is_causal: bool) -> None:
        name = type(self).__name__
        if context is not None:
            raise Unsupported(f"{name} mixes a sequence with itself and reads no context; softmax does")
        if not is_causal:
            raise Unsupported(f"{name} is causal only: pass is_causal=True; softmax works both ways")
