"""Notes in source text, and asks for some of them: the cases on which tiny-lm was trained and methods are proved.

    begin, text … note k3 v7 … text … note k9 v1 … text, ask k9 -> v1

A note is three tokens. One of several is asked for, since a lone one is found without reading its key; chance among the
notes is 1 / notes. The text is held-out source of the standard library on this machine, so it differs between versions of
Python; everything else is drawn from the seed.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from regard.bench.task import Split
from regard.bench.text.corpus import read_corpus
from regard.contract.errors import OptionError, ShapeError

# ids below BEGIN are bytes
BEGIN, NOTE, ASK = 256, 257, 258
KEYS, VALUES = range(259, 323), range(323, 387)
PAD = 387
VOCAB = 388
_NEWLINE = ord("\n")


@dataclass(frozen=True)
class NoteCases:
    """A batch of prompts. B rows, N tokens, n notes, a asks; spans are [start, end) on the axis of N, padding included.

    ids: int64 (B, N), shorter rows padded on the left; the last token is the key asked for, and its value comes next.
    valid: bool (B, N), False at padding; `attention_mask` of transformers. note_spans: int64 (B, n, 2), each note key value,
    in the order in which they stand. ask_spans: int64 (B, a, 2), each ask key. asked: int64 (B, a), which note is asked for.
    answers: int64 (B, a), the values asked for; all but the last stand in the row, after their ask.
    """

    ids: Tensor
    valid: Tensor
    note_spans: Tensor
    ask_spans: Tensor
    asked: Tensor
    answers: Tensor

    @property
    def chance(self) -> float:
        """The score of a model that gives one of the row's values without reading keys."""
        return 1 / self.note_spans.shape[1]

    @property
    def needle_spans(self) -> Tensor:
        """int64 (B, a, 2): the notes that are asked for; the value to fetch is the last token of each."""
        return self.note_spans.gather(1, self.asked[..., None].expand(-1, -1, 2))

    @property
    def asked_at(self) -> Tensor:
        """int64 (B, a): the asked keys' positions, where the logits are to say the answers."""
        return self.ask_spans[..., 1] - 1

    @property
    def context(self) -> Tensor:
        """int64 (B, N - 3a + 1): the rows before the first ask, for methods that must compress before they are asked."""
        return self.ids[:, : self._first_ask]

    @property
    def question(self) -> Tensor:
        """int64 (B, 3a - 1): the asks, what follows the context."""
        return self.ids[:, self._first_ask :]

    def window(self, width: int, ask: Literal["inside", "before"] = "inside") -> slice:
        """`width` positions that end with the row (the asks are inside), or that end before the first ask."""
        end = {"inside": self.ids.shape[1], "before": self._first_ask}.get(ask)
        if end is None:
            raise OptionError(f"ask is {ask!r}; it is 'inside' or 'before' the window")
        if not 0 < width <= end:
            raise OptionError(f"a window of {width} does not fit into the {end} positions it must end in")
        return slice(end - width, end)

    def split(self, rows: int) -> Iterator[NoteCases]:
        """The same cases in batches of `rows`."""
        parts = (getattr(self, field.name).split(rows) for field in fields(self))
        return (NoteCases(*tensors) for tensors in zip(*parts, strict=True))

    def right(self, logits: Tensor) -> Tensor:
        """bool (B, a): whether the likeliest token of the whole vocabulary is the answer. logits: (B, N, V)."""
        if logits.shape[:2] != self.ids.shape:
            raise ShapeError(
                f"the logits are {tuple(logits.shape)}; {tuple(self.ids.shape)} and the vocabulary are needed"
            )
        at = self.asked_at.to(logits.device)[..., None].expand(-1, -1, logits.shape[2])
        return logits.gather(1, at).argmax(-1) == self.answers.to(logits.device)

    @property
    def _first_ask(self) -> int:
        # asks stand at the end, so that padding on the left leaves them in line
        return int(self.ask_spans[0, 0, 0])


