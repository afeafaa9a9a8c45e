"""Convolutional parts of vision models, on (B, H, W, C); most can be folded for inference by `fuse`.

A convolution sees the permuted view, which is torch's channels_last layout: nothing is copied. 1x1 convolutions are
`Linear`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.errors import OptionError, ShapeError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with its norm and activation, in the order [norm if norm_first] conv [norm if not] [act].

    out: channels. k, s: kernel and stride. p: zero padding on all sides, k // 2 if None. norm: "ln" over the channels,
    "bn" over the batch. act: "gelu", "gelu_tanh", "relu", "silu".
    """

    out: int
    k: int = 3
    s: int = 1
    p: int | None = None
    groups: int = 1
    bias: bool = True
    norm: Literal["ln", "bn"] | None = None
    norm_first: bool = False
    norm_eps: float = 1e-5
    act: str | None = None

    def build(self, channels: int) -> Conv:
        """The module for inputs of so many channels."""
        return Conv(channels, self)


@dataclass(frozen=True)
class PoolSpec:
    """A maximum over k x k pixels at stride s, padded by k // 2."""

    k: int = 3
    s: int = 2

    def build(self, channels: int) -> MaxPool:
        """The module; it keeps the number of channels."""
        return MaxPool(self.k, self.s)


class Conv(nn.Module):
    """The module of a `ConvSpec`: (B, H, W, C) -> (B, H', W', spec.out). Raises OptionError, ShapeError."""

    def __init__(self, channels: int, spec: ConvSpec):
        super().__init__()
        if channels % spec.groups or spec.out % spec.groups:
            raise OptionError(
                f"{channels} channels in and {spec.out} out do not divide into {spec.groups} groups of a convolution"
            )
        self.channels, self.spec = channels, spec
        padding = spec.k // 2 if spec.p is None else spec.p
        self.conv: nn.Linear | nn.Conv2d
        if (spec.k, spec.s, spec.groups, padding) == (1, 1, 1, 0):
            self.conv = nn.Linear(channels, spec.out, bias=spec.bias)
        else:
            self.conv = nn.Conv2d(channels, spec.out, spec.k, spec.s, padding, groups=spec.groups, bias=spec.bias)
        self.norm = make_norm(spec.norm, channels if spec.norm_first else spec.out, spec.norm_eps)
        self.act = make_activation(spec.act) if spec.act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.channels:
            raise ShapeError(f"a convolution got {tuple(x.shape)}; it takes (B, H, W, {self.channels})")
        if self.spec.norm_first:
            x = self.norm(x)
        x = self.conv(x) if isinstance(self.conv, nn.Linear) else on_channels_first(self.conv, x)
        return self.act(x if self.spec.norm_first else self.norm(x))

    def fused(self) -> Conv:
        """One convolution with a bias in place of convolution and batch norm; itself where there is none to fold."""
        if not isinstance(self.norm, BatchNorm) or self.spec.norm_first:
            return self
        weight, bias = fold(self.conv.weight, self.conv.bias, self.norm)
        spec = ConvSpec(
            self.spec.out, self.spec.k, self.spec.s, self.spec.p, self.spec.groups, bias=True, act=self.spec.act
        )
        return _filled(Conv(self.channels, spec), weight, bias)


class ConvBN(Conv):
    """A convolution without bias, then batch norm. gain: where the norm's weight starts; 0 closes a residual branch."""

    def __init__(self, channels: int, out: int, k: int = 1, s: int = 1, *, groups: int = 1, gain: float = 1.0):
        super().__init__(channels, ConvSpec(out, k, s, groups=groups, bias=False, norm="bn"))
        nn.init.constant_(self.norm.weight, gain)  # type: ignore[arg-type]


