"""The type stub: fresh, and of use to a type checker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard._doors import DOORS
from regard.contract.catalogue import public_names
from regard.contract.stubs import stub

ROOT = Path(regard.__file__).parent
USE = """
import regard
from regard import Causal, attend, sigmoid_attention, softmax_attention
from torch import Tensor

def right(q: Tensor) -> Tensor:
    out = sigmoid_attention(q, q, q, length=8, pattern=Causal())
    title: str = sigmoid_attention.card.title
    plain: Tensor = sigmoid_attention.reference(q, q, q, length=8)
    return attend(out, plain, q, is_causal=True) + regard.softmax_attention(q, q, q, scale=1.0)
"""
WRONG = {
    "lenght=8": ("regard.sigmoid_attention(q, q, q, lenght=8)", "lenght"),
    "a text as length": ("regard.sigmoid_attention(q, q, q, length='long')", "incompatible type"),
    "in the reference": ("softmax_attention.reference(q, q, q, scael=1.0)", "scael"),
    "an unknown name": ("regard.sigmoidal_attention(q, q, q)", "sigmoidal_attention"),
    "an unknown field": ("softmax_attention.card.titel", "titel"),
    "an unknown option of attend": ("attend(q, q, q, causal=True)", "causal"),
}


def test_the_committed_stub_is_fresh():
    path = ROOT / "__init__.pyi"
    assert path.exists() and path.read_text(encoding="utf-8") == stub(), "the stub is stale: python docs/generate.py"


def test_every_public_name_stands_in_it_once():
    lines = stub().splitlines()
    for name in {*DOORS, *public_names(), "__version__"}:
        assert sum(line.endswith(f" import {name} as {name}") for line in lines) == 1, name
        assert getattr(regard, name) is not None


@pytest.fixture(scope="module")
def complaints(tmp_path_factory) -> dict[int, str]:
    """line -> what mypy says of it. torch is left out: only our own signatures are asked for."""
    folder = tmp_path_factory.mktemp("typed")
    body = USE + "\ndef wrong(q: Tensor) -> None:\n" + "".join(f"    {code}\n" for code, _ in WRONG.values())
    (folder / "use.py").write_text(body)
    (folder / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {ROOT.parent}\ncache_dir = {folder / 'cache'}\nfollow_imports = silent\n"
        "[mypy-torch.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
        "[mypy-numpy.*]\nfollow_imports = skip\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "use.py"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[int, str] = {}
    for text in done.stdout.splitlines():
        place, kind, message = text.partition(": error: ")
        if kind and place.startswith("use.py:"):
            line = int(place.split(":")[1])
            found[line] = found.get(line, "") + message
    return found


FIRST_WRONG = len(USE.splitlines()) + 3


def test_what_is_right_is_not_flagged(complaints):
    assert not {line: text for line, text in complaints.items() if line < FIRST_WRONG}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_flagged(complaints, name):
    line = FIRST_WRONG + list(WRONG).index(name)
    assert WRONG[name][1] in complaints.get(line, "nothing was said")
