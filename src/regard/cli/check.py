"""check: run the contract battery on a system, or on a file of your own."""

from __future__ import annotations

import argparse

from regard.checks.battery import check
from regard.contract.catalogue import catalogue


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="slugs or Python files; none for the whole library")


def run(given: argparse.Namespace) -> int:
    failed = 0
    # a slug means all its files, also those that are part of it
    for name in given.names or [name for name, entry in catalogue().items() if not entry.card.part_of]:
        report = check(name)
        print(report)
        failed += not report.ok
    return 1 if failed else 0
