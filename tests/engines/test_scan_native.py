from __future__ import annotations

import pytest
import torch

from regard.contract.errors import Unsupported
from regard.engines import native
from regard.engines.native import scan as kernels
from regard.engines.scan import IMPLEMENTATIONS, ScanState, linear_scan
from tests.oracles import coin, normal

built = pytest.mark.skipif(kernels.missing() is not None, reason=f"no native scan: {kernels.missing()}")
ISAS = [] if kernels.missing() else native.isas()
SIZES = [
    (1, 2, 2, 16, 16),
    (64, 4, 2, 32, 16),
    (65, 2, 1, 33, 17),
    (130, 2, 2, 64, 80),
    (200, 1, 1, 128, 128),
    (70, 2, 2, 153, 65),
]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def poisoned():
    native.poison(True)
    yield
    native.poison(False)


def case(n, heads, groups, d, e, kind, dtype, batch=2):
    q, k, v, s0 = normal((batch, heads, n, d), (batch, groups, n, d), (batch, groups, n, e), (batch, groups, d, e))
    rate = torch.rand(batch, heads, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # some steps forget almost all, most little
    g = {"none": None, "head": -rate[0, :, 0], "step": -torch.where(rate < 0.05, 100 * rate, rate / 4)}[kind]
    tensors = [(x / d**0.25).to(dtype) for x in (q, k, v)] + [s0.float()]
    return [x.requires_grad_() for x in (*tensors, *(() if g is None else (g.float(),)))]


def both(tensors, engine, *, exact=False, **options):
    """out, state and all gradients; exact: by the torch way in float64, from the same (rounded) inputs."""
    inputs = [x.detach().double().requires_grad_() for x in tensors] if exact else tensors
    q, k, v, s0, *g = inputs
    out, state = linear_scan(q, k, v, *g, scale=0.7, initial_state=ScanState(s0), engine=engine, **options)
    (dout,) = normal(tuple(out.shape), seed=3, dtype=tensors[0].dtype)
    (ds,) = normal(tuple(state.s.shape), seed=4, dtype=torch.float32)
    return [out, state.s, *torch.autograd.grad((out, state.s), inputs, (dout.to(out.dtype), ds.to(state.s.dtype)))]


def demand_near(found, wanted, tolerance):
    """Relative norms; states and their gradients are float32 whatever the inputs are."""
    # the gradient of a decay is a sum over all later steps that almost cancels
    limits = [tolerance, 1e-6, tolerance, tolerance, tolerance, 1e-6, 2e-5]
    for got, want, limit in zip(found, wanted, limits[: len(found)], strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).norm() / want.norm().clamp(min=1.0) < limit


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["none", "head", "step"])
def test_every_instruction_set_equals_float64_forward_and_backward(monkeypatch, isa, size, kind):
    if kind != "none" and size[1] != size[2]:
        size = (size[0], size[1], size[1], *size[3:])
    code = native.isa_code(isa)
    monkeypatch.setattr(native, "isa_code", lambda _: code)
    n = size[0]
    masks = {"reset": coin(2, n, p=0.05, seed=3), "key_valid": coin(2, n, p=0.8)}
    for dtype, tolerance in TOLERANCE.items():
        tensors = case(*size, kind, dtype)
        for options in ({}, masks):
            found = both(tensors, "scan:native", **options)
            demand_near(found, both(tensors, "scan:torch", exact=True, **options), tolerance)


