"""The summary says what the lines hold: figures, growth, the front, equals, and what is missing."""

import json

import numpy as np
import pytest

from regard.bench.summary import Fit, amount, digits, fit, pareto, summarise
from tests.bench.made_results import LENGTHS, SYSTEMS, made_results


def answer(summary, use):
    return next(a for a in summary.answers if a.use == use)


def with_scores(scores, task="text"):
    """Made lines in which the chosen runs of a task end with these values: slug -> one a seed."""
    seeds = len(next(iter(scores.values())))
    lines = made_results(systems=tuple(scores), seeds=seeds)
    for line in lines:
        if line["kind"] == "train" and line["task"] == task and line["best"]:
            line["value"] = scores[line["system"]][line["seed"]]
    return lines


def test_every_system_has_a_row_with_its_figures():
    lines = made_results()
    summary = summarise(lines)
    assert tuple(row.system for row in summary.rows) == SYSTEMS
    assert summary.length == 2048 and summary.lengths == LENGTHS and not summary.missing
    runs = [x for x in lines if x["kind"] == "train" and x["system"] == "based" and x["task"] == "text" and x["best"]]
    text = summary.rows[SYSTEMS.index("based")].text
    assert text is not None and text.lrs == (0.003,) and text.whole
    assert text.mean == pytest.approx(np.mean([run["value"] for run in runs]))
    assert text.spread == pytest.approx(np.std([run["value"] for run in runs], ddof=1))
    cost = summary.rows[0].costs[4096]
    assert cost.prefill_ms == pytest.approx(4096e3 / cost.prefill_tokens_per_s)


def test_json_holds_the_same_table():
    table = json.loads(json.dumps(summarise(made_results()).as_dict(), allow_nan=False))
    assert [row["system"] for row in table["rows"]] == list(SYSTEMS)
    assert table["rows"][0]["costs"]["512"]["state_bytes"] == 4096 * 512
    assert table["answers"][0]["sentence"].startswith("For 2,048-token text on this machine")


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_fit_finds_the_power(exponent):
    found = fit(LENGTHS, [3.0 * n**exponent for n in LENGTHS])
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert found.error == pytest.approx(0, abs=1e-12) and found.points == 6


def test_fit_agrees_with_numpy_and_says_how_sure_it_is():
    costs = np.random.default_rng(0).lognormal(size=6) * np.array(LENGTHS)
    slope, covariance = np.polyfit(np.log(LENGTHS), np.log(costs), 1, cov="unscaled")
    found = fit(LENGTHS, costs)
    left = np.log(costs) - np.polyval(np.polyfit(np.log(LENGTHS), np.log(costs), 1), np.log(LENGTHS))
    assert found.exponent == pytest.approx(slope[0])
    assert found.error == pytest.approx(np.sqrt(covariance[0, 0] * (left @ left) / 4))


def test_fit_needs_two_lengths_and_leaves_zeros_out():
    assert fit([512], [1.0]) is None
    assert fit([512, 1024], [0.0, 1.0]) is None
    assert fit([512, 1024], [1.0, 2.0]) == Fit(pytest.approx(1.0), None, 2)


def test_pareto_keeps_what_none_beats():
    points = {"big": (100, 0.99), "small": (10, 0.5), "worse": (50, 0.4), "same": (10, 0.5), "bigger": (200, 0.99)}
    assert pareto(points) == ("small", "same", "big")


def test_overlapping_spreads_are_equals_and_named():
    found = answer(
        summarise(with_scores({"softmax": (1.80, 1.82), "based": (1.81, 1.83), "linear": (2.0, 2.01)})), "Text quality"
    )
    assert found.picks == ("softmax", "based")
    assert "based (1.820 ± 0.014) cannot be told apart" in found.sentence and "linear" not in found.sentence


def test_a_clear_difference_names_one_and_the_next():
    found = answer(summarise(with_scores({"softmax": (1.900, 1.902), "based": (1.800, 1.801)})), "Text quality")
    assert found.picks == ("based",) and "next and last is softmax (1.901 ± 0.001)" in found.sentence
    assert "Two seeds" in found.caveat


def test_a_spread_small_by_luck_does_not_win():
    scores = {"softmax": (1.80, 1.80), "based": (1.81, 1.81), "linear": (1.90, 1.96)}
    assert answer(summarise(with_scores(scores)), "Text quality").picks == ("softmax", "based")


def test_one_seed_cannot_separate_what_is_within_one_per_cent():
    found = answer(summarise(with_scores({"softmax": (1.80,), "based": (1.815,), "linear": (1.9,)})), "Text quality")
    assert found.picks == ("softmax", "based")
    assert "with one seed" in found.sentence and "within 1%" in found.sentence and "chance" in found.caveat


