"""Engine dispatch: which implementation runs, and why the others cannot.

An engine module has `IMPLEMENTATIONS`, best first. Each one says, for a call, why it cannot run it; the first without
a reason runs. A named engine runs or raises with its reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from regard.contract.errors import OptionError, Unsupported, near
from regard.contract.split import current

FAMILIES = ("dense", "block_sparse", "gather", "scan", "readout", "automatic", "native")


@dataclass(frozen=True)
class Implementation:
    """name: "family:way". cannot: the reasons it cannot run a call, empty if it can. run: computes it."""

    name: str
    cannot: Callable[[Any], list[str]]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Verdict:
    """What `why` says of one implementation: its reasons against, whether it runs, and what was estimated of it."""

    name: str
    reasons: tuple[str, ...]
    chosen: bool
    note: str = ""


_listeners: list[list[Verdict]] = []


def engine(name: str) -> ModuleType:
    """The engine module of a family, by name."""
    if name not in FAMILIES:
        raise OptionError(f"there is no engine {name!r}{near(name, FAMILIES)}; the engines are {', '.join(FAMILIES)}")
    return import_module(f"regard.engines.{name}")


def choose(
    implementations: Sequence[Implementation],
    requested: str | None,
    call: Any,
    notes: Mapping[str, str] | None = None,
) -> Implementation:
    """The implementation that runs a call.

    requested: None for the first that can; "family" for the first of the family; "family:way" for that one;
    "reference" for the definition. notes: what the verdicts say beside the reasons, by name. Raises OptionError for
    an unknown name, Unsupported with all reasons.
    """
    split = current()
    if split is not None:
        return split.implementation(implementations, requested, call)
    if requested is None and not _listeners:
        for implementation in implementations:
            if not implementation.cannot(call):
                return implementation
    candidates = [i for i in implementations if matches(i.name, requested)]
    if not candidates:
        names = [i.name for i in implementations]
        raise OptionError(
            f"no engine {requested!r} runs this{near(requested or '', names)}; there are {', '.join(names)}"
        )
    verdicts = [(i, i.cannot(call)) for i in candidates]
    chosen = next((i for i, reasons in verdicts if not reasons), None)
    for listener in _listeners:
        listener.extend(
            Verdict(i.name, tuple(reasons), i is chosen, (notes or {}).get(i.name, "")) for i, reasons in verdicts
        )
    if chosen is None:
        text = "; ".join(f"{i.name}: {', '.join(reasons)}" for i, reasons in verdicts)
        raise Unsupported(f"no engine can run this call. {text}")
    return chosen


def matches(name: str, requested: str | None) -> bool:
    """Whether an implementation's name is meant by a request."""
    family, _, way = name.partition(":")
    return requested is None or requested in (name, family, way)


def is_listened_to() -> bool:
    """Whether anybody collects verdicts, so that notes are worth writing."""
    return bool(_listeners)


@contextmanager
def listen() -> Iterator[list[Verdict]]:
    """Collect the verdicts of every choice made inside the block."""
    verdicts: list[Verdict] = []
    _listeners.append(verdicts)
    try:
        yield verdicts
    finally:
        _listeners.remove(verdicts)


def why(slug: str, tensors: str, *, engine: str | None = None, **options: Any) -> list[Verdict]:
    """Which engine would run an op on such tensors, and why not the others. Nothing is computed.

    tensors: "q=2,8,4096,64:bf16 k=2,2,4096,64:bf16", missing ones have q's shape. options: the op's own.
    Raises UnknownName, OptionError; Unsupported if no engine can.
    """
    from regard.contract.catalogue import find
    from regard.contract.shapes import parse, read_tensors

    entry = find(slug, "ops")
    op = entry.load()
    needed = {**entry.card.options, **options}
    if "self" not in op.card.attends:
        needed.setdefault("is_causal", True)
    with listen() as verdicts:
        op(*read_tensors(tensors, parse(op.card.spec)), engine=engine, **needed)
    return verdicts
