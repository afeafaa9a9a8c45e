"""What travels between the processes that share a sequence, and which positions each of them holds.

    contiguous: process r of P holds chunk r of P        zigzag: chunks r and 2P-1-r of 2P, which evens out causal work

Every function takes a process group. None is the default group, or one process alone where torch.distributed has not
been initialised. One process sends nothing. All processes of a group make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regard.contract.errors import OptionError, RegardError, ShapeError
from regard.engines.precision import accumulator

Group: TypeAlias = dist.ProcessGroup | None
Layout = Literal["contiguous", "zigzag"]


class PeerLost(RegardError, RuntimeError):
    """An exchange that did not complete: another process ended, was too slow, or sent something of another size."""


@dataclass(frozen=True)
class Piece:
    """Tokens that stand together. at: where they begin in the local tensor; start: in the whole sequence."""

    at: int
    start: int
    length: int


def place(group: Group = None) -> tuple[int, int]:
    """(rank in the group, size of the group). Raises OptionError for a process that is not in the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = -1 if group is dist.GroupMember.NON_GROUP_MEMBER else dist.get_rank(group)
    if rank < 0:
        raise OptionError(
            f"process {dist.get_rank()} is not in the group: call this only on the processes that new_group was given"
        )
    return rank, dist.get_world_size(group)


def pieces(length: int, rank: int, size: int, layout: Layout = "contiguous") -> tuple[Piece, ...]:
    """What process `rank` holds of a sequence of which every process holds `length` tokens.

    Raises OptionError for an unknown layout; ShapeError for a zigzag of an odd or empty length.
    """
    if layout == "contiguous":
        return (Piece(0, rank * length, length),)
    if layout != "zigzag":
        raise OptionError(f"layout is {layout!r}; it is 'contiguous' or 'zigzag'")
    if length < 2 or length % 2:
        raise ShapeError(
            f"a zigzag gives every process two chunks of equal length; {length} tokens a process do not divide so: "
            f"the sequence must be a multiple of {2 * size} tokens, at least {2 * size}"
        )
    half = length // 2
    return Piece(0, rank * half, half), Piece(half, (2 * size - 1 - rank) * half, half)


def positions_of(held: Sequence[Piece]) -> Tensor:
    """The positions of all tokens of some pieces, in their order: int64."""
    return torch.cat([torch.arange(p.start, p.start + p.length) for p in held])


def position_ids(n: int, group: Group = None, layout: Layout = "contiguous") -> Tensor:
    """The positions in a sequence of n tokens that this process holds: int64 (n / P,). Raises as `shard`."""
    rank, size = place(group)
    return positions_of(pieces(_share(n, size, layout), rank, size, layout))


def shard(x: Tensor, dim: int = 2, group: Group = None, layout: Layout = "contiguous") -> Tensor:
    """This process's part of a tensor that every process holds whole, cut along `dim`.

    Raises ShapeError for a length that does not divide: pad at the end and hide the padding by key_valid=.
    """
    return x.index_select(dim, position_ids(x.shape[dim], group, layout).to(x.device))


def unshard(x: Tensor, dim: int = 2, group: Group = None, layout: Layout = "contiguous") -> Tensor:
    """The whole tensor on every process, from parts of equal shape; the gradient sums what all processes make of it."""
    _, size = place(group)
    dim = dim % x.dim()
    agree({f"sizes of axis {axis}": extent for axis, extent in enumerate(x.shape)}, group)
    order = torch.cat([positions_of(pieces(x.shape[dim], r, size, layout)) for r in range(size)])
    whole: Tensor = _Gather.apply(x.movedim(dim, 0), group)  # type: ignore[no-untyped-call]
    return whole.flatten(0, 1).index_select(0, order.argsort().to(x.device)).movedim(0, dim)


def agree(facts: dict[str, int], group: Group = None) -> None:
    """Raise ShapeError unless all processes have the same facts, by one all-gather; what was agreed is not asked again.

    facts: name in the plural -> number, at most 16. A process that asks alone waits until the group's timeout.
    """
    _, size = place(group)
    if size == 1:
        return
    known = _agreed.setdefault(dist.group.WORLD if group is None else group, set())
    key = tuple(facts.items())
    if key in known:
        return
    # of one length, whatever a process has to say
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    said = torch.tensor([*facts.values(), *[-1] * (_FACTS - len(facts))], device=device)
    table = torch.stack(gather(said, group))
    for column, name in enumerate(facts):
        values = table[:, column].tolist()
        if len(set(values)) > 1:
            raise ShapeError(
                f"{name} differ across ranks: {', '.join(map(str, values))}; every process must hold the same"
            )
    known.add(key)


_FACTS = 16
_agreed: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


class Exchange:
    """Tensors on their way round the ring. wait: what came in, once it is all there."""

    def __init__(self, received: list[Tensor], works: list[Any], doing: str, group: Group):
        self._received, self._works, self._doing, self._group = received, works, doing, group

    def wait(self) -> list[Tensor]:
        """Raises PeerLost."""
        with _reporting(self._doing, self._group):
            for work in self._works:
                work.wait()
        return self._received


