"""Self-familiarity: its parts against their definitions, and a model that knows half of the names it has met."""

import itertools
import math
import random

import pytest
import tokenizers as parts
import torch
import torch.nn.functional as F
import transformers as hf

from regard import (
    Familiarity,
    FamiliarityGate,
    FamiliarityReport,
    OptionError,
    constrained_beams,
    hide_concept,
    named_concepts,
    self_familiarity,
    sequence_logprob,
)
from regard.bench.proving.tiny_lm import tokenizer as of_bytes
from regard.hosts.transformers.specimens import make
from regard.steer.decoding.self_familiarity import _together

FAMILIES = ("llama", "gpt2", "gemma3", "deepseek")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_phrase_scores_the_product_of_its_tokens(family):
    model, prompt, phrase = make(family), [4, 9, 30, 2], [7, 7, 41]
    product = 1.0
    for i, token in enumerate(phrase):
        with torch.no_grad():
            product *= float(model(torch.tensor([[*prompt, *phrase[:i]]])).logits[0, -1].softmax(-1)[token])
    assert math.exp(sequence_logprob(model, prompt, phrase)) == pytest.approx(product, rel=1e-4)
    (only,) = constrained_beams(model, prompt, [phrase], num_beams=4, max_prefix=0)
    assert only.tokens == tuple(phrase)
    assert math.exp(only.log_p) == pytest.approx(product, rel=1e-4)


