from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import Causal, Documents, KeyValid, SlidingWindow, Unsupported, linear_attention
from regard.ops.linear import linear_attention_step
from tests.oracles import attention, coin, normal


def qkv(n=12, m=12):
    return normal((2, 4, n, 5), (2, 2, m, 5), (2, 2, m, 6))


def expected(q, k, v, allowed=None, eps=1e-6):
    phi = [F.elu(x) + 1 for x in (q, k)]
    return attention(*phi, v, allowed=allowed, scale=1.0, weigh=lambda s: s / (s.sum() + eps))[0]


@pytest.mark.parametrize("n, m, causal", [(12, 12, True), (12, 12, False), (5, 9, False), (1, 1, True), (70, 70, True)])
def test_it_is_attention_with_the_kernel_of_the_feature_map(n, m, causal):
    q, k, v = qkv(n, m)
    allowed = Causal().dense(n, m) if causal else None
    torch.testing.assert_close(linear_attention(q, k, v, is_causal=causal), expected(q, k, v, allowed))


def test_patterns_that_a_state_can_follow():
    q, k, v = qkv()
    valid, doc = coin(2, 12), torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
    padded, packed = KeyValid().bind(key_valid=valid), Documents().bind(doc=doc)
    for pattern in (padded, Causal() & padded, Causal() & packed, Causal() & packed & padded):
        torch.testing.assert_close(linear_attention(q, k, v, pattern=pattern), expected(q, k, v, pattern.dense(12, 12)))
    with pytest.raises(Unsupported, match="softmax follows any pattern"):
        linear_attention(q, k, v, pattern=Causal() & SlidingWindow(3))


def test_masked_tokens_leak_nothing_although_their_features_are_not_zero():
    q, k, v = qkv()
    valid = coin(2, 12)
    pattern = Causal() & KeyValid().bind(key_valid=valid)
    hidden = ~valid[:, None, :, None]
    other = linear_attention(q, k.masked_fill(hidden, 9.0), v.masked_fill(hidden, 9.0), pattern=pattern)
    assert torch.equal(other, linear_attention(q, k, v, pattern=pattern))
    assert (F.elu(torch.zeros(1)) + 1 == 1).all(), (
        "zeroed inputs would still count, which is why keys are hidden after the map"
    )


def test_steps_continue_the_sequence():
    q, k, v = qkv()
    want = linear_attention(q, k, v, is_causal=True)
    out, state = linear_attention_step(q[:, :, :7], k[:, :, :7], v[:, :, :7])
    outs = [out]
    for t in range(7, 12):
        out, state = linear_attention_step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    assert state.s.shape == (2, 2, 5, 6)


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 2)))
    for causal in (True, False):
        assert torch.autograd.gradcheck(lambda q, k, v, c=causal: linear_attention(q, k, v, is_causal=c), (q, k, v))


def test_function_transforms_see_through():
    q, k, v = qkv()
    batched = torch.func.vmap(lambda q, k, v: linear_attention(q, k, v, is_causal=True))(
        q[:, None], k[:, None], v[:, None]
    )
    torch.testing.assert_close(batched[:, 0], linear_attention(q, k, v, is_causal=True))

    def energy(q):
        return linear_attention(q, k, v, is_causal=True).square().sum()

    torch.testing.assert_close(torch.func.jacfwd(energy)(q), torch.func.grad(energy)(q))


def test_causal_with_other_keys_is_refused():
    with pytest.raises(Unsupported, match="as many queries as keys"):
        linear_attention(*qkv(5, 9), is_causal=True)
