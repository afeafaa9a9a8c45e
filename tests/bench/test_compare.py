import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from regard.bench.compare import Settings, compare, plan, quick
from regard.bench.results import Results, WriteError, write_atomically
from regard.bench.text.corpus import read_corpus
from regard.bench.training import Recipe, train
from regard.contract.errors import OptionError, UnknownName
from regard.models.sequence.shell import SequenceModel, SequenceSettings


class Quiet:
    def __init__(self):
        self.said = []

    def part(self, text, steps):
        from contextlib import nullcontext

        return nullcontext()

    def advance(self, step, note):
        pass

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text("\n".join(f"file {i} line {j}: {i * j} apples" for j in range(60)))
    return folder


def small(text, **changes):
    options = {
        "paths": (str(text),), "systems": ("softmax", "lightning"), "length": 32, "width": 16, "depth": 1, "heads": 2,
        "tokens": 2560, "seeds": 2, "lrs": (1e-3, 3e-3), "batch_tokens": 128, "recall": (16, 2), "recall_steps": 12,
        "lengths": (16, 64), "threads": 1,
    }  # fmt: skip
    return Settings(**{**options, **changes})


def table(results):
    """What a run measured, without what depends on the clock."""
    return {
        line["key"]: (line["value"], line["validation"], [(c[0], c[2]) for c in line["curve"]], line["best"])
        for line in results.of("train")
    }


def test_every_system_gets_the_same_tokens_and_parameters_and_one_line_a_measurement(text, tmp_path):
    results = compare(small(text), tmp_path / "out", Quiet())
    runs = results.of("train")
    keys = [line["key"] for line in results.lines]
    assert len(keys) == len(set(keys))
    assert {line["system"] for line in runs} == {"softmax", "lightning"}
    of_text = [line for line in runs if line["task"] == "text"]
    assert len({line["tokens"] for line in of_text}) == 1
    sizes = {line["system"]: line["parameters"] for line in of_text}
    assert abs(sizes["softmax"] - sizes["lightning"]) <= 0.03 * sizes["softmax"]
    for line in runs:
        assert {"task_version", "engine", "seed", "regard", "hardware", "torch", "lr"} <= line.keys()
        # the second seed runs at the learning rate that won on the validation part
        assert line["seed"] == 0 or line["best"]
    assert {(line["system"], line["length"]) for line in results.of("speed")} == {
        (system, n) for system in ("softmax", "lightning") for n in (16, 32, 64)
    }
    sizes = {line["length"]: line["state_bytes"] for line in results.of("speed") if line["system"] == "softmax"}
    assert sizes[64] == 4 * sizes[16]


def test_a_finished_comparison_is_not_measured_again(text, tmp_path):
    first = compare(small(text, tasks=("recall",)), tmp_path, Quiet())
    before = (tmp_path / "results.jsonl").read_bytes()
    compare(small(text, tasks=("recall",)), tmp_path, Quiet())
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert first.of("train")


def test_the_folder_of_another_comparison_is_refused(text, tmp_path):
    compare(small(text, tasks=("recall",)), tmp_path, Quiet())
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(OptionError, match=r"another comparison: width differ.*--out"):
        compare(small(text, tasks=("recall",), width=32), tmp_path, Quiet())
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_killed_in_the_middle_it_goes_on_to_the_same_table(text, tmp_path):
    script = tmp_path / "go.py"
    script.write_text(
        "import sys, regard.bench.training as t, regard.bench.compare as c\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "t.CHECKPOINT_EVERY_S = 0.0\n"
        "from tests.bench.test_compare import Quiet, small\n"
        "class Slow(Quiet):\n"
        "    def advance(self, step, note):\n"
        "        import time; time.sleep(0.02)\n"
        "c.compare(small(sys.argv[3], tasks=('text',)), Path(sys.argv[1]), Slow())\n"
    )
    root = os.fspath(__import__("pathlib").Path(__file__).parents[2])
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, script, out, root, text], stderr=subprocess.PIPE)
    # kill it inside a run: when a checkpoint lies there and the first run is over
    deadline = time.time() + 60
    while time.time() < deadline:
        done = (out / "results.jsonl").read_text().count('"trial"') if (out / "results.jsonl").exists() else 0
        if done >= 1 and list(out.glob("*lr0.003*.safetensors")):
            break
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = Results(out / "results.jsonl")
    assert 1 <= len(half.of("trial")) < 6
    assert list(out.glob("*.safetensors"))
    resumed = compare(small(text, tasks=("text",)), out, Quiet())
    whole = compare(small(text, tasks=("text",)), tmp_path / "whole", Quiet())
    assert table(resumed) == table(whole)
    assert not list(out.glob("*.safetensors"))


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(text, tmp_path):
    corpus = read_corpus([text], seq_len=32)
    recipe = Recipe(30, 4, 1e-2, 0, "bits_per_byte", "x", 8, 8)

    def model():
        torch.manual_seed(0)
        return SequenceModel(SequenceSettings(vocab=257, dim=16, depth=1, heads=2, hidden=16))

    def stop(step, steps, score):
        if step == 17:
            raise KeyboardInterrupt

    path = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(model(), corpus, recipe, checkpoint=path, on_step=stop)
    steps = []
    resumed = train(model(), corpus, recipe, checkpoint=path, on_step=lambda step, *_: steps.append(step))
    whole = train(model(), corpus, recipe, checkpoint=tmp_path / "none")
    assert steps[0] == 18
    assert resumed.value == whole.value
    assert [c[2] for c in resumed.curve] == [c[2] for c in whole.curve]


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_checkpoint_starts_that_run_anew(text, tmp_path, damage):
    corpus = read_corpus([text], seq_len=32)
    recipe = Recipe(4, 4, 1e-2, 0, "bits_per_byte", "x", 8, 8)
    path = tmp_path / "c.safetensors"
    if damage is None:
        save_file({"model.other": torch.zeros(2)}, path)
    else:
        path.write_bytes(damage)
    steps = []
    model = SequenceModel(SequenceSettings(vocab=257, dim=16, depth=1, heads=2, hidden=16))
    train(model, corpus, recipe, checkpoint=path, on_step=lambda step, *_: steps.append(step))
    assert steps[0] == 1


