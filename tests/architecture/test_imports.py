"""A room imports only the rooms above it, also inside functions; no circles; `builds_on` is what is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import regard
from regard.contract.catalogue import catalogue

ROOT = Path(regard.__file__).parent
BELOW_ENGINES = {"contract", "patterns", "primitives", "engines"}
EFFECTS = {*BELOW_ENGINES, "ops", "layers", "hosts"}
# the table of DESIGN.md, section 2; every room may import itself
MAY_IMPORT = {
    "contract": set(),
    "patterns": {"contract"},
    "primitives": {"contract"},
    "engines": {"contract", "patterns", "primitives"},
    "ops": BELOW_ENGINES,
    "layers": BELOW_ENGINES,
    "hosts": BELOW_ENGINES,
    "mixers": {*BELOW_ENGINES, "ops", "layers"},
    "parallel": {*BELOW_ENGINES, "ops"},
    "models": {*BELOW_ENGINES, "ops", "layers", "mixers"},
    "steer": EFFECTS,
    "explain": EFFECTS,
    "train": EFFECTS,
    "checks": {"contract", "patterns", "primitives", "hosts"},
    "bench": {"contract", "patterns", "primitives", "hosts", "models", "train"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
# files of the package itself that hold plain values
PLAIN = {"_version", "_doors"}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = ("regard", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything of this package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "regard")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if (node.module or "").split(".")[0] == "regard":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield node.lineno, inner if inner in MODULES else str(node.module)


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def violations(path: Path, room: str) -> list[str]:
    allowed = {*MAY_IMPORT[room], room, *PLAIN, ""}
    return [
        f"{path}:{line}: {room}/ may not import {module}"
        for line, module in imports(path)
        if room_of(module) not in allowed or (module == "regard" and room not in ("cli", "bench"))
    ]


def test_every_room_has_a_place_in_the_order():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(MAY_IMPORT), "a room that DESIGN.md, section 2, does not know"


def test_the_order_has_no_circle():
    left = {room: set(allowed) for room, allowed in MAY_IMPORT.items() if room != "cli"}
    done: set[str] = set()
    while left:
        free = [room for room, allowed in left.items() if allowed <= done]
        assert free, f"a circle among {sorted(left)}"
        done.update(free)
        for room in free:
            del left[room]


@pytest.mark.parametrize("room", sorted({p.relative_to(ROOT).parts[0] for p in FILES if p.parent != ROOT}))
def test_a_room_imports_only_rooms_above_it(room):
    found = [v for path in sorted((ROOT / room).rglob("*.py")) for v in violations(path, room)]
    assert not found, "\n".join(found)


def test_the_front_door_imports_the_contract_only():
    found = {room_of(module) for _, module in imports(ROOT / "__init__.py")}
    assert found <= {"contract", *PLAIN, ""}


def test_a_planted_violation_is_seen(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def late():\n    from regard.layers.attention import Attention\n    return Attention\n")
    assert violations(planted, "ops") and violations(planted, "contract")
    assert not violations(planted, "mixers")
    planted.write_text("import regard.ops.softmax\nfrom regard.patterns import Causal\n")
    assert len(violations(planted, "checks")) == 1


def test_modules_import_each_other_without_circles():
    edges = {name: {m for _, m in imports(path) if m in MODULES and m != name} for name, path in MODULES.items()}
    # a package's own __init__ gathers its files
    edges = {name: {m for m in found if not name.startswith(m + ".")} for name, found in edges.items()}
    while True:
        leaves = [name for name, found in edges.items() if not found & set(edges)]
        if not leaves:
            break
        for name in leaves:
            del edges[name]
    assert not edges, f"these import each other in a circle: {sorted(edges)}"


def test_builds_on_is_what_is_imported():
    systems = {entry.module: entry.card for entry in catalogue().values()}
    for entry in catalogue().values():
        used = {systems[m].part_of or systems[m].slug for _, m in imports(entry.path) if m in systems}
        assert used == set(entry.card.builds_on), f"{entry.path} says {entry.card.builds_on}, but imports {used}"


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_attend_is_quick_beyond_torch():
    code = "import torch, time; t = time.process_time(); import regard; regard.attend; print(time.process_time() - t)"
    assert min(float(fresh(code)) for _ in range(3)) < 0.3