@built
@pytest.mark.parametrize("divide_by", ["sum", "abs1"])
def test_the_division_and_its_gradients(divide_by):
    q, k, v, s0 = case(150, 2, 2, 16, 24, "none", torch.float32)
    tensors = [(x.detach().abs() + 0.1).requires_grad_() for x in (q, k, v)] + [s0.detach().abs().requires_grad_()]
    results = []
    for engine, wide in (("scan:native", torch.float32), ("scan:torch", torch.float64)):
        q, k, v, s0 = (x.detach().to(wide).requires_grad_() for x in tensors)
        start = ScanState(s0, s0.sum(-1))
        out, state = linear_scan(q, k, v, divide_by=divide_by, initial_state=start, engine=engine)
        results.append([out, state.s, state.z, *torch.autograd.grad(out.cos().sum() + state.z.sum(), (q, k, v, s0))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@built
@pytest.mark.parametrize("kind", ["none", "step"])
def test_strided_inputs_and_gradients_are_read_in_place(kind):
    tensors = case(90, 2, 2, 16, 32, kind, torch.float32)
    # (B, N, H, D) in memory, and a gradient that is one number everywhere
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors[:3]]
    found, wanted = [], []
    for given, results in (([*turned, *tensors[3:]], found), (tensors, wanted)):
        q, k, v, s0, *g = given
        out, _ = linear_scan(q, k, v, *g, initial_state=ScanState(s0), engine="scan:native")
        results += [out, *torch.autograd.grad(out.sum(), given)]
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


@built
def test_rows_whose_last_axis_is_strided_are_copied():
    q, k, v = (x.transpose(-1, -2) for x in normal((1, 2, 16, 70), (1, 2, 16, 70), (1, 2, 16, 70), dtype=torch.float32))
    out, _ = linear_scan(q, k, v, engine="scan:native")
    assert torch.equal(out, linear_scan(q.contiguous(), k.contiguous(), v.contiguous(), engine="scan:native")[0])


@built
def test_the_number_of_threads_changes_no_bit():
    tensors = case(130, 3, 3, 32, 32, "step", torch.float32)
    one = both(tensors, "scan:native")
    torch.set_num_threads(2)
    try:
        two = both(tensors, "scan:native")
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, two))


@built
def test_float32_keeps_its_digits_whatever_was_forgotten_before():
    n = 4096
    rate = torch.where(torch.arange(n) < 3000, -100.0, -0.001).double().expand(1, 1, n)
    q, k, v = (x / 4 for x in normal((1, 1, n, 16), (1, 1, n, 16), (1, 1, n, 16)))
    want, end = linear_scan(q, k, v, rate)
    out, state = linear_scan(q.float(), k.float(), v.float(), rate.float(), engine="scan:native")
    # a sum of log decays in float32 gives 1e-2
    assert (out - want).norm() / want.norm() < 2e-6
    assert (state.s - end.s).norm() / end.s.norm() < 2e-6


@built
def test_the_rounding_of_what_is_left_of_a_chunk_does_not_add_up():
    q, k, v = normal((1, 4, 16384, 16), (1, 4, 16384, 16), (1, 4, 16384, 16))
    g = torch.tensor([-1e-2, -1e-3, -1e-4, -1e-5])
    want, end = linear_scan(q, k, v, g.double())
    out, state = linear_scan(q.float(), k.float(), v.float(), g, engine="scan:native")
    # the factor of a chunk is multiplied once a chunk: its rounding, if the same each time, would add up
    assert (out - want).norm() / want.norm() < 1e-6
    assert (state.s - end.s).norm() / end.s.norm() < 1e-6


@built
def test_the_state_of_bfloat16_inputs_is_summed_in_float32():
    q, k, v = normal((1, 2, 4096, 16), (1, 2, 4096, 16), (1, 2, 4096, 16), dtype=torch.bfloat16)
    _, state = linear_scan(q, k, v, engine="scan:native")
    exact = k.double().transpose(-1, -2) @ v.double()
    # a bfloat16 state gives 7e-3
    assert (state.s.double() - exact).norm() / exact.norm() < 1e-5


@built
@pytest.mark.parametrize("rate", [-90.0, float("-inf")])
def test_forgetting_everything_leaves_the_diagonal(rate):
    tensors = case(130, 2, 2, 16, 16, "step", torch.float32)
    q, k, v, _, g = tensors
    g = torch.full_like(g, rate).requires_grad_()
    out, _ = linear_scan(q, k, v, g, engine="scan:native")
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, g)))


