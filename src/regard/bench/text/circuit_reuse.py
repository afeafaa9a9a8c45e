"""Two tasks whose circuits are compared: who is given something, and which colour a thing has.

When Mary and John went to the shop, John gave a book to                                         -> Mary        IOI
Question: On the desk there is a red cup, a blue pen and a green mug. What color is the pen?  …  -> blue        ColoredObjects

Every prompt has a twin of as many words, with one or few words changed, on which the answer is another or none; both come as
text for any tokenizer, and as ids of a small vocabulary of words on which models can be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from regard.bench.task import IGNORED, SPLIT_SEEDS, Rows, Split
from regard.contract.card import TaskCard
from regard.contract.errors import OptionError, ShapeError
from regard.hosts.text import cut

CARD = TaskCard(
    slug="circuit_reuse",
    title="Indirect objects and colored objects, with twins",
    part_of="circuit_reuse",
    exports=("IOI", "ColoredObjects", "PromptPair", "PairIds", "pair_ids"),
    version="1",
    metric="accuracy at the last position",
    chance="1 / 2 among the names, 1 / 3 among the colors",
)

Twin = Literal["swap", "absent"]
_NAMES = (
    "Mary", "John", "Anna", "Paul", "Lucy", "Mark", "Emma", "Jack", "Sarah", "Peter", "Laura", "David", "Alice", "James",
    "Julia", "Simon", "Grace", "Henry", "Maria", "Frank", "Helen", "Oscar", "Clara", "Martin",
)  # fmt: skip
_PLACES = ("shop", "park", "station", "office", "school", "market", "beach", "museum", "garden", "library")
_GIFTS = ("book", "ring", "ticket", "letter", "coin", "camera", "basket", "hammer", "pillow", "lamp")
_SCENES = (
    ("When", "went to", "gave"), ("After", "came to", "handed"), ("While", "stayed at", "passed"),
    ("Since", "met at", "sold"),
)  # fmt: skip
_COLORS = ("red", "blue", "green", "black", "white", "brown", "purple", "pink", "gray", "yellow")
_THINGS = (
    "pencil", "cup", "bowl", "ball", "book", "plate", "bottle", "key", "ring", "lamp", "coin", "spoon", "card", "brush",
)  # fmt: skip
_SURFACES = ("desk", "table", "floor", "shelf")
# the residue of a prompt that decides its split: shares of 1, 1 and 8
_TEST, _VALIDATION, _SHARES = 0, 1, 10


@dataclass(frozen=True)
class PromptPair:
    """A prompt and its twin, word for word of one length.

    words, twin: pieces that make the text when joined. answer: what follows `words`; wrong: the other answers that stand in
    them. roles: name -> which word it is.
    """

    words: tuple[str, ...]
    twin: tuple[str, ...]
    answer: str
    wrong: tuple[str, ...]
    roles: dict[str, int] = field(hash=False)

    @property
    def clean(self) -> str:
        """The prompt as text."""
        return "".join(self.words)

    @property
    def corrupt(self) -> str:
        """Its twin as text."""
        return "".join(self.twin)


@dataclass(frozen=True, eq=False)
class PairIds:
    """Pairs as ids. clean, corrupt: int64 (B, N), padded on the left; padding: bool (B, N), True for tokens.

    correct: int64 (B,); wrong: int64 (B, K). roles: name -> int64 (B,), the last token of that word.
    """

    clean: Tensor
    corrupt: Tensor
    padding: Tensor
    correct: Tensor
    wrong: Tensor
    roles: dict[str, Tensor]


class _Pairs:
    """What both tasks share: words become rows."""

    twin: Twin

    def pairs(self, split: Split, count: int, seed: int = 0) -> list[PromptPair]:
        """`count` prompts with their twins; those of one split stand in no other."""
        rng = np.random.Generator(np.random.PCG64(seed + SPLIT_SEEDS[split]))
        return [self._drawn(rng, split) for _ in range(count)]

    def build(self, split: Split, rows: int, seed: int = 0) -> Rows:
        """inputs, targets int64 (rows, N): at the last word, the answer."""
        made = self.ids(self.pairs(split, rows, seed))
        targets = torch.full_like(made.clean, IGNORED)
        targets[:, -1] = made.correct
        return Rows(made.clean, targets)

    def ids(self, pairs: Sequence[PromptPair]) -> PairIds:
        """Pairs as ids of the task's own words, one each. Raises OptionError for words of another task."""
        number = {word: i for i, word in enumerate(self.vocabulary)}
        unknown = {word for pair in pairs for word in (*pair.words, *pair.twin)} - set(number)
        if unknown:
            raise OptionError(f"{sorted(unknown)[:3]} are no words of {type(self).__name__}")
        clean, corrupt, wrong = (
            torch.tensor([[number[word] for word in getattr(pair, name)] for pair in pairs])
            for name in ("words", "twin", "wrong")
        )
        roles = {name: torch.tensor([pair.roles[name] for pair in pairs]) for name in pairs[0].roles}
        correct = torch.tensor([number[pair.answer] for pair in pairs])
        return PairIds(clean, corrupt, torch.ones_like(clean, dtype=torch.bool), correct, wrong, roles)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, each with the blank before it."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """How many words there are."""
        return len(self.vocabulary)

    @property
    def seq_len(self) -> int:
        """Words of a prompt."""
        return len(self.pairs("train", 1)[0].words)

    def _drawn(self, rng: np.random.Generator, split: Split) -> PromptPair:
        raise NotImplementedError


@dataclass(frozen=True)
class IOI(_Pairs):
    """Indirect object identification: of two names, the one that is not said again is given something.

    twin: "swap", the other name is said again, so that the answers change places; "absent", a third name is, and nothing
    decides. Roles: first and second name, again (the repeated name), end. Raises OptionError.
    """

    twin: Twin = "swap"

    def __post_init__(self) -> None:
        _check_twin(self.twin)

    @property
    def chance(self) -> float:
        """Guessing among the two names."""
        return 1 / 2

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, each with the blank before it."""
        scenes = [piece for start, verb, gave in _SCENES for piece in (start, f" {verb}", f" {gave}")]
        others = (" and", " the", ",", " a", " to")
        return (*dict.fromkeys(scenes), *others, *(f" {word}" for word in (*_NAMES, *_PLACES, *_GIFTS)))

    def solve(self, inputs: Tensor) -> Tensor:
        """At every word, the name that was said once so far; 0 before there is one."""
        vocabulary = self.vocabulary
        names = {vocabulary.index(f" {name}") for name in _NAMES}
        out = torch.zeros_like(inputs)
        for answers, row in zip(out, inputs.tolist(), strict=True):
            said: dict[int, int] = {}
            for place, word in enumerate(row):
                said |= {word: said.get(word, 0) + 1} if word in names else {}
                answers[place] = next((name for name, times in said.items() if times == 1), 0)
        return out

    def _drawn(self, rng: np.random.Generator, split: Split) -> PromptPair:
        place, gift = _of_split(rng, split, len(_PLACES), len(_GIFTS))
        start, verb, gave = _SCENES[rng.integers(len(_SCENES))]
        first, second, third = (f" {_NAMES[i]}" for i in rng.permutation(len(_NAMES))[:3])
        again, given = (first, second) if rng.integers(2) else (second, first)

        def words(name: str) -> tuple[str, ...]:
            scene = (start, first, " and", second, f" {verb}", " the", f" {_PLACES[place]}", ",", name, f" {gave}")
            return (*scene, " a", f" {_GIFTS[gift]}", " to")

        twin = words(given if self.twin == "swap" else third)
        roles = {"first": 1, "second": 3, "again": 8, "end": len(twin) - 1}
        return PromptPair(words(again), twin, given, (again,), roles)


