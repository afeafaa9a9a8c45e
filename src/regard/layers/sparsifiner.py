"""The connections of Sparsifiner: a low-rank estimate of attention, and the keys that it chooses for each query.

    coef = softmax(scale (q Wq) ((k Wk)' P)),   A~ = coef P_back',   keys of a row = the largest keep N of A~

The choice has no gradient. What teaches Wq, Wk, P and P_back is sum (A~ - A)^2, with A the dense attention of the same
queries and keys (handed to `collect_losses`) or of a teacher (`train/distillation/sparsifiner.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from regard.contract.collect import add_loss
from regard.contract.errors import OptionError, ShapeError
from regard.engines.precision import accumulator, without_autocast
from regard.engines.readout import readout
from regard.patterns import Bound, Empty, KeyValid, Pattern, Prefix, TokenSelection


class Connectivity(nn.Module):
    """Which keys each query reads: q, k (B, H, N, D) -> a selection, or None for all keys (section 3.2).

    num_tokens: N. keep: share of the keys in (0, 1]; 1 makes no estimate. threshold: with keep=None, the keys of an
    estimate above it. prefix: tokens in front whose rows are not estimated, since they read every key. reduce_n: N over the
    rank; reduce_c: D over the width of a narrowed head. coef_topk: coefficients that a row keeps, or None for those
    above coef_threshold. basis_threshold: entries of |P_back| up to it count as 0. shared: P_back = P. scale: of the
    coefficients' logits, heads^-1/2 if None. Raises OptionError.
    """

    def __init__(
        self,
        num_tokens: int,
        heads: int,
        head_dim: int,
        *,
        keep: float | None = 0.25,
        threshold: float | None = None,
        prefix: int = 1,
        reduce_n: int = 8,
        reduce_c: int = 2,
        coef_topk: int | None = 8,
        coef_threshold: float = 0.0,
        basis_threshold: float = 0.02,
        shared: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        _check_choice(keep, threshold)
        if not 0 <= prefix <= num_tokens:
            raise OptionError(f"prefix is a number of tokens in front, 0 to {num_tokens}, not {prefix}")
        for name, size, by in (("reduce_n", num_tokens, reduce_n), ("reduce_c", head_dim, reduce_c)):
            if not 1 <= by <= size:
                raise OptionError(f"{name} divides {size}: it is 1 to {size}, not {by}")
        if coef_topk is not None and coef_topk < 1:
            raise OptionError(f"coef_topk is a number of coefficients, at least 1, or None, not {coef_topk}")
        self.keep, self.threshold = keep, threshold
        self.num_tokens, self.prefix, self.coef_topk, self.coef_threshold = (
            num_tokens,
            prefix,
            coef_topk,
            coef_threshold,
        )
        self.basis_threshold, self.scale = basis_threshold, heads**-0.5 if scale is None else scale
        self.to_q = nn.Linear(head_dim, head_dim // reduce_c)
        self.to_k = nn.Linear(head_dim, head_dim // reduce_c)
        rank = num_tokens // reduce_n
        self.down = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens, rank), std=0.02))
        self.up = self.down if shared else nn.Parameter(nn.init.trunc_normal_(torch.empty(num_tokens, rank), std=0.02))

    def forward(self, q: Tensor, k: Tensor, *, key_valid: Tensor | None = None) -> TokenSelection | None:
        """Where keys are chosen, it hands the error of the estimate to `collect_losses`, as "sparsifiner".

        key_valid: bool (B, N), True = takes part. Raises ShapeError for another number of tokens.
        """
        if self.keep == 1:
            return None
        add_loss("sparsifiner", lambda: self.error(q, k, dense_rows(q, k, self.prefix, key_valid), key_valid=key_valid))
        return connectivity_topk(q, k, self, self.keep, threshold=self.threshold, key_valid=key_valid)

    def estimate(self, q: Tensor, k: Tensor, *, key_valid: Tensor | None = None, raw: bool = False) -> Tensor:
        """A~ (B, H, N - prefix, N), at least 0, in float32 (float64). raw: P_back with its sign, and all coefficients.

        Raises ShapeError for another number of tokens.
        """
        if q.shape != k.shape or q.shape[2:] != (self.num_tokens, self.to_q.in_features):
            raise ShapeError(
                f"queries are {tuple(q.shape)}, keys {tuple(k.shape)}; both must be (B, H, {self.num_tokens}, "
                f"{self.to_q.in_features}), since the projections are bound to positions: resize P, P_back for others"
            )
        kind = accumulator(q.dtype)
        with without_autocast(q.device):
            q = _linear(q[:, :, self.prefix :].to(kind), self.to_q)
            k = _linear(k.to(kind), self.to_k)
            if key_valid is not None:
                k = k.masked_fill(~key_valid[:, None, :, None], 0.0)
            columns = torch.einsum("bhnc,nr->bhcr", k, self.down.to(kind))
            coef = torch.softmax(self.scale * (q @ columns), -1)
            basis = self.up.to(kind)
            if not raw:
                coef = self._sparse(coef)
                basis = basis.abs()
                basis = torch.where(basis > self.basis_threshold, basis, 0.0)
            return coef @ basis.T

    def error(
        self, q: Tensor, k: Tensor, weights: Tensor, *, key_valid: Tensor | None = None, raw: bool = False
    ) -> Tensor:
        """Sum of (A~ - weights)^2 over pairs of tokens that take part, with gradient to the parameters only.

        weights: (B, H, N - prefix, N).
        """
        estimate = self.estimate(q.detach(), k.detach(), key_valid=key_valid, raw=raw)
        error = (estimate - weights.detach().to(estimate.dtype)).square()
        if key_valid is None:
            return error.sum()
        rows = key_valid[:, None, self.prefix :, None]
        return torch.where(rows & key_valid[:, None, None], error, 0.0).sum()

    def _sparse(self, coef: Tensor) -> Tensor:
        if self.coef_topk is None:
            return torch.where(coef > self.coef_threshold, coef, 0.0)
        if self.coef_topk >= coef.shape[-1]:
            return coef
        best = coef.topk(self.coef_topk, -1)
        return torch.zeros_like(coef).scatter(-1, best.indices, best.values)


@torch.no_grad()
def connectivity_topk(
    q: Tensor,
    k: Tensor,
    params: Connectivity,
    keep: float | None = 0.25,
    *,
    threshold: float | None = None,
    key_valid: Tensor | None = None,
) -> TokenSelection:
    """The keys of each row: the largest ceil(keep N) of the estimate, all keys for the rows of the prefix.

    q, k (B, H, N, D). keep: in (0, 1]. threshold: with keep=None, the keys of an estimate above it. key_valid: bool
    (B, N): what is False is nobody's key and has no row. Raises OptionError if both or neither of keep and threshold
    are given, ShapeError.
    """
    _check_choice(keep, threshold)
    estimate = params.estimate(q, k, key_valid=key_valid)
    n, front = params.num_tokens, params.prefix
    if key_valid is not None:
        estimate = estimate.masked_fill(~key_valid[:, None, None], float("-inf"))
    best = estimate.sort(dim=-1, descending=True, stable=True)
    if keep is not None:
        # 0.1 * 30 is a little more than 3
        width = math.ceil(round(keep * n, 6))
        chosen = best.values[..., :width] > float("-inf")
    elif threshold is not None:
        chosen = best.values > threshold
        width = int(chosen.sum(-1).max()) if chosen.numel() else 0
        chosen = chosen[..., :width]
    index = torch.where(chosen, best.indices[..., :width], -1).int()
    within = None if key_valid is None else KeyValid(rows=True).bind(key_valid=key_valid)
    if front == 0:
        return TokenSelection(index, within=within)
    # rows in front hold the keys in front, and the others are forced on them
    first = torch.arange(front, dtype=torch.int32, device=q.device).expand(*index.shape[:2], front, front)
    index, first = (nn.functional.pad(t, (0, max(width, front) - t.shape[-1]), value=-1) for t in (index, first))
    return TokenSelection(torch.cat((first, index), 2), force=Empty().on(prefix=front) - Prefix(front), within=within)


def dense_rows(q: Tensor, k: Tensor, prefix: int, key_valid: Tensor | None = None) -> Tensor:
    """The weights of softmax attention behind the prefix, without gradient: (B, H, N - prefix, N)."""
    pattern: Pattern | Bound | None = None if key_valid is None else KeyValid().bind(key_valid=key_valid)
    return readout(q, k, None, pattern, what="rows", rows=range(prefix, q.shape[2]))


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    assert layer.bias is not None
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _check_choice(keep: float | None, threshold: float | None) -> None:
    if (keep is None) is (threshold is None):
        raise OptionError(
            f"keys are chosen by keep, a share of them, or by threshold, of the estimate: give one of the two, not keep="
            f"{keep} and threshold={threshold}"
        )
    if keep is not None and not 0 < keep <= 1:
        raise OptionError(f"keep is a share of the keys in (0, 1], not {keep}")
