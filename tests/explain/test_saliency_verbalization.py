"""What is said of scores is true of them: recomputed from the words, for random scores."""

import math
import re
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import OptionError, ShapeError, Unsupported, merge_wordpieces, verbalize, verbalize_prompt, verbalize_with
from regard.hosts.text import Tokens

METHODS = ("span", "conv", "topk", "combined")
TIGHT = 1e-5

numbers = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 0.5, -0.5, 1.0])
texts = st.lists(numbers, min_size=1, max_size=16)


def words(n):
    """Words that occur once, so that quotations can be found."""
    return [f"w{i}" for i in range(n)]


def quoted(sentence):
    """The places of the words in quotation marks, the label apart."""
    return [
        [int(i) for i in re.findall(r"w(\d+)", part)] for part in re.findall(r'"([^"]*)"', sentence) if part != "label"
    ]


def evidence(scores, sign):
    largest = max(map(abs, scores)) or 1
    return [max(s / largest if sign == "positive" else -s / largest, 0) for s in scores]


def the_side_of(sentence, sign):
    """Which sign a sentence says it speaks of."""
    says_for = bool(
        re.search(r"\bfor (it|the prediction)\b(?! \")", re.sub(r'for the prediction "label"', "", sentence))
    )
    says_against = bool(re.search(r"\bagainst (it|the prediction)\b", sentence))
    if says_for != says_against:
        return "positive" if says_for else "negative"
    return sign


def check_words(found, scores, sign):
    """Read the sentences and hold every number and every comparison against the scores."""
    weights = evidence(scores, sign)
    total = sum(weights)
    named = [snippet.indices for snippet in found.snippets]
    shares = [sum(weights[i] for i in places) / total for places in named]
    slack = TIGHT * len(scores) / max(total, TIGHT)
    for sentence in found.sentences:
        text = sentence.text
        assert the_side_of(text, sign) in ("positive", "negative")
        if "no word stands out" in text.lower():
            assert not named
            continue
        if sentence.kind in ("strongest", "polarity"):
            (places,) = quoted(text)
            side = evidence(scores, the_side_of(text, sign))
            expected = sign if sentence.kind == "strongest" else {"positive": "negative", "negative": "positive"}[sign]
            assert the_side_of(text, sign) == expected
            assert all(side[places[0]] > s for i, s in enumerate(side) if i != places[0])
            continue
        percent = re.search(r"(\d+) %", text)
        if sentence.kind == "together":
            assert abs(int(percent[1]) / 100 - sum(shares)) <= 0.005 + slack
            assert int(re.search(r"\b(\d+)(?: snippets| make)", text)[1]) == len(named)
            continue
        if sentence.kind == "comparison":
            times = int(re.search(r"(\d+) times", text)[1])
            assert shares[0] > times * shares[1] - slack * times
            assert not quoted(text) or tuple(quoted(text)[0]) == named[1]
            continue
        (places,) = quoted(text)
        assert tuple(places) in named and ("phrase" in text) == (len(places) > 1)
        assert ("…" in text) == (places != list(range(places[0], places[-1] + 1)))
        share = sum(weights[i] for i in places) / total
        assert abs(int(percent[1]) / 100 - share) <= 0.005 + slack
        if sentence.kind == "most":
            assert all(share > other - slack for at, other in zip(named, shares, strict=True) if list(at) != places)
        if sentence.kind == "equal":
            assert all(share >= other - slack for other in shares)


@settings(max_examples=300, deadline=None)
@given(texts, st.sampled_from(METHODS), st.sampled_from(["positive", "negative"]), st.integers(0, 50))
def test_every_sentence_is_true(scores, method, sign, seed):
    found = verbalize(words(len(scores)), scores, "label", method, sign=sign, seed=seed)
    assert found.verify() and found.text == " ".join(s.text for s in found.sentences)
    check_words(found, scores, sign)
    weights = evidence(scores, sign)
    for snippet in found.snippets:
        assert snippet.coverage >= 0.1 and min(weights[i] for i in snippet.indices) >= 0
        share = sum(weights[i] for i in snippet.indices) / sum(weights)
        assert snippet.coverage == pytest.approx(share, abs=TIGHT * len(scores))
    places = [i for snippet in found.snippets for i in snippet.indices]
    assert len(places) == len(set(places)) and len(found.snippets) <= 5
    coverages = [snippet.coverage for snippet in found.snippets]
    assert coverages == sorted(coverages, reverse=True)


