"""TransNormerLLM: gated lightning attention and gated units without activations, normalised without gains.

    x <- x + GLA(srmsnorm(x)),    x <- x + SGLU(srmsnorm(x)),    srmsnorm(x) = sqrt(d) x / |x|

Embeddings enter times sqrt(d); the first layer has learned relative positions, the last decays almost nothing.
Departs from the paper: relative positions stand in the first layer alone, as in the released models; the paper's
counts have up to two vectors a layer more. The state is float32 and knows its position, in training and evaluation
alike.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError
from regard.models.sequence.shell import SequenceModel, SequenceSettings

CARD = ModelCard(
    slug="lightning",
    title="TransNormerLLM",
    part_of="lightning",
    exports=("TransNormer",),
    example="b=2 n=12 v=11",
    options={"vocab": 11, "dim": 16, "depth": 3, "heads": 4, "hidden": 24},
    task="token ids to logits",
    decode=True,
)

# the settings of the released code
_BASE = SequenceSettings(
    vocab=50272, dim=1024, depth=24, heads=8, mixer="lightning", options={"lightning": {"lrpe": True}}, hidden=2816,
    tied=True, std=0.02, norm="srms", feed_forward="sglu", scale_embedding=True,
)  # fmt: skip
# "TransNormerLLM: a faster and better large language model", table of model variants; the released weights have a
# vocabulary of 64000
SIZES = {
    "transnormer_385m": _BASE,
    "transnormer_1b": replace(_BASE, dim=2048, depth=16, heads=16, hidden=5632),
    "transnormer_7b": replace(_BASE, dim=4096, depth=30, heads=32, hidden=11008),
}


class TransNormer(SequenceModel):
    """Token ids (B, N) to logits (B, N, vocab), decoding with a state of fixed size; see `SequenceSettings`.

    Raises OptionError, also for an encoder: the decay looks back only.
    """

    def __init__(self, settings: SequenceSettings):
        if not settings.is_causal:
            raise OptionError("TransNormer decays into the past and has no encoder form; softmax works both ways")
        super().__init__(settings)

    def _initialise(self) -> None:
        std = (3 * self.settings.dim) ** -0.5 if self.settings.std is None else self.settings.std
        # all alike: the norms in front of both branches have no gain
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
