"""Rules for the text of the source: comparisons that count, no pickle, no swallowed options."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import regard

ROOT = Path(regard.__file__).parent
TESTS = Path(__file__).parents[1]
COMPARING = {"allclose", "equal", "isclose", "array_equal", "eq"}


def bare_comparisons(text: str) -> list[int]:
    """Lines on which a comparison is made and its answer dropped."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Expr):
            continue
        value = node.value
        called = value.func if isinstance(value, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if isinstance(value, ast.Compare | ast.BoolOp) or name in COMPARING:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("folder", [ROOT, TESTS], ids=["src", "tests"])
def test_no_comparison_drops_its_answer(folder):
    found = {
        f"{path}:{line}" for path in folder.rglob("*.py") for line in bare_comparisons(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_a_dropped_comparison_is_seen():
    text = "a == b\ntorch.allclose(a, b)\nx = a == b\nassert torch.equal(a, b)\na and b\n"
    assert bare_comparisons(text) == [1, 2, 5]


def test_no_pickle_is_loaded():
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert "pickle" not in names, path


def test_no_public_signature_swallows_options():
    from regard.contract.catalogue import catalogue

    for entry in catalogue().values():
        for node in ast.walk(ast.parse(entry.path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                assert node.args.kwarg is None, f"{entry.path}:{node.lineno}: **{node.args.kwarg.arg} in {node.name}"