@pytest.mark.parametrize(
    "right, wrong",
    [("46 %", "48 %"), ("20 %", "22 %"), ('"w9"', '"w3"'), ("2 times", "3 times"), ("These 2", "These 3")],
)
def test_false_words_are_noticed(right, wrong):
    scores = [0.0, 0.1, 3.0, 1.1, 0.0, 0.1, 0.0, 1.3, 0.0, -0.4, 0.0, 0.9]
    found = verbalize(words(12), scores, "label", "topk", coverage=0.0)
    check_words(found, scores, "positive")
    doctored = tuple(replace(s, text=s.text.replace(right, wrong)) for s in found.sentences)
    assert doctored != found.sentences
    with pytest.raises(AssertionError):
        check_words(replace(found, sentences=doctored), scores, "positive")


@settings(max_examples=100, deadline=None)
@given(texts, st.sampled_from(METHODS), st.sampled_from([2.0, 0.125, 1024.0]))
def test_scale_changes_nothing_and_sign_turns_sides(scores, method, factor):
    tokens = words(len(scores))
    found = verbalize(tokens, scores, "label", method)
    scaled = verbalize(tokens, [factor * s for s in scores], "label", method)
    assert scaled.text == found.text and scaled.snippets == found.snippets
    turned = verbalize(tokens, [-s for s in scores], "label", method, sign="negative")
    assert turned.snippets == found.snippets
    assert [(s.kind, s.indices, s.value) for s in turned.sentences] == [
        (s.kind, s.indices, s.value) for s in found.sentences
    ]


def test_any_positive_factor_changes_nothing():
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    plain = verbalize(words(40), scores, "label", coverage=0.0)
    assert plain.snippets
    for factor in (1e-8, 0.3, 7.7, 1e9):
        assert verbalize(words(40), [factor * s for s in scores], "label", coverage=0.0).text == plain.text


@settings(max_examples=50, deadline=None)
@given(texts, st.sampled_from(METHODS))
def test_seeds_change_words_and_no_facts(scores, method):
    tokens = words(len(scores))
    told = [verbalize(tokens, scores, "label", method, seed=seed) for seed in (0, 0, 1, 2)]
    assert told[0] == told[1]
    facts = {tuple((s.kind, s.indices, s.than, s.value) for s in t.sentences) for t in told}
    assert len(facts) == 1 and len({t.snippets for t in told}) == 1


def test_wordings_differ_between_seeds():
    scores = [0.0] * 20
    scores[5:8] = [1.0, 2.0, 1.5]
    assert len({verbalize(words(20), scores, "label", seed=seed).text for seed in range(20)}) > 3


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_planted_span_comes_first(width, method):
    """80 % of the mass on some words, the rest evenly on the others."""
    n = 40
    scores = [0.2 / (n - width)] * n
    for i in range(width):
        scores[17 + i] = 0.8 / width
    found = verbalize(words(n), scores, "label", method)
    whole = {"span": 5, "conv": 3, "topk": 1, "combined": 5}[method]
    if width <= whole:
        assert found.snippets[0].indices == tuple(range(17, 17 + width))
        assert found.snippets[0].coverage == pytest.approx(0.8, abs=0.01)
        assert len(found.snippets) == 1 and "80 %" in found.text
    else:
        assert all(17 <= i < 17 + width for snippet in found.snippets for i in snippet.indices)
        assert sum(snippet.coverage for snippet in found.snippets) <= 0.8 + 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -2.0])
def test_equal_scores_say_that_no_word_stands_out(method, n, value):
    for sign in ("positive", "negative"):
        found = verbalize(words(n), [value] * n, "label", method, sign=sign)
        assert found.snippets == () and "no word stands out" in found.text.lower()
        assert len(found.sentences) == 1 and found.verify()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_texts_shorter_than_the_filter_are_told(method, n):
    scores = [0.0] * n
    scores[-1] = 1.0
    found = verbalize(words(n), scores, "label", method)
    assert found.snippets[0].indices == (n - 1,) and found.snippets[0].coverage == 1
    assert f'The word "w{n - 1}"' in found.text or f'the word "w{n - 1}"' in found.text


def brute_force(scores, method, length, least, top, sign):
    """All filters of zeros and ones at all places, one at a time, in plain arithmetic."""
    n = len(scores)
    signed = [s if sign == "positive" else -s for s in scores]
    weights = [max(s, 0) for s in signed]
    total = sum(weights)
    highest = sorted(signed)[::-1][: max(math.ceil(0.4 * n), 2)]
    filters = set()
    if method in ("conv", "combined"):
        window = min(length, n)
        filters |= {f for f in product((0, 1), repeat=window) if min(2, n) <= sum(f) <= length - 2}
    if method in ("span", "combined"):
        filters |= {(1,) * min(size, n) for size in range(3, length + 1) if size % 2}
    if method == "topk":
        filters = {(1,)}
    found = {}
    for mask in filters:
        for start in range(n - len(mask) + 1):
            places = [start + i for i, one in enumerate(mask) if one]
            while places and weights[places[0]] <= total / n:
                places = places[1:]
            while places and weights[places[-1]] <= total / n:
                places = places[:-1]
            mean = sum(signed[i] for i in places) / len(places) if places else 0
            if places and min(signed[i] for i in places) >= 0 and mean > sum(highest) / len(highest):
                share = sum(weights[i] for i in places) / total
                if share >= least:
                    found[tuple(places)] = share
    chosen = []
    for places in sorted(found, key=lambda p: (-found[p], len(p), p)):
        if len(chosen) < top and all(set(places).isdisjoint(other) for other in chosen):
            chosen.append(places)
    return chosen, [found[places] for places in chosen]


