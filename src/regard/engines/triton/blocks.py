"""Block-sparse attention on GPUs by kernels of its own: the normalisers that FlexAttention does not have.

Forward and backward over the tiles of a layout, as `chunks` does it in plain torch; accumulated in float32. Nothing
of size N x M but the gradient of a bias of that size. The sums have a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.engines import triton as home
from regard.engines.chunks import Gradients, Options, keeps_statistic
from regard.engines.dense import Call
from regard.patterns.layout import BlockLayout
from regard.primitives.normalisers import L1, Exp, Linear, Normaliser, ReLUOverN, Sigmoid, Softmax

if TYPE_CHECKING:
    from types import ModuleType

WIDEST = 256
LARGEST = 128
# bytes of a tile of keys and values up to which the next one is fetched while this one is worked on
AHEAD = 1 << 14


def cannot(call: Call) -> list[str]:
    """Why the kernels cannot run a call."""
    q, k, v = call.q, call.k, call.v
    reasons = home.cannot(q, k, v)
    for name, width in (("q and k", q.shape[3]), ("v", v.shape[3])):
        if width > WIDEST:
            reasons.append(f"the head width of {name} is {width}, more than {WIDEST}")
    if type(call.normaliser) not in (Softmax, Sigmoid, L1, ReLUOverN, Linear, Exp):
        reasons.append(f"there is no kernel for the normaliser {type(call.normaliser).__name__}")
    if call.indexed:
        reasons.append("there are biases read from tables: their gradients would need atomic additions")
    if isinstance(call.pattern, BlockLayout) and max(call.pattern.block_q, call.pattern.block_k) > LARGEST:
        reasons.append(
            f"the layout has blocks of {call.pattern.block_q} x {call.pattern.block_k}; kernels take up to {LARGEST}"
        )
    return reasons


def forward(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, options: Options) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, E), statistic (B, H, N) float32, or (0,) where the normaliser keeps none).

    The statistic is the log-sum-exp of a softmax, otherwise what each row was divided by.
    """
    launch = _Launch(q, k, v, layout, options)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    stat = q.new_empty(q.shape[:3], dtype=torch.float32) if launch.has_statistic else None
    sinks = options.sinks
    launch.over_queries(
        launch.kernels.forward, launch.q, launch.k, launch.v, out, stat, options.bias, sinks, options.seed,
        *launch.rows(), *launch.strides(launch.q, launch.k, launch.v, options.bias, sinks), launch.layout_strides(),
        *launch.numbers(), KIND=launch.kind, DIVISOR=launch.divisor,
    )  # fmt: skip
    return out, q.new_empty(0, dtype=torch.float32) if stat is None else stat


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: BlockLayout,
    options: Options,
) -> Gradients:
    """The gradients of `forward`, from its results; dlse is read for the softmax."""
    launch = _Launch(q, k, v, layout, options)
    batch, heads, n, _ = q.shape
    m, bias, sinks = k.shape[2], options.bias, options.sinks
    stat = lse if launch.has_statistic else None
    delta = dsinks = None
    if isinstance(options.normaliser, Softmax | L1):
        delta = (dout.float() * out.float()).sum(-1)
    if isinstance(options.normaliser, Softmax) and delta is not None:
        nothing = torch.isneginf(lse)
        # exp(score - inf) is 0: rows of nothing weigh nothing, and have no log-sum-exp to differentiate
        stat = lse.masked_fill(nothing, float("inf"))
        delta = delta - dlse.float().masked_fill(nothing, 0.0)
        if sinks is not None:
            share = torch.exp(sinks.float() - stat)
            dsinks = (-share * delta).sum_to_size(sinks.shape).to(sinks.dtype)
    dout = _with_rows(dout.to(q.dtype))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    # by the axes that a bias has: sums over the keys, sums over the queries, or the whole table
    learnt = bias if options.bias_grad else None
    by_row, by_column = learnt is not None and learnt.shape[3] == 1, learnt is not None and learnt.shape[2] == 1
    drow = q.new_empty(batch, heads, n, 1, dtype=torch.float32) if by_row else None
    dcol = q.new_empty(batch, heads, 1, m, dtype=torch.float32) if by_column and not by_row else None
    inputs = (launch.q, launch.k, launch.v, dout, stat, delta, bias, options.seed)
    strides = launch.strides(launch.q, launch.k, launch.v, dout, bias)
    launch.over_queries(
        launch.kernels.backward_queries, *inputs, dq, drow, *launch.rows(), *strides, launch.layout_strides(),
        *launch.numbers(), KIND=launch.kind,
    )  # fmt: skip
    launch.over_keys(
        launch.kernels.backward_keys, *inputs, dk, dv, dcol, *launch.columns(), *strides,
        launch.layout_strides(turned=True), *launch.numbers(), KIND=launch.kind,
    )  # fmt: skip
    dbias = drow if by_row else dcol
    if learnt is not None and dbias is None:
        dbias = torch.zeros(learnt.shape, dtype=torch.float32, device=q.device)
        members = (batch // learnt.shape[0], heads // learnt.shape[1])
        launch.over_bias(
            launch.kernels.backward_bias, *inputs, dbias, *launch.rows(), *strides, launch.layout_strides(), members,
            *launch.numbers(), KIND=launch.kind,
        )  # fmt: skip
    if learnt is not None and dbias is not None:
        dbias = dbias.sum_to_size(learnt.shape).to(learnt.dtype)
    return Gradients(dq, dk, dv, dbias, (), dsinks, None)


def _kind(normaliser: Normaliser, kernels: ModuleType) -> tuple[Any, Any, float]:
    """(what becomes of a score, what a row is divided by, the normaliser's number)."""
    if isinstance(normaliser, Sigmoid):
        return kernels.SIGMOID, kernels.NOTHING, normaliser.bias
    if isinstance(normaliser, L1):
        weigh = {"softplus": kernels.SOFTPLUS, "exp": kernels.EXP, "relu": kernels.RELU}[normaliser.phi]
        return weigh, kernels.SUM, normaliser.eps
    if isinstance(normaliser, ReLUOverN):
        return kernels.RELU, kernels.COUNT, 0.0
    kinds = {Softmax: kernels.SOFTMAX, Linear: kernels.LINEAR, Exp: kernels.EXP}
    return kinds[type(normaliser)], kernels.NOTHING, 0.0


class _Launch:
    """A call made ready for the kernels: what they all take."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, options: Options):
        from regard.engines.triton import block_kernels

        self.kernels, self.layout, self.options = block_kernels, layout, options
        self.q, self.k, self.v = (_with_rows(x) for x in (q, k, v))
        self.has_statistic = keeps_statistic(type(options.normaliser))
        self.kind, self.divisor, self.number = _kind(options.normaliser, block_kernels)
        self.sizes = {
            "D": q.shape[3], "E": v.shape[3], "BLOCK_Q": layout.block_q, "BLOCK_K": layout.block_k,
            "ROWS": home.lanes(layout.block_q), "KEYS": home.lanes(layout.block_k), "WIDE": home.lanes(q.shape[3]),
            "DEEP": home.lanes(v.shape[3]),
        }  # fmt: skip

    def rows(self) -> tuple[Tensor, ...]:
        return self.layout.crow, self.layout.col, self.layout.tile, self.layout.bits

    def columns(self) -> tuple[Tensor, ...]:
        return self.layout.crow_t, self.layout.row_t, self.layout.tile_t, self.layout.bits_t

    def strides(self, *tensors: Tensor | None) -> tuple[tuple[int, ...] | None, ...]:
        """0 along the axes that are broadcast."""
        return tuple(None if x is None else _strides(x) for x in tensors)

    def layout_strides(self, *, turned: bool = False) -> tuple[int, ...]:
        compressed = self.layout.crow_t if turned else self.layout.crow
        return *_strides(compressed)[:2], *_strides(self.layout.col)[:2]

    def numbers(self) -> tuple[Any, ...]:
        """sizes, scale, the normaliser's number, dropout."""
        heads, p = self.q.shape[1], self.options.dropout_p
        sizes = (self.q.shape[2], self.k.shape[2], heads, heads // self.k.shape[1], self.options.q_offset)
        dropout = None if self.options.seed is None or not p else (int(p * 2**32), 1 / (1 - p))
        return sizes, self.options.scale, self.number, dropout

    def over_queries(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        self._run(kernel, self.q.shape[0] * self.q.shape[1] * self._blocks_q(), arguments, constants)

    def over_keys(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        blocks = -(-self.k.shape[2] // self.layout.block_k)
        self._run(kernel, self.k.shape[0] * self.k.shape[1] * blocks, arguments, constants)

    def over_bias(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        bias = self.options.bias
        slabs = 0 if bias is None else bias.shape[0] * bias.shape[1]
        self._run(kernel, slabs * self._blocks_q(), arguments, constants)

    def _blocks_q(self) -> int:
        return -(-self.q.shape[2] // self.layout.block_q)

    def _run(self, kernel: Any, programs: int, arguments: Any, constants: Any) -> None:
        sizes = self.sizes
        tile = max(sizes["ROWS"], sizes["KEYS"]) * (sizes["WIDE"] + sizes["DEEP"]) * self.q.element_size()
        home.run(
            self.q, kernel, programs, *arguments, **constants, **sizes,
            num_warps=4 if max(sizes["WIDE"], sizes["DEEP"]) <= 64 else 8, num_stages=2 if tile <= AHEAD else 1,
        )  # fmt: skip


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
