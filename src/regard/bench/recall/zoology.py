"""MQAR, multi-query associative recall: pairs are shown, then every key is asked once.

    k1 v1 k2 v2 … kD vD  . . k3 . . k1 . …        the label at a key asked is its value; the value is never shown again

Departs from the official generator: the filler is seeded like everything else (there it differs from run to run), and
`gap="from_key"` measures the gap from the key's own place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from regard.bench.task import IGNORED, SPLIT_SEEDS, Rows, Split
from regard.contract.card import TaskCard
from regard.contract.errors import OptionError

CARD = TaskCard(
    slug="zoology",
    title="Zoology: multi-query associative recall (MQAR)",
    paper="Zoology: Measuring and Improving Recall in Efficient Language Models",
    exports=("MQAR", "mqar_grid", "ar_hits", "ppl_split"),
    example="n=64",
    options={"vocab_size": 256, "seq_len": 64, "num_kv_pairs": 8},
    version="1",
    metric="accuracy at the asked positions",
    chance="2 / vocab_size",
)


@dataclass(frozen=True)
class MQAR:
    """Rows of recall (appendix E of the paper, and its official generator).

    vocab_size: V; keys are drawn from 1 … V/2 - 1, values from V/2 … V - 1, 0 is the blank. seq_len: N, even.
    num_kv_pairs: D, 4 D <= N. power_a: slots i = 1, 2, … are drawn with probability ~ i^(a - 1); 1 is uniform.
    random_non_queries: random tokens of the whole vocabulary in the place of blanks; one that happens to equal a key
    has no label. gap: "official" counts slots from the end of the context, "from_key" from the key's own place.
    Raises OptionError.
    """

    vocab_size: int = 8192
    seq_len: int = 64
    num_kv_pairs: int = 4
    power_a: float = 0.01
    random_non_queries: bool = True
    gap: Literal["official", "from_key"] = "official"

    def __post_init__(self) -> None:
        v, n, d = self.vocab_size, self.seq_len, self.num_kv_pairs
        if n % 2:
            raise OptionError(f"MQAR needs an even seq_len, not {n}")
        if d < 1 or 4 * d > n:
            raise OptionError(f"MQAR needs 4*num_kv_pairs <= seq_len; 4*{d} > {n}" if d > 0 else "MQAR needs a pair")
        if v <= n:
            raise OptionError(f"MQAR needs vocab_size > seq_len; {v} <= {n}")
        if d > v // 2 - 1:
            raise OptionError(f"MQAR needs num_kv_pairs <= vocab_size/2 - 1; {d} > {v // 2 - 1}")
        if self.power_a <= 0:
            raise OptionError(f"MQAR needs power_a > 0, not {self.power_a}")
        if self.gap not in ("official", "from_key"):
            raise OptionError(f"gap is {self.gap!r}; it is 'official' or 'from_key'")

    @property
    def chance(self) -> float:
        """Guessing among the values."""
        return 2 / self.vocab_size

    def build(self, split: Split, rows: int, seed: int = 0) -> Rows:
        """`rows` rows: inputs (rows, N) and targets (rows, N), IGNORED but at the D asked positions."""
        rng = np.random.Generator(np.random.PCG64(seed + SPLIT_SEEDS[split]))
        n, d, half = self.seq_len, self.num_kv_pairs, self.vocab_size // 2
        keys = 1 + _distinct(rng, rows, half - 1, d)
        values = half + _distinct(rng, rows, self.vocab_size - half, d)
        inputs = np.zeros((rows, n), dtype=np.int64)
        inputs[:, 0 : 2 * d : 2], inputs[:, 1 : 2 * d : 2] = keys, values
        places = 2 * d + 2 * self._slots(rng, rows)
        targets = np.full((rows, n), IGNORED, dtype=np.int64)
        row = np.arange(rows)[:, None]
        inputs[row, places], targets[row, places] = keys, values
        if self.random_non_queries:
            filler = rng.integers(0, self.vocab_size, size=inputs.shape)
            inputs = np.where(inputs == 0, filler, inputs)
        return Rows(torch.from_numpy(inputs), torch.from_numpy(targets))

    def _slots(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        space, d = (self.seq_len - 2 * self.num_kv_pairs) // 2, self.num_kv_pairs
        log_p = (self.power_a - 1) * np.log(np.arange(1, space + 1))
        if self.gap == "official":
            # the largest of log p + Gumbel noise, in falling order: a draw without replacement, one after the other
            noisy = log_p + rng.gumbel(size=(rows, space))
            return np.argsort(-noisy, axis=1)[:, :d]
        # one key after the other; key j stands D - 1 - j pairs before the end of the context, slots before that are none
        taken = np.zeros((rows, space), dtype=bool)
        slots = np.zeros((rows, d), dtype=np.int64)
        gaps = np.arange(1, space + 1)
        for j in range(d):
            own = (self.power_a - 1) * np.log(gaps + (d - 1 - j))
            noisy = np.where(taken, -np.inf, own + rng.gumbel(size=(rows, space)))
            slots[:, j] = noisy.argmax(1)
            taken[np.arange(rows), slots[:, j]] = True
        return slots


def mqar_grid(name: Literal["paper", "based", "small"]) -> tuple[MQAR, ...]:
    """The tasks of a published grid: "paper" (figure 2), "based" (tests of the BASED paper), or "small" for two cores."""
    if name == "paper":
        return tuple(MQAR(8192, n, d, random_non_queries=False) for n, d in ((64, 4), (128, 8), (256, 16), (512, 64)))
    if name == "based":
        cells = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
        return tuple(MQAR(8192, n, d, random_non_queries=False) for n, d in cells)
    if name == "small":
        return tuple(MQAR(256, n, d) for n, d in ((32, 4), (64, 8), (128, 16)))
    raise OptionError(f"there is no grid {name!r}; there are paper, based, small")


def ar_hits(ids: Tensor, *, training_counts: dict[tuple[int, int], int] | None = None, rare: int = 1250) -> Tensor:
    """Associative-recall hits: bool (B, N), True where (previous token, token) stood earlier in the row.

    training_counts: how often each bigram occurs in training; only those below `rare` count as recall. The paper's
    threshold is 1250.
    """
    out = torch.zeros_like(ids, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        seen: set[tuple[int, int]] = set()
        for position in range(1, len(row)):
            bigram = (row[position - 1], row[position])
            known = bigram in seen and (training_counts is None or training_counts.get(bigram, 0) < rare)
            out[b, position] = known
            seen.add(bigram)
    return out


def ppl_split(logits: Tensor, ids: Tensor, hits: Tensor) -> tuple[float, float]:
    """Perplexity of next tokens (on associative-recall hits, on the rest): logits (B, N, V), ids and hits (B, N).

    A part without any token is nan.
    """
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    on = hits[:, 1:].flatten()
    return float(losses[on].mean().exp()), float(losses[~on].mean().exp())


def _distinct(rng: np.random.Generator, rows: int, below: int, count: int) -> np.ndarray:
    """`count` different integers in [0, below) in each row, in random order."""
    # row by row: a table of the whole vocabulary for every row would not fit for the paper's grid
    return np.stack([rng.choice(below, size=count, replace=False) for _ in range(rows)])
