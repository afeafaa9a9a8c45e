"""Saliency maps told in words: which words and phrases a prediction hangs on, with nothing said that the scores deny.

Snippets are places in a window whose mean exceeds that of the highest two fifths; coverage is the share of all evidence of
the chosen sign that a snippet holds. Sentences are made from claims, and every claim can be checked against the scores.

Departs from the released code: words at the ends of a snippet that hold no more than the average are cut off, before its
mean is taken; snippets do not overlap; the last window of a text counts, and a short text too; scores are compared in
millionths of the largest, so that equal ones are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError, Unsupported, near
from regard.contract.optional import need
from regard.hosts.text import Tokens, merge_pieces

CARD = ExplanationCard(
    slug="saliency_verbalization",
    title="Saliency maps told in words",
    paper="Saliency Map Verbalization: Comparing Feature Importance Representations from Model-free and Instruction-based "
    "Methods",
    exports=(
        "verbalize",
        "Verbalization",
        "Snippet",
        "Sentence",
        "verbalize_prompt",
        "verbalize_with",
        "Instructed",
        "merge_wordpieces",
        "MergedWords",
    ),
    options={"tokens": ("a", "fine", "film", "but", "long"), "scores": (0.1, 0.9, 0.6, -0.2, -0.5), "label": "good"},
    figure=True,
)

Method = Literal["span", "conv", "topk", "combined"]
Sign = Literal["positive", "negative"]
Baseline = Literal["mean", "quantile", "variance"]
Kind = Literal["none", "most", "equal", "also", "comparison", "together", "strongest", "polarity"]
Objective = Literal["summary", "words", "decision"]

# scores are whole numbers of this share of the largest
_UNITS = 1_000_000
# beyond it there are too many filters
_LONGEST = 8
_VALUES: dict[str, float] = {"mean": 0.4, "quantile": 1.0, "variance": 1.0}
_WORDS: dict[str, tuple[str, ...]] = {
    "none": ("No word stands out for the prediction {label}.", "For the prediction {label} no word stands out."),
    "most": (
        "The {noun} {text} is most important for the prediction {label}, with {share} % of the evidence {way} it.",
        "The {noun} {text} matters most for the prediction {label}: it holds {share} % of the evidence {way} it.",
        "Most of all the {noun} {text} counts for the prediction {label} ({share} % of the evidence {way} it).",
    ),
    "equal": (
        "The {noun} {text} is as important for the prediction {label} as any other named here, with {share} % of the "
        "evidence {way} it.",
        "For the prediction {label} nothing named here exceeds the {noun} {text}, which holds {share} % of the evidence "
        "{way} it.",
    ),
    "also": (
        "The {noun} {text} is also salient ({share} %).",
        "The {noun} {text} matters as well, with {share} %.",
        "Another {share} % lies on the {noun} {text}.",
    ),
    "comparison": (
        "The first weighs more than {times} times as much as the second.",
        "That is over {times} times the weight of the {noun} {text}.",
    ),
    "together": ("Together the {count} snippets hold {share} %.", "These {count} make up {share} % in all."),
    "strongest": (
        "The single word that speaks most {way} it is {text}.",
        "No other word speaks as strongly {way} it as {text}.",
    ),
    "polarity": (
        "The word that speaks most {other} it is {text}.",
        "On the other side, {text} speaks most {other} the prediction.",
    ),
}
_OBJECTIVES: dict[str, str] = {
    "summary": "Say in one or two sentences which words or phrases mattered most for the prediction, and why that is so.",
    "words": "Name the three most important words or phrases, the most important first, each with a reason.",
    "decision": "Say whether the words with high scores justify the prediction, in at most three sentences.",
}


@dataclass(frozen=True)
class Snippet:
    """Words by their places in the text, ascending, and the share of the evidence that they hold, 0 to 1."""

    indices: tuple[int, ...]
    coverage: float


@dataclass(frozen=True)
class Sentence:
    """A claim in words. kind: what is claimed; indices: of which words; than: of which it says more; value: share or factor.

    most, equal: `indices` holds more than, or no less than, every other snippet; also: it holds `value`; comparison: it holds
    more than `value` times as much as `than`; together: all snippets hold `value`; strongest: the word exceeds every other;
    polarity: it exceeds every other on the other side; none: no word stands out.
    """

    kind: Kind
    text: str
    indices: tuple[int, ...] = ()
    than: tuple[int, ...] = ()
    value: float = 0.0


@dataclass(frozen=True)
class Verbalization:
    """text: all sentences; snippets: the salient ones, most of the evidence first. The rest says what was asked for."""

    text: str
    snippets: tuple[Snippet, ...]
    sentences: tuple[Sentence, ...]
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    label: str
    settings: tuple[Any, ...]

    def verify(self, scores: Sequence[float] | None = None) -> bool:
        """Whether every sentence is true of some scores, its own if None."""
        return not self.refuted(scores)

    def refuted(self, scores: Sequence[float] | None = None) -> tuple[Sentence, ...]:
        """The sentences that are not true of some scores. Raises ShapeError, OptionError."""
        units = _units(self.tokens, self.scores if scores is None else scores)
        named = tuple(snippet.indices for snippet in self.snippets)
        return tuple(s for s in self.sentences if not _true(s, units, named, self.settings))

    def figure(self) -> Any:
        """The scores of the words as bars, those of snippets in another colour. Raises MissingExtra without plotly."""
        graphs = need("plotly.graph_objects", "bench")
        salient = {i for snippet in self.snippets for i in snippet.indices}
        colours = ["#d95f02" if i in salient else "#9e9e9e" for i in range(len(self.tokens))]
        places = list(range(len(self.tokens)))
        figure = graphs.Figure(graphs.Bar(x=places, y=list(self.scores), marker_color=colours))
        figure.update_xaxes(tickvals=places, ticktext=list(self.tokens))
        return figure.update_layout(title=self.text, yaxis_title=f"attribution to {self.label}")


def verbalize(
    tokens: Sequence[str],
    scores: Sequence[float],
    label: str,
    method: Method = "span",
    *,
    length: int = 5,
    coverage: float = 0.1,
    top: int = 5,
    sign: Sign = "positive",
    baseline: Baseline = "mean",
    value: float | None = None,
    seed: int = 0,
) -> Verbalization:
    """Tell attributions (n) of words (n) to a label in words.

    method: "span" looks at runs of 3, 5, … words up to length, "conv" at all choices of 2 to length - 2 words of a window,
    "topk" at single words, "combined" at span and conv. coverage: the least share of a snippet. top: how many at most. sign:
    evidence for the label, or against it. baseline: what the mean of a snippet exceeds, the mean of the highest share
    `value` of scores ("mean", 0.4), or `value` times their standard deviation ("quantile", 1) or variance ("variance", 1).
    seed: of the choice between wordings, never of facts. Raises OptionError, ShapeError; Unsupported for filters longer
    than 8.
    """
    for name, given, kinds in (("method", method, Method), ("sign", sign, Sign), ("baseline", baseline, Baseline)):
        if given not in get_args(kinds):
            raise OptionError(
                f"{name} is one of {', '.join(get_args(kinds))}, not {given!r}{near(given, get_args(kinds))}"
            )
    if length < 3 or top < 1 or not 0 <= coverage <= 1:
        raise OptionError(f"length is at least 3, top at least 1, coverage in 0 to 1, not {length}, {top}, {coverage}")
    if method in ("conv", "combined"):
        if length > _LONGEST:
            raise Unsupported(f"filters of length {length} are too many (2^length); take 8 at most, or method='span'")
        if length < 4:
            raise OptionError(f"filters of length {length} have no 2 to length - 2 words; take at least 4")
    amount = _VALUES[baseline] if value is None else value
    if not math.isfinite(amount) or amount < 0 or (baseline == "mean" and not 0 < amount <= 1):
        raise OptionError(f"value is above 0 and up to 1 for the mean, and 0 or more for others, not {value}")
    units = _units(tokens, scores)
    settings = (method, length, coverage, top, sign, baseline, amount)
    snippets = _snippets(units, settings)
    drawn = random.Random(seed)
    claims = _claims(units, snippets, settings)
    sentences = tuple(_sentence(claim, tokens, label, sign, len(snippets), drawn) for claim in claims)
    return Verbalization(
        " ".join(s.text for s in sentences),
        snippets,
        sentences,
        tuple(tokens),
        tuple(map(float, scores)),
        label,
        settings,
    )


def verbalize_prompt(
    tokens: Sequence[str],
    scores: Sequence[float],
    label: str,
    *,
    task: str = "text classification",
    objective: Objective = "summary",
    digits: int = 2,
) -> str:
    """What to ask a language model for the same: its role, the label, every word with its score, and what to say.

    Scores are shares of the largest, rounded to `digits`. objective: "summary", "words" or "decision". Raises OptionError,
    ShapeError.
    """
    if objective not in _OBJECTIVES:
        raise OptionError(
            f"objective is one of {', '.join(_OBJECTIVES)}, not {objective!r}{near(objective, _OBJECTIVES)}"
        )
    units = _units(tokens, scores)
    told = " ".join(f"{token} ({unit / _UNITS:.{digits}f})" for token, unit in zip(tokens, units, strict=True))
    return (
        f"You explain the decisions of a model for {task} to a layperson. The model predicted {label!r}. Behind each word "
        "stands its score in brackets: how much it spoke for that prediction, from -1 (strongly against) to 1 (strongly "
        f"for).\n\n{told}\n\n{_OBJECTIVES[objective]} Rely on the scores alone and do not repeat them."
    )


@dataclass(frozen=True)
class Instructed:
    """What a language model was asked, and what it said; nothing of it is checked."""

    prompt: str
    text: str


def verbalize_with(
    generate: Callable[[str], str],
    tokens: Sequence[str],
    scores: Sequence[float],
    label: str,
    *,
    task: str = "text classification",
    objective: Objective = "summary",
) -> Instructed:
    """Let a language model tell it: any function from a prompt to an answer. Other arguments as of `verbalize_prompt`."""
    prompt = verbalize_prompt(tokens, scores, label, task=task, objective=objective)
    answer = generate(prompt)
    if not isinstance(answer, str):
        raise OptionError(f"generate gave a {type(answer).__name__}; it takes a prompt and returns text")
    return Instructed(prompt, answer.strip())


@dataclass(frozen=True)
class MergedWords:
    """Words and their scores; elsewhere: the scores of tokens that stand for no text, such as the begin, together."""

    words: tuple[str, ...]
    scores: tuple[float, ...]
    elsewhere: float


def merge_wordpieces(
    tokens: Tokens, scores: Sequence[float], reduce: Literal["sum", "mean", "max"] = "sum"
) -> MergedWords:
    """Scores of a tokenizer's pieces as scores of words, by the characters that each covers (`regard.hosts.text.cut`).

    With "sum" the words and `elsewhere` together hold what the pieces held. Raises ShapeError, OptionError.
    """
    if not isinstance(tokens, Tokens):
        raise OptionError(
            f"merge_wordpieces needs the offsets of tokens, not a {type(tokens).__name__}: "
            "regard.hosts.text.cut(tokenizer, text) gives them; signs such as ## differ between tokenizers"
        )
    words, values = merge_pieces(tokens, scores, reduce)
    bare = [float(score) for (a, b), score in zip(tokens.offsets, scores, strict=True) if a >= b or not words]
    return MergedWords(tuple(words), tuple(values), sum(bare))


def _units(tokens: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Scores in millionths of the largest absolute one."""
    values = [float(score) for score in scores]
    if len(values) != len(tokens):
        raise ShapeError(f"there are {len(values)} scores for {len(tokens)} tokens; one each is needed")
    if not values:
        raise ShapeError("there are no tokens")
    if not all(map(math.isfinite, values)):
        raise OptionError(
            f"scores are finite numbers; the token {tokens[[*map(math.isfinite, values)].index(False)]!r} has none"
        )
    largest = max(map(abs, values))
    return [round(value / largest * _UNITS) if largest else 0 for value in values]


