"""The frame of sequence models: embedding, blocks of [norm, mixer, norm, feed-forward], norm, head.

Every mixer is given by name, so that two models differ in nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError
from regard.contract.names import mixer as make_mixer
from regard.contract.names import mixer_entry
from regard.contract.split import token_positions
from regard.layers.feed_forward import SGLU, SwiGLU
from regard.primitives.positions import sinusoid
from regard.primitives.state import StackState


@dataclass(frozen=True)
class SequenceSettings:
    """What a sequence model is made of.

    vocab: tokens. dim: model width. depth: layers. heads: query heads. mixer: a mixer's name, or names that take turns
    over the layers. options: mixer name -> its options. hidden: inner width of the feed-forward, 0 for none.
    positions: "none" (the mixers see to it) or "sinusoid". is_causal: False for an encoder. tied: the head shares the
    embedding. std: deviation of the initial weights, (3 dim)^-1/2 if None; projections into the residual stream have
    std / sqrt(2 depth). norm: "rms", or "srms" without a gain. feed_forward: "swiglu", or "sglu" without an activation.
    scale_embedding: embeddings enter times sqrt(dim).
    """

    vocab: int
    dim: int = 128
    depth: int = 2
    heads: int = 4
    mixer: str | tuple[str, ...] = "softmax"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hidden: int = 344
    positions: Literal["none", "sinusoid"] = "none"
    is_causal: bool = True
    tied: bool = False
    std: float | None = None
    norm: Literal["rms", "srms"] = "rms"
    feed_forward: Literal["swiglu", "sglu"] = "swiglu"
    scale_embedding: bool = False


class Block(nn.Module):
    """One layer: x + mixer(norm(x)), then x + feed-forward(norm(x)) unless there is none."""

    def __init__(self, settings: SequenceSettings, layer: int):
        super().__init__()
        feed_forward = SGLU if settings.feed_forward == "sglu" else SwiGLU
        self.norm_mixer = _norm(settings)
        self.mixer: Any = _mixer(settings, layer)
        self.norm_mlp = _norm(settings) if settings.hidden else None
        self.mlp = feed_forward(settings.dim, settings.hidden) if settings.hidden else None

    def forward(self, x: Tensor, *, padding: Tensor | None, reset: Tensor | None, is_causal: bool) -> Tensor:
        x = x + self.mixer(self.norm_mixer(x), padding=padding, reset=reset, is_causal=is_causal)
        return self._feed(x)

    def prefill(self, x: Tensor, state: Any, *, padding: Tensor | None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.prefill(self.norm_mixer(x), state, padding=padding)
        return self._feed(x + mixed), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self.norm_mixer(x), state)
        return self._feed(x + mixed), state

    def _feed(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.norm_mlp is None else x + self.mlp(self.norm_mlp(x))


class SequenceModel(nn.Module):
    """A stack of blocks over token ids: (B, N) -> logits (B, N, vocab).

    settings: see `SequenceSettings`. Raises OptionError, UnknownName.
    """

    def __init__(self, settings: SequenceSettings):
        super().__init__()
        if settings.vocab < 1 or settings.depth < 1:
            raise OptionError(
                f"a model needs a vocabulary and a layer; got {settings.vocab} tokens, {settings.depth} layers"
            )
        self.settings = settings
        self.embed = nn.Embedding(settings.vocab, settings.dim)
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in range(settings.depth))
        self.norm = _norm(settings)
        self.head = nn.Linear(settings.dim, settings.vocab, bias=False)
        self._initialise()
        if settings.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, padding: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        """Logits. padding: bool (B, N), True = takes part. reset: bool (B, N), True where a document starts."""
        return self.head(self.hidden(ids, padding=padding, reset=reset))

    def hidden(self, ids: Tensor, *, padding: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        """What the head reads: (B, N, C). A loss at few positions gathers them here, before the vocabulary."""
        x = self._embed(ids, 0)
        for block in self.blocks:
            x = block(x, padding=padding, reset=reset, is_causal=self.settings.is_causal)
        return self.norm(x)

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> StackState:
        """The state before the first token."""
        if not self.settings.is_causal:
            raise OptionError("an encoder reads the whole sequence at once and keeps no state")
        return StackState(tuple(b.mixer.init_state(batch, dtype=dtype, device=device) for b in self.blocks))  # type: ignore[operator,union-attr]

    def prefill(self, ids: Tensor, state: StackState, *, padding: Tensor | None = None) -> tuple[Tensor, StackState]:
        """Logits of N >= 1 tokens after the state, and the new state. padding: bool (B, N), for left padding."""
        x = self._embed(ids, state.seen)
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer = block.prefill(x, layer, padding=padding)  # type: ignore[operator]
            layers.append(layer)
        return self.head(self.norm(x)), StackState(tuple(layers), state.seen + ids.shape[1])

    def step(self, ids: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """Logits of one token (B, 1), and the new state."""
        x = self._embed(ids, state.seen)
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, layer = block.step(x, layer)  # type: ignore[operator]
            layers.append(layer)
        return self.head(self.norm(x)), StackState(tuple(layers), state.seen + 1)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens."""
        return sum(block.mixer.state_bytes(batch, length) for block in self.blocks)  # type: ignore[operator,union-attr,misc]

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt (B, N) by `tokens` tokens: (B, N + tokens).

        temperature: divides the logits; 0 takes the likeliest token. top_k: draw among so many. Raises OptionError.
        """
        if temperature < 0:
            raise OptionError(f"a temperature is at least 0, not {temperature}")
        logits, state = self.prefill(ids, self.init_state(ids.shape[0], device=ids.device))
        for _ in range(tokens):
            ids = torch.cat((ids, draw(logits[:, -1], temperature, top_k, generator)), 1)
            logits, state = self.step(ids[:, -1:], state)
        return ids

    def _embed(self, ids: Tensor, start: int) -> Tensor:
        if ids.dim() != 2 or ids.is_floating_point():
            raise ShapeError(f"token ids are {ids.dtype} {tuple(ids.shape)}; they must be integers (B, N)")
        x = self.embed(ids)
        if self.settings.scale_embedding:
            x = x * self.settings.dim**0.5
        if self.settings.positions == "sinusoid":
            positions = token_positions(start, ids.shape[1], ids.device)
            x = x + sinusoid(positions, self.settings.dim).to(x.dtype)
        return x

    def _initialise(self) -> None:
        std = (3 * self.settings.dim) ** -0.5 if self.settings.std is None else self.settings.std
        into_residual = std / (2 * self.settings.depth) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=into_residual if name.endswith(("to_out", "down")) else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)


def mixer_of(settings: SequenceSettings, layer: int) -> str:
    """The name of the mixer of a layer."""
    names = (settings.mixer,) if isinstance(settings.mixer, str) else settings.mixer
    return names[layer % len(names)]


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token a row, int64 (B, 1), from logits (B, vocab); the options are those of `SequenceModel.generate`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _norm(settings: SequenceSettings) -> nn.RMSNorm:
    return nn.RMSNorm(settings.dim, elementwise_affine=settings.norm == "rms")


def _mixer(settings: SequenceSettings, layer: int) -> nn.Module:
    name = mixer_of(settings, layer)
    options = dict(settings.options.get(name, {}))
    entry = mixer_entry(name)
    # decays depend on the depth of a layer
    if entry.room == "mixers" and "layers" in inspect.signature(entry.load()).parameters:
        options = {"layer": layer, "layers": settings.depth, **options}
    return make_mixer(name, settings.dim, settings.heads, **options)
