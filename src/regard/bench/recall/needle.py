"""Needles in haystacks: something to be found again, at some depth of a text of some length.

tokens      . . ! k3 v3 . . . ! k1 v1 . . ? k1 -> v1                Needle, among several with other keys
chains      = a v . . = b a . . = c b . . ? c -> v                  VariableTracking
text        … The special magic number for Oslo is 4071283. … Question: …        needle_cases, needle_grid

Departs from the usual tests: a lone needle is refused among tokens, where it is found without reading its key; the needle is
known by the characters that were put in, not found again by its words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.bench.task import IGNORED, SPLIT_SEEDS, Rows, Split
from regard.contract.card import TaskCard
from regard.contract.errors import OptionError
from regard.contract.optional import need
from regard.hosts.text import Span, Tokens, cut

CARD = TaskCard(
    slug="needle",
    title="Needles in haystacks",
    exports=(
        "Needle",
        "VariableTracking",
        "needle_cases",
        "needle_grid",
        "NeedleCase",
        "NeedleGrid",
        "NeedleText",
        "magic_numbers",
        "greedy_answers",
    ),
    example="n=64",
    options={"vocab_size": 128, "seq_len": 64, "keys": 4},
    baseline=True,
    version="1",
    metric="accuracy at the asked positions",
    chance="1 / (keys values)",
)

_MARK, _ASK, _FIRST = 0, 1, 2
_CITIES = (
    "Oslo", "Lima", "Cairo", "Hanoi", "Quito", "Accra", "Riga", "Tunis", "Perth", "Osaka", "Turin", "Porto", "Leeds",
    "Dakar", "Minsk", "Sofia", "Kyoto", "Miami", "Davos", "Nairobi",
)  # fmt: skip
_STOPS = (". ", ".\n", "? ", "?\n", "! ", "!\n", "\n\n")


@dataclass(frozen=True)
class NeedleCase:
    """One prompt that asks for what stands in it.

    prompt: text, or ids int64 (N,), with the question. needle: what the answer is to copy, [start, end) in characters of the
    text or places of the ids. answer: what it must hold. length: tokens asked for. depth: 0 (first thing) to 1 (last thing).
    """

    prompt: str | Tensor
    needle: Span
    answer: str | tuple[int, ...]
    length: int
    depth: float

    def right(self, given: str | Sequence[int]) -> bool:
        """Whether an answer holds the case's own, word for word or token for token."""
        wanted = self.answer
        if isinstance(given, str) or isinstance(wanted, str):
            return isinstance(given, str) and isinstance(wanted, str) and wanted in given
        n = len(wanted)
        return any(tuple(given[i : i + n]) == wanted for i in range(len(given) - n + 1))


@dataclass(frozen=True)
class NeedleText:
    """A needle in words. answer: stands once in the sentence, and is what the question asks for. Raises OptionError."""

    sentence: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.answer or self.sentence.count(self.answer) != 1:
            raise OptionError(f"the answer {self.answer!r} must stand once in the sentence {self.sentence!r}")


