"""Every check has a culprit: a system that is wrong on purpose, and that it must catch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from regard.checks.battery import Check, checks, run, subjects

CULPRITS = sorted((Path(__file__).parents[1] / "culprits").rglob("*.py"))
# what a culprit of another check must pass: it is wrong in one thing and sound otherwise
STRUCTURE = {
    "op": ("card_is_attached", "signature", "axes"),
    "mixer": ("module_is_described", "signature_of_forward", "tokens_to_tokens"),
    "pool": ("pool_is_described", "tokens_to_one_vector"),
    "task": ("rows_are_labelled",),
    "model": ("model_runs",),
    "parallel": ("splits_by_group",),
    "intervention": ("is_a_frozen_value",),
    "decoding": ("decoding_is_a_frozen_value",),
    "explanation": ("explanation_is_described",),
    "training": ("training_is_described",),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def caught_by(path: Path) -> str:
    """The check that a culprit says must catch it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CAUGHT_BY":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} does not say CAUGHT_BY")


def find(kind: str, name: str) -> Check:
    return next(c for c in checks() if (c.kind, c.name) == (kind, name))


@pytest.mark.parametrize("path", CULPRITS, ids=lambda path: path.stem)
def test_culprit_is_caught(path):
    subject = subjects(path)[0]
    named = caught_by(path)
    row = run(find(subject.card.kind, named), subject)
    assert row.status == "failed", f"{named} did not catch {path.name}: {row.status}"
    for name in STRUCTURE[subject.card.kind]:
        if name != named:
            row = run(find(subject.card.kind, name), subject)
            assert row.status == "passed", f"{path.name} is also caught by {name}: {row.message}"


@pytest.mark.parametrize("check", checks(), ids=lambda check: f"{check.kind}-{check.name}")
def test_check_has_a_culprit(check):
    plural = {"op": "ops", "mixer": "mixers", "task": "tasks", "model": "models", "intervention": "steer"}
    plural["explanation"] = "explain"
    folder = plural.get(check.kind, check.kind)
    guilty = [path for path in CULPRITS if path.parent.name == folder and caught_by(path) == check.name]
    assert guilty, f"no culprit in tests/culprits/{folder}/ is caught by {check.name}"


def test_every_check_says_what_it_demands():
    for check in checks():
        assert check.doc.endswith("."), f"{check.name} has no docstring"
        assert "\n" not in check.doc, f"the docstring of {check.name} is longer than a line"