@pytest.mark.parametrize(
    "method, length", [("topk", 5), ("span", 3), ("span", 5), ("conv", 4), ("conv", 5), ("combined", 5)]
)
@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_snippets_are_those_of_all_filters_tried(method, length, sign):
    generator = torch.Generator().manual_seed(length)
    told = 0
    for n in (1, 2, 3, 4, 5, 6, 9, 17) * 4:
        scores = (torch.randn(n, generator=generator) ** 3).double().tolist()
        # whole millionths of the largest, so that both count alike
        largest = max(map(abs, scores))
        scores = [round(s / largest * 1e6) / 1e6 for s in scores]
        found = verbalize(words(n), scores, "label", method, length=length, sign=sign, coverage=0.05, top=4)
        places, shares = brute_force(scores, method, length, 0.05, 4, sign)
        assert [s.indices for s in found.snippets] == places
        assert [s.coverage for s in found.snippets] == pytest.approx(shares)
        told += len(places)
    assert told > 15


def test_baselines_are_their_formulas():
    scores = [0.1, 0.9, 0.8, 0.1, 0.1, 0.0, 0.45, 0.1, 0.0, 1.0]
    tensor = torch.tensor(scores, dtype=torch.float64)
    for name, bar in (("quantile", tensor.std(unbiased=False)), ("variance", tensor.var(unbiased=False))):
        for value in (0.5, 1.2, 3.0):
            found = verbalize(words(10), scores, "label", "topk", baseline=name, value=value, coverage=0.0, top=10)
            wanted = {i for i, s in enumerate(scores) if s > value * bar and s > tensor.mean()}
            assert {s.indices[0] for s in found.snippets} == wanted
    found = verbalize(words(10), scores, "label", "topk", baseline="mean", value=0.2, coverage=0.0)
    assert [s.indices for s in found.snippets] == [(9,)]


def test_claims_are_refuted_by_other_scores():
    scores = [0.0, 0.1, 3.0, 2.0, 0.0, 0.1, 0.0, 1.4, 0.0, -0.4, 0.0, 0.0]
    found = verbalize(words(12), scores, "label")
    assert {s.kind for s in found.sentences} == {"most", "comparison", "also", "together", "strongest", "polarity"}
    assert found.verify() and found.verify([10 * s for s in scores])
    shifted = scores[3:] + scores[:3]
    assert {s.kind for s in found.refuted(shifted)} >= {"most", "also", "strongest", "polarity"}
    assert not found.verify([0.0] * 12)
    other = list(scores)
    other[7] = 4.0
    assert {s.kind for s in found.refuted(other)} >= {"most", "comparison", "also", "strongest"}
    silent = verbalize(words(12), [1.0] * 12, "label")
    assert not silent.verify(scores)
    even = [0.0] * 12
    even[2] = even[8] = 1.0
    equal = verbalize(words(12), even, "label", "topk")
    assert equal.sentences[0].kind == "equal" and equal.verify()
    even[8] = 2.0
    assert equal.sentences[0] in equal.refuted(even)


@pytest.mark.parametrize("times", [2, 3, 7])
def test_a_multiple_is_not_exceeded_by_itself(times):
    """Thirds and sevenths are rounded to millionths, which must not make them more."""
    scores = [0.0] * 12
    scores[2], scores[8] = float(times), 1.0
    found = verbalize(words(12), scores, "label", "topk", coverage=0.0, value=1.0)
    claims = [s for s in found.sentences if s.kind == "comparison"]
    assert [s.value for s in claims] == ([times - 1] if times > 2 else [])
    scores[2] += 0.01
    (claim,) = (
        s
        for s in verbalize(words(12), scores, "label", "topk", coverage=0.0, value=1.0).sentences
        if s.kind == "comparison"
    )
    assert claim.value == times and f"{times} times" in claim.text
    scores[2] -= 0.01
    assert claim in replace(found, sentences=(claim,)).refuted(scores)


def test_sums_that_are_equal_but_for_rounding_are_equal():
    scores = [0.0] * 14
    scores[2:5] = [1 / 3] * 3
    scores[9] = 1.0
    found = verbalize(words(14), scores, "label", value=0.6, coverage=0.0)
    assert {s.indices for s in found.snippets} == {(2, 3, 4), (9,)}
    assert found.sentences[0].kind == "equal" and found.verify()


