"""HaloNet: a residual network whose 3 x 3 convolutions are halo attention.

    x = act(shortcut(x) + widen(act(norm(halo(act(norm(narrow(x)))))))),      narrow, widen 1 x 1 convolutions

Departs from the paper: its code was never published. The sizes are those of timm, whose networks keep convolutions in
some stages; their borders and strided tables are timm's, so that its weights fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError
from regard.layers.conv_blocks import ConvSpec, PoolSpec
from regard.models.vision.skeleton import Backbone, BackboneSpec, BlockSpec, StageSpec, load_external

CARD = ModelCard(
    slug="halonet",
    title="HaloNet",
    paper="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    exports=("HaloNet", "HaloNetSettings"),
    example="b=4 c=3 y=32 x=64",
    options={
        "stem_dim": 8,
        "dims": (8, 16),
        "depths": (1, 2),
        "heads": (2, 2),
        "attention": ("all", "odd"),
        "block": 4,
        "halo": 1,
        "classes": 5,
    },
    task="images to logits",
)

ATTENTION = ("none", "odd", "last", "all")


@dataclass(frozen=True)
class HaloNetSettings:
    """What a HaloNet is made of.

    dims, depths, heads: one entry a stage. attention: which blocks of a stage attend, the others are convolutions:
    "none", "odd" (the second, fourth, ...), "last" or "all". ratio: inner width of a block over its outer one.
    block, halo, border, strided: see `HaloAttention`. stem: "7x7", one convolution; "tiered", three of 3 x 3 with
    rising widths; both followed by a pooling.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (3, 3, 10, 3)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    attention: tuple[str, ...] = ("all", "all", "all", "all")
    ratio: float = 1.0
    block: int = 8
    halo: int = 3
    border: Literal["mask", "zero"] = "zero"
    strided: Literal["pixels", "queries"] = "queries"
    stem: Literal["7x7", "tiered"] = "7x7"
    stem_dim: int = 64
    act: str = "relu"
    drop_path: float = 0.0
    classes: int = 1000
    channels: int = 3

    def spec(self) -> BackboneSpec:
        """The stages and blocks. Raises OptionError."""
        if not len(self.dims) == len(self.depths) == len(self.heads) == len(self.attention):
            raise OptionError(
                f"dims {self.dims}, depths {self.depths}, heads {self.heads} and attention {self.attention} must have "
                "one entry a stage"
            )
        if self.stem not in ("7x7", "tiered"):
            raise OptionError(f"the stem is {self.stem!r}; it is '7x7' or 'tiered'")
        stages = []
        for i, (dim, depth, heads, kind) in enumerate(
            zip(self.dims, self.depths, self.heads, self.attention, strict=True)
        ):
            options: dict[str, Any] = {
                "block": self.block,
                "halo": self.halo,
                "border": self.border,
                "strided": self.strided,
            }
            halo = BlockSpec("halonet", heads, options, form="bottleneck", ratio=self.ratio, act=self.act)
            conv = BlockSpec("conv", form="bottleneck", ratio=self.ratio, act=self.act)
            turns = {"none": (conv,), "odd": (conv, halo), "last": (conv,) * (depth - 1) + (halo,), "all": (halo,)}
            if kind not in turns:
                raise OptionError(f"attention is {self.attention}; an entry is one of {', '.join(ATTENTION)}")
            stages.append(StageSpec(dim, depth, turns[kind], stride=2 if i else 1))
        widths: tuple[int, ...] = (self.stem_dim,)
        if self.stem == "tiered":
            widths = (3 * self.stem_dim // 8, self.stem_dim // 2, self.stem_dim)
        convolutions = tuple(
            ConvSpec(width, 7 if self.stem == "7x7" else 3, 1 if i else 2, bias=False, norm="bn", act=self.act)
            for i, width in enumerate(widths)
        )
        return BackboneSpec(
            (*convolutions, PoolSpec()),
            tuple(stages),
            norm=None,
            classes=self.classes,
            channels=self.channels,
            drop_path=self.drop_path,
        )


_WIDE = HaloNetSettings(dims=(256, 512, 1024, 2048), ratio=0.25, stem="tiered")

# the configurations of timm 1.0; the first is the paper's H1 (table 3 there)
SIZES = {
    "halonet_h1": HaloNetSettings(),
    "halonet26t": replace(_WIDE, depths=(2, 2, 2, 2), attention=("none", "none", "odd", "all"), halo=2),
    "halonet50ts": replace(
        _WIDE, depths=(3, 4, 6, 3), heads=(8, 4, 8, 8), attention=("none", "last", "odd", "odd"), act="silu"
    ),
}


class HaloNet(Backbone):
    """Images (B, channels, Y, X) to logits (B, classes); `features` gives the pyramid (section 3).

    settings: see `HaloNetSettings`; H1 if None. The maps of stages with attention must divide into blocks. mixer: takes
    the place of halo attention and of the convolutions between. Raises OptionError, ShapeError.
    """

    def __init__(self, settings: HaloNetSettings | None = None, mixer: str | None = None):
        super().__init__(settings or SIZES["halonet_h1"], mixer)

    def load_timm(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of timm's network of the same name. Raises OptionError, ShapeError."""
        load_external(self, weights, _FROM_TIMM)


_FROM_TIMM = (
    (r"^stem\.conv1\.", "stem.0."),
    (r"^stem\.conv2\.", "stem.1."),
    (r"^stem\.conv3\.", "stem.2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.conv1_1x1\.", ".narrow."),
    (r"\.conv2_kxk\.", ".mixer."),
    (r"\.conv3_1x1\.", ".widen."),
    (r"\.bn\.", ".norm."),
    (r"\.self_attn\.pos_embed\.(height|width)_rel", r".mixer.rel_\1"),
    (r"\.self_attn\.", ".mixer."),
    (r"\.post_attn\.", ".norm.0."),
)
