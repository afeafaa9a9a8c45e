from __future__ import annotations

import pytest
import torch

from regard import (
    Causal,
    KeyValid,
    OptionError,
    ShapeError,
    Unsupported,
    flow_attention,
    inline_attention,
    lightning_attention,
    linear_attention,
    sigmoid_attention,
    softmax_attention,
)
from regard.primitives.mixing_matrix import mixing_matrix
from tests.oracles import attention, normal


def qkv(n=7, m=9, dtype=torch.float64):
    return normal((2, 4, n, 5), (2, 2, m, 5), (2, 2, m, 6), dtype=dtype)


def softmax(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


@pytest.mark.parametrize("v_width", [1, 4, 9, 20])
def test_its_product_with_v_is_the_output_at_any_width(v_width):
    q, k, v = qkv()
    matrix = mixing_matrix(softmax_attention, q, k, v_width, scale=0.7)
    assert matrix.shape == (2, 4, 7, 9)
    torch.testing.assert_close(matrix @ v.repeat_interleave(2, 1), attention(q, k, v, scale=0.7)[0])
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "op, options",
    [
        (linear_attention, {}),
        (flow_attention, {}),
        (lightning_attention, {"decay": (0.5, 0.7, 0.9, 1.0)}),
        (sigmoid_attention, {"length": 8}),
    ],
)
def test_of_causal_ops_it_is_lower_triangular(op, options):
    q, k, v = qkv(8, 8)
    matrix = mixing_matrix(op, q, k, 6, is_causal=True, **options)
    assert (matrix.triu(1) == 0).all()
    assert (matrix.diagonal(dim1=-2, dim2=-1) != 0).all()
    torch.testing.assert_close(matrix @ v.repeat_interleave(2, 1), op(q, k, v, is_causal=True, **options))


def test_options_reach_the_op():
    q, k, _ = qkv(9, 9)
    valid = torch.arange(9).expand(2, 9) < torch.tensor([[9], [5]])
    matrix = mixing_matrix(softmax_attention, q, k, 3, pattern=Causal() & KeyValid().bind(key_valid=valid))
    assert (matrix[1, :, :, 5:] == 0).all()
    with pytest.raises(TypeError, match="tempo"):
        mixing_matrix(softmax_attention, q, k, 3, tempo=2)


def test_in_single_precision_rounding_is_not_taken_for_nonlinearity():
    q, k, v = qkv(64, 64, torch.float32)
    matrix = mixing_matrix(inline_attention, q, k, 16)
    assert matrix.dtype is torch.float32
    torch.testing.assert_close(matrix @ v.repeat_interleave(2, 1), inline_attention(q, k, v))


def test_gradients_reach_queries_and_keys():
    q, k, _ = normal((1, 2, 3, 4), (1, 1, 5, 4), (1,))
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: mixing_matrix(linear_attention, q, k, 2), (q, k))


@pytest.mark.parametrize(
    "op",
    [
        lambda q, k, v: softmax(q, k, v.abs()),
        lambda q, k, v: softmax(q, k, v) + 1,
        lambda q, k, v: softmax(q, k + v[..., :1], v),
        lambda q, k, v: softmax(q, k, v).flip(-1),
        lambda q, k, v: softmax(q, k, v).flip(1),
        lambda q, k, v: softmax(q, k, v) / v.norm(),
        lambda q, k, v: softmax(q, k, torch.nn.functional.dropout(v, 0.5)),
        lambda q, k, v: softmax(q, k, v) * torch.nan,
    ],
    ids=["abs", "constant", "keys of values", "channels", "heads", "norm", "dropout", "nan"],
)
def test_an_op_that_is_not_linear_in_v_is_refused(op):
    q, k, _ = normal((2, 2, 4, 3), (2, 2, 5, 3), (1,))
    with pytest.raises(Unsupported, match="not linear in v"):
        mixing_matrix(op, q, k, 3)
    mixing_matrix(softmax, q, k, 3)


def test_the_callers_random_numbers_are_left_alone():
    q, k, _ = qkv()
    before = torch.get_rng_state()
    mixing_matrix(softmax_attention, q, k, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_no_keys_give_no_columns():
    q, k, _ = normal((1, 2, 3, 4), (1, 2, 0, 4), (1,))
    assert mixing_matrix(softmax_attention, q, k, 2).shape == (1, 2, 3, 0)


def test_what_does_not_fit_is_refused():
    q, k, _ = qkv()
    with pytest.raises(OptionError, match="at least 1, not 0"):
        mixing_matrix(softmax_attention, q, k, 0)
    with pytest.raises(ShapeError, match="must be"):
        mixing_matrix(softmax_attention, q[0], k, 3)
    with pytest.raises(ShapeError, match="an output of values of width 3"):
        mixing_matrix(lambda q, k, v: q, q, k, 3)
