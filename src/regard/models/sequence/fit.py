"""FIT: groups of data tokens mix among themselves, a few latents of each group mix over the whole sequence, in turns.

    (a)b(c)d(e):  a local layers on tokens; latents read their group; b global layers on all latents; tokens read the
    latents of their group; c local layers; …

Autoregressive: tokens see earlier ones of their group, latents those of groups up to their own, and a group reads the
latents of the group before it. Cost: groups * n^2 + (groups * m)^2 in place of (groups * n)^2.
Departs from the paper: none; tables of positions are learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, ShapeError
from regard.layers.attention import AnyPattern, OpAttention
from regard.layers.feed_forward import Mlp
from regard.ops.softmax import softmax_attention
from regard.patterns import BlockCausal, Causal, Full, Pattern
from regard.primitives.positions import sinusoid

CARD = ModelCard(
    slug="fit",
    title="FIT: far-reaching interleaved transformers",
    paper="FIT: Far-reaching Interleaved Transformers",
    builds_on=("softmax",),
    exports=(
        "FITAR",
        "FIT",
        "FITDenoiser",
        "FITSettings",
        "FITARSettings",
        "FITDenoiserSettings",
        "Streams",
        "group_grid",
        "ungroup_grid",
    ),
    example="b=2 n=12 v=11",
    options={"vocab": 11, "tokens": 12, "groups": 3, "dim": 16, "latent_dim": 24, "heads": 2, "latent_heads": 4},
    task="token ids to logits; also grouped tokens to tokens and latents, and noisy tokens to predictions",
)

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class FITSettings:
    """What the interleaved stack is made of.

    layers: "(2)4(2)": local layers in brackets, global layers behind each, none behind the last bracket or some.
    tokens: of a whole sequence. groups: of equal numbers of consecutive tokens. latents_per_group: of each group.
    dim, heads: of the tokens. latent_dim, latent_heads: of the latents. mlp_ratio: inner width of the feed-forwards
    over theirs. causal: autoregressive, in all three ways.
    """

    layers: str = "(2)4(2)4(2)"
    tokens: int = 1024
    groups: int = 16
    latents_per_group: int = 8
    dim: int = 256
    latent_dim: int = 256
    heads: int = 4
    latent_heads: int = 4
    mlp_ratio: float = 4.0
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class FITARSettings(FITSettings):
    """Those of an autoregressive decoder. vocab: tokens."""

    vocab: int
    causal: bool = True


@dataclass(frozen=True, kw_only=True)
class FITDenoiserSettings(FITSettings):
    """Those of a denoiser. channels: of a data token. condition: width of a condition token, 0 for none.

    self_conditioned: it can be given the latents of an earlier call.
    """

    channels: int
    condition: int = 0
    self_conditioned: bool = False


# not published: a size for two cores
SIZES = {"fit_ar_tiny": FITARSettings(vocab=256, layers="(2)2(2)", dim=64, latent_dim=64, heads=4, latent_heads=4)}


class Streams(NamedTuple):
    """What FIT gives back: tokens (B, N, C) and latents (B, groups, m, D), None in a stack without global layers."""

    tokens: Tensor
    latents: Tensor | None


class FIT(nn.Module):
    """Grouped tokens (B, N, C) to `Streams`: an encoder, or with `causal` a decoder's trunk.

    Raises OptionError for a layer string, heads or groups that cannot be; ShapeError.
    """

    def __init__(self, settings: FITSettings):
        super().__init__()
        self.settings = settings
        self.stack = Interleaved(settings)
        self.norm = nn.LayerNorm(settings.dim, EPS)
        self.norm_latents = nn.LayerNorm(settings.latent_dim, EPS) if self.stack.latents is not None else None

    def forward(self, x: Tensor) -> Streams:
        x, latents = self.stack(x)
        if latents is None or self.norm_latents is None:
            return Streams(self.norm(x), None)
        return Streams(self.norm(x), self.norm_latents(latents))


class FITAR(nn.Module):
    """Token ids (B, N), N up to `tokens`, to logits (B, N, vocab) of the token after each; see `FITSettings`.

    Raises OptionError, also for a layer string that ends with global layers, which no token would read; ShapeError.
    """

    def __init__(self, settings: FITARSettings):
        super().__init__()
        if not settings.causal:
            raise OptionError("an autoregressive FIT is causal; FIT is the encoder")
        if settings.vocab < 1:
            raise OptionError(f"a vocabulary has at least 1 token, not {settings.vocab}")
        if parse_layers(settings.layers)[-1][1]:
            raise OptionError(
                f"no token reads the last global layers of {settings.layers!r}: end with local layers, as in '(2)4(2)'"
            )
        self.settings = settings
        self.embed = nn.Embedding(settings.vocab, settings.dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.stack = Interleaved(settings)
        self.norm = nn.LayerNorm(settings.dim, EPS)
        self.bias = nn.Parameter(torch.zeros(settings.vocab))

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.is_floating_point():
            raise ShapeError(f"token ids are {ids.dtype} {tuple(ids.shape)}; they must be integers (B, N)")
        x, _ = self.stack(self.embed(ids))
        return self.norm(x) @ self.embed.weight.T + self.bias


class FITDenoiser(nn.Module):
    """Noisy tokens (B, N, channels) at times (B,) to (predictions (B, N, channels), latents (B, groups, m, D)).

    time: in [0, 1]. condition: (B, K, settings.condition), read by the latents in every round, as is the time.
    latents: those of an earlier call, for a self-conditioned one. Raises OptionError, ShapeError.
    """

    def __init__(self, settings: FITDenoiserSettings):
        super().__init__()
        if settings.causal or not any(count for _, count in parse_layers(settings.layers)):
            raise OptionError("a denoiser is not causal and has global layers, since latents read the time")
        width = settings.latent_dim
        if width % 8:
            raise OptionError(f"the time is a sinusoid of a quarter of latent_dim: {width} is no multiple of 8")
        self.settings = settings
        self.embed, self.norm_in = nn.Linear(settings.channels, settings.dim), nn.LayerNorm(settings.dim, EPS)
        self.time = nn.Sequential(nn.Linear(width // 4, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(settings.condition, width) if settings.condition else None
        self.before: nn.Sequential | None = None
        if settings.self_conditioned:
            last = nn.LayerNorm(width, EPS)
            nn.init.zeros_(last.weight)
            self.before = nn.Sequential(Mlp(width, int(settings.mlp_ratio * width)), last)
        self.stack = Interleaved(settings, conditioned=True)
        self.norm = nn.LayerNorm(settings.dim, EPS)
        self.out = nn.Linear(settings.dim, settings.channels)

    def forward(
        self, x: Tensor, time: Tensor, condition: Tensor | None = None, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if time.shape != x.shape[:1]:
            raise ShapeError(f"times are {tuple(time.shape)}; they must be ({x.shape[0]},), one for each row")
        if (condition is None) is not (self.condition is None):
            raise OptionError(f"condition tokens of width {self.settings.condition} are made for, 0 is none at all")
        if latents is not None and self.before is None:
            raise OptionError("earlier latents are for a denoiser with self_conditioned=True")
        wave = sinusoid(1000 * time, self.settings.latent_dim // 4).to(x.dtype)
        wave = (wave - wave.mean(-1, keepdim=True)) / wave.std(-1, correction=0, keepdim=True)
        read = [self.time(wave)[:, None]]
        if self.condition is not None and condition is not None:
            read.append(self.condition(condition))
        added = None
        if self.before is not None:
            shape = (x.shape[0], self.settings.groups, self.settings.latents_per_group, self.settings.latent_dim)
            added = self.before(x.new_zeros(shape) if latents is None else latents)
        x, latents = self.stack(self.norm_in(self.embed(x)), condition=torch.cat(read, 1), added=added)
        assert latents is not None
        return self.out(self.norm(x)), latents


class Interleaved(nn.Module):
    """The stack without its last norms: tokens (B, N, C) -> (tokens, latents (B, groups, m, D) or None).

    A causal stack takes fewer tokens than the settings say; another one takes exactly as many.
    """

    def __init__(self, settings: FITSettings, *, conditioned: bool = False):
        super().__init__()
        pairs = parse_layers(settings.layers)
        if settings.groups < 1 or settings.tokens % settings.groups or settings.tokens < settings.groups:
            raise OptionError(f"{settings.tokens} tokens do not divide into {settings.groups} groups")
        if settings.latents_per_group < 1:
            raise OptionError(f"a group has at least 1 latent, not {settings.latents_per_group}")
        self.settings, self.size = settings, settings.tokens // settings.groups
        self.positions = nn.Parameter(torch.randn(self.size, settings.dim) * 0.02)
        shape = (settings.groups, settings.latents_per_group, settings.latent_dim)
        self.latents = nn.Parameter(torch.randn(shape) * 0.02) if any(count for _, count in pairs) else None
        last = len(pairs) - 1
        self.rounds = nn.ModuleList(
            Round(settings, near, far, reads_back=i < last, conditioned=conditioned)
            for i, (near, far) in enumerate(pairs)
        )

    def forward(
        self, x: Tensor, *, condition: Tensor | None = None, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        s, n = self.settings, x.shape[1]
        if x.dim() != 3 or x.shape[2] != s.dim or (n > s.tokens if s.causal else n != s.tokens):
            most = "up to " if s.causal else ""
            raise ShapeError(f"tokens are {tuple(x.shape)}; they must be (B, {most}{s.tokens}, {s.dim})")
        # nothing reads the tokens behind the end of a causal sequence
        x = torch.nn.functional.pad(x, (0, 0, 0, -n % self.size)).unflatten(1, (-1, self.size)) + self.positions
        latents = None
        if self.latents is not None:
            latents = self.latents[: x.shape[1]].expand(x.shape[0], -1, -1, -1)
            latents = latents if added is None else latents + added
        for round_ in self.rounds:
            x, latents = round_(x, latents, condition)
        return x.flatten(1, 2)[:, :n], latents


class Round(nn.Module):
    """Local layers; then, if there are global ones, latents read, mix, and are read.

    x (B, groups, n, C), latents (B, groups, m, D), condition (B, K, D) -> (x, latents).
    """

    def __init__(self, settings: FITSettings, near: int, far: int, *, reads_back: bool, conditioned: bool):
        super().__init__()
        s, self.causal = settings, settings.causal
        inside, over = (Causal(), BlockCausal(s.latents_per_group)) if s.causal else (Full(), Full())
        self.local = nn.ModuleList(Layer(s.dim, s.heads, s.mlp_ratio, inside) for _ in range(near))
        self.across = nn.ModuleList(Layer(s.latent_dim, s.latent_heads, s.mlp_ratio, over) for _ in range(far))
        heads, inner = min(s.heads, s.latent_heads), min(s.dim, s.latent_dim)
        self.read = Cross(s.latent_dim, s.dim, heads, inner) if far else None
        self.read_condition = (
            Cross(s.latent_dim, s.latent_dim, s.latent_heads, s.latent_dim) if far and conditioned else None
        )
        self.give = Cross(s.dim, s.latent_dim, heads, inner) if far and reads_back else None

    def forward(self, x: Tensor, latents: Tensor | None, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        batch, groups = x.shape[:2]
        x = x.flatten(0, 1)
        for layer in self.local:
            x = layer(x)
        if self.read is None or latents is None:
            return x.unflatten(0, (batch, groups)), latents
        latents = self.read(latents.flatten(0, 1), x).unflatten(0, (batch, groups)).flatten(1, 2)
        if self.read_condition is not None and condition is not None:
            latents = self.read_condition(latents, condition)
        for layer in self.across:
            latents = layer(latents)
        latents = latents.unflatten(1, (groups, -1))
        if self.give is not None:
            seen = latents
            if self.causal:
                seen = torch.cat((torch.zeros_like(latents[:, :1]), latents[:, :-1]), 1)
            x = self.give(x, seen.flatten(0, 1))
        return x.unflatten(0, (batch, groups)), latents


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), among the pairs of a pattern: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, pattern: Pattern):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attention = Within(dim, heads, pattern)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Within(OpAttention):
    """Softmax attention among the pairs of a pattern."""

    def __init__(self, dim: int, heads: int, pattern: Pattern):
        super().__init__(dim, heads, op=softmax_attention, rotary=False, bias=True)
        self.pattern = pattern

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, pattern: AnyPattern, q_offset: int) -> Tensor:
        return self.op(q, k, v, pattern=self.pattern)


class Cross(nn.Module):
    """x + attention(norm(x), norm(context)): (B, N, C) reads (B, M, C'). inner: width over all heads."""

    def __init__(self, dim: int, context_dim: int, heads: int, inner: int):
        super().__init__()
        if inner % heads:
            raise OptionError(f"a width of {inner} does not divide into {heads} heads")
        self.norm, self.norm_context = nn.LayerNorm(dim, EPS), nn.LayerNorm(context_dim, EPS)
        options: dict[str, Any] = {"rotary": False, "bias": True, "head_dim": inner // heads}
        self.attention = OpAttention(dim, heads, op=softmax_attention, context_dim=context_dim, **options)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), self.norm_context(context))


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """The (local, global) layers of every round: "(2)4(3)" is [(2, 4), (3, 0)]. Raises OptionError."""
    found = [(int(near), int(far or 0)) for near, far in re.findall(r"\((\d+)\)(\d*)", layers)]
    example = "write local layers in brackets and global ones between, as in '(2)4(2)4(2)'"
    if not re.fullmatch(r"(\(\d+\)\d*)+", layers):
        raise OptionError(f"the layers {layers!r} cannot be read: {example}")
    if any(far == 0 for _, far in found[:-1]):
        raise OptionError(f"the layers {layers!r} have brackets with no global layers between: {example}")
    return found


def group_grid(x: Tensor, groups: tuple[int, int]) -> Tensor:
    """The places of a grid (B, H, W, C) as tokens (B, H W, C), one sub-grid after the other.

    groups: sub-grids (down, across). Raises ShapeError.
    """
    down, across = groups
    if x.dim() != 4 or x.shape[1] % down or x.shape[2] % across:
        raise ShapeError(f"a grid {tuple(x.shape)} does not divide into {down} by {across} groups; it is (B, H, W, C)")
    x = x.unflatten(2, (across, -1)).unflatten(1, (down, -1))
    return x.transpose(2, 3).flatten(1, 4)


def ungroup_grid(x: Tensor, groups: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The inverse of `group_grid`. shape: H and W of the grid."""
    down, across = groups
    x = x.unflatten(1, (down, across, shape[0] // down, shape[1] // across))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
