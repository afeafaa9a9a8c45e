"""The contract battery: checks that a card's claims switch on, and what they found.

A check is a function of a subject with a one-line docstring; it raises CheckFailed. `check("based")` runs all that
apply to a system, `check("my_op.py")` all that apply to a file of yours.
"""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import regard.checks
from regard.contract.card import MixerCard, OpCard
from regard.contract.catalogue import Entry, catalogue, find, from_file

Kinds = type[Exception] | tuple[type[Exception], ...]
Status = Literal["passed", "failed", "not claimed"]


class CheckFailed(AssertionError):
    """A claim that does not hold: the text says what was tried, what came and what was required."""


@dataclass(frozen=True)
class Subject:
    """What a check looks at. name: room and slug. card: its claims. exports: public name -> object.

    wraps: the op, where the subject is the attention layer over an op that has no mixer file of its own.
    """

    name: str
    card: Any
    entry: Entry
    exports: dict[str, Any]
    wraps: Any = None

    @property
    def main(self) -> Any:
        """The first export: the op, the module, the task."""
        return self.exports[self.card.exports[0]]


Run = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """name: unique among the checks of a kind of card. doc: what it demands. when: whether a card switches it on."""

    name: str
    kind: str
    doc: str
    when: Callable[[Any], bool]
    run: Run


@dataclass(frozen=True)
class Row:
    """What one check found on one subject. message: why it failed; else what the check demands."""

    subject: str
    check: str
    status: Status
    message: str


@dataclass(frozen=True)
class Report:
    """All rows of a run. ok: nothing failed."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return not any(row.status == "failed" for row in self.rows)

    def __str__(self) -> str:
        width = max((len(row.check) for row in self.rows), default=0)
        lines, subject = [], ""
        for row in self.rows:
            if row.subject != subject:
                subject = row.subject
                lines.append(subject)
            lines.append(f"  {row.status:<11}  {row.check:<{width}}  {row.message}")
        counts = Counter(row.status for row in self.rows)
        return "\n".join([*lines, ", ".join(f"{counts[status]} {status}" for status in get_args(Status))])


def verifies(kind: str, when: Callable[[Any], bool] = lambda card: True) -> Callable[[Run], Check]:
    """Make a function a check of a kind of card ("op", "mixer", "training", …). when: the claim that switches it on."""

    def make(run: Run) -> Check:
        return Check(run.__name__, kind, (run.__doc__ or "").strip(), when, run)

    return make


@lru_cache(maxsize=1)
def checks() -> tuple[Check, ...]:
    """Every check of this room, in the order of their definition."""
    found = []
    for info in pkgutil.iter_modules(regard.checks.__path__):
        module = import_module(f"regard.checks.{info.name}")
        found += [c for c in vars(module).values() if isinstance(c, Check) and c.run.__module__ == module.__name__]
    return tuple(found)


def check(name_or_path: str | Path) -> Report:
    """Run the battery on a system, by slug ("based": all its files; "mixers/based": one), or on a Python file.

    Raises UnknownName, OptionError for a file without a card, CardError for a card that cannot be read.
    """
    return Report(tuple(run(c, s) for s in subjects(name_or_path) for c in checks() if c.kind == s.card.kind))


def run(check: Check, subject: Subject) -> Row:
    """Run one check; any error it raises is a failure. Random numbers are seeded, and as before afterwards."""
    if not check.when(subject.card):
        return Row(subject.name, check.name, "not claimed", check.doc)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check.run(subject)
    except CheckFailed as failure:
        return Row(subject.name, check.name, "failed", str(failure))
    except Exception as error:  # a stranger's code may raise anything
        reason = (str(error).strip().splitlines() or ["no text"])[0]
        return Row(subject.name, check.name, "failed", f"it raised {type(error).__name__}: {reason}")
    return Row(subject.name, check.name, "passed", check.doc)


def subjects(name_or_path: str | Path) -> list[Subject]:
    """What the battery runs on for a name or a file."""
    if isinstance(name_or_path, Path) or name_or_path.endswith(".py"):
        return _subjects_of(from_file(name_or_path))
    entry = find(name_or_path)
    parts = [e for e in catalogue().values() if e.card.part_of == entry.card.slug and not entry.card.part_of]
    return [subject for e in (entry, *parts) for subject in _subjects_of(e)]


def every_subject() -> list[Subject]:
    """What the battery runs on for the whole library."""
    return [subject for entry in catalogue().values() for subject in _subjects_of(entry)]


def _subjects_of(entry: Entry) -> list[Subject]:
    card, exports = entry.card, entry.exports()
    found = [Subject(f"{entry.room}/{card.slug}", card, entry, exports)]
    owned = any(e.room == "mixers" and card.slug in (e.card.slug, e.card.part_of) for e in catalogue().values())
    if isinstance(card, OpCard) and card.decode == "kv" and not owned:
        op = exports[card.exports[0]]
        found.append(Subject(f"mixers/{card.slug}", _as_mixer(card), entry, exports, wraps=op))
    return found


def _as_mixer(card: OpCard) -> MixerCard:
    """What the attention layer over an op must keep of the op's claims."""
    return MixerCard(
        slug=card.slug, title=card.title, exports=card.exports, paper=card.paper, baseline=card.baseline,
        part_of=card.part_of, example="b=2 n=10 c=16 h=4", options={**card.options, **card.mixer},
        attends=card.attends, padding=card.padding, documents=card.documents, decode=True,
        constant_state="window" in card.options,
    )  # fmt: skip


def demand(condition: Any, message: str) -> None:
    """Raise CheckFailed unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


def demand_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raise CheckFailed unless two tensors have one shape and are equal within a relative tolerance."""
    demand(actual.shape == expected.shape, f"{what}: the shape is {tuple(actual.shape)}, not {tuple(expected.shape)}")
    error = distance(actual, expected)
    demand(error <= tolerance, f"{what}: off by {error:.2e} of the largest value; {tolerance:.0e} is allowed")


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest finite magnitude of the expected tensor; NaN counts as infinite.

    Logits of -inf, what may not be written, are as far as any number from another, and equal to themselves.
    """
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    hidden = expected == float("-inf")
    size = expected.masked_fill(hidden, 0.0).abs().max().clamp(min=1e-30)
    error = (actual - expected).masked_fill(hidden & (actual == expected), 0.0).abs().max()
    return float((error / size).nan_to_num(nan=float("inf")))


def demand_refused(kinds: Kinds, what: str, function: Callable[..., Any], /, *args: Any, **options: Any) -> str:
    """Raise CheckFailed unless a call raises one of these errors; else the text of the error."""
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    names = " or ".join(kind.__name__ for kind in wanted)
    try:
        function(*args, **options)
    except wanted as error:
        return str(error)
    except Exception as error:
        raise CheckFailed(f"{what} raised {type(error).__name__} ({error}); it must raise {names}") from error
    raise CheckFailed(f"{what} ran; it must raise {names}")