class MaxPool(nn.Module):
    """The maximum over k x k pixels at stride s: (B, H, W, C) -> (B, H', W', C)."""

    def __init__(self, k: int = 3, s: int = 2):
        super().__init__()
        self.pool = nn.MaxPool2d(k, s, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        return on_channels_first(self.pool, x)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the last axis: (B, H, W, C) or (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return on_channels_first(super().forward, x) if x.dim() == 4 else super().forward(x)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ShapeError(f"batch norm got {tuple(input.shape)}; it takes (B, H, W, C) or (B, C)")


class BNLinear(nn.Module):
    """Batch norm, then a linear map: (…, C) -> (…, out)."""

    def __init__(self, channels: int, out: int, *, bias: bool = True):
        super().__init__()
        self.norm = BatchNorm(channels)
        self.linear = nn.Linear(channels, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def fused(self) -> nn.Linear:
        """One linear map."""
        gain, shift = _affine(self.norm)
        bias = self.linear.weight @ shift
        if self.linear.bias is not None:
            bias = bias + self.linear.bias
        out = nn.Linear(self.linear.in_features, self.linear.out_features).to(bias)
        with torch.no_grad():
            out.weight.copy_(self.linear.weight * gain)
            assert out.bias is not None
            out.bias.copy_(bias)
        return out


class RepDW(nn.Module):
    """Two depthwise convolutions side by side, each with batch norm, added: k x k and small x small.

    out: channels, a multiple of those that come in; as many if None. Raises OptionError for even kernels.
    """

    def __init__(self, channels: int, k: int = 7, s: int = 1, *, out: int | None = None, small: int = 3):
        super().__init__()
        if k % 2 == 0 or small % 2 == 0 or small > k:
            raise OptionError(f"the kernels are {k} and {small}; they must be odd, the second the smaller one")
        out = channels if out is None else out
        self.large = ConvBN(channels, out, k, s, groups=channels)
        self.small = ConvBN(channels, out, small, s, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)

    def fused(self) -> Conv:
        """One depthwise convolution with a bias."""
        large, small = self.large.fused(), self.small.fused()
        border = (large.spec.k - small.spec.k) // 2
        assert large.conv.bias is not None and small.conv.bias is not None
        weight = large.conv.weight + F.pad(small.conv.weight, (border,) * 4)
        return _filled(Conv(large.channels, large.spec), weight, large.conv.bias + small.conv.bias)


class SE(nn.Module):
    """Squeeze and excitation: x * sigmoid(W2 act(W1 mean(x))), the mean over all pixels. hidden: inner width."""

    def __init__(self, channels: int, hidden: int, *, act: str = "relu"):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(x.mean((1, 2), keepdim=True))))
        return x * torch.sigmoid(gate)


class MBConv(nn.Module):
    """The inverted bottleneck of MaxViT: norm, widen, depthwise 3 x 3 (stride s), gate, narrow; with a shortcut.

    expand: inner width over `out`. squeeze: width of the gate over `out`. The shortcut averages 2 x 2 pixels at stride
    2 and has a 1 x 1 convolution where the channels change. Raises OptionError for a stride other than 1 and 2.
    """

    def __init__(
        self, channels: int, out: int, s: int = 1, *, expand: float = 4.0, squeeze: float = 0.25, act: str = "gelu",
        norm_eps: float = 1e-3, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if s not in (1, 2):
            raise OptionError(f"the stride of an MBConv is 1 or 2, not {s}")
        inner = int(expand * out)
        self.norm = BatchNorm(channels, norm_eps)
        self.widen = Conv(channels, ConvSpec(inner, 1, bias=False, norm="bn", norm_eps=norm_eps, act=act))
        self.depthwise = Conv(
            inner, ConvSpec(inner, 3, s, groups=inner, bias=False, norm="bn", norm_eps=norm_eps, act=act)
        )
        self.gate = SE(inner, int(squeeze * out), act="silu")
        self.narrow = nn.Linear(inner, out)
        self.drop_path = DropPath(drop_path)
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if s == 2 else nn.Identity()
        self.shortcut = nn.Linear(channels, out) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.narrow(self.gate(self.depthwise(self.widen(self.norm(x)))))
        return self.shortcut(on_channels_first(self.pool, x)) + self.drop_path(branch)


class LayerScale(nn.Module):
    """A learned factor for every channel: (…, C) -> (…, C). start: its first value."""

    def __init__(self, dim: int, start: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class DropPath(nn.Module):
    """In training, a row of the batch is 0 with probability `rate`, else divided by 1 - rate. rate: in [0, 1)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise OptionError(f"a rate of dropped paths is in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * (x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(keep) / keep)

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


def fuse(model: nn.Module) -> nn.Module:
    """A copy for inference, in which every batch norm behind a convolution (and each `RepDW`, `BNLinear`) is folded."""
    made = copy.deepcopy(model).eval()
    return _fuse(made)


def make_norm(kind: str | None, dim: int, eps: float = 1e-5) -> nn.Module:
    """A norm over (…, C): "ln", "bn", or None for none."""
    if kind is None:
        return nn.Identity()
    if kind == "ln":
        return nn.LayerNorm(dim, eps)
    if kind == "bn":
        return BatchNorm(dim, eps)
    raise OptionError(f"the norm is {kind!r}; it is 'ln', 'bn' or None")


def make_activation(name: str) -> nn.Module:
    """An activation by name. Raises OptionError."""
    if name not in ACTIVATIONS:
        raise OptionError(f"the activation is {name!r}; it is one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def on_channels_first(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a module of (B, C, H, W) on (B, H, W, C), without a copy."""
    return module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def fold(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a map followed by a batch norm in evaluation; the outputs are the first axis of the weight."""
    gain, shift = _affine(norm)
    scaled = weight * gain.view(-1, *(1,) * (weight.dim() - 1))
    return scaled, shift if bias is None else shift + gain * bias


def _affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    # what a batch norm does in evaluation: x * gain + shift
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return gain, norm.bias - gain * norm.running_mean


def _filled(conv: Conv, weight: Tensor, bias: Tensor) -> Conv:
    conv = conv.to(weight)
    with torch.no_grad():
        conv.conv.weight.copy_(weight)
        assert conv.conv.bias is not None
        conv.conv.bias.copy_(bias)
    return conv.eval()


def _fuse(module: nn.Module) -> nn.Module:
    if isinstance(module, Conv | RepDW | BNLinear):
        return module.fused()
    for name, child in module.named_children():
        setattr(module, name, _fuse(child))
    return module