def note_cases(
    rows: int,
    length: int | Sequence[int],
    *,
    notes: int = 8,
    asks: int = 1,
    depth: float | None = None,
    gap: int = 0,
    seed: int = 0,
) -> NoteCases:
    """Prompts with `notes` different notes anywhere in held-out text, and at the end `asks` of them asked for.

    length: tokens of a row, with the asks; or one number a row. notes: 2 to 64. asks: 1 to notes, each for another note.
    depth: where the note asked for stands, 0 (first thing) to 1 (last thing before the asks); None is anywhere; for one ask
    only. gap: at least so many tokens of text between the last note and the first ask. Row i depends on seed and i alone.
    Raises OptionError.
    """
    lengths = [length] * rows if isinstance(length, int) else list(length)
    if rows < 1 or len(lengths) != rows:
        raise OptionError(f"there are {len(lengths)} lengths for {rows} rows; one a row is needed, and a row at least")
    if not 2 <= notes <= len(KEYS):
        raise OptionError(f"notes is {notes}; it is 2 to {len(KEYS)} (a lone note is found without reading its key)")
    if not 1 <= asks <= notes:
        raise OptionError(f"asks is {asks}; it is 1 to the {notes} notes")
    if depth is not None and (asks != 1 or not 0 <= depth <= 1):
        raise OptionError(f"depth is {depth} with {asks} asks; it is 0 to 1, and places the note of a single ask")
    if gap < 0:
        raise OptionError(f"gap is {gap}; it is 0 or more")
    least = 1 + 3 * notes + gap + 3 * asks - 1
    if min(lengths) < least:
        raise OptionError(f"a row of {min(lengths)} tokens is too short for that: {least} are needed")
    stream = source("test")
    made = [
        _prompt(np.random.default_rng([seed, i]), stream, n, notes, asks, depth, gap) for i, n in enumerate(lengths)
    ]
    longest = max(lengths)
    ids = torch.full((rows, longest), PAD)
    for i, (row, *_) in enumerate(made):
        ids[i, longest - len(row) :] = torch.from_numpy(row)
    shift = torch.tensor([longest - n for n in lengths])[:, None]
    starts, asked, answers = (torch.from_numpy(np.stack(part)) for part in list(zip(*made, strict=True))[1:])
    begins = starts + shift
    ask_begins = (longest - 3 * asks + 1 + 3 * torch.arange(asks)).expand(rows, -1)
    spans = [torch.stack([begin, begin + size], -1) for begin, size in ((begins, 3), (ask_begins, 2))]
    return NoteCases(ids, torch.arange(longest) >= shift, spans[0], spans[1], asked, answers)


@lru_cache(maxsize=1)
def _streams() -> dict[str, np.ndarray]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise OptionError("this Python comes without the source text of its standard library")
    streams = read_corpus(files).streams
    # one text after the other: a begin is the start of a row, and of nothing else
    return {split: np.where(ids == BEGIN, _NEWLINE, ids).astype(np.int64) for split, ids in streams.items()}


def source(split: Split) -> np.ndarray:
    """int64: the bytes of the top modules of this machine's standard library, split by file."""
    return _streams()[split]


def passage(rng: np.random.Generator, stream: np.ndarray, size: int) -> np.ndarray:
    """`size` bytes in a row from anywhere in a stream."""
    start = rng.integers(len(stream) - size + 1)
    return stream[start : start + size]


def draw_notes(rng: np.random.Generator, count: int) -> np.ndarray:
    """int64 (count, 3): note key value, all keys different and all values different."""
    keys = KEYS.start + rng.permutation(len(KEYS))[:count]
    values = VALUES.start + rng.permutation(len(VALUES))[:count]
    return np.stack([np.full(count, NOTE), keys, values], 1)


def interleave(text: np.ndarray, items: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items (m, 3) put into a text, in order; slots: ascending places among the text's tokens and the items as one each.

    -> the row (3m + len(text),) and where each item starts.
    """
    starts = slots + 2 * np.arange(len(items))
    row = np.empty(len(text) + items.size, dtype=np.int64)
    taken = np.zeros(len(row), dtype=bool)
    places = (starts[:, None] + np.arange(3)).ravel()
    taken[places] = True
    row[places], row[~taken] = items.ravel(), text
    return row, starts


def _prompt(
    rng: np.random.Generator,
    stream: np.ndarray,
    length: int,
    notes: int,
    asks: int,
    depth: float | None,
    gap: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    text = passage(rng, stream, length - (1 + 3 * notes + 3 * asks - 1))
    items = draw_notes(rng, notes)
    places = len(text) - gap + notes
    if depth is None:
        slots = np.sort(rng.permutation(places)[:notes])
        asked = rng.permutation(notes)[:asks]
    else:
        mine = round(depth * (places - 1))
        others = rng.permutation(places - 1)[: notes - 1]
        slots = np.sort(np.append(others + (others >= mine), mine))
        asked = np.searchsorted(slots, [mine])
    body, starts = interleave(text, items, slots)
    answers = items[asked, 2]
    tail = np.stack([np.full(asks, ASK), items[asked, 1], answers], 1).ravel()[:-1]
    return np.concatenate([[BEGIN], body, tail]), starts + 1, asked, answers
