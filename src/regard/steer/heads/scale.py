"""Heads, attention and feed-forward parts taken out or scaled: what a model does without them, or with more of them.

    z_h <- s z_h,   attn_out <- s attn_out,   mlp_out <- s mlp_out

Taking a head out: its output becomes 0, its mean, or what it says elsewhere, or its queries become 0, so that it weighs all
keys alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError
from regard.hosts.tape import Tape
from regard.steer.heads.named import named_layer

CARD = InterventionCard(
    slug="scale",
    title="Heads and parts scaled or taken out",
    exports=("AblateHeads", "ScaleComponents"),
    options={"heads": ((0, 1), (1, 3))},
    sites=("z",),
    off={"heads": ()},
    spares={"heads": ((1, 3),)},
    padding=True,
    baseline=True,
)

# the stream that a part writes; heads write z
_STREAMS = {"attn": "attn_out", "mlp": "mlp_out"}


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class AblateHeads:
    """Take heads out.

    heads: pairs (layer, head), layers negative from the last. mode: "zero" their outputs; "mean", they say what they say
    on average over the real tokens of `tape`, which holds z; "resample", what they say at one of these, drawn for every row
    and place by `seed`, the same in all layers; "mask_query", zero queries, so that the mean of the values in sight comes out
    (biases stay). Raises OptionError; Unsupported for "mask_query" where attention is not dispatched.
    """

    heads: Sequence[tuple[int, int]]
    mode: Literal["zero", "mean", "resample", "mask_query"] = "zero"
    tape: Tape | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("zero", "mean", "resample", "mask_query"):
            raise OptionError(f'mode is "zero", "mean", "resample" or "mask_query", not {self.mode!r}')
        if (self.mode in ("mean", "resample")) != (self.tape is not None):
            raise OptionError('mode="mean" and "resample" take a tape= with the site z, and no other mode does')
        if self.mode == "mask_query":
            object.__setattr__(self, "card", dataclasses.replace(CARD, sites=("q",)))

    def start(self, session: Any) -> _Ablation:
        """What acts in one session. Raises OptionError for heads that the model lacks."""
        chosen: dict[int, list[int]] = {}
        for layer, head in self.heads:
            place = named_layer(session, layer, [head])
            chosen.setdefault(place, []).append(head)
        return _Ablation(self, chosen)


class _Ablation:
    """One session of `AblateHeads`."""

    def __init__(self, settings: AblateHeads, chosen: dict[int, list[int]]):
        self.settings, self.chosen = settings, chosen
        if settings.mode == "mask_query":
            self.on_z = None  # type: ignore[assignment]
        else:
            self.on_attention = None  # type: ignore[assignment]
        self.said = {}
        if settings.tape is not None:
            self.said = {layer: _at_real_tokens(settings.tape, layer) for layer in chosen}

    def on_z(self, call: AttentionCall, z: Tensor) -> Tensor:
        heads = self._heads(call)
        if not heads:
            return z
        taken = _among(heads, z)
        if self.settings.mode == "zero":
            return z.masked_fill(taken, 0.0)
        said = self.said[call.layer].to(z)
        if self.settings.mode == "mean":
            return torch.where(taken, said.mean(0)[:, None], z)
        # of the pass alone, so that every layer draws the same
        draw = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + call.step.index)
        tokens = torch.randint(len(said), (z.shape[0], z.shape[2]), generator=draw).to(z.device)
        return torch.where(taken, said[tokens].transpose(1, 2), z)

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        heads = self._heads(call)
        return follow(call.replace(q=call.q.masked_fill(_among(heads, call.q), 0.0))) if heads else follow()

    def _heads(self, call: AttentionCall) -> list[int]:
        return self.chosen.get(call.layer, []) if call.main else []


@intervention(dataclasses.replace(CARD, sites=("z", *_STREAMS.values())))
@dataclass(frozen=True)
class ScaleComponents:
    """Multiply what parts of a model say.

    scales: ("head", layer, head), ("attn", layer) or ("mlp", layer) -> factor; layers negative from the last. A head is
    scaled before the output projection, whose bias stays; attn and mlp with their biases, where they join the stream.
    Raises OptionError; Unsupported where the model lacks the part.
    """

    scales: Mapping[tuple[Any, ...], float]

    def __post_init__(self) -> None:
        for key in self.scales:
            kind = key[0] if isinstance(key, tuple) and key else None
            if kind not in ("head", *_STREAMS) or len(key) != (3 if kind == "head" else 2):
                raise OptionError(f'{key!r} is no part; write ("head", layer, head), ("attn", layer) or ("mlp", layer)')

    def start(self, session: Any) -> _Scaling:
        """What acts in one session. Raises OptionError for parts that the model lacks."""
        heads: dict[int, dict[int, float]] = {}
        streams: dict[tuple[str, int], float] = {}
        for (kind, layer, *head), factor in self.scales.items():
            place = named_layer(session, layer, head)
            if kind == "head":
                heads.setdefault(place, {})[head[0]] = factor
            else:
                streams[_STREAMS[kind], place] = factor
        return _Scaling(heads, streams)


class _Scaling:
    """One session of `ScaleComponents`."""

    def __init__(self, heads: dict[int, dict[int, float]], streams: dict[tuple[str, int], float]):
        self.heads, self.streams = heads, streams
        self.hidden_sites = tuple(sorted({site for site, _ in streams}))
        if not heads:
            self.on_z = None  # type: ignore[assignment]

    def on_z(self, call: AttentionCall, z: Tensor) -> Tensor:
        factors = self.heads.get(call.layer) if call.main else None
        if not factors:
            return z
        by = z.new_ones(z.shape[1])
        by[list(factors)] = z.new_tensor(list(factors.values()))
        return z * by[:, None, None]

    def on_hidden(self, step: Step, site: str, layer: int, x: Tensor) -> Tensor:
        factor = self.streams.get((site, layer), 1.0)
        return x if factor == 1.0 else x * factor


def _among(heads: list[int], x: Tensor) -> Tensor:
    """bool (1, H, 1, 1), True for some heads of x (B, H, N, E)."""
    taken = torch.zeros(1, x.shape[1], 1, 1, dtype=torch.bool, device=x.device)
    taken[:, heads] = True
    return taken


def _at_real_tokens(tape: Tape, layer: int) -> Tensor:
    """What each head of a layer says at the tokens that are no pads: (T, H, E)."""
    z, padding = tape["z", layer], tape.meta.get("padding")
    return z.flatten(0, 1) if padding is None else z[padding]
