"""Prompts and their twins: what differs, what stands where, and what decides the answer."""

import pytest
import torch

from regard import IOI, ColoredObjects, OptionError, ShapeError, Unsupported, pair_ids, tiny
from regard.bench.task import IGNORED
from regard.checks.battery import Subject, checks, run, subjects

TASKS = [IOI(), IOI(twin="absent"), ColoredObjects(), ColoredObjects(shots=0, twin="absent"), ColoredObjects(shots=2)]


@pytest.mark.parametrize("check", [c for c in checks() if c.kind == "task" and c.name != "fingerprint_is_stable"])
def test_colored_objects_pass_the_battery_of_tasks_too(check):
    (subject,) = (s for s in subjects("circuit_reuse") if s.name == "bench/circuit_reuse")
    mine = Subject("ColoredObjects", subject.card, subject.entry, {"ColoredObjects": ColoredObjects})
    row = run(check, mine)
    assert row.status == "passed", row.message


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_a_twin_differs_in_one_word_that_decides(task):
    pairs = task.pairs("test", 100)
    role = "again" if isinstance(task, IOI) else "asked"
    for pair in pairs:
        changed = [i for i, (a, b) in enumerate(zip(pair.words, pair.twin, strict=True)) if a != b]
        assert changed == [pair.roles[role]]
        assert pair.roles["end"] == len(pair.words) - 1
    ids = task.ids(pairs)
    assert torch.equal(task.solve(ids.clean)[:, -1], ids.correct)
    of_twin = task.solve(ids.corrupt)[:, -1]
    if task.twin == "swap":
        assert (of_twin.unsqueeze(1) == ids.wrong).any(1).all()
    elif isinstance(task, ColoredObjects):
        assert not of_twin.any()
    else:
        # all three names were said once: the first of them is as good as any
        assert len({pair.twin[pair.roles["again"]] for pair in pairs} & {pair.answer for pair in pairs}) > 0
        assert all(pair.twin[pair.roles["again"]] not in pair.words for pair in pairs)


def test_roles_are_the_words_they_say():
    for pair in IOI().pairs("train", 30):
        first, second, again = (pair.words[pair.roles[name]] for name in ("first", "second", "again"))
        assert {pair.answer, *pair.wrong} == {first, second} and pair.wrong == (again,) != (pair.answer,)
    seen = set()
    for pair in ColoredObjects(shots=2).pairs("train", 30):
        colors, things = ([pair.words[pair.roles[f"{what}{i}"]] for i in range(3)] for what in ("color", "thing"))
        asked = things.index(pair.words[pair.roles["asked"]])
        assert pair.answer == colors[asked] and set(pair.wrong) == set(colors) - {pair.answer}
        assert len(set(colors)) == len(set(things)) == 3
        assert pair.clean.count("Question:") == pair.clean.count("Answer:") == 3
        assert pair.clean.endswith("\nAnswer:") and f"a{pair.answer} " in pair.clean
        seen.add(asked)
    assert seen == {0, 1, 2}


def test_texts_read_as_they_should():
    pair = IOI().pairs("train", 1)[0]
    name, other = pair.words[pair.roles["again"]], pair.answer
    assert pair.clean.split(", ")[1].startswith(f"{name.strip()} ") and pair.clean.endswith(" to")
    assert name in pair.clean and other in pair.clean and "  " not in pair.clean
    assert ColoredObjects(shots=0).pairs("train", 1)[0].clean.count("?") == 1


def test_only_the_last_word_is_asked_for_and_a_row_ends_where_the_prompt_does():
    rows = IOI().build("train", 20)
    assert (rows.targets[:, :-1] == IGNORED).all() and (rows.targets[:, -1] != IGNORED).all()


def test_a_tokenizer_gets_the_same_places():
    _, tokenizer = tiny.lm()
    pairs = [*ColoredObjects(shots=0).pairs("test", 40)]
    kept = [p for p in pairs if len(p.clean) == len(p.corrupt) and p.answer[1] not in {w[1] for w in p.wrong}]
    # bytes: answers are known by their first token, the blank, which all share
    with pytest.raises(OptionError, match="begin with the same token"):
        pair_ids(tokenizer, kept)
    bare = [type(p)(p.words, p.twin, p.answer.strip(), tuple(w.strip() for w in p.wrong), p.roles) for p in kept]
    ids = pair_ids(tokenizer, bare)
    longest = max(len(p.clean) for p in bare) + 1
    assert ids.clean.shape == ids.corrupt.shape == ids.padding.shape == (len(bare), longest)
    assert ids.padding.sum(1).tolist() == [len(p.clean) + 1 for p in bare]
    for row, pair in enumerate(bare):
        assert chr(int(ids.clean[row, ids.roles["asked"][row]])) == pair.words[pair.roles["asked"]][-1]
        assert int(ids.roles["end"][row]) == longest - 1
        assert chr(int(ids.correct[row])) == pair.answer[0]
        assert [chr(i) for i in ids.wrong[row]] == [w[0] for w in pair.wrong]
        different = (ids.clean[row] != ids.corrupt[row]).nonzero()[:, 0]
        assert int(different.max()) <= int(ids.roles["asked"][row]) and len(different)


@pytest.mark.parametrize("make, text", [
    (lambda: IOI(twin="third"), 'twin is "swap"'), (lambda: ColoredObjects(shots=-1), "answered questions"),
    (lambda: IOI().ids(ColoredObjects().pairs("train", 1)), "no words of IOI"),
])  # fmt: skip
def test_what_cannot_be_is_refused(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_pairs_that_no_tokenizer_can_pair_are_refused():
    _, tokenizer = tiny.lm()
    pair = next(p for p in IOI().pairs("test", 50) if len(p.clean) != len(p.corrupt))
    with pytest.raises(OptionError, match="and its twin"):
        pair_ids(tokenizer, [pair])
    same = next(p for p in ColoredObjects().pairs("test", 90) if len(p.clean) == len(p.corrupt))
    bare = type(same)(same.words, same.twin, "x", ("y", "z"), same.roles)
    with pytest.raises(ShapeError, match="do not mix tasks"):
        pair_ids(tokenizer, [bare, type(same)(same.words, same.twin, "x", ("y",), same.roles)])
    with pytest.raises(Unsupported, match="tells no offsets"):
        pair_ids(object(), [pair])
