from __future__ import annotations

import pytest
import torch

from regard import ShapeError
from regard.engines.scan import affine_scan
from regard.engines.scan_affine import SHARED
from tests.oracles import normal

# b's axes after (B, N), a's axes after (B, N)
SHAPES = [
    ((), ()),
    ((3,), ()),
    ((3,), (3,)),
    ((3,), (1,)),
    ((3, 4), (3,)),
    ((3, 4), (1, 4)),
    ((2, 24), (2, 1)),
    ((40,), ()),
]


def recurrence(a, b, h0=None):
    a = a.reshape(*a.shape, *(1,) * (b.dim() - a.dim()))
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    rows = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        rows.append(h)
    return torch.stack(rows, 1)


def case(n, b_axes, a_axes, *, is_log=False, batch=2):
    a, b, h0 = normal((batch, n, *a_axes), (batch, n, *b_axes), (batch, *b_axes))
    return (-a.abs() if is_log else a), b, h0


@pytest.mark.parametrize("b_axes, a_axes", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 10, 65])
@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_it_is_the_recurrence(b_axes, a_axes, n, is_log, start):
    a, b, h0 = case(n, b_axes, a_axes, is_log=is_log)
    h0 = h0 if start else None
    got = affine_scan(a, b, h0, is_log=is_log)
    torch.testing.assert_close(got, recurrence(a.exp() if is_log else a, b, h0))


@pytest.mark.parametrize("b_axes, a_axes", [((), ()), ((3,), ()), ((2, 3), (2,)), ((2, SHARED), (2,))])
@pytest.mark.parametrize("is_log", [False, True])
def test_its_derivatives_are_exact(b_axes, a_axes, is_log):
    inputs = [x.requires_grad_() for x in case(5, b_axes, a_axes, is_log=is_log, batch=1)]

    def run(a, b, h0):
        return affine_scan(a, b, h0, is_log=is_log)

    fast = len(b_axes) > 1
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=fast)


def test_zero_and_negative_factors_are_factors():
    a = torch.tensor([[2.0, 0.0, -1.0, 0.5, 0.0, -3.0]], dtype=torch.float64, requires_grad=True)
    b = torch.ones(1, 6, dtype=torch.float64, requires_grad=True)
    h = affine_scan(a, b)
    assert h.tolist() == [[1.0, 1.0, 0.0, 1.0, 1.0, -2.0]]
    for got, want in zip(
        torch.autograd.grad(h.square().sum(), (a, b)),
        torch.autograd.grad(recurrence(a, b).square().sum(), (a, b)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("is_log", [False, True])
def test_it_may_be_cut_and_continued(is_log):
    a, b, h0 = case(23, (2, 20), (2,), is_log=is_log)
    want = affine_scan(a, b, h0, is_log=is_log)
    for cut in (1, 8, 22):
        first = affine_scan(a[:, :cut], b[:, :cut], h0, is_log=is_log)
        second = affine_scan(a[:, cut:], b[:, cut:], first[:, -1], is_log=is_log)
        torch.testing.assert_close(torch.cat((first, second), 1), want)


def test_a_logarithm_of_minus_infinity_forgets_without_nan():
    a = torch.tensor([[-0.5, float("-inf"), -0.5, -0.5]], dtype=torch.float64).requires_grad_()
    for width in (1, 40):
        b = normal((1, 4, width))[0].requires_grad_()
        h = affine_scan(a, b, is_log=True)
        torch.testing.assert_close(h, recurrence(a.exp(), b))
        assert all(x.isfinite().all() for x in torch.autograd.grad(h.sum(), (a, b)))


@pytest.mark.parametrize("is_log", [False, True])
def test_it_maps_over_a_further_axis_and_compiles_as_one_graph(is_log):
    a, b, h0 = case(9, (2, 20), (2,), is_log=is_log, batch=3)
    mapped = torch.func.vmap(lambda a, b, h0: affine_scan(a[None], b[None], h0[None], is_log=is_log)[0])(a, b, h0)
    torch.testing.assert_close(mapped, affine_scan(a, b, h0, is_log=is_log))
    inputs = [x.requires_grad_() for x in (a, b, h0)]
    compiled = torch.compile(lambda *x: affine_scan(*x, is_log=is_log), fullgraph=True, backend="aot_eager")
    out, want = compiled(*inputs), affine_scan(*inputs, is_log=is_log)
    torch.testing.assert_close(out, want)
    for got, grad in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(got, grad)


def test_half_precision_is_summed_in_float32():
    b = torch.full((1, 4096, 20), 0.5, dtype=torch.bfloat16)
    for a, is_log in ((torch.ones(1, 4096), False), (torch.zeros(1, 4096), True)):
        h = affine_scan(a, b, is_log=is_log)
        assert h.dtype == torch.bfloat16
        # a bfloat16 sum stops growing at 128
        assert (h[0, -1] == 2048).all()


@pytest.mark.parametrize(
    "a, h0, text", [((2,), None, "a is"), ((2, 5), None, "a is"), ((2, 4, 3), None, "a is"), ((2, 4), (2, 4), "h0 is")]
)
def test_bad_shapes_are_refused(a, h0, text):
    with pytest.raises(ShapeError, match=text):
        affine_scan(torch.zeros(a), torch.zeros(2, 4, 6), None if h0 is None else torch.zeros(h0))
