"""BiFormer: a pyramid of bi-level routing attention, with depthwise convolutions for positions.

    x = x + dwconv3x3(x) ; x = x + BRA(norm(x)) ; x = x + mlp(norm(x))

Departs from the released networks: blocks that are convolutions alone (topk = 0) are not built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError
from regard.layers.conv_blocks import ConvSpec
from regard.models.vision.skeleton import Backbone, BackboneSpec, BlockSpec, StageSpec

CARD = ModelCard(
    slug="biformer",
    title="BiFormer, bi-level routing attention",
    paper="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    exports=("BiFormer", "BiFormerSettings"),
    example="b=4 c=3 y=32 x=48",
    options={"dims": (8, 16, 16), "depths": (1, 1, 1), "topk": (1, 3, -2), "regions": 2, "head_dim": 2, "classes": 5},
    task="images to logits",
)


@dataclass(frozen=True)
class BiFormerSettings:
    """What a BiFormer is made of.

    dims, depths: one number a stage. topk: regions that a region attends to; -2 for all places at once with a
    convolution on the layer's input, -1 without it. head_dim: width of a head where regions are chosen; stages without
    a choice have `heads_of_all` heads. regions: on each side of the map. pad: where the map does not divide into
    regions, see `BiLevelRoutingAttention`. lce: kernel of the convolution beside the attention.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 8, 2)
    topk: tuple[int, ...] = (1, 4, 16, -2)
    regions: int = 7
    head_dim: int = 32
    heads_of_all: int = 8
    mlp_ratio: float = 3.0
    lce: int = 5
    pad: Literal["mask", "legacy"] | None = "mask"
    drop_path: float = 0.0
    classes: int = 1000
    channels: int = 3

    def spec(self) -> BackboneSpec:
        """The stages and blocks. Raises OptionError."""
        if not len(self.dims) == len(self.depths) == len(self.topk):
            raise OptionError(
                f"dims {self.dims}, depths {self.depths} and topk {self.topk} must have one entry a stage"
            )
        stages = []
        for i, (dim, depth, topk) in enumerate(zip(self.dims, self.depths, self.topk, strict=True)):
            options: dict[str, Any] = {"regions": self.regions, "topk": topk, "lce": self.lce, "pad": self.pad}
            heads = dim // self.head_dim
            if topk in (-1, -2):
                options |= {"topk": None, "lce": self.lce if topk == -2 else 0}
                heads = self.heads_of_all
            elif topk < 1:
                raise OptionError(f"topk is {self.topk}; an entry is a number of regions, -1 or -2")
            block = BlockSpec("biformer", heads, options, ratio=self.mlp_ratio, cpe=3)
            stages.append(StageSpec(dim, depth, (block,), ConvSpec(dim, 3, 2, norm="bn") if i else None))
        stem = (
            ConvSpec(self.dims[0] // 2, 3, 2, norm="bn", act="gelu"),
            ConvSpec(self.dims[0], 3, 2, norm="bn"),
        )
        return BackboneSpec(
            stem,
            tuple(stages),
            norm="bn",
            norm_eps=1e-6,
            last_eps=1e-5,
            classes=self.classes,
            channels=self.channels,
            drop_path=self.drop_path,
        )


_BASE = BiFormerSettings(dims=(96, 192, 384, 768), depths=(4, 4, 18, 4))

# the released configurations (the paper's table 2 has their parameters and accuracies)
SIZES = {
    "biformer_tiny": BiFormerSettings(),
    "biformer_small": replace(_BASE, dims=(64, 128, 256, 512)),
    "biformer_base": _BASE,
}


class BiFormer(Backbone):
    """Images (B, channels, Y, X) to logits (B, classes); `features` gives the pyramid (section 3.3).

    settings: see `BiFormerSettings`; BiFormer-T if None. mixer: takes the place of the attention everywhere.
    Raises OptionError, ShapeError.
    """

    def __init__(self, settings: BiFormerSettings | None = None, mixer: str | None = None):
        super().__init__(settings or SIZES["biformer_tiny"], mixer)
