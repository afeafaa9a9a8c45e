"""A needle stands where it is said to stand, and is found by those who read and by no one else."""

import time

import pytest
import tokenizers as parts
import torch
import transformers as hf

import regard
from regard.bench.recall.needle import (
    Needle,
    NeedleCase,
    NeedleText,
    VariableTracking,
    greedy_answers,
    magic_numbers,
    needle_cases,
    needle_grid,
)
from regard.bench.task import IGNORED, fingerprint
from regard.checks import tasks
from regard.checks.battery import Subject
from regard.contract.catalogue import catalogue
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.text import cut
from tests.explain.induction_model import VOCAB, induction_model

TEXT = "".join(f"Sentence number {i} says nothing of interest. " for i in range(400))


@pytest.fixture(scope="module")
def tokenizer():
    return regard.tiny.lm()[1]


# ---- tokens


def test_rows_hold_what_they_say():
    task = Needle(128, 96, keys=4, values=2, queries=3)
    rows = task.build("train", 200)
    third = 42
    for x, y in zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True):
        asks = [i for i, token in enumerate(x) if token == 1]
        assert asks == [84, 88, 92] and x[:84].count(0) == 4
        known = {x[i + 1]: x[i + 2 : i + 4] for i in range(84) if x[i] == 0}
        assert len(known) == 4 and len({v for pair in known.values() for v in pair}) == 8
        assert all(2 <= key < 2 + third for key in known)
        assert all(2 + third <= v < 2 + 2 * third for pair in known.values() for v in pair)
        asked = [x[i + 1] for i in asks]
        assert len(set(asked)) == 3
        for i in asks:
            assert [y[i + 1], y[i + 2]] == known[x[i + 1]] == x[i + 2 : i + 4]
        assert sum(label != IGNORED for label in y) == 6
        taken = sum(token == 0 for token in x[:84])
        assert sum(token >= 2 + 2 * third for token in x) == 84 - 4 * taken


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_asked_for_first_stands_at_its_depth(depth):
    task = Needle(128, 100, keys=4, queries=2, depth=depth)
    for case in task.cases("test", 50):
        start, end = case.needle
        ids = case.prompt.tolist()
        assert ids[-2] == 1 and ids[start - 1] == ids[-1] and ids[start - 2] == 0
        assert tuple(ids[start:end]) == case.answer
        # the last start that there is room for is six before the end of the haystack
        assert abs((start - 2) / (len(ids) - 2 - 3) - depth) < 0.11
        if depth in (0, 1):
            assert start - 2 == (0 if depth == 0 else len(ids) - 2 - 3)


def test_chains_end_in_the_value_they_began_with():
    task = VariableTracking(128, 96, chains=3, hops=2)
    rows = task.build("train", 200)
    for x, y in zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True):
        known = {x[i + 1]: x[i + 2] for i in range(len(x)) if x[i] == 0}
        assert len(known) == 9
        assigned = {}
        # a variable has its value before another takes it
        for i in [i for i in range(len(x)) if x[i] == 0]:
            assigned[x[i + 1]] = assigned.get(x[i + 2], x[i + 2])
        asked = [i + 1 for i in range(len(x)) if x[i] == 1]
        assert [i for i, label in enumerate(y) if label != IGNORED] == asked
        for i in asked:
            assert y[i] == assigned[x[i]] == known[known[known[x[i]]]]
        assert len({y[i] for i in asked}) == 3


# the fingerprint is fixed below
CHECKS = [c for c in vars(tasks).values() if getattr(c, "kind", "") == "task" and c.name != "fingerprint_is_stable"]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_chains_pass_the_battery_of_tasks(check):
    entry = catalogue()["needle"]
    options = {"vocab_size": 128, "seq_len": 64, "chains": 4, "hops": 1}
    card = type(entry.card)(
        slug="needle", title="chains", exports=("VariableTracking",), baseline=True, options=options, version="1",
        metric="accuracy", chance="1 / chains",
    )  # fmt: skip
    assert check.when(card)
    check.run(Subject("bench/chains", card, entry, {"VariableTracking": VariableTracking}))


