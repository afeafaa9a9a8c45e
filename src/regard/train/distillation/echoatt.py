"""Distillation of EchoAtt: a student whose layers share attention learns to speak as its teacher, which is the whole model.

    loss = a_ce CE(student, argmax teacher) + a_kl T^2 KL(teacher / T || student / T) + a_mid MSE(streams)

Afterwards the student goes on with true next tokens, by the ordinary loss.
The weights and the temperature are ours: the paper's were not to be had. With a_ce = 1 a small student, whose teacher is
often unsure, recovers less than by plain training. Streams are compared after every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from regard.contract.attach import open_session
from regard.contract.card import TrainingCard
from regard.contract.errors import OptionError
from regard.train.distillation.matching import FeatureMSE, HardTargets, Pair, SoftTargets, Tap, match

CARD = TrainingCard(
    slug="echoatt",
    title="Distillation of a model whose layers share attention",
    part_of="echoatt",
    exports=("EchoLoss",),
    teacher="llama",
    student="llama",
    batch="inputs",
    losses=("ce", "kl", "mid"),
    trains=("*",),
)


class EchoLoss:
    """The losses of the first stage, `loss(model, batch) -> {"ce", "kl", "mid"}`, each with its weight.

    teacher: the model before its layers shared attention; not trained, not changed. alpha_ce, alpha_kl, alpha_mid: at
    least 0, a loss of weight 0 is left out. temperature: of the softened logits. Raises OptionError.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        alpha_ce: float = 0.1,
        alpha_kl: float = 1.0,
        alpha_mid: float = 1.0,
        temperature: float = 2.0,
    ):
        if min(alpha_ce, alpha_kl, alpha_mid) < 0 or not max(alpha_ce, alpha_kl, alpha_mid) > 0:
            raise OptionError(f"weights are at least 0, and one above 0, not {(alpha_ce, alpha_kl, alpha_mid)}")
        self.teacher = teacher
        layers = len(open_session(teacher, ()).anatomy.main.layers)  # type: ignore[attr-defined]
        logits = Tap("logits")
        pairs = [
            Pair("ce", logits, logits, HardTargets(), alpha_ce),
            Pair("kl", logits, logits, SoftTargets(temperature), alpha_kl),
            *(
                Pair("mid", Tap("resid_post", i), Tap("resid_post", i), FeatureMSE(), alpha_mid / layers)
                for i in range(layers)
            ),
        ]
        self.pairs = [pair for pair in pairs if pair.weight > 0]

    def __call__(self, model: nn.Module, batch: Tensor | Mapping[str, Any], *, step: int = 0) -> dict[str, Tensor]:
        """The losses of token ids, or of keywords of both models."""
        return match(self.pairs, model, self.teacher, batch)
