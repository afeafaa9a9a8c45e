"""Self-familiarity: a model that cannot find a concept again from its own explanation does not know it, and should not answer.

    explain c, greedily -> hide c in the explanation -> which concept is this? by beams that must write c
    s(c) = probability of c's tokens in the best of them;   s = sum 2^-i s(c_i) / sum 2^-i, the rarest concept first

Departs from the released code: c is hidden with its inflections and inside longer words; s(c) is the probability of c's
tokens, there the geometric mean over the whole answer; what is rare is read off the tokenizer, or told by `frequency`; the
words of the prompts are ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError
from regard.primitives.beam import Beams, Hypothesis, Phrases, beam_step, start_beams
from regard.steer.decoding.beams import write_beams

CARD = ExplanationCard(
    slug="self_familiarity",
    title="Self-familiarity",
    paper="Zero-Resource Hallucination Prevention for Large Language Models",
    exports=(
        "self_familiarity",
        "FamiliarityReport",
        "Familiarity",
        "FamiliarityGate",
        "sequence_logprob",
        "constrained_beams",
        "named_concepts",
        "hide_concept",
    ),
    reads="llama",
    takes={"model": "model"},
    calls="constrained_beams",
    options={"prompt": (5, 6, 7), "phrases": ((8, 9), (10,)), "num_beams": 3, "max_prefix": 2},
)

EXPLAIN = 'Write one short paragraph that explains "{concept}".\n'
INFER = '"{explanation}"\nThe concept that this paragraph explains is'
# words that are no concept where they begin a sentence, and that stay when a concept of several words is hidden
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at by can compare could define describe did do does explain find for from give has have how i if in "
        "is it its list may my name of on or please say should show so state summarise summarize tell that the then there "
        "these this those to was were what when where which who whom whose why will with would write you your",
    )
)
_CAPITALS = re.compile(r"[A-Z][\w'’-]*(?:\s+(?:(?:of|the|de|van|von|der|la|le)\s+)*[A-Z0-9][\w'’-]*)*")
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»')


@dataclass(frozen=True)
class Familiarity:
    """A concept, how the model explained it, that with the concept hidden, and its answer to which concept this is.

    log_p: log-probability of the concept's tokens in the answer, -inf where nothing was left to ask about; tokens: of these.
    """

    concept: str
    explanation: str
    hidden: str
    answer: str
    log_p: float
    tokens: int

    @property
    def score(self) -> float:
        """The probability, 0 to 1."""
        return math.exp(self.log_p)


@dataclass(frozen=True)
class FamiliarityReport:
    """The concepts of a text, the rarest first, and how familiar the text is: 0 to 1, None where it holds no concept."""

    text: str
    concepts: tuple[Familiarity, ...]
    score: float | None


@dataclass(frozen=True)
class FamiliarityGate:
    """Answer what is familiar, and refuse the rest: `gate(text, generate, assess)`.

    threshold: scores below it are refused, 0 to 1. Scores hang on model, prompts and tokenizer: take the 5th percentile of the
    scores of concepts that the model surely knows, as the authors do. refusal: may name {concepts}, those below the threshold.
    without_concepts: whether a text in which no concept was found passes. Raises OptionError.
    """

    threshold: float
    refusal: str = "I know too little about {concepts} to answer."
    without_concepts: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise OptionError(f"threshold is a probability, 0 to 1, not {self.threshold}")

    def __call__(
        self, text: str, generate: Callable[[str], str], assess: Callable[[str], FamiliarityReport]
    ) -> str:  # fmt: skip
        """The answer, or the refusal. assess: `lambda text: self_familiarity(model, tokenizer, text)`."""
        report = assess(text)
        return generate(text) if self.passes(report) else self._refusal(report)

    def passes(self, report: FamiliarityReport) -> bool:
        """Whether the text of a report may be answered."""
        return self.without_concepts if report.score is None else report.score >= self.threshold

    def _refusal(self, report: FamiliarityReport) -> str:
        strange = [found.concept for found in report.concepts if found.score < self.threshold]
        return self.refusal.format(concepts=", ".join(strange) or "this")


def self_familiarity(
    model: Any, tokenizer: Any, text: str, concepts: Sequence[str] | Callable[[str], Sequence[str]] | None = None, *,
    explain_prompt: str = EXPLAIN, infer_prompt: str = INFER, num_beams: int = 30, max_prefix: int = 10,
    max_explanation: int = 100, weights: Literal["rank", "mean", "min"] = "rank",
    frequency: Callable[[str], float] | None = None,
) -> FamiliarityReport:  # fmt: skip
    """How well a model knows what a text speaks of, before it answers (sections 3.1 to 3.3).

    concepts: those of the text, or a function that finds them; None for `named_concepts`. explain_prompt holds {concept},
    infer_prompt {explanation}, both with what the model's chat format needs. num_beams, max_prefix: beams, and tokens before
    the concept. max_explanation: tokens. weights: "rank", 1, 1/2, 1/4 … from the rarest on; "mean"; "min". frequency: how
    common a concept is; None for the tokenizer's word, who cuts rare words into more pieces. Raises OptionError.
    """
    for prompt, field in ((explain_prompt, "{concept}"), (infer_prompt, "{explanation}")):
        if field not in prompt:
            raise OptionError(f"the prompt {prompt!r} has no {field}")
    if weights not in ("rank", "mean", "min"):
        raise OptionError(f'weights is "rank", "mean" or "min", not {weights!r}')
    found = (
        (named_concepts if concepts is None else concepts)(text) if concepts is None or callable(concepts) else concepts
    )

    def commonness(concept: str) -> tuple[float, float, str]:
        if frequency is not None:
            return frequency(concept), 0.0, concept
        # pieces that were merged late have large numbers
        pieces = _ids(tokenizer, concept, special=False)
        return -len(pieces), -max(pieces, default=0), concept

    rarest_first = sorted(dict.fromkeys(found), key=commonness)
    seen = tuple(
        _guess(model, tokenizer, concept, explain_prompt, infer_prompt, num_beams, max_prefix, max_explanation)
        for concept in rarest_first
    )
    return FamiliarityReport(text, seen, _together([one.score for one in seen], weights))


def sequence_logprob(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """log p(tokens | prompt), of ids, by one pass. Raises OptionError for an empty prompt or no tokens."""
    if not len(prompt) or not len(tokens):
        raise OptionError(f"a prompt and tokens are needed, not {len(prompt)} and {len(tokens)} ids")
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return float(log_p.gather(1, ids[0, len(prompt) :, None]).sum())


def constrained_beams(
    model: Any, prompt: Sequence[int], phrases: Sequence[Sequence[int]], *, num_beams: int = 30, max_prefix: int = 10
) -> list[Hypothesis]:
    """Continuations of a prompt that end with one of the phrases, best first by log-likelihood over length.

    phrases: ids. max_prefix: at most so many tokens before it. Raises OptionError.
    """
    if not len(prompt):
        raise OptionError("the prompt is empty")
    must = Phrases(tuple(tuple(phrase) for phrase in phrases), max_prefix)

    def _search(model: Any, ids: Tensor, generation_config: Any, **given: Any) -> Beams:
        ends = generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends

        def step(log_p: Tensor, beams: Beams) -> Beams:
            return beam_step(log_p, beams, width=num_beams, constraint=must, ends=ends)

        for name in ("logits_processor", "stopping_criteria"):
            given.pop(name)
        return write_beams(model, ids, start_beams(1, num_beams, device=ids.device), step, must.longest, given)

    ids = torch.tensor([list(prompt)], device=model.device)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=num_beams, max_new_tokens=must.longest, do_sample=False,
        early_stopping=False, num_return_sequences=1, custom_generate=_search,
    )  # fmt: skip
    return found.hypotheses()[0]


def named_concepts(text: str) -> list[str]:
    """What a text puts in quotes, and its names: runs of words that begin with capitals, in order and each once.

    Words that open a question are no names. Use a recogniser of entities where there is one.
    """
    found: list[tuple[int, str]] = []
    rest = text
    for quoted in _QUOTED.finditer(text):
        found.append((quoted.start(), next(part for part in quoted.groups() if part).strip()))
        rest = rest[: quoted.start()] + " . ".ljust(len(quoted.group()))[: len(quoted.group())] + rest[quoted.end() :]
    for named in _CAPITALS.finditer(rest):
        words, start = named.group().split(), named.start()
        if not rest[:start].strip() or rest[:start].rstrip()[-1] in ".!?:\n":
            while words and words[0].lower() in _COMMON:
                words = words[1:]
        if words and words != ["I"]:
            found.append((start, " ".join(words)))
    return list(dict.fromkeys(concept for _, concept in sorted(found)))


def hide_concept(explanation: str, concept: str) -> str:
    """An explanation without a concept, its words and what is made of them ("Zorbas", "pre-zorbic").

    In any case. Words of fewer than four letters go only as they stand; of and the, and their like, stay.
    """
    words = concept.split()
    if not words:
        raise OptionError("the concept is empty")
    patterns = [r"\w*" + r"\s+".join(map(re.escape, words)) + r"\w*"]
    for word in words:
        if len(word) >= 4 and word.lower() not in _COMMON:
            patterns.append(r"\w*" + re.escape(word) + r"\w*")
        elif word.lower() not in _COMMON or len(words) == 1:
            patterns.append(r"(?<!\w)" + re.escape(word) + r"(?!\w)")
    pattern = re.compile("|".join(patterns), re.IGNORECASE)
    before, hidden = None, explanation
    # taking one out may bring the ends of another together
    while before != hidden:
        before, hidden = hidden, re.sub(r"[ \t]{2,}", " ", pattern.sub("", hidden))
    return hidden.strip()


def _guess(
    model: Any, tokenizer: Any, concept: str, explain: str, infer: str, beams: int, prefix: int, length: int
) -> Familiarity:  # fmt: skip
    """One concept: explain, hide, ask."""
    prompt = _ids(tokenizer, explain.replace("{concept}", concept))
    ids = torch.tensor([prompt], device=model.device)
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, num_beams=1
    )
    explanation = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True).strip()
    hidden = hide_concept(explanation, concept)
    if not re.search(r"\w", hidden):
        return Familiarity(concept, explanation, hidden, "", -math.inf, 0)
    question = _ids(tokenizer, infer.replace("{explanation}", hidden))
    phrases = _spellings(tokenizer, concept)
    answers = constrained_beams(model, question, phrases, num_beams=beams, max_prefix=prefix)
    if not answers:
        return Familiarity(concept, explanation, hidden, "", -math.inf, 0)
    best = answers[0].tokens
    count = Phrases(tuple(phrases), prefix).ending(best)
    log_p = sequence_logprob(model, [*question, *best[:-count]], best[-count:])
    return Familiarity(concept, explanation, hidden, tokenizer.decode(best).strip(), log_p, count)


def _spellings(tokenizer: Any, concept: str) -> list[tuple[int, ...]]:
    """The ids of a concept as it is, lower, upper and with capitals, after a blank and not. Raises OptionError."""
    capitals = " ".join(word[:1].upper() + word[1:] for word in concept.split())
    texts = dict.fromkeys(
        blank + spelt for blank in ("", " ") for spelt in (concept, concept.lower(), concept.upper(), capitals)
    )
    made = dict.fromkeys(tuple(_ids(tokenizer, text, special=False)) for text in texts)
    known = [ids for ids in made if ids and tokenizer.unk_token_id not in ids]
    if not known:
        raise OptionError(f"the tokenizer has no way to write {concept!r}")
    return known


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _together(scores: Sequence[float], weights: Literal["rank", "mean", "min"]) -> float | None:
    """The scores of concepts, the rarest first, as one."""
    if not scores:
        return None
    if weights == "min":
        return min(scores)
    shares = [0.5**i if weights == "rank" else 1.0 for i in range(len(scores))]
    return sum(share * score for share, score in zip(shares, scores, strict=True)) / sum(shares)
