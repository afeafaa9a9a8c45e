"""Block Transformer: whole blocks of tokens attend far, single tokens attend only inside their block.

    b_i = [e(t_1) … e(t_L)]                    the tokens of block i, embedded narrowly and joined
    c_i = block decoder (b_1 … b_i)            causal, over blocks
    t of block i + 1 = token decoder (c_i, the tokens before it in its block)

The cache over the sequence has one entry a block in half of the layers; that of the token decoder is thrown away at
every block's end. A logit stands at the token before the one it foretells; nothing foretells the first block, where
logits are 0.
Departs from the paper: hidden tokens embed as 0 where the released code has a pad token; the other variants start
from a learned vector where it has the token of the text's end; cross-attention stands in layers like all others, not
in those of T5; the embedder is the table of section 2.2 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, ShapeError
from regard.layers.attention import OpAttention
from regard.layers.caches import KVState
from regard.layers.feed_forward import Mlp
from regard.models.sequence.shell import draw
from regard.ops.softmax import softmax_attention
from regard.primitives.positions import rope
from regard.primitives.state import State

CARD = ModelCard(
    slug="block_transformer",
    title="Block Transformer",
    paper="Block Transformer: Global-to-Local Language Modeling for Fast Inference",
    builds_on=("softmax",),
    exports=("BlockTransformer", "BlockTransformerSettings"),
    example="b=2 n=14 v=11",
    options={"vocab": 11, "dim": 16, "block_layers": 1, "token_layers": 2, "heads": 2, "hidden": 24},
    task="token ids to logits",
    decode=True,
)

EPS = 1e-5


@dataclass(frozen=True)
class BlockTransformerSettings:
    """What a Block Transformer is made of.

    vocab: tokens. dim: width of both decoders, a multiple of block_length. block_layers, token_layers: of the decoder
    over blocks and of the one inside them. heads, hidden: of every layer. block_length: tokens a block.
    decoder: how a token decoder gets the context: "prefix" puts n_prefix vectors in front of the tokens, "summation"
    adds one to each (n_prefix = block_length), "cross" attends to n_prefix of them in every layer.
    rotary_share: of a head's channels. std: deviation of the initial weights.
    """

    vocab: int = 50304
    dim: int = 768
    block_layers: int = 6
    token_layers: int = 6
    heads: int = 12
    hidden: int = 3072
    block_length: int = 4
    n_prefix: int = 2
    decoder: Literal["prefix", "summation", "cross"] = "prefix"
    rotary_share: float = 0.25
    std: float = 0.02


def _size(dim: int, layers: int, heads: int) -> BlockTransformerSettings:
    return BlockTransformerSettings(dim=dim, block_layers=layers, token_layers=layers, heads=heads, hidden=4 * dim)


# the released configurations block_main_b4_5, _19, _85, _300, _800 and _1.2b, called after all their parameters as in
# the paper
SIZES = {
    "block_transformer_170m": _size(768, 6, 12),
    "block_transformer_33m": _size(256, 3, 8),
    "block_transformer_77m": _size(512, 3, 8),
    "block_transformer_420m": _size(1024, 12, 16),
    "block_transformer_1b": _size(2048, 8, 16),
    "block_transformer_1_4b": _size(2048, 12, 16),
}


@dataclass(frozen=True)
class BlockState(State):
    """What is kept between tokens.

    blocks: the cache of every layer over blocks. inside: that of every layer inside the open block, empty before the
    first block has ended. context (B, C): what the last whole block left, 0 before. open (B, r, C / L): the embedded
    tokens of the open block. known (B,), valid (B, r): whether a row has a context, and which tokens of the open block
    take part; None without padding.
    """

    blocks: tuple[KVState, ...]
    inside: tuple[KVState, ...]
    context: Tensor
    open: Tensor
    known: Tensor | None = None
    valid: Tensor | None = None
    seen: int = 0


class BlockTransformer(nn.Module):
    """Token ids (B, N) to logits (B, N, vocab) of the token after each, 0 for tokens of the first block.

    Blocks are counted from the first token, hidden or not: hide tokens in front to move their borders. settings: see
    `BlockTransformerSettings`. Raises OptionError, ShapeError.
    """

    def __init__(self, settings: BlockTransformerSettings):
        super().__init__()
        _check(settings)
        s = settings
        self.settings = s
        self.embed = nn.Embedding(s.vocab, s.dim // s.block_length)
        self.blocks = Decoder(s, s.block_layers, TurnedAttention)
        self.tokens = TokenDecoder(s)
        self.head = nn.Linear(s.dim, s.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=s.std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.expand.weight, std=s.dim**-0.5)

    def forward(self, ids: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """Logits. padding: bool (B, N), True = takes part; a block takes part if any of its tokens does."""
        return self.head(self.hidden(ids, padding=padding))

    def hidden(self, ids: Tensor, *, padding: Tensor | None = None) -> Tensor:
        """What the head reads: (B, N, C). A loss at few positions gathers them here, before the vocabulary."""
        return self._read(ids, self.init_state(len(ids), device=ids.device), padding, padding)[0]

    def loss(self, ids: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean nats a token over all blocks but the first, for training (section 3.1 and appendix).

        Every row is moved by 0 to block_length - 1 places, so that a prompt may end anywhere; it loses as many tokens
        at its end. Raises ShapeError for fewer than two blocks.
        """
        length, (batch, n) = self.settings.block_length, ids.shape
        if n < 2 * length:
            raise ShapeError(f"training needs at least two blocks, which is {2 * length} tokens; there are {n}")
        moved = torch.randint(length, (batch, 1), generator=generator, device=ids.device)
        place = torch.arange(n, device=ids.device) - moved
        ids = ids.gather(1, place.clamp(min=0))
        # some token of the first block is always shown, so that no block is hidden
        hidden, _ = self._read(ids, self.init_state(batch, device=ids.device), place >= 0, None)
        return F.cross_entropy(self.head(hidden[:, length - 1 : -1]).flatten(0, 1), ids[:, length:].flatten())

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> BlockState:
        """The state before the first token."""
        weight = self.head.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        return BlockState(
            self.blocks.init_state(batch, dtype, device),
            self.tokens.decoder.init_state(batch, dtype, device),
            torch.zeros(batch, self.settings.dim, dtype=dtype, device=device),
            torch.zeros(batch, 0, self.embed.embedding_dim, dtype=dtype, device=device),
        )

    def prefill(self, ids: Tensor, state: BlockState, *, padding: Tensor | None = None) -> tuple[Tensor, BlockState]:
        """Logits of N >= 1 tokens after the state, and the new state. padding: bool (B, N)."""
        hidden, state = self._read(ids, state, padding, padding)
        return self.head(hidden), state

    def step(self, ids: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """Logits of one token (B, 1), and the new state."""
        return self.prefill(ids, state)

    def read_prompt(self, ids: Tensor, *, padding: Tensor | None = None) -> tuple[Tensor, BlockState]:
        """Logits (B, 1, vocab) of the token after a prompt (B, N), and the state; no token enters the token decoder.

        A prompt of broken blocks gets hidden tokens in front. padding: bool (B, N), True = takes part.
        """
        _check_ids(ids, padding)
        lead = -ids.shape[1] % self.settings.block_length
        if lead and padding is None:
            padding = torch.ones_like(ids, dtype=torch.bool)
        if lead:
            ids, padding = F.pad(ids, (lead, 0)), F.pad(padding, (lead, 0))  # type: ignore[arg-type]
        state = self.init_state(len(ids), device=ids.device)
        _, _, state = self._read_blocks(ids, state, padding, padding)
        first, state = self._open(state)
        return self.head(first), state

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens without padding, in the dtype of the weights."""
        s = self.settings
        whole, rest = divmod(length, s.block_length)
        kept = s.block_layers * whole + (s.token_layers * (self.tokens.first + rest) if whole else 0)
        numbers = 2 * s.dim * kept + s.dim + rest * self.embed.embedding_dim
        return batch * numbers * self.head.weight.element_size()

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        tokens: int,
        *,
        padding: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt (B, N) by `tokens` tokens: (B, N + tokens).

        padding: bool (B, N), False in front of shorter prompts. temperature: divides the logits; 0 takes the likeliest
        token. top_k: draw among so many. Raises OptionError.
        """
        if temperature < 0:
            raise OptionError(f"a temperature is at least 0, not {temperature}")
        logits, state = self.read_prompt(ids, padding=padding)
        for _ in range(tokens):
            ids = torch.cat((ids, draw(logits[:, -1], temperature, top_k, generator)), 1)
            logits, state = self.step(ids[:, -1:], state)
        return ids

    def _read(
        self, ids: Tensor, state: BlockState, shown: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        """What the head reads at N tokens, and the state after them. shown: what embeds; padding: what attends."""
        _check_ids(ids, padding)
        length, n = self.settings.block_length, ids.shape[1]
        # up to the end of the open block, then all whole blocks at once, then what is left
        head = min(-state.seen % length, n)
        tail = n - (n - head) % length
        outs = []
        for start, end in ((0, head), (head, tail), (tail, n)):
            if start == end:
                continue
            whole = state.seen % length == 0 and (end - start) % length == 0
            read = self._read_whole if whole else self._read_inside
            masks = [None if mask is None else mask[:, start:end] for mask in (shown, padding)]
            out, state = read(ids[:, start:end], state, masks[0], masks[1])
            outs.append(out)
        return torch.cat(outs, 1), state

    def _read_whole(
        self, ids: Tensor, state: BlockState, shown: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        """Whole blocks behind whole blocks: all windows of the token decoder at once."""
        length = self.settings.block_length
        contexts, known, after = self._read_blocks(ids, state, shown, padding)
        first, after = self._open(after)
        # nothing foretells the first block of all
        begin = 1 if state.seen == 0 else 0
        parts = [ids.new_zeros(len(ids), length - 1, self.settings.dim, dtype=first.dtype)] if begin else []
        count = contexts.shape[1] - 1 - begin
        if count:
            inputs = ids.unflatten(1, (-1, length))[:, begin:, :-1].flatten(0, 1)
            valid = None if padding is None else padding.unflatten(1, (-1, length))[:, begin:, :-1].flatten(0, 1)
            out = self.tokens(contexts[:, begin:-1].flatten(0, 1), inputs, valid).unflatten(0, (-1, count))
            out = _hide(out, None if known is None else known[:, begin:-1, None]).flatten(1, 2)
            parts.append(out if begin else out[:, 1:])
        return torch.cat((*parts, first), 1), after

    def _read_inside(
        self, ids: Tensor, state: BlockState, shown: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        """Tokens of the open block, perhaps its last."""
        length, place = self.settings.block_length, state.seen % self.settings.block_length
        inputs = ids[:, : length - 1 - place]
        parts, inside = [], state.inside
        if inputs.shape[1] and state.seen >= length:
            valid = None if padding is None else padding[:, : inputs.shape[1]]
            out, inside = self.tokens.go_on(inputs, state.context, inside, place, valid)
            parts.append(_hide(out, None if state.known is None else state.known[:, None]))
        elif inputs.shape[1]:
            parts.append(state.context.new_zeros(*inputs.shape, self.settings.dim))
        valid = state.valid
        if padding is not None or valid is not None:
            valid = torch.cat((_or_all(valid, state.open), _or_all(padding, ids)), 1)
        opened = torch.cat((state.open, self._embed(ids, shown)), 1)
        state = replace(state, inside=inside, open=opened, valid=valid, seen=state.seen + ids.shape[1])
        if opened.shape[1] == length:
            _, _, state = self._end_blocks(opened, state, valid)
            first, state = self._open(state)
            parts.append(first)
        return torch.cat(parts, 1), state

    def _read_blocks(
        self, ids: Tensor, state: BlockState, shown: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """Whole blocks behind whole blocks, without their insides: as `_end_blocks`."""
        state = replace(state, seen=state.seen + ids.shape[1])
        return self._end_blocks(self._embed(ids, shown), state, padding)

    def _end_blocks(
        self, embedded: Tensor, state: BlockState, padding: Tensor | None
    ) -> tuple[Tensor, Tensor | None, BlockState]:
        """Contexts (B, 1 + blocks, C) from the one before on, whether a row has each, and the state; it has no open
        block. embedded (B, tokens, C / L); state: as after these tokens."""
        length, before = self.settings.block_length, state.known
        valid = None if padding is None else padding.unflatten(1, (-1, length)).any(-1)
        contexts, blocks = self.blocks.prefill(embedded.unflatten(1, (-1, length)).flatten(2), state.blocks, valid)
        known = None
        if valid is not None or before is not None:
            if before is None:
                before = torch.full_like(embedded[:, 0, 0], state.seen > embedded.shape[1], dtype=torch.bool)
            known = torch.cat((before[:, None], _or_all(valid, contexts)), 1).cumsum(1) > 0
        # a view would hold the contexts of the whole prompt
        after = replace(
            state, blocks=blocks, context=contexts[:, -1].clone(), open=state.open[:, :0], valid=None,
            known=None if known is None else known[:, -1],
        )  # fmt: skip
        return torch.cat((state.context[:, None].to(contexts.dtype), contexts), 1), known, after

    def _open(self, state: BlockState) -> tuple[Tensor, BlockState]:
        """What the head reads for the first token of a block, and the state that goes on from there."""
        first, inside = self.tokens.open(state.context)
        first = _hide(first, None if state.known is None else state.known[:, None])
        return first, replace(state, inside=inside)

    def _embed(self, ids: Tensor, shown: Tensor | None) -> Tensor:
        x = self.embed(ids)
        return x if shown is None else x * shown[..., None]


class TokenDecoder(nn.Module):
    """Decodes the tokens of a block from its context; every call knows one block a row."""

    def __init__(self, settings: BlockTransformerSettings):
        super().__init__()
        self.settings, s = settings, settings
        # inputs in front of the tokens
        self.first = s.n_prefix if s.decoder == "prefix" else 1
        self.embed = nn.Embedding(s.vocab, s.dim)
        self.expand = nn.Linear(s.dim, s.dim * s.n_prefix)
        self.start = None if s.decoder == "prefix" else nn.Parameter(torch.randn(s.dim) * s.std)
        self.decoder = Decoder(s, s.token_layers, WindowAttention, crossed=s.decoder == "cross")

    def forward(self, context: Tensor, ids: Tensor, padding: Tensor | None) -> Tensor:
        """Contexts (W, C) and all tokens of their blocks but the last (W, L - 1) -> (W, L, C)."""
        expanded = self._expand(context)
        x = torch.cat((self._first(expanded), self._later(ids, expanded, 0)), 1)
        if padding is not None:
            padding = F.pad(padding, (self.first, 0), value=True)
        return self.decoder(x, padding, self._read_by_layers(expanded))[:, self.first - 1 :]

    def open(self, context: Tensor) -> tuple[Tensor, tuple[KVState, ...]]:
        """A context (B, C) alone -> (B, 1, C), which foretells the first token, and the cache."""
        expanded = self._expand(context)
        states = self.decoder.init_state(len(context), context.dtype, context.device)
        x, states = self.decoder.prefill(self._first(expanded), states, None, self._read_by_layers(expanded))
        return x[:, -1:], states

    def go_on(
        self, ids: Tensor, context: Tensor, states: tuple[KVState, ...], place: int, padding: Tensor | None
    ) -> tuple[Tensor, tuple[KVState, ...]]:
        """Tokens (B, n) behind the first `place` of their block -> (B, n, C), and the cache."""
        # a prefix is in the cache already
        expanded = context[:, None] if self.settings.decoder == "prefix" else self._expand(context)
        x = self._later(ids, expanded, place)
        return self.decoder.prefill(x, states, padding, self._read_by_layers(expanded))

    def _expand(self, context: Tensor) -> Tensor:
        return self.expand(context).unflatten(-1, (self.settings.n_prefix, -1))

    def _first(self, expanded: Tensor) -> Tensor:
        if self.start is None:
            return expanded
        start = self.start.expand(len(expanded), 1, -1)
        return start + expanded[:, :1] if self.settings.decoder == "summation" else start

    def _later(self, ids: Tensor, expanded: Tensor, place: int) -> Tensor:
        x = self.embed(ids)
        if self.settings.decoder != "summation":
            return x
        return x + expanded[:, place + 1 : place + 1 + ids.shape[1]]

    def _read_by_layers(self, expanded: Tensor) -> Tensor | None:
        return expanded if self.settings.decoder == "cross" else None


class Decoder(nn.Module):
    """Causal layers in the manner of GPT-NeoX, and a norm: (B, N, C) -> (B, N, C). crossed: they read a context too."""

    def __init__(
        self,
        settings: BlockTransformerSettings,
        layers: int,
        attention: type[TurnedAttention],
        *,
        crossed: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(Layer(settings, attention, crossed) for _ in range(layers))
        self.norm = nn.LayerNorm(settings.dim, EPS)

    def forward(self, x: Tensor, padding: Tensor | None, context: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, padding, context)
        return self.norm(x)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[KVState, ...]:
        return tuple(layer.attention.init_state(batch, dtype=dtype, device=device) for layer in self.layers)  # type: ignore[operator,union-attr]

    def prefill(
        self, x: Tensor, states: Sequence[KVState], padding: Tensor | None, context: Tensor | None = None
    ) -> tuple[Tensor, tuple[KVState, ...]]:
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer.prefill(x, state, padding, context)  # type: ignore[operator]
            after.append(state)
        return self.norm(x), tuple(after)


class Layer(nn.Module):
    """x + attention(norm(x)) + feed-forward(norm(x)), perhaps + cross-attention(norm(x), context), side by side."""

    def __init__(self, settings: BlockTransformerSettings, attention: type[TurnedAttention], crossed: bool):
        super().__init__()
        dim = settings.dim
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attention = attention(settings)
        self.mlp = Mlp(dim, settings.hidden)
        self.norm_cross = nn.LayerNorm(dim, EPS) if crossed else None
        self.cross = (
            OpAttention(dim, settings.heads, op=softmax_attention, rotary=False, bias=True) if crossed else None
        )

    def forward(self, x: Tensor, padding: Tensor | None, context: Tensor | None) -> Tensor:
        mixed = self.attention(self.norm_attention(x), padding=padding, is_causal=True)
        return self._add(x, mixed, context)

    def prefill(
        self, x: Tensor, state: KVState, padding: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, KVState]:
        mixed, state = self.attention.prefill(self.norm_attention(x), state, padding=padding)
        return self._add(x, mixed, context), state

    def _add(self, x: Tensor, mixed: Tensor, context: Tensor | None) -> Tensor:
        out = x + mixed + self.mlp(self.norm_mlp(x))
        if self.cross is None or self.norm_cross is None:
            return out
        return out + self.cross(self.norm_cross(x), context)


class TurnedAttention(OpAttention):
    """Softmax attention with rotary positions in a share of every head's channels."""

    def __init__(self, settings: BlockTransformerSettings):
        super().__init__(settings.dim, settings.heads, op=softmax_attention, rotary=False, bias=True)
        self.turned = int(settings.rotary_share * self.head_dim)
        if self.turned % 2:
            raise OptionError(
                f"rotary_share {settings.rotary_share} of {self.head_dim} channels is {self.turned}; it must be even"
            )

    def _rotate(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + q.shape[2], device=q.device)
        return rope(q, positions, dims=self.turned), rope(k, positions, dims=self.turned)


class WindowAttention(TurnedAttention):
    """The same for the inside of a block: its cache keeps no room for what will not come."""

    def init_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> KVState:
        state = super().init_state(batch, dtype=dtype, device=device)
        return WindowState(state.k, state.v)


@dataclass(frozen=True)
class WindowState(KVState):
    """Keys and values of one block."""

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, *, keep: int | None = None) -> Self:
        return super().append(k, v, valid, keep=self.k.shape[2] + k.shape[2] if keep is None else keep)


def _check(settings: BlockTransformerSettings) -> None:
    s = settings
    if s.decoder not in ("prefix", "summation", "cross"):
        raise OptionError(f"decoder is {s.decoder!r}; it is 'prefix', 'summation' or 'cross'")
    if min(s.vocab, s.block_length, s.n_prefix, s.block_layers, s.token_layers) < 1:
        raise OptionError("vocab, block_length, n_prefix, block_layers and token_layers are at least 1")
    if s.dim % s.block_length:
        raise OptionError(f"the embeddings of {s.block_length} tokens do not make up a width of {s.dim}")
    if s.decoder == "summation" and s.n_prefix != s.block_length:
        raise OptionError(
            f"summation adds one vector to each token: n_prefix is {s.n_prefix}, it must be block_length = {s.block_length}"
        )


def _check_ids(ids: Tensor, padding: Tensor | None) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or not ids.shape[1]:
        raise ShapeError(f"token ids are {ids.dtype} {tuple(ids.shape)}; they must be integers (B, N), N at least 1")
    if padding is not None and (padding.dtype != torch.bool or padding.shape != ids.shape):
        raise ShapeError(f"padding is {padding.dtype} {tuple(padding.shape)}; it must be bool {tuple(ids.shape)}")


def _or_all(valid: Tensor | None, like: Tensor) -> Tensor:
    """A mask (B, n), or ones of the first two axes of `like`."""
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if valid is None else valid


def _hide(x: Tensor, known: Tensor | None) -> Tensor:
    return x if known is None else x * known[..., None]
