"""EchoAtt: a block of layers shares the attention matrix of its first layer.

    out_l = A_leader V_l W_O        for the other layers of the block, the followers

`ShareAttention` shares in a model as it is; `share_attention_` also takes the followers' query and key projections away,
and their keys from the cache.
Departs from the paper: followers without projections compute A again from the leader's queries and keys, in the kernel
that the model uses, so that no N x N matrix need be kept; `recompute=False` hands on the matrix itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.attach import AttentionCall, intervention, steer
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported

CARD = InterventionCard(
    slug="echoatt",
    title="Shared attention matrices (EchoAtt)",
    paper="EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
    exports=("ShareAttention", "share_attention_"),
    options={"blocks": ((0, 1), (2,))},
    sites=("weights",),
    off={"blocks": ((0,), (1,), (2,))},
    spares={"blocks": ((0,), (1, 2))},
    padding=True,
)


@intervention(CARD)
@dataclass(frozen=True)
class ShareAttention:
    """Let the first layer of each block attend for all of it (section 3.1).

    blocks: of consecutive layers, none in two blocks; layers outside attend for themselves. recompute: followers get the
    leader's queries and keys, in any kernel, instead of its (B, H, N, N) weights; other interventions on the leader's
    weights are then not shared, and dropout cannot be. Raises OptionError; Unsupported for layers of different kinds,
    different numbers of heads, or that hold different keys.
    """

    blocks: Sequence[Sequence[int]]
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.recompute:
            object.__setattr__(self, "card", replace(CARD, sites=("q", "k")))

    def start(self, session: Any) -> _Sharing:
        """What acts in one session. Raises OptionError, Unsupported for blocks that the model cannot have."""
        return _Sharing(_checked(session, self.blocks), self.recompute)


def share_attention_(model: Any, blocks: Sequence[Sequence[int]]) -> Any:
    """Take the query and key projections of followers away, for good, and return the model.

    Followers then use the leader's queries and keys and cache values only. blocks: see `ShareAttention`. The model can be
    trained and saved; to load it, share again after `from_pretrained`. Raises OptionError; Unsupported for sliding layers,
    dropout in attention, and attention without projections q_proj and k_proj.
    """
    checked = _checked(steer(model), blocks)
    from regard.hosts.transformers.shared_attention import share

    share(model, checked)
    return model


class _Sharing:
    """One session: what the leaders of the pass at hand have computed."""

    card = CARD

    def __init__(self, blocks: list[list[int]], recompute: bool):
        self.blocks = {layer: block for block in blocks for layer in block if len(block) > 1}
        self.recompute = recompute
        self.calls: dict[int, AttentionCall] = {}
        self.weights: dict[int, Tensor] = {}

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        if not self._shares(call):
            return follow()
        leader, last = self.blocks[call.layer][0], self.blocks[call.layer][-1]
        if call.layer == leader:
            self.calls[leader] = call
        first = self.calls.pop(leader) if call.layer == last else self.calls[leader]
        _same_keys(first, call)
        if not self.recompute:
            # dropout falls on the leader's weights, once for all
            z = follow(call.replace(dropout_p=0.0)) if call.dropout_p else follow()
            if call.layer == last:
                del self.weights[leader]
            return z
        if call.dropout_p:
            raise Unsupported("recompute=True would drop other weights in each layer: set attention dropout to 0")
        if call.layer == leader:
            return follow()
        return follow(
            call.replace(
                q=first.q, k=first.k, pattern=first.pattern, mask=first.mask, scale=first.scale, bias=first.bias,
                sinks=first.sinks, softcap=first.softcap, q_offset=first.q_offset,
            )
        )  # fmt: skip

    def wants(self, call: AttentionCall) -> bool:
        """The layers of blocks, where the matrix is handed on."""
        return not self.recompute and self._shares(call)

    def on_weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        leader = self.blocks[call.layer][0]
        if call.layer == leader:
            self.weights[leader] = F.dropout(weights, self.calls[leader].dropout_p)
        return self.weights[leader]

    def _shares(self, call: AttentionCall) -> bool:
        return call.main and call.layer in self.blocks


def _checked(session: Any, blocks: Sequence[Sequence[int]]) -> list[list[int]]:
    layers, kinds = len(session.anatomy.main.layers), session.facts()["layer_types"]
    taken: set[int] = set()
    for block in blocks:
        if not block or list(block) != list(range(block[0], block[0] + len(block))):
            raise OptionError(f"a block is consecutive layers, ascending, not {tuple(block)}")
        if block[0] < 0 or block[-1] >= layers:
            raise OptionError(f"the block {tuple(block)} reaches beyond the {layers} layers of the model")
        if taken & set(block):
            raise OptionError(f"layer {min(taken & set(block))} is in two blocks")
        taken |= set(block)
        if kinds is not None and len({kinds[layer] for layer in block}) > 1:
            raise Unsupported(f"the block {tuple(block)} has layers of different kinds: {[kinds[la] for la in block]}")
    return [list(block) for block in blocks]


def _same_keys(first: AttentionCall, call: AttentionCall) -> None:
    if first.q.shape[:3] != call.q.shape[:3] or first.k.shape[:2] != call.k.shape[:2]:
        raise Unsupported(
            f"layers {first.layer} and {call.layer} differ in heads or tokens: queries {tuple(first.q.shape[:3])} and "
            f"{tuple(call.q.shape[:3])}, keys {tuple(first.k.shape[:2])} and {tuple(call.k.shape[:2])}"
        )
    at, there = first.positions, call.positions
    same = at is there or (at is not None and there is not None and torch.equal(at, there))
    if not same or first.k.shape[2] != call.k.shape[2]:
        raise Unsupported(f"layers {first.layer} and {call.layer} hold different keys and cannot share attention")
