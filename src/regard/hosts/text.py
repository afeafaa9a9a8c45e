"""Where words stand among tokens, by the characters that each token covers and never by its place in a split.

Spans are half-open. Tokens that stand for no text (begin, pad) cover no character and belong to no word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.optional import need

Span = tuple[int, int]
# words with their hyphens and apostrophes, and runs of other signs
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")
_REDUCE: dict[str, Callable[[Sequence[float]], float]] = {"sum": sum, "mean": mean, "max": max}


@dataclass(frozen=True)
class Tokens:
    """A text as a tokenizer cuts it: ids, and for each the characters of the text that it covers."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[Span, ...]

    def span(self, start: int, end: int) -> Span:
        """The tokens that cover characters [start, end), blanks at its ends apart. Raises OptionError if none does."""
        part = self.text[start:end]
        start, end = start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
        places = [i for i, (a, b) in enumerate(self.offsets) if a < min(b, end) and b > start]
        if not places:
            raise OptionError(f"no token covers characters {start} to {end} of {self.text[:40]!r}: was it cut off?")
        return places[0], places[-1] + 1


@dataclass(frozen=True)
class Inserted:
    """A text with a piece put in: tokens of the whole, and those of the piece, `span`."""

    tokens: Tokens
    span: Span


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a model's folder. Raises OptionError where there is none; MissingExtra without transformers."""
    try:
        found = need("transformers", "hf").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OptionError(f"{folder} has no tokenizer: save the model's own there") from error
    # of some families one without vocabulary is made where there are no files
    if len(found.get_vocab()) <= len(found.added_tokens_decoder) + 1:
        raise OptionError(f"{folder} has no tokenizer: save the model's own there")
    return found


def cut(tokenizer: Any, text: str, *, special: bool = True) -> Tokens:
    """The tokens of a text. special: with the begin and end that the tokenizer adds.

    Raises Unsupported for a tokenizer that cannot tell offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Unsupported(f"{type(tokenizer).__name__} tells no offsets; load the tokenizer's fast version")
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return Tokens(text, tuple(made["input_ids"]), tuple((a, b) for a, b in made["offset_mapping"]))


def occurrences(text: str, word: str, *, any_case: bool = False) -> list[Span]:
    """Where a word or phrase stands in a text, as characters; never inside a longer word.

    Any run of blanks in the phrase matches any other. Raises OptionError for an empty word.
    """
    parts = word.split()
    if not parts:
        raise OptionError("the word to look for is empty")
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, parts)) + r"(?!\w)"
    return [found.span() for found in re.finditer(pattern, text, re.IGNORECASE if any_case else 0)]


def find_words(
    tokenizer: Any, text: str, words: Sequence[str], *, any_case: bool = False, special: bool = True
) -> list[list[Span]]:
    """For each word or phrase the tokens of its occurrences in a text, in order; an empty list where it has none.

    any_case: upper and lower case are one. special: count the tokens that the tokenizer adds at the ends.
    """
    tokens = cut(tokenizer, text, special=special)
    return [[tokens.span(*place) for place in occurrences(text, word, any_case=any_case)] for word in words]


def insert_span(tokenizer: Any, text: str, piece: str, at: int, *, special: bool = True) -> Inserted:
    """Put a piece into a text before character `at`, and say which tokens of the whole are it.

    A token that also covers neighbouring text counts. Blanks are part of the piece if it needs them, and their tokens are
    not in the span. Raises OptionError.
    """
    if not 0 <= at <= len(text):
        raise OptionError(f"at is {at}; it is 0 to the {len(text)} characters of the text")
    if not piece.strip():
        raise OptionError("the piece to put in is empty")
    tokens = cut(tokenizer, text[:at] + piece + text[at:], special=special)
    return Inserted(tokens, tokens.span(at, at + len(piece)))


def merge_pieces(
    tokens: Tokens, values: Sequence[float], reduce: Literal["sum", "mean", "max"] = "sum"
) -> tuple[list[str], list[float]]:
    """The words of a text and a number for each, from numbers of its tokens.

    A token counts for the word that it covers most of, one of blanks for the word after it (at the end, before it), one
    that covers nothing for none. Words are runs of letters and digits, with inner hyphens and apostrophes, and runs of other
    signs. A word that no token reaches gets 0. Raises ShapeError, OptionError.
    """
    if len(values) != len(tokens.ids):
        raise ShapeError(f"there are {len(values)} values for {len(tokens.ids)} tokens; one each is needed")
    if reduce not in _REDUCE:
        raise OptionError(f'reduce is "sum", "mean" or "max", not {reduce!r}')
    words = [found.span() for found in _WORD.finditer(tokens.text)]
    gathered: list[list[float]] = [[] for _ in words]
    for (a, b), value in zip(tokens.offsets, values, strict=True):
        if a < b and words:
            gathered[_word_of(words, a, b)].append(float(value))
    return [tokens.text[a:b] for a, b in words], [_REDUCE[reduce](some) if some else 0.0 for some in gathered]


def _word_of(words: Sequence[Span], a: int, b: int) -> int:
    covered = [min(b, end) - max(a, start) for start, end in words]
    best = max(range(len(words)), key=covered.__getitem__)
    if covered[best] > 0:
        return best
    return next((i for i, (start, _) in enumerate(words) if start >= b), len(words) - 1)