@built
def test_nothing_of_an_earlier_document_reaches_a_later_chunk_not_even_infinity():
    q, k, v = normal((1, 1, 200, 16), (1, 1, 200, 16), (1, 1, 200, 16), dtype=torch.float32)
    v[:, :, 3] = float("inf")
    reset = torch.zeros(1, 200, dtype=torch.bool)
    reset[:, 64] = True
    out, state = linear_scan(q, k, v, reset=reset, engine="scan:native")
    want, end = linear_scan(q[:, :, 64:], k[:, :, 64:], v[:, :, 64:], engine="scan:native")
    torch.testing.assert_close(out[:, :, 64:], want)
    torch.testing.assert_close(state.s, end.s)


@built
def test_second_derivatives_are_those_of_the_torch_way():
    tensors = case(70, 2, 2, 16, 16, "step", torch.float32)
    found = []
    for wide in (torch.float32, torch.float64):
        inputs = [x.detach().to(wide).requires_grad_() for x in tensors]
        q, k, v, s0, g = inputs
        engine = "scan:native" if wide == torch.float32 else "scan:torch"
        out, _ = linear_scan(q, k, v, g, initial_state=ScanState(s0), engine=engine)
        first = torch.autograd.grad(out.cos().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(x.sin().sum() for x in first), inputs))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() / want.norm() < 1e-4


@built
def test_inside_transforms_the_choice_is_the_torch_way_and_a_named_engine_says_why():
    q, k, v, *_ = (x.detach() for x in case(20, 2, 2, 16, 16, "none", torch.float32))

    def mapped(engine):
        return torch.func.vmap(lambda q, k, v: linear_scan(q[None], k[None], v[None], engine=engine)[0][0])(q, k, v)

    torch.testing.assert_close(mapped(None), linear_scan(q, k, v)[0])
    with pytest.raises(Unsupported, match=r"transform of torch\.func"):
        mapped("scan:native")
    out, tangent = torch.func.jvp(lambda q: linear_scan(q, k, v)[0], (q,), (k,))
    torch.testing.assert_close(tangent, linear_scan(k, k, v)[0])
    x = q.clone().requires_grad_()
    out = linear_scan(x, k, v, engine="scan:native")[0][0, 0]
    rows = torch.eye(out.numel()).view(-1, *out.shape)
    jacobian = torch.autograd.grad(out, x, rows, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(jacobian[-1], torch.autograd.grad(out[-1, -1], x)[0])


@built
@pytest.mark.parametrize("kind", ["none", "step"])
def test_the_operators_are_sound(kind):
    q, k, v, s0, *g = case(20, 2, 2, 16, 24, kind, torch.bfloat16)
    q, k, v, s0 = (x.detach() for x in (q, k, v, s0))
    decay = g[0].detach() if g else None
    segment = coin(2, 20, p=0.2).cumsum(-1)
    forward, backward = torch.ops.regard.linear_scan_forward, torch.ops.regard.linear_scan_backward
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward.default, (q, k, v, 0.5, decay, s0, segment), test_utils=tests)
    dout, ds = torch.ones_like(v), torch.ones_like(s0)
    torch.library.opcheck(backward.default, (dout, ds, q, k, v, 0.5, decay, s0, segment), test_utils=tests)


@built
def test_it_is_chosen_where_it_can_run_and_says_where_it_cannot():
    names = [i.name for i in IMPLEMENTATIONS]
    assert names.index("scan:native") < names.index("scan:torch")
    q, k, v, *_ = case(20, 2, 2, 16, 16, "none", torch.float32)
    for change, text in (
        ({"q": q.double()}, "not all float32, bfloat16 or float16"),
        ({"log_decay": torch.zeros(2, 2, 20, 16)}, "by key channel"),
        ({"is_causal": False}, "not causal"),
        ({"q": torch.zeros(2, 2, 20, 300), "k": torch.zeros(2, 2, 20, 300)}, "width of q and k is 300"),
    ):
        with pytest.raises(Unsupported, match=text):
            linear_scan(**{"q": q, "k": k, "v": v, "engine": "scan:native", **change})


def test_a_library_without_the_scan_is_a_reason(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(native, "library", lambda: object())
    assert "before it had a scan" in str(kernels.missing())

    class Other:
        @staticmethod
        def regard_scan_abi():
            return 7

    monkeypatch.setattr(native, "library", Other)
    assert "another version" in str(kernels.missing())
