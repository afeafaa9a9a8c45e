from __future__ import annotations

import pytest
import torch

from regard import Causal, KeyValid, SlidingWindow, Unsupported, softmax_attention
from regard.engines.scan import linear_scan
from regard.ops.based import taylor_linear_attention, taylor_linear_attention_step
from tests.oracles import attention, coin, normal


def qkv(n=12, m=12, d=4):
    return normal((2, 4, n, d), (2, 2, m, d), (2, 2, m, 6))


def taylor_row(s):
    weights = 1 + s + s**2 / 2
    return weights / weights.sum()


@pytest.mark.parametrize(
    "n, m, causal", [(12, 12, True), (12, 12, False), (5, 9, False), (1, 1, True), (140, 140, True)]
)
def test_it_is_the_quadratic_form_over_its_row_sum(n, m, causal):
    q, k, v = qkv(n, m)
    want, _ = attention(q, k, v, allowed=Causal().dense(n, m) if causal else None, weigh=taylor_row)
    torch.testing.assert_close(taylor_linear_attention(q, k, v, is_causal=causal), want)


def test_full_features_give_the_same_as_packed_ones():
    q, k, v = qkv()

    def full(x):
        d = x.shape[-1]
        outer = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2 * d) ** 0.5
        return torch.cat((torch.ones_like(x[..., :1]), x / d**0.25, outer), -1)

    want, state = linear_scan(full(q), full(k), v, divide_by="sum", eps=1e-12)
    torch.testing.assert_close(taylor_linear_attention(q, k, v, is_causal=True), want)
    _, packed = taylor_linear_attention_step(q, k, v)
    assert packed.s.shape[2] == 1 + 4 + 10 < state.s.shape[2]


def test_weights_are_positive_and_rows_sum_to_one():
    q, k, _ = (10 * x for x in qkv())
    eye = torch.eye(12, dtype=torch.float64).expand(2, 2, 12, 12)
    weights = taylor_linear_attention(q, k, eye, is_causal=True)
    assert (weights[Causal().dense(12, 12).expand(2, 4, 12, 12)] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12).double())


def test_small_scores_are_attended_as_by_softmax():
    q, k, v = qkv(64, 64, 8)
    a = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    q = q * 0.1 / a.abs().max()
    difference = taylor_linear_attention(q, k, v, is_causal=True) - softmax_attention(q, k, v, is_causal=True)
    assert difference.abs().max() < 5e-4 * v.abs().max()


def test_large_scores_are_not():
    q, k, v = (5 * x for x in qkv())
    gap = taylor_linear_attention(q, k, v, is_causal=True) - softmax_attention(q, k, v, is_causal=True)
    assert gap.abs().max() > 0.1


def test_prefill_and_steps_equal_the_parallel_form():
    q, k, v = qkv(150)[0], *qkv(150, 150)[1:]
    want = taylor_linear_attention(q, k, v, is_causal=True)
    out, state = taylor_linear_attention_step(q[:, :, :140], k[:, :, :140], v[:, :, :140])
    torch.testing.assert_close(out, want[:, :, :140])
    for t in range(140, 150):
        now = slice(t, t + 1)
        out, state = taylor_linear_attention_step(q[:, :, now], k[:, :, now], v[:, :, now], state=state)
        torch.testing.assert_close(out, want[:, :, now])


def test_the_state_of_half_precision_stays_float32():
    q, k, v = (x.bfloat16() for x in qkv())
    out, state = taylor_linear_attention_step(q, k, v)
    assert out.dtype == torch.bfloat16
    assert state.s.dtype == state.z.dtype == torch.float32


def test_padded_tokens_leak_nothing_although_every_token_has_a_constant_feature():
    q, k, v = qkv()
    valid = coin(2, 12)
    valid[:, 0] = False
    pattern = Causal() & KeyValid().bind(key_valid=valid)
    want, _ = attention(q, k, v, allowed=pattern.dense(12, 12), weigh=taylor_row)
    out = taylor_linear_attention(q, k, v, pattern=pattern)
    torch.testing.assert_close(out, want)
    assert (out[:, :, 0] == 0).all()


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 4, 3), (1, 1, 4, 3), (1, 1, 4, 2)))
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, v, c=causal: taylor_linear_attention(q, k, v, is_causal=c), (q, k, v)
        )


def test_a_window_inside_the_taylor_state_is_refused():
    with pytest.raises(Unsupported, match="cannot follow the pattern SlidingWindow"):
        taylor_linear_attention(*qkv(), pattern=Causal() & SlidingWindow(3))
