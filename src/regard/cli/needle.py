"""needle: what a model still finds in a long text when its cache is steered, what that costs and what it saves."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from regard.contract.errors import OptionError
from regard.contract.optional import need


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="tiny-lm, or a folder that holds a model of its vocabulary")
    parser.add_argument(
        "--steer",
        action="append",
        default=[],
        metavar="WAY",
        help="snapkv:budget=256,window=16; several: a+b; repeatable",
    )
    parser.add_argument("--lengths", default="256,512", help="tokens, with commas")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="0 (first) to 1 (last), with commas")
    parser.add_argument("--rows", type=int, default=16, help="prompts a cell")
    parser.add_argument("--notes", type=int, default=8, help="in a prompt, one of which is asked for")
    parser.add_argument("--ask", default="again,later", help="again, later, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("regard-needle"), metavar="DIR", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(given: argparse.Namespace) -> int:
    from regard.bench.needle.measure import Plan, measure, summary
    from regard.bench.needle.page import write_page
    from regard.bench.needle.ways import read_way
    from regard.bench.progress import Progress
    from regard.bench.results import Results

    plan = Plan(
        lengths=_numbers("--lengths", given.lengths, int), depths=_numbers("--depths", given.depths, float),
        rows=given.rows, notes=given.notes, asks=_asks(given.ask), seed=given.seed,
    )  # fmt: skip
    ways = [read_way(text) for text in ("full", *given.steer)]
    model = _model(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "needle.jsonl")
    console = need("rich.console", "bench").Console(stderr=given.json)
    watcher = Progress(console)
    with watcher.part("needles", sum(1 for _ in plan.cells())):
        measure(model, ways, plan, results, watcher)
    write_page(results.lines, given.model, given.out / "needle.html")
    rows = summary(results.of("needle"))
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


def _model(name: str) -> Any:
    from regard.bench.proving.notes import VOCAB

    if name == "tiny-lm":
        from regard.bench.proving.tiny import lm

        return lm()[0]
    if not Path(name).is_dir():
        raise OptionError(f"{name!r} is neither tiny-lm nor a folder with a model")
    model = need("transformers", "hf").AutoModelForCausalLM.from_pretrained(name, local_files_only=True).eval()
    if model.config.vocab_size != VOCAB:
        raise OptionError(
            f"{name} has a vocabulary of {model.config.vocab_size}; notes are written in that of tiny-lm, {VOCAB}"
        )
    return model


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
