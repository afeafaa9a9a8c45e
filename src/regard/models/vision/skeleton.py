"""The frame of pyramid networks: stem, stages of blocks with a downsampling before each, norm, pooled head.

Everything inside is (B, H, W, C). A family writes flat settings with a method `spec()` that lists stages and blocks;
every token mixer is given by name, so that two backbones differ in nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError
from regard.contract.names import mixer as make_mixer
from regard.contract.names import mixer_entry
from regard.layers.conv_blocks import (
    Conv,
    ConvSpec,
    DropPath,
    LayerScale,
    MaxPool,
    PoolSpec,
    make_activation,
    make_norm,
)
from regard.layers.feed_forward import Mlp
from regard.layers.patches import PositionTable

# a small network of (channels in, channels out) where a convolution is not enough
Custom = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class BlockSpec:
    """One block.

    mixer: a mixer's name; "conv" for a 3 x 3 convolution (bottleneck only). heads, options: what the mixer is made with.
    form: "two" has x + mixer(norm(x)), then x + mlp(norm(x)). "post" has norm(x + mixer(x)), then norm(x + mlp(x)), with
    dropout on both branches in place of dropped paths. "bottleneck" has a 1 x 1 convolution to `ratio` times the width,
    the mixer there (at the block's stride), a 1 x 1 convolution back, each with batch norm, and a shortcut.
    ratio: inner width over the width of the stage; of the feed-forward where there is one, 0 for none.
    norm: "ln" or "bn", not of a bottleneck; norm_eps: of these, the network's if None. cpe: kernel of a depthwise
    convolution added before the mixer, None for none. layer_scale: start of the learned factors of both branches, None
    for none. act: activation.
    """

    mixer: str
    heads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    form: Literal["two", "post", "bottleneck"] = "two"
    ratio: float = 4.0
    norm: str = "ln"
    norm_eps: float | None = None
    cpe: int | None = None
    layer_scale: float | None = None
    act: str = "gelu"


@dataclass(frozen=True)
class StageSpec:
    """Blocks of one width. blocks: taken in turns until there are `depth`. down: what comes before them.

    stride: of the first block, which must then be a bottleneck. positions: places (H, W) of a learned table that is
    added before the blocks, None for none.
    """

    dim: int
    depth: int
    blocks: tuple[BlockSpec, ...]
    down: ConvSpec | Custom | None = None
    stride: int = 1
    positions: tuple[int, int] | None = None


@dataclass(frozen=True)
class BackboneSpec:
    """A whole network. stem: convolutions and poolings. norm: before the pooled head, "ln", "bn" or None.

    norm_eps: of the norms in the blocks; last_eps: of the one before the head, the same if None.
    classes: 0 for no head. drop_path: rate of the last block, rising linearly from 0 at the first.
    """

    stem: tuple[ConvSpec | PoolSpec, ...]
    stages: tuple[StageSpec, ...]
    norm: str | None = "ln"
    norm_eps: float = 1e-5
    last_eps: float | None = None
    classes: int = 1000
    channels: int = 3
    drop_path: float = 0.0


class Settings(Protocol):
    """Flat frozen settings of a family."""

    def spec(self) -> BackboneSpec:
        """The stages and blocks that they stand for."""
        ...


@dataclass(frozen=True)
class BackboneSettings:
    """A plain pyramid, to compare mixers in: at each stage half the side of the one before.

    dims, depths, heads: one number a stage. mixer: a name, or one name a stage. options: mixer name -> its options.
    stem_stride: side of the image over that of the first stage: so many pixels make one patch.
    """

    dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (2, 4, 8, 16)
    mixer: str | tuple[str, ...] = "softmax"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mlp_ratio: float = 4.0
    stem_stride: int = 4
    cpe: int | None = None
    layer_scale: float | None = None
    drop_path: float = 0.0
    classes: int = 1000
    channels: int = 3

    def spec(self) -> BackboneSpec:
        """The stages and blocks. Raises OptionError if the tuples differ in length."""
        names = (self.mixer,) * len(self.dims) if isinstance(self.mixer, str) else self.mixer
        if not len(self.dims) == len(self.depths) == len(self.heads) == len(names):
            raise OptionError(
                f"dims {self.dims}, depths {self.depths}, heads {self.heads} and mixers {names} must have one entry a stage"
            )
        stages = []
        for i, (dim, depth, heads, name) in enumerate(zip(self.dims, self.depths, self.heads, names, strict=True)):
            block = BlockSpec(
                name,
                heads,
                self.options.get(name, {}),
                ratio=self.mlp_ratio,
                cpe=self.cpe,
                layer_scale=self.layer_scale,
            )
            stages.append(StageSpec(dim, depth, (block,), ConvSpec(dim, 3, 2, norm="ln") if i else None))
        stem = ConvSpec(self.dims[0], self.stem_stride, self.stem_stride, p=0, norm="ln")
        return BackboneSpec(
            (stem,), tuple(stages), classes=self.classes, channels=self.channels, drop_path=self.drop_path
        )


class Backbone(nn.Module):
    """Images (B, channels, Y, X) to logits (B, classes), or to the pooled features (B, C) where classes is 0.

    settings: flat settings with a method `spec()`. mixer: takes the place of every mixer, with its own default options.
    Linear layers start with deviation 0.02; a mixer with a method `reset_parameters` has the last word on its own.
    Raises OptionError, UnknownName.
    """

    def __init__(self, settings: Settings, mixer: str | None = None):
        super().__init__()
        spec = settings.spec()
        self.settings, self.spec = settings, spec if mixer is None else _with_mixer(spec, mixer)
        if not spec.stages or any(stage.depth < 1 or not stage.blocks for stage in spec.stages):
            raise OptionError("a backbone needs at least one stage, and each stage at least one block")
        width = spec.channels
        stem: list[Conv | MaxPool] = []
        for part in spec.stem:
            stem.append(part.build(width))
            width = part.out if isinstance(part, ConvSpec) else width
        self.stem = nn.ModuleList(stem)
        blocks = sum(stage.depth for stage in spec.stages)
        rates = [spec.drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        stages = []
        for stage in self.spec.stages:
            stages.append(Stage(width, stage, spec.norm_eps, rates[: stage.depth]))
            width, rates = stage.dim, rates[stage.depth :]
        self.stages = nn.ModuleList(stages)
        self.norm = make_norm(spec.norm, width, spec.norm_eps if spec.last_eps is None else spec.last_eps)
        self.head = Head(width, spec.classes)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self._stages(images)[-1]))

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The output of every stage, fine to coarse: views (B, C, H, W) in channels-last layout."""
        return tuple(x.permute(0, 3, 1, 2) for x in self._stages(images))

    def _stem(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.spec.channels:
            raise ShapeError(f"images are {tuple(images.shape)}; they must be (B, {self.spec.channels}, Y, X)")
        x = images.permute(0, 2, 3, 1)
        for part in self.stem:
            x = part(x)
        return x

    def _stages(self, images: Tensor) -> list[Tensor]:
        x = self._stem(images)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, TwoResiduals | Bottleneck):
                getattr(module.mixer, "reset_parameters", lambda: None)()


class Stage(nn.Module):
    """Downsampling, then blocks: (B, H, W, C) -> (B, H', W', spec.dim). rates: of dropped paths, one a block."""

    def __init__(self, channels: int, spec: StageSpec, norm_eps: float, rates: Sequence[float]):
        super().__init__()
        self.down: nn.Module = nn.Identity()
        if spec.down is not None:
            self.down = spec.down.build(channels) if isinstance(spec.down, ConvSpec) else spec.down(channels, spec.dim)
            channels = spec.down.out if isinstance(spec.down, ConvSpec) else spec.dim
        self.positions = PositionTable(channels, spec.positions) if spec.positions else None
        blocks: list[nn.Module] = []
        for i, rate in enumerate(rates):
            block = spec.blocks[i % len(spec.blocks)]
            stride = spec.stride if i == 0 else 1
            if block.form == "bottleneck":
                blocks.append(Bottleneck(channels, spec.dim, block, stride, rate))
            elif stride != 1 or channels != spec.dim:
                raise OptionError(
                    f"a block with two residuals keeps its {channels} channels and its resolution; a stage of {spec.dim} "
                    f"channels and stride {stride} needs down= or a bottleneck"
                )
            else:
                blocks.append(TwoResiduals(spec.dim, block, norm_eps, rate))
            channels = spec.dim
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return x

    def enter(self, x: Tensor) -> Tensor:
        """What the first block gets: (B, H, W, C) -> (B, H', W', spec.dim)."""
        x = self.down(x)
        return x if self.positions is None else self.positions(x)


class TwoResiduals(nn.Module):
    """x = cpe(x); x + scale(mixer(norm(x))); x + scale(mlp(norm(x))): (B, H, W, C) -> (B, H, W, C).

    In form "post" the norms stand behind the sums.
    """

    def __init__(self, dim: int, spec: BlockSpec, norm_eps: float, rate: float):
        super().__init__()
        norm_eps = norm_eps if spec.norm_eps is None else spec.norm_eps
        self.post = spec.form == "post"
        self.cpe1 = Conv(dim, ConvSpec(dim, spec.cpe, groups=dim)) if spec.cpe else None
        self.norm1 = make_norm(spec.norm, dim, norm_eps)
        self.mixer = make_mixer(spec.mixer, dim, spec.heads, **spec.options)
        self.on_grid = _is_on_grid(spec.mixer)
        self.ls1 = _layer_scale(dim, spec.layer_scale)
        self.drop_path = nn.Dropout(rate) if self.post else DropPath(rate)
        hidden = int(spec.ratio * dim)
        self.norm2 = make_norm(spec.norm, dim, norm_eps) if hidden else None
        self.mlp = Mlp(dim, hidden, act=lambda: make_activation(spec.act)) if hidden else None
        self.ls2 = _layer_scale(dim, spec.layer_scale) if hidden else None

    def forward(self, x: Tensor) -> Tensor:
        if self.cpe1 is not None:
            x = x + self.cpe1(x)
        if self.post:
            x = self.norm1(x + self.drop_path(self.ls1(_mix(self, x))))
        else:
            x = x + self.drop_path(self.ls1(_mix(self, self.norm1(x))))
        if self.norm2 is None or self.mlp is None or self.ls2 is None:
            return x
        if self.post:
            return self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Bottleneck(nn.Module):
    """act(shortcut(x) + widen(norm(mixer(narrow(x))))), of residual networks: (B, H, W, C) -> (B, H / s, W / s, dim).

    A mixer is made with `stride=` where the block has one.
    """

    def __init__(self, channels: int, dim: int, spec: BlockSpec, stride: int, rate: float):
        super().__init__()
        inner = int(spec.ratio * dim)
        self.narrow = Conv(channels, _conv_bn(inner, 1, act=spec.act))
        self.mixer: nn.Module
        self.norm: nn.Module = nn.Identity()
        self.on_grid = spec.mixer == "conv" or _is_on_grid(spec.mixer)
        if spec.mixer == "conv":
            self.mixer = Conv(inner, _conv_bn(inner, 3, stride, act=spec.act))
        else:
            options = spec.options if stride == 1 else {**spec.options, "stride": stride}
            self.mixer = make_mixer(spec.mixer, inner, spec.heads, **options)
            self.norm = nn.Sequential(make_norm("bn", inner), make_activation(spec.act))
        self.widen = Conv(inner, _conv_bn(dim, 1))
        self.ls1 = _layer_scale(dim, spec.layer_scale)
        self.drop_path = DropPath(rate)
        same = stride == 1 and channels == dim
        self.shortcut = nn.Identity() if same else Conv(channels, _conv_bn(dim, 1, stride))
        self.act = make_activation(spec.act)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.widen(self.norm(_mix(self, self.narrow(x))))
        return self.act(self.shortcut(x) + self.drop_path(self.ls1(branch)))


class Head(nn.Module):
    """The mean over all places, then logits: (B, H, W, C) -> (B, classes); with 0 classes the mean itself."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.fc = nn.Linear(dim, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((1, 2)))


def load_external(
    model: nn.Module, weights: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], *, ignore: tuple[str, ...] = ()
) -> None:
    """Load the weights of another implementation, renamed by rules.

    rules: (regular expression, replacement), applied in order to each name. ignore: expressions of names without a
    place here, beside counters of batches. Weights of 1 x 1 convolutions become those of linear layers. Every weight
    must be set once and every given one used once: raises OptionError naming those that are not, ShapeError.
    """
    wanted = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    rules = tuple(rules)
    found: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, value in weights.items():
        if name.endswith("num_batches_tracked") or any(re.search(i, name) for i in ignore):
            continue
        ours = name
        for expression, replacement in rules:
            ours = re.sub(expression, replacement, ours)
        if ours in found:
            raise OptionError(f"the weights {sources[ours]!r} and {name!r} are both called {ours!r} here")
        found[ours], sources[ours] = value, name
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        given = [f"{sources[name]} (as {name})" for name in unknown]
        raise OptionError(f"weights without a source: {missing or 'none'}; sources without a place: {given or 'none'}")
    for name, value in found.items():
        if value.dim() == wanted[name].dim() + 2 and value.shape[-2:] == (1, 1):
            found[name] = value.flatten(1)
        if found[name].shape != wanted[name].shape:
            raise ShapeError(f"{sources[name]} is {tuple(value.shape)}; {name} must be {tuple(wanted[name].shape)}")
    model.load_state_dict(found, strict=False)


def _with_mixer(spec: BackboneSpec, mixer: str) -> BackboneSpec:
    def changed(stage: StageSpec) -> StageSpec:
        return replace(stage, blocks=tuple(replace(b, mixer=mixer, options={}) for b in stage.blocks))

    return replace(spec, stages=tuple(changed(stage) for stage in spec.stages))


def _is_on_grid(mixer: str) -> bool:
    return mixer_entry(mixer).path.parent.name == "grid"


def _mix(block: TwoResiduals | Bottleneck, x: Tensor) -> Tensor:
    # a mixer of tokens reads the image row by row
    return block.mixer(x) if block.on_grid else block.mixer(x.flatten(1, 2)).reshape(x.shape)


def _conv_bn(out: int, k: int, s: int = 1, *, act: str | None = None) -> ConvSpec:
    return ConvSpec(out, k, s, bias=False, norm="bn", act=act)


def _layer_scale(dim: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(dim, start)
