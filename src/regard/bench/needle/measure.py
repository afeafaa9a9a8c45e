"""Score and time ways of steering a model on what is hidden in text, cell by cell of length and depth.

ask "again": the prompt has its question, and the answer is read from what the cache still holds then; methods that look at
the end of the prompt have seen what is wanted. ask "later": the prompt ends before the question, which comes token by token;
nobody could know. The first is what prompt compression is made for, the second its honest hard case.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from regard._version import __version__
from regard.bench.machine import hardware
from regard.bench.needle.cases import Ask, Case, Source
from regard.bench.needle.ways import Way
from regard.bench.results import Results
from regard.contract.attach import steer
from regard.contract.errors import OptionError, Unsupported


class Watcher(Protocol):
    """Whom `measure` tells how it goes."""

    def advance(self, step: int, note: str) -> None: ...


@dataclass(frozen=True, eq=False)
class Subject:
    """Whom is asked what. name: results are kept under it. model: a decoder of transformers. source: of its prompts."""

    name: str
    model: Any
    source: Source


@dataclass(frozen=True)
class Plan:
    """What is measured. rows: prompts a cell; batch: prompts of one length at once; seed: of the draw."""

    lengths: tuple[int, ...] = (256, 512)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows: int = 16
    asks: tuple[Ask, ...] = ("again", "later")
    batch: int = 16
    seed: int = 0

    def cells(self) -> Iterator[tuple[int, float, Ask]]:
        """Every length, depth and way of asking."""
        yield from ((n, d, a) for a in self.asks for n in self.lengths for d in self.depths)


def measure(
    subject: Subject, ways: Sequence[Way], plan: Plan, results: Results, watcher: Watcher
) -> list[dict[str, Any]]:
    """One result line a cell and way, in this order; those that the results hold already are not measured again.

    Raises OptionError for lengths beyond the model's positions; Unsupported for a model without a cache.
    """
    _check_room(subject, plan)
    source, known, found, cold = subject.source, {line["key"]: line for line in results.of("needle")}, [], True
    about = {
        "model": subject.name, "about": source.about, "chance": source.chance, "threads": torch.get_num_threads(),
        "regard": __version__, "torch": torch.__version__, "hardware": hardware(),
    }  # fmt: skip
    for length, depth, ask in plan.cells():
        cases: list[Case] = []
        for way in ways:
            key = f"{subject.name} {source.name} {way.name} {length} {depth} {ask} {plan.rows} {plan.seed}"
            if key not in known:
                cases = cases or source.cases(length, depth, plan.rows, plan.seed)
                if cold:
                    # the first passes of a process are slower than all others
                    _answer(subject, way, cases[:1], ask)
                    cold = False
                what = {"kind": "needle", "key": key, "way": way.name, "length": length, "depth": depth, "ask": ask}
                known[key] = what | _cell(subject, way, cases, ask, plan.batch) | about
                results.add(known[key])
            found.append(known[key])
            watcher.advance(len(found), f"{length} tokens, depth {depth:g}, asked {ask}")
    return found


def _check_room(subject: Subject, plan: Plan) -> None:
    most = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(plan.lengths)
    case = subject.source.cases(longest, plan.depths[0], 1, plan.seed)[0]
    beyond = max(sum(map(len, case.parts(ask))) for ask in plan.asks) - len(case.prompt) + subject.source.tokens - 1
    if most is not None and longest + beyond > most:
        raise OptionError(
            f"{subject.name} has {most} positions; a prompt of {longest} tokens and its answer need {longest + beyond}"
        )


def _cell(subject: Subject, way: Way, cases: Sequence[Case], ask: Ask, batch: int) -> dict[str, Any]:
    # prompts of one length need no pads
    groups: dict[tuple[int, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(map(len, case.parts(ask))), []).append(case)
    parts = [group[at : at + batch] for group in groups.values() for at in range(0, len(group), batch)]
    answered = [_answer(subject, way, part, ask) for part in parts]
    right, held, prefill, decode, steps = (sum(figures) for figures in zip(*answered, strict=True))
    rows = len(cases)
    return {
        "rows": rows, "accuracy": right / rows, "cache_bytes": int(held) // rows,
        "prefill_ms": round(prefill / rows * 1e3, 2), "decode_ms": round(decode / steps * 1e3, 3),
    }  # fmt: skip


@torch.no_grad()
def _answer(subject: Subject, way: Way, cases: Sequence[Case], ask: Ask) -> tuple[int, int, float, float, int]:
    """(right answers, bytes of the cache when the last token of the question was read, seconds of reading the prompt, and of
    all steps after it, how many they were)."""
    model, tokens = subject.model, subject.source.tokens
    read, then = (torch.stack(part).to(model.device) for part in zip(*(c.parts(ask) for c in cases), strict=True))
    ends, spent = _ends(model), []
    cache: Any = None
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def step(ids: Tensor) -> Tensor:
        nonlocal cache
        begin = time.process_time()
        out = model(ids, past_key_values=cache, use_cache=True, **last)
        spent.append(time.process_time() - begin)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise Unsupported(f"{subject.name} keeps no keys and values, so there is nothing to be steered in a cache")
        return out.logits[:, -1].argmax(-1, keepdim=True)

    with steer(model, *way.interventions):
        step(read)
        for token in then.split(1, 1):
            written = step(token)
        held = sum(_bytes(layer) for layer in cache.layers)
        answers = list(zip(cases, written.tolist(), strict=True))
        while written.shape[1] < tokens and not all(set(ids) & ends or case.right(ids) for case, ids in answers):
            written = torch.cat((written, step(written[:, -1:])), 1)
            answers = list(zip(cases, written.tolist(), strict=True))
    right = [case.right(_until(ids, ends)) for case, ids in answers]
    return sum(map(int, right)), held, spent[0], sum(spent[1:]), len(spent) - 1


def _until(ids: list[int], ends: set[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _ends(model: Any) -> set[int]:
    own = model.generation_config.eos_token_id
    return set(own) if isinstance(own, list) else set() if own is None else {own}


def _bytes(layer: Any) -> int:
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(x.nbytes for x in tensors if x is not None)


def summary(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a way and way of asking, over all lengths and depths: accuracy, bytes of the cache, times."""
    rows = []
    for way, ask in dict.fromkeys((line["way"], line["ask"]) for line in lines):
        mine = [line for line in lines if (line["way"], line["ask"]) == (way, ask)]
        count = sum(line["rows"] for line in mine)
        row: dict[str, Any] = {"way": way, "ask": ask, "rows": count, "chance": mine[0]["chance"]}
        for name in ("accuracy", "cache_bytes", "prefill_ms", "decode_ms"):
            row[name] = sum(line[name] * line["rows"] for line in mine) / count
        rows.append(row)
    return rows
