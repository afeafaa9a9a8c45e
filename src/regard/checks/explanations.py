"""Checks of explanations: readings of a model or of an op."""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass

from regard.checks.battery import Subject, demand, verifies


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
