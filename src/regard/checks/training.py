"""Checks of ways to train: losses of a model and a batch, and the methods that give them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.checks import specimens
from regard.checks.battery import Subject, demand, demand_near, verifies
from regard.checks.tolerances import SAME
from regard.checks.untouched import changed, same, state


class Tried:
    """A loss and what it is called with: model, teacher (or None) and batch, all of them new."""

    def __init__(self, subject: Subject):
        card = subject.card
        self.teacher: Any = specimens.make(card.teacher) if card.teacher else None
        self.model: Any = specimens.make(card.student, 2, **card.student_options) if card.student else self.teacher
        self.batch = specimens.given(card.batch, card.student or card.teacher, self.model)
        if inspect.isclass(subject.main):
            self.loss: Any = subject.main(*(() if self.teacher is None else (self.teacher,)), **card.options)
        else:
            self.loss = partial(subject.main, **card.options)

    def losses(self, batch: Any = None) -> dict[str, Tensor]:
        """What comes of a call, on another batch than its own if one is given."""
        found: dict[str, Tensor] = self.loss(self.model, self.batch if batch is None else batch)
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """All there are: the model's by their names, those of the loss behind "self.", other ones of a teacher."""
        found = dict(self.model.named_parameters())
        known = {id(parameter) for parameter in found.values()}
        for prefix, module in (("teacher.", self.teacher), ("self.", self.loss)):
            for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
                if id(parameter) not in known:
                    known.add(id(parameter))
                    found[prefix + name] = parameter
        return found


@verifies("training")
def training_is_described(subject: Subject) -> None:
    """It says what it does; it is made from the teacher and called with (model, batch), all else is optional; no **kwargs."""
    thing = subject.main
    demand((thing.__doc__ or "").strip(), f"{thing.__name__} has no docstring")
    call = thing
    if inspect.isclass(thing):
        call = thing.forward if issubclass(thing, nn.Module) else thing.__call__
        _demand_named("the constructor", thing, int(bool(subject.card.teacher)), subject.card.options)
    parameters = [name for name in inspect.signature(call).parameters if name != "self"]
    demand(parameters[:2] == ["model", "batch"], f"it is called with {', '.join(parameters)}, not model, batch")
    _demand_named("the call", call, 2 + inspect.isclass(thing), () if inspect.isclass(thing) else subject.card.options)


@verifies("training")
def losses_are_named_scalars(subject: Subject) -> None:
    """What comes back are the losses that the card names: finite scalars that can be differentiated."""
    found, named = Tried(subject).losses(), set(subject.card.losses)
    demand(isinstance(found, dict), f"a {type(found).__name__} came back, not a dict")
    demand(set(found) == named, f"{', '.join(found)} came back; the card names {', '.join(subject.card.losses)}")
    for name, loss in found.items():
        demand(isinstance(loss, Tensor) and loss.dim() == 0, f"{name} is no scalar tensor")
        demand(loss.is_floating_point() and loss.isfinite(), f"{name} is {loss}")
        demand(loss.requires_grad, f"{name} cannot be differentiated")


@verifies("training")
def gradients_reach_what_it_trains(subject: Subject) -> None:
    """Finite gradients, not all 0, reach each parameter that the card says is trained, and no other one."""
    tried, trains = Tried(subject), subject.card.trains
    parameters = tried.parameters()
    for pattern in trains:
        demand(any(fnmatchcase(name, pattern) for name in parameters), f"no parameter is called {pattern!r}")
    sum(tried.losses().values(), torch.zeros(())).backward()
    for name, parameter in parameters.items():
        grad, wanted = parameter.grad, _is_trained(name, trains)
        demand(wanted or grad is None or not grad.any(), f"a gradient reaches {name}, which the card does not name")
        demand(not wanted or (grad is not None and grad.any()), f"no gradient reaches {name}")
        demand(grad is None or grad.isfinite().all(), f"the gradient of {name} is not finite")


@verifies("training")
def training_changes_nothing_else(subject: Subject) -> None:
    """Values, modes, hooks, attributes and settings of model and teacher stay, and the batch; gradients alone are new."""
    tried = Tried(subject)
    models = {"the model": tried.model} if tried.teacher is tried.model else {}
    models = models or {"the model": tried.model, **({} if tried.teacher is None else {"the teacher": tried.teacher})}
    for model in models.values():
        specimens.distinguish(model)
    before, kept = {name: state(model) for name, model in models.items()}, copy.deepcopy(tried.batch)
    sum(tried.losses().values(), torch.zeros(())).backward()
    for name, model in models.items():
        after = state(model)
        trained = subject.card.trains if model is tried.model else ()
        left = [
            what
            for what in changed(before[name], after)
            if not (what.startswith("the gradient of ") and _is_trained(what.rpartition(" ")[2], trained))
        ]
        demand(not left, f"{name} is not as before: {', '.join(left[:3])}")
    demand(same(kept, tried.batch), "the batch was changed")


@verifies("training")
def losses_repeat(subject: Subject) -> None:
    """In evaluation mode two calls give the same bits, whatever random numbers were drawn in between."""
    tried = Tried(subject)
    first = tried.losses()
    torch.rand(7)
    second = tried.losses()
    different = [name for name in first if not same(first[name], second.get(name))]
    demand(not different, f"two calls differ in {', '.join(different)}")


@verifies("training")
def rows_come_in_any_order(subject: Subject) -> None:
    """The rows of a batch in another order give the same losses."""
    tried = Tried(subject)
    turned = _turned(tried.batch)
    demand(not same(turned, tried.batch), "the batch has no rows to be turned")
    for name, loss in tried.losses(turned).items():
        demand_near(loss, tried.losses()[name], SAME[torch.float32], name)


def _demand_named(what: str, function: Any, first: int, options: Collection[str]) -> None:
    """Behind the first parameters there are only settings, with a default or on the card."""
    for place, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        swallows = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        demand(not swallows, f"{what} has *{name}, which would swallow a misspelt option")
        free = parameter.default is not parameter.empty or name in options
        demand(place < first or free, f"{what} also needs {name}")


def _is_trained(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern means a parameter; those of the loss and of a teacher are meant by their prefix alone."""
    prefix = next((p for p in ("self.", "teacher.") if name.startswith(p)), "")
    return any(fnmatchcase(name, pattern) for pattern in patterns if pattern.startswith(prefix))


def _turned(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.flip(0)
    if isinstance(batch, Mapping):
        return {name: _turned(x) for name, x in batch.items()}
    return tuple(map(_turned, batch)) if isinstance(batch, tuple) else batch
