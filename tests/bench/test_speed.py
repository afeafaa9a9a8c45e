"""`regard speed`: what is timed, what is refused, and that a stopped run goes on."""

import json

import pytest
import torch

from regard.bench.results import Results
from regard.bench.speed import measure as speed
from regard.bench.speed.measure import default_works, layout_times, measure, option_works
from regard.bench.speed.page import row, write_page
from regard.bench.speed.work import Work
from regard.cli.main import main
from regard.contract.errors import OptionError


class Silent:
    def advance(self, step, note):
        pass


@pytest.mark.parametrize(
    "pattern, length", [("causal", 130), ("full", 33), ("window:16", 600), ("neighborhood:5", 144), ("decode", 70)]
)
@pytest.mark.parametrize("backward", [False, True])
def test_flops_count_the_pairs_of_the_dense_mask(pattern, length, backward):
    work = Work(pattern, length, backward=backward, heads=3, dim=16)
    pairs = work.what().dense(work.queries, length, q_offset=work.q_offset).sum().item()
    assert work.flops() == 2 * pairs * 3 * 16 * (7 if backward else 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pattern": "casual"}, "did you mean 'causal'"),
        ({"pattern": "window"}, "write window:256"),
        ({"pattern": "neighborhood:3", "length": 50}, "square number of tokens, not 50; try 49"),
        ({"dtype": "fp8"}, "no dtype 'fp8'"),
        ({"length": 0}, "at least 1 token"),
    ],
)
def test_a_work_that_does_not_exist_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Work(**{"pattern": "causal", "length": 64, **options})


def test_decoding_has_no_backward_pass_and_options_are_on_one_work():
    assert [w.backward for w in default_works((64,), ("decode", "causal"), ("fp32",))] == [False, False, True]
    assert {w.pattern for w in option_works()} == {"causal"}
    assert len({w.key for w in option_works()}) == len(option_works())


def test_every_rival_is_timed_or_says_why_not_and_a_second_run_measures_nothing(tmp_path):
    works = [Work("causal", 128, heads=2), Work("window:16", 128, heads=2, backward=True), Work("decode", 256, heads=2)]
    results = Results(tmp_path / "speed.jsonl")
    measure(works, results, Silent(), engines=("block_sparse:torch", "block_sparse:reference"))
    lines = {line["key"]: line for line in results.of("timing")}
    causal, window, decode = (lines[work.key] for work in works)
    ours = {"block_sparse:torch", "block_sparse:reference"}
    assert set(causal["ms"]) == ours | {"torch SDPA"}
    assert causal["refused"]["masked SDPA"] == "needs no mask"
    assert set(window["ms"]) >= ours | {"masked SDPA"}
    assert "no backward pass" in window["refused"]["FlexAttention"]
    assert decode["gb_per_s"]["torch SDPA"] > 0
    for line in lines.values():
        assert all(t > 0 for t in line["ms"].values())
        assert line["clock"] == ("process CPU time" if torch.get_num_threads() == 1 else "wall time")
        assert set(row(line)["ratios"]) == set(line["ms"]) - ours
    before = (tmp_path / "speed.jsonl").read_bytes()
    measure(
        works, Results(tmp_path / "speed.jsonl"), Silent(), engines=("block_sparse:torch", "block_sparse:reference")
    )
    assert (tmp_path / "speed.jsonl").read_bytes() == before


def test_a_rival_that_would_take_too_long_is_left_out(tmp_path):
    results = Results(tmp_path / "speed.jsonl")
    works = [Work("causal", n, heads=2) for n in (64, 128)]
    measure(works, results, Silent(), engines=("block_sparse:reference",), limit_s=0.0)
    assert "would take longer" in results.of("timing")[1]["refused"]["torch SDPA"]


def test_layouts_are_timed():
    times = layout_times(1024)
    assert len(times) == 6
    assert all(t > 0 for t in times.values())


def test_the_page_holds_every_work(tmp_path):
    results = Results(tmp_path / "speed.jsonl")
    work = Work("causal", 64, heads=2)
    measure([work], results, Silent(), engines=("block_sparse:reference",))
    write_page(results.lines, tmp_path / "speed.html")
    page = (tmp_path / "speed.html").read_text()
    assert work.key in page
    assert "https://" not in page.partition("<script>")[0]


def test_the_command_prints_json_lines(tmp_path, capfd):
    command = ["speed", "--pattern=causal", "--lengths=64", "--dtypes=fp32", "--engine=block_sparse:torch", "--json"]
    assert main([*command, f"--out={tmp_path}"]) == 0
    lines = json.loads(capfd.readouterr().out)
    assert [line["kind"] for line in lines] == ["machine", "timing", "timing"]


@pytest.mark.parametrize("words", [["--lengths=many"], ["--threads=0"], ["--dtypes=fp8"], ["--pattern=nothing"]])
def test_bad_options_are_one_line(words, capfd, tmp_path):
    assert main(["speed", *words, f"--out={tmp_path}"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_what_needs_no_rivals_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "layout_times", lambda n: {"Causal": 1.0})
    monkeypatch.setattr(speed, "memory", lambda work, name: {"ratio": 1.0})
    results = Results(tmp_path / "speed.jsonl")
    speed.measure_once(results)
    speed.measure_once(results)
    assert [line["kind"] for line in results.lines] == ["layout", "memory"]


def test_the_memory_of_a_call_is_held_against_its_tensors():
    line = speed.memory(Work("window:64", 4096, heads=2, backward=True), "block_sparse:torch")
    # inputs and their gradients, output and its gradient
    assert line["needed_bytes"] == 8 * 4096 * 2 * 64 * 4
    # the process's peak cannot be below what the call returns and keeps
    assert line["ratio"] is None or line["ratio"] > 0.5
