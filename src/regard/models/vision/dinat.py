"""DiNAT: a pyramid of neighbourhood attention whose every second block is dilated.

    x = x + NA_d(norm(x)) ; x = x + mlp(norm(x)),      d = 1 in even blocks, floor(side / kernel) at most in odd ones

Departs from the released networks: none in the numbers. Images that the stem of DiNAT_s does not divide are cropped at
the end, not padded. The isotropic variant is not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError
from regard.layers.conv_blocks import ConvSpec
from regard.models.vision.skeleton import Backbone, BackboneSpec, BlockSpec, StageSpec, load_external

CARD = ModelCard(
    slug="dinat",
    title="Dilated neighborhood attention transformer",
    paper="Dilated Neighborhood Attention Transformer",
    exports=("DiNAT", "DiNATSettings"),
    example="b=2 c=3 y=40 x=56",
    options={"dim": 8, "depths": (2, 1), "heads": (1, 2), "kernel": 3, "dilations": (2, 1), "classes": 5},
    task="images to logits",
)


@dataclass(frozen=True)
class DiNATSettings:
    """What a DiNAT is made of.

    dim: width of the first level, which doubles at each. dilations: of every second block of a level, from its second
    on; all 1 makes a NAT. layer_scale: where the learned factors of both branches start, None for none. stem: "conv",
    two convolutions of stride 2, with one of stride 2 between the levels; "patch", patches of 4 x 4 and merged patches
    (DiNAT_s). small_input: where a map is smaller than kernel * dilation, see `NeighborhoodAttention`.
    """

    dim: int = 64
    depths: tuple[int, ...] = (3, 4, 18, 5)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel: int = 7
    dilations: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: float = 3.0
    layer_scale: float | None = None
    stem: Literal["conv", "patch"] = "conv"
    small_input: Literal["error", "pad_legacy", "shrink"] = "error"
    drop_path: float = 0.2
    classes: int = 1000
    channels: int = 3

    def spec(self) -> BackboneSpec:
        """The stages and blocks. Raises OptionError."""
        if not len(self.depths) == len(self.heads) == len(self.dilations):
            raise OptionError(
                f"depths {self.depths}, heads {self.heads} and dilations {self.dilations} must have one entry a level"
            )
        if self.stem not in ("conv", "patch"):
            raise OptionError(f"the stem is {self.stem!r}; it is 'conv' or 'patch'")
        stages = []
        for level, (depth, heads, dilation) in enumerate(zip(self.depths, self.heads, self.dilations, strict=True)):
            dim = self.dim * 2**level
            blocks = tuple(
                BlockSpec(
                    "neighborhood",
                    heads,
                    {"kernel": self.kernel, "dilation": d, "rpb": True, "small_input": self.small_input},
                    ratio=self.mlp_ratio,
                    layer_scale=self.layer_scale,
                )
                for d in (1, dilation)
            )
            down = PatchMerging if self.stem == "patch" else ConvSpec(dim, 3, 2, bias=False, norm="ln")
            stages.append(StageSpec(dim, depth, blocks, down if level else None))
        stem = (ConvSpec(self.dim // 2, 3, 2), ConvSpec(self.dim, 3, 2, norm="ln"))
        return BackboneSpec(
            (ConvSpec(self.dim, 4, 4, p=0, norm="ln"),) if self.stem == "patch" else stem,
            tuple(stages),
            classes=self.classes,
            channels=self.channels,
            drop_path=self.drop_path,
        )


_SMALL = DiNATSettings(dim=96, heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path=0.3)
_BASE = DiNATSettings(dim=128, heads=(4, 8, 16, 32), mlp_ratio=2.0, drop_path=0.5)
_LARGE = replace(_BASE, dim=192, drop_path=0.35)
_PATCH = DiNATSettings(dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), mlp_ratio=4.0, stem="patch")
_PATCH_LARGE = replace(_PATCH, dim=192, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.35)

# the paper's table 2 and the released configurations; drop_path as released
SIZES = {
    "dinat_mini": DiNATSettings(depths=(3, 4, 6, 5)),
    "dinat_tiny": DiNATSettings(),
    "dinat_small": _SMALL,
    "dinat_base": _BASE,
    "dinat_large": _LARGE,
    "dinat_large_384": replace(_LARGE, dilations=(13, 6, 3, 1)),
    "dinat_large_384_11x11": replace(_LARGE, kernel=11),
    "dinat_s_tiny": _PATCH,
    "dinat_s_small": replace(_PATCH, depths=(2, 2, 18, 2), drop_path=0.3),
    "dinat_s_base": replace(_PATCH, dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), drop_path=0.5),
    "dinat_s_large": _PATCH_LARGE,
    "dinat_s_large_384": replace(_PATCH_LARGE, dilations=(13, 6, 3, 1)),
}


class DiNAT(Backbone):
    """Images (B, channels, Y, X) to logits (B, classes); `features` gives the pyramid (section 3).

    settings: see `DiNATSettings`; DiNAT-Tiny if None. mixer: takes the place of neighbourhood attention everywhere.
    Raises OptionError, ShapeError; at the call also for an image with a level smaller than kernel * dilation.
    """

    def __init__(self, settings: DiNATSettings | None = None, mixer: str | None = None):
        super().__init__(settings or SIZES["dinat_tiny"], mixer)
        self.checks_sides = mixer is None

    def load_transformers(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of transformers' DinatForImageClassification (or DinatModel, for 0 classes).

        A relative bias of another kernel is resized (bicubic). Raises OptionError, ShapeError.
        """
        taken = {name: weight for name, weight in weights.items() if ".query." not in name and ".key." not in name}
        for name in [name for name in taken if ".value." in name]:
            parts = [weights[name.replace(".value.", f".{part}.")] for part in ("query", "key", "value")]
            taken[name.replace(".value.", ".qkv.")] = torch.cat(parts)
            del taken[name]
        for name in [name for name in taken if name.endswith("layer_scale_parameters")]:
            for branch, scale in enumerate(taken.pop(name)):
                taken[name.replace("layer_scale_parameters", f"ls{branch + 1}.scale")] = scale
        for name, weight in taken.items():
            if name.endswith(".rpb"):
                taken[name] = resize_bias(weight, self.settings.kernel)  # type: ignore[attr-defined]
        load_external(self, taken, _from_transformers(len(self.stages)))

    def _stages(self, images: Tensor) -> list[Tensor]:
        settings = self.settings
        if self.checks_sides and isinstance(settings, DiNATSettings) and settings.small_input == "error":
            _check_sides(settings, images)
        return super()._stages(images)


