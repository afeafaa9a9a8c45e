"""The plain vision transformer: patches and a class token through equal blocks, every mixer given by name.

    x = [class token, patches + positions];   x = x + mixer(norm(x)) ; x = x + mlp(norm(x));   logits = head(norm(x)[class])

Departs from the released networks: the position of the class token is part of the token, so that there is one vector
less; the function is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, ShapeError
from regard.contract.names import mixer as make_mixer
from regard.contract.names import mixer_entry
from regard.layers.attention import Attention
from regard.layers.conv_blocks import DropPath, LayerScale
from regard.layers.feed_forward import Mlp
from regard.layers.patches import PatchEmbed, PositionTable
from regard.models.vision.skeleton import load_external

CARD = ModelCard(
    slug="vit",
    title="Vision transformer, DeiT-shaped",
    baseline=True,
    exports=("ViT", "ViTSettings"),
    example="b=2 c=3 y=16 x=16",
    options={"image": (16, 16), "patch": 8, "dim": 16, "depth": 2, "heads": 2, "drop_path": 0.0, "classes": 5},
    task="images to logits",
)


@dataclass(frozen=True)
class ViTSettings:
    """What a vision transformer is made of.

    image: pixels (Y, X) that positions and token counts are made for. patch: pixels on a side. mixer: a name; options:
    its own. mixer_blocks: how many blocks, from the first, have it, None for all; the others have softmax. prefix:
    names of learned tokens beside the patches. cls_position: where "cls" stands; the others are in front. pos:
    "learned" adds a table to the patches, "rope" has the mixer rotate by the place in the sequence. bias: in the
    mixer's projections. pool: what the head reads, the class token or the mean over patches. layer_scale: where the
    learned factors of both branches start, None for none. drop_path: rate of the last block.
    """

    image: tuple[int, int] = (224, 224)
    patch: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mixer: str = "softmax"
    options: Mapping[str, Any] = field(default_factory=dict)
    mixer_blocks: int | None = None
    mlp_ratio: float = 4.0
    prefix: tuple[str, ...] = ("cls",)
    cls_position: Literal["first", "last"] = "first"
    pos: Literal["learned", "rope", "both"] | None = "learned"
    bias: bool = True
    pool: Literal["cls", "mean"] = "cls"
    layer_scale: float | None = None
    drop_path: float = 0.0
    classes: int = 1000
    channels: int = 3


_BASE = ViTSettings(drop_path=0.1)
_SMALL = replace(_BASE, dim=384, heads=6)

SIZES = {
    # table 1 of "Training data-efficient image transformers & distillation through attention"
    "deit_tiny": replace(_BASE, dim=192, heads=3),
    "deit_small": _SMALL,
    "deit_base": _BASE,
    # the released default configuration: a quarter of the keys, a sixth of the tokens as columns of the estimate
    "sparsifiner_deit_small": replace(_SMALL, mixer="sparsifiner", options={"keep": 0.25, "reduce_n": 6}),
    # the released configurations; the base size has more agents, in its first blocks alone
    "agent_deit_tiny": replace(_BASE, dim=192, heads=3, mixer="agent", options={"agents": 49}, drop_path=0.0),
    "agent_deit_small": replace(_SMALL, mixer="agent", options={"agents": 49}),
    "agent_deit_base": replace(_BASE, mixer="agent", options={"agents": 81}, mixer_blocks=4, drop_path=0.3),
}


class ViT(nn.Module):
    """Images (B, channels, Y, X) to logits (B, classes), or to the pooled features (B, C) where classes is 0.

    settings: see `ViTSettings`; DeiT-Base if None. mixer: takes the place of the mixer, with its own default options.
    Another image than settings.image has its table of positions resized. Raises OptionError, ShapeError, UnknownName.
    """

    def __init__(self, settings: ViTSettings | None = None, mixer: str | None = None):
        super().__init__()
        s = settings or SIZES["deit_base"]
        self.settings = s if mixer is None else replace(s, mixer=mixer, options={})
        _check(self.settings)
        grid = (s.image[0] // s.patch, s.image[1] // s.patch)
        self.patches = PatchEmbed(s.dim, s.patch, channels=s.channels)
        self.positions = PositionTable(s.dim, grid) if s.pos in ("learned", "both") else None
        self.prefix = nn.Parameter(nn.init.trunc_normal_(torch.empty(len(s.prefix), s.dim), std=0.02))
        rates = [s.drop_path * i / max(s.depth - 1, 1) for i in range(s.depth)]
        with_mixer = s.depth if s.mixer_blocks is None else s.mixer_blocks
        plain = replace(self.settings, mixer="softmax", options={})
        self.blocks = nn.ModuleList(
            Block(self.settings if i < with_mixer else plain, grid, rate) for i, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(s.dim, eps=1e-6)
        self.head = nn.Linear(s.dim, s.classes) if s.classes else nn.Identity()
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        if self.settings.pool == "cls":
            last = self.settings.cls_position == "last"
            return self.head(x[:, -1 if last else self.settings.prefix.index("cls")])
        front, behind = self._around()
        return self.head(x[:, front : x.shape[1] - behind].mean(1))

    def tokens(self, images: Tensor) -> Tensor:
        """All tokens behind the last norm: (B, N, C), in the order prefix, patches row by row, class token if last."""
        x = self.patches(images)
        if self.positions is not None:
            x = self.positions(x)
        front, _ = self._around()
        shape = (x.shape[1], x.shape[2])
        # the class token that stands last is taken out of the names in front
        names = sorted(range(len(self.prefix)), key=lambda i: self._stands_last(i))
        added = self.prefix[names].expand(x.shape[0], -1, -1)
        x = torch.cat((added[:, :front], x.flatten(1, 2), added[:, front:]), 1)
        for block in self.blocks:
            x = block(x, shape)
        return self.norm(x)

    def load_timm(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of timm's VisionTransformer with a class token in front (ViT, DeiT) of the same image size.

        Raises OptionError, ShapeError.
        """
        s = self.settings
        if s.prefix != ("cls",) or s.cls_position != "first" or self.positions is None:
            raise OptionError("timm's weights have one class token, in front, and learned positions")
        taken = dict(weights)
        table = taken.pop("pos_embed")[0]
        if table.shape[0] != 1 + self.positions.table.shape[:2].numel():
            raise ShapeError(
                f"pos_embed has {table.shape[0]} places; an image of {s.image[0]}x{s.image[1]} has a class token and "
                f"{self.positions.table.shape[0]}x{self.positions.table.shape[1]} patches"
            )
        taken["prefix"] = taken.pop("cls_token")[0] + table[:1]
        taken["positions.table"] = table[1:].unflatten(0, self.positions.table.shape[:2])
        for name in [name for name in taken if ".attn.qkv." in name]:
            for part, weight in zip("qkv", taken.pop(name).chunk(3), strict=True):
                taken[name.replace(".attn.qkv.", f".mixer.to_{part}.")] = weight
        load_external(self, taken, _FROM_TIMM)

    def _stands_last(self, i: int) -> bool:
        return self.settings.cls_position == "last" and self.settings.prefix[i] == "cls"

    def _around(self) -> tuple[int, int]:
        behind = sum(self._stands_last(i) for i in range(len(self.prefix)))
        return len(self.prefix) - behind, behind

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            getattr(block.mixer, "reset_parameters", lambda: None)()


