"""Searches for the parts that help, by trying them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def one_at_a_time(score: Callable[[T], float], candidates: Iterable[T]) -> list[tuple[T, float]]:
    """Every candidate with its score when it is tried alone, best first; equal ones stay in their order."""
    return sorted(((candidate, float(score(candidate))) for candidate in candidates), key=lambda pair: -pair[1])
