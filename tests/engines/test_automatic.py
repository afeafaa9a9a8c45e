"""Which engine is chosen without a name, and what was measured for it."""

from __future__ import annotations

import json
import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import Causal, KeyValid, Sigmoid, Sinks, SlidingWindow
from regard.contract.dispatch import listen
from regard.engines import automatic, calibration, native
from regard.engines.calibration import Rate
from regard.patterns import Empty

NATIVE = native.missing() is None
SLOW, FAST = Rate(10.0, 5000.0), Rate(100.0, 1000.0)
WAYS = ("sdpa causal", "sdpa full", "sdpa masked", "reference", "torch", "native")


@pytest.fixture
def figures(monkeypatch):
    """Stand-in figures: everything slow but what a test names."""
    known = {}
    monkeypatch.setattr(calibration, "_known", known)

    def put(**fast):
        slower = {"torch": Rate(1000.0, 50000.0), "reference": Rate(100.0, 30000.0)}
        known[str(torch.float32)] = (
            dict.fromkeys(WAYS, SLOW) | slower | {w.replace("_", " "): r for w, r in fast.items()}
        )

    return put


def chosen(n, pattern=None, m=None, **options):
    q, k = torch.empty(1, 8, n, 64, device="meta"), torch.empty(1, 8, m or n, 64, device="meta")
    with listen() as verdicts:
        automatic.attend(q, k, k, pattern, **options)
    return next(v for v in verdicts if v.chosen)


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_the_faster_one_by_the_figures_runs(figures):
    figures(native=FAST)
    assert chosen(4096, Causal()).name == "block_sparse:native"
    assert "ms by the figures measured on this machine" in chosen(4096, Causal()).note
    figures(sdpa_causal=FAST, native=SLOW)
    assert chosen(4096, Causal()).name == "dense:sdpa"
    # a narrow window visits so few tiles that a slower rate wins
    figures(sdpa_causal=FAST, sdpa_masked=FAST, native=SLOW)
    assert chosen(4096, Causal() & SlidingWindow(64)).name == "block_sparse:native"
    assert chosen(4096, Causal() & SlidingWindow(3000)).name == "dense:sdpa"


def test_without_figures_a_fixed_rule_holds():
    assert calibration.rates(torch.float32) is None
    assert chosen(64).name == chosen(4096).name == "dense:sdpa"
    blocks = "block_sparse:native" if NATIVE else "block_sparse:torch"
    assert chosen(4096, Causal() & SlidingWindow(64)).name == blocks
    assert chosen(4096, Causal() & SlidingWindow(64) | Sinks(4)).name == blocks
    if NATIVE:
        assert chosen(4096, normaliser=Sigmoid()).name == blocks
        assert chosen(4096, Causal(), dropout_p=0.1).name == blocks


def test_a_slow_way_is_not_forgotten_where_no_other_can(figures):
    figures()
    with listen() as verdicts:
        q = torch.empty(1, 8, 2048, 64, dtype=torch.float64, device="meta")
        automatic.attend(q, q, q, Causal(), normaliser=Sigmoid(), return_lse=False)
    assert next(v.name for v in verdicts if v.chosen) in ("block_sparse:torch", "dense:reference")
    assert any("dtype" in r or "float64" in r for v in verdicts for r in v.reasons)


@pytest.mark.parametrize(
    "pattern",
    [
        Causal(), Causal() & SlidingWindow(64), SlidingWindow(64), Causal() & SlidingWindow(64) | Sinks(4), Sinks(4),
        Causal() & KeyValid().bind(key_valid=torch.ones(1, 2048, dtype=torch.bool)),
    ],
    ids=repr,
)  # fmt: skip
def test_the_estimated_share_is_near_the_true_one(pattern):
    true = pattern.layout(2048, 2048).visited / 32**2
    assert true / 2 <= automatic.estimated_share(pattern, 2048) <= 2 * true


def test_figures_are_measured_once_and_kept(monkeypatch, tmp_path):
    path = tmp_path / "deep" / "figures.json"
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "LENGTH", 128)
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    found = calibration.rates(torch.float32)
    assert {"sdpa causal", "sdpa full", "sdpa masked", "reference", "torch"} <= set(found)
    assert ("native" in found) is NATIVE
    assert all(r.start_us > 0 and r.per_mpair_us > 0 for r in found.values())
    kept = json.loads(path.read_text())
    assert list(kept) == [calibration.machine()] and torch.__version__ in calibration.machine()
    calibration.forget()
    monkeypatch.setattr(calibration, "measure", lambda dtype: pytest.fail("measured twice"))
    assert calibration.rates(torch.float32) == found
    # another machine's figures do not serve
    calibration.forget()
    monkeypatch.setattr(calibration, "machine", lambda: "another")
    monkeypatch.setattr(calibration, "measure", lambda dtype: {"native": FAST})
    assert calibration.rates(torch.float32) == {"native": FAST}
    assert set(json.loads(path.read_text())) == {*kept, "another"}


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]"])
def test_a_broken_cache_is_measured_again(monkeypatch, tmp_path, text):
    path = tmp_path / "figures.json"
    path.write_text(text)
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", lambda dtype: {"native": FAST})
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    assert calibration.rates(torch.float32) == {"native": FAST}


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", lambda dtype: {"native": FAST})
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "file" / "figures.json"))
    assert calibration.rates(torch.float32) == {"native": FAST}


def test_nothing_is_measured_for_small_calls_or_when_switched_off(monkeypatch):
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "measure", lambda dtype: pytest.fail("measured"))
    q = torch.randn(1, 2, 128, 64)
    monkeypatch.delenv(calibration.VARIABLE, raising=False)
    regard.attend(q, q, q, pattern=Causal())
    monkeypatch.setenv(calibration.VARIABLE, "off")
    assert calibration.rates(torch.float32) is None
    q = torch.randn(1, 2, 1024, 64)
    regard.attend(q, q, q, is_causal=True)


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_attend_without_options_takes_the_native_kernels_where_they_are_faster(figures, monkeypatch):
    figures(native=FAST)
    q = torch.randn(1, 2, 1024, 16)
    with listen() as verdicts:
        out = regard.attend(q, q, q, is_causal=True)
    assert [v.name for v in verdicts if v.chosen] == ["block_sparse:native"]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q, is_causal=True), atol=1e-5, rtol=1e-5)
    figures(native=Rate(100.0, 12000.0))
    with listen() as verdicts:
        regard.attend(q, q, q, is_causal=True)
    assert not verdicts


def test_attend_costs_five_microseconds_at_most_where_torchs_attention_is_chosen(figures):
    figures(sdpa_causal=FAST, sdpa_full=FAST)
    q = torch.randn(1, 1, 160, 16)

    def seconds(work):
        times = []
        for _ in range(3000):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    with torch.no_grad():
        pairs = [
            (seconds(lambda: regard.attend(q, q, q)), seconds(lambda: F.scaled_dot_product_attention(q, q, q)))
            for _ in range(3)
        ]
    assert min(ours - theirs for ours, theirs in pairs) <= 5e-6


def test_nothing_is_an_engines_business_too():
    q = torch.randn(1, 1, 600, 8)
    assert (regard.attend(q, q, q, pattern=Empty()) == 0).all()
