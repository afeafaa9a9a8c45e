"""Pairs of texts that belong together, from the standard library on this machine."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import numpy as np


def docstring_pairs(seed: int = 0) -> list[tuple[str, str]]:
    """(name and first line, the rest) of docstrings, in an order drawn from the seed; other versions have others."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n")
                rest = " ".join(rest.split())
                if len(first.split()) >= 4 and len(rest.split()) >= 10:
                    found.setdefault(first, (f"{node.name}: {first}", rest[:140]))
    pairs = list(found.values())
    return [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
