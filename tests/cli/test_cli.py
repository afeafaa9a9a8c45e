import json

import pytest

from regard.cli.main import commands, main
from regard.contract.catalogue import catalogue

FIRST = {
    "softmax", "sliding_window", "linear", "sigmoid", "softplus_reweight", "selective_temperature", "sqa", "lightning",
    "based", "aaren", "zoology",
}  # fmt: skip


def test_list_shows_the_first_eleven(capsys):
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} >= FIRST
    assert len(rows) == len(catalogue())
    assert all(row["title"] and row["exports"] for row in rows)


@pytest.mark.parametrize(
    "arguments, kept, left",
    [
        (["--attends", "cross"], "softmax", "lightning"),
        (["--room", "bench"], "zoology", "softmax"),
        (["--decodes"], "aaren", "zoology"),
        (["--baselines"], "linear", "sigmoid"),
        (["--no-baselines"], "sigmoid", "linear"),
        (["taylor"], "based", "aaren"),
    ],
)
def test_list_filters(capsys, arguments, kept, left):
    main(["list", "--json", *arguments])
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert kept in names and left not in names


def test_list_for_people_has_a_line_a_file(capsys):
    main(["list"])
    assert len(capsys.readouterr().out.splitlines()) == len(catalogue()) + 1


def test_show_tells_paper_claims_and_signature(capsys):
    assert main(["show", "sigmoid"]) == 0
    out = capsys.readouterr().out
    assert "Best Practices for Sigmoid" in out and "regard.sigmoid_attention(" in out and "causal_self" in out


def test_a_wrong_name_gets_near_ones(capsys):
    assert main(["show", "sigmod"]) == 2
    assert "did you mean 'sigmoid'" in capsys.readouterr().err
    assert main(["lst"]) == 2
    assert "did you mean 'list'" in capsys.readouterr().err


def test_why_names_the_engine_that_runs_and_reasons_for_the_others(capsys):
    assert main(["why", "softmax", "--", "q=2,8,4096,64:bf16"]) == 0
    out = capsys.readouterr().out
    assert "→ dense:sdpa" in out and "block_sparse:flex" in out and "FlexAttention is for CUDA" in out
    assert main(["why", "sigmoid", "--", "q=2,8,64,64", "length=64"]) == 0
    assert "not Softmax" in capsys.readouterr().out
    assert main(["why", "softmax", "--", "q=2,8"]) == 2
    assert "4: b h n d" in capsys.readouterr().err
    assert main(["why", "softmax", "--", "q=2,8,16,8:fp5"]) == 2
    assert main(["why", "softmax", "--engine", "dens", "--", "q=2,8,16,8"]) == 2
    assert "did you mean 'dense'" in capsys.readouterr().err


def test_new_writes_a_file_that_the_battery_accepts(tmp_path, capsys):
    (tmp_path / "ops").mkdir()
    assert main(["new", "ops/my_attention", "--root", str(tmp_path)]) == 0
    path = tmp_path / "ops" / "my_attention.py"
    assert main(["check", str(path)]) == 0
    assert main(["new", "ops/my_attention", "--root", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, text", [("ops/softmax", "taken"), ("op/x", "cannot start"), ("ops/Bad-Name", "not a slug")]
)
def test_new_refuses_what_would_not_be_found(capsys, place, text):
    assert main(["new", place]) == 2
    assert text in capsys.readouterr().err


def test_every_command_has_help(capsys):
    for name in commands():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
    assert "usage: regard" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--systems", "softmx"], "did you mean 'softmax'"),
        (["--task", "texts"], "did you mean 'text'"),
        (["--quick", "--tokens", "10"], "--quick sets"),
        (["nowhere-at-all", "--task", "text"], "does not exist"),
    ],
)
def test_compare_refuses_what_it_cannot_do(tmp_path, capsys, arguments, text):
    assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err


def test_compare_ends_with_a_table_and_a_page(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "--systems", "softmax,linear", "--task", "recall", "--budget", "0.05", "--seeds", "1"]
    assert main([*arguments, "--threads", "1", "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "softmax" in json.dumps(rows)
    assert (out / "report.html").stat().st_size > 10_000
