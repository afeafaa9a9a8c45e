"""SeerAttention on a pretrained model: a prompt reads the blocks of keys that gates choose, what is written reads all.

    S = gate(q, k before rotation);   a row of blocks reads those with softmax(S) >= threshold, or its best ones

Departs from the released code: a row always reads its own block, and rows with pads count blocks from their first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract.attach import AttentionCall, Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported
from regard.engines.block_sparse import block_sparse
from regard.hosts.calls import is_causal_alone
from regard.layers.seerattention import check_choice, seer_gate, seer_select
from regard.patterns import Causal

CARD = InterventionCard(
    slug="seerattention",
    title="SeerAttention",
    paper="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    exports=("Seer",),
    options={"block": 4, "ratio": 0.4, "dense_last": 1},
    sites=("scores",),
    off={"ratio": 1.0},
    padding=True,
)
# logits of all blocks (B, H, n, n) from q (B, H, N, D), k (B, G, N, D)
Gate = Callable[[Tensor, Tensor], Tensor]


@intervention(CARD)
@dataclass(frozen=True)
class Seer:
    """Read the blocks that a gate chooses while a prompt comes (section 3); afterwards the whole cache, as ever.

    gates: layer -> its `SeerGate`, a dict or the ModuleDict of a `GateDistillation`; layers without one read all. None:
    nothing learned, products of average rotated queries and keys in every layer without a window. threshold: keep blocks of at
    least this weight. ratio: keep this share of the causal blocks. One of the two. dense_last: so many last rows of blocks
    read all. block: tokens of a block, that of the gates; a shorter prompt reads all. A prompt comes in one piece. Raises
    OptionError; Unsupported in layers with other masks, biases, sinks or caps.
    """

    gates: Mapping[Any, Any] | nn.ModuleDict | None = None
    threshold: float | None = None
    ratio: float | None = None
    dense_last: int = 2
    block: int = 64

    def __post_init__(self) -> None:
        check_choice(self.ratio, self.threshold, self.dense_last)
        if self.block < 1:
            raise OptionError(f"a block has at least 1 token, not {self.block}")
        for layer, gate in () if self.gates is None else self.gates.items():
            if gate.block != self.block:
                raise OptionError(f"the gate of layer {layer} has block {gate.block}, and Seer has block={self.block}")

    def start(self, session: Session) -> _Chosen:
        """The gates by layer. Raises OptionError for one of a layer that the model lacks."""
        if self.gates is None:
            return _Chosen(self, dict.fromkeys(session.full_layers(), _averages(self.block)))
        layers = len(session.anatomy.main.layers)
        strange = [str(layer) for layer in self.gates if str(layer) not in map(str, range(layers))]
        if strange:
            raise OptionError(f"there are gates of layers {', '.join(strange)}; the model has layers 0 to {layers - 1}")
        return _Chosen(self, {int(layer): gate for layer, gate in self.gates.items()})


class _Chosen:
    """The effect: prompts through the block-sparse engine."""

    card = CARD

    def __init__(self, given: Seer, gates: dict[int, Gate]):
        self.given, self.gates = given, gates
        self.needs_rotation = given.gates is not None

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        given = self.given
        dense = given.ratio == 1 or given.threshold == 0 or call.step.phase == "decode"
        if not call.main or call.layer not in self.gates or dense or call.q.shape[2] < given.block:
            return follow()
        if call.step.start:
            raise Unsupported("the gates read a prompt whole: it cannot come in pieces, or after writing")
        if not is_causal_alone(call):
            raise Unsupported(
                f"layer {call.layer} is not causal attention alone: leave its gate out, and it reads what it did"
            )
        q, k = call.unrotated() if self.needs_rotation else (call.q, call.k)
        z = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
        for rows, pads in _by_pads(call.step):
            if call.q.shape[2] - pads:
                seen = [x[rows, :, pads:] for x in (q, k)]
                z[rows, :, pads:] = self._read(call, seen, [x[rows, :, pads:] for x in (call.q, call.k, call.v)])
        return follow(call.instead_of(z, "seerattention"))

    def _read(self, call: AttentionCall, seen: list[Tensor], qkv: list[Tensor]) -> Tensor:
        """The outputs of rows that begin with their first token. seen: queries and keys for the gate."""
        q, k, v = qkv
        if q.shape[2] < self.given.block:
            return block_sparse(q, k, v, Causal(), scale=call.scale, dropout_p=call.dropout_p).out
        with torch.no_grad():
            logits = self.gates[call.layer](*seen)
        selection = seer_select(
            logits, block=self.given.block, ratio=self.given.ratio, threshold=self.given.threshold,
            dense_last=self.given.dense_last,
        )  # fmt: skip
        return block_sparse(q, k, v, selection, scale=call.scale, dropout_p=call.dropout_p).out


def _averages(block: int) -> Gate:
    def gate(q: Tensor, k: Tensor) -> Tensor:
        same_q, same_k = (torch.eye(x.shape[3], device=x.device).expand(x.shape[1], -1, -1) for x in (q, k))
        return seer_gate(q, k, same_q, same_k, block=block, pool_k=("avg",), rotary_base=None)

    return gate


def _by_pads(step: Step) -> Iterator[tuple[Any, int]]:
    """Rows with equally many pads on the left. Raises Unsupported for pads elsewhere."""
    if step.padding is None or not step.has_pads:
        yield slice(None), 0
        return
    if bool((step.padding[:, :-1] & ~step.padding[:, 1:]).any()):
        raise Unsupported("there are pads between or behind tokens: pad on the left")
    pads = (~step.padding).sum(1)
    for count in pads.unique().tolist():
        yield (pads == count).nonzero()[:, 0], count
