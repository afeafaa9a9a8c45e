from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from regard import L1, Linear, OptionError, ReLUOverN, Sharpen, Sigmoid, Softmax
from tests.oracles import coin, normal, softmax_row

PHI = {"softplus": F.softplus, "exp": torch.exp, "relu": torch.relu}


def sharpen_row(weights, power=15.0, offset=1.0, free_rows=3):
    above = (len(weights) * weights - (0.0 if len(weights) <= free_rows else offset)).clamp(min=0) ** power
    return above / above.sum() if above.sum() > 0 else weights


# the weights of the visible keys of one row, from their scores
ROWS = {
    "softmax": (Softmax(), softmax_row),
    "sigmoid": (Sigmoid(-2.0), lambda s: torch.sigmoid(s - 2)),
    "l1 softplus": (L1("softplus", eps=0.0), lambda s: F.softplus(s) / F.softplus(s).sum()),
    "l1 exp": (L1("exp", eps=0.0), softmax_row),
    "l1 relu": (L1("relu", eps=0.0), lambda s: s.relu() / s.relu().sum() if (s > 0).any() else s * 0),
    "relu over n": (ReLUOverN(), lambda s: s.relu() / len(s)),
    "linear": (Linear(), lambda s: s),
    "sharpen": (Sharpen(Softmax(), eps=0.0), lambda s: sharpen_row(softmax_row(s))),
    "sharpen 3": (Sharpen(Softmax(), 3.0, 0.5, 1, eps=0.0), lambda s: sharpen_row(softmax_row(s), 3.0, 0.5, 1)),
}
ADDITIVE = ["sigmoid", "relu over n", "linear"]


def table(normaliser, scores, mask):
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    return normaliser(scores, mask, seen.sum(-1))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_each_row_alone(name, masked):
    normaliser, row = ROWS[name]
    (scores,) = normal((2, 3, 6, 8))
    mask = coin(2, 1, 6, 8) if masked else None
    weights = table(normaliser, scores, mask)
    for b in range(2):
        for h in range(3):
            for i in range(6):
                seen = torch.ones(8, dtype=torch.bool) if mask is None else mask[b, 0, i]
                if seen.any():
                    torch.testing.assert_close(weights[b, h, i, seen], row(scores[b, h, i, seen]))
                assert (weights[b, h, i, ~seen] == 0).all()


@pytest.mark.parametrize("name", ROWS)
def test_an_empty_row_weighs_nothing_and_has_no_gradient(name):
    normaliser, _ = ROWS[name]
    scores = normal((1, 2, 3, 5))[0].requires_grad_()
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 1, :] = False
    weights = table(normaliser, scores, mask)
    assert (weights[:, :, 1] == 0).all()
    (gradient,) = torch.autograd.grad((weights * normal((1, 2, 3, 5), seed=1)[0]).sum(), scores)
    assert gradient.isfinite().all()
    assert (gradient[:, :, 1] == 0).all()


@pytest.mark.parametrize("name", ROWS)
def test_gradients_are_those_of_finite_differences(name):
    normaliser, _ = ROWS[name]
    scores = normal((1, 1, 3, 6))[0].requires_grad_()
    mask = coin(1, 1, 3, 6, p=0.8)
    assert torch.autograd.gradcheck(lambda s: table(normaliser, s, mask), (scores,))


@pytest.mark.parametrize("name", ROWS)
def test_the_kind_says_whether_a_part_of_the_keys_can_be_weighed_alone(name):
    normaliser, _ = ROWS[name]
    (scores,) = normal((1, 1, 4, 8))
    counts = torch.full((1, 1, 4), 8)
    whole = normaliser(scores, None, counts)
    parts = torch.cat([normaliser(scores[..., part], None, counts) for part in (slice(0, 3), slice(3, 8))], -1)
    # to rounding: vector and scalar code may differ in the last bit
    assert torch.allclose(whole, parts, rtol=1e-14, atol=0) == (normaliser.kind == "additive") == (name in ADDITIVE)