class Block(nn.Module):
    """x + scale(mixer(norm(x))); x + scale(mlp(norm(x))): (B, N, C) -> (B, N, C).

    grid: patches (H, W) that it is made for. rate: of dropped paths.
    """

    def __init__(self, settings: ViTSettings, grid: tuple[int, int], rate: float):
        super().__init__()
        s = settings
        self.norm1 = nn.LayerNorm(s.dim, eps=1e-6)
        self.mixer = _mixer(s, grid)
        self.on_grid = mixer_entry(s.mixer).path.parent.name == "grid"
        self.ls1 = nn.Identity() if s.layer_scale is None else LayerScale(s.dim, s.layer_scale)
        self.drop_path = DropPath(rate)
        self.norm2 = nn.LayerNorm(s.dim, eps=1e-6)
        self.mlp = Mlp(s.dim, int(s.mlp_ratio * s.dim))
        self.ls2 = nn.Identity() if s.layer_scale is None else LayerScale(s.dim, s.layer_scale)

    def forward(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """shape: patches (H, W) of this image."""
        y = self.norm1(x)
        x = x + self.drop_path(self.ls1(self.mixer(y, shape=shape) if self.on_grid else self.mixer(y)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def _check(s: ViTSettings) -> None:
    if s.depth < 1:
        raise OptionError(f"a vision transformer has at least 1 block, not {s.depth}")
    if s.mixer_blocks is not None and not 0 <= s.mixer_blocks <= s.depth:
        raise OptionError(f"mixer_blocks is {s.mixer_blocks}; it is a number of the {s.depth} blocks, or None")
    if s.image[0] % s.patch or s.image[1] % s.patch:
        raise OptionError(f"an image of {s.image[0]}x{s.image[1]} pixels does not divide into patches of {s.patch}")
    if len(set(s.prefix)) < len(s.prefix):
        raise OptionError(f"the tokens {s.prefix} of the prefix are not all different")
    if "cls" not in s.prefix and (s.pool == "cls" or s.cls_position == "last"):
        raise OptionError(f"there is no class token in the prefix {s.prefix}: add 'cls', or take pool='mean'")
    words = {"cls_position": ("first", "last"), "pos": ("learned", "rope", "both", None), "pool": ("cls", "mean")}
    for name, allowed in words.items():
        if getattr(s, name) not in allowed:
            raise OptionError(f"{name} is {getattr(s, name)!r}; it is one of {allowed}")


def _mixer(s: ViTSettings, grid: tuple[int, int]) -> nn.Module:
    entry = mixer_entry(s.mixer)
    # an op is wrapped in the attention layer
    known = inspect.signature(Attention if entry.room == "ops" else entry.load()).parameters
    if entry.path.parent.name == "grid" and "prefix" not in known:
        raise OptionError(
            f"{s.mixer} mixes a grid; a vision transformer's mixer takes tokens, or a grid with a prefix of tokens"
        )
    rotary = s.pos in ("rope", "both")
    if rotary and "rotary" not in known:
        raise OptionError(f"{s.mixer} has no rotary positions: take pos='learned'")
    if "prefix" in known and s.cls_position == "last":
        raise OptionError(f"{s.mixer} takes the class token in front: cls_position='first'")
    count = grid[0] * grid[1] + len(s.prefix)
    given = {"bias": s.bias, "rotary": rotary, "num_tokens": count, "prefix": len(s.prefix), "grid": grid}
    options = {**{name: value for name, value in given.items() if name in known}, **s.options}
    return make_mixer(s.mixer, s.dim, s.heads, **options)


_FROM_TIMM = [
    (r"^patch_embed\.", "patches."),
    (r"\.attn\.proj\.", ".mixer.to_out."),
    (r"\.(ls\d)\.gamma$", r".\1.scale"),
]
