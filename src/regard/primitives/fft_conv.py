"""Long convolutions by the fast Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError


def fft_conv(x: Tensor, h: Tensor, *, is_causal: bool = True, n_fft: int | None = None) -> Tensor:
    """Convolve over the last axis: x (B, D, N), h (D, K) or (B, D, K) -> (B, D, N), in x's dtype.

    is_causal: out_i = sum over j <= i of h_(i-j) x_j; taps beyond N do not count. Else circular: lags are taken modulo
    n_fft, so that h_(n_fft - 1) is the tap one step ahead. n_fft: length of the transform; a fast one without
    wrapping if causal, N if circular. Computed in float32 (float64 stays), also under autocast. Raises ShapeError,
    OptionError for a transform that is too short.
    """
    if x.dim() != 3 or h.dim() not in (2, 3) or h.shape[-2] != x.shape[1] or (h.dim() == 3 and len(h) != len(x)):
        raise ShapeError(f"x is {tuple(x.shape)}, h {tuple(h.shape)}; they must be (B, D, N) and (D, K) or (B, D, K)")
    n = x.shape[-1]
    if is_causal:
        h = h[..., :n]
    least = n + h.shape[-1] - 1 if is_causal else max(n, h.shape[-1])
    if n_fft is None:
        n_fft = fast_length(least) if is_causal else n
    if n_fft < least:
        raise OptionError(
            f"a {'causal' if is_causal else 'circular'} convolution of {n} steps with {h.shape[-1]} taps needs a "
            f"transform of at least {least} steps, not {n_fft}"
        )
    if n == 0:
        return x
    kind = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft(x.to(kind), n=n_fft) * torch.fft.rfft(h.to(kind), n=n_fft)
    # n says whether the length was odd
    return torch.fft.irfft(spectrum, n=n_fft)[..., :n].to(x.dtype)


def fast_length(n: int) -> int:
    """The smallest length from n on whose prime factors are 2, 3 and 5."""
    length = max(n, 1)
    while not _is_smooth(length):
        length += 1
    return length


def _is_smooth(n: int) -> bool:
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    return n == 1
