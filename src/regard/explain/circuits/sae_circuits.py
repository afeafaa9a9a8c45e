"""Circuits from discrete codes: heads that say something on prompts of a task which they never say on others.

    x = a head's output in the stream, over a prompt,    a = relu(W_e (x - b) + b_e),    x' = W_d a + b
    loss = mean (x' - x)^2 + l1 mean |a|_1,              code = the largest feature, none where all are 0
    node(h) = codes of h on positives and never on negatives,    edge(h, g) the same of pairs of codes in one prompt

One small autoencoder serves all heads; no gradient of the model and no patching is needed.
Departs from the released code: two sets of prompts of any sizes (there, halves of one); an input without any active feature
has no code (there, code 0); pads take no part in means; training prompts are drawn from both sets whatever their order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.card import ExplanationCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.optional import need
from regard.explain.heads.maps import HeadMap, real_keys
from regard.hosts.contributions import head_outputs
from regard.hosts.tape import Tape

CARD = ExplanationCard(
    slug="sae_circuits",
    title="Circuits from discrete codes of heads",
    paper="Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models",
    exports=("DiscreteSAE", "HeadCodes", "head_vectors", "circuit_roc", "CircuitROC"),
    takes={"positives": "heads", "negatives": "other heads"},
    calls="DiscreteSAE.fit",
    options={"n_features": 12, "steps": 20},
    figure=True,
    builds_on=("maps",),
)

# the code of an input without any active feature
NONE = -1


def head_vectors(model: Any, tape: Tape, *, reduce: Literal["mean", "last"] = "mean") -> Tensor:
    """What each head adds to the stream in each prompt, (B, L, H, C): the mean over its tokens, or at the last one.

    tape: with z of all layers and heads. Pads, known by the attention mask, take no part. Raises OptionError, Unsupported.
    """
    if reduce not in ("mean", "last"):
        raise OptionError(f'reduce is "mean" or "last", not {reduce!r}')
    found = []
    for layer in tape.layers("z"):
        heads = head_outputs(model, tape, layer).heads
        real = real_keys(tape, *heads.shape[:2]).to(heads.device)
        if reduce == "mean":
            found.append((heads * real[..., None, None]).sum(1) / real.sum(1)[:, None, None])
        else:
            last = heads.shape[1] - 1 - real.flip(1).to(torch.uint8).argmax(1)
            found.append(heads[torch.arange(len(heads), device=heads.device), last])
    if not found:
        raise OptionError('the tape holds no heads: record with sites=("z",)')
    return torch.stack(found, 1)


@dataclass(frozen=True, kw_only=True)
class DiscreteSAE:
    """A sparse autoencoder of head outputs, and how it is trained.

    n_features: of all heads together. l1: weight of sparsity. steps: full-batch steps of Adam. lr: its rate. seed: of weights
    and of the training prompts. Raises OptionError.
    """

    n_features: int = 200
    l1: float = 0.02
    steps: int = 500
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_features < 1 or self.steps < 0 or self.l1 < 0 or self.lr <= 0:
            raise OptionError(
                f"n_features, steps, l1 and lr are {self.n_features}, {self.steps}, {self.l1} and {self.lr}; they are at "
                "least 1, 0 and 0, and above 0"
            )

    def fit(self, positives: Tensor, negatives: Tensor, n_train: int = 10) -> HeadCodes:
        """Train on prompts of both sets, and read the codes of all.

        positives, negatives: (P, L, H, C), (Q, L, H, C), of `head_vectors`. Numbers of codes grow with prompts: compare heads
        within one fit. n_train: prompts that it is trained on, half of each set; they are among those read. Raises
        OptionError, ShapeError.
        """
        if positives.dim() != 4 or positives.shape[1:] != negatives.shape[1:]:
            raise ShapeError(
                f"positives are {tuple(positives.shape)}, negatives {tuple(negatives.shape)}; both are (prompts, L, H, C)"
            )
        sizes = (n_train - n_train // 2, n_train // 2)
        if n_train < 2 or sizes[0] > len(positives) or sizes[1] > len(negatives):
            raise OptionError(
                f"n_train is {n_train}, at least 2 and half of it from each set: there are {len(positives)} positives and "
                f"{len(negatives)} negatives"
            )
        drawn = [self._drawn(x, size) for x, size in zip((positives, negatives), sizes, strict=True)]
        weights = self._train(torch.cat(drawn).flatten(0, 2).float())
        codes = [_codes(x, weights) for x in (positives, negatives)]
        return HeadCodes(codes[0], codes[1], self.n_features, weights)

    def _drawn(self, x: Tensor, count: int) -> Tensor:
        """Prompts drawn by what they hold, so that their order does not matter."""
        generator = torch.Generator().manual_seed(self.seed)
        key = x.flatten(1).double().cpu()
        by = torch.randn(key.shape[1], generator=generator, dtype=torch.float64)
        return x[(key @ by).argsort()[torch.randperm(len(x), generator=generator)[:count]]]

    def _train(self, x: Tensor) -> SAEWeights:
        generator = torch.Generator().manual_seed(self.seed)
        width, features = x.shape[1], self.n_features
        bound = width**-0.5
        drawn = (
            F.normalize(torch.randn(features, width, generator=generator), dim=1),
            F.normalize(torch.randn(width, features, generator=generator), dim=1),
            (2 * torch.rand(features, generator=generator) - 1) * bound,
            torch.zeros(width),
        )
        encoder, decoder, bias, shared = (t.to(x.device).requires_grad_() for t in drawn)
        optimizer = torch.optim.Adam((encoder, decoder, bias, shared), lr=self.lr)
        for _ in range(self.steps):
            with torch.enable_grad():
                active = F.relu((x - shared) @ encoder.T + bias)
                loss = F.mse_loss(active @ decoder.T + shared, x) + self.l1 * active.sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
            with torch.no_grad():
                for rows in (encoder, decoder):
                    assert rows.grad is not None
                    # along the sphere on which the rows are kept
                    rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
                optimizer.step()
                for rows in (encoder, decoder):
                    rows.copy_(F.normalize(rows, dim=1))
        return SAEWeights(*(t.detach() for t in (encoder, decoder, bias, shared)))


@dataclass(frozen=True, eq=False)
class SAEWeights:
    """encoder (F, C), decoder (C, F), both with rows of norm 1; bias (F,); shared (C,), taken off inputs and put back."""

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    shared: Tensor

    def active(self, x: Tensor) -> Tensor:
        """Features (…, F) of inputs (…, C)."""
        return F.relu((x.float() - self.shared) @ self.encoder.T + self.bias)


@dataclass(frozen=True, eq=False)
class HeadCodes:
    """The code of every head in every prompt: positive (P, L, H), negative (Q, L, H), int64 below n_features, -1 for none."""

    positive: Tensor
    negative: Tensor
    n_features: int
    weights: SAEWeights | None = None

    @property
    def without(self) -> Tensor:
        """The share of prompts in which a head has no code, (L, H)."""
        return (torch.cat((self.positive, self.negative)) == NONE).float().mean(0)

    @property
    def unused(self) -> int:
        """How many features are the code of nothing."""
        used = torch.cat((self.positive.flatten(), self.negative.flatten())).unique()
        return self.n_features - int((used != NONE).sum())

    def node_scores(self, *, normalise: bool = False) -> Tensor:
        """How many codes each head has on positives and never on negatives, (L, H). normalise: over all its codes."""
        ours, theirs = (_seen(codes.flatten(1), self.n_features) for codes in (self.positive, self.negative))
        alone = (ours & ~theirs).sum(1).float()
        scores = alone / (ours | theirs).sum(1).clamp(min=1) if normalise else alone
        return scores.view(self.positive.shape[1:])

    def edge_scores(self, *, normalise: bool = True) -> Tensor:
        """The same of pairs of codes that two heads have in one prompt, (L H, L H), 0 on the diagonal.

        normalise: over the pairs seen on positives and those seen on negatives, together.
        """
        ours, theirs = self.positive.flatten(1), self.negative.flatten(1)
        count = ours.shape[1]
        scores = torch.zeros(count, count)
        for first in range(count):
            pairs = [_seen(_paired(codes, first, self.n_features), self.n_features**2) for codes in (ours, theirs)]
            alone = (pairs[0] & ~pairs[1]).sum(1).float()
            scores[first] = alone / (pairs[0].sum(1) + pairs[1].sum(1)).clamp(min=1) if normalise else alone
        return scores.fill_diagonal_(0)

    def from_edges(self, count: int, *, normalise: bool = True) -> Tensor:
        """How often each head stands in the best pairs, (L, H), pairs taken until `count` heads are named."""
        if count < 1:
            raise OptionError(f"count is a number of heads, at least 1, not {count}")
        scores = self.edge_scores(normalise=normalise)
        first, second = torch.triu_indices(len(scores), len(scores), offset=1)
        best = scores[first, second].argsort(descending=True, stable=True)
        named = torch.stack((first[best], second[best]), 1).flatten()[:count]
        return named.bincount(minlength=len(scores)).float().view(self.positive.shape[1:])

    def figure(self) -> Any:
        """A plotly figure of the node scores: layers down, heads across. Raises MissingExtra."""
        return HeadMap(self.node_scores(), "codes seen on positives alone", "codes").figure()


@dataclass(frozen=True, eq=False)
class CircuitROC:
    """How well scores find a circuit: false_positive, true_positive (T,) at falling thresholds (T,); auc, 1/2 by chance."""

    false_positive: Tensor
    true_positive: Tensor
    thresholds: Tensor
    auc: float

    def figure(self) -> Any:
        """A plotly figure of the curve. Raises MissingExtra."""
        go = need("plotly.graph_objects", "explain")
        figure = go.Figure(
            go.Scatter(x=self.false_positive.tolist(), y=self.true_positive.tolist(), mode="lines+markers")
        )
        figure.update_layout(
            title=f"area {self.auc:.3f}",
            xaxis={"title": "heads outside the circuit"},
            yaxis={"title": "heads of the circuit"},
        )
        return figure


def circuit_roc(scores: Tensor, truth: Tensor | Iterable[tuple[int, int]]) -> CircuitROC:
    """Scores (L, H) against the heads of a known circuit: bool (L, H), or (layer, head). Raises OptionError, ShapeError."""
    if isinstance(truth, Tensor):
        known = truth.bool()
    else:
        known = torch.zeros(scores.shape, dtype=torch.bool)
        for layer, head in truth:
            known[layer, head] = True
    if scores.dim() != 2 or known.shape != scores.shape:
        raise ShapeError(f"scores are {tuple(scores.shape)}, the circuit {tuple(known.shape)}; both are (L, H)")
    if not scores.isfinite().all():
        raise OptionError("the scores are not finite")
    inside = int(known.sum())
    if not 0 < inside < known.numel():
        raise OptionError(f"the circuit has {inside} of {known.numel()} heads: some must be in it and some not")
    values, mine = scores.flatten().double(), known.flatten().to(scores.device)
    thresholds = torch.cat((values.new_tensor([float("inf")]), values.unique().flip(0)))
    above = values >= thresholds[:, None]
    true, false = (above & mine).sum(1) / inside, (above & ~mine).sum(1) / (known.numel() - inside)
    return CircuitROC(false, true, thresholds, float(torch.trapezoid(true.double(), false.double())))


def _codes(x: Tensor, weights: SAEWeights) -> Tensor:
    """(prompts, L, H): the largest feature, NONE where all are 0."""
    found = []
    for some in x.split(64):
        value, code = weights.active(some).max(-1)
        found.append(code.masked_fill(value <= 0, NONE))
    return torch.cat(found)


def _paired(codes: Tensor, first: int, features: int) -> Tensor:
    """(prompts, heads): one number for the codes of head `first` and of each other, NONE where one has none."""
    mine = codes[:, first : first + 1]
    return (mine * features + codes).masked_fill((mine == NONE) | (codes == NONE), NONE)


def _seen(codes: Tensor, size: int) -> Tensor:
    """bool (heads, size): which codes (prompts, heads) occur."""
    seen = torch.zeros(codes.shape[1], size + 1, dtype=torch.bool, device=codes.device)
    # the last column takes those without a code
    seen.scatter_(1, codes.T.masked_fill(codes.T == NONE, size), True)
    return seen[:, :size]
