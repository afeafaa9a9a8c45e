"""The rows that tiny-lm is trained on: tokens, and why each one is to be predicted.

recall      begin k1 v1 k2 v2 … k2 v2 k1 v1 …       ASKED: values of keys that come again
repeats     begin a b c a b c a b c …               REPEATED: what can be known
notes       begin text note k v text … ask k v …    ASKED: values of asked keys; TEXT: bytes; a note itself has no label
text        begin text                              TEXT
"""

from __future__ import annotations

import numpy as np

from regard.bench.proving.notes import ASK, BEGIN, KEYS, VALUES, draw_notes, interleave, passage, source

NOTHING, ASKED, TEXT, REPEATED = range(4)
# ids and reasons, both int64 (length,)
Row = tuple[np.ndarray, np.ndarray]


def first_stage(rng: np.random.Generator, length: int) -> Row:
    """Recall of few pairs, and repeats."""
    return recall_row(rng, length, int(rng.integers(2, 9))) if rng.random() < 0.8 else repeat_row(rng, length)


def second_stage(rng: np.random.Generator, length: int) -> Row:
    """All kinds of rows, with as many pairs as fit."""
    draw = rng.random()
    if draw < 0.20:
        return recall_row(rng, length, int(rng.integers(2, min(len(KEYS), (length - 1) // 4) + 1)))
    if draw < 0.45:
        return repeat_row(rng, length)
    if draw < 0.85:
        return note_row(rng, length)
    return text_row(rng, length, source("train"))


def recall_row(rng: np.random.Generator, length: int, pairs: int) -> Row:
    """Begin, then `pairs` pairs key value, then drawn ones of them again; the values that come again are asked."""
    items = draw_notes(rng, pairs)[:, 1:]
    again = items[rng.integers(pairs, size=(length - 1) // 2 + 1 - pairs)]
    row = np.concatenate([[BEGIN], items.ravel(), again.ravel()])[:length]
    why = np.full(length, NOTHING)
    why[2 * pairs + 2 :: 2] = ASKED
    return row, why


def repeat_row(rng: np.random.Generator, length: int, period: int | None = None) -> Row:
    """Begin, then a segment of random bytes, or of keys and values, over and over. period: None is 8 to half a row."""
    if period is None:
        # as many short ones as long ones
        period = int(8 * (length / 16) ** rng.random())
    low, high = (0, BEGIN) if rng.random() < 0.5 else (KEYS.start, VALUES.stop)
    row = np.concatenate([[BEGIN], np.resize(rng.integers(low, high, size=period), length - 1)])
    why = np.full(length, NOTHING)
    # the first token of the second round comes unforeseen
    why[period + 2 :] = REPEATED
    return row, why


def note_row(rng: np.random.Generator, length: int) -> Row:
    """2 to 16 notes in source text and 4 to 24 asks with their answers, at the end or, in half of the rows, scattered."""
    notes, asks, scattered = int(rng.integers(2, 17)), int(rng.integers(4, 25)), rng.random() < 0.5
    text = passage(rng, source("train"), length - 1 - 3 * (notes + asks))
    shown = draw_notes(rng, notes)
    count = notes + asks
    is_ask = np.zeros(count, dtype=bool)
    if scattered:
        # any order that starts with a note
        is_ask[1 + rng.permutation(count - 1)[:asks]] = True
        slots = np.sort(rng.permutation(len(text) + count)[:count])
    else:
        is_ask[notes:] = True
        slots = np.append(np.sort(rng.permutation(len(text) + notes)[:notes]), len(text) + np.arange(notes, count))
    seen = np.cumsum(~is_ask)
    items = shown[np.where(is_ask, rng.integers(seen), seen - 1)]
    items[is_ask, 0] = ASK
    body, starts = interleave(text, items, slots)
    row = np.concatenate([[BEGIN], body])
    why = np.where(row < BEGIN, TEXT, NOTHING)
    why[starts[is_ask] + 3] = ASKED
    return row, why


def text_row(rng: np.random.Generator, length: int, stream: np.ndarray) -> Row:
    """Begin, then source text."""
    row = np.concatenate([[BEGIN], passage(rng, stream, length - 1)])
    return row, np.where(row < BEGIN, TEXT, NOTHING)
