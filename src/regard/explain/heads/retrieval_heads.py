"""Retrieval heads: those that look at a token of the context just when the model copies it.

    hit(step) = the key with the largest weight of the step's row lies in the needle, and is the token that comes next
    score     = different needle tokens hit / needle tokens,      the mean over cases whose answer recalls the needle

Departs from the released code: the needle is known by its place, not found again by the likeness of its ids; a token of
the needle counts once however often it is written (`count="steps"` counts steps, as the code does); an answer ends where
the model ends it, and the whole prompt is one pass (there its last token is decoded).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Seen, open_session
from regard.contract.card import ExplanationCard, InterventionCard
from regard.contract.errors import OptionError, RegardError, Unsupported
from regard.explain.heads.maps import HeadMap
from regard.hosts.text import Span, cut

CARD = ExplanationCard(
    slug="retrieval_heads",
    title="Retrieval heads",
    paper="Retrieval Head Mechanistically Explains Long-Context Factuality",
    exports=("retrieval_scores", "HeadScores", "RecallCase", "token_recall"),
    reads="llama",
    takes={"model": "model", "cases": "cases"},
    options={"tokenizer": None, "tokens": 16},
    figure=True,
    builds_on=("maps",),
)

Count = Literal["set", "steps"]
Accept = Callable[[Sequence[int], Sequence[int]], bool]


class NotRecalled(RegardError):
    """No answer recalled its needle, so nothing says where needles are fetched."""


class Case(Protocol):
    """What is asked of a case; those of the needle task are ones."""

    @property
    def prompt(self) -> Any: ...

    @property
    def needle(self) -> Span: ...


@dataclass(frozen=True, eq=False)
class RecallCase:
    """A prompt and what its answer is to copy.

    prompt: text, or ids int64 (N,). needle: [start, end) in characters of the text, or in places of the ids.
    """

    prompt: str | Tensor
    needle: Span


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How often each head fetched what was copied, (L, H) between 0 and 1 (above 1 is possible with count="steps").

    scores: the mean over the cases that count. cases: (cases, L, H), of all of them. counted: bool (cases,), whose answers
    recall the needle. reach: (L,), in how many of the counted cases a layer could see any of the needle at all; with 0, say
    behind a sliding window, its scores say nothing. answers: the ids that were written. threshold: what a retrieval head has.
    """

    scores: Tensor
    cases: Tensor
    counted: Tensor
    reach: Tensor
    answers: tuple[tuple[int, ...], ...]
    threshold: float

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The retrieval heads, (layer, head), the best first."""
        return self._map().above(self.threshold)

    @property
    def blind(self) -> list[int]:
        """The layers that never saw a needle."""
        return [layer for layer, share in enumerate(self.reach.tolist()) if share == 0]

    def top(self, count: int) -> list[tuple[int, int]]:
        """The (layer, head) with the largest scores, the best first."""
        return self._map().top(count)

    def others(self, count: int, *, leave_out: Sequence[tuple[int, int]] = (), seed: int = 0) -> list[tuple[int, int]]:
        """As many heads drawn from those below the threshold, to be pruned for comparison.

        leave_out: heads that must not be drawn. Heads that carry a key to its value look at no needle and break recall too
        (`leave_out` is for them). Raises OptionError where there are too few.
        """
        taken = {*self.heads, *leave_out}
        free = [place for place in self.top(self.scores.numel()) if place not in taken]
        if len(free) < count:
            raise OptionError(f"{count} heads are asked for, and {len(free)} are left")
        generator = torch.Generator().manual_seed(seed)
        return [free[i] for i in torch.randperm(len(free), generator=generator)[:count].tolist()]

    def to_budget(self, mean: int, *, least: int = 0, key_heads: int | None = None) -> Tensor:
        """Keys to keep for each key head, int64 (L, G), `mean` on average: `least` each, the rest by the scores.

        key_heads: G, the model's; each is worth its best query head. With no score anywhere all get the same. Raises
        OptionError.
        """
        layers, heads = self.scores.shape
        groups = heads if key_heads is None else key_heads
        if groups < 1 or heads % groups:
            raise OptionError(f"{heads} heads do not share {groups} key heads evenly")
        if not 0 <= least <= mean:
            raise OptionError(f"least is 0 to the mean, {mean}, not {least}")
        worth = self.scores.double().unflatten(1, (groups, -1)).amax(-1).flatten()
        if worth.sum() == 0:
            worth = torch.ones_like(worth)
        room = (mean - least) * len(worth)
        share = worth / worth.sum() * room
        keys = share.floor().long()
        # the largest remainders get what rounding left over
        left = (share - keys).argsort(descending=True, stable=True)[: room - int(keys.sum())]
        keys[left] += 1
        return (least + keys).view(layers, groups)

    def figure(self) -> Any:
        """A plotly figure: layers down, heads across. Raises MissingExtra."""
        figure = self._map().figure()
        blind = f", layers {self.blind} saw no needle" if self.blind else ""
        title = f"retrieval scores: {len(self.heads)} heads of {self.threshold:g} or more"
        figure.update_layout(title=f"{title}, {int(self.counted.sum())} of {len(self.counted)} cases{blind}")
        return figure

    def _map(self) -> HeadMap:
        return HeadMap(self.scores, "retrieval scores")


def token_recall(answer: Sequence[int], needle: Sequence[int]) -> bool:
    """Whether more than half of the needle's tokens stand in the answer, each as often (ROUGE-1 recall on ids)."""
    return 2 * sum((Counter(answer) & Counter(needle)).values()) > len(needle)


