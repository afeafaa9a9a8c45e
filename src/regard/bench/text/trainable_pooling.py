"""Which pool, and which attention, suits a model: the paper's five set-ups on one base and the same pairs of texts.

    last token, causal;  last layer or all layers pooled by learned queries, causal or bidirectional

The mean of a bidirectional model stands beside them. Scores are reciprocal ranks, one a query; two set-ups are compared
query by query. Departs from the paper: a paired test that flips signs instead of Wilcoxon's, over queries instead of data
sets; the base is frozen unless it is told to be trained, whole and without LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard import LastLayerPool, MultiLayerPool
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.transformers.anatomy import anatomy
from regard.models.sequence.nv_embed import TextEmbedder, TextTokens
from regard.primitives.contrastive import retrieval_nce

SetUp = Literal[
    "last_causal", "last_layer_causal", "all_layers_causal", "mean", "last_layer_bidirectional", "all_layers_bidirectional"
]  # fmt: skip
# set-up -> (what pools, whether tokens see those after them)
SET_UPS: dict[str, tuple[str, bool]] = {
    "last_causal": ("last", False), "last_layer_causal": ("last_layer", False), "all_layers_causal": ("all_layers", False),
    "mean": ("mean", True), "last_layer_bidirectional": ("last_layer", True),
    "all_layers_bidirectional": ("all_layers", True),
}  # fmt: skip

# cosines nearer than this are the same
_LEVEL = 1e-6


@dataclass(frozen=True)
class TextPairs:
    """A retrieval task: pairs (query, the text that answers it) to train on and to test with.

    instruction: goes before the queries. Raises OptionError for fewer than two pairs, or a pair in both parts.
    """

    name: str
    train: Sequence[tuple[str, str]]
    test: Sequence[tuple[str, str]]
    instruction: str | None = None

    def __post_init__(self) -> None:
        if len(self.train) < 2 or len(self.test) < 2:
            raise OptionError(f"{self.name}: two pairs are the least to train and to test with")
        both = set(self.train) & set(self.test)
        if both:
            raise OptionError(f"{self.name}: {next(iter(both))} is trained on and tested with")


@dataclass(frozen=True, eq=False)
class PoolingMatrix:
    """scores: (set-up, task) -> the reciprocal rank of each test query's answer among all answers, (Q,) float32."""

    scores: dict[tuple[str, str], Tensor]

    def mean(self, set_up: str, task: str) -> float:
        """The mean reciprocal rank. Raises OptionError for what was not measured."""
        return float(self._of(set_up, task).mean())

    def recall(self, set_up: str, task: str) -> float:
        """The share of queries whose answer came first."""
        return float((self._of(set_up, task) == 1).float().mean())

    def p_value(self, one: str, other: str, task: str) -> float:
        """How often chance alone would part two set-ups as far as they are, two-sided, query by query."""
        return paired_p(self._of(one, task), self._of(other, task))

    def rows(self) -> list[dict[str, Any]]:
        """One row a task and set-up: mrr, recall at 1, and the p-value against the best set-up of the task."""
        found: list[dict[str, Any]] = []
        for task in dict.fromkeys(task for _, task in self.scores):
            names = [name for name, t in self.scores if t == task]
            best = max(names, key=lambda name: self.mean(name, task))
            found += [
                {
                    "task": task, "set_up": name, "mrr": self.mean(name, task), "recall_at_1": self.recall(name, task),
                    "p_against_best": self.p_value(name, best, task),
                }
                for name in names
            ]  # fmt: skip
        return found

    def _of(self, set_up: str, task: str) -> Tensor:
        if (set_up, task) not in self.scores:
            raise OptionError(f"{set_up!r} on {task!r} was not measured; there are {', '.join(map(str, self.scores))}")
        return self.scores[set_up, task]