def _evidence(units: Sequence[int], sign: Sign) -> list[int]:
    return [max(unit if sign == "positive" else -unit, 0) for unit in units]


def _snippets(units: Sequence[int], settings: tuple[Any, ...]) -> tuple[Snippet, ...]:
    """Salient ones, most evidence first, then fewer words, then earlier ones; none overlaps another."""
    method, length, least, top, sign, baseline, amount = settings
    signed = [unit if sign == "positive" else -unit for unit in units]
    weights, n = _evidence(units, sign), len(units)
    total = sum(weights)
    bar = _bar(signed, baseline, amount)
    found = set()
    for places in _candidates(n, method, length):
        kept = list(places)
        for end in (0, -1):
            while kept and weights[kept[end]] * n <= total:
                kept.pop(end)
        held = sum(signed[i] for i in kept)
        # what speaks for the other side is no part of a snippet
        if kept and min(signed[i] for i in kept) >= 0 and held > bar * len(kept) and held >= least * total:
            found.add(tuple(kept))
    ranked = sorted(found, key=lambda places: (-sum(weights[i] for i in places), len(places), places))
    chosen: list[tuple[int, ...]] = []
    for places in ranked:
        if len(chosen) < top and not any(set(places) & set(other) for other in chosen):
            chosen.append(places)
    return tuple(Snippet(places, sum(weights[i] for i in places) / total) for places in chosen)


