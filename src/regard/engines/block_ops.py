"""The opaque operators of block-sparse attention, and the differentiable functions around them.

`regard::block_sparse_forward` and `regard::block_sparse_backward` see plain tensors and numbers only, so that
torch.compile, export and meta tensors go through; the body turns the pattern's integers into a layout.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regard.contract.errors import Unsupported
from regard.engines import chunks, native_blocks
from regard.engines.precision import accumulator, without_autocast
from regard.engines.triton import blocks as triton_blocks
from regard.patterns.algebra import Bound, Pattern, decode
from regard.patterns.layout import BlockLayout
from regard.patterns.selection import BlockSelection, TokenSelection
from regard.primitives.biases import Indexed
from regard.primitives.normalisers import (
    L1,
    Exp,
    Grouped,
    Linear,
    Normaliser,
    ReLUOverN,
    Sharpen,
    Sigmoid,
    Softmax,
)

# what may travel into the operators, by place
NORMALISERS: tuple[type[Normaliser], ...] = (Softmax, Sigmoid, L1, ReLUOverN, Linear, Exp, Grouped, Sharpen)
WAYS = ("torch", "native", "gather", "triton")
PATTERN, LAYOUT, BLOCKS, TOKENS = range(4)
# bound layouts that are remembered, for the backward pass and for the next layer with the same padding
REMEMBERED = 8

LIBRARY = torch.library.Library("regard", "FRAGMENT")
LIBRARY.define(
    "block_sparse_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? seed, Tensor[] tables, "
    "Tensor[] data, SymInt[] code, float[] numbers, float? scale) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "block_sparse_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? bias, Tensor? sinks, Tensor? seed, Tensor[] tables, Tensor[] data, SymInt[] code, float[] numbers, "
    "float? scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])"
)
_forward_op = torch.ops.regard.block_sparse_forward.default
_backward_op = torch.ops.regard.block_sparse_backward.default


@dataclass(frozen=True, eq=False)
class Parcel:
    """A call as it travels: tensors that carry gradients apart, everything else as integers and numbers.

    tables: of the indexed biases, then the bias of a token selection. data: two index rows for every indexed bias, then
    the pattern's. code: way, normaliser (length and places), q_offset, number of indexed biases, whether the bias has a
    gradient, kind of the pattern, its code. numbers: dropout_p, then the fields of the normaliser.
    """

    bias: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    tables: tuple[Tensor, ...]
    data: tuple[Tensor, ...]
    code: tuple[int, ...]
    numbers: tuple[float, ...]
    scale: float | None


def pack(
    way: str,
    pattern: Pattern | Bound | BlockLayout | BlockSelection | TokenSelection,
    *,
    bias: Tensor | None,
    indexed: Sequence[Indexed],
    sinks: Tensor | None,
    normaliser: Normaliser,
    scale: float | None,
    q_offset: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Parcel:
    """A call as it travels; bias and sinks have all their axes."""
    kind, code, data = _pack_pattern(pattern)
    tables = tuple(term.table for term in indexed)
    if isinstance(pattern, TokenSelection) and pattern.bias is not None:
        tables = (*tables, pattern.bias)
    index = tuple(row for term in indexed for row in (term.key_index, term.query_index))
    which, numbers = pack_normaliser(normaliser)
    learns = int(_differentiates(bias))
    head = (WAYS.index(way), len(which), *which, q_offset, len(indexed), learns, kind)
    return Parcel(bias, sinks, seed, tables, (*index, *data), (*head, *code), (dropout_p, *numbers), scale)


def attend(q: Tensor, k: Tensor, v: Tensor, parcel: Parcel) -> tuple[Tensor, Tensor]:
    """(out, statistic) with gradients where there may be any."""
    p = parcel
    if not _differentiates(q, k, v, p.bias, p.sinks, *p.tables):
        return _forward_op(
            q, k, v, p.bias, p.sinks, p.seed, list(p.tables), list(p.data), list(p.code), list(p.numbers), p.scale
        )
    return _Attend.apply(  # type: ignore[no-untyped-call]
        q, k, v, p.bias, p.sinks, p.seed, p.code, p.numbers, p.scale, len(p.tables), *p.tables, *p.data
    )


def pack_normaliser(normaliser: Normaliser) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The places of a normaliser and of the one inside it, and all their fields as numbers."""
    which: tuple[int, ...] = (NORMALISERS.index(type(normaliser)),)
    numbers: tuple[float, ...] = ()
    if isinstance(normaliser, Sigmoid):
        numbers = (normaliser.bias,)
    elif isinstance(normaliser, L1):
        numbers = (float(("softplus", "exp", "relu").index(normaliser.phi)), normaliser.eps)
    elif isinstance(normaliser, Grouped):
        numbers = (float(normaliser.block),)
    elif isinstance(normaliser, Sharpen):
        inner, more = pack_normaliser(normaliser.inner)
        which = which + inner
        numbers = (normaliser.power, normaliser.offset, float(normaliser.free_rows), normaliser.eps, *more)
    return which, numbers


