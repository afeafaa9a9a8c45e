"""A head that copies is found by where it looks while the model copies; pruning it ends the copying."""

import pytest
import torch

import regard
from regard import (
    Edit,
    HeadScores,
    OptionError,
    RecallCase,
    RegardError,
    Unsupported,
    patch,
    retrieval_scores,
    token_recall,
)
from regard import record as record_of
from regard.bench.recall.needle import needle_cases
from regard.hosts.text import cut
from regard.hosts.transformers.specimens import make
from tests.explain.induction_model import COPYING, PREVIOUS, VOCAB, induction_model

HEADS_OF_TINY = [(layer, head) for layer in range(3) for head in range(4)]


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name)
            # few words, so that random models copy
            made[name].generation_config.suppress_tokens = [0, 1, *range(8, 60)]
        return made[name]

    return get


@pytest.fixture(scope="module")
def tiny():
    return regard.tiny.lm()


def planted(rows=6, length=40, size=5, seed=0):
    """Prompts of different ids that end with the first one of a needle; the rest of it is to be copied."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for _ in range(rows):
        ids = torch.randperm(VOCAB, generator=generator)[: length - 12]
        start = int(torch.randint(2, len(ids) - size, (), generator=generator))
        cases.append(RecallCase(torch.cat((ids, ids[start - 1 : start])), (start, start + size)))
    return cases


def notes_of(cases):
    """Cases of notes as prompts whose needle is the value asked for."""
    ends = cases.needle_spans[:, 0, 1].tolist()
    return [
        RecallCase(ids[valid], (end - 1, end)) for ids, valid, end in zip(cases.ids, cases.valid, ends, strict=True)
    ]


def recall_without(model, cases, heads):
    edits = [Edit("z", layer, heads=(head,), value=0.0) for layer, head in heads]
    with patch(model, edits), torch.no_grad():
        return float(torch.cat([some.right(model(some.ids).logits) for some in cases.split(16)]).float().mean())


def carriers_of(model, cases, retrieval, bar=0.5):
    """Heads that look at no needle and yet break recall, each by itself."""
    others = [head for head in HEADS_OF_TINY if head not in retrieval]
    return [head for head in others if recall_without(model, cases, [head]) < bar]


# ---- a model that copies by construction


def test_the_head_that_copies_by_construction_scores_one_and_no_other():
    scores = retrieval_scores(induction_model(), None, planted(96), tokens=5)
    assert scores.counted.all() and scores.heads == [COPYING]
    assert scores.scores[COPYING] == 1.0
    rest = scores.scores.clone()
    rest[COPYING] = 0
    assert rest.max() <= 0.05
    assert scores.reach.tolist() == [1.0, 1.0] and scores.blind == []


def test_without_that_head_nothing_is_copied_and_without_noise_all_is():
    model, cases = induction_model(), planted()

    def recalled(heads):
        with patch(model, [Edit("z", layer, heads=(head,), value=0.0) for layer, head in heads]):
            found = retrieval_scores(model, None, cases, tokens=5, accept=lambda answer, needle: True)
        needles = [case.prompt[slice(*case.needle)].tolist() for case in cases]
        return sum(token_recall(a, n) for a, n in zip(found.answers, needles, strict=True)) / len(cases)

    assert recalled([]) == 1.0
    assert recalled([COPYING]) == 0.0
    assert recalled([(1, 2)]) == recalled([(0, 3)]) == 1.0
    # it looks at no needle, and carries what the copying head goes by
    assert recalled([PREVIOUS]) == 0.0


def test_a_token_that_is_written_twice_counts_once_unless_steps_are_counted():
    model = induction_model()
    # the needle 3 4 is followed by what starts it again: it is written over and over
    ids = torch.tensor([9, 8, 2, 3, 4, 2, 7, 6, 2])
    case = RecallCase(ids, (3, 5))
    by_set = retrieval_scores(model, None, [case], tokens=8)
    by_steps = retrieval_scores(model, None, [case], tokens=8, count="steps")
    assert by_set.scores[COPYING] == 1.0
    looked = by_steps.scores[COPYING] * 2
    assert looked > 2 and looked == round(float(looked))
    assert by_set.answers == by_steps.answers


def test_an_answer_without_any_needle_token_scores_nothing():
    model = induction_model()
    # what follows the last token is never in the needle
    case = RecallCase(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 5]), (0, 2))
    found = retrieval_scores(model, None, [case], tokens=2, accept=lambda answer, needle: True)
    assert not set(found.answers[0]) & {1, 2}
    assert (found.scores == 0).all()


def test_stop_ids_end_an_answer():
    case = RecallCase(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 2]), (2, 6))
    found = retrieval_scores(induction_model(), None, [case], tokens=6, stop=(5,), accept=lambda a, n: True)
    assert found.answers == ((3, 4, 5),)
    assert found.scores[COPYING] == 0.75


# ---- the same by hand, from one pass over prompt and answer


def by_hand(model, case, answer, count, top=1):
    ids = torch.cat((case.prompt, torch.tensor(answer)))[None]
    tape = record_of(model, ids[:, :-1])
    start, end = case.needle
    first = len(case.prompt) - 1
    found = torch.zeros(tape.meta["layers"], tape.meta["heads"])
    for layer, head in [(la, h) for la in range(found.shape[0]) for h in range(found.shape[1])]:
        hits = []
        for step, token in enumerate(answer):
            keys = tape["weights", layer][0, head, first + step].topk(top).indices.tolist()
            hits += [key for key in keys if start <= key < end and case.prompt[key] == token]
        found[layer, head] = (len(set(hits)) if count == "set" else len(hits)) / (end - start)
    return found


def drawn(lengths=(9, 14, 11, 14), seed=2):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(2, 8, (n,), generator=generator) for n in lengths]
    # of nearly the whole prompt something is always copied
    return [RecallCase(ids, (1, len(ids))) for ids in prompts]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("count", ["set", "steps"])
def test_steps_of_an_answer_are_rows_of_one_pass_over_it(models, name, count):
    model, cases = models(name), drawn()
    found = retrieval_scores(model, None, cases, tokens=12, count=count, accept=lambda answer, needle: True)
    wanted = torch.stack([by_hand(model, c, a, count) for c, a in zip(cases, found.answers, strict=True)])
    torch.testing.assert_close(found.cases, wanted, rtol=0, atol=1e-6)
    assert (wanted > 0).sum() >= 10
    assert found.cases.shape == (4, len(found.reach), model.config.num_attention_heads)
    assert count == "steps" or ((found.cases >= 0) & (found.cases <= 1)).all()


@pytest.mark.parametrize("top", [2, 3])
def test_the_largest_few_weights_may_count_as_looked_at(models, top):
    model, cases = models("llama"), drawn()
    found = retrieval_scores(model, None, cases, tokens=12, top=top, accept=lambda answer, needle: True)
    wanted = torch.stack([by_hand(model, c, a, "set", top) for c, a in zip(cases, found.answers, strict=True)])
    torch.testing.assert_close(found.cases, wanted, rtol=0, atol=1e-6)
    one = retrieval_scores(model, None, cases, tokens=12, accept=lambda answer, needle: True)
    assert (found.cases >= one.cases).all() and (found.cases > one.cases).any()


def test_query_heads_of_one_key_head_have_scores_of_their_own(models):
    found = retrieval_scores(models("llama"), None, drawn(), tokens=12, accept=lambda answer, needle: True)
    assert models("llama").config.num_key_value_heads == 2
    pairs = found.cases.unflatten(2, (2, 2))
    assert (pairs[..., 0] != pairs[..., 1]).any()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_cases_padded_together_are_those_alone(models, name):
    together, alone = (
        retrieval_scores(models(name), None, drawn(), tokens=10, batch=batch, accept=lambda answer, needle: True)
        for batch in (4, 1)
    )
    assert together.answers == alone.answers
    assert torch.equal(together.cases, alone.cases) and torch.equal(together.reach, alone.reach)


def test_layers_whose_window_ends_before_the_needle_are_told(models):
    model = models("gemma3")
    ids = torch.randint(2, 50, (20,), generator=torch.Generator().manual_seed(0))
    found = retrieval_scores(model, None, [RecallCase(ids, (2, 5))], tokens=3, accept=lambda answer, needle: True)
    assert found.blind == [0] and found.reach.tolist() == [0.0, 1.0, 1.0]
    assert (found.scores[0] == 0).all()
    near = retrieval_scores(model, None, [RecallCase(ids, (18, 20))], tokens=3, accept=lambda answer, needle: True)
    assert near.blind == []


def test_reading_leaves_the_model_as_it_was(models):
    model, ids = models("llama"), torch.arange(2, 14)[None]
    before = model(ids).logits
    retrieval_scores(model, None, drawn(), tokens=3, accept=lambda answer, needle: True)
    assert torch.equal(model(ids).logits, before)
    assert not model.model._forward_pre_hooks and model.config._attn_implementation == "sdpa"


# ---- text


def test_the_needle_is_found_by_its_characters(tiny):
    _, tokenizer = tiny
    for case in needle_cases(tokenizer, [400], [0.0, 0.6, 1.0]):
        tokens = cut(tokenizer, case.prompt)
        start, end = tokens.span(*case.needle)
        assert tokenizer.decode(list(tokens.ids[start:end])) == case.answer


def test_prompts_of_text_are_those_of_ids(tiny):
    model, tokenizer = tiny
    cases = regard.tiny.note_cases(4, 128, seed=5)
    of_ids = notes_of(cases)
    texts = []
    for case in of_ids:
        ids = case.prompt[1:].tolist()
        head, needle = (tokenizer.decode(ids[:n]) for n in (case.needle[0] - 1, case.needle[1] - 1))
        texts.append(RecallCase(tokenizer.decode(ids), (len(head), len(needle))))
    assert cut(tokenizer, texts[0].prompt).ids == tuple(of_ids[0].prompt.tolist())
    a, b = (retrieval_scores(model, tokenizer, some, tokens=1) for some in (texts, of_ids))
    assert a.answers == b.answers and torch.equal(a.cases, b.cases)


# ---- a trained model


def test_retrieval_heads_of_tiny_lm_are_needed_and_others_are_not(tiny):
    model, _ = tiny
    cases = regard.tiny.note_cases(24, 256, seed=11)
    found = retrieval_scores(model, None, notes_of(cases), tokens=1)
    assert found.counted.float().mean() > 0.9
    assert found.heads and {layer for layer, _ in found.heads} == {1}
    carriers = carriers_of(model, cases, found.heads)
    assert carriers and not {*carriers} & {*found.top(4)}
    whole = recall_without(model, cases, [])
    assert recall_without(model, cases, found.top(4)) <= cases.chance + 0.1
    drawn_heads = found.others(4, leave_out=carriers, seed=0)
    assert recall_without(model, cases, drawn_heads) > whole - 0.05
    assert recall_without(model, cases, [carriers[0]]) < 0.5


@pytest.mark.slow
def test_retrieval_heads_of_tiny_lm(tiny, record):
    model, _ = tiny
    calibration = regard.tiny.note_cases(64, 512, seed=21)
    found = retrieval_scores(model, None, notes_of(calibration), tokens=1)
    cases = regard.tiny.note_cases(96, 512, seed=22)
    alone = {head: recall_without(model, cases, [head]) for head in HEADS_OF_TINY}
    carriers = [head for head, share in alone.items() if share < 0.5 and head not in found.heads]
    count = len(found.heads)
    best = {k: recall_without(model, cases, found.top(k)) for k in range(count + 1)}
    drawn_heads = [found.others(count, leave_out=carriers, seed=seed) for seed in range(10)]
    others = [recall_without(model, cases, heads) for heads in drawn_heads]
    careless = [recall_without(model, cases, found.others(count, seed=seed)) for seed in range(10)]
    record(
        {
            "task": "8 notes in 512 tokens, one asked for; 64 rows to find the heads, 96 others to prune them",
            "chance": cases.chance,
            "scores": [[round(x, 4) for x in row] for row in found.scores.tolist()],
            "retrieval_heads": found.heads,
            "carriers": carriers,
            "recall_without_each_head": {f"{layer}.{head}": share for (layer, head), share in alone.items()},
            "recall_without_the_best": best,
            "recall_without_as_many_others": others,
            "recall_without_as_many_others_or_carriers": careless,
        }
    )
    assert best[0] > 0.95 and best[count] <= cases.chance + 0.05
    assert min(others) > best[0] - 0.05
    assert carriers and min(careless) < 0.5


# ---- what is done with the scores


def scores_of(values, threshold=0.1):
    values = torch.tensor(values)
    one = torch.ones(1, dtype=torch.bool)
    return HeadScores(values, values[None], one, torch.ones(len(values)), ((),), threshold)


def test_budgets_follow_the_best_query_head_and_sum_to_the_mean():
    scores = scores_of([[0.0, 0.0, 0.3, 0.1], [0.6, 0.0, 0.0, 0.0]])
    budget = scores.to_budget(100, least=10, key_heads=2)
    assert budget.tolist() == [[10, 130], [250, 10]]
    assert scores.to_budget(7).sum() == 7 * 8
    assert scores_of([[0.0, 0.0]]).to_budget(5).tolist() == [[5, 5]]
    with pytest.raises(OptionError, match="4 heads do not share 3"):
        scores.to_budget(10, key_heads=3)
    with pytest.raises(OptionError, match="least is 0 to the mean"):
        scores.to_budget(10, least=11)


def test_others_are_below_the_threshold_and_not_left_out():
    scores = scores_of([[0.5, 0.05, 0.0], [0.2, 0.0, 0.0]])
    assert scores.heads == [(0, 0), (1, 0)] and scores.top(1) == [(0, 0)]
    draws = [scores.others(3, leave_out=[(0, 1)], seed=seed) for seed in range(8)]
    assert all({*draw} == {(0, 2), (1, 1), (1, 2)} for draw in draws) and len({tuple(d) for d in draws}) > 1
    with pytest.raises(OptionError, match="5 heads are asked for, and 4 are left"):
        scores.others(5)


def test_the_figure_shows_layers_and_heads():
    figure = scores_of([[0.5, 0.05], [0.2, 0.0]]).figure()
    assert figure.data[0].z.shape == (2, 2)
    assert "2 heads of 0.1 or more, 1 of 1 cases" in figure.layout.title.text


# ---- what is refused


@pytest.mark.parametrize(
    "case, options, message",
    [
        (RecallCase(torch.arange(2, 9), (3, 12)), {}, r"the needle is 3 to 12 of ids of shape \(7,\)"),
        (RecallCase(torch.arange(2, 9), (3, 3)), {}, "must lie in"),
        (RecallCase("a text", (0, 1)), {}, "needs the model's tokenizer"),
        (RecallCase(torch.arange(2, 9), (0, 2)), {"count": "tokens"}, 'count is "set" or "steps"'),
        (RecallCase(torch.arange(2, 9), (0, 2)), {"tokens": 0}, "at least 1"),
    ],
)
def test_bad_cases_are_refused(models, case, options, message):
    with pytest.raises(OptionError, match=message):
        retrieval_scores(models("llama"), None, [case], **options)


def test_a_needle_that_was_cut_off_is_refused(tiny):
    model, tokenizer = tiny
    text = "some text\n\n   "
    with pytest.raises(OptionError, match="no token covers characters"):
        retrieval_scores(model, tokenizer, [RecallCase(text, (11, 13))])
    with pytest.raises(OptionError, match="characters 5 to 90"):
        retrieval_scores(model, tokenizer, [RecallCase(text, (5, 90))])


def test_sampling_and_other_stacks_are_refused(models):
    model, case = models("llama"), RecallCase(torch.arange(2, 9), (0, 2))
    model.generation_config.do_sample = True
    try:
        with pytest.raises(OptionError, match="set do_sample=False"):
            retrieval_scores(model, None, [case])
    finally:
        model.generation_config.do_sample = False
    with pytest.raises(Unsupported, match="T5ForConditionalGeneration does not read its prompt and answer in one"):
        retrieval_scores(models("t5"), None, [case])
    with pytest.raises(OptionError, match="there is no case"):
        retrieval_scores(model, None, [])


def test_cases_that_are_never_recalled_are_an_error():
    case = RecallCase(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 5]), (0, 2))
    with pytest.raises(RegardError, match="none of the 1 answers recalls its needle"):
        retrieval_scores(induction_model(), None, [case], tokens=2)


def test_recall_counts_tokens_as_often_as_they_stand():
    assert token_recall([5, 6, 7], [6, 7, 8])
    assert not token_recall([6, 6, 6], [6, 7, 6, 8])
    assert not token_recall([6, 1], [6, 7])