def retrieval_scores(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    *,
    threshold: float = 0.1,
    count: Count = "set",
    top: int = 1,
    tokens: int = 50,
    stop: Sequence[int] = (),
    accept: Accept = token_recall,
    batch: int = 8,
) -> HeadScores:
    """Let a model answer, and see which heads look at what it copies (section 2).

    model: a decoder of transformers. tokenizer: a fast one, None for cases of ids. cases: with `prompt` and `needle`, see
    `RecallCase`. threshold: of a retrieval head. count: "set" or "steps", see the head of this file. top: how many of the
    largest weights count as looked at. tokens: longest answer. stop: ids that end it, beside the model's own. accept(answer,
    needle): whether a case counts. batch: cases at a time, padded on the left. Raises OptionError: a needle that is not in the
    prompt, a model that samples; NotRecalled where no case counts; Unsupported.
    """
    if count not in ("set", "steps"):
        raise OptionError(f'count is "set" or "steps", not {count!r}')
    if top < 1 or tokens < 1 or batch < 1:
        raise OptionError(f"top, tokens and batch are at least 1, not {top}, {tokens} and {batch}")
    if not cases:
        raise OptionError("there is no case")
    _check_model(model)
    read = [_ids_of(tokenizer, case) for case in cases]
    # cases of one length together, so that there are few pads
    order = sorted(range(len(read)), key=lambda i: len(read[i][0]))
    found: dict[int, _Answered] = {}
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        some = _answer(model, [read[i] for i in chosen], count, top, tokens, tuple(stop))
        found.update(zip(chosen, some, strict=True))
    answered = [found[i] for i in range(len(read))]
    recalled = [
        accept(each.answer, ids[slice(*needle)].tolist()) for each, (ids, needle) in zip(answered, read, strict=True)
    ]
    if not any(recalled):
        raise NotRecalled(
            f"none of the {len(cases)} answers recalls its needle, so nothing says where it is fetched: try shorter "
            "prompts, or another accept="
        )
    counted = torch.tensor(recalled)
    every = torch.stack([each.scores for each in answered])
    reach = torch.stack([each.reach for each in answered])[counted].float().mean(0)
    return HeadScores(every[counted].mean(0), every, counted, reach, tuple(e.answer for e in answered), threshold)


@dataclass(frozen=True, eq=False)
class _Answered:
    """One case: the ids written, the scores (L, H), which layers (L,) saw any of the needle."""

    answer: tuple[int, ...]
    scores: Tensor
    reach: Tensor


