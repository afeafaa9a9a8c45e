"""SnapKV: the last queries of the prompt vote for the keys that stay.

    votes_j = sum over the last W rows i of softmax(q_i k')_j ;   worth = pool(votes) ;   the best stay, with the window

Departs from the paper: with shared key heads the votes of a group are put together (its code copies the keys to all
query heads first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.attach import AttentionCall, Seen, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError
from regard.patterns import Causal
from regard.steer.cache.evict import KVSelect, over_groups

CARD = InterventionCard(
    slug="snapkv",
    title="SnapKV",
    paper="SnapKV: LLM Knows What You are Looking for Before Generation",
    exports=("SnapKV", "snap_votes"),
    options={"budget": 8, "window": 3, "kernel": 3},
    sites=("kv",),
    owns=("kv",),
    off={"budget": 4096},
    spares={"layers": (1,)},
    padding=True,
)

_VOTES = "snapkv"
# of the last rows of a prompt: queries (B, H, W, D), and what is added to their scores (B, 1 or H, W, M)
_QUERIES, _ADDED = "snapkv queries", "snapkv added"


@intervention(CARD)
@dataclass(frozen=True, kw_only=True)
class SnapKV(KVSelect):
    """Keep what the end of the prompt looks at; takes effect with the first token after it (section 4).

    budget: keys of each head and layer that stay, the window among them. window: the last rows, which vote and stay;
    those of the whole prompt, however long its pieces. All rows since the last token that was written are one prompt.
    kernel: over how many neighbours the votes are pooled, odd; pool: "max" or "avg". group: how query heads of one key
    head vote together, "mean" or "max". ratio: the budget as a share of the prompt. layers: None for all full ones. The
    votes fall on what the prompt's end resembles, say the words of a question, and not on the answer beside them, which
    is looked at only once it is written: half a kernel has to reach over it, in tokens. Where each digit is a token, 21
    finds a number of seven digits that 7 loses. A window that holds the question and the turn's end, and little more,
    votes best. Raises OptionError; Unsupported for caches that cannot give up keys.
    """

    kernel: int = 7
    pool: Literal["max", "avg"] = "max"
    group: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise OptionError(f"the window votes: it is at least 1, not {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"kernel is odd, so that votes do not shift, not {self.kernel}")
        if self.pool not in ("max", "avg") or self.group not in ("mean", "max"):
            raise OptionError(f'pool is "max" or "avg" and group "mean" or "max", not {self.pool!r}, {self.group!r}')

    @torch.no_grad()
    def on_read(self, call: AttentionCall, seen: Seen) -> None:
        """Count the votes at each piece of a prompt; those of the last one hold."""
        if call.kept is None or not self.acts_on(call.layer):
            return
        if call.step.phase == "decode":
            call.kept.notes = {k: x for k, x in call.kept.notes.items() if k not in (_QUERIES, _ADDED)}
        else:
            votes = _of_the_end(call, self.window).weights().float().sum(2)
            call.kept.marks[_VOTES] = over_groups(votes, call.kept.keys.shape[1], self.group)

    def scores(self, layer: int, kept: Any) -> Tensor | None:
        """The votes of the prefix, pooled, so that the neighbours of a peak stay too."""
        votes = kept.marks.pop(_VOTES, None)
        if votes is None:
            return None
        prefix = votes.shape[-1] - self.window
        return F.pad(_pooled(votes[..., :prefix], self.kernel, self.pool), (0, votes.shape[-1] - prefix))


def snap_votes(
    q: Tensor, k: Tensor, mask: Tensor | None = None, *, kernel: int = 7, pool: Literal["max", "avg"] = "max"
) -> Tensor:
    """The pooled votes of window queries q (B, H, W, D) for the keys before the window, k (B, G, M, D): (B, G, M - W).

    mask: bool (B|1, 1, W, M), True = may attend; None for causal rows. Key heads get the mean over their query heads.
    """
    rows, keys = q.shape[2], k.shape[2]
    pattern = Causal() if mask is None else None
    call = AttentionCall(
        q, k, k, pattern, mask, q.shape[-1] ** -0.5, 0, Step(0, "prefill", 0, rows), q_offset=keys - rows
    )
    votes = over_groups(call.weights().float().sum(2), k.shape[1], "mean")
    return _pooled(votes[..., : keys - rows], kernel, pool)


def _of_the_end(call: AttentionCall, window: int) -> AttentionCall:
    """The call of the prompt's last queries, those that came in earlier pieces among them; noted for the next piece."""
    last, notes = call.last(window), call.kept.notes
    (batch, _, rows, _), keys = last.q.shape, call.k.shape[2]
    added = last.q.new_zeros(()) if last.bias is None else last.bias
    visible = last.visible()
    if visible is not None:
        added = torch.where(visible, added, float("-inf"))
    q, added = last.q, added.expand(batch, added.shape[1] if added.dim() > 1 else 1, rows, keys)
    # a cache that went on elsewhere has other keys than the piece before this one left
    if _QUERIES in notes and notes[_ADDED].shape[3] + call.q.shape[2] == keys:
        heads = max(added.shape[1], notes[_ADDED].shape[1])
        both = F.pad(notes[_ADDED], (0, call.q.shape[2]), value=float("-inf")), added
        added = torch.cat([x.expand(-1, heads, -1, -1) for x in both], 2)[:, :, -window:]
        q = torch.cat((notes[_QUERIES], q), 2)[:, :, -window:]
    # a view would keep all rows alive
    notes |= {_QUERIES: q.detach().clone(), _ADDED: added.detach().clone()}
    return last.replace(q=q, pattern=None, mask=None, bias=added)


def _pooled(votes: Tensor, kernel: int, pool: str) -> Tensor:
    if pool == "max":
        return F.max_pool1d(votes, kernel, 1, kernel // 2)
    return F.avg_pool1d(votes, kernel, 1, kernel // 2)
