"""why: say which engine runs an op on given shapes, and why not the others."""

from __future__ import annotations

import argparse
import ast

from regard.contract.dispatch import why
from regard.contract.errors import OptionError


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="slug of an op")
    parser.add_argument("--engine", help="ask about this engine only")
    parser.usage = "regard why NAME [--engine ENGINE] -- q=2,8,4096,64:bf16 [k=…] [v=…] [is_causal=True …]"


def run(given: argparse.Namespace) -> int:
    tensors = [w for w in given.rest if w.partition("=")[0] in ("q", "k", "v")]
    options = {}
    for word in (w for w in given.rest if w not in tensors):
        name, equals, value = word.partition("=")
        if not equals:
            raise OptionError(
                f"cannot read {word!r}; write tensors as q=2,8,4096,64:bf16 and options as is_causal=True"
            )
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    for verdict in why(given.name, " ".join(tensors), engine=given.engine, **options):
        text = "runs" if verdict.chosen else "; ".join(verdict.reasons) or "could run, a better one is chosen"
        note = f" ({verdict.note})" if verdict.note else ""
        print(f"{'→' if verdict.chosen else ' '} {verdict.name:<22} {text}{note}")
    return 0
