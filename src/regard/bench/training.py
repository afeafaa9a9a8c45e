"""One training run on a task: the same optimiser, batches and schedule for every system; survives being killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.bench.checkpoint import load_checkpoint, save_checkpoint
from regard.bench.task import IGNORED, Rows, Task, accuracy

EVALUATIONS = 16
CHECKPOINT_EVERY_S = 20.0
SOLVED = 0.99


@dataclass(frozen=True)
class Recipe:
    """How a run trains. steps; rows a step; lr: peak of a cosine after a tenth of warm-up, down to a tenth.

    metric: "bits_per_byte" (lower is better) or "accuracy". early_stop: end when accuracy passes 0.99.
    AdamW with betas 0.9, 0.95, weight decay 0.1 on matrices; gradients clipped to norm 1; float32.
    """

    steps: int
    rows: int
    lr: float
    seed: int
    metric: Literal["bits_per_byte", "accuracy"]
    system: str = ""
    validation_rows: int = 32
    test_rows: int = 128
    early_stop: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run gave. value: held-out test score (None if it diverged); curve: [tokens, seconds, validation score]."""

    value: float | None
    validation: float | None
    curve: list[list[float]]
    steps: int
    tokens: int
    seconds: float
    stopped: Literal["steps", "solved", "diverged"]


def train(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    checkpoint: Path,
    on_step: Callable[[int, int, float], None] = lambda step, steps, score: None,
) -> Outcome:
    """Train a sequence model on a task, from a checkpoint if there is one.

    Batches are a function of seed and step, so that a resumed run ends with the numbers of one that was never stopped.
    checkpoint: file that is rewritten every 20 s and at Ctrl-C. on_step(step, steps, latest validation score).
    """
    optimizer = _optimizer(model, recipe.lr)
    run = _Run(model, optimizer, checkpoint, recipe)
    run.restore()
    validation = task.build("validation", recipe.validation_rows, recipe.seed)
    every = max(recipe.steps // EVALUATIONS, 1)
    tokens_a_step = recipe.rows * validation.inputs.shape[1]
    stopped: Literal["steps", "solved", "diverged"] = "steps"
    saved = time.perf_counter()
    model.train()
    try:
        while run.step < recipe.steps:
            start = time.perf_counter()
            batch = task.build("train", recipe.rows, recipe.seed * 1_000_000 + run.step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _schedule(run.step, recipe.steps)
            loss = nll(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            finite = bool(torch.isfinite(loss))
            if finite:
                optimizer.step()
            run.step += 1
            run.seconds += time.perf_counter() - start
            if not finite:
                stopped = "diverged"
                break
            if run.step % every == 0 or run.step == recipe.steps:
                value = score(model, task, validation, recipe.metric)
                if not math.isfinite(value):
                    stopped = "diverged"
                    break
                run.curve.append([run.step * tokens_a_step, round(run.seconds, 3), value])
                if recipe.early_stop and recipe.metric == "accuracy" and value > SOLVED:
                    stopped = "solved"
                    break
            on_step(run.step, recipe.steps, run.curve[-1][2] if run.curve else float("nan"))
            if time.perf_counter() - saved > CHECKPOINT_EVERY_S:
                run.save()
                saved = time.perf_counter()
    except KeyboardInterrupt:
        run.save()
        raise
    final = None
    if stopped != "diverged":
        final = score(model, task, task.build("test", recipe.test_rows, recipe.seed), recipe.metric)
    last = run.curve[-1][2] if run.curve and stopped != "diverged" else None
    return Outcome(final, last, run.curve, run.step, run.step * tokens_a_step, round(run.seconds, 3), stopped)


def nll(model: Any, rows: Rows) -> Tensor:
    """Mean negative log-likelihood (nats) of the asked targets; the vocabulary is applied at those positions only."""
    asked = rows.targets != IGNORED
    return F.cross_entropy(model.head(model.hidden(rows.inputs)[asked]), rows.targets[asked])


@torch.no_grad()
def score(model: Any, task: Any, rows: Rows, metric: str) -> float:
    """The metric of a model on rows, in pieces of 32 rows. bits_per_byte needs `task.token_bytes`."""
    model.eval()
    nats = size = 0.0
    hits: list[float] = []
    for start in range(0, len(rows.inputs), 32):
        piece = Rows(rows.inputs[start : start + 32], rows.targets[start : start + 32])
        asked = piece.targets != IGNORED
        targets = piece.targets[asked]
        logits = model.head(model.hidden(piece.inputs)[asked])
        if metric == "accuracy":
            hits.extend([accuracy(logits, targets)] * len(targets))
        else:
            nats += float(F.cross_entropy(logits.double(), targets, reduction="sum"))
            size += float(task.token_bytes[targets].sum())
    model.train()
    return sum(hits) / len(hits) if metric == "accuracy" else nats / size / math.log(2)


class _Run:
    """The part of a run that a checkpoint holds."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, recipe: Recipe):
        self.model, self.optimizer, self.path, self.recipe = model, optimizer, path, recipe
        self.step = 0
        self.seconds = 0.0
        self.curve: list[list[float]] = []

    def save(self) -> None:
        facts = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        save_checkpoint(self.path, self.model, [self.optimizer], repr(self.recipe), facts)

    def restore(self) -> None:
        """Go on from the checkpoint; one that is damaged or of other settings is left aside, and the run starts anew."""
        facts = load_checkpoint(self.path, self.model, [self.optimizer], repr(self.recipe))
        if facts is not None:
            self.step, self.seconds, self.curve = facts["step"], facts["seconds"], facts["curve"]


def _optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def _schedule(step: int, steps: int) -> float:
    warm_up = max(steps // 10, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    share = (step - warm_up) / max(steps - warm_up, 1)
    return 0.1 + 0.45 * (1 + math.cos(share * math.pi))