class PatchMerging(nn.Module):
    """Every 2 x 2 places as one: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), out); odd sides are padded with zeros."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # the released weights count the places column by column
        x = torch.cat((x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]), -1)
        return self.reduction(self.norm(x))


def resize_bias(rpb: Tensor, kernel: int) -> Tensor:
    """A relative bias (H, 2K - 1, 2K - 1) for another kernel, bicubic over the offsets."""
    side = 2 * kernel - 1
    if rpb.shape[1:] == (side, side):
        return rpb
    return F.interpolate(rpb[None], size=(side, side), mode="bicubic", align_corners=False)[0]


def _check_sides(settings: DiNATSettings, images: Tensor) -> None:
    def smaller(side: int) -> int:
        return -(-side // 2)

    sides = tuple(images.shape[2:])
    sides = tuple(s // 4 if settings.stem == "patch" else smaller(smaller(s)) for s in sides)
    for level, (depth, dilation) in enumerate(zip(settings.depths, settings.dilations, strict=True)):
        most = dilation if depth > 1 else 1
        if settings.kernel * most > min(sides):
            raise OptionError(
                f"an image of {images.shape[2]}x{images.shape[3]} makes a map of {sides[0]}x{sides[1]} at level "
                f"{level + 1}, smaller than kernel {settings.kernel} times dilation {most}: take a larger image, smaller "
                'dilations, or small_input="pad_legacy" or "shrink"'
            )
        sides = tuple(smaller(s) for s in sides)


def _from_transformers(levels: int) -> list[tuple[str, str]]:
    down = [(rf"^encoder\.levels\.{i}\.downsample\.", f"stages.{i + 1}.down.") for i in range(levels - 1)]
    return [
        (r"^dinat\.", ""),
        *down,
        (r"\.down\.reduction\.", ".down.conv."),
        (r"^embeddings\.patch_embeddings\.projection\.(\d)\.", r"stem.\1.conv."),
        (r"^embeddings\.norm\.", "stem.1.norm."),
        (r"^encoder\.levels\.(\d+)\.layers\.", r"stages.\1.blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.self\.", ".mixer."),
        (r"\.attention\.output\.dense\.", ".mixer.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head.fc."),
    ]
