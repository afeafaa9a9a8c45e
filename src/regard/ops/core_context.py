"""Core context attention: pooled core tokens of far groups, exact tokens near, in one softmax.

    core of a group:  a = softmax over its tokens of scale q_last . k_j;   k^ = sum a_j k_j,   v^ = sum a_j v_j
    c(i) = max(0, floor((i + 1 - window) / group));  token i attends to cores 0 … c(i) - 1 and to tokens c(i) group … i

q_last is the query of the group's last token. Every past token is covered exactly once.
Departs from the paper: none.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.contract.operator import operator
from regard.engines.block_sparse import block_sparse
from regard.engines.precision import accumulator, without_autocast
from regard.patterns import Causal, CoreContext
from regard.primitives.merge import merge

CARD = OpCard(
    slug="core_context",
    title="Core context aware attention",
    paper="Core Context Aware Attention for Long Context Language Modeling",
    exports=("core_context_attention", "core_pool"),
    spec="q: b h n d, k: b g m d, v: b g m e -> b h n e",
    example="b=2 h=4 g=2 n=11 m=11 d=8 e=6",
    options={"group": 2, "window": 4},
    attends=("causal_self",),
    accepts=("scale",),
    time="n (n / group + window) d",
    memory="n (n / group + window)",
    engines=("block_sparse",),
)

LOG = logging.getLogger(__name__)


@operator(CARD)
def core_context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: int = 16,
    window: int = 1024,
    is_causal: bool = False,
    scale: float | None = None,
    engine: str | None = None,
) -> Tensor:
    """Causal attention to cores of far groups and to near tokens (section 3).

    group: tokens that one core stands for. window: tokens that are met one by one at least; a token sees
    window … window + group - 1 of them. Up to window + group - 1 tokens it is causal attention. scale: D^-1/2 if None.
    Raises OptionError, ShapeError; Unsupported with is_causal=False. Warns if a group is longer than the window.
    """
    if not is_causal:
        raise Unsupported("core_context is causal only: pass is_causal=True; softmax works both ways")
    if k.shape[2] != q.shape[2]:
        raise ShapeError(f"core_context mixes a sequence with itself; got {q.shape[2]} queries, {k.shape[2]} keys")
    check_sizes(group, window)
    seen = core_count(q.shape[2] - 1, group, window) * group
    cores = core_pool(q[:, :, :seen], k[:, :, :seen], v[:, :, :seen], group, scale=scale)
    return attend_cores(q, k, v, cores, group=group, window=window, scale=scale, engine=engine)


def core_pool(q: Tensor, k: Tensor, v: Tensor, group: int, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Cores of all complete groups, for each query head: (keys (B, H, P, D), values (B, H, P, E)), P = N // group.

    q (B, H, N, D), k (B, G, N, D), v (B, G, N, E), of which only the last query of each group is read.
    """
    heads, count, kind = q.shape[1], q.shape[2] // group, accumulator(q.dtype)
    with without_autocast(q.device):
        last = q[:, :, group - 1 : count * group : group].to(kind)
        k, v = (
            x[:, :, : count * group].to(kind).unflatten(2, (count, group)).repeat_interleave(heads // x.shape[1], 1)
            for x in (k, v)
        )
        scores = (k @ last[..., None])[..., 0] * (q.shape[3] ** -0.5 if scale is None else scale)
        weights = scores.softmax(-1)[..., None, :]
        return (weights @ k)[..., 0, :].to(q.dtype), (weights @ v)[..., 0, :].to(q.dtype)


def core_count(position: int, group: int, window: int) -> int:
    """How many cores the token at a position (from 0) attends to."""
    return max(0, (position + 1 - window) // group)


def check_sizes(group: int, window: int) -> None:
    """Raise OptionError for a group or a window below 1; warn if a group is longer than the window."""
    if group < 1 or window < 1:
        raise OptionError(f"core_context needs groups and a window of at least 1 token, not {group} and {window}")
    if torch.compiler.is_compiling():
        return
    if group > window:
        warnings.warn(f"groups of {group} tokens are longer than the window of {window}", stacklevel=3)
    if window % group:
        LOG.debug("a window of %d is no multiple of groups of %d: tokens see up to %d more", window, group, group - 1)


def attend_cores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cores: tuple[Tensor, Tensor],
    *,
    group: int,
    window: int,
    first: int = 0,
    scale: float | None = None,
    engine: str | None = None,
) -> Tensor:
    """The last tokens of k, v, whose queries q are, over the cores and over all of k, v that they may see.

    first: the position of the first of k, v, a multiple of group; no query meets a token before it one by one.
    cores: keys and values of the groups from the start of the text on, at least those that a query sees.
    """
    offset = k.shape[2] - q.shape[2]
    if not core_count(first + k.shape[2] - 1, group, window):
        return block_sparse(q, k, v, Causal(), q_offset=offset, scale=scale, engine=engine).out
    far, near = CoreContext(group, window, "cores"), CoreContext(group, window, "tokens")
    parts = (
        block_sparse(q, *cores, far, q_offset=first + offset, scale=scale, return_lse=True, engine=engine),
        block_sparse(q, k, v, near, q_offset=offset, scale=scale, return_lse=True, engine=engine),
    )
    return merge([part.out for part in parts], [part.lse for part in parts if part.lse is not None])[0]