@dataclass(frozen=True)
class ColoredObjects(_Pairs):
    """Colored objects: three things with their colors, and one whose color is asked for.

    shots: answered questions of the same form before it, at least 0. twin: "swap", another of the things is asked for;
    "absent", one that is not there. Roles: color0 to color2 and thing0 to thing2 in their order, asked, end. Raises
    OptionError.
    """

    shots: int = 1
    twin: Twin = "swap"

    def __post_init__(self) -> None:
        _check_twin(self.twin)
        if self.shots < 0:
            raise OptionError(f"shots is a number of answered questions, not {self.shots}")

    @property
    def chance(self) -> float:
        """Guessing among the three colors of the question."""
        return 1 / 3

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, each with the blank before it."""
        frame = (
            "Question:",
            " On",
            " the",
            " there",
            " is",
            " a",
            ",",
            " and",
            ".",
            " What",
            " color",
            "?",
            "\nAnswer:",
            "\n",
        )
        return (*frame, *(f" {word}" for word in (*_SURFACES, *_COLORS, *dict.fromkeys(_THINGS))))

    def solve(self, inputs: Tensor) -> Tensor:
        """At every word, the color that stood before the thing asked for in the question at hand; 0 where there is none."""
        vocabulary = self.vocabulary
        things = {vocabulary.index(f" {thing}") for thing in _THINGS}
        begin = vocabulary.index("Question:")
        out = torch.zeros_like(inputs)
        for answers, row in zip(out, inputs.tolist(), strict=True):
            known: dict[int, int] = {}
            color = 0
            for place, word in enumerate(row):
                if word == begin:
                    known, color = {}, 0
                elif word in things and word in known:
                    color = known[word]
                elif word in things:
                    known[word] = row[place - 1]
                answers[place] = color
        return out

    def _drawn(self, rng: np.random.Generator, split: Split) -> PromptPair:
        words: tuple[str, ...] = ()
        for _ in range(self.shots):
            shot, colors, _, asked = self._question(rng, *rng.integers(len(_THINGS), size=2))
            words += (*shot, colors[asked], "\n")
        # the colors and things that come first decide the split
        question, colors, things, asked = self._question(rng, *_of_split(rng, split, len(_COLORS), len(_THINGS)))
        others = [thing for thing in (f" {name}" for name in _THINGS) if thing not in things]
        missing = others[rng.integers(len(others))]
        instead = things[(asked + 1 + rng.integers(2)) % 3] if self.twin == "swap" else missing
        shift = len(words)
        where = {f"color{i}": shift + 7 + 4 * i for i in range(3)} | {f"thing{i}": shift + 8 + 4 * i for i in range(3)}
        at = {**where, "asked": shift + len(question) - 3, "end": shift + len(question) - 1}
        twin = list((*words, *question))
        twin[at["asked"]] = instead
        wrong = tuple(color for color in colors if color != colors[asked])
        return PromptPair((*words, *question), tuple(twin), colors[asked], wrong, at)

    def _question(
        self, rng: np.random.Generator, color: int, thing: int
    ) -> tuple[tuple[str, ...], list[str], list[str], int]:
        """The words, three colors, three things, and which is asked for."""
        colors = [f" {_COLORS[i]}" for i in _starting_with(rng, color % len(_COLORS), len(_COLORS))]
        things = [f" {_THINGS[i]}" for i in _starting_with(rng, thing, len(_THINGS))]
        asked = int(rng.integers(3))
        surface = f" {_SURFACES[rng.integers(len(_SURFACES))]}"
        items = [
            word for c, t, end in zip(colors, things, (",", " and", "."), strict=True) for word in (" a", c, t, end)
        ]
        words = ("Question:", " On", " the", surface, " there", " is", *items, " What", " color", " is", " the")
        return (*words, things[asked], "?", "\nAnswer:"), colors, things, asked


def pair_ids(tokenizer: Any, pairs: Sequence[PromptPair]) -> PairIds:
    """Pairs as ids of a fast tokenizer, padded on the left.

    An answer is known by its first token. Raises OptionError where an answer begins as a wrong one does, or where a prompt
    and its twin have different token lengths; Unsupported for a tokenizer without offsets.
    """
    made = []
    for pair in pairs:
        clean, corrupt = cut(tokenizer, pair.clean), cut(tokenizer, pair.corrupt)
        if len(clean.ids) != len(corrupt.ids):
            raise OptionError(
                f"{pair.clean[-60:]!r} has {len(clean.ids)} tokens and its twin {len(corrupt.ids)}: choose another pair"
            )
        first = [cut(tokenizer, answer, special=False).ids[0] for answer in (pair.answer, *pair.wrong)]
        if first[0] in first[1:]:
            raise OptionError(f"{pair.answer!r} and {pair.wrong} begin with the same token: choose another pair")
        starts = np.cumsum([0, *map(len, pair.words)])
        roles = {name: clean.span(starts[i], starts[i + 1])[1] - 1 for name, i in pair.roles.items()}
        made.append((clean.ids, corrupt.ids, first, roles))
    if len({len(first) for _, _, first, _ in made}) > 1:
        raise ShapeError("pairs have different numbers of wrong answers: do not mix tasks")
    longest = max(len(ids) for ids, *_ in made)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    left = torch.tensor([longest - len(ids) for ids, *_ in made])
    clean_ids, corrupt_ids = (
        torch.tensor([[pad] * (longest - len(row[which])) + list(row[which]) for row in made]) for which in (0, 1)
    )
    answers = torch.tensor([first for _, _, first, _ in made])
    places = {name: left + torch.tensor([roles[name] for *_, roles in made]) for name in made[0][3]}
    valid = torch.arange(longest) >= left[:, None]
    return PairIds(clean_ids, corrupt_ids, valid, answers[:, 0], answers[:, 1:], places)


def _check_twin(twin: str) -> None:
    if twin not in ("swap", "absent"):
        raise OptionError(f'twin is "swap" or "absent", not {twin!r}')


def _of_split(rng: np.random.Generator, split: Split, rows: int, columns: int) -> tuple[int, int]:
    """Two numbers whose sum decides the split, so that no prompt is in two."""
    while True:
        one, other = int(rng.integers(rows)), int(rng.integers(columns))
        rest = (one + other) % _SHARES
        if split == {_TEST: "test", _VALIDATION: "validation"}.get(rest, "train"):
            return one, other


def _starting_with(rng: np.random.Generator, first: int, count: int) -> list[int]:
    others = [int(i) for i in rng.permutation(count) if i != first]
    return [first, *others[:2]]