@dataclass(frozen=True)
class Needle:
    """Rows of random filler with `keys` needles, the last of them asked for at the end.

    vocab_size: marks 0 and 1, then a third each keys, values, filler. seq_len: N. keys: needles in a row, 2 or more. values: of
    each needle, all to be told. queries: how many of the needles are asked for, one after the other. depth: where the needle
    asked for first stands, 0 to 1, None for anywhere. Raises OptionError.
    """

    vocab_size: int = 256
    seq_len: int = 256
    keys: int = 8
    values: int = 1
    queries: int = 1
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.keys < 2 or self.values < 1 or not 1 <= self.queries <= self.keys:
            raise OptionError(
                f"keys, values and queries are {self.keys}, {self.values} and {self.queries}; they are at least 2 (a lone "
                "needle is found without reading its key), at least 1, and 1 to the keys"
            )
        if self._third < self.keys * self.values:
            raise OptionError(
                f"{self.keys} x {self.values} values need a vocabulary of {3 * self.keys * self.values + 2}"
            )
        if self._filler < 0:
            raise OptionError(f"{self.keys} needles and {self.queries} questions do not fit into {self.seq_len} tokens")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise OptionError(f"depth is 0 to 1, not {self.depth}")

    @property
    def chance(self) -> float:
        """Guessing among the values of the row."""
        return 1 / (self.keys * self.values)

    def build(self, split: Split, rows: int, seed: int = 0) -> Rows:
        """inputs, targets int64 (rows, N): at an asked key and at its values but for the last, what comes next."""
        return self._draw(split, rows, seed)[0]

    def cases(self, split: Split, rows: int, seed: int = 0) -> list[NeedleCase]:
        """The first question of each row as a prompt that ends with the asked key."""
        made, at = self._draw(split, rows, seed)
        end = self.seq_len - self.queries * self._width + 2
        found = []
        for row, start in zip(made.inputs, (at + 2).tolist(), strict=True):
            answer = tuple(row[start : start + self.values].tolist())
            last = max(end - 2 - self._width, 1)
            found.append(NeedleCase(row[:end], (start, start + self.values), answer, end, (start - 2) / last))
        return found

    @property
    def _third(self) -> int:
        return (self.vocab_size - _FIRST) // 3

    @property
    def _width(self) -> int:
        return 2 + self.values

    @property
    def _filler(self) -> int:
        return self.seq_len - (self.keys + self.queries) * self._width

    def _draw(self, split: Split, rows: int, seed: int) -> tuple[Rows, np.ndarray]:
        """Rows, and where the needle that is asked for first starts."""
        rng = np.random.Generator(np.random.PCG64(seed + SPLIT_SEEDS[split]))
        keys = _FIRST + _distinct(rng, rows, self._third, self.keys)
        values = _FIRST + self._third + _distinct(rng, rows, self._third, self.keys * self.values)
        marks = np.full((rows, self.keys, 1), _MARK)
        items = np.concatenate([marks, keys[..., None], values.reshape(rows, self.keys, self.values)], 2)
        places = self._filler + self.keys
        asked = _distinct(rng, rows, self.keys, self.queries)
        if self.depth is None:
            slots = np.sort(_distinct(rng, rows, places, self.keys), 1)
        else:
            mine = round(self.depth * (places - 1))
            others = _distinct(rng, rows, places - 1, self.keys - 1)
            slots = np.sort(np.concatenate([others + (others >= mine), np.full((rows, 1), mine)], 1), 1)
            first = (slots == mine).argmax(1)
            # the needle at the depth takes the place of the one that was drawn first
            asked = np.where(asked == first[:, None], asked[:, :1], asked)
            asked[:, 0] = first
        body, starts = _interleave(rng, items, slots, self._filler, _FIRST + 2 * self._third, self.vocab_size)
        row = np.arange(rows)[:, None]
        questions = items[row, asked].copy()
        questions[..., 0] = _ASK
        targets = np.full((rows, self.queries, self._width), IGNORED)
        targets[..., 1:-1] = questions[..., 2:]
        inputs = np.concatenate([body, questions.reshape(rows, -1)], 1)
        blank = np.full((rows, body.shape[1]), IGNORED)
        made = Rows(torch.from_numpy(inputs), torch.from_numpy(np.concatenate([blank, targets.reshape(rows, -1)], 1)))
        return made, starts[row[:, 0], asked[:, 0]]


@dataclass(frozen=True)
class VariableTracking:
    """Rows of random filler with chains of assignments; the value at the end of each chain is asked for.

    `= a v` gives a variable a value, `= b a` the value of another. vocab_size: marks 0 and 1, then a third each variables,
    values, filler. seq_len: N. chains: 2 or more. hops: assignments from variable to variable in a chain. Raises OptionError.
    """

    vocab_size: int = 256
    seq_len: int = 256
    chains: int = 4
    hops: int = 2

    def __post_init__(self) -> None:
        if self.chains < 2 or self.hops < 0:
            raise OptionError(f"chains and hops are {self.chains} and {self.hops}; they are at least 2 and 0")
        if self._third < self.chains * (self.hops + 1):
            raise OptionError(f"{self.chains} chains need a vocabulary of {3 * self.chains * (self.hops + 1) + 2}")
        if self._filler < 0:
            raise OptionError(f"{self.chains} chains of {self.hops} hops do not fit into {self.seq_len} tokens")

    @property
    def chance(self) -> float:
        """Guessing among the values of the row."""
        return 1 / self.chains

    def build(self, split: Split, rows: int, seed: int = 0) -> Rows:
        """inputs, targets int64 (rows, N): at the asked variables, what they stand for."""
        rng = np.random.Generator(np.random.PCG64(seed + SPLIT_SEEDS[split]))
        length = self.hops + 1
        count = self.chains * length
        names = _FIRST + _distinct(rng, rows, self._third, count).reshape(rows, self.chains, length)
        values = _FIRST + self._third + _distinct(rng, rows, self._third, self.chains)
        given = np.concatenate([values[..., None], names[..., :-1]], 2)
        chains = np.stack([np.full_like(names, _MARK), names, given], 3)
        # chains in each other, each in its own order
        chain = _distinct(rng, rows, count, count) // length
        own = chain[..., None] == np.arange(self.chains)
        rank = (np.cumsum(own, 1) * own).sum(2) - 1
        row = np.arange(rows)[:, None]
        slots = np.sort(_distinct(rng, rows, self._filler + count, count), 1)
        items = chains[row, chain, rank]
        body, _ = _interleave(rng, items, slots, self._filler, _FIRST + 2 * self._third, self.vocab_size)
        order = _distinct(rng, rows, self.chains, self.chains)
        questions = np.stack([np.full_like(order, _ASK), names[row, order, -1], values[row, order]], 2)
        targets = np.full((rows, self.chains, 3), IGNORED)
        targets[..., 1] = questions[..., 2]
        inputs = np.concatenate([body, questions.reshape(rows, -1)], 1)
        blank = np.full((rows, body.shape[1]), IGNORED)
        return Rows(torch.from_numpy(inputs), torch.from_numpy(np.concatenate([blank, targets.reshape(rows, -1)], 1)))

    def solve(self, inputs: Tensor) -> Tensor:
        """What follows an asked variable, by following the assignments; 0 elsewhere."""
        out = torch.zeros_like(inputs)
        for answers, row in zip(out, inputs.tolist(), strict=True):
            known = {row[i + 1]: row[i + 2] for i in range(len(row) - 2) if row[i] == _MARK}
            for i in range(len(row) - 1):
                if row[i] == _ASK:
                    value = row[i + 1]
                    while value in known:
                        value = known[value]
                    answers[i + 1] = value
        return out

    @property
    def _third(self) -> int:
        return (self.vocab_size - _FIRST) // 3

    @property
    def _filler(self) -> int:
        return self.seq_len - 3 * self.chains * (self.hops + 2)


