"""show: tell everything about a system."""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import asdict

from regard.contract.catalogue import catalogue, find


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="slug, or room/slug for a part")
    parser.add_argument("--json", action="store_true", help="the card as JSON")


def run(given: argparse.Namespace) -> int:
    entry = find(given.name)
    card = entry.card
    if given.json:
        print(json.dumps({"name": entry.name, "kind": card.kind, "module": entry.module, **asdict(card)}, indent=1))
        return 0
    print(f"{card.title}  ({card.kind} {entry.name}, {entry.module})")
    if card.paper:
        print(f"paper: {card.paper}")
    for field, value in asdict(card).items():
        if field not in ("slug", "title", "paper", "exports", "part_of", "example") and value not in (
            "",
            (),
            {},
            False,
        ):
            print(f"{field}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}")
    parts = [e.name for e in catalogue().values() if e.card.part_of == card.slug and not card.part_of]
    if parts:
        print(f"also: {', '.join(parts)}")
    for name, value in entry.exports().items():
        print(f"\nregard.{name}{inspect.signature(value)}")
        print(inspect.getdoc(value) or "")
    return 0
