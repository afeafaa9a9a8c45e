"""Core context on a pretrained model: near tokens as they are, far ones as one core for each group, also in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.contract.attach import AttentionCall, Session, Step, intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import Unsupported
from regard.hosts.calls import is_causal_alone
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

    group: tokens that one core stands for. window: tokens that are met one by one at least. Made for models that were
    tuned with it; without tuning answers get worse. The prompt comes in one piece, without pads. Layers with a window
    of their own stay as they are. Raises OptionError, Unsupported.
    """

    group: int = 16
    window: int = 1024

    def __post_init__(self) -> None:
        check_sizes(self.group, self.window)

    def start(self, session: Session) -> _Cores:
        """What acts in one session."""
        return _Cores(self.group, self.window, session.full_layers())


class _Cores:
    """The effect. The cores of a layer stand in its cache, beside the tokens that it still holds, and follow its rows."""

    card = CARD

    def __init__(self, group: int, window: int, layers: Sequence[int]):
        self.group, self.window, self.layers = group, window, layers
        # cores of other groups, or with other tokens gone, are none of ours
        self.notes = tuple(f"core_context {what} of {group}, {window}" for what in ("keys", "values"))

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        if not call.main or call.layer not in self.layers:
            return follow()
        first, n, group = call.step.start, call.q.shape[2], self.group
        if first and n > 1:
            raise Unsupported("core_context pools a prompt whole: it cannot come in pieces, or after writing")
        cores = self._cores(call)
        if not core_count(first + n - 1, group, self.window):
            return follow()
        self._check(call)
        if not first:
            z = core_context_attention(
                call.q, call.k, call.v, group=group, window=self.window, is_causal=True, scale=call.scale
            )
        else:
            if cores is None:
                raise Unsupported(
                    "this cache was filled before the block, without cores: begin with the prompt inside it"
                )
            z = attend_cores(
                call.q, call.k, call.v, cores, group=group, window=self.window, first=first + n - call.k.shape[2],
                scale=call.scale,
            )  # fmt: skip
        return follow(call.instead_of(z, "core_context"))

    def on_kv(self, step: Step, layer: int, kept: Any) -> None:
        """Let go the tokens of groups that are met as cores from now on."""
        if self.notes[0] not in kept.notes:
            return
        held = kept.keys.shape[2]
        gone = core_count(step.start, self.group, self.window) * self.group - (kept.seen - held)
        if gone > 0:
            kept.keep(torch.arange(gone, held, device=kept.keys.device).expand(*kept.keys.shape[:2], -1))

    def _cores(self, call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        """The cores of all whole groups so far, noted; None where they are not known, or nothing is kept."""
        group, kept, first = self.group, call.kept, call.step.start
        if kept is None:
            return None
        if not first:
            whole = call.q.shape[2] // group * group
            q, k, v = (x[:, :, :whole] for x in (call.q, call.k, call.v))
            cores = core_pool(q, k, v, group, scale=call.scale)
        elif self.notes[0] not in kept.notes:
            return None
        else:
            cores = kept.notes[self.notes[0]], kept.notes[self.notes[1]]
            if (first + 1) % group == 0:
                # the token that ends a group asks for its core
                q, k, v = call.q.expand(-1, -1, group, -1), call.k[:, :, -group:], call.v[:, :, -group:]
                new = core_pool(q, k, v, group, scale=call.scale)
                cores = torch.cat((cores[0], new[0]), 2), torch.cat((cores[1], new[1]), 2)
        kept.notes |= dict(zip(self.notes, cores, strict=True))
        return cores

    def _check(self, call: AttentionCall) -> None:
        if call.step.has_pads:
            raise Unsupported(
                "core_context counts groups from the first token, which pads would move: write row by row"
            )
        if call.bias is not None or call.sinks is not None or call.softcap is not None:
            raise Unsupported(
                f"layer {call.layer} has biases, sinks or caps of its scores, which cores know nothing of"
            )
        if not call.step.start and not is_causal_alone(call):
            raise Unsupported(f"layer {call.layer} has a mask of its own, and cores are met by all later tokens")