def _candidates(n: int, method: Method, length: int) -> set[tuple[int, ...]]:
    """Places that a method looks at; a text shorter than the window is a window."""
    if method == "topk":
        return {(i,) for i in range(n)}
    found: set[tuple[int, ...]] = set()
    if method in ("span", "combined"):
        for size in range(3, length + 1, 2):
            width = min(size, n)
            found |= {tuple(range(start, start + width)) for start in range(n - width + 1)}
    if method in ("conv", "combined"):
        window = min(length, n)
        for start in range(n - window + 1):
            for size in range(min(2, n), length - 1):
                found |= set(combinations(range(start, start + window), size))
    return found


def _bar(signed: Sequence[int], baseline: Baseline, amount: float) -> float:
    """What the mean of a snippet must exceed."""
    n = len(signed)
    if baseline == "mean":
        # of one score alone nothing could exceed the mean
        highest = sorted(signed, reverse=True)[: max(math.ceil(n * amount), 2)]
        return sum(highest) / len(highest)
    mean = sum(signed) / n
    variance = sum((s / _UNITS - mean / _UNITS) ** 2 for s in signed) / n
    return amount * (math.sqrt(variance) if baseline == "quantile" else variance) * _UNITS


def _claims(units: Sequence[int], snippets: Sequence[Snippet], settings: tuple[Any, ...]) -> list[Sentence]:
    """What can be said, without words."""
    if not snippets:
        return [Sentence("none", "")]
    weights = _evidence(units, settings[4])
    held = [sum(weights[i] for i in snippet.indices) for snippet in snippets]
    first, *others = snippets
    most = all(_exceeds(weights, first.indices, other.indices) for other in others)
    claims = [Sentence("most" if most else "equal", "", first.indices, value=first.coverage)]
    if others:
        times = held[0] // held[1]
        while times >= 2 and not _exceeds(weights, first.indices, others[0].indices, times):
            times -= 1
        if times >= 2:
            claims.append(Sentence("comparison", "", first.indices, others[0].indices, times))
    claims += [Sentence("also", "", other.indices, value=other.coverage) for other in others]
    if others:
        everything = tuple(sorted(i for snippet in snippets for i in snippet.indices))
        claims.append(Sentence("together", "", everything, value=sum(held) / sum(weights)))
    for kind, side in (("strongest", weights), ("polarity", _evidence([-unit for unit in units], settings[4]))):
        best = max(range(len(side)), key=side.__getitem__)
        # a lone snippet of one word has been named already
        if side[best] > 0 and side.count(side[best]) == 1 and (kind == "polarity" or first.indices != (best,)):
            claims.append(Sentence("strongest" if kind == "strongest" else "polarity", "", (best,)))
    return claims