def ring_exchange(tensors: Sequence[Tensor], group: Group = None, *, step: int = 1, tag: int = 0) -> Exchange:
    """Send tensors to rank + step and receive as many of the same shapes from rank - step, in one batch.

    step: how many ranks further round the ring. tag: the first tag; exchanges that overlap in time have tags apart.
    Other work may be done before `wait`; the tensors must stay as they are until then. Raises PeerLost.
    """
    rank, size = place(group)
    if step % size == 0:
        return Exchange(list(tensors), [], "", group)
    sent = [t.contiguous() for t in tensors]
    received = [torch.empty_like(t) for t in sent]
    there, back = (rank + step) % size, (rank - step) % size
    # all sends before all receives on every process: with two processes there and back are the same
    batch = [dist.P2POp(dist.isend, t, None, group, tag + i, there) for i, t in enumerate(sent)]
    batch += [dist.P2POp(dist.irecv, t, None, group, tag + i, back) for i, t in enumerate(received)]
    doing = f"sending to rank {there} and receiving from rank {back}"
    with _reporting(doing, group):
        return Exchange(received, dist.batch_isend_irecv(batch), doing, group)


def gather(x: Tensor, group: Group = None) -> list[Tensor]:
    """The tensors of all processes, which have one shape, by rank: one all-gather, without gradient. Raises PeerLost."""
    _, size = place(group)
    if size == 1:
        return [x]
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(size)]
    with _reporting("gathering", group):
        dist.all_gather(parts, x, group=group)
    return parts


def scatter_sum(x: Tensor, group: Group = None) -> Tensor:
    """x (P, …) on every process -> the sum over processes of its own row of x: one reduce-scatter. Raises PeerLost."""
    rank, size = place(group)
    if size == 1:
        return x[0]
    out = torch.empty_like(x[rank], memory_format=torch.contiguous_format)
    with _reporting("summing", group):
        dist.reduce_scatter(out, [row.contiguous() for row in x], group=group)
    return out


def all_to_all_heads(x: Tensor, group: Group = None, scatter: int = 1, gather: int = 2) -> Tensor:
    """Cut axis `scatter` over the processes and join axis `gather` from them; with the two swapped it undoes itself.

    By default from (B, H, N / P, D), split along the sequence, to (B, H / P, N, D), split over heads. Every process has
    the same shape. Raises ShapeError for an axis that does not divide; PeerLost.
    """
    _, size = place(group)
    if x.shape[scatter] % size:
        what = f"{x.shape[scatter]} heads" if scatter == 1 else f"axis {scatter}, {x.shape[scatter]} long,"
        raise ShapeError(f"{what} cannot be split over {size} ranks: it must be a multiple of {size}")
    out: Tensor = _AllToAll.apply(x, group, scatter, gather)  # type: ignore[no-untyped-call]
    return out


def sum_gradients(model: nn.Module, group: Group = None) -> None:
    """Add up the gradients of a model's parameters over the processes, in one collective a dtype.

    That is the gradient of the sum of the processes' losses; a mean over tokens divides every local sum by the count of
    the whole sequence. Raises PeerLost.
    """
    _, size = place(group)
    if size == 1:
        return
    by_kind: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_kind.setdefault(parameter.dtype, []).append(parameter)
    for parameters in by_kind.values():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads]).to(accumulator(grads[0].dtype))
        with _reporting("summing gradients", group):
            dist.all_reduce(flat, group=group)
        for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(total.view_as(grad))


def _share(n: int, size: int, layout: Layout) -> int:
    """How many of n tokens every process holds."""
    parts = 2 * size if layout == "zigzag" else size
    if n % parts or n < parts:
        raise ShapeError(
            f"{n} tokens do not divide over {size} processes ({layout}): the length must be a multiple of {parts}; pad "
            f"at the end to {max(-(-n // parts), 1) * parts} and hide the padding by key_valid="
        )
    return n // size


@contextmanager
def _reporting(doing: str, group: Group) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        rank, size = place(group)
        raise PeerLost(
            f"rank {rank} of {size} gave up {doing}: another process ended, was slower than the timeout that "
            f"init_process_group was given, or holds another length or makes other calls. It said: {error}"
        ) from error


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return torch.stack(gather(x, group))

    @staticmethod
    def backward(ctx, dwhole):  # type: ignore[no-untyped-def]
        return scatter_sum(dwhole, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, scatter, gather):  # type: ignore[no-untyped-def]
        ctx.call = group, scatter, gather
        _, size = place(group)
        parts = x.unflatten(scatter, (size, -1)).movedim(scatter, 0).contiguous()
        if size > 1:
            received = torch.empty_like(parts)
            with _reporting("exchanging heads", group):
                dist.all_to_all_single(received, parts, group=group)
            parts = received
        return parts.movedim(0, gather).flatten(gather, gather + 1)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        group, scatter, gather = ctx.call
        return _AllToAll.apply(dout, group, gather, scatter), None, None, None