def pooling_matrix(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TextPairs],
    *,
    set_ups: Sequence[SetUp] | None = None,
    train_model: bool = False,
    steps: int = 100,
    batch_size: int = 32,
    lr: float = 1e-3,
    temperature: float = 0.05,
    num_latents: int = 32,
    heads: int = 4,
    seed: int = 0,
) -> PoolingMatrix:
    """Train each set-up on each task's pairs from the same weights, and rank the answers of its test queries.

    model, tokenizer: of transformers; the model stays as it is. set_ups: None for all that it can run: an encoder has no
    causal ones. train_model: train a copy of it too; else the pools alone, where they have weights. steps: of `batch_size`
    pairs, whose other answers are the negatives. Raises OptionError; Unsupported for causal set-ups of an encoder.
    """
    causal = bool(getattr(anatomy(model).main.layers[0].attention, "is_causal", True))
    known = [name for name, (_, bidirectional) in SET_UPS.items() if causal or bidirectional]
    chosen = known if set_ups is None else list(set_ups)
    for name in chosen:
        if name not in SET_UPS:
            raise OptionError(f"there is no set-up {name!r}; there are {', '.join(SET_UPS)}")
        if name not in known:
            raise Unsupported(f"{type(model).__name__} is not causal, so {name!r} is none of its set-ups")
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise OptionError(f"tasks need names of their own, and at least one: {names}")
    scores = {}
    for task in tasks:
        for name in chosen:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                embedder = _Embedder(model, tokenizer, name, train_model, num_latents, heads)
                embedder.fit(task, steps, batch_size, lr, temperature, seed)
            scores[name, task.name] = embedder.ranks(task, batch_size)
    return PoolingMatrix(scores)


def paired_p(one: Tensor, other: Tensor, *, draws: int = 10_000, seed: int = 0) -> float:
    """The two-sided p-value of a paired difference (Q,), by flipping the sign of each pair's at random; 1 if all are 0.

    draws: how many flips, so p is at least 1 / (draws + 1). Raises OptionError for other numbers of pairs.
    """
    if one.shape != other.shape or one.dim() != 1:
        raise OptionError(f"pairs have one axis and equal lengths, not {tuple(one.shape)} and {tuple(other.shape)}")
    gap = (one - other).double()
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (draws, len(gap)), generator=generator, dtype=torch.int8).double() * 2 - 1
    # sums in another order differ in the last bits
    as_far = (signs @ gap).abs() >= gap.sum().abs() - 1e-9
    return (1 + int(as_far.sum())) / (1 + draws)


class _Embedder:
    """One set-up: a copy of the model under a pool."""

    def __init__(self, model: Any, tokenizer: Any, set_up: str, train_model: bool, num_latents: int, heads: int):
        kind, bidirectional = SET_UPS[set_up]
        config = model.config.get_text_config()
        pool: Any = kind
        if kind == "all_layers":
            pool = MultiLayerPool(
                config.hidden_size, num_layers=config.num_hidden_layers, num_latents=num_latents, heads=heads,
                of="mean" if bidirectional else "last",
            )  # fmt: skip
        elif kind == "last_layer":
            pool = LastLayerPool(config.hidden_size, num_latents=num_latents, heads=heads)
        base = copy.deepcopy(model).requires_grad_(train_model)
        self.embedder = TextEmbedder(base, tokenizer, pool, bidirectional)
        # under a causal mask the last token alone has read the text
        self.last_alone = kind == "last_layer" and not bidirectional

    def fit(self, task: TextPairs, steps: int, batch_size: int, lr: float, temperature: float, seed: int) -> None:
        weights: list[nn.Parameter] = [p for p in self.embedder.parameters() if p.requires_grad]
        if not weights:
            return
        optimiser = torch.optim.AdamW(weights, lr=lr)
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            rows = torch.randperm(len(task.train), generator=generator)[:batch_size].tolist()
            queries = self._embed([task.train[i][0] for i in rows], task.instruction)
            answers = self._embed([task.train[i][1] for i in rows], None)
            loss = retrieval_nce(queries, answers, temperature=temperature)
            optimiser.zero_grad()
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimiser.step()

    @torch.no_grad()
    def ranks(self, task: TextPairs, batch_size: int) -> Tensor:
        """The reciprocal rank of each query's answer (Q,); the mean of the places, where others score the same."""
        parts = []
        for texts, instruction in (([q for q, _ in task.test], task.instruction), ([a for _, a in task.test], None)):
            starts = range(0, len(texts), batch_size)
            parts.append(torch.cat([self._embed(texts[i : i + batch_size], instruction) for i in starts]))
        scores = parts[0] @ parts[1].T
        gap = scores - scores.diagonal()[:, None]
        # the same text in another batch differs in its last bits
        above, level = (gap > _LEVEL).sum(1), (gap.abs() <= _LEVEL).sum(1)
        return 1 / (above + (level + 1) / 2)

    def _embed(self, texts: list[str], instruction: str | None) -> Tensor:
        made: TextTokens = self.embedder.tokens(texts, instruction)
        pooled = made.pooled
        if self.last_alone:
            places = torch.arange(pooled.shape[1], device=pooled.device)
            pooled = places == (places * pooled).argmax(1, keepdim=True)
        return self.embedder(made.ids, padding=made.padding, pooled=pooled)
