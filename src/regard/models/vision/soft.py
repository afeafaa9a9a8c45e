"""SOFT: a pyramid of softmax-free attention, whose last stage is softmax attention with a class token.

    stages 1-3: x = norm(x + soft(x)) ; x = norm(x + mlp(x));   last: x = [class, x], then x + mixer(norm(x)) ; x + mlp(norm(x))

Departs from the released networks: the position of the class token is part of the token; tables of positions are
resized bicubically.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError
from regard.layers.conv_blocks import ConvSpec
from regard.models.vision.skeleton import Backbone, BackboneSpec, BlockSpec, Stage, StageSpec

CARD = ModelCard(
    slug="soft",
    part_of="soft",
    title="SOFT, softmax-free vision transformer",
    exports=("SOFT", "SOFTSettings"),
    example="b=4 c=3 y=32 x=48",
    options={
        "image": (32, 48),
        "dims": (8, 12, 16),
        "depths": (1, 2, 1),
        "heads": (2, 2, 4),
        "ratios": (2, 1),
        "convs": (5, 3),
        "drop_path": 0.0,
        "classes": 5,
    },
    task="images to logits",
)


@dataclass(frozen=True)
class SOFTSettings:
    """What a SOFT is made of.

    image: pixels (Y, X) that the tables of positions are made for. dims, depths, heads: one entry a stage, the last of
    which has softmax. ratios, convs: see `SOFTAttention2d`, one entry a stage but the last. mixer: of these stages; its
    options are its defaults unless it is "soft". symmetric_norm: SOFT++. drop_path: in the last stage the rate of
    dropped paths, before it of dropout on both branches, rising over all blocks.
    """

    image: tuple[int, int] = (224, 224)
    dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (1, 2, 3, 2)
    heads: tuple[int, ...] = (2, 4, 10, 16)
    ratios: tuple[int, ...] = (8, 4, 2)
    convs: tuple[int, ...] = (9, 5, 3)
    mixer: str = "soft"
    symmetric_norm: bool = False
    mlp_ratio: float = 4.0
    stem_dim: int = 32
    drop_path: float = 0.1
    classes: int = 1000
    channels: int = 3

    def spec(self) -> BackboneSpec:
        """The stages and blocks. Raises OptionError."""
        last = len(self.dims) - 1
        if not len(self.depths) == len(self.heads) == last + 1 or not len(self.ratios) == len(self.convs) == last:
            raise OptionError(
                f"dims {self.dims}, depths {self.depths} and heads {self.heads} must have one entry a stage, ratios "
                f"{self.ratios} and convs {self.convs} one a stage but the last"
            )
        stages = []
        grid = _half(_half(self.image))
        for i, (dim, depth, heads) in enumerate(zip(self.dims, self.depths, self.heads, strict=True)):
            if i == last:
                options: dict[str, Any] = {"rotary": False, "bias": True}
                block = BlockSpec("softmax", heads, options, ratio=self.mlp_ratio, norm_eps=1e-6)
            else:
                own = {"ratio": self.ratios[i], "conv": self.convs[i], "symmetric_norm": self.symmetric_norm}
                options = own if self.mixer == "soft" else {}
                block = BlockSpec(self.mixer, heads, options, form="post", ratio=self.mlp_ratio, act="gelu_tanh")
            grid = _half(grid) if i else grid
            stages.append(StageSpec(dim, depth, (block,), _conv(dim, 2) if i else None, positions=grid))
        stem = (_conv(self.stem_dim, 2), _conv(self.stem_dim, 1), _conv(self.dims[0], 2))
        return BackboneSpec(
            stem,
            tuple(stages),
            last_eps=1e-6,
            classes=self.classes,
            channels=self.channels,
            drop_path=self.drop_path,
        )


_SMALL = SOFTSettings(depths=(1, 3, 20, 4))

# the released code; it makes all feed-forwards 4 times as wide, and its small size is larger than the published 24 M
SIZES = {
    "soft_tiny": SOFTSettings(),
    "soft_small": _SMALL,
    "soft_medium": replace(_SMALL, dims=(64, 128, 288, 512), heads=(2, 4, 9, 16), depths=(1, 3, 29, 5)),
    "soft_large": replace(_SMALL, depths=(1, 3, 40, 5)),
    "soft_huge": replace(_SMALL, dims=(64, 128, 352, 512), heads=(2, 4, 11, 16), depths=(1, 5, 49, 5)),
}


class SOFT(Backbone):
    """Images (B, channels, Y, X) to logits (B, classes); `features` gives the pyramid without the class token.

    settings: see `SOFTSettings`; SOFT-Tiny if None. mixer: takes the place of softmax-free attention; the last stage
    keeps softmax. Raises OptionError; at the call ShapeError for a map that does not divide by its ratio.
    """

    def __init__(self, settings: SOFTSettings | None = None, mixer: str | None = None):
        settings = settings or SIZES["soft_tiny"]
        super().__init__(settings if mixer is None else replace(settings, mixer=mixer))
        self.cls = nn.Parameter(nn.init.trunc_normal_(torch.empty(settings.dims[-1]), std=0.02))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self._tokens(images)[1][:, :1]))

    def _stages(self, images: Tensor) -> list[Tensor]:
        return self._tokens(images)[0]

    def _tokens(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The map of every stage, and the last one's tokens (B, 1 + H W, 1, C) with the class token in front."""
        x = self._stem(images)
        *stages, last = cast("list[Stage]", list(self.stages))
        found = []
        for stage in stages:
            x = stage(x)
            found.append(x)
        x = last.enter(x)
        cls = self.cls.expand(x.shape[0], 1, 1, -1)
        # one column of tokens: the blocks of this stage do not look at the map
        tokens = torch.cat((cls, x.flatten(1, 2)[:, :, None]), 1)
        for block in last.blocks:
            tokens = block(tokens)
        return [*found, tokens[:, 1:].reshape(x.shape)], tokens


def _conv(dim: int, stride: int) -> ConvSpec:
    return ConvSpec(dim, 3, stride, norm="bn", act="relu")


def _half(grid: tuple[int, int]) -> tuple[int, int]:
    return -(-grid[0] // 2), -(-grid[1] // 2)
