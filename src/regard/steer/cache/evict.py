"""What all ways of giving up cached keys share: how many stay, which always stay, and that pads go first.

A way is a subclass with `scores`: how much each key is worth. Keys go at the first decoding step after a prompt, or at
every step for those that say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from regard.contract.attach import Step
from regard.contract.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class KVSelect:
    """Keep `budget` keys of each head in each full layer. Subclasses score.

    budget: keys that stay. window: the last keys, which always stay. sinks: the first keys, which always stay.
    ratio: the budget as a share of the prompt instead, 0 to 1. layers: those it acts on, None for all.
    Raises OptionError.
    """

    budget: int | None = 1024
    window: int = 32
    sinks: int = 0
    ratio: float | None = None
    layers: tuple[int, ...] | None = None

    # whether keys go at every decoding step, so that the cache never grows beyond the budget
    always: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.ratio is None):
            raise OptionError("give budget=, a number of keys, or ratio=, a share of the prompt with budget=None")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise OptionError(f"ratio is a share of the prompt, above 0 and at most 1, not {self.ratio}")
        if self.window < 0 or self.sinks < 0:
            raise OptionError(f"window and sinks are numbers of keys, not {self.window} and {self.sinks}")
        if self.budget is not None and self.budget <= self.window + self.sinks:
            raise OptionError(
                f"the budget, {self.budget}, must exceed the window and the sinks, {self.window + self.sinks}, "
                "which always stay"
            )

    def scores(self, layer: int, kept: Any) -> Tensor | None:
        """What each key held is worth, (B, G, M): the largest stay; None where nothing is known of them yet."""
        raise NotImplementedError

    def allowance(self, seen: int) -> int:
        """How many keys stay of a sequence of `seen` tokens."""
        if self.ratio is not None:
            return max(int(self.ratio * seen), self.window + self.sinks + 1)
        assert self.budget is not None
        return self.budget

    def acts_on(self, layer: int) -> bool:
        """Whether a layer's keys are given up."""
        return self.layers is None or layer in self.layers

    def on_kv(self, step: Step, layer: int, kept: Any) -> None:
        """Give up keys before a decoding step."""
        if not self.acts_on(layer) or not (self.always or step.decoded == 1):
            return
        # a key joins after this: with `always` the budget holds at the end of the step
        room = self.allowance(kept.seen) - self.always
        if kept.keys.shape[2] <= room:
            return
        scores = self.scores(layer, kept)
        if scores is not None:
            kept.keep(best(scores, real_keys(step, kept), room, self.window, self.sinks))


def real_keys(step: Step, kept: Any) -> Tensor:
    """Which of the keys held are of real tokens: bool (B, G, M)."""
    positions = kept.positions_of_all()
    there = positions >= 0
    if step.padding is None:
        return there
    padding = step.padding.unsqueeze(1).expand(-1, positions.shape[1], -1)
    return there & padding.gather(2, positions.clamp(min=0))


def best(scores: Tensor, real: Tensor, room: int, window: int, sinks: int = 0) -> Tensor:
    """The places of the keys that stay: int64 (B, G, room), ascending, -1 where a row has fewer real keys.

    scores (B, G, M), real bool (B, G, M). The last `window` keys and the first `sinks` real ones always stay; a pad
    never stays while a real key goes.
    """
    order = real.long().cumsum(-1)
    worth = scores.double().masked_fill(~real, float("-inf"))
    worth = worth.masked_fill(real & (order <= sinks), float("inf"))
    if window:
        worth[..., -window:] = worth[..., -window:].masked_fill(real[..., -window:], float("inf"))
    # pooled votes tie, and the earlier key then stays whatever stands beside the row
    places = worth.sort(dim=-1, descending=True, stable=True).indices[..., :room].sort(-1).values
    return places.masked_fill(~real.gather(2, places), -1)


def over_groups(votes: Tensor, groups: int, how: str) -> Tensor:
    """What the query heads say, (B, H, M), put together for each key head: (B, G, M). how: "mean" or "max"."""
    grouped = votes.unflatten(1, (groups, -1))
    return grouped.mean(2) if how == "mean" else grouped.amax(2)
