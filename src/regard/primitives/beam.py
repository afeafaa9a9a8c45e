"""Beam search one step at a time, for any model: groups that avoid each other, ends, phrases that must come.

    group g keeps the best of  log p(y_1 .. y_t) - penalty(y, what groups before g hold),   y_t over its beams' continuations

The penalty steers the choice; a hypothesis is kept with its log-likelihood. A loop:

    beams = start_beams(batch, width, groups)
    while not beams.closed.all():
        beams = beam_step(model(beams.tokens), beams, width=width, groups=groups, ends=(2,))
        cache = cache[beams.flat_parents()]
    found = finish_beams(beams).hypotheses()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError
from regard.primitives.state import State

# (hypotheses of earlier groups (B, P, t), own (B, K, t - 1), V) -> what is taken off, broadcastable to (B, K, V)
Penalty = Callable[[Tensor, Tensor, int], Tensor]
_NOTHING = float("-inf")


@dataclass(frozen=True)
class Beams(State):
    """The state of a search: B rows, K beams of G groups side by side, T tokens so far.

    tokens: int64 (B, K, T), hypotheses that go on. log_p: (B, K), their log-likelihoods, -inf for beams that hold nothing.
    score: (B, K), log_p and the penalties that were added up. parents: int64 (B, K), which beam of the step before each goes
    on from. progress: int64 (B, K), how far each is in what must come. done: int64 (B, K, T), hypotheses that ended, -1
    behind their end; done_log_p (B, K), -inf where there is none; done_score (B, K), by which they are ranked.
    closed: bool (B, G), groups that no longer change what is done.
    """

    tokens: Tensor
    log_p: Tensor
    score: Tensor
    parents: Tensor
    progress: Tensor
    done: Tensor
    done_log_p: Tensor
    done_score: Tensor
    closed: Tensor

    def hypotheses(self) -> list[list[Hypothesis]]:
        """What ended, for each row, best first; equal ones in the order of their groups."""
        each = self.log_p.shape[1] // self.closed.shape[1]
        rows = []
        for tokens, log_p, score in zip(self.done, self.done_log_p, self.done_score, strict=True):
            found = [
                Hypothesis(tuple(int(t) for t in tokens[i] if t >= 0), float(log_p[i]), float(score[i]), i // each)
                for i in range(len(log_p))
                if log_p[i] > _NOTHING
            ]
            rows.append(sorted(found, key=lambda hypothesis: -hypothesis.score))
        return rows

    def flat_parents(self) -> Tensor:
        """`parents` as rows of a batch of B K, for caches: int64 (B K,)."""
        batch, width = self.parents.shape
        first = torch.arange(batch, device=self.parents.device).unsqueeze(1) * width
        return (self.parents + first).flatten()


@dataclass(frozen=True)
class Hypothesis:
    """Tokens without the prompt, with their end; log-likelihood; score by which it is ranked; group."""

    tokens: tuple[int, ...]
    log_p: float
    score: float
    group: int


@dataclass(frozen=True)
class Phrases:
    """One of these phrases must come, begun after at most `before` other tokens; with it a hypothesis ends.

    Raises OptionError for no phrase, or an empty one.
    """

    phrases: tuple[tuple[int, ...], ...]
    before: int = 0

    def __post_init__(self) -> None:
        if not self.phrases or not all(self.phrases):
            raise OptionError("there must be a phrase, and no phrase may be empty")
        if self.before < 0:
            raise OptionError(f"before is a number of tokens, not {self.before}")

    @property
    def longest(self) -> int:
        """After so many tokens every hypothesis has ended."""
        return self.before + max(map(len, self.phrases))

    def ending(self, tokens: Sequence[int]) -> int:
        """How many tokens the phrase has that these end with, and that began in time; 0 if none does."""
        fits = (len(p) for p in self.phrases if tuple(tokens[-len(p) :]) == p and len(tokens) - len(p) <= self.before)
        return max(fits, default=0)

    @cached_property
    def nodes(self) -> dict[tuple[int, ...], int]:
        """Beginnings of phrases, the empty one first -> their numbers."""
        found = {phrase[:n]: None for phrase in self.phrases for n in range(len(phrase))}
        return {node: i for i, node in enumerate(sorted(found, key=len))}

    @cached_property
    def _paths(self) -> list[tuple[int, ...]]:
        return list(self.nodes)

    def continuing(self, node: int) -> set[int]:
        """The tokens that go on with a phrase from a node, or begin one."""
        found = set()
        for path in {self._paths[node][n:] for n in range(len(self._paths[node]) + 1)} & self.nodes.keys():
            found |= {p[len(path)] for p in self.phrases if p[: len(path)] == path and len(p) > len(path)}
        return found

    def step(self, node: int, token: int, length: int) -> tuple[int, int] | None:
        """(node, tokens still missing) after a token, the hypothesis then `length` long; None if it came too late."""
        path = (*self._paths[node], token)
        for n in range(len(path)):
            if path[n:] in self.phrases and length - len(path) + n <= self.before:
                return 0, 0
        while path not in self.nodes:
            path = path[1:]
        if length - len(path) > self.before:
            return None
        return self.nodes[path], min(len(p) - len(path) for p in self.phrases if p[: len(path)] == path)


def start_beams(
    batch: int, width: int, groups: int = 1, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Beams:
    """The state before the first step: one empty hypothesis in each group. Raises OptionError."""
    _check(width, groups)
    log_p = torch.full((batch, groups, width // groups), _NOTHING, device=device, dtype=dtype)
    log_p[:, :, 0] = 0
    log_p = log_p.flatten(1)
    empty = torch.empty(batch, width, 0, dtype=torch.int64, device=device)
    none, zero = torch.full_like(log_p, _NOTHING), torch.zeros_like(log_p, dtype=torch.int64)
    return Beams(
        empty, log_p, log_p, zero, zero, empty, none, none,
        torch.zeros(batch, groups, dtype=torch.bool, device=device),
    )  # fmt: skip


def beam_step(
    log_p: Tensor, state: Beams, *, width: int, groups: int = 1, penalty: Penalty | None = None,
    constraint: Phrases | None = None, accumulate: bool = False, ends: Sequence[int] = (), length_penalty: float = 1.0,
    early: bool = False,
) -> Beams:  # fmt: skip
    """Every beam goes on by a token: the state after it.

    log_p: log-probabilities of the next token, (B, K, V), or (B K, V). width: beams of a row, K; groups: of width / groups
    beams each, which choose one after the other. penalty: what a group's continuations lose for what the groups before it
    now hold; ends lose nothing. accumulate: penalties of earlier steps count on, and rank what ended. constraint: what must
    come. ends: tokens that end a hypothesis. length_penalty: those that ended are ranked by log p / length ** this.
    early: a group closes as soon as width / groups of its hypotheses ended; else when no beam is better than the worst of
    these. Raises ShapeError, OptionError.
    """
    _check(width, groups)
    if state.log_p.shape[1] != width or state.closed.shape[1] != groups:
        raise ShapeError(
            f"the state has {state.log_p.shape[1]} beams in {state.closed.shape[1]} groups, not {width} in {groups}"
        )
    batch = state.log_p.shape[0]
    log_p = log_p.unflatten(0, (batch, width)) if log_p.dim() == 2 and log_p.shape[0] == batch * width else log_p
    if log_p.dim() != 3 or log_p.shape[:2] != (batch, width):
        raise ShapeError(f"log_p is {tuple(log_p.shape)}; ({batch}, {width}, V) is needed")
    log_p = log_p.to(torch.promote_types(log_p.dtype, state.log_p.dtype))
    each, vocab = width // groups, log_p.shape[-1]
    made: list[Beams] = []
    last = torch.tensor([end for end in ends if 0 <= end < vocab], dtype=torch.int64, device=log_p.device)
    for group in range(groups):
        part = _group(state, group, each)
        steering = part.score.unsqueeze(-1) + log_p[:, group * each : (group + 1) * each]
        if penalty is not None and made:
            taken = penalty(torch.cat([_held(earlier) for earlier in made], 1), part.tokens, vocab).expand_as(steering)
            steering = steering - taken.to(steering.dtype).index_fill(-1, last, 0)
        chosen = _choose(steering, last) if constraint is None else _choose_towards(steering, part, constraint, last)
        made.append(
            _advance(
                part, log_p[:, group * each : (group + 1) * each], steering, chosen, accumulate, length_penalty, early
            )
        )
    beams = _join(made)
    first = torch.arange(groups, device=log_p.device).repeat_interleave(each) * each
    return replace(beams, parents=beams.parents + first)


def finish_beams(state: Beams, *, length_penalty: float = 1.0) -> Beams:
    """End the hypotheses that go on, where their group is still open: the state with them among the done ones."""
    groups = state.closed.shape[1]
    each = state.log_p.shape[1] // groups
    made = []
    for group in range(groups):
        part = _group(state, group, each)
        score = part.score.masked_fill(part.closed, _NOTHING) / max(state.tokens.shape[-1], 1) ** length_penalty
        log_p = part.log_p.masked_fill(part.closed, _NOTHING)
        made.append(replace(_with_done(part, part.tokens, log_p, score), closed=torch.ones_like(part.closed)))
    return _join(made)


def hamming(earlier: Tensor, own: Tensor, vocab: int) -> Tensor:
    """How many of the earlier hypotheses chose each token now: (B, 1, V). The paper's Hamming diversity."""
    return _counts(earlier[..., -1], torch.ones_like(earlier[..., -1], dtype=torch.float32), vocab).unsqueeze(1)


