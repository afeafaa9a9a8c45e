"""Score and time ways of steering a model on notes hidden in text, cell by cell of length and depth.

ask "again": the prompt ends with the ask, which is then asked once more, of what the cache still holds; methods that look
at the end of the prompt have seen what is wanted. ask "later": the prompt ends before the ask, which comes token by token;
nobody could know. The first is what prompt compression is made for, the second its honest hard case.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from regard._version import __version__
from regard.bench.machine import hardware
from regard.bench.needle.ways import Way
from regard.bench.proving.notes import NoteCases, note_cases
from regard.bench.results import Results
from regard.contract.attach import steer

Ask = Literal["again", "later"]


class Watcher(Protocol):
    """Whom `measure` tells how it goes."""

    def advance(self, step: int, note: str) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What is measured. rows: prompts a cell; notes: in each, one asked for; batch: prompts at once; seed: of the draw."""

    lengths: tuple[int, ...] = (256, 512)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows: int = 16
    notes: int = 8
    asks: tuple[Ask, ...] = ("again", "later")
    batch: int = 16
    seed: int = 0

    def cells(self) -> Iterator[tuple[int, float, Ask]]:
        """Every length, depth and way of asking."""
        yield from ((n, d, a) for a in self.asks for n in self.lengths for d in self.depths)


def measure(model: Any, ways: Sequence[Way], plan: Plan, results: Results, watcher: Watcher) -> None:
    """One result line a cell and way; those that the results hold already are not repeated."""
    for place, (length, depth, ask) in enumerate(plan.cells(), 1):
        cases = note_cases(plan.rows, length, notes=plan.notes, depth=depth, seed=plan.seed)
        for way in ways:
            key = f"{way.name} {length} {depth} {ask} {plan.rows} {plan.notes} {plan.seed}"
            if key not in results:
                line = _cell(model, way, cases, ask, plan.batch)
                facts = {"regard": __version__, "torch": torch.__version__, "hardware": hardware()}
                what = {"kind": "needle", "key": key, "way": way.name, "length": length, "depth": depth, "ask": ask}
                results.add({**what, "chance": cases.chance, "threads": torch.get_num_threads(), **line, **facts})
        watcher.advance(place, f"{length} tokens, depth {depth:g}, asked {ask}")


@torch.no_grad()
def _cell(model: Any, way: Way, cases: NoteCases, ask: Ask, batch: int) -> dict[str, Any]:
    right, held, prefill, decode, tokens = 0, 0, 0.0, 0.0, 0
    for part in cases.split(batch):
        prompt = part.ids if ask == "again" else part.context
        with steer(model, *way.interventions):
            begin = time.process_time()
            out = model(
                prompt, attention_mask=part.valid[:, : prompt.shape[1]].long(), use_cache=True, logits_to_keep=1
            )
            prefill += time.process_time() - begin
            begin = time.process_time()
            mask = part.valid[:, : prompt.shape[1]]
            for token in part.question.unbind(1):
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
                positions = mask.long().sum(1, keepdim=True) - 1
                out = model(
                    token[:, None], attention_mask=mask.long(), position_ids=positions,
                    past_key_values=out.past_key_values, use_cache=True,
                )  # fmt: skip
                tokens += 1
            decode += time.process_time() - begin
        right += int((out.logits[:, -1].argmax(-1) == part.answers[:, -1]).sum())
        held += sum(_bytes(layer) for layer in out.past_key_values.layers)
    rows = len(cases.ids)
    return {
        "rows": rows, "accuracy": right / rows, "cache_bytes": held // rows, "prefill_ms": round(prefill / rows * 1e3, 2),
        "decode_ms": round(decode / tokens * 1e3, 3),
    }  # fmt: skip


def _bytes(layer: Any) -> int:
    tensors: list[Tensor | None] = [layer.keys, layer.values]
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
