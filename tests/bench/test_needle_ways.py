"""`regard needle` on notes: ways are read from text, cells scored and timed, a stopped run goes on, pages open offline."""

import json

import pytest
import torch

import regard
from regard import OptionError, SnapKV, UnknownName
from regard.bench.needle.cases import Notes
from regard.bench.needle.measure import Plan, Subject, measure, summary
from regard.bench.needle.page import write_page
from regard.bench.needle.ways import read_way
from regard.bench.results import Results
from regard.cli.main import main


class Silent:
    def advance(self, step, note):
        pass


def test_ways_are_read_from_text():
    assert read_way("full").interventions == ()
    way = read_way('snapkv:budget=64,window=16,kernel=5,pool="avg",layers=(0,2)')
    assert way.interventions == (SnapKV(budget=64, window=16, kernel=5, pool="avg", layers=(0, 2)),)
    assert read_way("snapkv:budget=64,pool=avg").interventions == (SnapKV(budget=64, pool="avg"),)


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("snapvk", UnknownName, "did you mean 'snapkv'"),
        ("softmax", UnknownName, "no intervention is called 'softmax'"),
        ("snapkv:bugdet=3", OptionError, "did you mean 'budget'"),
        ("snapkv:64", OptionError, "write option=value"),
        ("snapkv:budget=3", OptionError, "must exceed the window"),
    ],
)
def test_ways_that_cannot_be_read_are_refused(text, error, message):
    with pytest.raises(error, match=message):
        read_way(text)


def test_snapkv_finds_what_it_was_asked_and_recency_does_not(tmp_path):
    tiny = Subject("tiny-lm", regard.tiny.lm()[0], Notes(8))
    ways = [read_way(text) for text in ("full", "snapkv:budget=24,window=8,kernel=1", "recency:budget=24")]
    plan = Plan(lengths=(256,), depths=(0.2, 0.6), rows=8, asks=("again",))
    results = Results(tmp_path / "needle.jsonl")
    lines = measure(tiny, ways, plan, results, Silent())
    assert lines == results.of("needle")
    full, snap, recent = summary(lines)
    assert full["accuracy"] >= 0.9 and snap["accuracy"] >= 0.9
    assert recent["accuracy"] <= 0.5
    # 3 layers, 2 key heads of 32, keys and values, float32; two more tokens were read
    assert snap["cache_bytes"] == 3 * 2 * 2 * 32 * 4 * (24 + 2)
    assert full["cache_bytes"] == 3 * 2 * 2 * 32 * 4 * (256 + 2)
    before = results.path.read_bytes()
    assert measure(tiny, ways, plan, Results(results.path), Silent()) == lines
    assert results.path.read_bytes() == before
    # another model's results are not taken for these, and a part of the plan is found alone
    again = Results(results.path)
    other = measure(Subject("other", tiny.model, Notes(8)), ways[:1], plan, again, Silent())
    assert len(again.lines) == len(lines) + 2 and {line["model"] for line in other} == {"other"}
    assert measure(tiny, ways[:1], plan, again, Silent()) == lines[::3]
    write_page(lines, "tiny-lm", tmp_path / "needle.html")
    page = (tmp_path / "needle.html").read_text()
    assert "recency:budget=24" in page and "http://" not in page.split("<script>")[0]


def test_the_command_prints_a_table(tmp_path, capsys):
    code = main(
        ["needle", "tiny-lm", "--lengths", "128", "--depths", "0.5", "--rows", "2", "--ask", "later", "--json", "--steer",
         "attention_sinks:budget=40", "--out", str(tmp_path)]
    )  # fmt: skip
    assert code == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in rows] == ["full", "attention_sinks:budget=40"]
    assert (tmp_path / "needle.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "neither tiny-lm nor a folder"),
        (["tiny-lm", "--lengths", "a"], "--lengths takes numbers"),
        (["tiny-lm", "--ask", "never"], "--ask takes again and later"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["needle", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_ways_of_giving_up_keys_on_tiny_lm(record, tmp_path):
    tiny = Subject("tiny-lm", regard.tiny.lm()[0], Notes(8))
    texts = ["full"]
    for budget in (32, 77):
        texts += [
            f"snapkv:budget={budget},window=16,kernel=1", f"snapkv:budget={budget},window=16,kernel=7",
            f"heavy_hitters:budget={budget},window=16", f"key_norm:budget={budget},window=16",
            f"attention_sinks:budget={budget}", f"recency:budget={budget}", f"random_keys:budget={budget},window=16",
        ]  # fmt: skip
    results = Results(tmp_path / "needle.jsonl")
    plan = Plan(lengths=(512,), rows=24)
    lines = measure(tiny, [read_way(text) for text in texts], plan, results, Silent())
    rows = {(row["way"], row["ask"]): row for row in summary(lines)}
    for budget in (32, 77):
        snap = rows[f"snapkv:budget={budget},window=16,kernel=1", "again"]["accuracy"]
        assert snap >= 0.95 * rows["full", "again"]["accuracy"]
        for other in ("recency", "attention_sinks"):
            assert rows[f"{other}:budget={budget}", "again"]["accuracy"] < 0.5
        assert rows[f"random_keys:budget={budget},window=16", "again"]["accuracy"] < 0.5
    record({"plan": str(plan), "threads": torch.get_num_threads(), "rows": list(rows.values())})
