"""Tunable experts: some experts of a mixture are switched off, or on for every token, while the model runs.

off: the next best takes the place, and weights are made by the family's own rule; with reroute=False the place stays
empty. on: always among the chosen, with the weight that its own logit gives. scale: its weight times a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard.contract.attach import Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.transformers.routers import check_rule, choose, experts_of

CARD = InterventionCard(
    slug="tunable_experts",
    title="Mixture of tunable experts",
    paper="Mixture of Tunable Experts -- Behavior Modification of DeepSeek-R1 at Inference Time",
    exports=("TunableExperts",),
    options={"off": ((0, 1), (1, 2))},
    sites=("router",),
    owns=("router",),
    off={"off": ()},
    spares={"off": ((1, 2),)},
    padding=True,
)


@intervention(CARD)
@dataclass(frozen=True)
class TunableExperts:
    """Switch experts (section 3). Experts are (layer, expert), layers counted in the whole stack.

    off, on: those that are never and always chosen. scale: (layer, expert) -> factor of its weight. reroute: whether the
    next best takes the place of one that is off. Raises OptionError; Unsupported for layers without a router and for
    families whose rule is not known.
    """

    off: tuple[tuple[int, int], ...] = ()
    on: tuple[tuple[int, int], ...] = ()
    scale: Mapping[tuple[int, int], float] = field(default_factory=dict, hash=False)
    reroute: bool = True

    def __post_init__(self) -> None:
        both = set(self.off) & set(self.on)
        if both:
            raise OptionError(f"experts cannot be both off and on: {sorted(both)}")

    def start(self, session: Session) -> _Switches:
        """The tables of one model. Raises OptionError, Unsupported."""
        layers = session.anatomy.main.layers
        tables = {}
        for layer, expert in (*self.off, *self.on, *self.scale):
            if not 0 <= layer < len(layers):
                raise OptionError(f"there is no layer {layer}; the model has {len(layers)}")
            router = layers[layer].router
            if router is None:
                raise Unsupported(f"layer {layer} has no router")
            count, chosen = experts_of(router)
            if not 0 <= expert < count:
                raise OptionError(f"layer {layer} has the experts 0 to {count - 1}, not {expert}")
            if layer not in tables:
                table = _Table(
                    torch.tensor([(layer, e) in self.off for e in range(count)]),
                    torch.tensor([(layer, e) in self.on for e in range(count)]),
                    torch.tensor([float(self.scale.get((layer, e), 1.0)) for e in range(count)]),
                )
                if self.reroute and int(table.off.sum()) > count - chosen:
                    raise OptionError(
                        f"a token gets {chosen} of the {count} experts of layer {layer}: too many are off"
                    )
                if int(table.on.sum()) > chosen:
                    raise OptionError(f"a token gets {chosen} experts in layer {layer}: {int(table.on.sum())} are on")
                tables[layer] = table
        return _Switches(tables, self.reroute)


@dataclass(frozen=True)
class _Table:
    off: Tensor
    on: Tensor
    scale: Tensor


class _Switches:
    """The effect: what a router chose, chosen again."""

    card = CARD

    def __init__(self, tables: dict[int, _Table], reroute: bool):
        self.tables, self.reroute = tables, reroute
        self.checked: set[int] = set()

    def on_router(self, step: Step, choice: Any) -> Any:
        """The triple of a layer in the tables, others as they are."""
        table = self.tables.get(choice.layer)
        if table is None:
            return choice
        off, on, scale = (x.to(choice.logits.device) for x in (table.off, table.on, table.scale))
        weights, experts = choice.weights, choice.experts
        barred = off if self.reroute else torch.zeros_like(off)
        if bool(barred.any()) or bool(on.any()):
            if choice.layer not in self.checked:
                check_rule(choice.router, choice.logits, weights, experts)
                self.checked.add(choice.layer)
            weights, experts = choose(choice.router, choice.logits, barred, on)
        if not self.reroute:
            # an index beyond the experts would be read by the grouped kernels: the weight goes instead
            weights = weights.masked_fill(off[experts], 0.0)
        return replace(choice, weights=(weights * scale[experts]).to(weights.dtype), experts=experts)