def magic_numbers(count: int, *, digits: int = 7, seed: int = 0) -> list[NeedleText]:
    """Needles whose answers are random numbers, each of another city. count: 1 to 20. Raises OptionError."""
    if not 1 <= count <= len(_CITIES) or digits < 1:
        raise OptionError(f"count is 1 to {len(_CITIES)} and digits at least 1, not {count} and {digits}")
    rng = np.random.default_rng(seed)
    cities = [_CITIES[i] for i in rng.permutation(len(_CITIES))[:count]]
    numbers = [str(rng.integers(10 ** (digits - 1), 10**digits)) for _ in cities]
    return [
        NeedleText(f"The special magic number for {city} is {number}.", f"What is the special magic number for {city}?", number)
        for city, number in zip(cities, numbers, strict=True)
    ]  # fmt: skip


def needle_cases(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    needles: Sequence[NeedleText] | None = None,
    haystack: str | None = None,
    ask: str = "\n\nQuestion: {question}\nAnswer:",
) -> list[NeedleCase]:
    """Prompts of text, for every length, depth and needle one, in this order.

    tokenizer: a fast one. lengths: tokens of a prompt with its question and the tokenizer's own signs; it has as many or
    up to four fewer. depths: of the needle in the text, 0 to 1, moved back to where a sentence ends. needles: three magic
    numbers if None. haystack: the text, over and over where it is too short; Python's own language reference if None.
    ask: what follows the text. Raises OptionError; Unsupported for a tokenizer without offsets.
    """
    needles = magic_numbers(3) if needles is None else needles
    if not needles or not lengths or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise OptionError("give at least one length, one needle and one depth, and depths of 0 to 1")
    text = language_reference() if haystack is None else haystack
    if not text.strip():
        raise OptionError("the haystack is empty")
    # every token stands for a character at least, unless it is of the tokenizer's own
    straw = cut(tokenizer, text, special=False)
    return [
        _planted(tokenizer, straw, needle, length, depth, ask)
        for length in lengths
        for depth in depths
        for needle in needles
    ]


