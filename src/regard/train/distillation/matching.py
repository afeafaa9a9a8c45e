"""Student and teacher side by side: what each has at its sites, and how far they are apart.

A distance is a function (student, teacher, mask) -> scalar, 0 at equality but for `HardTargets`; the mask, bool (B, N),
leaves out pads. Teachers get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError
from regard.hosts.tape import Tape, record

Distance: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Tap:
    """A place on a tape. kind: "resid_post", "logits" and so on; layer: negative from the last."""

    kind: str
    layer: int = 0

    def read(self, tape: Tape) -> Tensor:
        """What was recorded there."""
        return tape[self.kind, self.layer]


@dataclass(frozen=True)
class Pair:
    """Two places whose distance is part of the loss `name`, times `weight`."""

    name: str
    student: Tap
    teacher: Tap
    distance: Distance
    weight: float = 1.0


@dataclass(frozen=True)
class FeatureMSE:
    """The mean squared difference of features (B, N, C) over tokens and channels."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        if student.shape != teacher.shape:
            raise ShapeError(
                f"features of the student are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
            )
        return _mean((student - teacher).square().mean(-1), mask)


@dataclass(frozen=True)
class SoftTargets:
    """KL(teacher || student) of logits (B, N, V) at a temperature, times its square, the mean over tokens."""

    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise OptionError(f"a temperature is above 0, not {self.temperature}")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        ours, theirs = (F.log_softmax(x.float() / self.temperature, -1) for x in (student, teacher))
        return self.temperature**2 * _mean(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1), mask)


@dataclass(frozen=True)
class HardTargets:
    """The cross-entropy of the student's logits (B, N, V) with the teacher's most likely tokens, the mean over tokens."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        losses = F.cross_entropy(student.float().flatten(0, 1), teacher.argmax(-1).flatten(), reduction="none")
        return _mean(losses.view(student.shape[:2]), mask)


def match(
    pairs: Sequence[Pair], student: nn.Module, teacher: nn.Module, batch: Tensor | Mapping[str, Any]
) -> dict[str, Tensor]:
    """The losses of pairs by name, from one pass of each model over token ids or keywords of both models.

    The teacher runs in evaluation mode; labels are not given to either. Raises OptionError, ShapeError, Unsupported.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else {k: x for k, x in batch.items() if k != "labels"}
    mask = inputs.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) else None
    with evaluating(teacher):
        theirs = _taped(teacher, inputs, [pair.teacher for pair in pairs], grads=False)
    ours = _taped(student, inputs, [pair.student for pair in pairs], grads=True)
    losses: dict[str, Tensor] = {}
    for pair in pairs:
        loss = pair.weight * pair.distance(pair.student.read(ours), pair.teacher.read(theirs), mask)
        losses[pair.name] = losses[pair.name] + loss if pair.name in losses else loss
    return losses


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode; afterwards each of its parts has the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _taped(model: nn.Module, inputs: Mapping[str, Any], taps: Sequence[Tap], grads: bool) -> Tape:
    sites, layers = tuple({tap.kind for tap in taps}), sorted({tap.layer for tap in taps})
    # a step of training holds what it holds; the tape's guard is for readings
    return record(model, inputs, sites=sites, layers=layers, grads=grads, limit_bytes=1 << 60)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of values (B, N) over real tokens."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)
