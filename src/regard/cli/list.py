"""list: show the systems of the library."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from regard.contract.catalogue import Entry, catalogue


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="only systems with these words in slug, title or paper")
    parser.add_argument("--room", help="only this room, such as ops or mixers")
    parser.add_argument("--attends", help="only systems that claim this pattern, such as causal_self")
    parser.add_argument("--decodes", action="store_true", help="only systems that decode token by token")
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, help="only baselines, or none of them")
    parser.add_argument("--json", action="store_true", help="cards as JSON")


def run(given: argparse.Namespace) -> int:
    rows = [entry for entry in catalogue().values() if _wanted(entry, given)]
    if given.json:
        print(json.dumps([_as_json(entry) for entry in rows], indent=1))
        return 0
    width = max((len(entry.name) for entry in rows), default=0)
    kinds = max((len(entry.card.kind) for entry in rows), default=0)
    for entry in rows:
        print(f"{entry.name:<{width}}  {entry.card.kind:<{kinds}}  {entry.card.title}")
    print(f"{len(rows)} of {len(catalogue())} files; 'regard show NAME' tells more")
    return 0


def _wanted(entry: Entry, given: argparse.Namespace) -> bool:
    card = entry.card
    text = f"{entry.name} {card.title} {card.paper}".lower()
    return (
        all(word.lower() in text for word in given.words)
        and (given.room is None or entry.room == given.room)
        and (given.attends is None or given.attends in getattr(card, "attends", ()))
        and (not given.decodes or bool(getattr(card, "decode", False)))
        and (given.baselines is None or card.baseline == given.baselines)
    )


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.card.kind,
        "room": entry.room,
        "module": entry.module,
        **asdict(entry.card),
    }
