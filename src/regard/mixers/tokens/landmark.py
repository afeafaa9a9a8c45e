"""Landmark attention as a layer: trained on short texts, it retrieves blocks from a cache of any length.

    every (block + 1)-th token is a landmark; a step scores the landmarks in the cache, takes the topk blocks of each
    head, and attends to these and to the open block;  keys are kept before rotation

With stingy places a row never meets a distance beyond topk + 1 blocks and the open one, however long the text is.
Departs from the paper: none; one set of blocks for several rows is taken over the rows of one call in one block.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.layers.attention import Attention, check_tokens
from regard.layers.caches import KVState, LandmarkState
from regard.ops.landmark import landmark_attention, landmark_retrieve
from regard.patterns import Causal
from regard.primitives.positions import rope

CARD = MixerCard(
    slug="landmark",
    title="Landmark attention layer",
    part_of="landmark",
    builds_on=("landmark",),
    exports=("LandmarkAttention", "insert_landmarks"),
    example="b=2 n=10 c=16 h=4",
    options={"block": 2, "topk": 2},
    attends=("causal_self",),
    decode=True,
    time="n m c",
    memory="n c",
)


class LandmarkAttention(Attention):
    """Causal attention over tokens of which every (block + 1)-th is a landmark (section 3).

    block: ordinary tokens before each landmark. topk: blocks that each row and head reads from the cache, None for
    all (training). positions: "true" leaves retrieved blocks where they are, "stingy" moves them near (section 3.2).
    retrieve: "row", every row its own blocks, or "call", one set for each head and all rows of a call in one block
    (largest softmaxed landmark score); then results depend on how a text is cut into calls. memory_device: where
    closed blocks are kept, that of the layer if None. The other options are those of the attention layer.
    Raises OptionError, Unsupported.
    """

    crosses = False

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 50,
        topk: int | None = None,
        positions: Literal["true", "stingy"] = "true",
        retrieve: Literal["row", "call"] = "row",
        memory_device: str | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rotary: bool = True,
        rotary_base: float = 1e4,
    ):
        super().__init__(
            dim, heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, qk_norm=qk_norm, rotary=rotary,
            rotary_base=rotary_base,
        )  # fmt: skip
        if block < 1:
            raise OptionError(f"landmark needs a block of at least 1 token, not {block}")
        if topk is not None and topk < 1:
            raise OptionError(f"landmark needs a topk of at least 1 block, not {topk}")
        if positions not in ("true", "stingy"):
            raise OptionError(f"positions is {positions!r}; it is 'true' or 'stingy'")
        if retrieve not in ("row", "call"):
            raise OptionError(f"retrieve is {retrieve!r}; it is 'row' or 'call'")
        self.block, self.topk, self.positions, self.retrieve = block, topk, positions, retrieve
        self.memory_device = memory_device

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C) causally; token t is a landmark if (t + 1) % (block + 1) == 0.

        Raises ShapeError; Unsupported for a context, padding, reset and is_causal=False.
        """
        self._refuse(context, padding, reset)
        if not is_causal:
            raise Unsupported("landmark is causal only: pass is_causal=True; softmax works both ways")
        check_tokens(type(self).__name__, self.dim, x, None, None, None, True)
        # rows of one block share their retrieval, and stand in other places than in the text
        if self.topk is not None and (self.positions == "stingy" or self.retrieve == "call"):
            state = self.init_state(x.shape[0], dtype=x.dtype, device=x.device)
            return self._read(x, state)[0]
        q, k, v = self._project(x, x)
        q, k = self._rotate(q, k, 0)
        return self._merge_heads(landmark_attention(q, k, v, block=self.block, topk=self.topk, is_causal=True))

    def init_state(  # type: ignore[override]
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> LandmarkState:
        """The state before the first token."""
        local = super().init_state(batch, dtype=dtype, device=device)
        away = local.k if self.memory_device is None else local.k.to(self.memory_device)
        return LandmarkState(KVState(away, away), local.k, local)

    def prefill(  # type: ignore[override]
        self, x: Tensor, state: LandmarkState, *, padding: Tensor | None = None
    ) -> tuple[Tensor, LandmarkState]:
        """N >= 1 tokens after the state. Raises Unsupported for padding: blocks are counted from the first token."""
        self._refuse(None, padding, None)
        check_tokens(type(self).__name__, self.dim, x, None, None, None, True)
        return self._read(x, state)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the state after `length` tokens, in the dtype of the weights."""
        vectors = 2 * length + length // (self.block + 1)
        return batch * self.kv_heads * vectors * self.head_dim * self.to_k.weight.element_size()

    def _read(self, x: Tensor, state: LandmarkState) -> tuple[Tensor, LandmarkState]:
        q, k, v = self._project(x, x)
        period = self.block + 1
        bounds = [0, *range(period - state.seen % period, x.shape[1], period), x.shape[1]]
        if self.topk is None:
            first = state.seen
            for start, stop in pairwise(bounds):
                state = state.append(k[:, :, start:stop], v[:, :, start:stop], period)
            out = self._attend_all(q, state, first)
        else:
            outs = []
            for start, stop in pairwise(bounds):
                piece, state = self._attend_best(
                    q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], state, self.topk
                )
                outs.append(piece)
            out = torch.cat(outs, 2)
        return self._merge_heads(out), state

    def _attend_all(self, q: Tensor, state: LandmarkState, first: int) -> Tensor:
        """Every block of the cache, in its true place."""
        memory, local = state.memory, state.local
        k = torch.cat((memory.k.to(q.device), local.k), 2)
        v = torch.cat((memory.v.to(q.device), local.v), 2)
        q, k = self._turn(q, self._range(first, q)), self._turn(k, self._range(0, k))
        return landmark_attention(q, k, v, block=self.block, pattern=Causal(), q_offset=first)

    def _attend_best(
        self, q: Tensor, k: Tensor, v: Tensor, state: LandmarkState, topk: int
    ) -> tuple[Tensor, LandmarkState]:
        """Rows of one block: their own block, and the best ones of the cache."""
        local = (torch.cat((state.local.k, k), 2), torch.cat((state.local.v, v), 2))
        out = landmark_retrieve(
            q, local, (state.memory.k, state.memory.v), state.landmarks, block=self.block, topk=topk,
            positions=self.positions, retrieve=self.retrieve, move=lambda x, origin, places: self._turn(x, places),
        )  # fmt: skip
        return out, state.append(k, v, self.block + 1)

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        return rope(x, places, base=self.rotary_base) if self.rotary else x

    def _range(self, start: int, x: Tensor) -> Tensor:
        return torch.arange(start, start + x.shape[2], device=x.device)

    def _refuse(self, context: Tensor | None, padding: Tensor | None, reset: Tensor | None) -> None:
        if context is not None:
            raise Unsupported("landmark mixes a sequence with itself and reads no context; softmax does")
        for name, given in (("padding", padding), ("reset", reset)):
            if given is not None:
                raise Unsupported(f"landmark counts blocks from the first token and takes no {name}; softmax does")


def insert_landmarks(ids: Tensor, block: int, landmark_id: int) -> Tensor:
    """A landmark behind every `block` tokens: ids (B, N) or (N,) -> (…, N + N // block).

    Raises ShapeError; OptionError where the ids hold landmarks already.
    """
    if ids.dim() not in (1, 2) or ids.is_floating_point():
        raise ShapeError(f"token ids are {ids.dtype} {tuple(ids.shape)}; they must be integers (B, N) or (N,)")
    if block < 1:
        raise OptionError(f"landmark needs a block of at least 1 token, not {block}")
    if bool((ids == landmark_id).any()):
        raise OptionError(
            f"the ids hold the landmark {landmark_id} already: insert landmarks once, with an id of its own"
        )
    whole = ids.shape[-1] // block * block
    blocks = ids[..., :whole].unflatten(-1, (-1, block))
    marked = torch.cat((blocks, torch.full_like(blocks[..., :1], landmark_id)), -1)
    return torch.cat((marked.flatten(-2), ids[..., whole:]), -1)