def test_a_results_file_cut_in_a_line_loses_that_line_only(tmp_path):
    results = Results(tmp_path / "r.jsonl")
    results.add({"kind": "trial", "key": "a"})
    results.add({"kind": "trial", "key": "b"})
    data = (tmp_path / "r.jsonl").read_bytes()
    (tmp_path / "r.jsonl").write_bytes(data[:-5])
    again = Results(tmp_path / "r.jsonl")
    assert "a" in again and "b" not in again and "cut off" in again.note
    again.add({"kind": "trial", "key": "b"})
    assert (tmp_path / "r.jsonl").read_bytes() == data


def test_a_results_file_damaged_inside_is_refused_with_its_line(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"kind": "trial", "key": "a"}\n{"kind": \n{"kind": "trial", "key": "b"}\n')
    with pytest.raises(OptionError, match="line 2"):
        Results(tmp_path / "r.jsonl")


def test_a_full_disk_loses_nothing_that_was_there(tmp_path, monkeypatch):
    results = Results(tmp_path / "r.jsonl")
    results.add({"kind": "trial", "key": "a"})
    before = (tmp_path / "r.jsonl").read_bytes()
    page = tmp_path / "page.html"
    write_atomically(page, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        results.add({"kind": "trial", "key": "b"})
    with pytest.raises(WriteError, match="what was there before is kept"):
        write_atomically(page, b"new")
    assert (tmp_path / "r.jsonl").read_bytes() == before
    assert page.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))


def test_the_plan_is_every_causal_mixer_unless_systems_are_named():
    assert {"softmax", "sliding_window", "linear", "sigmoid", "lightning", "based", "aaren", "sqa"} <= set(
        plan(Settings())
    )
    assert plan(Settings(systems=("based", "softmax", "based"))) == ("based", "softmax")
    with pytest.raises(UnknownName, match="did you mean 'softmax'"):
        plan(Settings(systems=("softmx",)))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"tasks": ("txt",)}, "did you mean 'text'"),
        ({"length": 0}, "length is 0"),
        ({"width": 30}, "30 does not divide"),
        ({"budget_minutes": -1.0}, "less than none"),
    ],
)
def test_impossible_settings_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        Settings(**options)


def test_quick_is_one_seed_and_short():
    settings = quick(Settings())
    assert settings.quick and settings.seeds == 1 and max(settings.lengths) == 4096


def test_a_budget_sets_the_steps_and_they_stay_when_it_goes_on(text, tmp_path):
    settings = small(text, tasks=("recall",), budget_minutes=0.05, seeds=1, lrs=())
    first = compare(settings, tmp_path, Quiet())
    steps = first.of("run")[0]["steps"]["recall"]
    assert steps >= 20
    lines = [line for line in (tmp_path / "results.jsonl").read_text().splitlines() if '"speed"' not in line]
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:3]) + "\n")
    second = compare(settings, tmp_path, Quiet())
    assert second.of("run")[0]["steps"]["recall"] == steps
    assert {json.dumps(line["steps"]) for line in second.of("train") if line["stopped"] == "steps"} <= {str(steps)}
