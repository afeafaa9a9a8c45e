"""Core context on a pretrained model: near tokens as they are, far ones as one core for each group, also in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import Unsupported
from regard.ops.core_context import attend_cores, check_sizes, core_context_attention, core_count, core_pool

CARD = InterventionCard(
    slug="core_context",
    part_of="core_context",
    title="Core context of a pretrained model",
    builds_on=("core_context",),
    exports=("CoreContextCache",),
    options={"group": 2, "window": 4},
    sites=("scores", "kv"),
    owns=("kv",),
    off={"window": 4096},
)


@intervention(CARD)
@dataclass(frozen=True)
class CoreContextCache:
    """Tokens further back than the window are met as cores, and leave the cache (section 3).

    group: tokens that one core stands for. window: tokens that are met one by one at least. Made for models that were tuned
    with it; without tuning answers get worse. The prompt comes in one piece, without pads. Raises OptionError, Unsupported.
    """

    group: int = 16
    window: int = 1024

    def __post_init__(self) -> None:
        check_sizes(self.group, self.window)

    def start(self, session: Session) -> _Cores:
        """The cores of one session."""
        return _Cores(self.group, self.window)


class _Cores:
    """The effect: the cores of every layer beside the tokens that the cache still holds."""

    card = CARD

    def __init__(self, group: int, window: int):
        self.group, self.window = group, window
        self.cores: dict[int, tuple[Tensor, Tensor]] = {}

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        if not call.main:
            return follow()
        first, n, group = call.step.start, call.q.shape[2], self.group
        if n > 1:
            if first:
                raise Unsupported("core_context pools a prompt whole: it cannot come in pieces, or after writing")
            whole = n // group * group
            q, k, v = (x[:, :, :whole] for x in (call.q, call.k, call.v))
            self.cores[call.layer] = core_pool(q, k, v, group, scale=call.scale)
        elif call.layer in self.cores and (first + 1) % group == 0:
            # the token that ends a group asks for its core
            q, k, v = call.q.expand(-1, -1, group, -1), call.k[:, :, -group:], call.v[:, :, -group:]
            (old_k, old_v), (k, v) = self.cores[call.layer], core_pool(q, k, v, group, scale=call.scale)
            self.cores[call.layer] = (torch.cat((old_k, k), 2), torch.cat((old_v, v), 2))
        if not core_count(first + n - 1, group, self.window):
            return follow()
        self._check(call)
        if n > 1:
            z = core_context_attention(
                call.q, call.k, call.v, group=group, window=self.window, is_causal=True, scale=call.scale
            )
        else:
            z = attend_cores(
                call.q, call.k, call.v, self.cores[call.layer], group=group, window=self.window,
                first=first + n - call.k.shape[2], scale=call.scale,
            )  # fmt: skip
        return follow(call.instead_of(z, "core_context"))

    def on_kv(self, step: Step, layer: int, kept: Any) -> None:
        """Let go the tokens of groups that are met as cores from now on."""
        if layer not in self.cores:
            return
        held = kept.keys.shape[2]
        gone = core_count(step.start, self.group, self.window) * self.group - (kept.seen - held)
        if gone > 0:
            kept.keep(torch.arange(gone, held, device=kept.keys.device).expand(*kept.keys.shape[:2], -1))

    def _check(self, call: AttentionCall) -> None:
        if call.step.has_pads:
            raise Unsupported(
                "core_context counts groups from the first token, which pads would move: write row by row"
            )
        if call.bias is not None or call.sinks is not None or call.softcap is not None:
            raise Unsupported(
                f"layer {call.layer} has biases, sinks or caps of its scores, which cores know nothing of"
            )
