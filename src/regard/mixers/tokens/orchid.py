"""Orchid: a long convolution whose kernel is made from the sequence itself, between two gates.

    s1, s2, v = conv3(x W);   out = (s2 * ((h0 + h(u)) conv (s1 * v))) W_o,   u = the part of x W that makes v
    h(u) = F^-1 conv_f |F conv_t u|   or   F^-1 (conj(F k) F q),  k, q = conv_t u

h0 is fixed: an MLP of the signed lag times a window that decays with it, and one weight of lag 0. Neither form of h
changes when the sequence is shifted. Departs from the released code: h(u) of the first form has a real spectrum, as in
the paper; the fixed kernel is a function of the signed lag; the convolutions of h are centred, where the released one
shifts by a token; `circular=False` convolves with lags of both signs in a transform of 2 max_len steps at least, so that
the kernel of a sequence does not depend on padding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.contract.card import MixerCard
from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.engines.precision import accumulator
from regard.layers.attention import check_tokens
from regard.primitives.fft_conv import fast_length, fft_conv

CARD = MixerCard(
    slug="orchid",
    title="Orchid, data-dependent global convolution",
    paper="Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling",
    exports=("Orchid", "data_dependent_conv"),
    example="b=2 n=10 c=16 h=4",
    options={"max_len": 16},
    attends=("self",),
    padding=True,
    time="n log n c",
    memory="n c",
)


class Orchid(nn.Module):
    """Data-dependent global convolution of tokens: (B, N, C) -> (B, N, C), section 3.

    dim: model width. heads: taken for the frame's sake and not used: convolutions have none. max_len: most tokens;
    lags are measured in it. conditioning: "magnitude" or "correlation", the two forms of h. magnitude: "abs" |F u|, or
    "square" |F u|^2. circular: the sequence is a ring of N tokens. norm: LayerNorm over the channels after each
    convolution of h. residual: "static" adds a fixed long convolution of the layer's input before the output
    projection. Raises OptionError.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        max_len: int = 1024,
        conditioning: Literal["magnitude", "correlation"] = "magnitude",
        magnitude: Literal["abs", "square"] = "abs",
        circular: bool = False,
        norm: bool = True,
        residual: Literal["static"] | None = None,
    ):
        super().__init__()
        if max_len < 1:
            raise OptionError(f"max_len is a number of tokens, at least 1, not {max_len}")
        if conditioning not in ("magnitude", "correlation"):
            raise OptionError(f"conditioning is {conditioning!r}; it is 'magnitude' or 'correlation'")
        if magnitude not in ("abs", "square"):
            raise OptionError(f"magnitude is {magnitude!r}; it is 'abs' or 'square'")
        if residual not in ("static", None):
            raise OptionError(f"residual is {residual!r}; it is 'static' or None")
        self.dim, self.max_len, self.circular = dim, max_len, circular
        self.conditioning, self.magnitude = conditioning, magnitude
        self.to_inner = nn.Linear(dim, 3 * dim)
        self.short = _Conv3(3 * dim, norm=False)
        self.static = ImplicitFilter(dim, max_len)
        self.first = _Conv3(dim, norm=norm)
        self.second = _Conv3(dim, norm=norm)
        self.residual = ImplicitFilter(dim, max_len) if residual else None
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        reset: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Mix tokens (B, N, C). padding: bool (B, N), True = takes part; on a ring, padded places stay, as zeros.

        Raises Unsupported for a context, a causal call or reset=; ShapeError for more than max_len tokens.
        """
        if context is not None:
            raise Unsupported("orchid convolves a sequence with itself and reads no context; softmax does")
        if is_causal:
            raise Unsupported(
                "orchid is not causal: the kernel is computed from the whole sequence; short_conv and lightning are"
            )
        if reset is not None:
            raise Unsupported("orchid makes one kernel of the whole sequence and separates no documents; softmax does")
        check_tokens("Orchid", self.dim, x, None, padding, None, False)
        n = x.shape[1]
        if n > self.max_len and not self.circular:
            raise ShapeError(f"orchid was made for max_len={self.max_len} tokens; there are {n}")
        period = n if self.circular else fast_length(2 * self.max_len)
        keep = None if padding is None else padding[:, None]
        inner = _kept(self.to_inner(x).transpose(1, 2), keep)
        s1, s2, v = self.short(inner, self.circular).chunk(3, 1)
        y = _kept(s1 * v, keep)
        adaptive = self.adaptive_kernel(inner[:, -self.dim :], period, padding=padding)
        mixed = s2 * data_dependent_conv(y, self.static(n, period), adaptive, n_fft=period)
        if self.residual is not None:
            whole = _kept(x.transpose(1, 2), keep)
            mixed = mixed + fft_conv(whole, self.residual(n, period), is_causal=False, n_fft=period)
        return self.to_out(mixed.transpose(1, 2))

    def adaptive_kernel(self, u: Tensor, n_fft: int, *, padding: Tensor | None = None) -> Tensor:
        """The spectrum of h: u (B, C, N) -> (B, C, n_fft // 2 + 1), real or complex, float32 at least."""
        keep = None if padding is None else padding[:, None]
        wide = accumulator(u.dtype)
        one = _kept(self.first(u, self.circular), keep)
        other = None if self.conditioning == "magnitude" else _kept(self.second(u, self.circular), keep)
        spectrum = torch.fft.rfft(one.to(wide), n=n_fft, norm="ortho")
        if other is not None:
            return spectrum.conj() * torch.fft.rfft(other.to(wide), n=n_fft, norm="ortho")
        size = spectrum.abs() if self.magnitude == "abs" else spectrum.real.square() + spectrum.imag.square()
        return self.second(size.to(u.dtype), False).to(wide)


class ImplicitFilter(nn.Module):
    """A kernel that is a function of the lag: exp(-rate |t|) MLP(t / max_len, waves of it), and a weight of lag 0.

    dim: channels. max_len: tokens; rates of decay run from 1 to 16 in 1 / max_len over the channels. bands: of waves.
    """

    rate: Tensor

    def __init__(self, dim: int, max_len: int, *, bands: int = 8, hidden: int = 32):
        super().__init__()
        self.max_len, self.bands = max_len, bands
        self.up, self.middle = nn.Linear(2 * bands + 1, hidden), nn.Linear(hidden, hidden)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.skip = nn.Parameter(torch.randn(dim))
        self.register_buffer("rate", torch.logspace(0, 4, dim, base=2.0), persistent=False)

    def forward(self, n: int, period: int) -> Tensor:
        """The taps of all lags between n tokens, at their place modulo the period: (C, period)."""
        kind, device = self.skip.dtype, self.skip.device
        # a ring has each lag once
        first, last = (-(n - 1), n) if period >= 2 * n - 1 else (n - period, n)
        lag = torch.arange(first, last, device=device)
        lag = torch.where(lag > period // 2, lag - period, lag)
        place = (lag / self.max_len).to(kind)[:, None]
        waves = torch.pi * place * torch.arange(1, self.bands + 1, device=device, dtype=kind)
        features = torch.cat((place, waves.sin(), waves.cos()), -1)
        taps = self.down(torch.sin(self.middle(torch.sin(self.up(features)))))
        taps = taps * torch.exp(-place.abs() * self.rate.to(kind)) / self.max_len**0.5
        taps = taps + (lag == 0)[:, None] * self.skip
        index = torch.remainder(lag, period)
        return taps.new_zeros(period, taps.shape[1]).index_copy(0, index, taps).t()


def data_dependent_conv(
    x: Tensor, h_static: Tensor | None, h_adaptive: Tensor | None, *, n_fft: int | None = None
) -> Tensor:
    """Circular convolution with the sum of two kernels: x (B, D, N) -> (B, D, N), in x's dtype.

    h_static: (D, K) or (B, D, K), taps by lag modulo n_fft. h_adaptive: its spectrum (B, D, n_fft // 2 + 1), real or
    complex. Either may be None. n_fft: at least N and K; N if None; beyond 2 N - 1 nothing wraps around. Computed in
    float32 (float64 stays), also under autocast. Raises ShapeError, OptionError.
    """
    n = x.shape[-1]
    n_fft = n if n_fft is None else n_fft
    out = torch.zeros_like(x) if h_static is None else fft_conv(x, h_static, is_causal=False, n_fft=n_fft)
    if h_adaptive is None:
        return out
    if x.dim() != 3 or h_adaptive.shape != (*x.shape[:2], n_fft // 2 + 1):
        raise ShapeError(
            f"x is {tuple(x.shape)} and the spectrum {tuple(h_adaptive.shape)}; they must be (B, D, N) and "
            f"(B, D, n_fft // 2 + 1), with n_fft = {n_fft}"
        )
    if n_fft < n:
        raise OptionError(f"a convolution of {n} tokens needs a transform of at least {n} steps, not {n_fft}")
    spectrum = torch.fft.rfft(x.to(accumulator(x.dtype)), n=n_fft) * h_adaptive
    return (out + torch.fft.irfft(spectrum, n=n_fft)[..., :n]).to(x.dtype)


class _Conv3(nn.Module):
    """A centred depthwise convolution of three steps over the last axis, on a ring or between zeros."""

    def __init__(self, channels: int, *, norm: bool):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, groups=channels)
        self.norm = nn.LayerNorm(channels) if norm else None

    def forward(self, x: Tensor, circular: bool) -> Tensor:
        if circular:
            x = torch.cat((x[..., -1:], x, x[..., :1]), -1)
        else:
            x = F.pad(x, (1, 1))
        x = self.conv(x)
        return x if self.norm is None else self.norm(x.transpose(1, 2)).transpose(1, 2)


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.masked_fill(~keep, 0.0)
