"""A model run on sequences of which every process holds a part, without a change to the model.

Inside the block every call of an engine is taken over: softmax attention by the ring (or by gathered keys), scans by
LASP-2, each by what the layer calls; torch's own attention likewise. Positions are those of the whole sequence.
What mixes tokens in another way is refused, not run on the part alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from regard.contract.catalogue import catalogue
from regard.contract.dispatch import Implementation
from regard.contract.errors import OptionError, Unsupported
from regard.contract.split import current, splitting
from regard.engines import dense
from regard.parallel.exchange import Group, Layout, agree, pieces, place, positions_of, sum_gradients
from regard.parallel.lasp2 import ScanOver, allgather_attention
from regard.parallel.ring_self_attention import ring_attention
from regard.patterns import Bound, Causal, Full, KeyValid, Pattern, SlidingWindow
from regard.primitives.normalisers import Softmax

# systems of which everything that mixes tokens goes through the engines taken over here
SPLIT = ("softmax", "sliding_window", "sqa", "linear", "lightning", "based")
_WHO = f"these can be split: {', '.join(SPLIT)}"
# what of torch mixes tokens, or takes statistics over them
_MIXING: dict[Any, str] = {
    **{f: "a convolution" for f in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d)},
    **{f: "a recurrent layer" for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **{f: "a norm over tokens" for f in (F.batch_norm, F.group_norm, F.instance_norm)},
    F.multi_head_attention_forward: "nn.MultiheadAttention, which hides its attention (a regard mixer does not),",
}


class SequenceParallel:
    """A block inside which a model sees parts of sequences: `with SequenceParallel(model, group): model(shard(ids, 1))`.

    model: what will be called. layout: of the parts; scans need "contiguous". attention: "ring", or "gather" for LASP-2H's
    gathered keys ("contiguous" only). Backward may run inside or after the block, checkpointed layers inside. Modules that
    drop draw on every process by itself.
    Raises Unsupported, on entering for systems and inside for calls that cannot be split; OptionError, PeerLost.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group = None,
        *,
        layout: Layout = "contiguous",
        attention: Literal["ring", "gather"] = "ring",
    ):
        place(group)
        if attention not in ("ring", "gather"):
            raise OptionError(f"attention is {attention!r}; it is 'ring' or 'gather'")
        if attention == "gather" and layout != "contiguous":
            raise OptionError("gathered keys are in order: attention='gather' needs layout='contiguous'")
        self.model, self.group, self.layout, self.attention = model, group, layout, attention
        self._open: list[ExitStack] = []

    def __enter__(self) -> Self:
        _refuse_systems(self.model)
        split = _Split(self.group, self.layout, self.attention)
        with ExitStack() as stack:
            stack.enter_context(splitting(split))
            stack.enter_context(_TorchCalls(split))
            self._open.append(stack.pop_all())
        return self

    def __exit__(self, *error: object) -> None:
        self._open.pop().close()

    def sum_gradients(self) -> None:
        """Add up the gradients of the parameters over the group, as the gradient of the sum of the losses needs."""
        sum_gradients(self.model, self.group)


