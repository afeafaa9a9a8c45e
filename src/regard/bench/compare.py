"""`regard compare`: equal small models of many systems, trained and timed side by side on one's own text.

Everything that is measured is a line of `results.jsonl` in the output folder; what is there is not measured again, so
the same command goes on where it was stopped.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from regard._version import __version__
from regard.bench.machine import hardware, limits, peak_mib, seconds
from regard.bench.recall.zoology import MQAR
from regard.bench.results import Results
from regard.bench.text.corpus import Corpus, read_corpus
from regard.bench.training import Outcome, Recipe, nll, train
from regard.contract.catalogue import find
from regard.contract.errors import OptionError, near
from regard.contract.names import mixer_entry, mixers
from regard.models.sequence.shell import SequenceModel, SequenceSettings

TaskName = Literal["text", "recall"]
TASKS: tuple[TaskName, ...] = ("text", "recall")
CARDS = {"text": "corpus", "recall": "zoology"}
REFERENCE = "softmax"


@dataclass(frozen=True)
class Settings:
    """What a comparison is made of; equal settings in one folder go on, different ones are refused.

    paths: files or folders of text, none for the standard library. tasks, systems: names. length: tokens a row of
    text. width, depth, heads: of the models. tokens: training tokens a run of text. budget_minutes: for the training of
    all systems together, in the place of tokens (0: none). seeds: runs a system. lrs: learning rates that are tried
    with the first seed. recall: (length, pairs) of the recall task. lengths: at which is timed. tokenizer: "bytes" or
    "bpe:N". threads: of torch. quick: one seed, few steps, figures are rough.
    """

    paths: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS
    systems: tuple[str, ...] = ()
    length: int = 512
    width: int = 128
    depth: int = 2
    heads: int = 4
    tokens: int = 4_000_000
    budget_minutes: float = 0.0
    seeds: int = 2
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    batch_tokens: int = 4096
    recall: tuple[int, int] = (64, 8)
    recall_steps: int = 1500
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    tokenizer: str = "bytes"
    threads: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise OptionError(f"there is no task {task!r}{near(task, TASKS)}; there are {', '.join(TASKS)}")
        for name in ("length", "width", "depth", "heads", "tokens", "seeds"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise OptionError(f"a width of {self.width} does not divide into {self.heads} heads")
        if self.budget_minutes < 0:
            raise OptionError(f"a budget of {self.budget_minutes} minutes is less than none")


def quick(settings: Settings) -> Settings:
    """The same comparison in minutes: one seed, one learning rate, small models, 500 steps, lengths up to 4096."""
    return replace(
        settings, quick=True, seeds=1, lrs=(), length=min(settings.length, 256), width=64, tokens=500 * 2048,
        batch_tokens=2048, recall=(32, 4), recall_steps=500, lengths=(512, 1024, 2048, 4096),
    )  # fmt: skip


def plan(settings: Settings) -> tuple[str, ...]:
    """The systems of a comparison: those named, or every causal mixer of the catalogue.

    Raises UnknownName with near names; OptionError for a system that cannot model text.
    """
    if settings.systems:
        for name in settings.systems:
            if not _causal(name):
                raise OptionError(f"{name} does not decode causally, which text and recall need")
        return tuple(dict.fromkeys(settings.systems))
    return tuple(name for name in mixers() if _causal(name))


class Watcher(Protocol):
    """Who is told how it goes. `part(text, steps)` gives a context in which `advance(step, note)` is called."""

    def part(self, text: str, steps: int) -> AbstractContextManager[Any]: ...

    def advance(self, step: int, note: str) -> None: ...

    def say(self, text: str) -> None: ...


def compare(settings: Settings, out: Path, watcher: Watcher) -> Results:
    """Measure what is not measured yet, and return all results.

    Raises OptionError if the folder holds another comparison, if the text is missing, empty, binary or too little;
    UnknownName for unknown systems; WriteError if the disk is full. Ctrl-C and kill lose 20 seconds of training at most.
    """
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    systems = plan(settings)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "results.jsonl")
    if results.note:
        watcher.say(results.note)
    _refuse_other(results, settings, systems, out)
    corpus = None
    if "text" in settings.tasks:
        watcher.say("reading text …")
        corpus = read_corpus(settings.paths, seq_len=settings.length, tokenizer=settings.tokenizer)
        watcher.say(f"text: {corpus.source}")
    cells = [_cell(task, system, settings, corpus) for task in settings.tasks for system in systems]
    if "run" not in results:
        cells = _within_budget(cells, settings)
        results.add(_run_line(settings, systems, cells, corpus))
    else:
        steps = results.of("run")[0]["steps"]
        cells = [replace(cell, steps=steps[cell.task]) for cell in cells]
    if "machine" not in results:
        results.add({"kind": "machine", "key": "machine", **limits()})
    for cell in cells:
        _train(cell, settings, results, out, watcher)
    for cell in cells:
        if cell.task == settings.tasks[0]:
            _time(cell, settings, results, watcher)
    return results


@dataclass(frozen=True)
class Cell:
    """One system on one task: everything a run needs but the learning rate and the seed."""

    task: str
    system: str
    model: SequenceSettings
    data: Corpus | MQAR
    steps: int
    rows: int
    lrs: tuple[float, ...]

    def build(self, seed: int) -> SequenceModel:
        torch.manual_seed(seed)
        return SequenceModel(self.model)

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in SequenceModel(self.model).parameters())


def _cell(task: str, system: str, settings: Settings, corpus: Corpus | None) -> Cell:
    if task == "text":
        assert corpus is not None
        model = SequenceSettings(
            vocab=corpus.vocab_size, dim=settings.width, depth=settings.depth, heads=settings.heads, mixer=system,
            options=_options(system, settings.length), hidden=8 * settings.width // 3,
        )  # fmt: skip
        rows = max(settings.batch_tokens // settings.length, 1)
        steps = max(settings.tokens // (rows * settings.length), 1)
        return Cell(task, system, _match(model), corpus, steps, rows, settings.lrs or (3e-3,))
    length, pairs = settings.recall
    model = SequenceSettings(
        vocab=256, dim=64, depth=2, heads=4, mixer=("short_conv", system), options=_options(system, length), hidden=0
    )
    return Cell(task, system, model, MQAR(256, length, pairs), settings.recall_steps, 64, settings.lrs[1:] or (1e-2,))


def _options(system: str, length: int) -> dict[str, dict[str, Any]]:
    # a training length is what it is; a window is an eighth of it
    given = {"length": length, "window": max(length // 8, 8)}
    entry = mixer_entry(system)
    return {system: {name: given.get(name, value) for name, value in entry.card.options.items()}}


def _match(model: SequenceSettings) -> SequenceSettings:
    """The same model with a feed-forward as wide as makes its parameters those of the softmax model."""
    with torch.device("meta"):
        target = _count(replace(model, mixer=REFERENCE, options={}))
        without = _count(replace(model, hidden=0))
    a_unit = 3 * model.dim * model.depth
    # the norms before the feed-forwards come with them
    hidden = round((target - without - model.dim * model.depth) / a_unit)
    return replace(model, hidden=max(hidden, 8))


def _count(model: SequenceSettings) -> int:
    return sum(p.numel() for p in SequenceModel(model).parameters())


def _causal(system: str) -> bool:
    card = mixer_entry(system).card
    return "causal_self" in getattr(card, "attends", ()) and bool(getattr(card, "decode", False))


def _within_budget(cells: list[Cell], settings: Settings) -> list[Cell]:
    """Cells with as many steps as the budget allows, the same for all systems of a task."""
    if not settings.budget_minutes:
        return cells
    runs = {cell.task: len(cell.lrs) + settings.seeds - 1 for cell in cells}
    cost: dict[str, float] = dict.fromkeys(settings.tasks, 0.0)
    for cell in cells:
        cost[cell.task] += _step_s(cell, cell.build(0), repeats=2)
    share = settings.budget_minutes * 60 / len(settings.tasks)
    # a tenth goes to held-out scores
    steps = {task: max(int(0.9 * share / (cost[task] * runs[task])), 20) for task in settings.tasks}
    return [replace(cell, steps=steps[cell.task]) for cell in cells]


def _run_line(settings: Settings, systems: tuple[str, ...], cells: list[Cell], corpus: Corpus | None) -> dict[str, Any]:
    first = {cell.system: cell for cell in reversed(cells)}
    described = {}
    for system in systems:
        card = mixer_entry(system).card
        owner = find(card.part_of).card if card.part_of else card
        described[system] = {
            "title": owner.title,
            "paper": owner.paper,
            "options": first[system].model.options.get(system, {}),
            "parameters": first[system].parameters,
            "hidden": first[system].model.hidden,
        }
    return {
        "kind": "run",
        "key": "run",
        "settings": asdict(settings),
        "systems": described,
        "steps": {cell.task: cell.steps for cell in cells},
        "data": corpus.source if corpus is not None else "generated recall rows",
        "matched": (
            "text: equal parameters, by the width of the feed-forward, and equal tokens, batches, optimiser and "
            "learning rates; recall: equal width and layers [short convolution, system], no feed-forward, equal rows. "
            "Every model of text has the rotary positions of its own mixer or none; recall models have the convolution"
        ),
        **_versions(),
    }


def _refuse_other(results: Results, settings: Settings, systems: tuple[str, ...], out: Path) -> None:
    for line in results.of("run"):
        wanted = _as_json(asdict(settings))
        given = line["settings"]
        differing = [name for name in wanted if given.get(name) != wanted[name]]
        if set(line["systems"]) != set(systems):
            differing.append("systems")
        if differing:
            raise OptionError(
                f"{out} holds another comparison: {', '.join(dict.fromkeys(differing))} differ. "
                "Repeat its command to go on, or give another --out"
            )


def _train(cell: Cell, settings: Settings, results: Results, out: Path, watcher: Watcher) -> None:
    trials = [(lr, 0) for lr in cell.lrs]
    for lr, seed in trials:
        _trial(cell, lr, seed, results, out, watcher)
    found = {
        t["lr"]: t for t in results.of("trial") if (t["task"], t["system"], t["seed"]) == (cell.task, cell.system, 0)
    }
    sign = 1 if cell.task == "text" else -1
    best = min(found.values(), key=lambda t: math.inf if t["validation"] is None else sign * t["validation"])["lr"]
    for seed in range(1, settings.seeds):
        _trial(cell, best, seed, results, out, watcher)
    for trial in [t for t in results.of("trial") if (t["task"], t["system"]) == (cell.task, cell.system)]:
        key = trial["key"].replace("trial/", "train/", 1)
        if key not in results:
            results.add({**trial, "kind": "train", "key": key, "best": trial["lr"] == best})


def _trial(cell: Cell, lr: float, seed: int, results: Results, out: Path, watcher: Watcher) -> None:
    key = f"trial/{cell.task}/{cell.system}/lr{lr:g}/seed{seed}"
    checkpoint = out / (key.replace("/", "_") + ".safetensors")
    if key in results:
        # it may have been killed between the result and this
        checkpoint.unlink(missing_ok=True)
        return
    metric: Literal["bits_per_byte", "accuracy"] = "bits_per_byte" if cell.task == "text" else "accuracy"
    rows = (32, 128) if cell.task == "text" else (256, 1000)
    recipe = Recipe(cell.steps, cell.rows, lr, seed, metric, key, *rows, early_stop=cell.task == "recall")
    with watcher.part(f"{cell.task}  {cell.system}", recipe.steps):
        outcome = train(
            cell.build(seed), cell.data, recipe, checkpoint=checkpoint,
            on_step=lambda step, steps, score: watcher.advance(step, _score_text(cell.task, score)),
        )  # fmt: skip
    results.add(_trial_line(cell, key, recipe, outcome))
    checkpoint.unlink(missing_ok=True)


def _trial_line(cell: Cell, key: str, recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    card = find(CARDS[cell.task]).card
    return {
        "kind": "trial",
        "key": key,
        "system": cell.system,
        "task": cell.task,
        "task_version": card.version,  # type: ignore[attr-defined]
        "metric": recipe.metric,
        "seed": recipe.seed,
        "lr": recipe.lr,
        "engine": "auto",
        "parameters": cell.parameters,
        "length": cell.data.seq_len,
        "state_bytes": cell.build(0).state_bytes(1, cell.data.seq_len),
        "chance": cell.data.chance,
        **asdict(outcome),
        **_versions(),
    }


def _time(cell: Cell, settings: Settings, results: Results, watcher: Watcher) -> None:
    model = cell.build(0)
    training = cell.data.seq_len
    lengths = sorted({*settings.lengths, training})
    todo = [n for n in lengths if f"speed/{cell.system}/{n}" not in results]
    if not todo:
        return
    with watcher.part(f"timing  {cell.system}", len(todo)):
        for place, n in enumerate(todo, 1):
            line: dict[str, Any] = {"train_tokens_per_s": None, "reason": None}
            if n == training:
                line["train_tokens_per_s"] = round(cell.rows * n / _step_s(cell, model, repeats=3), 1)
            line.update(measure_decoding(model, n, cell.model.vocab))
            watcher.advance(place, f"{n} tokens")
            results.add(
                {
                    "kind": "speed",
                    "key": f"speed/{cell.system}/{n}",
                    "system": cell.system,
                    "engine": "auto",
                    "length": n,
                }
                | line
                | _versions()
            )


def _step_s(cell: Cell, model: SequenceModel, *, repeats: int) -> float:
    batch = cell.data.build("train", cell.rows)
    return seconds(lambda: nll(model, batch).backward(), repeats=repeats)


@torch.no_grad()
def measure_decoding(model: SequenceModel, length: int, vocab: int, *, piece: int = 1024) -> dict[str, Any]:
    """prefill_tokens_per_s, decode_ms a token, state_bytes and peak_mib of one sequence of `length` tokens.

    The prompt goes in in pieces of `piece` tokens. decode_ms is the median of 16 steps after it.
    """
    model.eval()
    ids = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(0))
    model.prefill(ids[:, :32], model.init_state(1))
    held: dict[str, Any] = {}

    def prefill() -> None:
        start = time.perf_counter()
        state = model.init_state(1)
        for begin in range(0, length, piece):
            _, state = model.prefill(ids[:, begin : begin + piece], state)
        held.update(state=state, seconds=time.perf_counter() - start)

    peak = peak_mib(prefill)
    first = held["seconds"]
    if first < 2.0:
        prefill()
    state, steps = held["state"], []
    size = state.size_bytes
    for position in range(16):
        start = time.perf_counter()
        _, state = model.step(ids[:, position : position + 1], state)
        steps.append(time.perf_counter() - start)
    return {
        "prefill_tokens_per_s": round(length / min(first, held["seconds"]), 1),
        "decode_ms": round(statistics.median(steps) * 1e3, 4),
        "state_bytes": size,
        "peak_mib": peak,
    }


def _score_text(task: str, score: float) -> str:
    if math.isnan(score):
        return ""
    return f"{score:.3f} bits per byte" if task == "text" else f"{score:.3f} accuracy"


def _versions() -> dict[str, str]:
    return {"regard": __version__, "torch": torch.__version__, "hardware": hardware()}


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
