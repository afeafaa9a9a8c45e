from __future__ import annotations

import pytest
import torch

from regard import Causal, KeyValid, OptionError, ShapeError, Sinks, SlidingWindow, softmax_attention
from tests.oracles import attention, coin, normal


def qkv(n=9, m=9, heads=4, groups=2):
    return normal((2, heads, n, 8), (2, groups, m, 8), (2, groups, m, 6))


@pytest.mark.parametrize("n, m", [(9, 9), (1, 9), (9, 1), (5, 8)])
def test_it_is_the_loop(n, m):
    q, k, v = qkv(n, m)
    torch.testing.assert_close(softmax_attention(q, k, v), attention(q, k, v)[0])
    torch.testing.assert_close(softmax_attention(q, k, v, scale=0.2), attention(q, k, v, scale=0.2)[0])


def test_a_row_with_one_key_returns_its_value():
    q, k, v = qkv()
    torch.testing.assert_close(softmax_attention(q, k, v, is_causal=True)[:, :, 0], v.repeat_interleave(2, 1)[:, :, 0])


def test_weights_sum_to_one_so_constant_values_stay():
    q, k, v = qkv()
    out = softmax_attention(q, k, torch.full_like(v, 3.0), pattern=Causal() & SlidingWindow(2) | Sinks(1))
    torch.testing.assert_close(out, torch.full_like(out, 3.0))


def test_decoding_token_by_token_equals_the_parallel_form():
    q, k, v = qkv()
    pattern = Causal() & SlidingWindow(4) | Sinks(2)
    whole = softmax_attention(q, k, v, pattern=pattern)
    for t in range(9):
        row = softmax_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], pattern=pattern, q_offset=t)
        torch.testing.assert_close(row, whole[:, :, t : t + 1])


def test_what_is_padding_does_not_matter():
    q, k, v = qkv()
    valid = coin(2, 9)
    pattern = KeyValid().bind(key_valid=valid)
    out = softmax_attention(q, k, v, pattern=pattern)
    hidden = ~valid[:, None, :, None]
    torch.testing.assert_close(
        softmax_attention(q, k.masked_fill(hidden, 1e3), v.masked_fill(hidden, 1e3), pattern=pattern), out
    )


def test_wrong_shapes_name_the_axis():
    q, k, v = qkv()
    with pytest.raises(ShapeError, match=r"axis m \(keys\) of v is 8, but an earlier tensor has 9"):
        softmax_attention(q, k, v[:, :, :8])
    with pytest.raises(ShapeError, match=r"axis d \(key width\) of k is 7"):
        softmax_attention(q, k[..., :7], v)
    with pytest.raises(ShapeError, match="4 query heads cannot share 3 key heads"):
        softmax_attention(q, *normal((2, 3, 9, 8), (2, 3, 9, 6)))
    with pytest.raises(ShapeError, match="a mask is bool"):
        softmax_attention(q, k, v, mask=torch.zeros(9, 9))
    with pytest.raises(OptionError, match="NaN"):
        softmax_attention(q, k, v, bias=torch.full((9, 9), float("nan")))