def unpack_normaliser(which: Sequence[int], numbers: Sequence[float]) -> Normaliser:
    """The normaliser of its places and numbers."""
    kind = NORMALISERS[which[0]]
    if kind is Sigmoid:
        return Sigmoid(numbers[0])
    if kind is L1:
        return L1(("softplus", "exp", "relu")[int(numbers[0])], numbers[1])
    if kind is Grouped:
        return Grouped(int(numbers[0]))
    if kind is Sharpen:
        power, offset, free_rows, eps, *more = numbers
        return Sharpen(unpack_normaliser(which[1:], more), power, offset, int(free_rows), eps)
    return kind()


def _pack_pattern(pattern: Any) -> tuple[int, tuple[int, ...], tuple[Tensor, ...]]:
    if isinstance(pattern, BlockLayout):
        layout = pattern
        sizes = (layout.block_q, layout.block_k, layout.n, layout.m, layout.q_offset)
        return LAYOUT, sizes, tuple(getattr(layout, name) for name in _LAYOUT_TENSORS)
    if isinstance(pattern, BlockSelection | TokenSelection):
        force, force_data = _pack_value(pattern.force)
        within, within_data = _pack_value(pattern.within)
        code = (len(force), *force, *within)
        data = (pattern.indices, *force_data, *within_data)
        if isinstance(pattern, TokenSelection):
            return TOKENS, code, data
        return BLOCKS, (pattern.block_q, pattern.block_k, *code), data
    return PATTERN, *_pack_value(pattern)


def _pack_value(pattern: Pattern | Bound | None) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    if pattern is None:
        return (), ()
    if isinstance(pattern, Bound):
        return pattern.pattern.code(), tuple(pattern.data[name] for name in pattern.pattern.needs)
    return pattern.code(), ()


_LAYOUT_TENSORS = ("crow", "col", "tile", "bits", "bits_t", "crow_t", "row_t", "tile_t")
_decode = lru_cache(maxsize=512)(decode)


def _unpack_value(code: tuple[int, ...], data: Sequence[Tensor]) -> Pattern | Bound:
    pattern = _decode(code)
    return pattern.bind(**dict(zip(pattern.needs, data, strict=True))) if pattern.needs else pattern


def _unpack_pattern(kind: int, code: tuple[int, ...], data: Sequence[Tensor]) -> Any:
    if kind == LAYOUT:
        return BlockLayout(*code, *data)  # type: ignore[arg-type]
    if kind == PATTERN:
        return _unpack_value(code, data)
    blocks, code = (code[:2], code[2:]) if kind == BLOCKS else ((), code)
    force, within = code[1 : 1 + code[0]], code[1 + code[0] :]
    split = 1 + (len(_decode(force).needs) if force else 0)
    limits = (
        _unpack_value(force, data[1:split]) if force else None,
        _unpack_value(within, data[split:]) if within else None,
    )
    if kind == TOKENS:
        return TokenSelection(data[0], None, *limits)
    return BlockSelection(blocks[0], blocks[1], data[0], None, *limits)


