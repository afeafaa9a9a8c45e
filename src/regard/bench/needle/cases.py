"""What is hidden and asked for: notes in tiny-lm's own vocabulary, or sentences in text that any tokenizer can cut."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor, tensor

from regard.bench.proving.notes import NOTE, VOCAB, note_cases
from regard.bench.recall.needle import NeedleCase, magic_numbers, needle_cases
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.text import Span, cut

Ask = Literal["again", "later"]


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt that hides something and ends by asking for it.

    prompt: int64 (N,). needle: the places of the prompt that an answer copies. asked: where the question starts. again: up
    to where the prompt is read at once with its question, and from where it then comes token by token. right(ids): whether
    what was written says the answer.
    """

    prompt: Tensor
    needle: Span
    asked: int
    again: tuple[int, int]
    right: Callable[[Sequence[int]], bool]

    def parts(self, ask: Ask) -> tuple[Tensor, Tensor]:
        """The ids that are read at once, after which keys may go, and those that then come one by one."""
        end, start = self.again if ask == "again" else (self.asked, self.asked)
        return self.prompt[:end], self.prompt[start:]


class Source(Protocol):
    """Where cases come from. name: tells them from others among results; about: says it to a reader; chance: the accuracy
    of guessing; tokens: of an answer at most."""

    @property
    def name(self) -> str: ...

    @property
    def about(self) -> str: ...

    @property
    def chance(self) -> float: ...

    @property
    def tokens(self) -> int: ...

    def cases(self, length: int, depth: float, rows: int, seed: int = 0) -> list[Case]:
        """`rows` prompts of `length` tokens with the needle at a depth of 0 (first thing) to 1. Raises OptionError."""
        ...


@dataclass(frozen=True)
class Notes:
    """Notes in source text, one of `notes` asked for: ids of tiny-lm's vocabulary. An answer is one token, the value."""

    notes: int = 8
    tokens: int = 1

    @property
    def name(self) -> str:
        return f"notes {self.notes}"

    @staticmethod
    def fit(model: Any, tokenizer: Any) -> bool:
        """Whether a model's vocabulary is that of notes."""
        return model.config.get_text_config().vocab_size == VOCAB and (
            tokenizer is None or tokenizer.convert_tokens_to_ids("<note>") == NOTE
        )

    @property
    def about(self) -> str:
        return f"{self.notes} notes hidden in source text, one asked for"

    @property
    def chance(self) -> float:
        return 1 / self.notes

    def cases(self, length: int, depth: float, rows: int, seed: int = 0) -> list[Case]:
        made = note_cases(rows, length, notes=self.notes, depth=depth, seed=seed)
        asked = length - made.question.shape[1]
        ends, answers = made.needle_spans[:, 0, 1].tolist(), made.answers[:, 0].tolist()
        # the answer comes right after the question: of a cache that gave up keys it can only be asked a second time
        return [
            Case(ids, (end - 1, end), asked, (length, asked), partial(_begins, answer))
            for ids, end, answer in zip(made.ids, ends, answers, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Text:
    """A magic number in a text, with a question; what the model says to a user where its tokenizer has a chat template.

    haystack: the text. about: what it is. tokens: of an answer at most. Right is an answer that holds the number. Raises
    OptionError for a tokenizer that cannot write one.
    """

    tokenizer: Any
    haystack: str
    about: str
    tokens: int = 32

    chance = 0.0

    def __post_init__(self) -> None:
        number = magic_numbers(1)[0].answer
        if number not in self.tokenizer.decode(self.tokenizer(number, add_special_tokens=False)["input_ids"]):
            raise OptionError(f"the tokenizer does not give back a number, {number}: is its vocabulary in the folder?")

    @property
    def name(self) -> str:
        return f"text {zlib.crc32(self.haystack.encode()):08x}"

    def cases(self, length: int, depth: float, rows: int, seed: int = 0) -> list[Case]:
        if rows > 20:
            raise OptionError(f"there are 20 different needles of text, not {rows}: ask for 20 rows or fewer")
        chat = self.tokenizer.chat_template is not None
        ask = "\n\n{question}" if chat else "\n\nQuestion: {question}\nAnswer:"
        room = length - (self._frame() if chat else 0)
        needles = magic_numbers(rows, seed=seed)
        # hardly a token has more than 16 characters, and a text that ends too soon starts over
        text = self.haystack.strip()[: 16 * length]
        made = needle_cases(self.tokenizer, [room], [depth], needles=needles, haystack=text, ask=ask)
        questions = [ask.format(question=needle.question) for needle in needles]
        return [self._case(case, question, chat) for case, question in zip(made, questions, strict=True)]

    def _case(self, case: NeedleCase, question: str, chat: bool) -> Case:
        assert isinstance(case.prompt, str)
        text = self._said(case.prompt) if chat else case.prompt
        shift = text.find(case.prompt)
        if shift < 0:
            raise Unsupported(
                "the tokenizer's chat template changes what it is given, so needles cannot be found in it"
            )
        tokens = cut(self.tokenizer, text, special=not chat)
        begin = shift + len(case.prompt) - len(question)
        asked = next(i for i, (start, end) in enumerate(tokens.offsets) if start >= begin and end > start)
        last = len(tokens.ids) - 1
        return Case(
            tensor(tokens.ids), tokens.span(shift + case.needle[0], shift + case.needle[1]), asked, (last, last),
            lambda written: case.right(self.tokenizer.decode(written)),
        )  # fmt: skip

    def _said(self, text: str) -> str:
        """The text as a user's turn, before the model's. Models that would think aloud first are asked not to."""
        turn = [{"role": "user", "content": text}]
        said = self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return str(said)

    def _frame(self) -> int:
        """The tokens that the chat template adds, beyond those that the tokenizer adds itself."""
        text = "What is it?"
        return len(cut(self.tokenizer, self._said(text), special=False).ids) - len(cut(self.tokenizer, text).ids)


def _begins(answer: int, written: Sequence[int]) -> bool:
    return written[0] == answer
