from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import KeyValid, OptionError, ShapeError, Unsupported, inline_attention
from tests.oracles import normal


def weights(q, k, scale, phi=lambda x: x):
    """The dense W of one head."""
    a = scale / len(k) * phi(q) @ phi(k).T
    return a - a.mean(-1, keepdim=True) + 1 / len(k)


def qkv(n=7, m=11):
    return normal((2, 4, n, 5), (2, 2, m, 5), (2, 2, m, 6))


@pytest.mark.parametrize(
    "phi, function", [("identity", lambda x: x), ("relu", F.relu), ("elu1", lambda x: F.elu(x) + 1)]
)
def test_it_is_the_dense_form_whose_rows_sum_to_one(phi, function):
    q, k, v = qkv()
    out = inline_attention(q, k, v, phi=phi, scale=0.7)
    for b in range(2):
        for h in range(4):
            w = weights(q[b, h], k[b, h // 2], 0.7, function)
            torch.testing.assert_close(w.sum(-1), torch.ones(7, dtype=torch.float64))
            torch.testing.assert_close(out[b, h], w @ v[b, h // 2])


def test_a_longer_query_weighs_differently_where_division_does_not():
    q, k, _ = qkv()
    q, k = q.abs(), k.abs()
    eye = torch.eye(11, dtype=torch.float64).expand(2, 2, 11, 11)
    assert (inline_attention(2 * q, k, eye) - inline_attention(q, k, eye)).abs().amax(-1).min() > 1e-3

    def divided(q):
        rows = torch.relu(q) @ torch.relu(k).repeat_interleave(2, 1).transpose(-1, -2)
        return rows / rows.sum(-1, keepdim=True)

    torch.testing.assert_close(divided(2 * q), divided(q))


def test_one_vector_added_to_all_keys_changes_nothing():
    q, k, v = qkv()
    torch.testing.assert_close(inline_attention(q, k + torch.randn(5).double(), v), inline_attention(q, k, v))


def test_hidden_keys_are_as_good_as_absent():
    q, k, v = qkv()
    valid = (torch.arange(11) < 8).expand(2, 11)
    out = inline_attention(q, k, v, pattern=KeyValid().bind(key_valid=valid))
    torch.testing.assert_close(out, inline_attention(q, k[:, :, :8], v[:, :, :8]))


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2)))
    assert torch.autograd.gradcheck(lambda q, k, v: inline_attention(q, k, v), (q, k, v))


def test_what_it_cannot_do_is_refused():
    q, k, v = qkv(11, 11)
    with pytest.raises(Unsupported, match="causal"):
        inline_attention(q, k, v, is_causal=True)
    with pytest.raises(OptionError, match="phi is 'softmax'"):
        inline_attention(q, k, v, phi="softmax")
    layer = regard.mixer("inline", 16, 4)
    with pytest.raises(ShapeError, match="must be"):
        layer(torch.randn(2, 9, 16))


def test_the_layer_adds_a_convolution_with_kernels_of_its_own_image():
    layer = regard.mixer("inline", 8, 2).double()
    (x,) = normal((3, 4, 5, 8))
    out = layer(x)
    torch.testing.assert_close(layer(x[1:2]), out[1:2])
    q, k, v = layer.qkv(x[1].flatten(0, 1)).view(20, 3, 2, 4).permute(1, 2, 0, 3)
    mixed = torch.stack([weights(q[h], k[h], 0.5) @ v[h] for h in range(2)], 1).reshape(4, 5, 8)
    kernels = layer.residual(x[1].mean((0, 1))[None, :, None]).view(8, 3, 3)
    padded = F.pad(v.transpose(-1, -2).reshape(8, 4, 5), (1, 1, 1, 1))
    for y in range(4):
        for z in range(5):
            mixed[y, z] += (padded[:, y : y + 3, z : z + 3] * kernels).sum((1, 2))
    torch.testing.assert_close(out[1], layer.proj(mixed))
