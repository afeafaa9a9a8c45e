"""Summary: from the lines of `regard.bench.results` to a table, a Pareto front and one sentence per use.

A difference counts only where it exceeds the spread: over seeds for what was trained, a few per cent for what was
timed. Systems that do not differ by that are named as equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

METRICS = {"text": "bits_per_byte", "recall": "accuracy"}
COSTS = ("prefill_ms", "decode_ms", "state_bytes", "peak_mib")

# one seed has no spread: its figures are held apart only beyond these, half of it for each side
_ONE_SEED = {"text": 0.01, "recall": 0.01}
# repeated timings on a quiet machine differ by about this much
_TIMING = 0.05
# no system gets this much cheaper at a longer length: if it seems so, something else was running
_DISTURBED = 0.75
_TIMED = ("Long decoding", "Long prompts", "Training speed")


@dataclass(frozen=True)
class Score:
    """What one system reached on one task.

    values: one a seed (bits per byte, or accuracy from 0 to 1), of the chosen learning rate. spread: their sample
    standard deviation, None for one seed. lrs: the learning rates. diverged: how many seeds ended without a value.
    settled: whether the search for the learning rate was over. whole: settled, nothing diverged, no part missing.
    """

    mean: float | None
    spread: float | None
    values: tuple[float, ...]
    lrs: tuple[float, ...]
    diverged: int
    settled: bool
    whole: bool
    chance: float | None


@dataclass(frozen=True)
class Fit:
    """Cost proportional to length ** exponent. error: standard error, None for fewer than three points."""

    exponent: float
    error: float | None
    points: int


@dataclass(frozen=True)
class Cost:
    """One system at one length (tokens), None where it was not measured; reason says why."""

    prefill_tokens_per_s: float | None
    prefill_ms: float | None
    decode_ms: float | None
    state_bytes: float | None
    peak_mib: float | None
    reason: str | None


@dataclass(frozen=True)
class Row:
    """One system: its scores, its costs by length, the fitted exponents by cost."""

    system: str
    title: str
    parameters: int | None
    text: Score | None
    recall: Score | None
    train_tokens_per_s: float | None
    costs: dict[int, Cost]
    fits: dict[str, Fit]


@dataclass(frozen=True)
class Answer:
    """use: what for. picks: the systems that are best for it, equals together. sentence: plain text. caveat: or ""."""

    use: str
    picks: tuple[str, ...]
    sentence: str
    caveat: str


@dataclass(frozen=True)
class Summary:
    """Everything that the report and `--json` show.

    length: tokens, of the text training. lengths: where cost was measured. fronts: by length, the systems that no other
    beats in recall without a larger state. missing: what is not there, one sentence each. notes: what limits fairness.
    """

    rows: tuple[Row, ...]
    length: int | None
    lengths: tuple[int, ...]
    fronts: dict[int, tuple[str, ...]]
    answers: tuple[Answer, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    rough: bool

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists, for JSON."""
        return asdict(self)


def summarise(lines: Sequence[dict[str, Any]]) -> Summary:
    """The summary of the lines of a results file, whatever part of the run they hold."""
    settings = settings_of(lines)
    about = systems_of(lines)
    parts = {task: _parts(lines, task) for task in METRICS}
    rows = tuple(_row(lines, slug, facts, parts) for slug, facts in about.items())
    length = _length(lines, settings)
    return Summary(
        rows=rows,
        length=length,
        lengths=tuple(sorted({n for row in rows for n in row.costs})),
        fronts=_fronts(rows),
        answers=tuple(_answers(rows, length)),
        missing=tuple(_missing(rows, lines, settings, parts)),
        notes=tuple(_notes(lines, rows)),
        rough=bool(settings.get("quick")),
    )