class _Split:
    def __init__(self, group: Group, layout: Layout, attention: str):
        self.group, self.layout, self.attention = group, layout, attention

    def admit(self, slug: str) -> None:
        if slug not in SPLIT:
            raise Unsupported(f"{slug} cannot be split over processes; {_WHO}")

    def positions(self, start: int, n: int, device: torch.device) -> Tensor:
        if start:
            raise Unsupported("decoding from a state is the work of one process: leave SequenceParallel first")
        rank, size = place(self.group)
        agree({"local sequence lengths": n}, self.group)
        return positions_of(pieces(n, rank, size, self.layout)).to(device)

    def implementation(
        self, implementations: Sequence[Implementation], requested: str | None, call: Any
    ) -> Implementation:
        family = implementations[0].name.partition(":")[0]
        if requested is not None:
            raise Unsupported(f"engine={requested!r} runs in one process; inside SequenceParallel leave engine= out")
        if family == "scan":
            if self.layout != "contiguous":
                raise Unsupported("the prefix of states needs contiguous chunks: SequenceParallel(layout='contiguous')")
            if call.s0 is not None:
                raise Unsupported("decoding from a state is the work of one process: leave SequenceParallel first")
            return ScanOver(self.group, False).implementation(implementations, None, call)
        if family not in ("dense", "block_sparse"):
            raise Unsupported(f"the engine {family} is not split over processes; {_WHO}")
        reasons = _not_plain(call)
        if reasons:
            raise Unsupported(f"this attention cannot be split over processes: {', '.join(reasons)}")
        return Implementation(f"dense:{self.attention}", lambda call: [], self.attend)

    def attend(self, call: dense.Call) -> dense.Attended:
        """A plain call of softmax attention, over the whole sequence."""
        parts = _parts(call)
        windows = [p.window for p in parts if isinstance(p, SlidingWindow)]
        options: dict[str, Any] = {
            "is_causal": call.is_causal or any(isinstance(p, Causal) for p in parts),
            "scale": call.scale,
            "window": min(windows) if windows else None,
            "group": self.group,
        }
        if isinstance(call.pattern, Bound):
            valid = [call.pattern.data[p.label] for p in parts if isinstance(p, KeyValid)]
            if valid:
                options["key_valid"] = torch.stack(valid).all(0).expand(call.q.shape[0], -1)
        if self.attention == "gather":
            return dense.Attended(allgather_attention(call.q, call.k, call.v, **options))
        return dense.Attended(ring_attention(call.q, call.k, call.v, layout=self.layout, **options))


class _TorchCalls(TorchFunctionMode):
    """Torch's own attention goes to the split; what else of torch mixes tokens is refused."""

    def __init__(self, split: _Split):
        super().__init__()
        self.split = split

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # not what the ring itself calls
        if current() is self.split:
            if function is F.scaled_dot_product_attention:
                return self._attend(*args, **kwargs)
            if function in _MIXING:
                raise Unsupported(f"{_MIXING[function]} mixes tokens and is not split over processes; {_WHO}")
        return function(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call = dense.Call(
            query, key, value, mask=attn_mask, is_causal=is_causal, scale=scale, dropout_p=dropout_p
        )  # fmt: skip
        return self.split.implementation(dense.IMPLEMENTATIONS, None, call).run(call).out


def _refuse_systems(model: nn.Module) -> None:
    """Raise Unsupported for a model with a mixer, or of a kind, that mixes tokens outside the engines taken over."""
    systems = {e.module: e.card for e in catalogue().values() if e.room in ("mixers", "models")}
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            card = systems.get(kind.__module__)
            slug = card and (card.part_of or card.slug)
            if slug and slug not in SPLIT:
                raise Unsupported(f"{name or 'the model'} is {slug}, which cannot be split over processes; {_WHO}")


def _not_plain(call: dense.Call) -> list[str]:
    """Why a call is not softmax attention that knows positions and padding alone."""
    reasons = []
    if type(call.normaliser) is not Softmax:
        reasons.append(f"the normaliser is {type(call.normaliser).__name__}")
    if call.dropout_p:
        reasons.append("there is dropout, whose draws would differ with the number of processes")
    if call.q_offset:
        reasons.append("there is a q_offset: positions follow from the part")
    if call.mask is not None:
        reasons.append("there is a mask, which cannot speak of keys elsewhere; give padding as KeyValid()")
    present = {
        "a bias": call.bias is not None or bool(call.indexed),
        "a score_mod": call.score_mod is not None,
        "a sink": call.sinks is not None,
        "extra keys": call.extra_k is not None,
        "a read-out of weights or log-sum-exp": call.return_lse or call.return_weights,
    }
    reasons += [f"there is {what}" for what, there in present.items() if there]
    if not isinstance(call.pattern, Pattern | Bound | None):
        return [*reasons, f"there is a {type(call.pattern).__name__}"]
    for part in _parts(call):
        plain = isinstance(part, Full | SlidingWindow) or (isinstance(part, Causal) and not part.strict)
        if not plain and not (isinstance(part, KeyValid) and not part.rows):
            reasons.append(f"the pattern {part} is none of Causal(), SlidingWindow() and KeyValid()")
    return reasons


def _parts(call: dense.Call) -> tuple[Pattern, ...]:
    pattern = call.pattern.pattern if isinstance(call.pattern, Bound) else call.pattern
    return () if pattern is None else pattern.conjuncts()