def test_softmax_survives_large_scores():
    scores = torch.tensor([[1e4, 1e4 - 1, -1e4], [-1e4, -1e4, -1e4]])
    torch.testing.assert_close(Softmax()(scores, None, None), torch.softmax(scores, -1))


def test_sigmoid_of_a_full_row_of_zeros_sums_to_nearly_one():
    n = 64
    weights = Sigmoid(-math.log(n))(torch.zeros(1, 1, 1, n, dtype=torch.float64), None, None)
    torch.testing.assert_close(weights.sum(), torch.tensor(n / (n + 1), dtype=torch.float64))


def test_a_uniform_row_is_left_as_it_was_by_sharpening():
    weights = table(Sharpen(Softmax()), torch.zeros(1, 1, 1, 8), None)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 8))


def test_short_rows_are_sharpened_without_offset():
    scores = torch.tensor([[[[0.0, math.log(3.0), 0.0]]]], dtype=torch.float64)
    torch.testing.assert_close(
        table(Sharpen(Softmax(), 2.0, eps=0.0), scores, None).flatten(), torch.tensor([1.0, 9.0, 1.0]).double() / 11
    )
    strict = table(Sharpen(Softmax(), 2.0, free_rows=0, eps=0.0), scores, None).flatten()
    torch.testing.assert_close(strict, torch.tensor([0.0, 1.0, 0.0]).double())


def test_sharpening_a_single_key_with_the_offset_would_leave_the_inner_weight():
    scores = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    for free_rows in (3, 0):
        weight = table(Sharpen(Softmax(), free_rows=free_rows, eps=0.0), scores, None)
        torch.testing.assert_close(weight, torch.ones_like(weight))


def test_a_large_power_tends_to_the_largest_weight():
    weights = torch.full((1, 1, 1, 32), 1.0, dtype=torch.float64)
    weights[..., 7], weights[..., 20] = 8.0, 8.0 / 1.05
    sharp = table(Sharpen(Softmax(), 200.0), weights.log(), None)
    assert sharp[..., 7] > 0.999


def test_dividing_by_the_maximum_first_changes_nothing_and_stays_finite_in_half_precision():
    (scores,) = normal((1, 2, 16, 64))
    inner = Softmax()(scores * 3, None, None)
    above = (inner * 64 - 1).clamp(min=0) ** 15
    torch.testing.assert_close(
        table(Sharpen(Softmax(), eps=0.0), scores * 3, None), above / above.sum(-1, keepdim=True)
    )
    assert ((inner * 64 - 1).half().clamp(min=0) ** 15).isinf().any(), (
        "the naive form must overflow for this test to say anything"
    )
    half = table(Sharpen(Softmax()), (scores * 3).half(), None)
    assert half.dtype == torch.float16
    assert half.isfinite().all()


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0, 15.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_sharpening_has_finite_gradients_where_weights_die_and_rows_are_flat(power, eps):
    scores = normal((1, 1, 5, 8))[0]
    scores[:, :, 0] = 0.0
    scores.requires_grad_()
    mask = torch.ones(1, 1, 5, 8, dtype=torch.bool)
    mask[..., 1, :] = False
    weights = table(Sharpen(Softmax(), power, eps=eps), scores, mask)
    (gradient,) = torch.autograd.grad((weights * normal((1, 1, 5, 8), seed=1)[0]).sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: L1("tanh"), "knows no phi 'tanh'"),
        (lambda: L1(eps=-1.0), "eps >= 0"),
        (lambda: Sharpen(Softmax(), 0.0), "power above 0"),
        (lambda: Sharpen(Softmax(), eps=-1e-3), "eps >= 0"),
    ],
)
def test_bad_settings_are_refused(make, text):
    with pytest.raises(OptionError, match=text):
        make()
