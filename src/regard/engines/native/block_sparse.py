"""Block-sparse attention on the CPU: plain tensors in and out, no autograd.

    s = scale q k' + bias + indexed ; masked by the layout ; weights = normaliser(s) ; dropout ; out = weights v

What `lse` holds depends on the normaliser. Softmax: the log-sum-exp, -inf for a row without keys. L1: what the row was
divided by. ReLUOverN: the number of visible keys, at least 1. The others: there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import ShapeError, Unsupported
from regard.engines import native
from regard.engines.native.abi import DTYPES, INDEXED, Problem
from regard.primitives.normalisers import L1, Linear, Normaliser, ReLUOverN, Sigmoid, Softmax

TILE = 64
WIDEST = 256
_L1 = {"softplus": 2, "exp": 3, "relu": 4}


def cannot(q: Tensor, k: Tensor, v: Tensor, normaliser: Normaliser | None = None) -> list[str]:
    """Why the kernels cannot run such a call; tensors without data are taken to stand for some on the CPU."""
    missing = native.missing()
    reasons = [missing] if missing else []
    reasons += native.outside(q, k, v, WIDEST)
    if normaliser is not None and type(normaliser) not in (Softmax, Sigmoid, L1, ReLUOverN, Linear):
        reasons.append(f"there is no kernel for the normaliser {type(normaliser).__name__}")
    return reasons


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Any,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    indexed: Sequence[Any] = (),
    normaliser: Normaliser | None = None,
    sinks: Tensor | None = None,
    dropout: tuple[float, int] = (0.0, 0),
    isa: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out (B, H, N, E) in q's dtype, lse (B, H, N) float32 or None; see the module for what it holds).

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); float32, bfloat16 or float16. layout: a BlockLayout of blocks of
    64 x 64. scale: D^-1/2 if None. bias: broadcastable to (B, H, N, M). indexed: tables, see `Indexed`. sinks:
    broadcastable to (B, H, N), Softmax only. dropout: (p, seed). isa: the instruction set, the best if None.
    Raises ShapeError, Unsupported.
    """
    call = _Call(q, k, v, layout, scale, bias, indexed, normaliser, sinks, dropout, isa)
    width = v.shape[-1]
    out = q.new_empty(*q.shape[:-1], call.v.shape[-1])
    lse = torch.empty(q.shape[:-1]) if call.has_statistic else None
    if out.numel():
        problem = call.problem(out, lse)
        native.check(native.library().regard_forward(problem))
    return out[..., :width], lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    layout: Any,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    indexed: Sequence[Any] = (),
    normaliser: Normaliser | None = None,
    sinks: Tensor | None = None,
    dropout: tuple[float, int] = (0.0, 0),
    bias_grad: bool = True,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[Tensor, ...], Tensor | None]:
    """(dq, dk, dv, dbias, d of each indexed table, dsinks), each in the dtype and the shape of its tensor.

    dout (B, H, N, E), dlse (B, H, N) or None: the gradients of what `forward` returned; out, lse: what it returned.
    bias_grad: whether the bias has a gradient. The other arguments are those of the call. Sums have the same order
    whatever the number of threads.
    """
    call = _Call(q, k, v, layout, scale, bias, indexed, normaliser, sinks, dropout, isa)
    if dlse is not None and not isinstance(call.normaliser, Softmax):
        raise Unsupported(f"{type(call.normaliser).__name__} has no log-sum-exp to differentiate")
    e = v.shape[-1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
    dbias, dtables, dsinks = call.gradients(bias if bias_grad else None, indexed, sinks)
    problem = call.problem(_padded(_contiguous_rows(out), e), lse)
    problem_out = _padded(_contiguous_rows(dout.to(q.dtype)), e)
    if not q.numel() or not k.numel():
        for x in (dq, dk, dv):
            x.zero_()
    else:
        _set(problem, dout=problem_out, dq=dq, dk=dk, dv=dv)
        problem.dos[:] = problem_out.stride()[:3]
        delta = torch.empty(q.shape[:-1]) if sinks is not None else None
        wanted = None if dlse is None else dlse.float().contiguous()
        _set(problem, dlse=wanted, delta=delta)
        native.check(native.library().regard_backward(problem))
        if delta is not None and sinks is not None and lse is not None:
            weight = torch.exp(sinks.float() - lse)
            dsinks = _reduced(-(weight * delta).nan_to_num(0.0), sinks)
    d = q.shape[-1]
    return (
        dq[..., :d],
        dk[..., :d],
        dv[..., :e],
        None if dbias is None or bias is None else _reduced(dbias, bias),
        tuple(_reduced(g, x.table) for g, x in zip(dtables, indexed, strict=True)),
        dsinks,
    )


class _Call:
    """A call made ready: rows contiguous, head widths padded to what the kernels take, codes for options."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Any,
        scale: float | None,
        bias: Tensor | None,
        indexed: Sequence[Any],
        normaliser: Normaliser | None,
        sinks: Tensor | None,
        dropout: tuple[float, int],
        isa: str | None,
    ) -> None:
        reasons = cannot(q, k, v, normaliser)
        if sinks is not None and not isinstance(normaliser or Softmax(), Softmax):
            reasons.append("sinks belong to Softmax")
        if len(indexed) > INDEXED:
            reasons.append(f"there are {len(indexed)} indexed biases, more than {INDEXED}")
        native.refuse("block-sparse kernels", reasons, q)
        _check(q, k, v, layout)
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.q, self.k, self.v = (_padded(_contiguous_rows(x), x.shape[-1]) for x in (q, k, v))
        self.normaliser = normaliser or Softmax()
        self.layout, self.dropout = layout, dropout
        self.isa = native.isa_code(isa)
        # what the problem points to must live as long as the call
        self.bias = None if bias is None else _table(bias)
        self.sinks = None if sinks is None else sinks.float()
        self.tables = [x.table.float().contiguous() for x in indexed]
        self.indices = [(x.key_index.int().contiguous(), x.query_index.int().contiguous()) for x in indexed]
        self.dbias: Tensor | None = None
        self.dtables: tuple[Tensor, ...] = ()

    @property
    def has_statistic(self) -> bool:
        return isinstance(self.normaliser, (Softmax, L1, ReLUOverN))

    def gradients(
        self, bias: Tensor | None, indexed: Sequence[Any], sinks: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...], Tensor | None]:
        """Zeroed sums for the gradients of biases, tables and sinks."""
        batch, heads = self.q.shape[:2]
        if bias is not None:
            rows, columns = _four(bias).shape[2:]
            whole = rows > 1 and columns > 1
            # sums over batch and heads: in place for whole tables, afterwards for a row or a column
            self.dbias = torch.zeros(_four(bias).shape if whole else (batch, heads, rows, columns))
        self.dtables = tuple(torch.zeros(batch, heads, *x.table.shape[2:]) for x in indexed)
        return self.dbias, self.dtables, None if sinks is None else torch.zeros_like(sinks)

    def problem(self, out: Tensor, lse: Tensor | None) -> Problem:
        q, k, v, layout = self.q, self.k, self.v, self.layout
        self.kept = (out, lse)
        batch, heads, n, d = q.shape
        problem = Problem(
            batch=batch, heads=heads, groups=k.shape[1], n=n, m=k.shape[2], d=d, e=v.shape[-1],
            q_offset=layout.q_offset, layout_batch=layout.crow.shape[0], layout_heads=layout.crow.shape[1],
            entries=layout.col.shape[-1], scale=self.scale, dtype=DTYPES[q.dtype], isa=self.isa,
            threads=native.threads(), dropout=self.dropout[0], seed=self.dropout[1] & (2**64 - 1),
        )  # fmt: skip
        _set(problem, q=q, k=k, v=v, out=out, lse=lse)
        for name, tensor in (("qs", q), ("ks", k), ("vs", v), ("os", out)):
            getattr(problem, name)[:] = tensor.stride()[:3]
        for name in ("crow", "col", "tile", "bits", "bits_t"):
            setattr(problem, name, getattr(layout, name).data_ptr())
        problem.normaliser, problem.parameter = _code(self.normaliser)
        if self.bias is not None:
            problem.bias, problem.bias_dtype = self.bias.data_ptr(), DTYPES[self.bias.dtype]
            problem.bias_strides[:] = _strides(self.bias)
        if self.dbias is not None:
            problem.dbias = self.dbias.data_ptr()
            problem.dbias_strides[:] = _strides(self.dbias)
            problem.one_by_one = int(self.dbias.shape[:2] != (batch, heads))
        if self.sinks is not None:
            problem.sinks = self.sinks.data_ptr()
            problem.sink_strides[:] = _strides(self.sinks.expand(batch, heads, n))
        problem.indexed_count = len(self.tables)
        for at, (table, (key, query)) in enumerate(zip(self.tables, self.indices, strict=True)):
            entry = problem.indexed[at]
            _set(entry, table=table, key=key, query=query)
            entry.strides[:] = _strides(table)[:3]
            entry.size = table.shape[-1]
            entry.low, entry.high = map(int, key.aminmax()) if key.numel() else (0, 0)
            if self.dtables:
                entry.grad = self.dtables[at].data_ptr()
                entry.grad_strides[:] = _strides(self.dtables[at])[:3]
        return problem


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> None:
    batch, heads, n, d = q.shape
    groups, m = k.shape[1], k.shape[2]
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or k.shape[-1] != d or groups == 0 or heads % groups:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (B, H, N, D), (B, G, M, D), "
            "(B, G, M, E) with H a multiple of G"
        )
    if (layout.block_q, layout.block_k) != (TILE, TILE):
        raise Unsupported(f"the native kernels take blocks of 64 x 64, not {layout.block_q} x {layout.block_k}")
    if (layout.n, layout.m) != (n, m):
        raise ShapeError(f"the layout is for {layout.n} queries and {layout.m} keys; there are {n} and {m}")
    if layout.crow.shape[0] not in (1, batch) or layout.crow.shape[1] not in (1, heads):
        raise ShapeError(
            f"the layout is for batch {layout.crow.shape[0]} and {layout.crow.shape[1]} heads; q is {tuple(q.shape)}"
        )


def _code(normaliser: Normaliser) -> tuple[int, float]:
    if isinstance(normaliser, Sigmoid):
        return 1, normaliser.bias
    if isinstance(normaliser, L1):
        return _L1[normaliser.phi], normaliser.eps
    return {Softmax: 0, ReLUOverN: 5, Linear: 6}[type(normaliser)], 0.0


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _padded(x: Tensor, width: int) -> Tensor:
    # products have rows of whole vectors; zeros change neither scores nor sums
    missing = -width % 16 - (x.shape[-1] - width)
    return F.pad(x, (0, missing)) if missing else x


def _four(x: Tensor) -> Tensor:
    return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


def _table(x: Tensor) -> Tensor:
    # halves are read as they are where there are many: a whole table, row by row
    whole = x.dtype in DTYPES and x.dim() > 1 and 1 not in x.shape[-2:] and x.stride(-1) == 1
    return _four(x if whole else x.float())


def _strides(x: Tensor) -> list[int]:
    # an axis of one is broadcast
    return [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]


def _set(structure: Any, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        setattr(structure, name, None if tensor is None else tensor.data_ptr())


def _reduced(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient summed over the axes along which its tensor was broadcast."""
    return gradient.sum_to_size(like.shape).to(like.dtype)
