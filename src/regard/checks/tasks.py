"""Checks of benchmark tasks: generators of rows with labels."""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.checks.battery import CheckFailed, Subject, demand, verifies
from regard.checks.tolerances import ABOVE_CHANCE

ROWS = 512
IGNORED = -100
SPLITS = ("train", "validation", "test")


def build(subject: Subject) -> Any:
    """The task, by the first export that the card's options are enough for."""
    for make in subject.exports.values():
        try:
            inspect.signature(make).bind(**subject.card.options)
        except TypeError:
            continue
        return make(**subject.card.options)
    raise CheckFailed("no export can be called with the options of the card alone")


def digest(task: Any) -> str:
    """sha256 over the first 64 training rows."""
    rows = task.build("train", 64)
    return hashlib.sha256(b"".join(t.numpy().astype("<i8").tobytes() for t in (rows.inputs, rows.targets))).hexdigest()


@verifies("task")
def rows_are_labelled(subject: Subject) -> None:
    """Inputs and targets are int64 ids of one shape, every row asks, version, metric and chance are stated."""
    task, card = build(subject), subject.card
    demand(card.version and card.metric and card.chance, "the card leaves version, metric or chance empty")
    demand(not _scores(card) or 0 <= task.chance < 1, f"chance is {task.chance}; it is a share, below 1")
    shape = (16, task.seq_len)
    for split in SPLITS:
        rows = task.build(split, 16)
        for name, ids in (("inputs", rows.inputs), ("targets", rows.targets)):
            demand(ids.dtype == torch.int64, f"{split}: {name} are {ids.dtype}, not int64")
            demand(tuple(ids.shape) == shape, f"{split}: {name} are {tuple(ids.shape)}, not {shape}")
            asked = ids[ids != IGNORED] if name == "targets" else ids
            demand(((asked >= 0) & (asked < task.vocab_size)).all(), f"{split}: {name} leave the vocabulary")
        demand((rows.targets != IGNORED).any(1).all(), f"{split}: a row asks nothing")


@verifies("task")
def rows_follow_the_seed(subject: Subject) -> None:
    """The same split, count and seed give the same rows, whatever else draws random numbers; another seed others."""
    task = build(subject)
    for split in SPLITS:
        first = task.build(split, 32, seed=3)
        kept = random.getstate(), np.random.get_state()
        try:
            random.seed(5)
            np.random.seed(5)
            torch.manual_seed(5)
            second = build(subject).build(split, 32, seed=3)
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
        same = torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)
        demand(same, f"{split}: the same seed gave other rows")
        other = task.build(split, 32, seed=4)
        demand(not torch.equal(first.inputs, other.inputs), f"{split}: another seed gave the same rows")


@verifies("task")
def splits_are_disjoint(subject: Subject) -> None:
    """No row of one split occurs in another, and no row occurs twice in one."""
    task = build(subject)
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        for row in task.build(split, ROWS).inputs.numpy():
            where = seen.setdefault(row.tobytes(), split)
            demand(where == split, f"a row of {split} occurs in {where}")
    demand(len(seen) > 0.99 * ROWS * len(SPLITS), f"only {len(seen)} of {ROWS * len(SPLITS)} rows are different")


@verifies("task", lambda card: _scores(card))
def oracle_solves(subject: Subject) -> None:
    """The task's `solve(inputs)`, or without one a look back in the row for the token asked, answers everything."""
    task = build(subject)
    rows = task.build("test", ROWS)
    answers = task.solve(rows.inputs) if hasattr(task, "solve") else _look_back(rows.inputs)
    score = _score(answers, rows.targets)
    demand(score == 1.0, f"the oracle answers {score:.4f} of what is asked; the labels do not follow from the rows")


@verifies("task", lambda card: _scores(card))
def baselines_fail(subject: Subject) -> None:
    """Answers that ignore the row (the commonest one, the commonest for the token or the position) stay at chance."""
    task = build(subject)
    train, test = (task.build(split, 2 * ROWS) for split in ("train", "test"))
    asked = train.targets != IGNORED
    answers = train.targets[asked]
    common = answers.bincount().argmax()
    places = torch.arange(train.inputs.shape[1]).expand_as(train.inputs)
    baselines = {"the commonest answer": torch.full_like(test.inputs, int(common))}
    for what, keys, asked_keys in (
        ("the commonest answer to the token asked", train.inputs[asked], test.inputs),
        ("the commonest answer at the position", places[asked], places[:1].expand_as(test.inputs)),
    ):
        counts = torch.zeros(int(max(keys.max(), asked_keys.max())) + 1, task.vocab_size, dtype=torch.long)
        counts.index_put_((keys, answers), torch.ones_like(keys), accumulate=True)
        baselines[what] = counts.argmax(1)[asked_keys]
    for what, guesses in baselines.items():
        score = _score(guesses, test.targets)
        limit = task.chance + ABOVE_CHANCE
        demand(score <= limit, f"{what} scores {score:.4f}; chance is {task.chance:.4f} and {limit:.4f} is allowed")


@verifies("task")
def fingerprint_is_stable(subject: Subject) -> None:
    """A fresh process, with other hash seeds, makes the very same rows."""
    code = (
        "import sys; from pathlib import Path; from regard.checks import battery, tasks; "
        "(subject,) = battery.subjects(Path(sys.argv[1])); print(tasks.digest(tasks.build(subject)))"
    )
    here = digest(build(subject))
    done = subprocess.run(
        [sys.executable, "-c", code, str(subject.entry.path)],
        env={**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    demand(done.returncode == 0, f"a fresh process could not build it: {last}")
    there = done.stdout.split()[-1]
    demand(there == here, f"the fingerprint is {here[:12]}… here and {there[:12]}… in a fresh process")


def _scores(card: Any) -> bool:
    """Whether the task scores answers that are right or wrong; others measure bits."""
    return card.metric.startswith("accuracy")


def _score(answers: Tensor, targets: Tensor) -> float:
    asked = targets != IGNORED
    return float((answers[asked] == targets[asked]).double().mean())


def _look_back(inputs: Tensor) -> Tensor:
    """At every position, the token that followed the first occurrence of its token in the row."""
    same = inputs[:, :, None] == inputs[:, None, :]
    after = same.int().argmax(-1) + 1
    return inputs.gather(1, after.clamp(max=inputs.shape[1] - 1))
