"""What a benchmark task is: seeded rows with labels, a metric, a chance level, a version."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Split = Literal["train", "validation", "test"]
# seeds of the splits lie far apart: train seed s, test seed s + 10 000
SPLIT_SEEDS: dict[str, int] = {"train": 0, "validation": 5_000, "test": 10_000}
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """inputs: int64 (n, N). targets: int64 (n, N), IGNORED where nothing is asked."""

    inputs: Tensor
    targets: Tensor


class Task(Protocol):
    """A task that is generated: `build` makes rows, the same for the same split, count and seed."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def chance(self) -> float:
        """The score of guessing."""
        ...

    def build(self, split: Split, rows: int, seed: int = 0) -> Rows: ...


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Share of asked positions whose likeliest token is the target: logits (…, V), targets (…)."""
    asked = targets != IGNORED
    return float((logits.argmax(-1)[asked] == targets[asked]).float().mean())


def fingerprint(task: Task) -> str:
    """sha256 over the first 64 training rows of seed 0: equal on every machine, or the task has changed."""
    rows = task.build("train", 64)
    digest = hashlib.sha256()
    for tensor in (rows.inputs, rows.targets):
        digest.update(tensor.to(torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()