@dataclass(frozen=True, eq=False)
class NeedleGrid:
    """The share of right answers (lengths, depths); NaN where nothing was asked."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    recall: Tensor

    def effective_length(self, bar: float = 0.856) -> int:
        """The longest length up to which the mean over depths stays above `bar` (RULER's, Llama-2-7B at 4k), 0 if none."""
        longest = 0
        for length, shares in zip(self.lengths, self.recall, strict=True):
            if not float(shares.nanmean()) > bar:
                break
            longest = length
        return longest

    def figure(self) -> Any:
        """A plotly figure: depth down, length across. Raises MissingExtra."""
        go = need("plotly.graph_objects", "bench")
        names = [[str(n) for n in self.lengths], [f"{depth:.0%}" for depth in self.depths]]
        heat = go.Heatmap(z=self.recall.T.numpy(), x=names[0], y=names[1], zmin=0, zmax=1, colorscale="RdYlGn")
        figure = go.Figure(heat)
        figure.update_layout(
            xaxis_title="tokens", yaxis_title="depth of the needle", title="answers that hold the needle"
        )
        figure.update_yaxes(autorange="reversed")
        return figure


def needle_grid(answer: Callable[[NeedleCase], str | Sequence[int]], cases: Sequence[NeedleCase]) -> NeedleGrid:
    """Ask for every case and grade: right is an answer that holds the case's own."""
    lengths, depths = sorted({c.length for c in cases}), sorted({c.depth for c in cases})
    right, asked = torch.zeros(len(lengths), len(depths)), torch.zeros(len(lengths), len(depths))
    for case in cases:
        place = lengths.index(case.length), depths.index(case.depth)
        asked[place] += 1
        right[place] += case.right(answer(case))
    return NeedleGrid(tuple(lengths), tuple(depths), right / asked)


def greedy_answers(model: Any, tokenizer: Any = None, *, tokens: int = 32) -> Callable[[NeedleCase], str | list[int]]:
    """What a transformers model writes to a case, its likeliest token each time: text, or ids for cases of ids."""

    def answer(case: NeedleCase) -> str | list[int]:
        of_text = isinstance(case.prompt, str)
        ids = torch.tensor([cut(tokenizer, case.prompt).ids]) if isinstance(case.prompt, str) else case.prompt[None]
        ids = ids.to(model.device)
        valid = torch.ones_like(ids)
        with torch.no_grad():
            made = model.generate(input_ids=ids, attention_mask=valid, max_new_tokens=tokens, do_sample=False)
        new: list[int] = made[0, ids.shape[1] :].tolist()
        return str(tokenizer.decode(new)) if of_text else new

    return answer


@lru_cache(maxsize=1)
def language_reference() -> str:
    """The text of Python's own language reference, as it comes with this Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _planted(tokenizer: Any, straw: Tokens, needle: NeedleText, length: int, depth: float, ask: str) -> NeedleCase:
    question = ask.format(question=needle.question)
    room = length - len(cut(tokenizer, f"{needle.sentence} {question}").ids)
    if room < 0:
        raise OptionError(f"a prompt of {length} tokens has no room for the needle and its question")
    for _ in range(16):
        text = _first_tokens(straw, room)
        at = _sentence_end(text, depth)
        before = text[:at] + ("" if at == 0 or text[at - 1].isspace() else " ")
        prompt = before + needle.sentence + " " + text[at:] + question
        tokens = cut(tokenizer, prompt)
        over = len(tokens.ids) - length
        if -4 <= over <= 0:
            break
        # pieces merge or part where the needle was put in
        room = max(room - over, 0)
    start = len(before) + needle.sentence.index(needle.answer)
    end = start + len(needle.answer)
    if not -4 <= over <= 0:
        raise OptionError(f"no prompt of {length} tokens could be made: this tokenizer came to {len(tokens.ids)}")
    # a tokenizer that cuts the prompt off would lose the needle
    tokens.span(start, end)
    return NeedleCase(prompt, (start, end), needle.answer, length, depth)


def _first_tokens(straw: Tokens, count: int) -> str:
    """The text of the first `count` tokens of a haystack that goes on from its start."""
    rounds, left = divmod(count, len(straw.ids))
    tail = straw.text[: straw.offsets[left - 1][1]] if left else ""
    return (straw.text + "\n\n") * rounds + tail


def _sentence_end(text: str, depth: float) -> int:
    """The last end of a sentence at or before a depth; 0 where none ends there."""
    limit = round(depth * len(text))
    if limit == len(text):
        return limit
    return max(
        (text.rfind(stop, 0, limit) + len(stop) for stop in _STOPS if text.rfind(stop, 0, limit) >= 0), default=0
    )


def _distinct(rng: np.random.Generator, rows: int, below: int, count: int) -> np.ndarray:
    """`count` different integers in [0, below) in each row, in random order."""
    return rng.random((rows, below)).argsort(1)[:, :count]


def _interleave(
    rng: np.random.Generator, items: np.ndarray, slots: np.ndarray, filler: int, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """Items (rows, n, width) among random filler of [low, high), in order; slots: places among the filler's tokens and the
    items as one each, ascending. -> rows (rows, filler + n width), and where each item starts."""
    rows, count, width = items.shape
    starts = slots + (width - 1) * np.arange(count)
    body = rng.integers(low, high, size=(rows, filler + count * width))
    places = (starts[..., None] + np.arange(width)).reshape(rows, -1)
    np.put_along_axis(body, places, items.reshape(rows, -1), 1)
    return body, starts
