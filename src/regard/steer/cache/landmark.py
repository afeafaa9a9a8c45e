"""Landmarks in a pretrained model: every row reads its own block and the blocks whose landmarks it likes best.

Fine-tuned with topk=None on texts with landmarks (grouped weights over all blocks), then run with topk on any length. The
cache holds keys turned by their places, as the model left them; those that are read are moved near, in stingy places.
Departs from the released code: blocks are chosen for each row, not for a chunk of rows. In the first layer all landmarks
are one vector, and in stingy places the old ones stand in one place: there the choice among them is by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.calls import is_causal_alone
from regard.ops.landmark import check_landmarks, landmark_attention, landmark_retrieve
from regard.patterns import Causal

CARD = InterventionCard(
    slug="landmark",
    part_of="landmark",
    title="Landmarks in a pretrained model",
    builds_on=("landmark",),
    exports=("Landmark",),
    options={"topk": 1, "landmark_id": 59, "block": 3},
    sites=("scores", "logits"),
    owns=("kv",),
    prompt=(
        (17, 4, 33, 59, 8, 21, 46, 59, 30, 12, 5, 59, 41, 27, 9, 59, 14, 38, 22, 59, 6, 19, 44, 59),
        (25, 40, 11, 59, 36, 7, 18, 59, 2, 45, 29, 59, 13, 34, 48, 59, 20, 3, 31, 59, 42, 10, 26, 59),
    ),
)


@intervention(CARD)
@dataclass(frozen=True)
class Landmark:
    """Read through landmarks, which stand behind every `block` tokens of the ids (section 3): `insert_landmarks`.

    topk: blocks that each row and head reads, at least 1; None for all, which is how such a model is fine-tuned.
    landmark_id: the token of landmarks, with a row of its own in the embeddings; while writing it is written where it
    belongs, and nowhere else. positions: "stingy" moves the blocks near, so that no distance exceeds topk + 2 blocks
    (section 3.2); "true" leaves them. Blocks are counted from the first token: no pads. Raises OptionError, Unsupported.
    """

    topk: int | None
    _: KW_ONLY
    landmark_id: int
    block: int = 50
    positions: Literal["true", "stingy"] = "stingy"

    def __post_init__(self) -> None:
        if self.block < 1 or (self.topk is not None and self.topk < 1):
            raise OptionError(f"topk and block are at least 1, not {self.topk} and {self.block}")
        if self.positions not in ("true", "stingy"):
            raise OptionError(f"positions is {self.positions!r}; it is 'true' or 'stingy'")

    @property
    def needs_rotation(self) -> bool:
        """Whether keys are moved."""
        return self.topk is not None and self.positions == "stingy"

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        """The grouped op over the whole cache, or its blocks one after the other."""
        if not call.main:
            return follow()
        self._check(call)
        if self.topk is None or self.positions == "true":
            z = landmark_attention(
                call.q, call.k, call.v, block=self.block, topk=self.topk, pattern=Causal(), scale=call.scale,
                q_offset=call.step.start,
            )  # fmt: skip
        else:
            z = self._near(call, self.topk)
        return follow(call.instead_of(z, "landmark"))

    def on_logits(self, step: Step, ids: Tensor | None, logits: Tensor) -> Tensor:
        """A landmark where one is due, and nowhere else."""
        mark = torch.arange(logits.shape[-1], device=logits.device) == self.landmark_id
        due = (step.start + step.tokens) % (self.block + 1) == self.block
        return logits.masked_fill(~mark if due else mark, float("-inf"))

    def _near(self, call: AttentionCall, topk: int) -> Tensor:
        period, first, rotation = self.block + 1, call.step.start, call.rotation

        def move(x: Tensor, origin: Tensor, places: Tensor) -> Tensor:
            return rotation.turn(rotation.undo(x, origin), places)

        landmarks, outs, end = call.k[:, :, self.block :: period], [], first + call.q.shape[2]
        while first < end:
            closed = first // period * period
            stop = min(closed + period, end)
            q = call.q[:, :, first - call.step.start : stop - call.step.start]
            memory, local = ((call.k[:, :, a:b], call.v[:, :, a:b]) for a, b in ((0, closed), (closed, stop)))
            outs.append(
                landmark_retrieve(
                    q, local, memory, landmarks[:, :, : closed // period], block=self.block, topk=topk,
                    positions="stingy", move=move, scale=call.scale,
                )
            )  # fmt: skip
            first = stop
        return torch.cat(outs, 2)

    def _check(self, call: AttentionCall) -> None:
        step, n = call.step, call.q.shape[2]
        if step.has_pads:
            raise Unsupported("landmark counts blocks from the first token, which pads would move: write row by row")
        if not (is_causal_alone(call) and call.k.shape[2] == step.start + n):
            raise Unsupported(f"layer {call.layer} is not causal attention over the whole cache alone")
        if call.dropout_p:
            raise Unsupported(f"grouped weights are not dropped, and layer {call.layer} drops {call.dropout_p} of them")
        if call.layer == 0:
            if step.ids is None:
                raise Unsupported("landmarks are known by their ids: give input_ids")
            check_landmarks(step.ids == self.landmark_id, self.block, n, step.start)
