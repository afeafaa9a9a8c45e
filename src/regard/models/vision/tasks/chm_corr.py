"""Convolutional Hough matching: which place of one picture is which of another, by votes of matches that move alike.

    c(s, t) = relu(cos(f_s, g_t)) at places of both pictures and at scales of both        6-D: scale, scale, y, x, y', x'
    v = softplus(K4 * max over scales of sigmoid(K6 * c)),      place of s = mean of t under softmax(v(s, .) near its best)

A kernel K collects the votes of matches with about the same shift. Its weights are shared by what they have in common:
psi, the distances of both ends from the middle and from each other; iso, the latter alone; full, nothing.

Departs from the released code: a place whose features are all 0 is like nothing (there, NaN); points are (y, x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, ShapeError, near
from regard.layers.conv_blocks import ConvSpec, PoolSpec
from regard.models.vision.skeleton import Backbone, BackboneSpec, BlockSpec, StageSpec, load_external
from regard.primitives.similarity import cosine, mutual

CARD = ModelCard(
    slug="chm_corr",
    title="Convolutional Hough matching network",
    paper="Convolutional Hough Matching Networks",
    part_of="chm_corr",
    exports=("CHMNet", "CHMSettings", "HoughConv"),
    example="b=2 c=6 y=32 x=32",
    options={"stem_dim": 8, "dims": (8, 16), "depths": (1, 1)},
    task="pairs of images to votes for each pair of places",
)

KERNELS = ("psi", "iso", "full")
# which places of the 3 x 3 kernel over scales share their weights
_SCALES = {"psi": ((4,), (0, 8), (2, 6), (1, 3, 5, 7)), "iso": ((0, 4, 8), (2, 6), (1, 3, 5, 7))}


# pairs that are matched at once
_PAIRS = 8


@dataclass(frozen=True)
class CHMSettings:
    """What a matching network is made of.

    stem_dim, dims, depths: the residual trunk, one entry a stage, each but the first at half the side. tied: one trunk for
    both pictures; otherwise one for each, as in the released code. kernel: see above. window: side of the kernels, in
    places. scales: factors of the area at which features are matched. side: of the pictures that `cells` makes, in
    pixels. spread: deviation, in places, of the Gaussian around the best match. reach: how far places lend their match to
    a point between them, in places.
    """

    stem_dim: int = 64
    dims: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[int, ...] = (3, 4, 23)
    tied: bool = False
    kernel: Literal["psi", "iso", "full"] = "psi"
    window: int = 5
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    side: int = 240
    spread: float = 17.0
    reach: float = 1.45
    channels: int = 3

    def spec(self) -> BackboneSpec:
        """The trunk: a residual network without its last stage and head. Raises OptionError."""
        if len(self.dims) != len(self.depths):
            raise OptionError(f"dims {self.dims} and depths {self.depths} must have one entry a stage")
        block = BlockSpec("conv", form="bottleneck", ratio=0.25, act="relu")
        stages = tuple(
            StageSpec(dim, depth, (block,), stride=2 if i else 1)
            for i, (dim, depth) in enumerate(zip(self.dims, self.depths, strict=True))
        )
        stem = ConvSpec(self.stem_dim, 7, 2, bias=False, norm="bn", act="relu")
        return BackboneSpec((stem, PoolSpec()), stages, norm=None, classes=0, channels=self.channels)


# the released networks: ResNet-101 to its third stage
SIZES = {f"chm_{kernel}": CHMSettings(kernel=kernel) for kernel in ("psi", "iso", "full")}


class CHMNet(nn.Module):
    """Pairs of square images (B, 2 channels, Y, Y), one after the other, to votes (B, S, S) >= 0 of all pairs of places.

    S = s s places of each, row by row, s twice the side of the trunk's last map. settings: see `CHMSettings`; those of the
    released psi network if None. Raises OptionError, ShapeError.
    """

    def __init__(self, settings: CHMSettings | None = None):
        super().__init__()
        self.settings = settings = settings or SIZES["chm_psi"]
        if not settings.scales or min(settings.scales) <= 0 or settings.spread <= 0:
            raise OptionError(
                f"scales {settings.scales} and spread {settings.spread} must be above 0, one scale at least"
            )
        if settings.reach < math.sqrt(0.5):
            raise OptionError(f"reach is {settings.reach}; below 0.71 a point between four places has none near it")
        self.trunks = nn.ModuleList(Backbone(settings) for _ in range(1 if settings.tied else 2))
        width = settings.dims[-1]
        self.narrow = nn.ModuleList(nn.Conv2d(width, width // 4, 3, padding=1, bias=False) for _ in settings.scales)
        self.hough6 = HoughConv(settings.kernel, settings.window)
        self.hough4 = HoughConv(settings.kernel, settings.window, scales=False)

    def forward(self, pairs: Tensor) -> Tensor:
        channels = self.settings.channels
        if pairs.dim() != 4 or pairs.shape[1] != 2 * channels or pairs.shape[2] != pairs.shape[3]:
            raise ShapeError(f"pairs are {tuple(pairs.shape)}; they must be (B, {2 * channels}, Y, Y), square")
        trunks = (self.trunks[0], self.trunks[-1])
        both = [
            cast(Backbone, trunk).features(x)[-1] for trunk, x in zip(trunks, pairs.split(channels, 1), strict=True)
        ]
        votes = torch.sigmoid(self.hough6(self._correlations(*both))).amax((1, 2))
        votes = _resized(votes, 2 * votes.shape[-1])
        return mutual(F.softplus(self.hough4(votes[:, None, None])).flatten(1, 4).flatten(2))

    def transfer(self, source: Tensor, target: Tensor, points: Tensor) -> Tensor:
        """Where points of a picture lie in another: (B, P, 2) of points (P, 2), (y, x) from -1, first place, to 1, last.

        source, target: (B, channels, Y, Y). Raises ShapeError.
        """
        if points.dim() != 2 or points.shape[1] != 2:
            raise ShapeError(f"points are {tuple(points.shape)}; they must be (P, 2), y and x")
        votes = self(torch.cat((source, target), 1))
        side = math.isqrt(votes.shape[-1])
        line = torch.linspace(-1, 1, side, dtype=votes.dtype, device=votes.device)
        places = torch.cartesian_prod(line, line)
        # spread is in places, and there are (side - 1) / 2 of them to a unit
        near_best = (places[votes.argmax(-1)][:, :, None] - places).square().sum(-1) * ((side - 1) / 2) ** 2
        votes = votes * torch.exp(-near_best / (2 * self.settings.spread**2))
        found = votes.softmax(-1) @ places
        # the released code takes the root of the square and 1e-5
        far = ((points.to(places)[:, None] - places).square().sum(-1) + 1e-5).sqrt()
        share = (2 * self.settings.reach / (side - 1) - far).clamp(min=0)
        return share / share.sum(-1, keepdim=True) @ found

    @torch.no_grad()
    def cells(self, image: Tensor, others: Tensor, grid: tuple[int, int]) -> Tensor:
        """The cell of each other picture (n, C, Y, X) on which the middle of each cell of a picture (C, Y, X) falls.

        int64 (n, h w), cells of a grid (h, w) row by row. Pictures are brought to `side`.
        """
        h, w = grid
        rows, columns = (torch.arange(2 * n + 1)[1::2] / n - 1 for n in grid)
        points = torch.cartesian_prod(rows, columns)
        side = (self.settings.side,) * 2
        source, targets = (F.interpolate(x, size=side, mode="bilinear", antialias=True) for x in (image[None], others))
        found = [self.transfer(source.expand(len(some), -1, -1, -1), some, points) for some in targets.split(_PAIRS)]
        places = ((torch.cat(found) + 1) / 2 * torch.tensor(grid, device=targets.device)).long()
        # a point on the far border belongs to the last cell
        return places[..., 0].clamp(0, h - 1) * w + places[..., 1].clamp(0, w - 1)

    def load_released(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of the released code, a trunk for each picture. Raises OptionError, ShapeError."""
        if self.settings.tied:
            raise OptionError("the released weights have a trunk for each picture: make the network with tied=False")
        given: dict[str, Tensor] = {}
        shared: dict[str, list[Tensor]] = {"hough6": [], "hough4": []}
        for name, value in weights.items():
            kernel = "hough6" if name.startswith("learner.chm6d.param") else "hough4"
            if kernel == "hough6" or name == "learner.chm4d.weight":
                shared[kernel].append(value)
            elif name.startswith("backbone.") and value.dim():
                # the two trunks are groups of the same convolutions
                given |= {f"trunks.{i}.{name[9:]}": half for i, half in enumerate(value.chunk(2))}
            elif name.startswith("learner."):
                given[name] = value.reshape(1) if name.endswith("bias") else value
        for kernel, values in shared.items():
            if values:
                table = torch.stack(values)
                given[f"{kernel}.weight"] = table if table.dim() == 2 else table.flatten(-4).flatten(0, -2)
        load_external(self, given, _FROM_RELEASED, ignore=(r"^trunks\.\d\.(layer4|fc)\.",))

    def _correlations(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, scales, scales, h, w, h, w) of features (B, C, h, w), 0 or more."""
        side = source.shape[-1]
        at_scales = []
        for features in (source, target):
            sizes = [(round(side * math.sqrt(scale)),) * 2 for scale in self.settings.scales]
            shrunk = [F.interpolate(features, s, mode="bilinear", align_corners=True) for s in sizes]
            at_scales.append([conv(x) for conv, x in zip(self.narrow, shrunk, strict=True)])
        rows = []
        for f in at_scales[0]:
            tables = [cosine(f.flatten(2).transpose(1, 2), g.flatten(2).transpose(1, 2)) for g in at_scales[1]]
            shapes = [(*f.shape[-2:], *g.shape[-2:]) for g in at_scales[1]]
            rows.append(
                [_resized(t.unflatten(2, s[2:]).unflatten(1, s[:2]), side) for t, s in zip(tables, shapes, strict=True)]
            )
        return torch.stack([torch.stack(row, 1) for row in rows], 1).clamp(min=0)


class HoughConv(nn.Module):
    """A convolution over correlations (B, S, S, h, w, h', w') whose kernel sums votes: the same shape.

    Zeros lie beyond the borders. kind, window: see `CHMSettings`. scales: the kernel reaches to neighbouring scales of both
    pictures, 3 x 3; otherwise each pair of scales is alone. Raises OptionError.
    """

    index: Tensor
    scale_index: Tensor
    counts: Tensor

    def __init__(self, kind: Literal["psi", "iso", "full"] = "psi", window: int = 5, *, scales: bool = True):
        super().__init__()
        if kind not in KERNELS:
            raise OptionError(f"kernel={kind!r} is not known{near(kind, KERNELS)}; there are {', '.join(KERNELS)}")
        if window < 1 or window % 2 == 0:
            raise OptionError(f"the window of a kernel is odd, not {window}")
        self.window, self.reach = window, 3 if scales else 1
        index = _classes(kind, window)
        groups = _SCALES.get(kind, tuple((i,) for i in range(9))) if scales else ((0,),)
        scale_index = [next(g for g, group in enumerate(groups) if i in group) for i in range(self.reach**2)]
        counts = [[len(group) * index.count(c) for c in range(max(index) + 1)] for group in groups]
        # known from the settings, so that states hold weights alone
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.register_buffer("scale_index", torch.tensor(scale_index), persistent=False)
        self.register_buffer("counts", torch.tensor(counts), persistent=False)
        # a weight is shared out among its places
        self.weight = nn.Parameter(torch.randn(self.counts.shape).abs() * 1e-3 * self.counts)
        self.bias = nn.Parameter(torch.zeros(1))

    def kernel(self) -> Tensor:
        """(reach^2, window, window, window, window): scales of both pictures, then y, x, y', x'."""
        weight = self.weight / self.counts
        return weight[self.scale_index][:, self.index].unflatten(1, (self.window,) * 4)

    def forward(self, x: Tensor) -> Tensor:
        b, s = x.shape[:2]
        h, w, ends = x.shape[3], x.shape[4], x.shape[5:]
        half = self.window // 2
        kernel = self.kernel()
        rows = x.reshape(-1, 1, w, *ends)
        out = x.new_zeros(b * s * s, len(kernel), h + 2 * half, w, *ends)
        for i in range(self.window):
            part = F.conv3d(rows, kernel[:, None, i], padding=half).unflatten(0, (-1, h)).transpose(1, 2)
            # the row at y is seen i rows on by the kernel that begins half above
            start = 2 * half - i
            out = out + F.pad(part, (0, 0) * 3 + (start, 2 * half - start))
        out = out[:, :, half : half + h].unflatten(0, (b, s, s))
        if self.reach == 1:
            return out.squeeze(3) + self.bias
        padded = F.pad(out, (0, 0) * 5 + (1, 1, 1, 1))
        total = sum(padded[:, i : i + s, j : j + s, 3 * i + j] for i in range(3) for j in range(3))
        return total + self.bias


def _classes(kind: str, window: int) -> list[int]:
    """Which weight each place (y, x, y', x') of a kernel has, numbered as they come first."""
    known: dict[tuple[int, ...], int] = {}
    found = []
    for place in product(range(-(window // 2), window // 2 + 1), repeat=4):
        tail, head = place[:2], place[2:]
        apart = _square(head[0] - tail[0], head[1] - tail[1])
        key: tuple[int, ...] = place
        if kind == "iso":
            key = (apart,)
        elif kind == "psi":
            key = (*sorted((_square(*head), _square(*tail))), apart)
        found.append(known.setdefault(key, len(known)))
    return found


def _square(y: int, x: int) -> int:
    return y * y + x * x


def _resized(x: Tensor, side: int) -> Tensor:
    """(B, h, w, h', w') at another side, bilinear in both pictures; the outer places stay the outer ones."""
    for axes in ((3, 4), (1, 2)):
        others = [a for a in (1, 2, 3, 4) if a not in axes]
        flat = x.permute(0, *others, *axes)
        grown = F.interpolate(flat.flatten(1, 2), (side, side), mode="bilinear", align_corners=True)
        x = grown.unflatten(1, flat.shape[1:3])
        # the two pictures have changed places
        x = x if axes == (3, 4) else x.permute(0, 3, 4, 1, 2)
    return x


_FROM_RELEASED = (
    (r"\.layer1\.", ".stages.0.blocks."),
    (r"\.layer2\.", ".stages.1.blocks."),
    (r"\.layer3\.", ".stages.2.blocks."),
    (r"^(trunks\.\d)\.conv1\.", r"\1.stem.0.conv."),
    (r"^(trunks\.\d)\.bn1\.", r"\1.stem.0.norm."),
    (r"\.conv1\.", ".narrow.conv."),
    (r"\.bn1\.", ".narrow.norm."),
    (r"\.conv2\.", ".mixer.conv."),
    (r"\.bn2\.", ".mixer.norm."),
    (r"\.conv3\.", ".widen.conv."),
    (r"\.bn3\.", ".widen.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^learner\.conv2ds\.", "narrow."),
    (r"^learner\.chm([46])d\.", r"hough\1."),
)
