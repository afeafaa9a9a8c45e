"""The house: which room may import which, and what every room says of itself."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import regard
from regard.contract.catalogue import catalogue

ROOT = Path(regard.__file__).parent
MAY_IMPORT = {
    "contract": (),
    "patterns": ("contract",),
    "primitives": ("contract",),
    "engines": ("contract", "patterns", "primitives"),
    "ops": ("contract", "patterns", "primitives", "engines"),
    "layers": ("contract", "patterns", "primitives", "engines"),
    "mixers": ("contract", "patterns", "primitives", "engines", "ops", "layers"),
    "models": ("contract", "patterns", "primitives", "engines", "ops", "layers", "mixers"),
    "checks": ("contract", "patterns", "primitives"),
    "bench": ("contract", "patterns", "primitives", "models"),
    "cli": ("contract", "patterns", "primitives", "engines", "ops", "layers", "mixers", "models", "checks", "bench"),
}
# the doors and the contract's public access reach rooms below by name, when they are called
BY_NAME = {("contract", "layers")}


def imports(path: Path) -> Iterator[str]:
    """Every regard module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("regard"):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("regard"))


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0]
        if room.endswith(".py"):
            continue
        for module in imports(path):
            target = module.split(".")[1] if "." in module else ""
            allowed = target in ("", room, "_version", "_doors") or target in MAY_IMPORT[room] or (room, target) in BY_NAME
            if not allowed:
                found.append(f"{path.relative_to(root)} imports {module}")
    return found


def test_rooms_import_only_rooms_above_them():
    assert violations(ROOT) == []


def test_a_planted_violation_is_found(tmp_path):
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "bad.py").write_text("def f():\n    from regard.mixers.tokens import sqa\n")
    (tmp_path / "ops" / "good.py").write_text("from regard.engines.dense import dense\n")
    assert violations(tmp_path) == ["ops/bad.py imports regard.mixers.tokens"]


def test_every_room_is_declared_and_there_is_no_circle():
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert rooms == set(MAY_IMPORT)
    seen: list[str] = []
    for room, above in MAY_IMPORT.items():
        assert all(other in seen for other in above), room
        seen.append(room)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_says_what_belongs_there(room):
    doc = importlib.import_module(f"regard.{room}").__doc__ or ""
    assert "Belongs here:" in doc and "Does not:" in doc and "Look at:" in doc
    assert len(doc.strip().splitlines()) <= 8


def test_there_is_no_room_for_leftovers():
    forbidden = {"utils", "util", "misc", "helpers", "common"}
    assert not [p for p in ROOT.rglob("*") if p.stem in forbidden]


def test_systems_import_only_what_their_card_builds_on():
    owners = {e.module: e.card.part_of or e.card.slug for e in catalogue().values()}
    for entry in catalogue().values():
        real = {owners[m] for m in imports(entry.path) if m in owners and m != entry.module}
        assert real == set(entry.card.builds_on), entry.module


def test_no_comparison_stands_alone():
    for folder in (ROOT, Path(__file__).parents[1]):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare)
                assert not alone, f"{path}:{node.lineno} compares and drops the answer"
