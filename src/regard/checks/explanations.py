"""Checks of explanations: readings of a model or of an op."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from regard.checks import specimens
from regard.checks.battery import Subject, demand, verifies
from regard.checks.untouched import changed, randomness, same, state
from regard.contract.optional import need


def is_tried(card: Any) -> bool:
    """Whether the card says how the explanation is called."""
    return bool(card.takes or card.options)


def prepared(subject: Subject) -> tuple[Callable[[], Any], Any, dict[str, Any]]:
    """(the reading as the card says it is called, what it reads, what it is given)."""
    card = subject.card
    model = specimens.make(card.reads) if card.reads else None
    given = {name: specimens.given(word, card.reads, model) for name, word in card.takes.items()}
    if isinstance(model, nn.Module):
        specimens.distinguish(model)
    name, *methods = (card.calls or card.exports[0]).split(".")

    def read() -> Any:
        left = {**given, **card.options}
        found = _called(subject.exports[name], left)
        for method in methods:
            found = _called(getattr(found, method), left)
        demand(not left, f"nothing that is called takes {', '.join(left)}")
        return found

    return read, model, given


def _called(thing: Any, left: dict[str, Any]) -> Any:
    """What comes of a call with what is left and it takes; that is then taken away."""
    return thing(**{name: left.pop(name) for name in inspect.signature(thing).parameters if name in left})


@verifies("explanation")
def explanation_is_described(subject: Subject) -> None:
    """Each export says what it does, swallows no option, and results that are dataclasses are frozen."""
    for name, thing in subject.exports.items():
        demand((thing.__doc__ or "").strip(), f"{name} has no docstring")
        for parameter in inspect.signature(thing).parameters.values():
            kinds = (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            demand(parameter.kind not in kinds, f"{name} has *{parameter.name}, which would swallow a misspelt option")
        if inspect.isclass(thing) and is_dataclass(thing):
            demand(thing.__dataclass_params__.frozen, f"{name} can be changed; results are frozen")  # type: ignore[attr-defined]


@verifies("explanation", is_tried)
def reading_changes_nothing(subject: Subject) -> None:
    """Weights, gradients, modes, hooks, attributes and settings of what is read, what was given, and random numbers stay."""
    read, model, given = prepared(subject)
    values = {name: value for name, value in given.items() if value is not model}
    kept = copy.deepcopy(values)
    before = _all_there_is(model, values)
    read()
    left = changed(before, _all_there_is(model, values))
    demand(not left, f"not as before: {', '.join(left[:3])}")
    for name, value in values.items():
        demand(callable(value) or same(kept[name], value), f"{name} was changed")


def _all_there_is(model: Any, values: dict[str, Any]) -> dict[str, Any]:
    found = {**randomness(), **(state(model) if isinstance(model, nn.Module) else {})}
    for name, value in values.items():
        if isinstance(value, nn.Module):
            found |= {f"{what} in {name}": x for what, x in state(value).items()}
    return found


@verifies("explanation", is_tried)
def reading_repeats(subject: Subject) -> None:
    """Two readings give equal results, whatever random numbers were drawn in between."""
    read, _, _ = prepared(subject)
    first = read()
    torch.rand(7)
    demand(same(first, read()), "two readings differ")


@verifies("explanation", is_tried)
def reading_prints_nothing(subject: Subject) -> None:
    """Nothing is printed."""
    read, _, _ = prepared(subject)
    said = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("ignore")
        read()
    demand(not said.getvalue(), f"it printed {said.getvalue()[:40]!r}")


@verifies("explanation", lambda card: card.figure)
def figure_draws_what_was_found(subject: Subject) -> None:
    """What comes back has a `figure()` that gives a plotly figure, can be drawn, and leaves the data as they are."""
    graphs = need("plotly.graph_objects", "explain")
    found = prepared(subject)[0]()
    kept = copy.deepcopy(found)
    figure = found.figure()
    demand(isinstance(figure, graphs.Figure), f"figure() gave a {type(figure).__name__}")
    demand(len(figure.data) and figure.to_json(), "the figure is empty")
    demand(same(kept, found), "figure() changed the data")
