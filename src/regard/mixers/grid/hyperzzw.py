"""HyperZ.Z.W: maps are multiplied with kernels that a slow net makes of coordinates, and with each other.

    global: (Z * W) Z' over the two axes of the grid        local: a depthwise convolution whose kernel is made of W and Z
    slow net: h_0 = sin(A_0 c);   h_l = sin(A_l c) * (B_l h_{l-1}) + b;   W = C h_L,   c in [-1, 1]^axes

Ten such branches are mixed by one linear map. Departs from the released code, which does not run: local kernels belong to
one sample (there the batch is averaged, `batch_mean=True`); what modulates them is trained; batch norms keep running
statistics; both gates multiply elementwise, as the paper's Z W Z; the gate of channels acts after the standardisation,
which would undo it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError
from regard.engines.precision import accumulator, without_autocast
from regard.layers.conv_blocks import BatchNorm
from regard.layers.grids import check_grid

CARD = MixerCard(
    slug="hyperzzw",
    title="HyperZ.Z.W: slow nets make kernels for fast maps",
    paper="HyperZ⋅Z⋅W Operator Connects Slow-Fast Networks for Full Context Interaction",
    exports=("HyperZZW", "HyperZZWLocal", "SlowNet", "hyper_zzw_global"),
    example="b=2 y=4 x=4 c=6 h=1",
    options={"size": 4, "kernels": (3, 3, 3, 3), "hidden": 4},
    attends=("self",),
    time="n^1.5 c",
    memory="n c",
)


class HyperZZW(nn.Module):
    """The branches of an SFNE block and the map that mixes them: (B, size, size, dim) -> (B, size, size, dim_out).

    dim: channels. heads: taken for the frame's sake and not used. size: side of the grid. kernels: sides of the four
    local kernels, odd. hidden: width of the slow nets. earlier: channels that the maps of earlier blocks bring along.
    bias: of the last map. batch_mean: local kernels are those of the mean of the batch. Section 3. Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        size: int,
        kernels: tuple[int, ...] = (3, 5, 7, 9),
        hidden: int = 16,
        dim_out: int | None = None,
        earlier: int = 0,
        bias: bool = True,
        batch_mean: bool = False,
    ):
        super().__init__()
        if len(kernels) != 4:
            raise OptionError(f"there are four local branches, each with a kernel; got kernels={kernels}")
        if size < 1:
            raise OptionError(f"size is the side of the grid, at least 1, not {size}")
        self.dim, self.size = dim, size
        self.slow = SlowNet(dim, (size, size), hidden=hidden)
        self.fast_context, self.fast_own = RecursiveGate(dim, size), RecursiveGate(dim, size)
        # what is standardised next needs no bias
        self.mix = nn.Linear(dim, dim, bias=False)
        self.channels = ChannelScores(dim, hidden)
        self.interact = PlaceGate(dim, size, hidden)
        self.local = nn.ModuleList(HyperZZWLocal(dim, k, hidden=hidden, batch_mean=batch_mean) for k in kernels)
        self.bottleneck = nn.Linear(10 * dim + earlier, dim if dim_out is None else dim_out, bias=bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, padding: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix the places of a grid. Raises ShapeError; Unsupported for a context, padding or a causal call."""
        return self.branches(x, context=context, padding=padding, is_causal=is_causal)[0]

    def branches(
        self,
        x: Tensor,
        earlier: Sequence[Tensor] = (),
        *,
        context: Tensor | None = None,
        padding: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(the mixed branches, the global kernel (1, dim, size, size)); earlier: maps (B, size, size, …) beside them."""
        check_grid("HyperZZW", self.dim, x, context, padding, is_causal=is_causal)
        if x.shape[1:3] != (self.size, self.size):
            raise ShapeError(
                f"HyperZZW: the grid is {x.shape[1]}x{x.shape[2]}; the slow net was made for {self.size}x{self.size}"
            )
        kernel = self.slow().to(x.dtype)
        seen = x * kernel.permute(0, 2, 3, 1)
        fast = standardised(self.fast_context(seen) + self.fast_own(x))
        mixed = standardised(self.mix(x))
        gated = standardised(x) * torch.sigmoid(self.channels(x))
        over = [_on_grid(x, kernel, other) for other in (fast, mixed, gated)]
        first, second, third, fourth = self.local
        parts = (
            over[0], second(gated, x), fast, over[1], first(x, gated), over[0] * torch.sigmoid(over[0]),
            third(mixed, x), over[2], fourth(x, mixed), self.interact(over[0], x), *earlier,
        )  # fmt: skip
        return self.bottleneck(torch.cat(parts, -1)), kernel


class HyperZZWLocal(nn.Module):
    """A depthwise convolution with kernels made by a slow net and by another map, a linear map, norm and GELU.

    dim: channels. kernel: its side, odd. batch_mean: one kernel for all rows, of their mean. Raises OptionError.
    """

    def __init__(self, dim: int, kernel: int, *, hidden: int = 16, layers: int = 2, batch_mean: bool = False):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise OptionError(f"a local kernel has an odd side, not {kernel}")
        self.dim, self.kernel, self.batch_mean = dim, kernel, batch_mean
        self.slow = SlowNet(dim, (kernel, kernel), hidden=hidden, layers=layers)
        self.reduce, self.enter = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
        self.factors = nn.ModuleList(_unit_bias(nn.Linear(hidden, hidden)) for _ in range(layers))
        self.keep = nn.Parameter(torch.ones(layers, hidden))
        self.rescale = nn.Parameter(torch.full((layers, hidden), 0.1))
        self.mix = nn.Linear(dim, dim, bias=False)
        self.norm = BatchNorm(dim, affine=False)

    def forward(self, source: Tensor, x: Tensor) -> Tensor:
        """source (B, H, W, C), which makes the kernels, and x (B, H, W, C), which they meet -> (B, H, W, C)."""
        kernels = self.kernels(source).to(x.dtype)
        batch, height, width, dim = x.shape
        image = x.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
        taps = kernels.expand(batch, -1, -1, -1).reshape(batch * dim, 1, self.kernel, self.kernel)
        found = F.conv2d(image, taps, padding=self.kernel // 2, groups=batch * dim)
        found = found.view(batch, dim, height, width).permute(0, 2, 3, 1)
        return F.gelu(self.norm(self.mix(found)))

    def kernels(self, source: Tensor) -> Tensor:
        """The kernels of each row: (B, C, kernel, kernel), of one row with batch_mean."""
        pooled = F.adaptive_avg_pool2d(source.permute(0, 3, 1, 2), self.kernel).permute(0, 2, 3, 1)
        pooled = self.reduce(pooled)
        if self.batch_mean:
            pooled = pooled.mean(0, keepdim=True)
        pooled = F.gelu(self.enter(pooled))
        factors = [factor(pooled) for factor in self.factors]

        def modulate(layer: int, h: Tensor) -> Tensor:
            size = h.square().sum((1, 2), keepdim=True).clamp(min=1e-24).sqrt()
            renewed = self.keep[layer].to(h) * h + self.rescale[layer].to(h) * h / size
            return renewed * factors[layer].to(h)

        return self.slow(modulate)


class SlowNet(nn.Module):
    """A kernel as a function of its coordinates, in layers that multiply waves (MAGNet): () -> (1, out, *size).

    out: channels. size: places on each axis. hidden: width. layers: after the first. omega: of the waves; their
    frequencies are 2 pi omega gamma, gamma drawn from Gamma(alpha / (layer + 1), 1). Its last layer starts divided by
    the root of the number of places. Computed in float32 at least. Weight decay belongs on no wave: a thousandth less
    of its frequencies is another kernel. Section 3.
    """

    def __init__(
        self, out: int, size: tuple[int, ...], *, hidden: int = 16, layers: int = 2, omega: float = 2000.0,
        alpha: float = 6.0,
    ):  # fmt: skip
        super().__init__()
        self.size = size
        waves = [nn.Linear(len(size), hidden) for _ in range(layers + 1)]
        self.linears = nn.ModuleList(_unit_bias(nn.Linear(hidden, hidden)) for _ in range(layers))
        self.last = nn.Linear(hidden, out)
        self.bias = nn.Parameter(torch.zeros(*size, 1))
        self.waves = nn.ModuleList(waves)
        with torch.no_grad():
            for layer, wave in enumerate(waves):
                concentration = torch.full_like(wave.weight, alpha / (layer + 1))
                wave.weight *= 2 * torch.pi * omega * torch._standard_gamma(concentration)
                nn.init.zeros_(wave.bias)
            nn.init.kaiming_uniform_(self.last.weight, nonlinearity="linear")
            self.last.weight /= math.prod(size) ** 0.5
            nn.init.zeros_(self.last.bias)

    def forward(self, change: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """change: of the hidden maps (1, *size, hidden) after each layer; it may bring rows: (B, *size, hidden)."""
        weight = self.last.weight
        kind = accumulator(weight.dtype)
        with without_autocast(weight.device):
            axes = [torch.linspace(-1, 1, n, dtype=torch.float64, device=weight.device) for n in self.size]
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
            h = self._wave(0, places, kind)
            for layer, linear in enumerate(self.linears):
                h = self._wave(layer + 1, places, kind) * _apply(linear, h) + self.bias.to(kind)
                if change is not None:
                    h = change(layer, h)
            return _apply(self.last, h).movedim(-1, 1)

    def _wave(self, layer: int, places: Tensor, kind: torch.dtype) -> Tensor:
        # phases of a hundred thousand radians: float32 would leave two digits of them
        return torch.sin(_apply(self.waves[layer], places)).to(kind)


class RecursiveGate(nn.Module):
    """RGU: y = W_y (gelu(standardised(W_k x * W_q W_v x)) + b), b a value a place: (B, size, size, C) -> the same."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_q, self.to_y = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(size, size, 1))

    def forward(self, x: Tensor) -> Tensor:
        both = self.to_k(x) * self.to_q(self.to_v(x))
        return self.to_y(F.gelu(standardised(both)) + self.bias)


class ChannelScores(nn.Module):
    """m w m, m the means of the channels, w a slow kernel over them: (B, H, W, C) -> (B, 1, 1, C)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.slow = SlowNet(1, (dim,), hidden=hidden)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2), keepdim=True)
        return mean * self.slow()[0, 0].to(x.dtype) * mean


class PlaceGate(nn.Module):
    """x * sigmoid(s c), c the scores of the channels of another map y, s those of its places: (B, H, W, C) each."""

    def __init__(self, dim: int, size: int, hidden: int):
        super().__init__()
        self.channels = ChannelScores(dim, hidden)
        self.slow = SlowNet(1, (size, size), hidden=hidden)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        mean = y.mean(-1, keepdim=True)
        places = mean * self.slow()[0, 0, :, :, None].to(x.dtype) * mean
        return x * torch.sigmoid(places * self.channels(y))


def hyper_zzw_global(z: Tensor, w: Tensor, z2: Tensor | None = None) -> Tensor:
    """(z * w) z2, products of the two spatial axes: z, z2 (B, C, H, H), w (B or 1, C, H, H) -> (B, C, H, H).

    z2: z if None. Raises ShapeError for a grid that is not square.
    """
    if z.dim() != 4 or z.shape[2] != z.shape[3]:
        raise ShapeError(f"z is {tuple(z.shape)}; the global form multiplies maps with maps: it must be (B, C, H, H)")
    z2 = z if z2 is None else z2
    if z2.shape != z.shape or w.shape[1:] != z.shape[1:] or w.shape[0] not in (1, z.shape[0]):
        raise ShapeError(f"z, w, z2 are {[tuple(t.shape) for t in (z, w, z2)]}; they must be of one shape, w of 1 row")
    return (z * w) @ z2


def standardised(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Each map of each row with mean 0 and variance 1: (B, H, W, C) -> the same, summed in float32 at least."""
    wide = x.to(accumulator(x.dtype))
    centred = wide - wide.mean((1, 2), keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean((1, 2), keepdim=True) + eps)).to(x.dtype)


def _on_grid(x: Tensor, kernel: Tensor, other: Tensor) -> Tensor:
    found = hyper_zzw_global(x.permute(0, 3, 1, 2), kernel, other.to(x.dtype).permute(0, 3, 1, 2))
    return found.permute(0, 2, 3, 1)


def _apply(linear: nn.Module, x: Tensor) -> Tensor:
    # weights in the dtype of the input, which is wider
    weight, bias = linear.weight, linear.bias
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))  # type: ignore[operator,arg-type]


def _unit_bias(linear: nn.Linear) -> nn.Linear:
    nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
    nn.init.ones_(linear.bias)
    return linear
