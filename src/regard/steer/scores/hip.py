"""HiP on a pretrained model: every layer but the first few attends to key blocks found by a tree search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported
from regard.engines.block_sparse import block_sparse
from regard.ops.hip import hip_select
from regard.patterns import BlockSelection

CARD = InterventionCard(
    slug="hip",
    part_of="hip",
    title="Hierarchical attention pruning of a pretrained model",
    builds_on=("hip",),
    exports=("HiP",),
    options={"budget": 4, "block_q": 1, "recent": 2, "sinks": 1, "dense_layers": 0},
    sites=("scores",),
    off={"budget": 4096},
    spares={"dense_layers": 1},
)


@intervention(CARD)
@dataclass(frozen=True)
class HiP:
    """Attend to the last keys, the first ones and `budget` others that a search finds (section 3). The cache stays whole.

    budget: keys found for each block of queries. block_q, block_k: rows and keys of a block; while writing a row is a
    block. recent, sinks: keys that are always seen. representative: "first" or "center". dense_layers: the first so
    many layers see all. refresh: a search serves so many tokens that are written; beyond 1 not with caches that keep
    their keys in place, whose rows it could not follow. Rows with pads are refused, since ranges of the search start at
    the first token. Raises OptionError, Unsupported.
    """

    budget: int = 512
    block_q: int = 32
    block_k: int = 2
    recent: int = 128
    sinks: int = 16
    representative: Literal["first", "center"] = "first"
    dense_layers: int = 3
    refresh: int = 1

    def __post_init__(self) -> None:
        if self.dense_layers < 0 or self.refresh < 1:
            raise OptionError(
                f"dense_layers is at least 0 and refresh at least 1, not {self.dense_layers} and {self.refresh}"
            )
        if not 1 <= self.block_k <= self.budget or self.block_q < 1 or self.recent < 1 or self.sinks < 0:
            raise OptionError(
                "block_q, block_k and recent are at least 1, the budget at least block_k, sinks at least 0"
            )

    def start(self, session: Session) -> _Search:
        """The searches of one session."""
        return _Search(self)


class _Search:
    """The effect. A selection that serves again stands in the cache, (B, H, 1, K), with the place it was made for, (B,)."""

    card = CARD

    def __init__(self, given: HiP):
        self.given = given
        self.made: BlockSelection | None = None
        self.notes = tuple(f"hip {what} of {given.block_k}" for what in ("blocks", "place"))
        if given.refresh == 1:
            self.on_kv = None  # type: ignore[assignment]

    def on_kv(self, step: Step, layer: int, kept: Any) -> None:
        """Nothing is given up: with this the host keeps a cache in which notes follow their rows."""

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        given, n, m = self.given, call.q.shape[2], call.k.shape[2]
        if not call.main or call.layer < given.dense_layers or m <= given.budget:
            return follow()
        if call.step.has_pads:
            raise Unsupported("hip searches from the first token on, which pads would move: write row by row")
        if call.positions is not None or call.mask is not None or call.bias is not None:
            raise Unsupported(
                f"hip searches all keys before a row; layer {call.layer} has a mask, a bias or a cut cache"
            )
        selection = self._select(call, n)
        made = block_sparse(call.q, call.k, call.v, selection, scale=call.scale, q_offset=call.step.start)
        return follow(call.instead_of(made.out, "hip"))

    def _select(self, call: AttentionCall, n: int) -> BlockSelection:
        given, start, written = self.given, call.step.start, call.step.phase == "decode"
        serves = written and given.refresh > 1 and call.kept is not None
        if serves and self.made is not None and self.notes[0] in call.kept.notes:
            blocks, place = (call.kept.notes[name] for name in self.notes)
            if 0 < start - int(place[0]) < given.refresh:
                return replace(self.made, indices=blocks)
        block_q = 1 if written or call.step.start % given.block_q else given.block_q
        selection = hip_select(
            call.q, call.k, budget=given.budget, block_q=block_q, block_k=given.block_k, recent=given.recent,
            sinks=given.sinks, representative=given.representative, q_offset=call.step.start,
        )  # fmt: skip
        if serves:
            self.made = selection
            places = torch.full((call.q.shape[0],), start, device=call.q.device)
            call.kept.notes |= dict(zip(self.notes, (selection.indices, places), strict=True))
        elif call.kept is not None:
            # it was of an earlier turn
            call.kept.notes = {k: x for k, x in call.kept.notes.items() if k not in self.notes}
        return selection