def test_equal_recall_is_settled_by_the_smaller_state():
    found = answer(summarise(with_scores({"softmax": (0.99, 1.0), "based": (0.99, 1.0)}, "recall")), "Recall")
    assert set(found.picks) == {"softmax", "based"}
    assert "based keeps the smallest state: 384 KiB at 16,384 tokens" in found.caveat


def test_recall_near_chance_is_no_recall():
    found = answer(summarise(with_scores({"aaren": (0.01,), "sliding_window": (0.012,)}, "recall")), "Recall")
    assert found.picks == () and "none of these will do" in found.sentence


def test_long_decoding_compares_at_the_longest_length_all_have():
    lines = [
        x for x in made_results() if not (x["kind"] == "speed" and x["system"] == "softmax" and x["length"] > 4096)
    ]
    summary = summarise(lines)
    assert "after 4,096 tokens" in answer(summary, "Long decoding").sentence
    assert "softmax: no speed at 8,192 and 16,384 tokens yet." in summary.missing


def test_a_diverged_system_is_listed_and_not_compared():
    summary = summarise(made_results(diverged=(("text", "softmax"),)))
    assert "softmax: text diverged with 2 of 2 seeds at learning rate 0.003." in summary.missing
    assert summary.rows[0].text.mean is None
    assert "softmax" not in answer(summary, "Text quality").picks
    assert "1 of 8 systems lack a part" in answer(summary, "A balanced pick").caveat


def test_one_diverged_seed_keeps_the_mean_out_of_the_answers():
    lines = made_results()
    next(x for x in lines if x["kind"] == "train" and x["system"] == "softmax" and x["best"])["value"] = None
    summary = summarise(lines)
    assert summary.rows[0].text.diverged == 1 and summary.rows[0].text.mean is not None
    assert "softmax" not in answer(summary, "Text quality").picks


def test_a_cheap_pick_that_diverged_carries_a_warning():
    summary = summarise(made_results(systems=("softmax", "linear"), diverged=(("text", "linear"),)))
    assert "linear diverged" in answer(summary, "Long decoding").caveat


def test_an_unfinished_search_is_shown_but_not_compared():
    summary = summarise(made_results(settled=False))
    assert summary.rows[0].text.mean is not None and not summary.rows[0].text.whole
    assert {a.use for a in summary.answers} == {"Long decoding", "Long prompts", "Training speed"}
    assert sum("still searching its learning rate" in text for text in summary.missing) == 2 * len(SYSTEMS)


def test_what_was_not_asked_and_what_is_not_there_yet_differ():
    assert "Recall was not part of this run." in summarise(made_results(tasks=("text",))).missing
    lines = [line for line in made_results() if line.get("task") != "recall"]
    assert "Recall has not been measured yet." in summarise(lines).missing
    lines = [line for line in made_results() if line.get("system") != "sqa" or line["kind"] != "train"]
    assert "sqa: text not measured yet." in summarise(lines).missing


def test_a_measurement_that_failed_says_why():
    lines = made_results()
    for line in lines:
        if line["kind"] == "speed" and line["system"] == "softmax" and line["length"] == 16384:
            line.update(decode_ms=None, peak_mib=None, reason="out of memory")
    assert "softmax: decoding and peak memory at 16,384 tokens not measured: out of memory." in summarise(lines).missing


def test_nothing_measured_gives_no_answer():
    summary = summarise([])
    assert summary.rows == () and summary.answers == () and summary.missing == ("Nothing has been measured yet.",)
    assert summarise(made_results()[:1]).answers == ()


def test_training_that_ended_early_is_noted():
    lines = made_results()
    for line in lines:
        if line["kind"] == "train" and line["system"] == "sqa" and line["task"] == "text":
            line["stopped"] = "time"
    assert any("the clock ended training of sqa" in note for note in summarise(lines).notes)


def test_mixed_machines_are_noted():
    lines = made_results()
    lines[-1]["hardware"] = "another machine"
    assert any("different machines" in note for note in summarise(lines).notes)


def test_times_that_cannot_be_right_are_pointed_out():
    lines = made_results()
    assert not any("disturbed" in note for note in summarise(lines).notes)
    found = next(x for x in lines if x["kind"] == "speed" and x["system"] == "linear" and x["length"] == 2048)
    found["decode_ms"] *= 10
    summary = summarise(lines)
    assert [note for note in summary.notes if "disturbed" in note and "linear" in note and "2,048" in note]
    assert "busy" in answer(summary, "Long decoding").caveat and "busy" not in answer(summary, "Text quality").caveat


def test_numbers_are_written_plainly():
    assert [amount(n) for n in (0, 4352, 65536, 1 << 26, 3 << 30)] == ["0 B", "4.2 KiB", "64 KiB", "64 MiB", "3 GiB"]
    assert [digits(v) for v in (0, 0.9146, 5.4, 26073.4)] == ["0", "0.915", "5.40", "26,073"]
