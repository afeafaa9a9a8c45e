from __future__ import annotations

import math

import pytest
import torch

from regard import Causal, OptionError, Sigmoid, sigmoid_attention, softmax_attention
from regard.engines.dense import dense
from tests.oracles import attention, coin, normal


def qkv(n=9, m=9):
    return normal((2, 4, n, 8), (2, 2, m, 8), (2, 2, m, 6))


@pytest.mark.parametrize(
    "sigmoid_bias, length, b", [(-1.5, None, -1.5), (0.0, None, 0.0), ("-log_n", 20, -math.log(20))]
)
@pytest.mark.parametrize("n, m", [(9, 9), (4, 7)])
def test_it_is_the_loop_with_every_key_on_its_own(sigmoid_bias, length, b, n, m):
    q, k, v = qkv(n, m)
    mask = coin(2, 1, n, m)
    out = sigmoid_attention(q, k, v, sigmoid_bias=sigmoid_bias, length=length, mask=mask)
    want, _ = attention(q, k, v, allowed=mask, weigh=lambda s: torch.sigmoid(s + b))
    torch.testing.assert_close(out, want)


def test_a_score_bias_is_added_before_the_sigmoid():
    q, k, v = qkv()
    (bias,) = normal((1, 4, 9, 9), seed=3)
    want, _ = attention(q, k, v, bias=bias, scale=0.3, weigh=lambda s: torch.sigmoid(s - 1))
    torch.testing.assert_close(sigmoid_attention(q, k, v, sigmoid_bias=-1.0, bias=bias, scale=0.3), want)


@pytest.mark.parametrize("n", [1, 8, 64])
def test_rows_of_zero_scores_sum_to_m_times_the_sigmoid_of_the_bias(n):
    q, k, v = torch.zeros(1, 1, n, 4).double(), torch.zeros(1, 1, n, 4).double(), torch.ones(1, 1, n, 1).double()
    full = sigmoid_attention(q, k, v, length=n)
    torch.testing.assert_close(full, torch.full_like(full, n / (n + 1)))
    rows = sigmoid_attention(q, k, v, length=n, is_causal=True).flatten()
    torch.testing.assert_close(rows, torch.arange(1, n + 1).double() / (n + 1))


def test_it_agrees_with_the_exponential_to_first_order():
    n = 256
    q, k, v = normal((1, 2, 16, 8), (1, 2, n, 8), (1, 2, n, 1))
    weights = dense(q, k, v, normaliser=Sigmoid(-math.log(n)), return_weights=True).weights
    scores = q @ k.transpose(-1, -2) / 8**0.5
    assert ((n * (-scores).exp() * weights - 1).abs() <= scores.exp() / n * (1 + 1e-9)).all()


def test_removing_a_key_takes_away_its_own_part_and_nothing_else():
    q, k, v = qkv()
    without = torch.arange(9) != 4

    def both(normaliser):
        return [dense(q, k, v, mask=m, normaliser=normaliser, return_weights=True) for m in (None, without)]

    whole, rest = both(Sigmoid(-2.0))
    assert torch.equal(whole.weights[..., without], rest.weights[..., without])
    part = whole.weights[..., 4:5] * v.repeat_interleave(2, 1)[:, :, 4:5]
    torch.testing.assert_close(whole.out - rest.out, part)
    whole, rest = both(None)
    assert not torch.allclose(whole.weights[..., without], rest.weights[..., without]), "softmax must fail this test"


def test_parts_of_the_keys_add_up():
    q, k, v = qkv()
    parts = [sigmoid_attention(q, k[:, :, s], v[:, :, s], length=9) for s in (slice(0, 2), slice(2, 3), slice(3, 9))]
    torch.testing.assert_close(sum(parts), sigmoid_attention(q, k, v, length=9))


def test_decoding_equals_the_parallel_form_because_the_length_stays():
    q, k, v = qkv()
    whole = sigmoid_attention(q, k, v, length=9, is_causal=True)
    for t in range(9):
        now = sigmoid_attention(
            q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], length=9, pattern=Causal(), q_offset=t
        )
        torch.testing.assert_close(now, whole[:, :, t : t + 1])


def test_gradients_are_those_of_the_closed_form():
    q, k, v = (x.requires_grad_() for x in normal((1, 1, 5, 4), (1, 1, 6, 4), (1, 1, 6, 3)))
    (seeds,) = normal((1, 1, 5, 3), seed=4)
    got = torch.autograd.grad((sigmoid_attention(q, k, v, length=6) * seeds).sum(), (q, k, v))
    p = torch.sigmoid(q @ k.transpose(-1, -2) / 2 - math.log(6))
    ds = (seeds @ v.transpose(-1, -2)) * p * (1 - p) / 2
    for g, w in zip(got, (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ seeds), strict=True):
        torch.testing.assert_close(g, w)
    assert torch.autograd.gradcheck(lambda q, k, v: sigmoid_attention(q, k, v, length=6), (q, k, v))


def test_a_fully_masked_row_is_zero():
    q, k, v = qkv()
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[3] = False
    assert (sigmoid_attention(q, k, v, length=9, mask=mask)[:, :, 3] == 0).all()


@pytest.mark.parametrize("last_causal_row", [False, True])
def test_without_the_bias_the_output_is_half_the_length_too_large(last_causal_row):
    n = 256
    q, k, v = normal((4, 8, n, 16), (4, 8, n, 16), (4, 8, n, 16), seed=1)
    q = 0.1 * q
    rows = slice(n - 1, n) if last_causal_row else slice(None)

    def rms(out):
        return out[:, :, rows].square().mean().sqrt().item()

    soft = rms(softmax_attention(q, k, v, is_causal=last_causal_row))
    assert rms(sigmoid_attention(q, k, v, sigmoid_bias=0.0, is_causal=last_causal_row)) / soft > 50
    assert abs(rms(sigmoid_attention(q, k, v, length=n, is_causal=last_causal_row)) / soft - 1) < 0.05


def test_early_causal_rows_stay_small_as_the_method_has_it():
    n = 64
    q, k, v = torch.zeros(1, 1, n, 4), torch.zeros(1, 1, n, 4), torch.ones(1, 1, n, 1)
    rows = sigmoid_attention(q, k, v, length=n, is_causal=True).flatten()
    assert rows[0].item() == pytest.approx(1 / (n + 1))


def test_a_length_must_be_given_and_be_one_token_at_least():
    with pytest.raises(OptionError, match=r"needs the training length.*decoding differ from training"):
        sigmoid_attention(*qkv())
    with pytest.raises(OptionError, match="at least 1 token, not 0"):
        sigmoid_attention(*qkv(), length=0)
    with pytest.raises(OptionError, match="NaN"):
        sigmoid_attention(*qkv(), length=9, bias=torch.full((9, 9), float("nan")))


def test_a_bias_of_zeros_and_minus_infinities_is_a_mask():
    q, k, v = qkv()
    mask = coin(2, 1, 9, 9)
    hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(
        sigmoid_attention(q, k, v, length=9, bias=hidden), sigmoid_attention(q, k, v, length=9, mask=mask)
    )