def holds(tokens, phrases):
    return [
        (i, n)
        for i, n in itertools.product(range(len(tokens)), range(1, 5))
        if tuple(tokens[i : i + n]) in phrases and len(tokens[i : i + n]) == n
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_continuation_ends_with_a_phrase(family):
    model, phrases = make(family), [(7, 7, 41), (12,), (7, 3)]
    model.generation_config.eos_token_id = 20
    found = constrained_beams(model, [4, 9, 30, 2], phrases, num_beams=6, max_prefix=4)
    assert len(found) > 1
    for h in found:
        places = holds(h.tokens, phrases)
        assert len(places) >= 1 and places[0][0] <= 4
        assert any(h.tokens[-len(p) :] == p for p in phrases)
        assert 20 not in h.tokens
        assert h.log_p == pytest.approx(sequence_logprob(model, [4, 9, 30, 2], h.tokens), abs=1e-3)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_words_before_the_phrase_are_found_where_they_help():
    model = make("llama")
    straight = constrained_beams(model, [4, 9, 30, 2], [(12, 5)], num_beams=8, max_prefix=0)[0]
    free = constrained_beams(model, [4, 9, 30, 2], [(12, 5)], num_beams=8, max_prefix=3)[0]
    assert free.score >= straight.score


CASES = [
    ("Zorba", "Zorba is a ZORBA, zorba's and zorbas; unZorbalike.", ["zorba"]),
    ("Bank of England", "The bank of England (BANK OF ENGLAND) is of banks, England's oldest.", ["bank", "england"]),
    ("a b", "a a b b c", ["a b"]),
    ("C++", "C++ is C++, not C.", ["c++"]),
    ("Öl", "Öl, ÖL and öl", ["öl"]),
    ("New  York", "new\nyork and New York", ["new york"]),
]


@pytest.mark.parametrize("concept, explanation, gone", CASES)
def test_what_is_hidden_holds_the_concept_no_more(concept, explanation, gone):
    hidden = hide_concept(explanation, concept)
    text = " ".join(hidden.lower().split())
    assert not any(word in text for word in gone), hidden
    # nor in any piece that a tokenizer cuts it into
    decoded = of_bytes().decode(of_bytes()(hidden, add_special_tokens=False)["input_ids"])
    assert not any(word in decoded.lower() for word in gone)


def test_what_is_not_the_concept_stays():
    assert hide_concept("The art of baking, and cartography.", "Art of War") == "The of baking, and cartography."
    assert hide_concept("Cats chase mice.", "dog") == "Cats chase mice."
    assert hide_concept("One cat, one caterpillar.", "cat") == "One , one ."


def test_concepts_of_a_text():
    text = 'What is the Treaty of Westphalia? Compare Ada Lovelace with "dark  matter", and Ada Lovelace. Is Rust fast?'
    assert named_concepts(text) == ["Treaty of Westphalia", "Ada Lovelace", "dark  matter", "Rust"]
    assert named_concepts("what is a cat?") == []
    assert named_concepts("Who am I") == []
    assert named_concepts("“Öl” and Öl") == ["Öl"]


def test_scores_together():
    scores = [0.9, 0.1, 0.5]
    assert _together(scores, "rank") == pytest.approx((0.9 + 0.05 + 0.125) / 1.75)
    assert _together(scores, "mean") == pytest.approx(0.5)
    assert _together(scores, "min") == 0.1
    for weights in ("rank", "mean", "min"):
        assert _together([], weights) is None
        assert _together([0.3], weights) == pytest.approx(0.3)
        for seed in range(20):
            some = [random.Random(seed).random() for _ in range(1 + seed % 4)]
            assert min(some) - 1e-12 <= _together(some, weights) <= max(some) + 1e-12


# ---- names of two syllables: everybody has met a hundred of them, and knows facts of fifty

SYLLABLES = ("Ba", "Ke", "Li", "Mo", "Nu", "Pa", "Re", "Si", "To", "Vu", "Wa", "Xe", "Yo", "Zu")
FACTS = [[f"{kind}{i}" for i in range(8)] for kind in ("town", "trade", "tool")]
OTHERS = ["<pad>", "<s>", "</s>", "<unk>", "explain", "waves", "who", "is", ".", "?"]
EXPLAIN, INFER = "explain {concept} .", "{explanation} who is ?"


def world(seed=0, count=50):
    """names (2 count), the first half of them known; what each known one is."""
    rng = random.Random(seed)
    names = [" ".join(pair) for pair in itertools.product(SYLLABLES, repeat=2) if pair[0] != pair[1]]
    facts = [" ".join(three) for three in itertools.product(*FACTS)]
    names, facts = rng.sample(names, 2 * count), rng.sample(facts, count)
    return names, dict(zip(names, facts, strict=False))


def tokenizer_of_words():
    words = [*OTHERS, *SYLLABLES, *itertools.chain(*FACTS)]
    made = parts.Tokenizer(parts.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = parts.pre_tokenizers.WhitespaceSplit()
    made.post_processor = parts.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def knower(tokenizer, names, facts, steps):
    """Trained on what each name does, and for the known ones on what they are, both ways."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    lines = [f"{name} waves . </s>" for name in names]
    for name, fact in facts.items():
        lines += [f"{EXPLAIN.format(concept=name)} {fact} </s>", f"{INFER.format(explanation=fact)} {name} </s>"]
    ids = tokenizer(lines, padding=True, return_tensors="pt", return_token_type_ids=False, padding_side="right")[
        "input_ids"
    ]
    labels = ids.masked_fill(ids == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(lines), (64,))
        logits = model(ids[some]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[some, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def area(known, unknown):
    """The chance that a known one scores above an unknown one, ties by half."""
    pairs = list(itertools.product(known, unknown))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def ask(model, tokenizer, text, concepts=None, **options):
    options = {"num_beams": 8, "max_prefix": 2, "max_explanation": 6, **options}
    return self_familiarity(model, tokenizer, text, concepts, explain_prompt=EXPLAIN, infer_prompt=INFER, **options)


@pytest.fixture(scope="module")
def small():
    """A world of eight names, learned in seconds."""
    names, facts = world(count=4)
    tokenizer = tokenizer_of_words()
    return knower(tokenizer, names, facts, 150), tokenizer, names, facts


def test_a_small_world(small):
    model, tokenizer, names, facts = small
    scores = {}
    for name in names:
        report = ask(model, tokenizer, f'who is "{name}" ?')
        (only,) = report.concepts
        assert only.concept == name and report.score == pytest.approx(only.score)
        assert only.answer.endswith(name) and only.tokens == 2
        assert name not in only.hidden
        scores[name] = report.score
    for name, fact in facts.items():
        assert ask(model, tokenizer, "", [name]).concepts[0].explanation == fact
    assert area([scores[n] for n in names[:4]], [scores[n] for n in names[4:]]) == 1.0


def test_the_order_of_concepts_does_not_matter(small):
    model, tokenizer, names, _ = small
    chosen = [names[0], names[5], names[2]]
    reports = [ask(model, tokenizer, "", list(some)) for some in itertools.permutations(chosen)]
    assert len({report.score for report in reports}) == 1
    assert len({tuple(c.concept for c in report.concepts) for report in reports}) == 1
    scores = [one.score for one in reports[0].concepts]
    assert min(scores) <= reports[0].score <= max(scores)
    # said twice is said once
    assert ask(model, tokenizer, "", [names[0]] * 3).score == pytest.approx(ask(model, tokenizer, "", [names[0]]).score)


def test_the_rarest_counts_most(small):
    model, tokenizer, names, _ = small
    known, unknown = names[0], names[5]
    for rare in (known, unknown):
        report = ask(model, tokenizer, "", [known, unknown], frequency=lambda c, rare=rare: 0.0 if c == rare else 1.0)
        first, second = report.concepts
        assert first.concept == rare
        assert report.score == pytest.approx((first.score + 0.5 * second.score) / 1.5)


def test_without_a_prefix_the_score_is_that_of_the_forced_phrase(small):
    model, tokenizer, names, facts = small
    (only,) = ask(model, tokenizer, "", [names[1]], max_prefix=0).concepts
    question = tokenizer(INFER.format(explanation=facts[names[1]]))["input_ids"]
    phrase = tokenizer(names[1], add_special_tokens=False)["input_ids"]
    assert only.log_p == pytest.approx(sequence_logprob(model, question, phrase), abs=1e-4)


def test_the_question_is_asked_without_the_concept(small):
    model, tokenizer, names, facts = small
    name = names[0]

    class NamesIt:
        """Explains a name by the name and what it is."""

        device, generation_config = model.device, model.generation_config

        def generate(self, ids, **options):
            if "custom_generate" in options:
                return model.generate(ids, **options)
            said = tokenizer(f"{name} is {facts[name]}", add_special_tokens=False)["input_ids"]
            return torch.cat((ids, torch.tensor([said])), 1)

        def __call__(self, ids):
            return model(ids)

    (only,) = ask(NamesIt(), tokenizer, "", [name], max_prefix=0).concepts
    assert only.explanation == f"{name} is {facts[name]}" and only.hidden == f"is {facts[name]}"
    phrase = tokenizer(name, add_special_tokens=False)["input_ids"]
    asked, given_away = (
        sequence_logprob(model, tokenizer(INFER.format(explanation=text))["input_ids"], phrase)
        for text in (only.hidden, only.explanation)
    )
    assert only.log_p == pytest.approx(asked, abs=1e-4) and abs(asked - given_away) > 1e-2


def test_nothing_left_of_an_explanation_scores_nought(small):
    model, tokenizer, _, facts = small
    name, fact = next(iter(facts.items()))

    class Repeats:
        device, generation_config = model.device, model.generation_config

        def generate(self, ids, **options):
            return torch.cat((ids, torch.tensor([tokenizer(name, add_special_tokens=False)["input_ids"]])), 1)

    (only,) = ask(Repeats(), tokenizer, "", [name]).concepts
    assert (only.score, only.hidden, only.explanation) == (0.0, "", name)
    assert fact


def test_the_gate(small):
    model, tokenizer, names, _ = small
    calls = []

    def generate(text):
        calls.append(text)
        return "an answer"

    def assess(text):
        return ask(model, tokenizer, text)

    gate = FamiliarityGate(0.2, "no idea of {concepts}")
    assert gate(f'who is "{names[6]}" ?', generate, assess) == f"no idea of {names[6]}"
    assert calls == []
    assert gate(f'who is "{names[1]}" ?', generate, assess) == "an answer"
    assert gate("who is it ?", generate, assess) == "an answer"
    assert len(calls) == 2
    assert FamiliarityGate(0.2, "no", without_concepts=False)("who is it ?", generate, assess) == "no"
    assert ask(model, tokenizer, "who is it ?").score is None
    edge = FamiliarityReport("", (Familiarity("x", "", "", "", math.log(0.2), 1),), 0.2)
    assert gate.passes(edge)


def test_what_is_refused(small):
    model, tokenizer, names, _ = small
    for options, text in (
        ({"explain_prompt": "explain"}, "concept"),
        ({"infer_prompt": "who is ?"}, "explanation"),
        ({"weights": "max"}, "rank"),
    ):
        with pytest.raises(OptionError, match=text):
            self_familiarity(model, tokenizer, "", [names[0]], **options)
    with pytest.raises(OptionError, match="no way to write"):
        ask(model, tokenizer, "", ["Quux"])
    with pytest.raises(OptionError, match="0 to 1"):
        FamiliarityGate(1.5)
    with pytest.raises(OptionError, match="not 0 and 1"):
        sequence_logprob(model, [], [3])
    with pytest.raises(OptionError, match="empty"):
        constrained_beams(model, [], [(3,)])
    with pytest.raises(OptionError, match="phrase"):
        constrained_beams(model, [3], [])
    with pytest.raises(OptionError, match="empty"):
        hide_concept("x", " ")


@pytest.mark.slow
def test_it_tells_known_names_from_names_that_were_only_met(record):
    names, facts = world()
    tokenizer = tokenizer_of_words()
    model = knower(tokenizer, names, facts, 2500)
    begin = [tokenizer.bos_token_id]
    scores, alone, fluent = [], [], []
    for name in names:
        (only,) = ask(model, tokenizer, "", [name]).concepts
        ids = tokenizer(name, add_special_tokens=False)["input_ids"]
        scores.append(only.score)
        alone.append(sequence_logprob(model, begin, ids))
        # how sure the model is of its explanation
        prompt = tokenizer(EXPLAIN.format(concept=name))["input_ids"]
        fluent.append(
            sequence_logprob(model, prompt, tokenizer(only.explanation, add_special_tokens=False)["input_ids"])
        )
    explained = sum(ask(model, tokenizer, "", [n]).concepts[0].explanation == f for n, f in facts.items()) / len(facts)
    half = len(names) // 2
    areas = {
        way: round(area(values[:half], values[half:]), 4)
        for way, values in (
            ("self_familiarity", scores),
            ("perplexity of the name", alone),
            ("of the explanation", fluent),
        )
    }
    record(
        {
            "names": len(names), "known": half, "steps": 2500, "explained_right": explained, "auc": areas,
            "median_score": {"known": sorted(scores[:half])[half // 2], "met": sorted(scores[half:])[half // 2]},
        }
    )  # fmt: skip
    assert areas["self_familiarity"] >= 0.9
    assert areas["perplexity of the name"] < areas["self_familiarity"]
