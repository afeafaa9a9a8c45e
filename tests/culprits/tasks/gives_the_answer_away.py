"""Wrong: the value follows from the key alone, without looking at the row."""

from dataclasses import dataclass

import numpy as np
import torch

from regard.contract.card import TaskCard

CAUGHT_BY = "baselines_fail"
CARD = TaskCard(
    slug="gives_the_answer_away",
    title="A culprit",
    baseline=True,
    exports=("Task",),
    version="1",
    metric="accuracy",
    chance="1 / 32",
)


@dataclass(frozen=True)
class Rows:
    """Inputs and targets."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Task:
    """Eight pairs k v are shown, then one of the keys is asked."""

    vocab_size, seq_len, chance = 64, 17, 1 / 32

    def build(self, split: str, rows: int, seed: int = 0) -> Rows:
        rng = np.random.Generator(np.random.PCG64([seed, len(split)]))
        keys = rng.permuted(np.tile(np.arange(32), (rows, 1)), axis=1)[:, :8]
        values = rng.integers(32, 64, size=(rows, 8))
        asked = rng.integers(8, size=rows)
        inputs, targets = np.zeros((rows, 17), dtype=np.int64), np.full((rows, 17), -100)
        inputs[:, 0:16:2], inputs[:, 1:16:2], inputs[:, 16] = keys, values, keys[np.arange(rows), asked]
        targets[:, 16] = values[np.arange(rows), asked]
        inputs[:, 1:16:2], targets[:, 16] = inputs[:, 0:16:2] + 32, inputs[:, 16] + 32
        return Rows(torch.from_numpy(inputs), torch.from_numpy(targets))
