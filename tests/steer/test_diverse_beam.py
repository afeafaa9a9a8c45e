"""Diverse beam search against the library's beam search, and what its groups promise each other."""

import pytest
import torch
import transformers as hf

from regard import DiverseBeam, OptionError, SnapKV, Unsupported, diverse_beam_search, steer
from regard.hosts.transformers.specimens import make, prompt

FAMILIES = ("llama", "qwen2", "gemma3", "mixtral", "gpt2", "deepseek", "t5")
WRITTEN = 8


def ready(name="llama", seed=0, ends=(7, 23)):
    model = make(name, seed)
    model.generation_config.eos_token_id = list(ends) or None
    # the library fills with an end where the pad is 0
    model.generation_config.pad_token_id = 59
    return model


def write(model, inputs, beams=6, **options):
    options = {"max_new_tokens": WRITTEN, "do_sample": False, "num_return_sequences": beams, **options}
    return model.generate(**inputs, num_beams=beams, return_dict_in_generate=True, output_scores=True, **options)


def distinct(rows, n):
    """The share of n-grams that are different, over all sequences of a prompt."""
    grams = [h.tokens[i : i + n] for h in rows for i in range(len(h.tokens) - n + 1)]
    return len(set(grams)) / len(grams)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [0, 4])
def test_one_group_is_the_librarys_beam_search(family, padded):
    model, inputs = ready(family), prompt(length=10, padded=padded)
    for options in ({}, {"length_penalty": 0.0}, {"early_stopping": True}, {"length_penalty": 2.0}):
        ours = write(model, inputs, custom_generate=DiverseBeam(1), **options)
        theirs = write(model, inputs, **options)
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_follow_their_beams_in_the_cache(family):
    model, inputs = ready(family), prompt(length=10, padded=3)
    settings = DiverseBeam(3, 1.0)
    cached = write(model, inputs, custom_generate=settings)
    assert torch.equal(cached.sequences, write(model, inputs, custom_generate=settings, use_cache=False).sequences)


def test_the_families_above_end_in_time_and_not():
    # else the test above would not see what becomes of ends
    lengths = set()
    for family in FAMILIES:
        found = write(ready(family), prompt(length=10), custom_generate=DiverseBeam(1)).sequences
        lengths |= {int((row[10:] != 59).sum()) for row in found}
    assert len(lengths) > 3


def test_processors_hold():
    model, inputs = ready(), prompt(length=10)
    for options in ({"repetition_penalty": 3.0}, {"bad_words_ids": [[5], [9]]}, {"min_new_tokens": 4}):
        ours = write(model, inputs, custom_generate=DiverseBeam(1), **options)
        assert torch.equal(ours.sequences, write(model, inputs, **options).sequences)
        assert not torch.equal(ours.sequences, write(model, inputs).sequences)


def test_without_strength_all_groups_write_the_same():
    model, inputs = ready(), prompt(length=10, padded=3)
    alone = diverse_beam_search(model, **inputs, num_beams=2, num_groups=1)
    found = diverse_beam_search(model, **inputs, num_beams=6, num_groups=3, diversity=0.0)
    for row, wanted in zip(found, alone, strict=True):
        for group in range(3):
            assert [h.tokens for h in row if h.group == group] == [h.tokens for h in wanted]


@pytest.mark.parametrize("penalty", ["hamming", "cumulative", "ngram"])
def test_the_first_group_is_not_touched_by_the_others(penalty):
    model, inputs = ready(seed=1), prompt(length=10)
    alone = diverse_beam_search(model, **inputs, num_beams=2, num_groups=1)
    found = diverse_beam_search(model, **inputs, num_beams=6, num_groups=3, diversity=4.0, penalty=penalty)
    for row, wanted in zip(found, alone, strict=True):
        assert [h.tokens for h in row if h.group == 0] == [h.tokens for h in wanted]
        assert {h.group for h in row} == {0, 1, 2}
        assert {h.tokens for h in row if h.group == 1} != {h.tokens for h in wanted}


def test_a_huge_strength_makes_groups_of_one_differ_at_every_step():
    model, inputs = ready(ends=()), prompt(length=10)
    for row in diverse_beam_search(model, **inputs, num_beams=5, num_groups=5, diversity=1e6, max_new_tokens=WRITTEN):
        assert all(len(set(step)) == 5 for step in zip(*(h.tokens for h in row), strict=True))


def test_a_penalty_of_ones_own():
    model, inputs = ready(ends=()), prompt(length=10)
    seen = []

    def nothing_twice(earlier, own, vocab):
        seen.append((earlier.shape, own.shape, vocab))
        banned = torch.zeros(earlier.shape[0], 1, vocab)
        return banned.scatter_(2, earlier.flatten(1).clamp(min=0).unsqueeze(1), 1.0)

    row, _ = diverse_beam_search(
        model, **inputs, num_beams=2, num_groups=2, diversity=1e6, penalty=nothing_twice, max_new_tokens=4
    )
    first, second = sorted(row, key=lambda h: h.group)
    assert not any(token in first.tokens[: i + 1] for i, token in enumerate(second.tokens))
    assert seen[2] == ((2, 1, 3), (2, 1, 2), 60)


def test_scores_are_log_likelihoods_unless_penalties_add_up():
    model, inputs = ready(), prompt(batch=1, length=10)
    for accumulate in (False, True):
        (row,) = diverse_beam_search(
            model, **inputs, num_beams=4, num_groups=2, diversity=0.2, accumulate_penalty=accumulate, max_new_tokens=6
        )
        changed = 0
        for h in row:
            ids = torch.cat((inputs["input_ids"], torch.tensor([h.tokens])), 1)
            with torch.no_grad():
                log_p = model(ids).logits[0, 9:-1].log_softmax(-1)
            exact = float(log_p.gather(1, torch.tensor(h.tokens)[:, None]).sum())
            assert h.log_p == pytest.approx(exact, abs=1e-4)
            changed += abs(h.score - exact / len(h.tokens)) > 1e-3
        assert [h.score for h in row] == sorted((h.score for h in row), reverse=True)
        assert bool(changed) is accumulate


