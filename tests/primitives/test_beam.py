"""Beam steps against a search written with lists, and against all sequences there are."""

import itertools
import math

import pytest
import torch

from regard import OptionError, ShapeError
from regard.primitives.beam import (
    Phrases,
    beam_step,
    bigrams,
    cumulative,
    finish_beams,
    hamming,
    start_beams,
)

VOCAB, STEPS = 5, 4


class Markov:
    """The next token depends on the two before it. table: (B, V + 1, V + 1, V) log-probabilities, V for no token."""

    def __init__(self, batch=2, seed=0, vocab=VOCAB, sharp=1.5, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(batch, vocab + 1, vocab + 1, vocab, generator=generator, dtype=dtype) * sharp
        self.table, self.vocab = table.log_softmax(-1), vocab

    def row(self, row, tokens):
        a, b = ([self.vocab, self.vocab, *tokens])[-2:]
        return self.table[row, a, b].tolist()

    def log_p(self, row, tokens):
        return sum(self.row(row, tokens[:i])[token] for i, token in enumerate(tokens))

    def __call__(self, tokens):
        nothing = torch.full((*tokens.shape[:2], 2), self.vocab)
        ids = torch.cat((nothing, tokens), -1)[..., -2:]
        rows = torch.arange(tokens.shape[0]).unsqueeze(1)
        return self.table[rows, ids[..., 0], ids[..., 1]]


def search(model, width, groups=1, steps=STEPS, batch=2, length_penalty=1.0, **options):
    beams = start_beams(batch, width, groups, dtype=torch.float64)
    trace = []
    for _ in range(steps):
        beams = beam_step(
            model(beams.tokens), beams, width=width, groups=groups, length_penalty=length_penalty, **options
        )
        trace.append(beams)
        if beams.closed.all():
            break
    return finish_beams(beams, length_penalty=length_penalty), trace


def overlap(kind, earlier, own, token):
    """What a continuation of `own` by `token` loses for earlier hypotheses, by definition."""
    full = [*own, token]
    if kind == "hamming":
        return sum(other[-1] == token for other in earlier)
    if kind == "cumulative":
        return sum(math.exp(-sum(a != b for a, b in zip(other, full, strict=True))) for other in earlier)
    pairs = [pair for other in earlier for pair in itertools.pairwise(other)]
    return pairs.count(tuple(full[-2:])) if own else 0


def oracle(model, row, width, groups, kind, strength, ends=(), accumulate=False, steps=STEPS, length_penalty=1.0):
    """Diverse beam search of a row, one list at a time: [(tokens, log p, group)], best first."""
    each = width // groups
    live = [[((), 0.0, 0.0)] for _ in range(groups)]
    done = [[] for _ in range(groups)]
    closed = [False] * groups
    for t in range(1, steps + 1):
        held = []
        for g in range(groups):
            options = []
            for tokens, log_p, score in live[g]:
                for token, step in enumerate(model.row(row, tokens)):
                    lost = 0 if token in ends else strength * overlap(kind, held, tokens, token)
                    options.append((score + step - lost, (*tokens, token), log_p + step))
            options.sort(key=lambda one: -one[0])
            if not closed[g]:
                for score, tokens, log_p in options[:each]:
                    if tokens[-1] in ends:
                        done[g].append((tokens, log_p, (score if accumulate else log_p) / t**length_penalty))
                done[g] = sorted(done[g], key=lambda one: -one[2])[:each]
            going = [one for one in options if one[1][-1] not in ends][:each]
            live[g] = [(tokens, log_p, score if accumulate else log_p) for score, tokens, log_p in going]
            best = max(score for _, _, score in live[g]) / t**length_penalty
            was, closed[g] = closed[g], closed[g] or (len(done[g]) == each and best <= done[g][-1][2])
            if not (was or closed[g]):
                held += [tokens for tokens, _, _ in live[g]]
    found = []
    for g in range(groups):
        if not closed[g]:
            done[g] += [(tokens, log_p, score / steps**length_penalty) for tokens, log_p, score in live[g]]
        found += [(*one, g) for one in sorted(done[g], key=lambda one: -one[2])[:each]]
    return sorted(found, key=lambda one: -one[2])


PENALTIES = {"hamming": hamming, "cumulative": cumulative, "bigrams": bigrams}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("width, groups", [(1, 1), (4, 1), (4, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("ends", [(), (3,), (0, 4)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_it_is_the_search_by_definition(kind, width, groups, ends, accumulate):
    for seed in range(6):
        model = Markov(seed=seed)
        for strength, length_penalty in ((0.0, 1.0), (0.7, 0.6), (50.0, 1.0)):
            found, _ = search(
                model, width, groups, penalty=lambda *a, s=strength: s * PENALTIES[kind](*a), ends=ends,
                accumulate=accumulate, length_penalty=length_penalty,
            )  # fmt: skip
            for row, ours in enumerate(found.hypotheses()):
                wanted = oracle(model, row, width, groups, kind, strength, ends, accumulate, STEPS, length_penalty)
                assert [(h.tokens, h.group) for h in ours] == [(tokens, g) for tokens, _, _, g in wanted]
                for h, (tokens, log_p, score, _) in zip(ours, wanted, strict=True):
                    assert h.log_p == pytest.approx(log_p, abs=1e-9)
                    assert h.log_p == pytest.approx(model.log_p(row, tokens), abs=1e-9)
                    # penalties are single precision
                    assert h.score == pytest.approx(score, abs=1e-5 if accumulate else 1e-9)


@pytest.mark.parametrize("ends", [(), (2,)])
def test_a_beam_wide_enough_finds_the_best_of_all_sequences(ends):
    model = Markov(seed=3)
    found, _ = search(model, VOCAB**STEPS, ends=ends)
    every = [
        tokens
        for n in range(1, STEPS + 1)
        for tokens in itertools.product(range(VOCAB), repeat=n)
        if not set(tokens[:-1]) & set(ends) and (n == STEPS or tokens[-1] in ends)
    ]
    for row, ours in enumerate(found.hypotheses()):
        wanted = sorted(every, key=lambda tokens: -model.log_p(row, tokens) / len(tokens))
        assert [h.tokens for h in ours][:20] == wanted[:20]
        assert len(ours) == len(every)


def test_without_strength_all_groups_are_the_beam_search_of_one():
    model = Markov(seed=4)
    alone, _ = search(model, 2, ends=(1,))
    found, _ = search(model, 6, 3, penalty=lambda *a: 0.0 * hamming(*a), ends=(1,))
    for ours, wanted in zip(found.hypotheses(), alone.hypotheses(), strict=True):
        for group in range(3):
            assert [h.tokens for h in ours if h.group == group] == [h.tokens for h in wanted]


def test_groups_of_one_with_a_huge_strength_all_choose_differently():
    for seed in range(5):
        _, trace = search(Markov(seed=seed), 4, 4, penalty=lambda *a: 1e6 * hamming(*a), steps=6)
        for beams in trace:
            for row in beams.tokens[..., -1].tolist():
                assert len(set(row)) == 4


def test_the_first_group_is_not_touched_by_later_ones():
    model = Markov(seed=5)
    alone, _ = search(model, 2)
    for groups in (2, 3):
        found, _ = search(model, 2 * groups, groups, penalty=lambda *a: 3.0 * hamming(*a))
        for ours, wanted in zip(found.hypotheses(), alone.hypotheses(), strict=True):
            assert [h for h in ours if h.group == 0] == wanted


def test_an_end_loses_nothing():
    # ending is what everybody wants, at once
    model = Markov()
    model.table = torch.tensor([0.1, 0.1, 0.6, 0.1, 0.1], dtype=torch.float64).log().expand_as(model.table)
    found, _ = search(model, 3, 3, penalty=lambda *a: 1e6 * hamming(*a), ends=(2,))
    assert all(h.tokens == (2,) for row in found.hypotheses() for h in row)


def test_a_group_that_is_done_stands_in_nobodys_way():
    beams = start_beams(1, 2, 2, dtype=torch.float64)
    log_p = torch.tensor([0.02, 0.9, 0.08], dtype=torch.float64).log().expand(1, 2, 3)
    options = {"width": 2, "groups": 2, "penalty": lambda *a: 1e3 * hamming(*a), "ends": (0,)}
    first = beam_step(log_p, beams, **options)
    assert first.tokens[0, :, -1].tolist() == [1, 2]
    ending = torch.tensor([[0.9, 0.06, 0.04], [0.05, 0.9, 0.05]], dtype=torch.float64).log()[None]
    second = beam_step(ending, first, **options)
    assert second.closed.tolist() == [[True, False]]
    third = beam_step(log_p, second, **options)
    # it would be 2 if the first group still held 1
    assert third.tokens[0, 1, -1] == 1


def test_early_closes_with_the_first_that_ended():
    model = Markov(seed=2)
    patient, _ = search(model, 1, ends=(3,), length_penalty=0.0, steps=8)
    hasty, trace = search(model, 1, ends=(3,), early=True, length_penalty=0.0, steps=8)
    assert all(row for row in hasty.hypotheses())
    assert len(trace) <= 8
    for a, b in zip(hasty.hypotheses(), patient.hypotheses(), strict=True):
        assert a[0].log_p <= b[0].log_p + 1e-12


def test_parents_say_where_each_beam_goes_on():
    model = Markov(seed=6)
    _, trace = search(model, 6, 2, penalty=lambda *a: 0.5 * hamming(*a))
    for before, after in itertools.pairwise(trace):
        flat = before.tokens.flatten(0, 1)[after.flat_parents()].unflatten(0, (2, 6))
        assert torch.equal(flat, after.tokens[..., :-1])
        # beams stay in their group
        assert torch.equal(after.parents // 3, torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, -1))


def test_a_state_stays_as_it_was_and_rows_can_be_taken():
    model = Markov(seed=7)
    start = start_beams(2, 4, dtype=torch.float64)
    first = beam_step(model(start.tokens), start, width=4)
    kept = first.tokens.clone()
    second = beam_step(model(first.tokens), first, width=4)
    assert torch.equal(first.tokens, kept)
    again = first.select(torch.tensor([1]))
    model.table = model.table[1:]
    assert torch.equal(beam_step(model(again.tokens), again, width=4).tokens, second.tokens[1:])


def test_low_precision_is_added_up_in_single():
    beams = start_beams(1, 2)
    made = beam_step(torch.full((1, 2, 3), -0.1, dtype=torch.bfloat16), beams, width=2)
    assert made.log_p.dtype == torch.float32


def containing(model, row, phrases, before):
    """Every sequence that ends with a phrase begun in time, and not earlier: tokens -> log p."""
    found = {}
    for n in range(1, before + max(map(len, phrases)) + 1):
        for tokens in itertools.product(range(model.vocab), repeat=n):
            ends = [
                m
                for m in range(1, n + 1)
                if any(tokens[m - len(p) : m] == p and 0 <= m - len(p) <= before for p in phrases)
            ]
            if ends and ends[0] == n:
                found[tokens] = model.log_p(row, tokens)
    return found


@pytest.mark.parametrize(
    "phrases", [((1, 2),), ((0, 0, 1),), ((1, 2, 3), (2,)), ((1, 2, 3), (2, 4)), ((3, 3), (1, 3, 3, 0))]
)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_must_come_comes_and_a_wide_beam_finds_the_best(phrases, before):
    model, must = Markov(seed=8), Phrases(phrases, before)
    for width in (1, 3, 400):
        found, _ = search(model, width, steps=must.longest, constraint=must)
        for row, ours in enumerate(found.hypotheses()):
            every = containing(model, row, phrases, before)
            assert ours
            for h in ours:
                assert h.log_p == pytest.approx(every[h.tokens], abs=1e-9)
                assert must.ending(h.tokens) > 0
            if width == 400:
                assert {h.tokens for h in ours} == set(every)


def test_with_nothing_before_it_a_phrase_scores_the_product_of_its_tokens():
    model = Markov(seed=9)
    found, _ = search(model, 4, steps=3, constraint=Phrases(((4, 0, 2),)))
    for row, (only,) in enumerate(found.hypotheses()):
        assert only.tokens == (4, 0, 2)
        assert only.log_p == pytest.approx(model.log_p(row, (4, 0, 2)), abs=1e-9)


def test_a_phrase_under_way_is_not_crowded_out():
    # its tokens are the least likely ones, so that plain beams never hold it
    model = Markov()
    model.table = torch.tensor([0.4, 0.3, 0.28, 0.01, 0.01], dtype=torch.float64).log().expand_as(model.table)
    found, _ = search(model, 4, steps=6, constraint=Phrases(((3, 4, 3),), 3))
    for row in found.hypotheses():
        assert row[0].tokens[-3:] == (3, 4, 3)
        assert max(len(h.tokens) for h in row) > 3


def test_an_end_before_the_phrase_does_not_count():
    model = Markov()
    model.table = torch.tensor([0.9, 0.04, 0.03, 0.02, 0.01], dtype=torch.float64).log().expand_as(model.table)
    found, _ = search(model, 3, steps=4, constraint=Phrases(((1, 2),), 2), ends=(0,))
    assert all(0 not in h.tokens for row in found.hypotheses() for h in row)


def test_what_is_refused():
    beams = start_beams(2, 4)
    with pytest.raises(OptionError, match=r"4 beams.*3 groups"):
        start_beams(2, 4, 3)
    with pytest.raises(ShapeError, match=r"4 beams in 1 groups, not 4 in 2"):
        beam_step(torch.zeros(2, 4, 5), beams, width=4, groups=2)
    with pytest.raises(ShapeError, match=r"\(2, 4, V\)"):
        beam_step(torch.zeros(2, 3, 5), beams, width=4)
    with pytest.raises(OptionError, match="phrase"):
        Phrases(((),))
    with pytest.raises(OptionError, match="before"):
        Phrases(((1,),), -1)
