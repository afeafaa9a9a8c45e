"""LargePiG: the last layer's attention points at words of the prompt, and is believed where the layers disagree.

    P = g P_ptr + (1 - g) softmax(logits),   P_ptr(w) = sum of a_j over source places j that hold w,   a: mean over heads
    g = clamp(scale max_l d_l, 0, cap),   d_l = how far the lens of candidate layer l is from that of the last one

It helps a model that looks at the right word and cannot write it (rare words), not one that looks elsewhere.
Departs from the released code: the mixture comes before generate's processors, not after them; places outside the source get
nothing from `normalise`; the anchor of `contrast` is chosen for each row; the vocabulary is as wide as the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Seen, Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.hosts.lens import lens
from regard.primitives.copy_mix import copy_mix

CARD = InterventionCard(
    slug="largepig",
    title="LargePiG",
    paper="LargePiG: Your Large Language Model is Secretly a Pointer Generator",
    exports=("LargePiG", "layer_divergence"),
    sites=("weights", "resid_pre", "final", "logits"),
    off={"scale": 0.0},
    padding=True,
)

# the ids of a sequence so far, and its source
_NOTE = "largepig"
_LEAST = 1e-7
_LOG_2 = math.log(2)


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class LargePiG:
    """Mix what the model writes with words of the source that its last layer attends to (section 3); logits are then log P.

    source: which tokens of the prompt may be copied, a slice or (start, stop) that counts a row's tokens without pads,
    or bool (B, P) over the padded prompt; None for all. Begin, end and pad tokens never are. candidate_layers: after
    how many layers a stream is compared with the last, 0 to L - 1; None for the even numbers in the last fifth. scale:
    of the divergence, cap: of the gate. normalise: weights within the source sum to 1. attention_layer: whose weights
    point, negative from the last. divergence: "official" or "jsd", see `layer_divergence`; with "jsd" scale is at most
    1 / ln 2. contrast: instead of the logits their difference to the most divergent candidate, for tokens at least
    relative_top as likely as the best (DoLa). source_mask: (ids (B, P)) -> bool (B, P), which of the source is certain
    enough. After beams of one's own, whose rows changed places, the next turn begins with its whole text. Raises
    OptionError; Unsupported for models that get embeddings instead of ids.
    """

    source: slice | tuple[int | None, int | None] | Tensor | None = None
    candidate_layers: tuple[int, ...] | None = None
    scale: float = 100.0
    cap: float = 0.5
    normalise: bool = False
    attention_layer: int = -1
    divergence: Literal["official", "jsd"] = "official"
    contrast: bool = False
    relative_top: float = 0.1
    source_mask: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.scale < 0 or not 0 <= self.cap <= 1:
            raise OptionError(f"scale is 0 or more and cap 0 to 1, not {self.scale} and {self.cap}")
        if self.divergence not in ("official", "jsd"):
            raise OptionError(f'divergence is "official" or "jsd", not {self.divergence!r}')
        if self.divergence == "jsd" and self.scale > 1 / _LOG_2 + 1e-6:
            raise OptionError(f"jsd lies in 0 to ln 2: give it a scale of at most {1 / _LOG_2:.4f}, not {self.scale}")
        if not 0 <= self.relative_top < 1:
            raise OptionError(f"relative_top is a share of the best probability, 0 to 1, not {self.relative_top}")
        if self.candidate_layers is not None and not self.candidate_layers:
            raise OptionError("there is no candidate layer; leave candidate_layers out for the last fifth")

    def start(self, session: Session) -> _Pointing:
        """What acts in one session. Raises OptionError for layers that the model lacks."""
        return _Pointing(self, session)


def layer_divergence(last: Tensor, others: Tensor, kind: Literal["official", "jsd"] = "official") -> Tensor:
    """How far distributions are from a last one: (L, B), of logits last (B, V) and others (L, B, V).

    With m their mean: "jsd" is the Jensen-Shannon divergence, (KL(p || m) + KL(q || m)) / 2, in 0 to ln 2; "official" is what
    the released code computes, (KL(m || p) + KL(m || q)) / 2 / V, which the scale of 100 belongs to.
    """
    kind_of = torch.promote_types(last.dtype, torch.float32)
    p, q = last.to(kind_of).log_softmax(-1).unsqueeze(0), others.to(kind_of).log_softmax(-1)
    m = torch.logaddexp(p, q) - _LOG_2
    if kind == "jsd":
        return (0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(-1)).clamp(min=0)
    return (0.5 * (m.exp() * (2 * m - p - q)).mean(-1)).clamp(min=0)


class _Pointing:
    """One session: the streams and the row of weights of the pass at hand, and the source of the prompt."""

    hidden_sites = ("resid_pre", "final")

    def __init__(self, settings: LargePiG, session: Session):
        main = session.anatomy.main
        count = len(main.layers)
        self.settings, self.model = settings, session.model
        if main.place:
            raise Unsupported(
                f"{type(session.model).__name__} reads its prompt in an encoder; a decoder's is pointed at"
            )
        self.layers = _candidates(settings.candidate_layers, count)
        if not -count <= settings.attention_layer < count:
            raise OptionError(f"there are {count} layers, and attention_layer is {settings.attention_layer}")
        self.attention = settings.attention_layer % count
        self.special = _special(session.model)
        self.streams: dict[int, Tensor] = {}
        self.final = self.weights = torch.empty(0)
        self.ids = torch.empty(0, 0, dtype=torch.int64)
        self.source: Tensor | None = None

    def on_hidden(self, step: Step, site: str, layer: int, x: Tensor) -> Tensor:
        """Keep the last token's streams."""
        if site == "final":
            self.final = x[:, -1]
        elif layer in self.layers:
            self.streams[layer] = x[:, -1]
        return x

    def on_read(self, call: AttentionCall, seen: Seen) -> None:
        """Keep where the last token looks."""
        if call.main and call.layer == self.attention:
            weights = call.last(1).weights() if seen.weights is None else seen.weights[:, :, -1:]
            self.weights = _by_position(call, weights.squeeze(2)).mean(1)

    def on_logits(self, step: Step, ids: Tensor | None, logits: Tensor) -> Tensor:
        """log P, or the logits themselves where nothing may be copied."""
        settings = self.settings
        self._read(step, ids)
        copies = settings.scale > 0 and settings.cap > 0
        if self.source is None or not (copies or settings.contrast):
            return logits
        last = lens(self.model, self.final, norm=False)
        others = torch.stack([lens(self.model, self.streams[layer]) for layer in self.layers])
        far = layer_divergence(last, others, settings.divergence)
        plain = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if settings.contrast:
            anchor = others.gather(0, far.argmax(0)[None, :, None].expand(-1, -1, others.shape[-1]))[0]
            plain = _contrast(plain, anchor, settings.relative_top)
        if not copies:
            return plain.to(logits.dtype)
        weights, gate = self._pointer(self.source), (settings.scale * far.amax(0)).clamp(max=settings.cap)
        gate = gate * self.source.any(-1)
        p = copy_mix(plain.softmax(-1), weights.to(plain.dtype), self.ids[:, : weights.shape[1]], gate.to(plain.dtype))
        return p.log().to(logits.dtype)

    def _pointer(self, source: Tensor) -> Tensor:
        weights = self.weights[:, : source.shape[1]]
        if not self.settings.normalise:
            return weights * source
        weights = (weights + _LEAST) * source
        return weights / weights.sum(-1, keepdim=True).clamp(min=_LEAST)

    def _read(self, step: Step, ids: Tensor | None) -> None:
        """Note the ids of this pass; with every piece of a prompt, what its source is."""
        if ids is None:
            raise Unsupported("the model got embeddings; the words that are pointed at must come as input ids")
        before, self.source = step.notes.get(_NOTE, (ids[:, :0], None))
        self.ids = torch.cat((before, ids), 1) if len(before) == len(ids) else ids
        if self.ids.shape[1] != step.start + step.tokens:
            raise Unsupported("this pass goes on with a cache from before the block: begin with the prompt inside it")
        if step.phase == "prefill":
            self.source = self._source(step)
        step.notes[_NOTE] = self.ids, self.source

    def _source(self, step: Step) -> Tensor | None:
        """bool (B, P); None while pieces of the prompt are missing."""
        rows, length = self.ids.shape
        given, real = self.settings.source, step.padding
        real = torch.ones_like(self.ids, dtype=torch.bool) if real is None else real[:, -length:]
        if isinstance(given, Tensor):
            if given.dim() != 2 or rows % given.shape[0] or given.shape[1] < length:
                raise ShapeError(f"source is {tuple(given.shape)}, and the prompt ({rows}, {length})")
            if given.shape[1] > length:
                return None
            found = given.to(device=real.device, dtype=torch.bool).repeat_interleave(rows // given.shape[0], 0) & real
        else:
            span = slice(None) if given is None else given if isinstance(given, slice) else slice(*given)
            order = real.long().cumsum(-1) - 1
            chosen = torch.zeros_like(real)
            for row, count in enumerate(real.sum(-1).tolist()):
                chosen[row] = torch.isin(order[row], torch.tensor(range(count)[span], device=real.device))
            found = chosen & real
        found = found & ~torch.isin(self.ids, self.special.to(self.ids.device))
        empty = (~found.any(-1)).nonzero().flatten().tolist()
        if empty:
            raise OptionError(
                f"the source of row {empty[0]} holds no word among its {int(real[empty[0]].sum())} tokens; where prompts come "
                "in pieces, give it as a mask over the whole prompt"
            )
        if self.settings.source_mask is not None:
            found = found & self.settings.source_mask(self.ids)
        return found


def _candidates(given: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if given is None:
        return tuple(n for n in range(math.ceil(0.8 * count), count) if n % 2 == 0) or (count - 1,)
    wrong = [n for n in given if not 0 <= n < count]
    if wrong:
        raise OptionError(
            f"{wrong[0]} is no candidate of {count} layers: after 0 to {count - 1} of them, since the last layer cannot be its "
            "own anchor"
        )
    return tuple(given)


def _special(model: Any) -> Tensor:
    """The ids of begin, end and pad."""
    found: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return torch.tensor(sorted(found), dtype=torch.int64)


def _by_position(call: AttentionCall, weights: Tensor) -> Tensor:
    """Weights (B, H, M) of the keys that are held, over all tokens so far: (B, H, tokens), 0 for those given up."""
    total = call.step.start + call.step.tokens
    wide = weights.new_zeros(*weights.shape[:2], total, dtype=torch.promote_types(weights.dtype, torch.float32))
    if call.positions is None:
        # a window holds the last keys, a cache of fixed size has room behind them
        count = min(weights.shape[-1], total)
        start = total - count if weights.shape[-1] <= total else 0
        wide[..., start:] = weights[..., :count]
        return wide
    places = call.positions.expand(weights.shape[0], -1, -1).repeat_interleave(
        weights.shape[1] // call.positions.shape[1], 1
    )
    return wide.scatter_add(2, places.clamp(min=0), weights.to(wide.dtype) * (places >= 0))


def _contrast(logits: Tensor, anchor: Tensor, relative_top: float) -> Tensor:
    """log p - log p of the anchor, -inf for tokens that the last layer finds unlikely."""
    log_p = logits.log_softmax(-1)
    difference = log_p - anchor.to(log_p.dtype).log_softmax(-1)
    if relative_top == 0:
        return difference
    return difference.masked_fill(log_p < log_p.amax(-1, keepdim=True) + math.log(relative_top), float("-inf"))
