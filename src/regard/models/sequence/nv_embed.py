"""A language model as an embedder of texts: its causal mask taken off, its tokens pooled.

    embedding = pool(h over the text's own tokens) / || pool(…) ||,   h: hidden states of "Instruct: …\\nQuery: text"

Tokens of the instruction and pads are read by the model, but not pooled. Departs from the paper: where a token covers the
border between instruction and text, it counts as text; so do the tokens that a tokenizer adds after the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.attach import model_inside, open_session
from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.names import get
from regard.layers.pooling import Pool
from regard.mixers.tokens.nv_embed import LatentAttentionPool
from regard.mixers.tokens.trainable_pooling import MultiLayerPool

CARD = ModelCard(
    slug="nv_embed",
    title="A language model as text embedder",
    part_of="nv_embed",
    builds_on=("nv_embed", "trainable_pooling"),
    exports=("TextEmbedder", "TextTokens"),
    example="b=2 n=10 v=60",
    options={"tokenizer": None, "pool": "latent"},
    stands_on="llama",
    task="texts, or token ids, to one vector each",
)

PoolName = Literal["mean", "last", "latent", "multilayer"]


class TextTokens(NamedTuple):
    """Texts as tokens. ids: int64 (B, N). padding: bool (B, N), True for tokens. pooled: bool (B, N), those pooled."""

    ids: Tensor
    padding: Tensor
    pooled: Tensor


class TextEmbedder(nn.Module):
    """Token ids, or texts, to unit vectors (B, C) through a transformers model and a pool (section 3).

    model: its head is left out, its weights and adapters (LoRA) are shared. tokenizer: a fast one, for texts. pool: "mean",
    "last", "latent" (LatentAttentionPool), "multilayer" (MultiLayerPool), or a module that takes tokens as they do, with
    `dim`, and with `num_layers` if it takes all layers. bidirectional: tokens see those after them, while the embedder runs;
    the model is otherwise as it was. Raises OptionError, ShapeError; Unsupported for a model that cannot be bidirectional,
    and for adapters that learn prompts.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, pool: PoolName | nn.Module = "latent", bidirectional: bool = True
    ):
        super().__init__()
        try:
            inside = model_inside(model)
        except Unsupported as error:
            name = type(model).__name__
            raise OptionError(f"the embedder stands on a model of transformers, not on a {name}: {error}") from error
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise Unsupported(
                "the embedder calls the model itself, without the prompts that this adapter learns beside it"
            )
        self.model, self.tokenizer, self.bidirectional = inside.base_model, tokenizer, bidirectional
        self.config = inside.config.get_text_config()
        self.pool = self._made(pool) if isinstance(pool, str) else pool
        self._check_pool()
        with self._session():
            pass

    def forward(self, ids: Tensor, *, padding: Tensor | None = None, pooled: Tensor | None = None) -> Tensor:
        """ids int64 (B, N); padding: bool (B, N), True for tokens, wherever pads stand; pooled: bool (B, N), the tokens
        among them that are pooled, all if None. Unit vectors (B, C), float32 at least."""
        padding = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding
        pooled = padding if pooled is None else pooled
        for what, mask in (("padding", padding), ("pooled", pooled)):
            if mask.dtype != torch.bool or mask.shape != ids.shape:
                raise ShapeError(f"{what} is {tuple(mask.shape)} of {mask.dtype}; it must be bool {tuple(ids.shape)}")
        pooled = pooled & padding
        empty = (~pooled.any(1)).nonzero().flatten().tolist()
        if empty:
            raise OptionError(f"no token of row {empty[0]} is pooled: give it a text after the instruction")
        # tokens first and pads behind them, so that positions do not depend on where the pads were
        order = torch.argsort(~padding, dim=1, stable=True)[:, : int(padding.sum(1).max())]
        ids, padding, pooled = (x.gather(1, order) for x in (ids, padding, pooled))
        out = self.pool(self._hidden(ids, padding), padding=pooled)
        return F.normalize(out.to(torch.promote_types(out.dtype, torch.float32)), dim=-1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], instruction: str | None = None, *, batch_size: int = 32) -> Tensor:
        """Unit vectors (len(texts), C) without gradients. instruction: what the texts are asked for; for documents none.

        Texts beyond the model's positions are cut off. Raises OptionError for an empty text or none at all.
        """
        if isinstance(texts, str) or not texts:
            raise OptionError("give a list of texts")
        parts = []
        for first in range(0, len(texts), batch_size):
            ids, padding, pooled = self.tokens(texts[first : first + batch_size], instruction)
            parts.append(self(ids, padding=padding, pooled=pooled))
        return torch.cat(parts)

    def tokens(self, texts: Sequence[str], instruction: str | None = None) -> TextTokens:
        """What `forward` takes, for training. Raises OptionError; Unsupported without a fast tokenizer."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise Unsupported("texts need a fast tokenizer, which tells what each token covers: give tokenizer=")
        prefix = "" if instruction is None else f"Instruct: {instruction}\nQuery: "
        limit = min(self.tokenizer.model_max_length, getattr(self.config, "max_position_embeddings", 1 << 30))
        made = self.tokenizer(
            [prefix + text for text in texts], truncation=True, max_length=limit, return_offsets_mapping=True
        )
        starts = []
        for text, offsets in zip(texts, made["offset_mapping"], strict=True):
            own = [i for i, (a, b) in enumerate(offsets) if b > max(a, len(prefix))]
            if not own or not text.strip():
                why = f"the instruction fills all {limit} tokens" if text.strip() else "it is empty"
                raise OptionError(f"nothing of the text {text[:40]!r} can be pooled: {why}")
            starts.append(own[0] if prefix else 0)
        lengths = torch.tensor([len(row) for row in made["input_ids"]])
        places = torch.arange(int(lengths.max()))
        padding = places < lengths[:, None]
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full(padding.shape, pad)
        ids[padding] = torch.tensor([i for row in made["input_ids"] for i in row])
        pooled = padding & (places >= torch.tensor(starts)[:, None])
        where = next(self.model.parameters()).device
        return TextTokens(ids.to(where), padding.to(where), pooled.to(where))

    def _hidden(self, ids: Tensor, padding: Tensor) -> Tensor:
        """The last layer's tokens (B, N, C), or those of all layers (B, L, N, C), without the embeddings."""
        every = hasattr(self.pool, "num_layers")
        again = self.training and any(
            getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        )
        if self.bidirectional and torch.is_grad_enabled() and again:
            raise Unsupported(
                "gradient checkpointing runs layers again after the embedder has ended: give bidirectional=False and "
                "keep steer(model, Bidirectional()) open until after backward"
            )
        more = {"use_cache": False} if getattr(self.config, "use_cache", False) else {}
        with self._session():
            out = self.model(input_ids=ids, attention_mask=padding.long(), output_hidden_states=every, **more)
        return torch.stack(out.hidden_states[1:], 1) if every else out.last_hidden_state

    def _session(self) -> Any:
        return open_session(self.model, (get("bidirectional")(),)) if self.bidirectional else nullcontext()

    def _made(self, name: str) -> nn.Module:
        dim = self.config.hidden_size
        if name in ("mean", "last"):
            return Pool(dim, name)  # type: ignore[arg-type]
        if name == "latent":
            return LatentAttentionPool(dim)
        if name == "multilayer":
            of: Literal["mean", "last"] = "mean" if self.bidirectional else "last"
            return MultiLayerPool(dim, num_layers=self.config.num_hidden_layers, of=of)
        raise OptionError(f'pool is "mean", "last", "latent", "multilayer" or a module, not {name!r}')

    def _check_pool(self) -> None:
        pool: Any = self.pool
        dim, layers = self.config.hidden_size, self.config.num_hidden_layers
        if getattr(pool, "dim", dim) != dim:
            raise OptionError(f"the pool is built for a width of {pool.dim}, the model has {dim}")
        if getattr(pool, "num_layers", layers) != layers:
            raise OptionError(f"the pool is built for {pool.num_layers} layers, the model has {layers}")
