"""The error classes. A message says what came, what is required and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RegardError(Exception):
    """Base of every error that regard raises on purpose."""


class ShapeError(RegardError, ValueError):
    """A tensor whose axes, dtype or device do not fit the others."""


class OptionError(RegardError, ValueError):
    """An option or setting with a value it cannot have."""


class Unsupported(RegardError, NotImplementedError):
    """Something the system does not claim; the text names systems that can."""


class MissingExtra(RegardError, ImportError):
    """An optional library that is not installed; the text says how to get it."""


class UnknownName(RegardError, LookupError):
    """A name that is not in the catalogue; the text names near ones."""


def near(name: str, names: Iterable[str]) -> str:
    """A hint such as " (did you mean 'based'?)", or "" when nothing is near."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
