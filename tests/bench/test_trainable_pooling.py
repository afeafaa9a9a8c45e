"""Set-ups of pools and attention compared on one base: ranks and p-values against loops; and on real weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from regard import OptionError, TextEmbedder, TextPairs, Unsupported, pooling_matrix
from regard.bench.text.trainable_pooling import SET_UPS, paired_p
from regard.hosts.transformers.specimens import make
from tests.docstrings import docstring_pairs
from tests.minilm import minilm
from tests.models.test_nv_embed import word_tokenizer

FEW = {"steps": 2, "batch_size": 6, "num_latents": 4}


def words(name="words", shift=0, count=12):
    """A word asks for the next but ten."""
    pairs = [(f"w{i} w{shift}", f"w{(i + 10) % 50} w{shift + 1}") for i in range(count)]
    return TextPairs(name, pairs[: count // 2], pairs[count // 2 :], instruction="w49")


def test_a_decoder_has_all_set_ups_and_an_encoder_those_without_a_causal_mask():
    tokenizer = word_tokenizer()
    tasks = [words(), words("others", 3)]
    decoder, encoder = make("llama"), make("bert")
    before = [x.clone() for x in decoder.parameters()]
    matrix = pooling_matrix(decoder, tokenizer, tasks, **FEW)
    assert list(matrix.scores) == [(name, task.name) for task in tasks for name in SET_UPS]
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, decoder.parameters(), strict=True))
    found = pooling_matrix(encoder, tokenizer, tasks[:1], **FEW)
    assert [name for name, _ in found.scores] == ["mean", "last_layer_bidirectional", "all_layers_bidirectional"]
    with pytest.raises(Unsupported, match="BertModel is not causal, so 'last_causal'"):
        pooling_matrix(encoder, tokenizer, tasks, set_ups=["last_causal"])


def test_the_same_seed_gives_the_same_scores():
    given = {"tasks": [words()], "set_ups": ["all_layers_bidirectional"], "train_model": True, **FEW}
    first, second, third = (pooling_matrix(make("llama"), word_tokenizer(), **given, seed=seed) for seed in (0, 0, 1))
    key = ("all_layers_bidirectional", "words")
    assert torch.equal(first.scores[key], second.scores[key])
    assert not torch.equal(first.scores[key], third.scores[key])


@pytest.mark.parametrize("set_up, pool, bidirectional", [("mean", "mean", True), ("last_causal", "last", False)])
def test_ranks_equal_a_loop(set_up, pool, bidirectional):
    model, tokenizer, task = make("llama"), word_tokenizer(), words(count=30)
    embedder = TextEmbedder(model, tokenizer, pool, bidirectional)
    queries = embedder.encode([q for q, _ in task.test], task.instruction)
    answers = embedder.encode([a for _, a in task.test])
    wanted = []
    for i, query in enumerate(queries):
        scores = [float(query @ answer) for answer in answers]
        wanted.append(1 / (1 + sum(score > scores[i] for score in scores)))
    matrix = pooling_matrix(model, tokenizer, [task], set_ups=[set_up])
    torch.testing.assert_close(matrix.scores[set_up, "words"], torch.tensor(wanted))
    assert matrix.mean(set_up, "words") == pytest.approx(sum(wanted) / len(wanted))
    assert matrix.recall(set_up, "words") == pytest.approx(wanted.count(1.0) / len(wanted))
    (row,) = matrix.rows()
    assert row["p_against_best"] == 1.0 and row["mrr"] == matrix.mean(set_up, "words")


def test_answers_that_are_all_alike_score_as_guessing():
    pairs = [(f"w{i}", "w9") for i in range(5)]
    task = TextPairs("alike", [("w20", "w21"), ("w22", "w23")], pairs)
    matrix = pooling_matrix(make("llama"), word_tokenizer(), [task], set_ups=["mean"])
    assert matrix.scores["mean", "alike"].tolist() == pytest.approx([1 / 3] * 5)


def test_p_values_are_those_of_all_flips():
    generator = torch.Generator().manual_seed(2)
    for shift in (0.0, 0.4, 1.5):
        one, other = torch.randn(9, generator=generator) + shift, torch.randn(9, generator=generator)
        gap = (one - other).double()
        sums = [
            sum(s * float(g) for s, g in zip(signs, gap, strict=True)) for signs in itertools.product((1, -1), repeat=9)
        ]
        exact = sum(abs(x) >= abs(float(gap.sum())) - 1e-9 for x in sums) / len(sums)
        found = paired_p(one, other)
        assert found == pytest.approx(exact, abs=0.02)
        assert found == paired_p(other, one)
    assert paired_p(one, one) == 1.0
    assert paired_p(torch.ones(30), torch.zeros(30)) < 1e-3
    with pytest.raises(OptionError, match="equal lengths"):
        paired_p(torch.ones(3), torch.ones(4))


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda: TextPairs("one", [("a", "b")], [("c", "d"), ("e", "f")]), "two pairs are the least"),
        (lambda: TextPairs("both", [("a", "b"), ("c", "d")], [("a", "b"), ("e", "f")]), "trained on and tested"),
        (lambda: pooling_matrix(make("llama"), word_tokenizer(), []), "at least one"),
        (lambda: pooling_matrix(make("llama"), word_tokenizer(), [words(), words()]), "names of their own"),
        (lambda: pooling_matrix(make("llama"), word_tokenizer(), [words()], set_ups=["middle"]), "no set-up 'middle'"),
        (
            lambda: pooling_matrix(make("llama"), word_tokenizer(), [words()], set_ups=["mean"]).mean("last", "words"),
            "was not measured",
        ),
    ],
)
def test_what_cannot_be_is_refused(do, message):
    with pytest.raises(OptionError, match=message):
        do()


@pytest.mark.slow
def test_pools_on_real_weights(record):
    model, tokenizer = minilm()
    pairs = docstring_pairs()
    task = TextPairs("docstrings", pairs[200:], pairs[:200])
    matrix = pooling_matrix(model, tokenizer, [task], steps=40, batch_size=24, num_latents=16, heads=6)
    record({"pairs": len(pairs), "tested": 200, "steps": 40, "rows": matrix.rows()})
    # six layers were trained to be averaged at the end: a good start that pools of their own have to learn
    assert matrix.mean("mean", "docstrings") > 0.5
    for name in ("last_layer_bidirectional", "all_layers_bidirectional"):
        assert matrix.mean(name, "docstrings") > 0.15
