"""The two networks of plug and play generation: an encoder that reads a code off an image, a generator that inverts it.

    encoder    convolutions, poolings, one linear map:  image -> relu(code)                        (AlexNet up to fc6)
    generator  linear maps, then doublings by transposed convolutions:  code -> image   (Dosovitskiy & Brox, leaky relu)

The generator learns to give back the image, its features and its code, and to pass for real: three losses on tensors.

Departs from the released definition: biases of transposed convolutions are learned; the released ones stay at their
start. The released weights are Caffe's and are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import ModelCard
from regard.contract.errors import OptionError, ShapeError

CARD = ModelCard(
    slug="ppgn",
    part_of="ppgn",
    title="Upconvolutional generator and its encoder",
    exports=(
        "UpconvGenerator",
        "CodeEncoder",
        "UpconvSettings",
        "image_loss",
        "feature_loss",
        "adversarial_losses",
    ),
    example="b=3 c=12",
    options={
        "code": 12,
        "hidden": (16,),
        "grid": 2,
        "base": 8,
        "ups": (8, 6),
        "convs": (10, 0),
        "crop": 13,
        "features": (8, 6),
        "kernels": (5, 3),
        "strides": (2, 1),
        "paddings": (0, 1),
        "groups": (1, 2),
        "responses": (True, False),
        "pools": (True, False),
    },
    task="codes to images",
)


@dataclass(frozen=True)
class UpconvSettings:
    """What a generator and the encoder of its codes are made of.

    code: numbers of a code. channels: of images. Generator: hidden, widths of linear maps before the one to `base` channels
    on grid x grid pixels; ups, channels after each doubling but the last, which makes the image; convs, channels of a 3 x 3
    convolution behind each of these, 0 for none; slope, of the leaky relu. Encoder: crop, pixels on a side that it takes;
    features, kernels, strides, paddings, groups, one entry a convolution; responses, where local response normalisation
    follows; pools, where a maximum of 3 x 3 at stride 2 does, before it.
    """

    code: int = 4096
    channels: int = 3
    hidden: tuple[int, ...] = (4096, 4096)
    grid: int = 4
    base: int = 256
    ups: tuple[int, ...] = (256, 256, 128, 64, 32)
    convs: tuple[int, ...] = (512, 256, 128, 0, 0)
    slope: float = 0.3
    crop: int = 227
    features: tuple[int, ...] = (96, 256, 384, 384, 256)
    kernels: tuple[int, ...] = (11, 5, 3, 3, 3)
    strides: tuple[int, ...] = (4, 1, 1, 1, 1)
    paddings: tuple[int, ...] = (0, 2, 1, 1, 1)
    groups: tuple[int, ...] = (1, 2, 1, 2, 2)
    responses: tuple[bool, ...] = (True, True, False, False, False)
    pools: tuple[bool, ...] = (True, True, False, False, True)

    def __post_init__(self) -> None:
        if len(self.ups) != len(self.convs):
            raise OptionError(f"ups {self.ups} and convs {self.convs} must have one entry a doubling but the last")
        parts = (self.features, self.kernels, self.strides, self.paddings, self.groups, self.responses, self.pools)
        if len({len(part) for part in parts}) != 1:
            raise OptionError(f"the encoder's {parts} must have one entry a convolution")
        if self.crop > self.image:
            raise OptionError(f"images of {self.image}x{self.image} have no crop of {self.crop}")

    @property
    def image(self) -> int:
        """Pixels on a side of a generated image."""
        return self.grid * 2 ** (len(self.ups) + 1)


SIZES = {
    # nets/generator/noiseless/generator.prototxt and nets/caffenet/caffenet.prototxt of the released code
    "ppgn_fc6": UpconvSettings(),
    # for the 8 x 8 digits of scikit-learn
    "ppgn_digits": UpconvSettings(
        code=64, channels=1, hidden=(128,), grid=2, base=64, ups=(64,), convs=(64,), crop=8, features=(32, 64),
        kernels=(3, 3), strides=(1, 2), paddings=(1, 1), groups=(1, 1), responses=(False, False), pools=(False, False),
    ),
}  # fmt: skip


class UpconvGenerator(nn.Module):
    """Codes (B, code) to images (B, channels, Y, X), of any range. settings: of the released generator if None."""

    def __init__(self, settings: UpconvSettings | None = None):
        super().__init__()
        s = self.settings = settings or SIZES["ppgn_fc6"]
        widths = (s.code, *s.hidden, s.base * s.grid**2)
        self.linear = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.up, self.conv = nn.ModuleList(), nn.ModuleList()
        width = s.base
        for up, conv in zip((*s.ups, s.channels), (*s.convs, 0), strict=True):
            self.up.append(nn.ConvTranspose2d(width, up, 4, stride=2, padding=1))
            self.conv.append(nn.ConvTranspose2d(up, conv, 3, padding=1) if conv else nn.Identity())
            width = conv or up

    @property
    def code(self) -> int:
        """Numbers of a code."""
        return self.settings.code

    def forward(self, code: Tensor) -> Tensor:
        s = self.settings
        if code.dim() != 2 or code.shape[1] != s.code:
            raise ShapeError(f"the generator got {tuple(code.shape)}; it takes codes (B, {s.code})")
        x = code
        for linear in self.linear:
            x = F.leaky_relu(linear(x), s.slope)
        x = x.unflatten(1, (s.base, s.grid, s.grid))
        for up, conv in zip(self.up[:-1], self.conv[:-1], strict=True):
            x = F.leaky_relu(up(x), s.slope)
            x = x if isinstance(conv, nn.Identity) else F.leaky_relu(conv(x), s.slope)
        return self.up[-1](x)


class CodeEncoder(nn.Module):
    """Images (B, channels, crop, crop) to codes (B, code), 0 or more. settings: of the released encoder if None."""

    def __init__(self, settings: UpconvSettings | None = None):
        super().__init__()
        s = self.settings = settings or SIZES["ppgn_fc6"]
        self.conv = nn.ModuleList()
        width, side = s.channels, s.crop
        rows = zip(s.features, s.kernels, s.strides, s.paddings, s.groups, s.pools, strict=True)
        for out, kernel, stride, padding, groups, pool in rows:
            if width % groups or out % groups:
                raise OptionError(f"{width} channels in and {out} out do not divide into {groups} groups")
            self.conv.append(nn.Conv2d(width, out, kernel, stride, padding, groups=groups))
            side = (side + 2 * padding - kernel) // stride + 1
            side = (side - 3) // 2 + 1 if pool else side
            if side < 1:
                raise OptionError(f"a crop of {s.crop} is too small for the encoder's convolutions and poolings")
            width = out
        self.linear = nn.Linear(width * side**2, s.code)
        # the constants of AlexNet
        self.response = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)

    def forward(self, images: Tensor) -> Tensor:
        return self.read(images)[1]

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, y, x) behind the last convolution and its pooling (pool5), and codes (B, code)."""
        s = self.settings
        if images.shape[1:] != (s.channels, s.crop, s.crop):
            raise ShapeError(f"the encoder got {tuple(images.shape)}; it takes (B, {s.channels}, {s.crop}, {s.crop})")
        x = images
        for conv, response, pool in zip(self.conv, s.responses, s.pools, strict=True):
            x = F.relu(conv(x))
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = self.response(x) if response else x
        return x, F.relu(self.linear(x.flatten(1)))


def image_loss(made: Tensor, real: Tensor) -> Tensor:
    """Squared distance of two images (B, C, Y, X), the mean over rows."""
    if made.shape != real.shape:
        raise ShapeError(f"{tuple(made.shape)} cannot be compared with {tuple(real.shape)}")
    return (made - real).square().flatten(1).sum(1).mean()


def feature_loss(made: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Squared distance of features (B, …), the mean over rows, summed over layers; gradients reach `made` alone."""
    if len(made) != len(real) or not made:
        raise ShapeError(f"{len(made)} layers cannot be compared with {len(real)}")
    return torch.stack([image_loss(a, b.detach()) for a, b in zip(made, real, strict=True)]).sum()


def adversarial_losses(made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """What generator and discriminator lose, of the discriminator's logits (B,) of made and real images.

    Generator: - log D(made). Discriminator: - log D(real) - log(1 - D(made)), the mean over rows of each.
    """
    return F.softplus(-made).mean(), F.softplus(-real).mean() + F.softplus(made).mean()