def test_the_best_is_at_least_that_of_beam_search_with_the_beams_of_a_group():
    for seed in range(5):
        model, inputs = ready(seed=seed), prompt(length=10, seed=seed)
        narrow = diverse_beam_search(model, **inputs, num_beams=2, num_groups=1)
        for row, alone in zip(
            diverse_beam_search(model, **inputs, num_beams=6, num_groups=3, diversity=0.5), narrow, strict=True
        ):
            assert row[0].score >= alone[0].score - 1e-5


def mean_distinct(diversity, seeds=20, **options):
    values = []
    for seed in range(seeds):
        rows = diverse_beam_search(
            ready(seed=seed, ends=()), **prompt(length=8, seed=seed), num_beams=6, num_groups=6, diversity=diversity,
            max_new_tokens=6, **options,
        )  # fmt: skip
        values += [(distinct(row, 1), distinct(row, 2)) for row in rows]
    return torch.tensor(values).mean(0).tolist()


def test_more_strength_gives_more_different_ngrams():
    shares = [mean_distinct(diversity) for diversity in (0.0, 0.5, 2.0, 8.0)]
    for n in (0, 1):
        assert [share[n] for share in shares] == sorted(share[n] for share in shares)
    assert shares[-1][1] > 1.5 * shares[0][1]


def test_it_writes_under_an_intervention_whose_cache_gives_up_keys():
    model, inputs = ready(), prompt(length=20, padded=3)
    with steer(model, SnapKV(budget=8, window=3, kernel=3)):
        ours = write(model, inputs, custom_generate=DiverseBeam(1))
        theirs = write(model, inputs)
        other = write(model, inputs, custom_generate=DiverseBeam(3, 2.0))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert not torch.equal(other.sequences, theirs.sequences)


def test_methods_of_transformers_that_it_leans_on():
    # underscored ones may go with any version
    for name in ("_update_model_kwargs_for_generation", "prepare_inputs_for_generation"):
        assert callable(getattr(hf.GenerationMixin, name))


def test_what_is_refused():
    model, inputs = ready(), prompt(length=10)
    for wrong, text in (
        ({"num_groups": 0}, "at least one"),
        ({"num_groups": 2, "diversity": -0.1}, "0 or more"),
        ({"num_groups": 2, "penalty": "haming"}, "hamming"),
    ):
        with pytest.raises(OptionError, match=text):
            DiverseBeam(**wrong)
    with pytest.raises(OptionError, match="4 groups"):
        diverse_beam_search(model, **inputs, num_beams=6, num_groups=4)
    with pytest.raises(OptionError, match="7 sequences"):
        diverse_beam_search(model, **inputs, num_beams=6, num_groups=3, num_return_sequences=7)
    with pytest.raises(OptionError, match="do not sample"):
        write(model, inputs, custom_generate=DiverseBeam(3), do_sample=True)
    with pytest.raises(Unsupported, match="never"):
        write(model, inputs, custom_generate=DiverseBeam(3), early_stopping="never")
    with pytest.raises(Unsupported, match="MaxTimeCriteria"):
        write(model, inputs, custom_generate=DiverseBeam(3), max_time=5.0)
    with pytest.raises(Unsupported, match=r"hidden_states.*recording"):
        write(model, inputs, custom_generate=DiverseBeam(3), output_hidden_states=True)
    # it is no intervention
    with pytest.raises(OptionError, match="no intervention"):
        steer(model, DiverseBeam(3))


@pytest.mark.slow
def test_diverse_beams_on_source_text(record):
    """What tiny-lm writes after lines of source text: spread against likelihood, for every penalty and strength."""
    import regard
    from regard.bench.proving.notes import BEGIN, source

    model, _ = regard.tiny.lm()
    text = torch.from_numpy(source("test"))
    starts = torch.randint(0, len(text) - 64, (24,), generator=torch.Generator().manual_seed(0))
    ids = torch.stack([torch.cat((torch.tensor([BEGIN]), text[s : s + 64])) for s in starts.tolist()])
    figures = {"prompts": len(ids), "beams": 6, "tokens": 20, "rows": []}

    def line(name, groups, **options):
        rows = diverse_beam_search(model, ids, num_beams=6, num_groups=groups, max_new_tokens=20, **options)
        found = {
            "way": name,
            "distinct_2": round(sum(distinct(r, 2) for r in rows) / len(rows), 4),
            "distinct_4": round(sum(distinct(r, 4) for r in rows) / len(rows), 4),
            "best_log_p": round(sum(max(h.log_p for h in r) for r in rows) / len(rows), 3),
            "mean_log_p": round(sum(h.log_p for r in rows for h in r) / (6 * len(rows)), 3),
        }
        figures["rows"].append(found)
        return found

    beam = line("beam search", 1)
    for penalty in ("hamming", "cumulative", "ngram"):
        for diversity in (0.2, 0.5, 0.8, 2.0):
            line(f"{penalty} {diversity}", 6, penalty=penalty, diversity=diversity)
    line("hamming 0.5, three groups", 3, diversity=0.5)
    line("hamming 0.5, three groups, added up", 3, diversity=0.5, accumulate_penalty=True)
    record(figures)
    by_name = {row["way"]: row for row in figures["rows"]}
    assert by_name["hamming 0.5"]["distinct_2"] > 1.3 * beam["distinct_2"]
