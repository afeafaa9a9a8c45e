"""compare: train and time systems side by side, on your own text, and say which to use."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from regard.contract.errors import OptionError
from regard.contract.optional import need


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="files or folders of text (default: Python's own library)"
    )
    parser.add_argument("--task", help="text or recall (default: both)")
    parser.add_argument("--systems", help="names with commas (default: every causal mixer)")
    parser.add_argument("--length", type=int, help="tokens a training row (512)")
    parser.add_argument("--width", type=int, help="model width (128)")
    parser.add_argument("--depth", type=int, help="layers (2)")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--budget", type=float, metavar="MINUTES", help="for the training of all systems together")
    effort.add_argument("--tokens", type=int, help="training tokens a run (4 million)")
    parser.add_argument("--seeds", type=int, help="runs a system (2)")
    parser.add_argument("--tokenizer", help="bytes, or bpe:N for N byte-pair tokens")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument("--out", type=Path, default=Path("regard-compare"), metavar="DIR", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="minutes instead of hours; figures are rough")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(given: argparse.Namespace) -> int:
    from regard.bench.compare import Settings, compare, quick
    from regard.bench.progress import Progress
    from regard.bench.report import write_report
    from regard.bench.results import Results
    from regard.bench.summary import summarise

    options: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("length", "width", "depth", "tokens", "seeds", "tokenizer", "threads")
        if getattr(given, name) is not None
    }
    if given.task:
        options["tasks"] = tuple(given.task.split(","))
    if given.systems:
        options["systems"] = tuple(given.systems.split(","))
    if given.budget is not None:
        options["budget_minutes"] = given.budget
    settings = Settings(paths=tuple(given.paths), **options)
    if given.quick:
        if options.keys() & {"width", "tokens", "seeds", "budget_minutes"}:
            raise OptionError("--quick sets width, tokens and seeds itself; leave them out, or leave out --quick")
        settings = quick(settings)
    console = need("rich.console", "bench").Console(stderr=given.json)
    watcher = Progress(console)
    page = given.out / "report.html"
    try:
        results = compare(settings, given.out, watcher)
    except KeyboardInterrupt:
        write_report(Results(given.out / "results.jsonl").lines, page)
        console.print(f"stopped; the same command goes on from {given.out}. So far: {page}", markup=False)
        return 130
    write_report(results.lines, page)
    summary = summarise(results.lines)
    if given.json:
        json.dump(summary.as_dict(), sys.stdout, indent=1)
        print()
        return 0
    _print(summary, console)
    console.print(f"\nreport: {page.resolve()}", markup=False, soft_wrap=True)
    return 0


def _print(summary: Any, console: Any) -> None:
    """The answers, then one row a system, at the longest length that was timed."""
    longest = max(summary.lengths, default=0)
    table = need("rich.table", "bench").Table(title="rough figures (--quick)" if summary.rough else None)
    headers = (
        "system",
        "parameters",
        "bits per byte",
        "recall",
        "train tokens/s",
        "prefill tokens/s",
        "decode ms",
        "state bytes",
    )
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left", no_wrap=not place)
    for row in summary.rows:
        cost = row.costs.get(longest)
        table.add_row(
            row.system, _number(row.parameters), _score(row.text), _score(row.recall), _number(row.train_tokens_per_s),
            *(_number(getattr(cost, name, None)) for name in ("prefill_tokens_per_s", "decode_ms", "state_bytes")),
        )  # fmt: skip
    console.print(table)
    if longest:
        console.print(f"prefill, decode and state at {longest} tokens, one sequence", markup=False)
    for answer in summary.answers:
        console.print(f"• {answer.sentence} {answer.caveat}".rstrip(), markup=False, highlight=False)


def _score(score: Any) -> str:
    if score is None:
        return ""
    if score.mean is None:
        return "diverged" if score.diverged else ""
    return f"{score.mean:.3f}" + (f" ± {score.spread:.3f}" if score.spread is not None else "")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
