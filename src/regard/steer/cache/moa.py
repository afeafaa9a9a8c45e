"""Mixture of attention: a window and a block of sinks for every head, as a plan says, in scores and in the cache.

A plan comes from `explain` (`attention_influence`, `fit_moa`) or from a file. Its windows are those of the prompt's length,
or of `length`, and stay while the model writes. The keys that no head of a group sees any more leave the cache.
Departs from the released code: heads that share keys keep the widest of their windows, and each sees its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported
from regard.patterns import Causal, Pattern
from regard.patterns.elastic import SINK_BLOCKS, MoAPlan, block_count

CARD = InterventionCard(
    slug="moa",
    title="Mixture of attention",
    paper="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    exports=("MoA",),
    options={
        "plan": {
            "alphas": ((4, 4, 8, 8), (4, 8, 4, 8), (8, 8, 8, 4)),
            "betas": ((0, 0, 0, 0.25), (0, 0, 0, 0), (0, 0, 0, 0)),
            "block": 4,
        }
    },
    sites=("scores", "kv"),
    owns=("kv",),
    off={
        "plan": {
            "alphas": ((4096, 4096, 4096, 4096), (4096, 4096, 4096, 4096), (4096, 4096, 4096, 4096)),
            "betas": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
        }
    },
    spares={
        "plan": {
            "alphas": ((4096, 4096, 4096, 4096), (4, 8, 4, 8), (8, 8, 8, 4)),
            "betas": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
            "block": 4,
        }
    },
)


@intervention(CARD)
@dataclass(frozen=True)
class MoA:
    """Let every head see a block of sinks and a band of its own (section 3).

    plan: a `MoAPlan`, its JSON, or its fields. length: tokens for which the bands are made, those of the prompt if
    None; of a prompt in pieces the first ones know less than all of it, so give its length where the plan has betas.
    Blocks are counted from the first token, so rows with pads on the left are refused. Raises OptionError; Unsupported.
    """

    plan: MoAPlan | Mapping[str, Any] | str
    length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.plan, str):
            object.__setattr__(self, "plan", MoAPlan.from_json(self.plan))
        elif not isinstance(self.plan, MoAPlan):
            object.__setattr__(self, "plan", MoAPlan(**self.plan))
        if self.length is not None and self.length < 1:
            raise OptionError(f"length is a number of tokens, at least 1, not {self.length}")

    def start(self, session: Session) -> _Bands:
        """The bands of one model. Raises OptionError if the plan is for another."""
        assert isinstance(self.plan, MoAPlan)
        layers, heads = len(session.anatomy.main.layers), session.facts()["heads"]
        if (self.plan.layers, self.plan.heads) != (layers, heads):
            raise OptionError(
                f"the plan is for {self.plan.layers} layers of {self.plan.heads} heads; the model has {layers} of {heads}"
            )
        return _Bands(self.plan, self.length)


class _Bands:
    """The effect: a pattern over prompts, a mask over what the cache still holds, and the keys that leave it."""

    card = CARD

    def __init__(self, plan: MoAPlan, length: int | None):
        self.plan, self.length = plan, length

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        if not call.main:
            return follow()
        first, n, m = call.step.start, call.q.shape[2], call.k.shape[2]
        if self._covers(call.step, call.layer):
            return follow()
        if call.step.has_pads:
            raise Unsupported("moa counts blocks from the first token, which pads would move: write row by row")
        if call.positions is None and first == 0:
            pattern: Pattern = Causal() & self.plan.pattern(call.layer, self._length(call.step))
            return follow(call.replace(pattern=pattern if call.pattern is None else call.pattern & pattern))
        # a layer with a window of its own holds the last keys
        last = torch.arange(first + n - m, first + n, device=call.k.device).view(1, 1, m)
        positions = last if call.positions is None else call.positions
        groups = call.q.shape[1] // positions.shape[1]
        keys = positions.repeat_interleave(groups, 1) if positions.shape[1] > 1 else positions
        queries = torch.arange(first, first + n, device=keys.device)
        visible = self._visible(call, queries[:, None], keys.unsqueeze(2))
        return follow(call.replace(mask=visible if call.mask is None else visible & call.mask))

    def on_kv(self, step: Step, layer: int, kept: Any) -> None:
        """Let go what no later query of a group sees; once a block."""
        if self._covers(step, layer) or not (step.decoded == 1 or step.start % self.plan.block == 0):
            return
        positions = kept.positions_of_all()
        groups = positions.shape[1]
        bands = self._bands(step, layer).view(groups, -1).amax(1)
        seen = _seen(step.start, positions, bands.to(positions.device).view(1, -1, 1), self.plan.block)
        most = int(seen.sum(-1).max())
        if most == positions.shape[2]:
            return
        # places of those that stay first, in order; the others of a row are filled up
        order = torch.where(seen, torch.arange(seen.shape[2], device=seen.device), seen.shape[2]).sort(-1).values
        kept.keep(order[..., :most].masked_fill(order[..., :most] == seen.shape[2], -1))

    def _length(self, step: Step) -> int:
        """Tokens of the prompt, as far as it came."""
        return self.length or step.start + step.tokens - step.decoded

    def _bands(self, step: Step, layer: int) -> Tensor:
        return torch.tensor(self.plan.band_blocks(layer, self._length(step)))

    def _covers(self, step: Step, layer: int) -> bool:
        """Whether all heads see everything."""
        return int(self._bands(step, layer).min()) >= block_count(step.start + step.tokens, self.plan.block)

    def _visible(self, call: AttentionCall, queries: Tensor, keys: Tensor) -> Tensor:
        bands = self._bands(call.step, call.layer).to(keys.device).view(1, call.q.shape[1], 1, 1)
        return _seen(queries, keys, bands, self.plan.block) & (keys <= queries)


def _seen(query: Tensor | int, keys: Tensor, bands: Tensor, block: int) -> Tensor:
    key = keys // block
    return (keys >= 0) & ((key < SINK_BLOCKS) | (query // block - key < bands))
