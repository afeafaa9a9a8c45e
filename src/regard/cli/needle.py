"""needle: what a model still finds in a long text when its cache is steered, what that costs and what it saves."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from regard.contract.errors import OptionError
from regard.contract.optional import need
from regard.hosts.text import tokenizer_of


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="tiny-lm, or a folder with a causal language model")
    parser.add_argument(
        "--steer",
        action="append",
        default=[],
        metavar="WAY",
        help="snapkv:budget=256,window=16,kernel=21 (half a kernel reaches over an answer); several: a+b; repeatable",
    )
    parser.add_argument(
        "--case", choices=("notes", "text"), help="notes of tiny-lm's vocabulary, or sentences in text (what fits)"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="what sentences are hidden in (Python's reference)")
    parser.add_argument("--lengths", default="256,512", help="tokens, with commas")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="0 (first) to 1 (last), with commas")
    parser.add_argument("--rows", type=int, default=16, help="prompts a cell")
    parser.add_argument("--batch", type=int, default=16, help="prompts of one length at once")
    parser.add_argument("--notes", type=int, default=8, help="in a prompt, one of which is asked for")
    parser.add_argument("--ask", default="again,later", help="again, later, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("regard-needle"), metavar="DIR", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(given: argparse.Namespace) -> int:
    from regard.bench.needle.measure import Plan, Subject, measure, summary
    from regard.bench.needle.page import write_page
    from regard.bench.needle.ways import read_way
    from regard.bench.progress import Progress
    from regard.bench.results import Results

    if given.rows < 1 or given.batch < 1:
        raise OptionError(f"--rows and --batch are at least 1, not {given.rows} and {given.batch}")
    plan = Plan(
        lengths=_numbers("--lengths", given.lengths, int), depths=_numbers("--depths", given.depths, float),
        rows=given.rows, asks=_asks(given.ask), batch=given.batch, seed=given.seed,
    )  # fmt: skip
    ways = [read_way(text) for text in dict.fromkeys(("full", *given.steer))]
    model, tokenizer = _model(given.model)
    name = given.model if given.model == "tiny-lm" else str(Path(given.model).resolve())
    subject = Subject(name, model, _source(given, model, tokenizer))
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "needle.jsonl")
    console = need("rich.console", "bench").Console(stderr=given.json)
    watcher = Progress(console)
    with watcher.part("needles", len(ways) * sum(1 for _ in plan.cells())):
        lines = measure(subject, ways, plan, results, watcher)
    write_page(lines, Path(name).name, given.out / "needle.html")
    rows = summary(lines)
    if given.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return 0
    table = need("rich.table", "bench").Table()
    for place, header in enumerate(
        ("way", "asked", "accuracy", "cache bytes a row", "prefill ms", "decode ms a token")
    ):
        table.add_column(header, justify="right" if place > 1 else "left", overflow="fold")
    for row in rows:
        figures = (row["accuracy"], row["cache_bytes"], row["prefill_ms"], row["decode_ms"])
        shown = (f"{figures[0]:.3f}", f"{figures[1]:,.0f}", f"{figures[2]:.2f}", f"{figures[3]:.3f}")
        table.add_row(row["way"], row["ask"], *shown)
    console.print(table)
    console.print(f"page: {(given.out / 'needle.html').resolve()}", markup=False, soft_wrap=True)
    return 0


def _model(name: str) -> tuple[Any, Any]:
    """(the model in evaluation mode, its tokenizer or None)."""
    if name == "tiny-lm":
        from regard.bench.proving.tiny import lm

        return lm()
    folder, hf = Path(name), need("transformers", "hf")
    if not (folder / "config.json").is_file():
        raise OptionError(f"{name!r} is neither tiny-lm nor a folder with a model")
    try:
        model, told = hf.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise OptionError(f"{name} holds no causal language model: {str(error).splitlines()[0]}") from error
    if told["missing_keys"]:
        raise OptionError(
            f"{name} holds no causal language model: it lacks {', '.join(sorted(told['missing_keys'])[:3])}"
        )
    try:
        return model.eval(), tokenizer_of(folder)
    except OptionError:
        # notes need none
        return model.eval(), None


def _source(given: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    from regard.bench.needle.cases import Notes, Text
    from regard.bench.recall.needle import language_reference

    fit = Notes.fit(model, tokenizer)
    if given.case == "notes" and not fit:
        raise OptionError(f"notes are written in tiny-lm's vocabulary, and that of {given.model} is another")
    if given.case == "notes" or (fit and given.case is None and given.text is None):
        return Notes(given.notes)
    if tokenizer is None:
        raise OptionError(f"{given.model} has no tokenizer, which text needs: save the model's own there")
    if given.text is None:
        text, whose = language_reference(), "Python's language reference"
    elif given.text.is_file():
        text, whose = given.text.read_text(encoding="utf-8", errors="replace"), given.text.name
    else:
        raise OptionError(f"--text takes a file; {given.text} is none")
    chat = ", asked for in a chat" if tokenizer.chat_template is not None else ""
    return Text(tokenizer, text, f"a number hidden in {whose}{chat}")


def _numbers(option: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(x) for x in text.split(","))
    except ValueError:
        raise OptionError(f"{option} takes numbers with commas, not {text!r}") from None


def _asks(text: str) -> tuple[Any, ...]:
    asks = tuple(text.split(","))
    for ask in asks:
        if ask not in ("again", "later"):
            raise OptionError(f"--ask takes again and later, not {ask!r}")
    return asks