def cumulative(earlier: Tensor, own: Tensor, vocab: int) -> Tensor:
    """`hamming` that backs off from hypotheses that have gone other ways: (B, K, V).

    Each earlier hypothesis counts exp(-the positions at which it and the continuation differ), as in the paper with
    temperature 1, but for each pair of hypotheses by itself.
    """
    differ = (earlier[:, None, :, :-1] != own[:, :, None]).sum(-1)
    # a hypothesis that stands in nobody's way is all -1
    weight = torch.exp(-differ.float()) * (earlier[:, None, :, -1] >= 0)
    same = torch.stack([_counts(earlier[..., -1], w, vocab) for w in weight.unbind(1)], 1)
    # a token that differs as well counts 1 / e of one that agrees
    return same + (weight.sum(-1, keepdim=True) - same) / torch.e


def bigrams(earlier: Tensor, own: Tensor, vocab: int) -> Tensor:
    """How often the pair of tokens that a continuation ends with stands in the earlier hypotheses: (B, K, V)."""
    if own.shape[-1] == 0:
        return earlier.new_zeros((1, 1, vocab), dtype=torch.float32)
    first, second = earlier[..., :-1].flatten(1), earlier[..., 1:].flatten(1)
    here = (first.unsqueeze(1) == own[..., -1:]).float()
    return torch.stack([_counts(second, h, vocab) for h in here.unbind(1)], 1)