def settings_of(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What was asked for; empty if the run line is missing."""
    return next((line["settings"] for line in lines if line["kind"] == "run"), None) or {}


def systems_of(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """slug -> what is known of it, in the order of the run, then of the lines."""
    about: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["kind"] == "run":
            about.update(line["systems"])
        elif "system" in line:
            about.setdefault(line["system"], {})
    return about


def chosen_runs(lines: Iterable[dict[str, Any]], task: str, slug: str) -> tuple[list[dict[str, Any]], bool]:
    """The training runs of the learning rate that won, and whether it has won already.

    While the search goes on, the runs of the learning rate with the best validation so far stand in.
    """
    runs = _runs(lines, task, slug)
    best = [run for run in runs if run.get("best")]
    if best or not runs:
        return best, True
    sign = -1 if task == "recall" else 1

    def order(lr: float) -> tuple[int, float]:
        ends = [run["curve"][-1][2] for run in runs if run["lr"] == lr and run["value"] is not None and run["curve"]]
        return (0, sign * float(np.mean(ends))) if ends else (1, lr)

    lr = min({run["lr"] for run in runs}, key=order)
    return [run for run in runs if run["lr"] == lr], False


def fit(lengths: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """Least squares of log cost on log length; None for fewer than two lengths."""
    kept = [(n, c) for n, c in zip(lengths, costs, strict=True) if n > 0 and c > 0]
    if len({n for n, _ in kept}) < 2:
        return None
    x, y = np.log(np.array(kept, dtype=np.float64)).T
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    if len(kept) < 3:
        return Fit(slope, None, len(kept))
    left = y - y.mean() - slope * x
    return Fit(slope, float(np.sqrt(left @ left / (len(kept) - 2) / (x @ x))), len(kept))


def pareto(points: dict[str, tuple[float, float]]) -> tuple[str, ...]:
    """Names of the (state, recall) points that none beats: smaller or equal state, higher or equal recall, not both
    equal; from the smallest state up."""
    front = [
        name
        for name, (state, recall) in points.items()
        if not any(s <= state and r >= recall and (s, r) != (state, recall) for s, r in points.values())
    ]
    return tuple(sorted(front, key=lambda name: points[name]))


def amount(size: float) -> str:
    """Bytes as text with a binary unit."""
    units = ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    unit = units[0]
    return f"{size:.0f} {unit}" if size >= 100 or size == int(size) else f"{size:.1f} {unit}"


def digits(value: float, count: int = 3) -> str:
    """A number to so many significant digits, without exponent, thousands set apart."""
    if value == 0:
        return "0"
    places = max(0, count - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:,.{places}f}"


def score_text(score: Score, task: str) -> str:
    """Mean and spread, such as "1.872 ± 0.004"; "diverged" if there is no value."""
    if score.mean is None:
        return "diverged"
    return f"{score.mean:.3f}" + (f" ± {score.spread:.3f}" if score.spread is not None else "")


def _runs(lines: Iterable[dict[str, Any]], task: str, slug: str) -> list[dict[str, Any]]:
    """All training runs of a system on a task: as long as none is settled, those on trial."""
    runs = [x for x in lines if x.get("metric") == METRICS[task] and x["system"] == slug]
    return [x for x in runs if x["kind"] == "train"] or [x for x in runs if x["kind"] == "trial"]


def _parts(lines: Iterable[dict[str, Any]], task: str) -> set[tuple[str, int]]:
    return {(x["task"], x["length"]) for x in lines if x.get("metric") == METRICS[task]}


def _row(lines: Sequence[dict[str, Any]], slug: str, facts: dict[str, Any], parts: dict[str, set]) -> Row:
    speed = {x["length"]: x for x in lines if x["kind"] == "speed" and x["system"] == slug}
    costs = {n: _cost(speed[n]) for n in sorted(speed)}
    fits = {}
    for name in COSTS:
        known = [(n, value) for n, cost in costs.items() if (value := getattr(cost, name)) is not None]
        found = fit([n for n, _ in known], [c for _, c in known])
        if found:
            fits[name] = found
    rates = [x["train_tokens_per_s"] for x in speed.values() if x.get("train_tokens_per_s") is not None]
    trained = [x["parameters"] for x in lines if "metric" in x and x["system"] == slug]
    return Row(
        system=slug,
        title=facts.get("title") or slug,
        parameters=facts.get("parameters") or (trained[0] if trained else None),
        text=_score(lines, "text", slug, parts["text"]),
        recall=_score(lines, "recall", slug, parts["recall"]),
        train_tokens_per_s=rates[-1] if rates else None,
        costs=costs,
        fits=fits,
    )


def _cost(line: dict[str, Any]) -> Cost:
    rate = line.get("prefill_tokens_per_s")
    return Cost(
        prefill_tokens_per_s=rate,
        prefill_ms=1e3 * line["length"] / rate if rate else None,
        decode_ms=line.get("decode_ms"),
        state_bytes=line.get("state_bytes"),
        peak_mib=line.get("peak_mib"),
        reason=line.get("reason"),
    )


def _score(lines: Sequence[dict[str, Any]], task: str, slug: str, parts: set[tuple[str, int]]) -> Score | None:
    runs, settled = chosen_runs(lines, task, slug)
    if not runs:
        return None
    seeds: dict[int, dict[tuple[str, int], float | None]] = {}
    for run in runs:
        seeds.setdefault(run["seed"], {})[run["task"], run["length"]] = run["value"]
    finished = [found for found in seeds.values() if None not in found.values()]
    # seeds that cover different parts cannot be averaged: those that cover most are
    most = max((len(found) for found in finished), default=0)
    values = tuple(float(np.mean(list(found.values()))) for found in finished if len(found) == most)
    diverged = len(seeds) - len(finished)
    return Score(
        mean=float(np.mean(values)) if values else None,
        spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        values=values,
        lrs=tuple(sorted({run["lr"] for run in runs})),
        diverged=diverged,
        settled=settled,
        whole=settled and not diverged and most == len(parts),
        chance=next((run["chance"] for run in runs if run.get("chance") is not None), None),
    )


def _length(lines: Iterable[dict[str, Any]], settings: dict[str, Any]) -> int | None:
    lengths = [x["length"] for x in lines if x.get("metric") == METRICS["text"]]
    return max(set(lengths), key=lengths.count) if lengths else settings.get("length")


def _fronts(rows: Iterable[Row]) -> dict[int, tuple[str, ...]]:
    points: dict[int, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row.recall and row.recall.mean is not None:
            for n, cost in row.costs.items():
                if cost.state_bytes is not None:
                    points.setdefault(n, {})[row.system] = (cost.state_bytes, row.recall.mean)
    return {n: pareto(points[n]) for n in sorted(points)}


@dataclass(frozen=True)
class _Contest:
    # name -> (value, margin); two are equals if their difference is within the sum of their margins
    entries: dict[str, tuple[float, float]]
    higher: bool

    def beats(self, one: str, other: str) -> bool:
        (a, m), (b, n) = self.entries[one], self.entries[other]
        # a hair of tolerance, so that 1 % apart in decimals is within 1 % in floats
        return (a - b if self.higher else b - a) > (m + n) * (1 + 1e-9)

    def rank(self, name: str) -> int:
        return 1 + sum(self.beats(other, name) for other in self.entries)

    def ordered(self) -> list[str]:
        return sorted(self.entries, key=lambda name: self.entries[name][0], reverse=self.higher)

    def leaders(self) -> list[str]:
        first, *others = self.ordered()
        return [first] + [name for name in others if not self.beats(first, name)]


def _score_contest(rows: Iterable[Row], task: str) -> _Contest | None:
    scores = {row.system: s for row in rows if (s := getattr(row, task)) and s.whole and s.mean is not None}
    spreads = [s.spread for s in scores.values() if s.spread is not None]
    # a spread of two or three seeds can be small by luck: none counts for less than what is usual in this run
    usual = float(np.sqrt(np.mean(np.square(spreads)))) if spreads else 0.0
    entries = {}
    for name, score in scores.items():
        alone = _ONE_SEED[task] / 2 * (score.mean if task == "text" else 1)
        entries[name] = (score.mean, alone if score.spread is None else max(score.spread, usual))
    return _Contest(entries, higher=task == "recall") if entries else None


def _timed_contest(rows: Iterable[Row], value: Callable[[Row], float | None], higher: bool) -> _Contest | None:
    found = {row.system: v for row in rows if (v := value(row)) is not None}
    return _Contest({name: (v, v * _TIMING / 2) for name, v in found.items()}, higher) if found else None


def _at_longest(rows: Iterable[Row], name: str, higher: bool) -> tuple[int, _Contest] | None:
    """The contest at the longest of the lengths at which most systems were measured."""
    known = [
        (n, row.system, value)
        for row in rows
        for n, cost in row.costs.items()
        if (value := getattr(cost, name)) is not None
    ]
    if not known:
        return None
    lengths = [n for n, _, _ in known]
    length = max(set(lengths), key=lambda n: (lengths.count(n), n))
    entries = {system: (value, value * _TIMING / 2) for n, system, value in known if n == length}
    return length, _Contest(entries, higher)


def _answers(rows: Sequence[Row], length: int | None) -> Iterable[Answer]:
    diverged = {row.system for row in rows if any(score and score.diverged for score in (row.text, row.recall))}
    busy = "Something else kept the machine busy, so timings are rough: see how it was measured."
    disturbed = busy if any(_disturbed(rows)) else ""
    for answer in _uses(rows, length):
        timed = disturbed if answer.use in _TIMED else ""
        failed = [name for name in answer.picks if name in diverged]
        warning = f"But {joined(failed)} diverged in training, see what is missing." if failed else ""
        yield replace(answer, caveat=" ".join(filter(None, (answer.caveat, warning, timed))))


def _uses(rows: Sequence[Row], length: int | None) -> Iterable[Answer]:
    by_name = {row.system: row for row in rows}
    text, recall = _score_contest(rows, "text"), _score_contest(rows, "recall")
    decode, prefill = _at_longest(rows, "decode_ms", False), _at_longest(rows, "prefill_tokens_per_s", True)
    train = _timed_contest(rows, lambda row: row.train_tokens_per_s, higher=True)
    if text:
        yield _text_answer(text, by_name, length)
    if recall:
        yield _recall_answer(recall, by_name)
    if decode:
        yield _decode_answer(*decode, by_name)
    if prefill:
        yield _rate_answer("Long prompts", f"reading {prefill[0]:,} tokens at once", "reads", prefill[1])
    if train:
        at = f" at {length:,} tokens" if length else ""
        yield _rate_answer("Training speed", f"training{at}", "trains", train)
    if text and recall and decode and train:
        contests = {"text": text, "recall": recall, "training speed": train, "long decoding": decode[1]}
        balanced = _balanced_answer(contests, len(rows))
        if balanced:
            yield balanced


def _text_answer(contest: _Contest, rows: dict[str, Row], length: int | None) -> Answer:
    leaders, order = contest.leaders(), contest.ordered()
    best, score = leaders[0], rows[leaders[0]].text
    assert score is not None
    seeds = len(score.values)
    sentence = (
        f"For {f'{length:,}-token ' if length else ''}text on this machine, {best} predicts best: "
        f"{score_text(score, 'text')} bits per byte" + (f" over {seeds} seeds" if seeds > 1 else " with one seed")
    )
    sentence, caveat = _against(sentence, "text", leaders, order, rows)
    return Answer("Text quality", tuple(leaders), sentence, caveat)


def _recall_answer(contest: _Contest, rows: dict[str, Row]) -> Answer:
    leaders, order = contest.leaders(), contest.ordered()
    best, score = leaders[0], rows[leaders[0]].recall
    assert score is not None and score.mean is not None
    if score.chance is not None and score.mean <= 2 * score.chance:
        return Answer(
            "Recall",
            (),
            f"For looking things up in the context, none of these will do: the best, {best}, is right in "
            f"{score.mean:.1%} of the cases where chance is {score.chance:.1%}.",
            "",
        )
    sentence = f"For looking things up in the context, {best} is most accurate: {score_text(score, 'recall')}"
    if score.chance is not None:
        sentence += f" where chance is {score.chance:.3f}"
    sentence, caveat = _against(sentence, "recall", leaders, order, rows)
    smallest = _smallest_state(leaders, rows)
    if len(leaders) > 1 and smallest:
        name, size, n = smallest
        caveat = f"Of these, {name} keeps the smallest state: {amount(size)} at {n:,} tokens. {caveat}"
    return Answer("Recall", tuple(leaders), sentence, caveat)


def _against(sentence: str, task: str, leaders: list[str], order: list[str], rows: dict[str, Row]) -> tuple[str, str]:
    """The sentence, ended by who is equal or next; and what that rests on."""

    def said(name: str) -> str:
        return f"{name} ({score_text(getattr(rows[name], task), task)})"

    single = any(getattr(rows[name], task).spread is None for name in order)
    caveat = ""
    if len(leaders) > 1:
        near = f"within {_ONE_SEED[task]:.0%}, which one seed cannot separate"
        reason = near if single else "within the spread over seeds"
        others = joined([said(name) for name in leaders[1:]])
        sentence += f"; {others} cannot be told apart from it ({reason})"
    elif len(order) > 1:
        sentence += f"; next {'is' if len(order) > 2 else 'and last is'} {said(order[1])}"
    else:
        sentence += "; no other system was measured"
    if single and len(order) > 1:
        caveat = "With one seed a difference this small can be chance."
    elif len(order) > 1 and len(getattr(rows[order[0]], task).values) == 2:
        caveat = "Two seeds show the spread only roughly."
    return sentence + ".", caveat


def _smallest_state(names: Iterable[str], rows: dict[str, Row]) -> tuple[str, float, int] | None:
    found = _at_longest([rows[name] for name in names], "state_bytes", False)
    if not found:
        return None
    n, contest = found
    name = contest.ordered()[0]
    return name, contest.entries[name][0], n


def _decode_answer(length: int, contest: _Contest, rows: dict[str, Row]) -> Answer:
    leaders, order = contest.leaders(), contest.ordered()

    def said(name: str) -> str:
        state = rows[name].costs[length].state_bytes
        return f"{digits(contest.entries[name][0])} ms a token" + (
            f" with a state of {amount(state)}" if state is not None else ""
        )

    sentence = f"For writing on after {length:,} tokens, {leaders[0]} is cheapest: {said(leaders[0])}"
    last = order[-1]
    if last not in leaders:
        sentence += f"; the dearest, {last}, takes {said(last)}"
    return Answer("Long decoding", tuple(leaders), sentence + ".", _timing_caveat(leaders))


def _rate_answer(use: str, what: str, verb: str, contest: _Contest) -> Answer:
    leaders, order = contest.leaders(), contest.ordered()
    value, last = contest.entries[leaders[0]][0], order[-1]
    sentence = f"For {what}, {leaders[0]} is fastest: it {verb} {digits(value)} tokens/s"
    if last not in leaders:
        sentence += f", {value / contest.entries[last][0]:.1f} times as many as the slowest, {last}"
    return Answer(use, tuple(leaders), sentence + ".", _timing_caveat(leaders))


def _disturbed(rows: Iterable[Row]) -> Iterable[str]:
    """Systems and lengths whose times cannot all be right."""
    for row in rows:
        for name, what in (("prefill_ms", "reading"), ("decode_ms", "a decoding step")):
            known = [(n, value) for n, cost in row.costs.items() if (value := getattr(cost, name))]
            for (n, value), (longer, after) in pairwise(known):
                if after < _DISTURBED * value:
                    yield (
                        f"Timing was disturbed: {what} took {row.system} {digits(value)} ms at {n:,} tokens, but "
                        f"{digits(after)} ms at {longer:,}."
                    )


def _timing_caveat(leaders: list[str]) -> str:
    if len(leaders) == 1:
        return ""
    return f"Within {_TIMING:.0%}, which timings here cannot separate: {joined(leaders[1:])}."


def _balanced_answer(contests: dict[str, _Contest], systems: int) -> Answer | None:
    everywhere = [n for n in contests["text"].entries if all(n in c.entries for c in contests.values())]
    if len(everywhere) < 2:
        return None
    ranks = {name: [contest.rank(name) for contest in contests.values()] for name in everywhere}
    best = min((max(r), sum(r)) for r in ranks.values())
    picks = [name for name, r in ranks.items() if (max(r), sum(r)) == best]
    places = ", ".join(f"{ordinal(r)} in {what}" for what, r in zip(contests, ranks[picks[0]], strict=True))
    size = len(everywhere)
    worst = f"never worse than {ordinal(best[0])} of {size} systems"
    sentence = f"For a bit of everything, {picks[0]} is {worst}: {places}."
    caveat = f"As good by this rule: {joined(picks[1:])}." if len(picks) > 1 else ""
    if size < systems:
        caveat = f"{caveat} {systems - size} of {systems} systems lack a part and are left out.".strip()
    return Answer("A balanced pick", tuple(picks), sentence, caveat)


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th ..."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def joined(names: Sequence[str]) -> str:
    """The names with commas and "and"."""
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else ""


def _missing(
    rows: Sequence[Row], lines: Sequence[dict[str, Any]], settings: dict[str, Any], parts: dict[str, set]
) -> Iterable[str]:
    if not rows:
        yield "Nothing has been measured yet."
    asked = [task for task in METRICS if parts[task] or task in settings.get("tasks", METRICS)]
    for task in METRICS:
        if rows and task not in asked:
            yield f"{task.capitalize()} was not part of this run."
        elif rows and not parts[task]:
            yield f"{task.capitalize()} has not been measured yet."
    wanted = settings.get("seeds")
    for row in rows:
        for task in asked:
            if parts[task]:
                yield from _missing_score(row, task, wanted, parts[task], _runs(lines, task, row.system))
    measured = {n for row in rows for n in row.costs}
    if rows and not measured:
        yield "Speed, memory and state size have not been measured yet."
    for row in rows:
        without = sorted(measured - set(row.costs))
        if without:
            yield f"{row.system}: no speed at {joined([f'{n:,}' for n in without])} tokens yet."
        for n, cost in row.costs.items():
            gaps = {"prefill": cost.prefill_ms, "decoding": cost.decode_ms, "peak memory": cost.peak_mib}
            lacking = [name for name, value in gaps.items() if value is None]
            if lacking:
                why = f": {cost.reason}" if cost.reason else ""
                yield f"{row.system}: {joined(lacking)} at {n:,} tokens not measured{why}."


def _missing_score(
    row: Row, task: str, wanted: Any, parts: set[tuple[str, int]], runs: Sequence[dict[str, Any]]
) -> Iterable[str]:
    score: Score | None = getattr(row, task)
    if score is None:
        yield f"{row.system}: {task} not measured yet."
        return
    seeds = len(score.values) + score.diverged
    if score.diverged:
        rates = joined([f"{lr:g}" for lr in score.lrs])
        yield f"{row.system}: {task} diverged with {score.diverged} of {seeds} seeds at learning rate {rates}."
    elif not score.settled:
        yield (
            f"{row.system}: {task} still searching its learning rate; shown is {score.lrs[0]:g}, the best so far on "
            "the validation part, and it takes no part in the answers."
        )
    else:
        if isinstance(wanted, int) and seeds < wanted:
            yield f"{row.system}: {task} has {seeds} of {wanted} seeds."
        if not score.whole:
            yield f"{row.system}: {task} covers some of {len(parts)} settings only; it takes no part in the answers."
    others = sorted({x["lr"] for x in runs if x["stopped"] == "diverged"} - set(score.lrs))
    if others:
        rates = joined([f"{lr:g}" for lr in others])
        yield f"{row.system}: {task} diverged at learning rate {rates}, not the one shown."


def _notes(lines: Sequence[dict[str, Any]], rows: Sequence[Row]) -> Iterable[str]:
    for task in METRICS:
        chosen = [run for row in rows for run in chosen_runs(lines, task, row.system)[0]]
        for stopped, why in (("time", "the clock"), ("solved", "reaching the goal")):
            early = sorted({run["system"] for run in chosen if run["stopped"] == stopped})
            if early:
                yield f"{task.capitalize()}: {why} ended training of {joined(early)} before all tokens were seen."
        if len({x["task_version"] for x in chosen}) > 1:
            yield f"{task.capitalize()}: lines of different task versions are mixed, so systems are not comparable."
    sizes = [row.parameters for row in rows if row.parameters]
    if len(sizes) > 1:
        yield f"Parameters: {min(sizes):,} to {max(sizes):,}, {max(sizes) / min(sizes) - 1:.1%} apart at most."
    yield from _disturbed(rows)
    hardware = {x["hardware"] for x in lines if x.get("hardware")}
    if len(hardware) > 1:
        yield f"Measured on different machines, so times are not comparable: {joined(sorted(hardware))}."
    versions = {(x["regard"], x["torch"]) for x in lines if x.get("regard")}
    if len(versions) > 1:
        yield f"Measured with {len(versions)} different versions of regard or torch."
