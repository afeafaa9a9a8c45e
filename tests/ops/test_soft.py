from __future__ import annotations

import pytest
import torch

from regard import KeyValid, OptionError, ShapeError, Unsupported, newton_inverse, soft_attention
from tests.oracles import normal


def gauss(x, y):
    return torch.exp(-(x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / 2)


def positive(condition, size=6, batch=3):
    """Random symmetric matrices with eigenvalues from 1 to a condition."""
    (x,) = normal((batch, size, size))
    basis = torch.linalg.qr(x).Q
    return basis * torch.linspace(1, condition, size, dtype=torch.float64) @ basis.transpose(-1, -2)


def given(n=10, m=4, d=3):
    return normal((2, 3, n, d), (2, 3, n, 5), (2, 3, m, d))


@pytest.mark.parametrize("condition", [2, 10, 100])
def test_newton_converges_in_20_steps(condition):
    p = positive(condition)
    residual = newton_inverse(p) @ p - torch.eye(6, dtype=torch.float64)
    assert residual.abs().max() < (1e-6 if condition > 10 else 1e-12)
    assert (newton_inverse(p.float()) @ p.float() - torch.eye(6)).abs().max() < 1e-3
    # ill-conditioned ones are left damped, not blown up
    flat = torch.ones(6, 6, dtype=torch.float64)
    assert newton_inverse(flat, ridge=0.01).abs().max() < 100


def test_newton_starts_from_the_row_sums_without_the_ridge():
    (points,) = normal((4, 3))
    b = gauss(points, points)
    p = b + 0.01 * torch.eye(4, dtype=torch.float64)
    start = 1.8 / b.sum(-1).max() ** 2 * p
    torch.testing.assert_close(newton_inverse(b, iters=1, ridge=0.01), 2 * start - start @ p @ start)


@pytest.mark.parametrize("iters", [3, 20])
def test_its_gradient_is_one_step_from_the_result(iters):
    p = positive(4).requires_grad_()
    (weight,) = normal((3, 6, 6), seed=1)
    x = newton_inverse(p, iters=iters)
    (grad,) = torch.autograd.grad((x * weight).sum(), p)
    torch.testing.assert_close(grad, -x.mT @ weight @ x.mT)
    (exact,) = torch.autograd.grad((torch.linalg.inv(p) * weight).sum(), p)
    assert torch.allclose(grad, exact) is (iters == 20)


def test_its_second_derivatives_are_those_of_an_inverse():
    p = positive(3, size=3, batch=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: newton_inverse(p + p.mT), p)


@pytest.mark.parametrize("symmetric_norm", [False, True])
def test_it_is_three_kernels(symmetric_norm):
    q, v, landmarks = given()
    c, b = gauss(q, landmarks), gauss(landmarks, landmarks)
    inverse = torch.linalg.inv(b + 0.01 * torch.eye(4, dtype=torch.float64))
    if symmetric_norm:
        root = torch.diag_embed(b.sum(-1) ** -0.5)
        inverse = root @ inverse @ root
    # converged, however near two landmarks are
    out = soft_attention(q, v, landmarks, symmetric_norm=symmetric_norm, newton_iters=40)
    torch.testing.assert_close(out, c @ inverse @ c.mT @ v)


def test_with_all_tokens_as_landmarks_it_is_the_dense_kernel():
    q, v, _ = given(n=6, d=8)
    torch.testing.assert_close(soft_attention(q, v, q, ridge=0.0), gauss(q, q) @ v)


@pytest.mark.parametrize("symmetric_norm", [False, True])
def test_the_implied_weights_are_symmetric_and_positive(symmetric_norm):
    q, _, landmarks = given()
    eye = torch.eye(10, dtype=torch.float64).expand(2, 3, 10, 10)
    weights = soft_attention(q, eye, landmarks, symmetric_norm=symmetric_norm)
    torch.testing.assert_close(weights, weights.mT)
    eigenvalues = torch.linalg.eigvalsh(weights)
    assert eigenvalues.min() > -1e-12 and (eigenvalues > 1e-9).sum(-1).max() <= 4


def test_a_common_shift_changes_nothing():
    q, v, landmarks = given()
    out = soft_attention(q, v, landmarks)
    torch.testing.assert_close(soft_attention(q + 3, v, landmarks + 3), out)
    # the shift is exact in float32, and the squares of 300 would swallow the distances
    shifted = soft_attention(q.float() + 256, v.float(), landmarks.float() + 256)
    exact = soft_attention((q.float() + 256).double(), v, (landmarks.float() + 256).double())
    assert (shifted - exact).abs().max() < 1e-4


def test_tokens_in_another_order_give_the_same_in_that_order():
    q, v, landmarks = given()
    order = torch.randperm(10)
    out = soft_attention(q, v, landmarks)
    torch.testing.assert_close(soft_attention(q[:, :, order], v[:, :, order], landmarks), out[:, :, order])
    torch.testing.assert_close(soft_attention(q, v, landmarks[:, :, [2, 0, 3, 1]]), out)


def test_hidden_tokens_are_read_by_nobody():
    q, v, landmarks = given()
    valid = (torch.arange(10) < 7).expand(2, 10)
    noise = 30 * torch.randn(2, 3, 10, 1).double() * ~valid[:, None, :, None]
    out = soft_attention(q + noise, v + noise, landmarks, pattern=KeyValid().bind(key_valid=valid))
    torch.testing.assert_close(out[:, :, :7], soft_attention(q[:, :, :7], v[:, :, :7], landmarks))


def test_gradients_are_those_of_finite_differences():
    # landmarks apart, so that the iteration has converged and its one step is the gradient
    q, v = (t.requires_grad_() for t in normal((1, 1, 5, 2), (1, 1, 5, 3)))
    landmarks = torch.tensor([[[[0.0, 0.0], [1.5, 0.0], [0.0, 2.0]]]], dtype=torch.float64, requires_grad=True)
    for symmetric_norm in (False, True):

        def run(q, v, landmarks, symmetric_norm=symmetric_norm):
            return soft_attention(q, v, landmarks, symmetric_norm=symmetric_norm)

        assert torch.autograd.gradcheck(run, (q, v, landmarks))


def test_where_newton_stops_early_the_reference_has_the_gradient_of_its_steps():
    q, v, landmarks = given(m=8, d=2)
    found = []
    for engine in (None, "reference"):
        points = landmarks.clone().requires_grad_()
        out = soft_attention(q, v, points, newton_iters=3, engine=engine)
        found.append((out, *torch.autograd.grad(out.sum(), points)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_what_it_cannot_do_is_refused():
    q, v, landmarks = given()
    with pytest.raises(Unsupported, match="soft is not causal"):
        soft_attention(q, v, landmarks, is_causal=True)
    with pytest.raises(Unsupported, match="10 queries and 7 keys"):
        soft_attention(q, v[:, :, :7], landmarks)
    with pytest.raises(ShapeError, match=r"axis d \(key width\) of landmarks"):
        soft_attention(q, v, landmarks[..., :2])
    with pytest.raises(OptionError, match=r"ridge is 0.1; it is in \[0, 0.05\]"):
        soft_attention(q, v, landmarks, ridge=0.1)
    with pytest.raises(OptionError, match="at least 1 step, not 0"):
        soft_attention(q, v, landmarks, newton_iters=0)
    with pytest.raises(OptionError, match="at least 0, not -1"):
        newton_inverse(torch.eye(3), ridge=-1)
    with pytest.raises(ShapeError, match=r"square matrices \(…, L, L\), not \(3, 4\)"):
        newton_inverse(torch.ones(3, 4))