def test_fingerprints_are_those_of_version_1():
    assert fingerprint(Needle(128, 64, keys=4)).startswith("9711a2d227a3")
    assert fingerprint(VariableTracking(128, 64, chains=4, hops=1)).startswith("523787039e69")


def test_guessing_among_the_values_of_a_row_is_chance():
    generator = torch.Generator().manual_seed(0)
    for task in (Needle(256, 64, keys=8), VariableTracking(256, 64, chains=4, hops=1)):
        rows = task.build("test", 4000)
        third = (256 - 2) // 3
        hits = asked = 0
        for x, y in zip(rows.inputs, rows.targets, strict=True):
            where = y != IGNORED
            # before the questions, values stand in needles alone
            body = x[: int(where.nonzero()[0])]
            values = body[(body >= 2 + third) & (body < 2 + 2 * third)]
            hits += int(y[where][0] == values[torch.randint(len(values), (), generator=generator)])
            asked += 1
        # three standard deviations of 4000 guesses
        assert hits / asked == pytest.approx(task.chance, abs=3 * (task.chance / 4000) ** 0.5)


def test_ten_thousand_rows_take_seconds():
    start = time.process_time()
    Needle(256, 256).build("train", 10_000)
    VariableTracking(256, 256).build("train", 10_000)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Needle(keys=1), "a lone needle is found without reading its key"),
        (lambda: Needle(keys=4, queries=5), "1 to the keys"),
        (lambda: Needle(vocab_size=20, keys=8), "need a vocabulary of 26"),
        (lambda: Needle(seq_len=20), "do not fit into 20 tokens"),
        (lambda: Needle(depth=1.5), "depth is 0 to 1"),
        (lambda: VariableTracking(chains=1), "at least 2 and 0"),
        (lambda: VariableTracking(vocab_size=20), "need a vocabulary of 38"),
        (lambda: VariableTracking(seq_len=30), "do not fit into 30 tokens"),
    ],
)
def test_rows_that_cannot_be_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


# ---- text


def test_prompts_have_the_length_the_depth_and_the_needle(tokenizer):
    lengths, depths = (400, 900), (0.0, 0.3, 1.0)
    needles = magic_numbers(2)
    cases = needle_cases(tokenizer, lengths, depths, needles=needles, haystack=TEXT)
    assert [(c.length, c.depth) for c in cases] == [(n, d) for n in lengths for d in depths for _ in needles]
    for case, needle in zip(cases, needles * 6, strict=True):
        count = len(cut(tokenizer, case.prompt).ids)
        assert case.length - 4 <= count <= case.length
        start, end = case.needle
        assert case.prompt[start:end] == case.answer == needle.answer
        at = case.prompt.index(needle.sentence)
        assert case.prompt.count(needle.answer) == 1
        # a sentence ends before it, and it is not far above its depth
        assert at == 0 or case.prompt[:at].rstrip()[-1] == "." or case.depth == 1
        straw = case.prompt.index("\n\nQuestion") - len(needle.sentence)
        assert case.depth * straw - 60 <= at <= case.depth * straw + 5
        assert case.prompt.endswith(f"Question: {needle.question}\nAnswer:")


def test_tokenizers_of_larger_pieces_come_to_the_same_lengths():
    made = parts.Tokenizer(parts.models.BPE())
    made.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = parts.decoders.ByteLevel()
    letters = parts.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT], parts.trainers.BpeTrainer(vocab_size=320, initial_alphabet=letters))
    pieces = hf.PreTrainedTokenizerFast(tokenizer_object=made)
    for case in needle_cases(pieces, range(130, 200, 3), (0.3, 1.0), haystack=TEXT):
        tokens = cut(pieces, case.prompt)
        assert case.length - 4 <= len(tokens.ids) <= case.length
        start, end = tokens.span(*case.needle)
        assert pieces.decode(list(tokens.ids[start:end])).strip() == case.answer


def test_a_short_haystack_goes_on_from_its_start(tokenizer):
    (case,) = needle_cases(tokenizer, [600], [1.0], needles=magic_numbers(1), haystack="One. Two. Three. ")
    assert len(cut(tokenizer, case.prompt).ids) >= 596 and case.prompt.count("Two.") > 20


