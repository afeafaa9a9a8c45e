"""The type stub of the package: what is found by name, as imports that editors and type checkers can read."""

from __future__ import annotations

from regard._doors import DOORS
from regard.contract.catalogue import public_names

_HEAD = "# written by docs/generate.py from the cards and regard/_doors.py\n# ruff: noqa\n"


def stub() -> str:
    """The text of regard/__init__.pyi: one import a public name, sorted by module and name."""
    doors = {**DOORS, **{name: entry.module for name, entry in public_names().items()}}
    lines = [f"from {module} import {name} as {name}" for module, name in sorted((m, n) for n, m in doors.items())]
    return _HEAD + "\n".join(["from regard._version import __version__ as __version__", *lines]) + "\n"