PIECES = Tokens(
    "unbelievably bad, bad", tuple(range(8)), ((0, 0), (0, 2), (2, 9), (9, 12), (13, 16), (16, 17), (18, 21), (0, 0))
)


def test_pieces_keep_their_total():
    scores = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    merged = merge_wordpieces(PIECES, scores)
    assert merged.words == ("unbelievably", "bad", ",", "bad")
    assert merged.scores == pytest.approx((sum(scores[1:4]), scores[4], scores[5], scores[6]))
    assert merged.elsewhere == pytest.approx(scores[0] + scores[7])
    assert sum(merged.scores) + merged.elsewhere == pytest.approx(sum(scores))
    largest = merge_wordpieces(PIECES, scores, "max")
    assert largest.scores[0] == max(scores[1:4])
    blank = Tokens("  ", (1, 2), ((0, 1), (1, 2)))
    assert merge_wordpieces(blank, [1.0, 2.0]).elsewhere == 3.0


@settings(max_examples=100, deadline=None)
@given(st.text("ab ,.-é", min_size=1, max_size=20), st.data())
def test_pieces_of_any_text_keep_their_total(text, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)) | {0, len(text)})
    offsets = ((0, 0), *pairwise(cuts))
    scores = data.draw(st.lists(numbers, min_size=len(offsets), max_size=len(offsets)))
    merged = merge_wordpieces(Tokens(text, tuple(range(len(offsets))), offsets), scores)
    assert sum(merged.scores) + merged.elsewhere == pytest.approx(sum(scores), abs=1e-6)


def test_merging_needs_offsets():
    with pytest.raises(OptionError, match=r"needs the offsets of tokens, not a list.*cut\(tokenizer, text\)"):
        merge_wordpieces(["un", "##happy"], [1.0, 2.0])
    with pytest.raises(ShapeError, match="2 values for 8 tokens"):
        merge_wordpieces(PIECES, [1.0, 2.0])


def test_a_prompt_says_everything_and_any_function_answers():
    tokens, scores = ["a", "fine", "day"], [0.0, 4.0, -1.0]
    prompt = verbalize_prompt(tokens, scores, "good", task="sentiment")
    assert "a (0.00) fine (1.00) day (-0.25)" in prompt and "'good'" in prompt and "sentiment" in prompt
    prompts = {verbalize_prompt(tokens, scores, "good", objective=o) for o in ("summary", "words", "decision")}
    assert len(prompts) == 3
    asked = []

    def generate(prompt):
        asked.append(prompt)
        return "  Because of fine.\n"

    answer = verbalize_with(generate, tokens, scores, "good", task="sentiment")
    assert asked == [prompt] == [answer.prompt] and answer.text == "Because of fine."
    with pytest.raises(OptionError, match="generate gave a NoneType"):
        verbalize_with(lambda prompt: None, tokens, scores, "good")
    with pytest.raises(OptionError, match="objective is one of"):
        verbalize_prompt(tokens, scores, "good", objective="sumary")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"method": "conv", "length": 9}, Unsupported, "length 9 are too many"),
        ({"method": "combined", "length": 12}, Unsupported, "take 8 at most"),
        ({"method": "conv", "length": 3}, OptionError, "take at least 4"),
        ({"length": 2}, OptionError, "length is at least 3"),
        ({"method": "spam"}, OptionError, "did you mean 'span'"),
        ({"sign": "both"}, OptionError, "sign is one of positive, negative"),
        ({"baseline": "median"}, OptionError, "baseline is one of"),
        ({"value": 2.0}, OptionError, "value is above 0"),
        ({"value": -1.0, "baseline": "quantile"}, OptionError, "value is above 0"),
        ({"coverage": 1.5}, OptionError, "coverage in 0 to 1"),
        ({"top": 0}, OptionError, "top at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        verbalize(words(6), [1.0] * 6, "label", **options)


def test_scores_that_cannot_be_are_refused():
    with pytest.raises(ShapeError, match="5 scores for 6 tokens"):
        verbalize(words(6), [1.0] * 5, "label")
    for bad in (math.nan, math.inf):
        with pytest.raises(OptionError, match="the token 'w2' has none"):
            verbalize(words(3), [1.0, 2.0, bad], "label")
    with pytest.raises(ShapeError, match="no tokens"):
        verbalize([], [], "label")
    long = verbalize(words(20), torch.arange(20.0), "label", "span", length=11)
    assert long.verify()


def test_figure():
    found = verbalize(words(6), [0.0, 1.0, 3.0, 0.0, 0.0, 0.0], "label")
    (bars,) = found.figure().data
    assert list(bars.y) == [0.0, 1.0, 3.0, 0.0, 0.0, 0.0] and len(set(bars.marker.color)) == 2
