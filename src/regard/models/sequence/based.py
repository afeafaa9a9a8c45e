"""BASED: short convolutions, a few Taylor linear attentions, and as many exact windows right behind them.

    layers 1, 6, 11, …: Taylor linear attention;  layers 2, 7, 12, …: a window;  all others: gated convolutions

What lies far away is recalled from a state of fixed size, what lies near is compared exactly.
Departs from the paper: none. A window counts keys with the own one; the released configuration says 256, which its
code halves to 128 keys before the own one.
"""

from __future__ import annotations

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError
from regard.models.sequence.shell import SequenceModel, SequenceSettings

CARD = ModelCard(
    slug="based",
    title="BASED",
    part_of="based",
    exports=("Based", "based_layers"),
    example="b=2 n=12 v=11",
    options={
        "vocab": 11,
        "dim": 16,
        "depth": 4,
        "heads": 4,
        "hidden": 24,
        "options": {"based": {"feature_dim": 3}, "sliding_window": {"window": 4}, "short_conv": {"expand": 2}},
    },
    task="token ids to logits",
    decode=True,
)


def based_layers(depth: int, taylor: tuple[int, ...]) -> tuple[str, ...]:
    """The mixer of every layer: Taylor attention at the places given, from 0, a window behind each, else convolutions.

    Raises OptionError for places that are none or leave no room for a window.
    """
    names = ["short_conv"] * depth
    for place in taylor:
        if not 0 <= place < depth - 1 or names[place] != "short_conv":
            raise OptionError(f"a Taylor layer and its window do not fit at {place} of {depth} layers")
        names[place : place + 2] = ["based", "sliding_window"]
    return tuple(names)


# the released configuration of 360 million parameters; its vocabulary of 50257 is padded to a multiple of 8
SIZES = {
    "based_360m": SequenceSettings(
        vocab=50264, dim=1024, depth=27, heads=16, mixer=based_layers(27, (1, 6, 11, 16, 21)), hidden=2048, tied=True,
        std=0.02,
        options={
            "based": {"feature_dim": 16},
            "sliding_window": {"window": 129},
            "short_conv": {"kernel": 3, "expand": 2, "form": "based"},
        },
    )
}  # fmt: skip


class Based(SequenceModel):
    """Token ids (B, N) to logits (B, N, vocab), decoding with a state of fixed size; see `SequenceSettings`.

    Raises OptionError, also for an encoder.
    """

    def __init__(self, settings: SequenceSettings):
        if not settings.is_causal:
            raise OptionError("BASED is causal, windows included; an encoder is a SequenceModel of other mixers")
        super().__init__(settings)
