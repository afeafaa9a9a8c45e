"""The catalogue: every card of the library, found by walking the rooms, read without importing a file.

There is no list to edit. A file with a card is a system; its stem is its name.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from regard.contract.card import CARDS, Card
from regard.contract.errors import OptionError, RegardError, UnknownName, near

ROOT = Path(__file__).resolve().parents[1]
# rooms that hold systems, in import order
ROOMS = ("ops", "mixers", "parallel", "models", "steer", "explain", "train", "bench")
_CARD = re.compile(r"^CARD(?:: \w+)? = (\w+)\(\n.*?^\)\n", re.MULTILINE | re.DOTALL)


class CardError(RegardError, ValueError):
    """A card that cannot be read: the text names the file and the field."""


@dataclass(frozen=True)
class Entry:
    """One file with a card. path: the file; module: its import name; room: its first folder."""

    card: Card
    path: Path
    module: str
    room: str

    @property
    def name(self) -> str:
        """Unique over the library: the slug for an owner, room/slug for a part of another system."""
        return self.card.slug if not self.card.part_of else f"{self.room}/{self.card.slug}"

    def load(self) -> Any:
        """Import the file and return its first export."""
        return getattr(_import(self), self.card.exports[0])

    def exports(self) -> dict[str, Any]:
        """Import the file and return all its public names."""
        module = _import(self)
        return {name: getattr(module, name) for name in self.card.exports}


def read_card(path: Path) -> Card | None:
    """The card of a file, from its text; None if it has none. Raises CardError naming file and field."""
    text = path.read_text(encoding="utf-8")
    found = _CARD.search(text)
    if found is None:
        if re.search(r"^CARD\b", text, re.MULTILINE):
            raise CardError(f"{path}: the card must be written as 'CARD = OpCard(', fields, and a line ')'")
        return None
    call = ast.parse(found.group(0)).body[0].value  # type: ignore[attr-defined]
    kind = CARDS.get(found.group(1))
    if kind is None:
        raise CardError(f"{path}: {found.group(1)} is not a card; the kinds are {', '.join(CARDS)}")
    values: dict[str, Any] = {}
    known = [f.name for f in fields(kind)]
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise CardError(f"{path}: unknown field {keyword.arg!r}{near(keyword.arg or '', known)}")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise CardError(f"{path}: field {keyword.arg!r} is not a literal; cards are read, not run") from error
    try:
        card = kind(**values)
    except (TypeError, ValueError) as error:
        raise CardError(f"{path}: {error}") from error
    if card.slug != path.stem:
        raise CardError(f"{path}: field 'slug' is {card.slug!r}, but the file is called {path.stem!r}")
    return card


def walk(root: Path = ROOT, package: str = "regard") -> Iterator[Entry]:
    """Every file with a card below a folder that is laid out in rooms."""
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            card = read_card(path)
            if card is not None:
                module = ".".join((package, *path.relative_to(root).with_suffix("").parts))
                yield Entry(card, path, module, room)


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Entry]:
    """name -> entry for the whole library; owners first, then parts as "room/slug"."""
    return index(walk())


def index(entries: Iterator[Entry]) -> dict[str, Entry]:
    """Check that slugs and public names are unique, and sort by name."""
    found: dict[str, Entry] = {}
    public: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in found:
            raise CardError(f"{entry.path}: the name {entry.name!r} is taken by {found[entry.name].path}")
        found[entry.name] = entry
        for name in entry.card.exports:
            if name in public:
                raise CardError(f"{entry.path}: the export {name!r} is taken by {public[name].path}")
            public[name] = entry
    for entry in found.values():
        owner = entry.card.part_of
        if owner and owner not in found:
            raise CardError(f"{entry.path}: part_of names {owner!r}, which has no card")
    return dict(sorted(found.items(), key=lambda pair: (bool(pair[1].card.part_of), pair[0])))


def find(name: str, room: str = "") -> Entry:
    """The entry of a name; with a room, that system's file in the room. Raises UnknownName with near names."""
    entries = catalogue()
    if room:
        for entry in entries.values():
            if entry.room == room and name in (entry.card.slug, entry.card.part_of):
                return entry
        names = sorted({e.card.slug for e in entries.values() if e.room == room})
        raise UnknownName(f"no system {name!r} in {room}/{near(name, names)}; it has: {', '.join(names)}")
    if name in entries:
        return entries[name]
    raise UnknownName(f"no system is called {name!r}{near(name, entries)}; 'regard list' shows all")


def systems_that(**claims: Any) -> list[str]:
    """Owners' slugs whose card has all the given claims; for a tuple field the claim must be among its words."""
    return [
        entry.card.slug
        for entry in catalogue().values()
        if not entry.card.part_of and all(_claims(entry.card, field, wanted) for field, wanted in claims.items())
    ]


def _claims(card: Card, field: str, wanted: Any) -> bool:
    value = getattr(card, field, None)
    return wanted in value if isinstance(value, tuple) else value == wanted


def public_names() -> dict[str, Entry]:
    """public name -> the entry that exports it."""
    return {name: entry for entry in catalogue().values() for name in entry.card.exports}


def from_file(path: str | Path) -> Entry:
    """The entry of a stranger's file, which need not lie in the library. Raises OptionError without a card."""
    path = Path(path).resolve()
    if not path.is_file():
        raise OptionError(f"{path} is not a file; give a system's name or a Python file with a card")
    card = read_card(path)
    if card is None:
        raise OptionError(f"{path} has no card; start it with 'CARD = OpCard(' (see 'regard new')")
    for entry in catalogue().values():
        if entry.path == path:
            return entry
    room = {
        "op": "ops",
        "mixer": "mixers",
        "pool": "mixers",
        "parallel": "parallel",
        "model": "models",
        "explanation": "explain",
        "intervention": "steer",
        "decoding": "steer",
        "training": "train",
        "task": "bench",
    }[card.kind]
    return Entry(card, path, f"regard_file_{card.slug}", room)


def _import(entry: Entry) -> Any:
    if entry.module in sys.modules:
        return sys.modules[entry.module]
    if entry.module.startswith("regard."):
        return importlib.import_module(entry.module)
    spec = importlib.util.spec_from_file_location(entry.module, entry.path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[entry.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[entry.module]
        raise
    return module
