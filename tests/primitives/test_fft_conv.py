from __future__ import annotations

import pytest
import torch

from regard import OptionError, ShapeError
from regard.primitives.fft_conv import fast_length, fft_conv
from tests.oracles import normal


def causal(x, h):
    """The double sum."""
    out = torch.zeros_like(x)
    h = h.expand(len(x), *h.shape[-2:])
    for i in range(x.shape[-1]):
        for j in range(i + 1):
            if i - j < h.shape[-1]:
                out[..., i] += h[..., i - j] * x[..., j]
    return out


def circular(x, h, period):
    out = torch.zeros_like(x)
    h = h.expand(len(x), *h.shape[-2:])
    for i in range(x.shape[-1]):
        for j in range(x.shape[-1]):
            if (i - j) % period < h.shape[-1]:
                out[..., i] += h[..., (i - j) % period] * x[..., j]
    return out


@pytest.mark.parametrize("n, taps", [(1, 1), (7, 3), (8, 8), (9, 20), (13, 13)])
@pytest.mark.parametrize("shared", [True, False])
def test_it_is_the_sum(n, taps, shared):
    x, h = normal((2, 3, n), (3, taps) if shared else (2, 3, taps))
    torch.testing.assert_close(fft_conv(x, h), causal(x, h))
    torch.testing.assert_close(fft_conv(x, h, n_fft=n + min(taps, n) + 4), causal(x, h))
    if taps <= n:
        torch.testing.assert_close(fft_conv(x, h, is_causal=False), circular(x, h, n))
    torch.testing.assert_close(fft_conv(x, h, is_causal=False, n_fft=n + taps), circular(x, h, n + taps))


def test_nothing_that_comes_later_counts():
    x, h = normal((1, 2, 9), (2, 9))
    seen = torch.autograd.functional.jacobian(lambda x: fft_conv(x, h)[0, 0], x)[:, 0, 0]
    assert seen.triu(1).abs().max() < 1e-14
    assert (seen.tril().diagonal() != 0).all()


def test_rolling_the_input_of_a_circular_convolution_rolls_the_output():
    x, h = normal((2, 3, 11), (3, 11))
    for shift in (1, 4):
        torch.testing.assert_close(
            fft_conv(x.roll(shift, -1), h, is_causal=False), fft_conv(x, h, is_causal=False).roll(shift, -1)
        )


def test_it_computes_in_float32_also_under_autocast():
    x, h = normal((1, 2, 33), (2, 33), dtype=torch.float32)
    want = fft_conv(x, h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fft_conv(x, h), want)
    low = fft_conv(x.bfloat16(), h.bfloat16())
    assert low.dtype is torch.bfloat16
    assert torch.equal(low, fft_conv(x.bfloat16().float(), h.bfloat16().float()).bfloat16())
    assert fft_conv(x.double(), h.double()).dtype is torch.float64


def test_gradients_are_those_of_finite_differences():
    x, h = (t.requires_grad_() for t in normal((2, 2, 5), (2, 4)))
    for is_causal in (True, False):
        assert torch.autograd.gradcheck(lambda x, h, c=is_causal: fft_conv(x, h, is_causal=c), (x, h))


def test_fast_lengths_have_small_factors():
    assert [fast_length(n) for n in (0, 1, 7, 11, 13, 17, 97, 1025, 2047)] == [1, 1, 8, 12, 15, 18, 100, 1080, 2048]


def test_nothing_to_convolve():
    x, h = torch.zeros(2, 3, 0), torch.ones(3, 0)
    assert fft_conv(x, h).shape == (2, 3, 0)


def test_what_does_not_fit_is_refused():
    x, h = normal((2, 3, 8), (3, 8))
    for bad in (h[:2], h[None], h[0]):
        with pytest.raises(ShapeError, match=r"\(D, K\) or \(B, D, K\)"):
            fft_conv(x, bad)
    with pytest.raises(OptionError, match="at least 15 steps, not 14"):
        fft_conv(x, h, n_fft=14)
    with pytest.raises(OptionError, match="at least 12 steps, not 8"):
        fft_conv(x, torch.ones(3, 12, dtype=torch.float64), is_causal=False)
