from __future__ import annotations

import math

import pytest
import torch

from regard import Causal, Documents, KeyValid, OptionError, ShapeError, SlidingWindow, Unsupported
from regard.ops.lightning import lightning_attention, lightning_attention_step, lightning_decay
from tests.oracles import attention, coin, normal

DECAY = (0.5, 0.7, 0.9, 1.0)


def qkv(n=23, m=None):
    m = n if m is None else m
    return normal((2, 4, n, 5), (2, 2, m, 5), (2, 2, m, 6))


def masked_product(q, k, v, decay, scale=1.0, allowed=None):
    n = q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    powers = torch.tensor(decay, dtype=torch.float64)[:, None, None] ** (i - j).clamp(min=0)
    seen = (j <= i) if allowed is None else allowed & (j <= i)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (scale * q @ k.transpose(-1, -2) * powers * seen) @ v


@pytest.mark.parametrize("n", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("given", ["numbers", "tensor"])
def test_it_is_the_masked_product_with_powers_of_the_decay(n, given):
    q, k, v = qkv(n)
    decay = DECAY if given == "numbers" else torch.tensor(DECAY, dtype=torch.float64)
    torch.testing.assert_close(
        lightning_attention(q, k, v, decay=decay, is_causal=True), masked_product(q, k, v, DECAY)
    )
    scaled = lightning_attention(q, k, v, decay=decay, is_causal=True, scale=0.2)
    torch.testing.assert_close(scaled, masked_product(q, k, v, DECAY, scale=0.2))


def test_a_decay_of_one_is_linear_attention_without_a_normaliser():
    q, k, v = qkv()
    want, _ = attention(q, k, v, allowed=Causal().dense(23, 23), scale=1.0, weigh=lambda s: s)
    torch.testing.assert_close(lightning_attention(q, k, v, decay=(1.0,) * 4, is_causal=True), want)


def test_a_decay_near_zero_leaves_the_own_token():
    q, k, v = qkv()
    out = lightning_attention(q, k, v, decay=(1e-300,) * 4, is_causal=True)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)


def test_documents_and_padding():
    q, k, v = qkv(12)
    doc = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
    packed = Causal() & Documents().bind(doc=doc)
    want = masked_product(q, k, v, DECAY, allowed=packed.dense(12, 12))
    torch.testing.assert_close(lightning_attention(q, k, v, decay=DECAY, pattern=packed), want)
    valid = coin(1, 12).expand(2, 12)
    out = lightning_attention(q, k, v, decay=DECAY, pattern=Causal() & KeyValid().bind(key_valid=valid))
    real = valid[0]
    # padding neither adds nor decays: the real tokens stand next to each other
    want = masked_product(q[:, :, real], k[:, :, real], v[:, :, real], DECAY)
    torch.testing.assert_close(out[:, :, real], want)


def test_decoding_after_three_chunks_equals_the_parallel_form():
    q, k, v = qkv(64 * 3 + 20)
    want = lightning_attention(q, k, v, decay=DECAY, is_causal=True)
    out, state = lightning_attention_step(q[:, :, :192], k[:, :, :192], v[:, :, :192], decay=DECAY)
    torch.testing.assert_close(out, want[:, :, :192])
    for t in range(192, 212):
        now = slice(t, t + 1)
        out, state = lightning_attention_step(q[:, :, now], k[:, :, now], v[:, :, now], decay=DECAY, state=state)
        torch.testing.assert_close(out, want[:, :, now])
    assert state.s.shape == (2, 4, 5, 6)


def test_gradients_reach_a_learned_decay():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 2)))
    decay = torch.tensor([0.5, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, d: lightning_attention(q, k, v, decay=d, is_causal=True), (q, k, v, decay)
    )


def test_float32_noise_is_small_over_long_sequences():
    q, k, v = normal((1, 4, 4096, 16), (1, 4, 4096, 16), (1, 4, 4096, 16))
    want = lightning_attention(q, k, v, decay=DECAY, is_causal=True)
    out = lightning_attention(q.float(), k.float(), v.float(), decay=DECAY, is_causal=True)
    assert (out - want).norm() / want.norm() < 2e-6


def test_the_slopes_of_eight_heads_are_a_half_to_a_256th():
    rates = -lightning_decay(8, 0, 3).log() / (1 + 1e-5)
    torch.testing.assert_close(rates, 2.0 ** -torch.arange(1, 9).double())


def test_deeper_layers_forget_less_and_the_last_almost_nothing():
    decay = torch.stack([lightning_decay(8, layer, 6) for layer in range(6)])
    assert (decay[1:] > decay[:-1]).all()
    torch.testing.assert_close(-decay[5].log(), 1e-5 * 2.0 ** -torch.arange(1, 9).double())
    torch.testing.assert_close(-decay[2].log(), (1 - 2 / 5 + 1e-5) * 2.0 ** -torch.arange(1, 9).double())


def test_a_single_layer_decays_in_full_instead_of_dividing_by_zero():
    torch.testing.assert_close(-lightning_decay(8, 0, 1).log(), 2.0 ** -torch.arange(1, 9).double())


def test_the_decay_of_the_paper():
    got = lightning_decay(4, 1, 4, decay="paper")
    torch.testing.assert_close(got, torch.tensor([math.exp(-2 * h * 0.75) for h in range(1, 5)], dtype=torch.float64))


@pytest.mark.parametrize(
    "decay", [(0.5, 0.5, 0.5, 0.0), (0.5, 0.5, 0.5, 1.1), (-0.5, 0.5, 0.5, 0.5), (float("nan"), 0.5, 0.5, 0.5)]
)
@pytest.mark.parametrize("given", [tuple, torch.tensor])
def test_a_decay_outside_its_range_is_refused(decay, given):
    with pytest.raises(OptionError, match=r"decay must be in \(0, 1\]"):
        lightning_attention(*qkv(), decay=given(decay), is_causal=True)


def test_other_bad_input_is_refused():
    for decay in ((0.5, 0.5), torch.tensor([0.5, 0.5])):
        with pytest.raises(ShapeError, match="for each of 4 query heads"):
            lightning_attention(*qkv(), decay=decay, is_causal=True)
    with pytest.raises(Unsupported, match="causal only: pass is_causal=True"):
        lightning_attention(*qkv(), decay=DECAY)
    with pytest.raises(Unsupported, match="cannot follow the pattern SlidingWindow"):
        lightning_attention(*qkv(), decay=DECAY, pattern=Causal() & SlidingWindow(3))
    with pytest.raises(Unsupported, match="23 and 20"):
        lightning_attention(*qkv(23, 20), decay=DECAY, is_causal=True)
    with pytest.raises(OptionError, match="not one of 3 layers"):
        lightning_decay(8, 3, 3)
    with pytest.raises(OptionError, match="'alibi' or 'paper'"):
        lightning_decay(8, 0, 3, decay="cosine")