def _layout(
    kind: int,
    code: tuple[int, ...],
    data: Sequence[Tensor],
    n: int,
    m: int,
    q_offset: int,
    heads: int,
    device: torch.device,
) -> BlockLayout:
    """The layout of a call; those with data are remembered while the same tensors are alive and unwritten."""
    if kind == LAYOUT:
        return BlockLayout(*code, *data).to(device)  # type: ignore[arg-type]
    if not data:
        layout: BlockLayout = _unpack_value(code, data).layout(n, m, q_offset=q_offset, device=device)
        return layout
    key = (kind, code, n, m, q_offset, heads, device, *(id(t) for t in data))
    found = _remembered.get(key)
    if found is not None:
        held, versions, layout = found
        if all(h() is t and v == t._version for h, v, t in zip(held, versions, data, strict=True)):
            _remembered.move_to_end(key)
            return layout
    pattern = _unpack_pattern(kind, code, data)
    if kind == PATTERN:
        layout = pattern.layout(n, m, q_offset=q_offset, device=device)
    else:
        layout = pattern.to_layout(n, m, q_offset=q_offset, heads=heads).to(device)
    _remembered[key] = tuple(weakref.ref(t) for t in data), tuple(t._version for t in data), layout
    while len(_remembered) > REMEMBERED:
        _remembered.popitem(last=False)
    return layout


_remembered: OrderedDict[Any, tuple[Any, Any, BlockLayout]] = OrderedDict()


def _open(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    tables: Sequence[Tensor],
    data: Sequence[Tensor],
    code: Sequence[int],
    numbers: Sequence[float],
    scale: float | None,
) -> tuple[str, Any, chunks.Options]:
    """(way, layout or token selection, options) on the inside of an operator."""
    way, length, *rest = (int(c) for c in code)
    which, (q_offset, count, learns, kind, *written) = rest[:length], rest[length:]
    options = chunks.Options(
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        q_offset=q_offset,
        normaliser=unpack_normaliser(which, numbers[1:]),
        bias=bias,
        indexed=tuple(Indexed(t, data[2 * i], data[2 * i + 1]) for i, t in enumerate(tables[:count])),
        sinks=sinks,
        selected=tables[count] if len(tables) > count else None,
        dropout_p=numbers[0],
        seed=seed,
        bias_grad=bool(learns),
    )
    if WAYS[way] == "gather":
        return "gather", _unpack_pattern(kind, tuple(written), data[2 * count :]), options
    layout = _layout(kind, tuple(written), data[2 * count :], q.shape[2], k.shape[2], q_offset, q.shape[1], q.device)
    return WAYS[way], layout, options


def _work(way: str, q: Tensor, k: Tensor, v: Tensor, keys: Any, options: chunks.Options) -> chunks.Work:
    if way == "gather":
        return chunks.RowWork(q, k, v, keys.indices, keys.force, keys.within, options)
    return chunks.TileWork(q, k, v, keys, options)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    tables: list[Tensor],
    data: list[Tensor],
    code: list[int],
    numbers: list[float],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    with without_autocast(q.device):
        way, keys, options = _open(q, k, v, bias, sinks, seed, tables, data, code, numbers, scale)
        if way == "native":
            return native_blocks.forward(q, k, v, keys, options)
        if way == "triton":
            return triton_blocks.forward(q, k, v, keys, options)
        return chunks.forward(_work(way, q, k, v, keys, options))


def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    tables: list[Tensor],
    data: list[Tensor],
    code: list[int],
    numbers: list[float],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    with without_autocast(q.device):
        way, keys, options = _open(q, k, v, bias, sinks, seed, tables, data, code, numbers, scale)
        if way == "native":
            grads = native_blocks.backward(dout, dlse, q, k, v, out, lse, keys, options)
        elif way == "triton":
            grads = triton_blocks.backward(dout, dlse, q, k, v, out, lse, keys, options)
        else:
            grads = chunks.backward(_work(way, q, k, v, keys, options), dout, dlse, out, lse)
    dbias = q.new_empty(0) if grads.bias is None else grads.bias
    dsinks = q.new_empty(0) if grads.sinks is None else grads.sinks
    selected = () if grads.selected is None else (grads.selected,)
    return grads.q, grads.k, grads.v, dbias, dsinks, [*grads.tables, *selected]


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    tables: list[Tensor],
    data: list[Tensor],
    code: list[int],
    numbers: list[float],
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = q.shape
    kept = code[2] in _KEEP
    shape = (batch, heads, n) if kept else (0,)
    return q.new_empty(batch, heads, n, v.shape[3]), q.new_empty(shape, dtype=accumulator(q.dtype))