class _LastRows:
    """What every head looks at most in the last row of every pass: places (B, H, top) in the whole sequence.

    A tape would keep the rows themselves, whose size grows with the prompt times the answer.
    """

    reads_only = True
    card = InterventionCard(
        slug="last_rows", title="Last rows", exports=("retrieval_scores",), baseline=True, sites=("weights",)
    )

    def __init__(self, top: int, needle: Tensor):
        # needle: bool (B, tokens), in padded places
        self.top, self.needle = top, needle
        self.looked: dict[tuple[int, int], Tensor] = {}
        self.reach: dict[tuple[int, int], Tensor] = {}

    def on_read(self, call: AttentionCall, seen: Seen) -> None:
        if not call.main:
            return
        last = call.last(1)
        weights = last.weights() if seen.weights is None else seen.weights[:, :, -1:]
        weights = weights[:, :, 0].float()
        batch, heads, m = weights.shape
        # a cache that lets old keys go holds the last of them
        positions = torch.arange(m, device=weights.device) + (call.step.start + call.step.tokens - m)
        places = positions.expand(batch, heads, m)
        if call.positions is not None:
            kept = call.positions.expand(batch, -1, -1)
            places = kept.repeat_interleave(heads // kept.shape[1], 1)
        values, keys = weights.topk(min(self.top, m), -1)
        self.looked[call.step.index, call.layer] = places.gather(2, keys).masked_fill(values == 0, -1).cpu()
        visible = last.visible()
        there = self.needle.to(weights.device)[:, None].expand(-1, heads, -1)
        inside = there.gather(2, places.clamp(0, there.shape[2] - 1)) & (places >= 0) & (places < there.shape[2])
        if visible is not None:
            inside = inside & visible.expand(batch, heads, 1, m)[:, :, 0]
        self.reach[call.step.index, call.layer] = inside.any(-1).any(-1).cpu()


def _check_model(model: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
        raise Unsupported(f"{type(model).__name__} does not read its prompt and answer in one stack; decoders do")
    settings = model.generation_config
    if settings.do_sample or (settings.num_beams or 1) > 1:
        raise OptionError(
            "scores are those of greedy answers, and the model's generation_config samples or searches beams: set "
            "do_sample=False and num_beams=1 in it"
        )


def _ids_of(tokenizer: Any, case: Case) -> tuple[Tensor, Span]:
    """The ids of a prompt and the needle's places in them."""
    start, end = case.needle
    if isinstance(case.prompt, str):
        if tokenizer is None:
            raise OptionError("a prompt of text needs the model's tokenizer")
        if not 0 <= start < end <= len(case.prompt):
            raise OptionError(f"the needle is characters {start} to {end} of a prompt of {len(case.prompt)}")
        tokens = cut(tokenizer, case.prompt)
        return torch.tensor(tokens.ids), tokens.span(start, end)
    ids = torch.as_tensor(case.prompt, dtype=torch.int64).cpu()
    if ids.dim() != 1 or not 0 <= start < end <= len(ids):
        raise OptionError(f"the needle is {start} to {end} of ids of shape {tuple(ids.shape)}; it must lie in (N,)")
    return ids, (start, end)


def _answer(
    model: Any, cases: Sequence[tuple[Tensor, Span]], count: Count, top: int, tokens: int, stop: tuple[int, ...]
) -> list[_Answered]:
    """Greedy answers of a batch, and what every head looked at for each of their tokens."""
    longest = max(len(ids) for ids, _ in cases)
    batch = torch.zeros(len(cases), longest, dtype=torch.int64)
    valid, needles = torch.zeros_like(batch), torch.zeros_like(batch, dtype=torch.bool)
    for row, (ids, (start, end)) in enumerate(cases):
        shift = longest - len(ids)
        batch[row, shift:], valid[row, shift:] = ids, 1
        needles[row, shift + start : shift + end] = True
    ends = _ends(model, stop)
    main = open_session(model, ()).anatomy.main
    reader, layers = _LastRows(top, needles), range(len(main.layers))
    with open_session(model, (reader,)), torch.no_grad():
        written = model.generate(
            input_ids=batch.to(model.device),
            attention_mask=valid.to(model.device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )[:, longest:].cpu()
    steps = range(written.shape[1])
    looked, reach = (
        torch.stack([torch.stack([read[step, layer] for layer in layers], 1) for step in steps])
        for read in (reader.looked, reader.reach)
    )
    found = []
    for row, (ids, (start, end)) in enumerate(cases):
        answer = written[row].tolist()
        length = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        shift = longest - len(ids)
        scores = _scores(ids, shift, (start, end), answer[:length], looked[:length, row], count)
        found.append(_Answered(tuple(answer[:length]), scores, reach[:length, row].any(0)))
    return found


def _ends(model: Any, stop: tuple[int, ...]) -> list[int]:
    own = model.generation_config.eos_token_id
    return [*stop, *(own if isinstance(own, list) else [] if own is None else [own])]


def _scores(ids: Tensor, shift: int, needle: Span, answer: Sequence[int], looked: Tensor, count: Count) -> Tensor:
    """(L, H) of one case. looked: (steps, L, H, top) in padded places."""
    start, end = needle
    places = looked - shift
    inside = (places >= start) & (places < end)
    wanted = torch.tensor(answer)[:, None, None, None]
    hits = inside & (ids[places.clamp(0, len(ids) - 1)] == wanted)
    if count == "steps":
        return hits.any(-1).sum(0) / (end - start)
    offsets = (places - start).clamp(0, end - start - 1)
    copied = torch.zeros(*looked.shape[1:3], end - start, dtype=torch.long)
    for step in range(len(answer)):
        copied.scatter_add_(2, offsets[step], hits[step].long())
    return (copied > 0).sum(-1) / (end - start)