def test_the_default_haystack_is_text_of_this_python(tokenizer):
    (case,) = needle_cases(tokenizer, [300], [0.5], needles=magic_numbers(1))
    assert case.prompt.startswith('The "assert" statement')


def test_other_needles_and_questions(tokenizer):
    needle = NeedleText("The cat sleeps on the red sofa.", "Where does the cat sleep?", "on the red sofa")
    (case,) = needle_cases(tokenizer, [200], [0.0], needles=[needle], haystack=TEXT, ask=" Q: {question} A:")
    assert case.prompt.startswith("The cat sleeps on the red sofa. ") and case.needle == (15, 30)
    assert case.prompt.endswith(" Q: Where does the cat sleep? A:")
    with pytest.raises(OptionError, match="must stand once"):
        NeedleText("The cat sleeps.", "Where?", "on the sofa")


def test_numbers_are_drawn_from_the_seed():
    a, b, c = magic_numbers(5), magic_numbers(5), magic_numbers(5, seed=1)
    assert a == b != c and len({n.answer for n in a}) == 5 and all(len(n.answer) == 7 for n in a)
    with pytest.raises(OptionError, match="count is 1 to 20"):
        magic_numbers(21)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": [20]}, "no room for the needle and its question"),
        ({"lengths": []}, "at least one length"),
        ({"depths": [1.2]}, "depths of 0 to 1"),
        ({"needles": []}, "at least one length, one needle"),
        ({"haystack": " \n"}, "the haystack is empty"),
    ],
)
def test_prompts_that_cannot_be_are_refused(tokenizer, options, message):
    with pytest.raises(OptionError, match=message):
        needle_cases(tokenizer, **{"lengths": [300], "haystack": TEXT, **options})


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(Unsupported, match="Slow tells no offsets"):
        needle_cases(Slow(), [300], haystack=TEXT)


# ---- asking


def test_who_reads_finds_every_needle_and_who_sees_the_end_only_the_late_ones(tokenizer):
    cases = needle_cases(tokenizer, (300, 600), (0.0, 0.5, 1.0), haystack=TEXT)

    def reader(case, seen=None):
        text = case.prompt if seen is None else case.prompt[-seen:]
        city = text.rpartition("number for ")[2].split("?")[0]
        return text.partition(f"number for {city} is ")[2][:7]

    whole = needle_grid(reader, cases)
    assert whole.lengths == (300, 600) and whole.depths == (0.0, 0.5, 1.0)
    assert (whole.recall == 1).all() and whole.effective_length() == 600
    late = needle_grid(lambda case: reader(case, seen=285), cases)
    assert late.recall[1].tolist() == [0.0, 0.0, 1.0] and late.recall[0, 0] == 1
    assert late.effective_length() == 300
    nobody = needle_grid(lambda case: "0000000", cases)
    assert (nobody.recall == 0).all() and nobody.effective_length() == 0
    figure = whole.figure()
    assert figure.data[0].z.shape == (3, 2) and list(figure.data[0].x) == ["300", "600"]


def test_a_model_is_asked_greedily_for_ids():
    model = induction_model()
    ids = torch.tensor([5, 6, 7, 8, 9, 10, 1, 2, 3, 11, 12, 1])
    right = NeedleCase(ids, (7, 9), (2, 3), 12, 0.5)
    wrong = NeedleCase(ids, (7, 9), (2, 4), 12, 0.5)
    assert ids.max() < VOCAB and greedy_answers(model, tokens=3)(right) == [2, 3, 11]
    assert needle_grid(greedy_answers(model, tokens=3), [right, wrong]).recall.tolist() == [[0.5]]


def test_a_model_is_asked_greedily_for_text(tokenizer):
    model, _ = regard.tiny.lm()
    case = NeedleCase("x = 1 <note><k3><v7>\ny = 2\n<note><k5><v9>\nz <ask><k3>", (14, 18), "<v7>", 30, 0.2)
    assert "<v7>" in greedy_answers(model, tokenizer, tokens=2)(case)
