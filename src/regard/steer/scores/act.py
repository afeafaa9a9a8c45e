"""Attention calibration (ACT): in chosen heads, keys that draw attention without need give most of it back.

    c_j = mean of A_ij over the rows i that may see j;   sinks = {j : c_j > alpha / N} without the first of them
    A_ij <- beta A_ij for sinks j,   A_ij (1 + (1 - beta) sum_sinks A_i / sum_others A_i) for the others

Heads are chosen by trying each alone on a few labelled cases (`search_heads`).
Departs from the released code: the threshold is alpha / N (there 0.1), N without pads; any batch; a row all of whose
weight lies on sinks stays as it is; decoding steps are left alone or take the sinks of the prompt, where the code calls
every key a sink that a single row weighs above the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.attach import AttentionCall, Step, intervention, steer
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, Unsupported
from regard.primitives.attention_stats import column_sinks, sink_bar
from regard.primitives.search import one_at_a_time
from regard.steer.heads.named import named_layer
from regard.steer.scores.reweight import AttentionReweight

CARD = InterventionCard(
    slug="act",
    title="Attention calibration (ACT)",
    paper="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
    "Attention Calibration",
    exports=("AttentionCalibration", "search_heads", "HeadSearch"),
    options={"heads": {0: [0, 1, 2], 1: [1, 3]}, "alpha": 1.5},
    sites=("weights",),
    off={"beta": 1.0},
    spares={"heads": {1: [1, 3]}},
    padding=True,
)

_SINKS = "act{}"
# where the prompt's pieces end so far, what each key of a layer got in them, and from how many rows, (B, H, M)
_PIECES = "act {}"


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class AttentionCalibration:
    """Take weight off the sinks of chosen heads, but for the initial one, and give it to the row's other keys (section 4).

    heads: layer -> heads, layers negative from the last, or "all" of every layer but the first two and the last. beta:
    the share that a sink keeps, 0 to 1. alpha: a sink gets more than alpha / N on average, N the tokens of its row; or
    threshold, with alpha=None, the bar itself. decode: "off", only prompts are calibrated, or "reuse", steps after them
    too, with the sinks of the prompt. Of a prompt in pieces each has the sinks of the rows so far: the sums are those
    of one pass, but earlier rows keep what they got. Pads count as tokens where no attention mask names them. Raises
    OptionError; Unsupported where keys to reuse are not kept (sliding windows).
    """

    heads: Literal["all"] | Mapping[int, Sequence[int]]
    beta: float = 0.4
    alpha: float | None = 5.0
    threshold: float | None = None
    decode: Literal["off", "reuse"] = "off"

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise OptionError(f"beta is the share of its weight that a sink keeps, 0 to 1, not {self.beta}")
        sink_bar(torch.ones(()), self.alpha, self.threshold)
        if self.decode not in ("off", "reuse"):
            raise OptionError(f'decode is "off" or "reuse", not {self.decode!r}')

    def start(self, session: Any) -> _Calibration:
        """What acts in one session. Raises OptionError for heads that the model lacks."""
        return _Calibration(self, _chosen(session, self.heads))


@dataclass(frozen=True)
class HeadSearch:
    """What came of trying heads alone. baseline: the metric without any; gains: (layer, head) -> what it gains, best first."""

    baseline: float
    gains: dict[tuple[int, int], float]

    def better(self, margin: float = 0.0) -> dict[int, list[int]]:
        """layer -> heads that gain more than `margin`."""
        chosen: dict[int, list[int]] = {}
        for layer, head in sorted(place for place, gain in self.gains.items() if gain > margin):
            chosen.setdefault(layer, []).append(head)
        return chosen


def search_heads(
    model: Any,
    make: Callable[[dict[int, list[int]]], Any],
    metric: Callable[[Any, Any], float],
    data: Any,
    *,
    heads: Literal["all"] | Mapping[int, Sequence[int]] = "all",
) -> HeadSearch:
    """Steer each head alone and measure; one run of the metric a head, and one without.

    make: {layer: [head]} -> intervention. metric: (model, data) -> number, larger is better. heads: those that are tried,
    "all" of every layer but the first two and the last. Raises OptionError.
    """
    tried = [(layer, head) for layer, some in _chosen(steer(model), heads).items() for head in some]
    baseline = float(metric(model, data))

    def gain(place: tuple[int, int]) -> float:
        with steer(model, make({place[0]: [place[1]]})):
            return metric(model, data) - baseline

    return HeadSearch(baseline, dict(one_at_a_time(gain, tried)))


class _Calibration:
    """One session: which keys of the pass at hand are sinks, (B, H, M), for layers where there are any."""

    card = CARD

    def __init__(self, settings: AttentionCalibration, heads: dict[int, list[int]]):
        self.settings, self.heads = settings, heads
        self.reweight = AttentionReweight(rule=self._calibrated, heads=heads)
        self.sinks: dict[int, Tensor] = {}
        if settings.decode == "off":
            self.on_kv = None  # type: ignore[assignment]

    def on_kv(self, step: Step, layer: int, kept: Any) -> None:
        """Nothing is given up: with this the host keeps a cache in which marks follow their keys."""

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        """Look for sinks; a layer without them goes its plain way."""
        self.sinks.pop(call.layer, None)
        if self.settings.beta < 1 and self.reweight.wants(call):
            found = self._found(call)
            if found is not None and bool(found.any()):
                self.sinks[call.layer] = found
        return follow()

    def wants(self, call: AttentionCall) -> bool:
        """The layers where sinks were found."""
        return call.layer in self.sinks and self.reweight.wants(call)

    def on_weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """Calibrate."""
        return self.reweight.on_weights(call, weights)

    @torch.no_grad()
    def _found(self, call: AttentionCall) -> Tensor | None:
        if call.step.phase == "decode":
            call.step.notes.pop(_PIECES.format(call.layer), None)
            return self._of_the_prompt(call) if self.settings.decode == "reuse" else None
        call = _without_pad_rows(call)
        visible, (n, m) = call.visible(), (call.q.shape[2], call.k.shape[2])
        # how many rows may see a key, and how many keys there are but pads
        rows = (
            torch.full((1, 1, m), n, device=call.q.device) if visible is None else visible.expand(-1, -1, n, -1).sum(-2)
        )
        got, rows = self._with_earlier_pieces(call, call.received(), rows)
        tokens = (rows > 0).sum(-1, keepdim=True).clamp(min=1)
        bar = sink_bar(tokens, self.settings.alpha, self.settings.threshold)
        chosen = torch.zeros(call.q.shape[1], 1, dtype=torch.bool, device=call.q.device)
        chosen[self.heads[call.layer]] = True
        sinks = column_sinks(got / rows.clamp(min=1), bar) & chosen
        if self.settings.decode == "reuse" and call.kept is not None:
            groups = sinks.unflatten(1, (call.kept.keys.shape[1], -1)).unbind(2)
            call.kept.marks |= {_SINKS.format(i): group for i, group in enumerate(groups)}
        return sinks

    def _with_earlier_pieces(self, call: AttentionCall, got: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What each key got from this pass and from those before it that were of the prompt, and from how many rows."""
        name, step, n, m = _PIECES.format(call.layer), call.step, call.q.shape[2], call.k.shape[2]
        end, before_got, before_rows = step.notes.get(name, (0, got[..., :0], rows[..., :0]))
        # a layer that runs again for its gradients has noted this pass already
        if end == step.start and before_got.shape[0] == got.shape[0] and before_got.shape[2] + n >= m:
            # a window has let go the first ones
            got, rows = (x + F.pad(y, (0, n))[..., -m:] for x, y in ((got, before_got), (rows, before_rows)))
        step.notes[name] = step.start + step.tokens, got, rows
        return got, rows

    def _of_the_prompt(self, call: AttentionCall) -> Tensor | None:
        if call.kept is None:
            raise Unsupported(f'layer {call.layer} keeps a window of keys: decode="reuse" needs all; leave it out')
        names = [_SINKS.format(i) for i in range(call.q.shape[1] // call.kept.keys.shape[1])]
        if names[0] not in call.kept.marks:
            return None
        return torch.stack([call.kept.marks[name] for name in names], 2).flatten(1, 2)

    def _calibrated(self, call: AttentionCall, weights: Tensor) -> Tensor:
        sinks = self.sinks[call.layer].unsqueeze(2)
        high = weights.to(torch.promote_types(weights.dtype, torch.float32))
        sunk, others = high.masked_fill(~sinks, 0.0), high.masked_fill(sinks, 0.0)
        rest = others.sum(-1, keepdim=True)
        nobody = rest == 0
        share = (1 - self.settings.beta) * sunk.sum(-1, keepdim=True) / rest.masked_fill(nobody, 1.0)
        return torch.where(nobody, high, others * (1 + share) + self.settings.beta * sunk).to(weights.dtype)


def _chosen(session: Any, heads: Literal["all"] | Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """layer -> heads, checked against the model."""
    if heads == "all":
        layers, count = len(session.anatomy.main.layers), session.facts()["heads"]
        if layers < 4:
            raise OptionError(
                f'heads="all" leaves out the first two layers and the last, and there are {layers}: name layers and heads'
            )
        return {layer: list(range(count)) for layer in range(2, layers - 1)}
    return {named_layer(session, layer, some): list(some) for layer, some in heads.items()}


def _without_pad_rows(call: AttentionCall) -> AttentionCall:
    """The call without the rows of pads that stand behind their row's tokens, and so see them."""
    padding, n = call.step.padding, call.q.shape[2]
    if padding is None or n != call.step.tokens or bool(padding[:, -1].all()):
        return call
    rows = padding[:, None, -n:, None]
    return call.replace(mask=rows if call.mask is None else call.mask & rows)
