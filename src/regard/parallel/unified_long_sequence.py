"""A unified view: attention over a grid of processes, and every op as a matrix that mixes tokens.

    grid: P_h x P_s processes; heads are split over one axis, the sequence over the other (ring attention)
    template: out = P(X) V for every op linear in V; what P depends on, how it is built, what it costs

Departs from the paper: its schedule of communication is not published; this is the exact general form, heads exchanged
as in DeepSpeed-Ulysses. The template is read from the op itself, not from a table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.card import ParallelCard
from regard.contract.catalogue import find
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.shapes import bind, parse
from regard.parallel.exchange import Group, all_to_all_heads, place
from regard.parallel.ring_self_attention import ring_attention
from regard.primitives.mixing_matrix import mixing_matrix

CARD = ParallelCard(
    slug="unified_long_sequence",
    title="Attention over a grid of processes, and the template of all mixers",
    paper="A Unified View of Long-Sequence Models towards Modeling Million-Scale Dependencies",
    builds_on=("ring_self_attention",),
    exports=("grid_attention", "template", "Template"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=12 m=12 d=8 e=6",
    attends=("self", "causal_self"),
    whole="softmax",
    time="n m / P",
    memory="n / P_s",
    sends="all heads but its own four times, then ring attention of the seq_group",
)
_SPEC = parse(CARD.spec)


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    head_group: Group = None,
    seq_group: Group = None,
) -> Tensor:
    """Softmax attention over a grid of processes of which each holds an equal part of the sequence (section 5).

    q (B, H, C, D), k (B, G, C, D), v (B, G, C, E). head_group: the processes that exchange heads, with neighbouring
    parts in the order of their ranks; H and G must be multiples of its size. seq_group: those that hold the same heads
    afterwards. Both are the axes of a DeviceMesh of shape (P_s, P_h); None for both is one process.
    Raises ShapeError, OptionError, PeerLost.
    """
    if place()[1] > 1 and (head_group is None or seq_group is None):
        raise OptionError(
            "a grid needs both of its groups: mesh = init_device_mesh(device, (P_s, P_h), mesh_dim_names=('seq', 'head')), "
            "then head_group=mesh.get_group('head') and seq_group=mesh.get_group('seq')"
        )
    sizes = bind(_SPEC, (q, k, v), "grid_attention")
    _, size = place(head_group)
    for what, heads in (("query", sizes["h"]), ("kv", sizes["g"])):
        if heads % size:
            raise ShapeError(
                f"{heads} {what} heads cannot be split over {size} ranks: they must be a multiple; repeat the kv heads or "
                "give more ranks to the sequence"
            )
    q, k, v = (all_to_all_heads(x, head_group) for x in (q, k, v))
    out = ring_attention(q, k, v, is_causal=is_causal, group=seq_group)
    return all_to_all_heads(out, head_group, scatter=2, gather=1)


@dataclass(frozen=True)
class Template:
    """An op as a matrix that mixes tokens, by what was measured on one call.

    source: "data" if the matrix follows q and k, "fixed" if it does not. structure: "circulant" or "toeplitz" if it
    depends on i - j alone (modulo N), "low_rank" if its rank is at most N / 2, "sparse" if at most half of the pairs
    that may meet have a weight, "semiseparable" if it is causal and every block below the diagonal has rank at most
    N / 4, else "dense". rank: of the matrix, or of those blocks where it is semiseparable. time, memory: from the card.
    """

    name: str
    source: Literal["data", "fixed"]
    structure: Literal["circulant", "toeplitz", "low_rank", "sparse", "semiseparable", "dense"]
    rank: int
    causal: bool
    time: str
    memory: str


def template(
    op: str | Callable[..., Tensor],
    *,
    is_causal: bool | None = None,
    n: int = 64,
    options: dict[str, Any] | None = None,
) -> Template:
    """What kind of matrix an op mixes tokens with, measured on n random tokens of width 4 in float64 (section 2).

    op: a slug or the function, with a card. is_causal: None for all keys where the op can. n: tokens, at least 8.
    options: the op's own, instead of those of its card. Raises UnknownName; Unsupported for an op that is not linear in v
    or takes other tensors; ShapeError, OptionError.
    """
    if n < 8:
        raise OptionError(f"a structure does not show on {n} tokens; give at least 8")
    run = find(op, "ops").load() if isinstance(op, str) else op
    card = getattr(run, "card", None)
    if card is None:
        raise OptionError(
            f"{getattr(run, '__name__', run)} has no card: give an op of the library, or one made by @operator"
        )
    names = tuple(name for name, _ in parse(card.spec).inputs)
    if names != ("q", "k", "v"):
        raise Unsupported(f"{card.slug} takes {', '.join(names)}; a template is that of a function of q, k, v")
    if is_causal is None:
        is_causal = "self" not in card.attends
    first, second = (_matrix(run, card, is_causal, n, card.options if options is None else options, s) for s in (0, 1))
    source: Literal["data", "fixed"] = "fixed" if _near(first, second) else "data"
    structure, rank = _structure(first)
    causal = not bool(first.triu(1).any())
    return Template(card.slug, source, structure, rank, causal, card.time, card.memory)


@torch.no_grad()
def _matrix(run: Any, card: Any, is_causal: bool, n: int, options: dict[str, Any], seed: int) -> Tensor:
    """The mixing matrices of all heads (H, N, N)."""
    generator = torch.Generator().manual_seed(seed)
    heads = card.sizes["h"]
    q, k = (
        torch.randn(1, count, n, _WIDTH, dtype=torch.float64, generator=generator)
        for count in (heads, card.sizes.get("g", heads))
    )
    flags = {"is_causal": True} if is_causal else {}
    return mixing_matrix(run, q, k, n, **options, **flags)[0]


_WIDTH = 4


def _structure(p: Tensor) -> tuple[Any, int]:
    n = p.shape[-1]
    rank = _rank(p)
    if _near(p.roll((1, 1), (1, 2)), p):
        return "circulant", rank
    if _near(p[:, 1:, 1:], p[:, :-1, :-1]):
        return "toeplitz", rank
    if 2 * rank <= n:
        return "low_rank", rank
    causal = not bool(p.triu(1).any())
    meeting = n * (n + 1) // 2 if causal else n * n
    if 2 * int((p != 0).sum((1, 2)).max()) <= meeting:
        return "sparse", rank
    if causal:
        below = max(_rank(p[:, at:, :at]) for at in range(1, n))
        if 4 * below <= n:
            return "semiseparable", below
    return "dense", rank


def _rank(p: Tensor) -> int:
    return int(torch.linalg.matrix_rank(p, rtol=1e-9).max())


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-9 * b.abs().max())