_KEEP = tuple(i for i, kind in enumerate(NORMALISERS) if chunks.keeps_statistic(kind))


def _backward_fake(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    tables: list[Tensor],
    data: list[Tensor],
    code: list[int],
    numbers: list[float],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias = bias.new_empty(bias.shape) if bias is not None and _learns(code) else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return dq, dk, dv, dbias, dsinks, [t.new_empty(t.shape) for t in tables]


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("block_sparse_forward", _forward, _device)
    LIBRARY.impl("block_sparse_backward", _backward, _device)
torch.library.register_fake("regard::block_sparse_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("regard::block_sparse_backward", _backward_fake, lib=LIBRARY)


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether a derivative of any kind may be asked for; without one the operator is called as it is."""
    if torch.compiler.is_compiling():
        transformed = False
    else:
        transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return transformed or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


_ONCE = "block_sparse has first derivatives only; use engine='reference' for second derivatives and forward mode"


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, bias, sinks, seed, code, numbers, scale, count, *rest):  # type: ignore[no-untyped-def]
        return _forward_op(
            q, k, v, bias, sinks, seed, list(rest[:count]), list(rest[count:]), list(code), list(numbers), scale
        )

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, bias, sinks, seed, code, numbers, scale, count, *rest = inputs
        out, lse = output
        if NORMALISERS[code[2]] is not Softmax:
            ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, bias, sinks, seed, *rest)
        ctx.rest = code, numbers, scale, count

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        code, numbers, scale, count = ctx.rest
        q, k, v, out, lse, bias, sinks, seed, *rest = ctx.saved_tensors
        # torch.compile refuses second derivatives itself, and miscounts the arguments of a function inside a backward
        run = _AttendBackward.forward if torch.compiler.is_compiling() else _AttendBackward.apply
        dq, dk, dv, dbias, dsinks, *dtables = run(
            dout, dlse, q, k, v, out, lse, bias, sinks, seed, code, numbers, scale, count, *rest
        )
        nothing = (None,) * (len(rest) - count)
        return (
            dq, dk, dv, dbias if bias is not None and _learns(code) else None, None if sinks is None else dsinks,
            None, None, None, None, None, *dtables, *nothing,
        )  # fmt: skip

    @staticmethod
    def vmap(info, dims, q, k, v, bias, sinks, seed, code, numbers, scale, count, *rest):  # type: ignore[no-untyped-def]
        fold = _Fold(info.batch_size, dims, _batch(q, dims[0]))
        tables, data = fold.tables(rest, count, 10), fold.data(rest, count, 10, code)
        out, lse = _Attend.apply(
            fold(q, 0, whole=True), fold(k, 1, whole=True), fold(v, 2, whole=True), fold(bias, 3), fold(sinks, 4),
            fold.shared(seed, 5), code, numbers, scale, count, *tables, *data,
        )  # fmt: skip
        if not lse.dim() > 1:
            return (fold.out(out), lse), (0, None)
        return (fold.out(out), fold.out(lse)), (0, 0)


class _AttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, bias, sinks, seed, code, numbers, scale, count, *rest):  # type: ignore[no-untyped-def]
        *grads, dtables = _backward_op(
            dout, dlse, q, k, v, out, lse, bias, sinks, seed, list(rest[:count]), list(rest[count:]), list(code),
            list(numbers), scale,
        )  # fmt: skip
        return (*grads, *dtables)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        raise Unsupported(_ONCE)

    @staticmethod
    def vmap(  # type: ignore[no-untyped-def]
        info, dims, dout, dlse, q, k, v, out, lse, bias, sinks, seed, code, numbers, scale, count, *rest
    ):
        fold = _Fold(info.batch_size, dims, _batch(q, dims[2]))
        main = [fold(x, i, whole=True) for i, x in enumerate((dout, dlse, q, k, v, out, lse)) if i not in (1, 6)]
        if lse.dim() == 1:
            kept = [dlse, lse]
        else:
            kept = [fold(dlse, 1, whole=True), fold(lse, 6, whole=True)]
        # every element of the vmapped axis has gradients of its own, so nothing may be shared among them
        tables = fold.tables(rest, count, 14, whole=True)
        grads = _AttendBackward.apply(
            main[0], kept[0], *main[1:], kept[1], fold(bias, 7, whole=True), fold(sinks, 8, whole=True),
            fold.shared(seed, 9), code, numbers, scale, count, *tables, *fold.data(rest, count, 14, code),
        )  # fmt: skip
        learnt = bias if _learns(code) else None
        owners = ((q, 2), (k, 3), (v, 4), (learnt, 7), (sinks, 8), *((t, 14 + i) for i, t in enumerate(rest[:count])))
        results: list[Any] = []
        out_dims: list[int | None] = []
        for grad, (owner, place) in zip(grads, owners, strict=True):
            if owner is None:
                results.append(grad)
                out_dims.append(None)
                continue
            split = fold.out(grad)
            if _batch(owner, dims[place]) == 1:
                split = split.sum(1, keepdim=True)
            results.append(split)
            out_dims.append(0)
        return tuple(results), tuple(out_dims)


def _learns(code: Sequence[int]) -> bool:
    """Whether the bias of a call is to have a gradient."""
    return bool(code[2 + code[1] + 2])


def _batch(x: Tensor, dim: int | None) -> int:
    """The size of the batch axis, the vmapped one not counted."""
    return x.shape[1 if dim == 0 else 0]


class _Fold:
    """Folds the vmapped axis into the batch."""

    def __init__(self, size: int, dims: Sequence[int | None], batch: int):
        self.size, self.dims, self.batch = size, dims, batch

    def __call__(self, x: Tensor | None, place: int, *, whole: bool = False) -> Tensor | None:
        """whole: also where one batch row would do for all."""
        if x is None:
            return None
        dim = self.dims[place]
        if dim is None:
            if x.shape[0] == 1 and not whole:
                return x
            x = x.expand(self.size, *x.shape)
        else:
            x = x.movedim(dim, 0)
        return x.expand(self.size, self.batch, *x.shape[2:]).reshape(self.size * self.batch, *x.shape[2:])

    def shared(self, x: Tensor | None, place: int) -> Tensor | None:
        """What has no batch axis."""
        if x is not None and self.dims[place] is not None:
            raise Unsupported(
                "block_sparse cannot vmap over seeds, index rows or layouts: they must be the same for all; use "
                "engine='reference'"
            )
        return x

    def tables(self, rest: Sequence[Tensor], count: int, first: int, *, whole: bool = False) -> list[Tensor]:
        found = [self(x, first + i, whole=whole) for i, x in enumerate(rest[:count])]
        return [t for t in found if t is not None]

    def data(self, rest: Sequence[Tensor], count: int, first: int, code: Sequence[int]) -> list[Tensor]:
        # behind the normaliser's places: q_offset, number of indexed biases, whether the bias learns, kind of the pattern
        indexed, kind = code[2 + code[1] + 1], code[2 + code[1] + 3]
        found = []
        for place, x in enumerate(rest[count:]):
            index_row = place < 2 * indexed
            bits = kind == LAYOUT and place - 2 * indexed in (3, 4)
            if index_row or bits or (kind == LAYOUT and self.dims[first + count + place] is not None):
                found.append(self.shared(x, first + count + place))
            else:
                found.append(self(x, first + count + place))
        return [t for t in found if t is not None]

    def out(self, x: Tensor) -> Tensor:
        return x.reshape(self.size, self.batch, *x.shape[1:])
