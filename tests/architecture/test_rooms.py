"""What every room says of itself."""

import importlib
from pathlib import Path

import pytest

import regard

ROOT = Path(regard.__file__).parent
ROOMS = sorted(p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith("__"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_belongs_there(room):
    doc = importlib.import_module(f"regard.{room}").__doc__ or ""
    assert "Belongs here:" in doc and "Does not:" in doc and "Look at:" in doc
    assert len(doc.strip().splitlines()) <= 8


def test_there_is_no_room_for_leftovers():
    forbidden = {"utils", "util", "misc", "helpers", "common"}
    assert not [p for p in ROOT.rglob("*") if p.stem in forbidden]