def _true(claim: Sentence, units: Sequence[int], named: Sequence[tuple[int, ...]], settings: tuple[Any, ...]) -> bool:
    """Whether the scores bear a claim out."""
    weights = _evidence(units, settings[4])
    total = sum(weights)
    if claim.kind == "none":
        return not _snippets(units, settings)
    if claim.kind in ("strongest", "polarity"):
        side = weights if claim.kind == "strongest" else _evidence([-unit for unit in units], settings[4])
        place = claim.indices[0]
        return side[place] > max((s for i, s in enumerate(side) if i != place), default=0)
    if total == 0:
        return False
    held = sum(weights[i] for i in claim.indices)
    if claim.kind == "comparison":
        return _exceeds(weights, claim.indices, claim.than, claim.value)
    others = [places for places in named if places != claim.indices]
    if claim.kind == "most" and not all(_exceeds(weights, claim.indices, places) for places in others):
        return False
    if claim.kind == "equal" and any(_exceeds(weights, places, claim.indices) for places in others):
        return False
    return round(100 * held / total) == round(100 * claim.value)


def _exceeds(weights: Sequence[int], places: Sequence[int], others: Sequence[int], times: float = 1) -> bool:
    """Whether some words hold more than so many times what others do, whichever way their scores were rounded."""
    doubled, than = (2 * sum(weights[i] for i in some) for some in (places, others))
    return doubled - len(places) > times * (than + len(others))


def _sentence(
    claim: Sentence, tokens: Sequence[str], label: str, sign: Sign, count: int, drawn: random.Random
) -> Sentence:
    """The claim in one of its wordings."""
    places = claim.than if claim.kind == "comparison" else claim.indices
    noun = "word" if len(places) == 1 else "phrase"
    words = drawn.choice(_WORDS[claim.kind]).format(
        noun=noun, text=_quoted(tokens, places), label=f'"{label}"', share=round(100 * claim.value),
        times=int(claim.value), count=count,
        way="for" if sign == "positive" else "against", other="against" if sign == "positive" else "for",
    )  # fmt: skip
    return Sentence(claim.kind, words, claim.indices, claim.than, claim.value)


def _quoted(tokens: Sequence[str], places: Sequence[int]) -> str:
    """Words in quotation marks, "…" where some between them are left out."""
    parts = []
    for before, place in zip((None, *places), places, strict=False):
        if before is not None and place != before + 1:
            parts.append("…")
        parts.append(tokens[place])
    return '"' + " ".join(parts) + '"'
