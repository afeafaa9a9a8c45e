"""Distillation of Sparsifiner: estimates learn a dense teacher's attention, then the network its answers.

    reconstruction:     w mean over layers sum (A~ - A_teacher)^2, A~ unthinned, the student's own attention dense
    distillation:       w CE(labels) + w KL(teacher's logits || student's) + w mean (tokens - teacher's tokens)^2
    self_distillation:  w mean over layers sum (A~ - A)^2 with A the student's attention before the choice

The first and third train the estimates only, the second everything else; `SCHEDULE` has their epochs.
Departs from the released code: none in the numbers; gradients that its optimisers drop are not computed. Its least-k,
ratio and budget losses are left out: they are read off a mask without gradient and train nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import TrainingCard
from regard.contract.collect import collect_losses
from regard.contract.errors import OptionError, Unsupported
from regard.layers.attention import OpAttention
from regard.layers.sparsifiner import Connectivity, dense_rows
from regard.ops.softmax import softmax_attention
from regard.train.distillation.matching import evaluating

CARD = TrainingCard(
    slug="sparsifiner",
    title="Distillation of Sparsifiner's estimates",
    part_of="sparsifiner",
    exports=("ConnectivityDistillation",),
    builds_on=("softmax",),
    teacher="models/vit",
    student="models/vit",
    student_options={"mixer": "sparsifiner", "options": {"reduce_n": 2, "keep": 0.5, "basis_threshold": 0.0}},
    batch="images and labels",
    losses=("reconstruction",),
    trains=("*.connectivity.*",),
)

Phase = Literal["reconstruction", "distillation", "self_distillation"]
# phases and epochs of the released code's defaults
SCHEDULE: tuple[tuple[Phase, int], ...] = (
    ("reconstruction", 8),
    ("distillation", 12),
    ("self_distillation", 8),
    ("distillation", 22),
)


class ConnectivityDistillation:
    """The losses of one phase, `loss(model, batch)`, for a model whose layers choose keys by a `Connectivity`.

    teacher: the same network with softmax attention, where the model has its layers, in evaluation while it is asked;
    neither it nor its mode is changed. The model is started from it by `load_state_dict(…, strict=False)`.
    reconstruction, self_distillation, labels, logits, tokens: the weights w. last: the name of the module whose output
    are the last tokens. Raises OptionError; Unsupported for a teacher or a model without such layers.
    """

    def __init__(
        self,
        teacher: nn.Module,
        phase: Phase = "reconstruction",
        *,
        reconstruction: float = 0.01,
        self_distillation: float = 0.05,
        labels: float = 1.0,
        logits: float = 0.5,
        tokens: float = 0.5,
        last: str = "norm",
    ):
        if phase not in get_args(Phase):
            raise OptionError(f"the phase is {phase!r}; it is one of {', '.join(get_args(Phase))}")
        if not any(_is_softmax(module) for module in teacher.modules()):
            raise Unsupported(f"the teacher {type(teacher).__name__} has no attention layer over the softmax op")
        self.teacher, self.phase, self.last = teacher, phase, last
        self.reconstruction, self.self_distillation = reconstruction, self_distillation
        self.labels, self.logits, self.tokens = labels, logits, tokens

    def __call__(self, model: nn.Module, batch: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Named losses, times their weights. batch: inputs, or inputs and labels, which phase "distillation" needs.

        Raises OptionError where labels are missing or the teacher lacks a layer.
        """
        inputs, labels = batch if isinstance(batch, tuple) else (batch, None)
        chosen = {name: module for name, module in model.named_modules() if isinstance(module, Connectivity)}
        if not chosen:
            raise Unsupported(f"{type(model).__name__} has no layer that chooses keys; sparsifiner layers do")
        if self.phase == "reconstruction":
            return {"reconstruction": self.reconstruction * self._reconstruction(model, inputs, chosen)}
        if self.phase == "self_distillation":
            with collect_losses() as losses:
                model(inputs)
            if "sparsifiner" not in losses:
                raise OptionError("no layer makes an estimate: keep is 1 in all of them")
            return {"self_distillation": self.self_distillation * torch.stack(losses["sparsifiner"]).mean()}
        if labels is None:
            raise OptionError("the phase 'distillation' needs labels: give (inputs, labels)")
        return self._distillation(model, inputs, labels, max(c.prefix for c in chosen.values()))

    def _reconstruction(self, model: nn.Module, inputs: Tensor, chosen: dict[str, Connectivity]) -> Tensor:
        layers = {name: self._teacher_layer(name) for name in chosen}
        with torch.no_grad():
            with evaluating(self.teacher), _watching(layers) as theirs:
                self.teacher(inputs)
            with _dense(chosen.values()), _reading(chosen) as ours:
                model(inputs)
        errors = []
        for name, connectivity in chosen.items():
            weights = dense_rows(*theirs[name], connectivity.prefix)
            errors.append(connectivity.error(*ours[name], weights, raw=True))
        return torch.stack(errors).mean()

    def _distillation(self, model: nn.Module, inputs: Tensor, labels: Tensor, prefix: int) -> dict[str, Tensor]:
        with torch.no_grad(), evaluating(self.teacher), _output(self.teacher, self.last) as theirs:
            target = self.teacher(inputs)
        with _output(model, self.last) as ours:
            logits = model(inputs)
        divergence = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
        return {
            "labels": self.labels * F.cross_entropy(logits, labels),
            "logits": self.logits * divergence,
            "tokens": self.tokens * F.mse_loss(ours[0][:, prefix:], theirs[0][:, prefix:]),
        }

    def _teacher_layer(self, name: str) -> OpAttention:
        place = name.rpartition(".")[0]
        layer = dict(self.teacher.named_modules()).get(place)
        if not isinstance(layer, OpAttention) or not _is_softmax(layer) or layer.rotary:
            raise OptionError(
                f"the model chooses keys in {place or 'itself'}; the teacher has no softmax attention without rotary "
                "positions there"
            )
        return layer


def _is_softmax(module: nn.Module) -> bool:
    return isinstance(module, OpAttention) and module.op is softmax_attention


@contextmanager
def _dense(chosen: Iterable[Connectivity]) -> Iterator[None]:
    """All keys are read: nothing distorts the tokens while the estimate is poor."""
    before = [(c, c.keep, c.threshold) for c in chosen]
    try:
        for c, _, _ in before:
            c.keep, c.threshold = 1.0, None
        yield
    finally:
        for c, keep, threshold in before:
            c.keep, c.threshold = keep, threshold


@contextmanager
def _reading(chosen: dict[str, Connectivity]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The queries and keys that each choice is made from."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [c.register_forward_pre_hook(lambda m, given, n=n: seen.__setitem__(n, given)) for n, c in chosen.items()]
    with _removed(hooks):
        yield seen


@contextmanager
def _watching(layers: dict[str, OpAttention]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The queries and keys of each attention layer."""
    queries: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, layer in layers.items():
        hooks += [
            layer.norm_q.register_forward_hook(lambda m, given, out, n=name: queries.__setitem__(n, out)),
            layer.norm_k.register_forward_hook(lambda m, given, out, n=name: seen.__setitem__(n, (queries[n], out))),
        ]
    with _removed(hooks):
        yield seen


@contextmanager
def _output(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """What a module gives back in a call."""
    seen: list[Tensor] = []
    with _removed([model.get_submodule(name).register_forward_hook(lambda m, given, out: seen.append(out))]):
        yield seen


@contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
