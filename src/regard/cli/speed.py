"""speed: time the attention engines beside their rivals, with the machine's own limits."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from regard.contract.errors import OptionError
from regard.contract.optional import need

# fresh pages cost more than arithmetic at long lengths: memory that was freed is used again
_REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", default="block_sparse:native", help="ours, names with commas")
    parser.add_argument("--pattern", help="causal, full, window:256, neighborhood:15, decode, with commas; or options")
    parser.add_argument("--lengths", default="1024,4096,8192", help="tokens, with commas")
    parser.add_argument("--dtypes", default="fp32,bf16", help="fp32, bf16, fp16, with commas")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1: CPU time is measured)")
    parser.add_argument("--out", type=Path, default=Path("regard-speed"), metavar="DIR", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")


def run(given: argparse.Namespace) -> int:
    works = _works(given)
    if platform.libc_ver()[0] == "glibc" and not all(name in os.environ for name in _REUSE):
        # the allocator reads its settings when a process starts
        command = [sys.executable, "-m", "regard.cli.main", "speed", *_again(given)]
        return subprocess.run(command, env={**os.environ, **_REUSE}, check=False).returncode
    from regard.bench.progress import Progress
    from regard.bench.results import Results
    from regard.bench.speed import measure
    from regard.bench.speed.page import row, write_page

    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "speed.jsonl")
    console = need("rich.console", "bench").Console(stderr=given.json)
    watcher = Progress(console)
    with measure.threads(given.threads), watcher.part("timing", len(works)):
        measure.measure(works, results, watcher, engines=tuple(given.engine.split(",")))
        if given.pattern is None:
            measure.measure_once(results)
    write_page(results.lines, given.out / "speed.html")
    if given.json:
        json.dump(results.lines, sys.stdout, indent=1)
        print()
        return 0
    table = need("rich.table", "bench").Table()
    for place, header in enumerate(("work", "engine", "ms", "share of the rate", "others, times as long")):
        table.add_column(header, justify="right" if place in (2, 3) else "left")
    for line in results.of("timing"):
        shown = row(line)
        share = f"{shown['gb_per_s']} GB/s" if shown["gb_per_s"] else shown["share"]
        others = ", ".join(f"{name} {ratio}" for name, ratio in shown["ratios"].items())
        table.add_row(shown["work"], shown["engine"] or "none", str(shown["ms"]), str(share), others)
    console.print(table)
    console.print(f"page: {(given.out / 'speed.html').resolve()}", markup=False, soft_wrap=True)
    return 0


def _works(given: argparse.Namespace) -> list[Any]:
    from regard.bench.speed.measure import default_works, option_works

    try:
        lengths = tuple(int(n) for n in given.lengths.split(","))
    except ValueError:
        raise OptionError(f"--lengths takes numbers with commas, not {given.lengths!r}") from None
    if given.threads < 1:
        raise OptionError(f"--threads is at least 1, not {given.threads}")
    dtypes = tuple(given.dtypes.split(","))
    patterns = tuple((given.pattern or "causal,window:256,decode").split(","))
    works = default_works(lengths, tuple(p for p in patterns if p != "options"), dtypes)
    return works + (option_works() if "options" in patterns else [])


def _again(given: argparse.Namespace) -> list[str]:
    words = [f"--{name}={getattr(given, name)}" for name in ("engine", "lengths", "dtypes", "threads", "out")]
    words += [f"--pattern={given.pattern}"] if given.pattern else []
    return words + (["--json"] if given.json else [])
