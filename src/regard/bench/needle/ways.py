"""Interventions written as text: "snapkv:budget=256,window=16", several in one session joined by "+"."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from typing import Any

from regard.contract.catalogue import catalogue
from regard.contract.errors import OptionError, UnknownName, near


@dataclass(frozen=True)
class Way:
    """One column of the table. name: as it was written; interventions: what acts, nothing for the plain model."""

    name: str
    interventions: tuple[Any, ...] = ()


def read_way(text: str) -> Way:
    """A way from text; "full" is the plain model. Raises UnknownName, OptionError."""
    if text == "full":
        return Way("full")
    return Way(text, tuple(_one(part) for part in text.split("+")))


def _one(text: str) -> Any:
    name, _, given = text.partition(":")
    known = {e.card.slug: e for e in catalogue().values() if e.card.kind == "intervention"}
    if name not in known:
        raise UnknownName(
            f"no intervention is called {name!r}{near(name, known)}; there are {', '.join(sorted(known))}"
        )
    make = known[name].load()
    options = {}
    for pair in _pairs(given):
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"{text!r}: write option=value, not {pair!r}")
        options[key] = _value(value)
    names = [f.name for f in fields(make)]
    for key in options:
        if key not in names:
            raise OptionError(f"{name} has no option {key!r}{near(key, names)}; it has {', '.join(names)}")
    return make(**options)


def _pairs(text: str) -> list[str]:
    """The options, at commas outside of brackets."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append(text[start:place])
            start = place + 1
    return [part for part in (*found, text[start:]) if part]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