def _held(group: Beams) -> Tensor:
    """The hypotheses of a group that go on; all -1 are those that stand in nobody's way."""
    return group.tokens.masked_fill((group.closed | (group.log_p == _NOTHING)).unsqueeze(-1), -1)


def _counts(tokens: Tensor, weight: Tensor, vocab: int) -> Tensor:
    """The weights (B, P) added up at their tokens (B, P), -1 for none: (B, V)."""
    made = weight.new_zeros(tokens.shape[0], vocab)
    return made.scatter_add(1, tokens.clamp(min=0), weight * (tokens >= 0))


@dataclass(frozen=True)
class _Chosen:
    """Continuations as places in (K V): those that go on, with their progress, and those that end. -1: none."""

    on: Tensor
    progress: Tensor
    ended: Tensor


def _choose(steering: Tensor, last: Tensor) -> _Chosen:
    """The best that do not end, and those that end among as many of the best."""
    each = steering.shape[1]
    on = steering.index_fill(-1, last, _NOTHING).flatten(1).topk(each).indices
    best = steering.flatten(1).topk(each).indices
    ended = torch.isin(best % steering.shape[-1], last)
    return _Chosen(on, torch.zeros_like(on), best.masked_fill(~ended, -1))


def _choose_towards(steering: Tensor, part: Beams, constraint: Phrases, last: Tensor) -> _Chosen:
    """A share of the beams for every distance from the end of a phrase, so that those under way are not crowded out."""
    batch, each, vocab = steering.shape
    length, never = part.tokens.shape[-1] + 1, set(last.tolist())
    # what is likely, and beside it what leads on
    likely = steering.flatten(1).topk(min(2 * each, each * vocab)).indices.tolist()
    progress = part.progress.tolist()
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for row in range(batch):
        places = set(likely[row])
        for beam in range(each):
            places |= {beam * vocab + token for token in constraint.continuing(progress[row][beam]) if token < vocab}
        order = sorted(places)
        values = steering[row].flatten()[torch.tensor(order, device=steering.device)].tolist()
        ended: list[tuple[float, int]] = []
        queues: dict[int, list[tuple[float, int, int]]] = {}
        for value, place in zip(values, order, strict=True):
            if value == _NOTHING:
                continue
            after = constraint.step(progress[row][place // vocab], place % vocab, length)
            if after is None:
                continue
            node, missing = after
            if missing == 0:
                ended.append((value, place))
            elif place % vocab not in never:
                queues.setdefault(missing, []).append((value, place, node))
        on = _in_turn(queues, each)
        stop = [place for _, place in sorted(ended, key=lambda one: -one[0])[:each]]
        rows.append(([place for place, _ in on], [node for _, node in on], stop))
    return _Chosen(
        *(_padded([row[i] for row in rows], each, fill, steering.device) for i, fill in enumerate((-1, 0, -1)))
    )


def _in_turn(queues: dict[int, list[tuple[float, int, int]]], count: int) -> list[tuple[int, int]]:
    """The best of each queue in turn, the queue with the least missing first: (place, node)."""
    waiting = [sorted(queues[missing], key=lambda one: one[0]) for missing in sorted(queues)]
    taken: list[tuple[int, int]] = []
    while len(taken) < count and any(waiting):
        for queue in waiting:
            if queue and len(taken) < count:
                taken.append(queue.pop()[1:])
    return taken


def _padded(rows: list[list[int]], width: int, fill: int, device: torch.device) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)


def _advance(
    part: Beams, log_p: Tensor, steering: Tensor, chosen: _Chosen, accumulate: bool, length_penalty: float, early: bool
) -> Beams:
    """One group after the step."""
    vocab, length = log_p.shape[-1], part.tokens.shape[-1] + 1
    total = (part.log_p.unsqueeze(-1) + log_p).flatten(1)
    score = steering.flatten(1) if accumulate else total

    def take(places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        there = places.clamp(min=0)
        parents = there // vocab
        tokens = part.tokens.gather(1, parents.unsqueeze(-1).expand(-1, -1, length - 1))
        tokens = torch.cat((tokens, (there % vocab).unsqueeze(-1)), -1)
        nobody = places < 0
        return (
            parents,
            tokens,
            total.gather(1, there).masked_fill(nobody, _NOTHING),
            score.gather(1, there).masked_fill(nobody, _NOTHING),
        )

    padded = replace(part, done=F.pad(part.done, (0, 1), value=-1))
    _, ended, ended_log_p, ended_score = take(chosen.ended.masked_fill(part.closed[:, :1], -1))
    made = _with_done(padded, ended, ended_log_p, ended_score / length**length_penalty)
    parents, tokens, on_log_p, on_score = take(chosen.on)
    made = replace(
        made, tokens=tokens, log_p=on_log_p, score=on_score, parents=parents, progress=chosen.progress
    )  # fmt: skip
    full = (made.done_log_p > _NOTHING).all(1, keepdim=True)
    best = on_score.amax(1, keepdim=True) / length**length_penalty
    shut = full if early else full & (best <= made.done_score.amin(1, keepdim=True))
    # beams that hold nothing can come to nothing
    return replace(made, closed=part.closed | shut | (best == _NOTHING))


def _with_done(part: Beams, tokens: Tensor, log_p: Tensor, score: Tensor) -> Beams:
    """The best of what was done and what ended now."""
    all_score = torch.cat((part.done_score, score), 1)
    best = all_score.topk(part.log_p.shape[1]).indices
    all_tokens = torch.cat((part.done, tokens), 1)
    return replace(
        part,
        done=all_tokens.gather(1, best.unsqueeze(-1).expand(-1, -1, all_tokens.shape[-1])),
        done_log_p=torch.cat((part.done_log_p, log_p), 1).gather(1, best),
        done_score=all_score.gather(1, best),
    )


def _group(state: Beams, group: int, each: int) -> Beams:
    """The beams of one group alone; `closed` for each of its beams."""
    cut = {f.name: getattr(state, f.name)[:, group * each : (group + 1) * each] for f in fields(state)}
    return replace(state, **{**cut, "closed": state.closed[:, group : group + 1].expand(-1, each)})


def _join(parts: Sequence[Beams]) -> Beams:
    joined: dict[str, Any] = {f.name: torch.cat([getattr(p, f.name) for p in parts], 1) for f in fields(parts[0])}
    return replace(parts[0], **{**joined, "closed": torch.stack([p.closed[:, 0] for p in parts], 1)})


def _check(width: int, groups: int) -> None:
    if width < 1 or groups < 1 or width % groups:
        raise OptionError(f"{width} beams do not fall into {groups} groups of equal size; both are at least 1")
