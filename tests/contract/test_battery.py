"""The battery on the whole library: every check that applies, on every system, as a test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from regard.checks import mixers, ops
from regard.checks.battery import check, checks, every_subject, run, subjects
from regard.contract.catalogue import CardError
from regard.contract.errors import OptionError, UnknownName

STRANGERS = sorted((Path(__file__).parent / "strangers").glob("*.py"))
SUBJECTS = every_subject()
PAIRS = [(c, s) for s in SUBJECTS for c in checks() if c.kind == s.card.kind]
COMPILED = {"op": ops.compiles_with, "mixer": mixers.compiles_with}


@pytest.mark.parametrize("check_, subject", PAIRS, ids=[f"{s.name}-{c.name}" for c, s in PAIRS])
def test_claim_holds(check_, subject):
    row = run(check_, subject)
    if row.status == "not claimed":
        pytest.skip("not claimed")
    assert row.status == "passed", row.message


@pytest.mark.slow
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.card.kind in COMPILED], ids=lambda s: s.name)
def test_inductor_equals_eager(subject):
    COMPILED[subject.card.kind](subject, "inductor")


@pytest.mark.parametrize("path", STRANGERS, ids=lambda path: path.stem)
def test_a_strangers_file_passes(path):
    report = check(path)
    assert report.ok, str(report)
    assert {row.check for row in report.rows} >= {c.name for c in checks() if c.kind == subjects(path)[0].card.kind}


def test_every_system_is_checked():
    kinds = {c.kind for c in checks()}
    assert {s.card.kind for s in SUBJECTS} <= kinds
    assert {"ops/softmax", "mixers/softmax", "ops/based", "mixers/based", "mixers/aaren", "bench/zoology"} <= {
        s.name for s in SUBJECTS
    }


def test_a_slug_means_all_its_files_and_a_room_one():
    assert [s.name for s in subjects("based")] == ["ops/based", "mixers/based", "models/based"]
    assert [s.name for s in subjects("mixers/based")] == ["mixers/based"]
    assert [s.name for s in subjects("softmax")] == ["ops/softmax", "mixers/softmax"]


def test_what_is_not_claimed_is_said_so_and_never_passed():
    report = check("lightning")
    status = {(row.subject, row.check): row.status for row in report.rows}
    assert status["ops/lightning", "attends_cross"] == "not claimed"
    assert status["ops/lightning", "refuses_other_attends"] == "passed"
    assert "not claimed  attends_cross" in str(report)
    assert str(report).splitlines()[-1].endswith("not claimed")


def test_a_report_says_why_a_check_failed():
    report = check(Path(__file__).parents[1] / "culprits" / "ops" / "forgets_the_mask.py")
    assert not report.ok
    assert "failed       mask_matters" in str(report) and "the mask changes nothing" in str(report)


def test_what_is_no_system_is_refused(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        check("sofmax")
    with pytest.raises(OptionError, match="is not a file"):
        check(tmp_path / "missing.py")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(OptionError, match="has no card"):
        check(str(empty))
    broken = tmp_path / "broken.py"
    broken.write_text('CARD = OpCard(\n    slug="broken",\n    titel="",\n)\n')
    with pytest.raises(CardError, match=r"broken.py: unknown field 'titel' \(did you mean 'title'"):
        check(broken)
