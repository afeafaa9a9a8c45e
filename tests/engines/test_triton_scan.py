"""The scan in Triton (on a GPU, or in Triton's interpreter on the CPU), and the lowering to flash-linear-attention."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from regard.contract.dispatch import listen
from regard.contract.errors import Unsupported
from regard.engines import triton as home
from regard.engines.scan import IMPLEMENTATIONS, ScanState, linear_scan
from regard.engines.triton import fla
from tests.engines.triton_device import DEVICE, needs_triton, true_bfloat16
from tests.oracles import coin, normal
from tests.oracles import scan as step_by_step

__all__ = ["true_bfloat16"]
TRITON = "scan:triton"
SIZES = [(1, 2, 2, 16, 16), (64, 4, 2, 32, 16), (65, 2, 1, 33, 17), (130, 2, 2, 20, 80), (70, 1, 1, 153, 65)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def case(n, heads, groups, d, e, kind, dtype=torch.float32, batch=2):
    q, k, v, s0 = normal((batch, heads, n, d), (batch, groups, n, d), (batch, groups, n, e), (batch, groups, d, e))
    rate = torch.rand(batch, heads, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # some steps forget almost all, most little
    g = {"none": None, "head": -rate[0, :, 0], "step": -torch.where(rate < 0.05, 100 * rate, rate / 4)}[kind]
    tensors = [(x / d**0.25).to(dtype) for x in (q, k, v)] + [s0.float()]
    return [x.to(DEVICE).requires_grad_() for x in (*tensors, *(() if g is None else (g.float(),)))]


def both(tensors, engine, *, exact=False, **options):
    """out, state and all gradients; exact: by the definition in float64, from the same (rounded) inputs."""
    inputs = [x.detach().double().requires_grad_() for x in tensors] if exact else tensors
    q, k, v, s0, *g = inputs
    out, state = linear_scan(q, k, v, *g, scale=0.7, initial_state=ScanState(s0), engine=engine, **options)
    (dout,) = normal(tuple(out.shape), seed=3, dtype=tensors[0].dtype)
    (ds,) = normal(tuple(state.s.shape), seed=4, dtype=torch.float32)
    seeds = (dout.to(out), ds.to(state.s))
    return [out, state.s, *torch.autograd.grad((out, state.s), inputs, seeds)]


def demand_near(found, wanted, limit):
    """Relative norms."""
    # the gradient of a decay is a sum over all later steps that almost cancels
    limits = [limit] * 6 + [20 * limit]
    for got, want, most in zip(found, wanted, limits[: len(found)], strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).norm() <= most * want.norm().clamp(min=1.0)


def options_of(n, masked):
    if not masked:
        return {}
    return {"reset": coin(2, n, p=0.05, seed=3).to(DEVICE), "key_valid": coin(2, n, p=0.8).to(DEVICE)}


@needs_triton
@pytest.mark.parametrize("masked", [False, True], ids=["", "documents and padding"])
@pytest.mark.parametrize("kind", ["none", "head", "step"])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward_equal_the_definition_in_float64(size, kind, masked):
    if kind != "none":
        size = (size[0], size[1], size[1], *size[3:])
    tensors, options = case(*size, kind), options_of(size[0], masked)
    demand_near(both(tensors, TRITON, **options), both(tensors, "reference", exact=True, **options), 1e-6)


@needs_triton
@pytest.mark.parametrize("masked", [False, True], ids=["", "documents and padding"])
@pytest.mark.parametrize("kind", ["none", "step"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_states_in_float32(dtype, kind, masked, monkeypatch, true_bfloat16):
    if dtype == torch.bfloat16:
        # with the products put right the interpreter can
        monkeypatch.setattr(home, "cannot", lambda q, k, v: [])
    tensors, options = case(130, 2, 2, 24, 24, kind, dtype), options_of(130, masked)
    found = both(tensors, TRITON, **options)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    demand_near(found, both(tensors, "reference", exact=True, **options), TOLERANCE[dtype])


@needs_triton
def test_it_is_the_recurrence():
    q, k, v, s0, g = (x.detach() for x in case(70, 2, 2, 5, 6, "step"))
    valid, reset = coin(2, 70, p=0.8), coin(2, 70, p=0.05, seed=3)
    out, state = linear_scan(
        q, k, v, g, divide_by="abs1", initial_state=ScanState(s0, s0[..., 0]), key_valid=valid.to(DEVICE),
        reset=reset.to(DEVICE), engine=TRITON,
    )  # fmt: skip
    exact = [x.double().cpu() for x in (q, k, v, g)]
    want, end, total = step_by_step(
        *exact, divide_by="abs1", s0=s0.double().cpu(), z0=s0[..., 0].double().cpu(), key_valid=valid, reset=reset
    )
    for got, wanted in ((out, want), (state.s, end), (state.z, total)):
        torch.testing.assert_close(got.double().cpu(), wanted, atol=2e-5, rtol=2e-5)


@needs_triton
def test_float32_keeps_its_digits_whatever_was_forgotten_before():
    n = 300
    rate = torch.where(torch.arange(n) < 220, -100.0, -0.001).double().expand(1, 1, n).to(DEVICE)
    q, k, v = (x.to(DEVICE) / 4 for x in normal((1, 1, n, 16), (1, 1, n, 16), (1, 1, n, 16)))
    want, end = linear_scan(q, k, v, rate, engine="scan:torch")
    out, state = linear_scan(q.float(), k.float(), v.float(), rate.float(), engine=TRITON)
    # a sum of log decays in float32 gives 1e-4
    assert (out - want).norm() / want.norm() < 2e-6
    assert (state.s - end.s).norm() / end.s.norm() < 2e-6


@needs_triton
def test_the_rounding_of_what_is_left_of_a_chunk_does_not_add_up():
    n = 64 * 100
    q, k, v = (x.to(DEVICE) for x in normal((1, 2, n, 1), (1, 2, n, 1), (1, 2, n, 1)))
    g = torch.tensor([-1.3e-5, -1.7e-4], device=DEVICE)
    s0 = torch.full((1, 2, 1, 1), 1e4, device=DEVICE)
    _, end = linear_scan(q, k, v, g.double(), initial_state=ScanState(s0.double()), engine="scan:torch")
    _, state = linear_scan(q.float(), k.float(), v.float(), g, initial_state=ScanState(s0), engine=TRITON)
    # a float32 state, multiplied by a float32 factor once a chunk, gave 2e-6 after 200 chunks
    assert (state.s - end.s).norm() / end.s.norm() < 1e-7


@needs_triton
def test_forgetting_everything_leaves_the_diagonal():
    q, k, v, _, g = case(130, 1, 1, 16, 16, "step")
    g = torch.full_like(g, float("-inf")).requires_grad_()
    out, _ = linear_scan(q, k, v, g, engine=TRITON)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, g)))


@needs_triton
def test_nothing_of_an_earlier_document_reaches_a_later_chunk_not_even_infinity():
    q, k, v = (x.to(DEVICE) for x in normal((1, 1, 200, 16), (1, 1, 200, 16), (1, 1, 200, 16), dtype=torch.float32))
    v[:, :, 3] = float("inf")
    reset = torch.zeros(1, 200, dtype=torch.bool, device=DEVICE)
    reset[:, 64] = True
    out, state = linear_scan(q, k, v, reset=reset, engine=TRITON)
    want, end = linear_scan(q[:, :, 64:], k[:, :, 64:], v[:, :, 64:], engine=TRITON)
    torch.testing.assert_close(out[:, :, 64:], want)
    torch.testing.assert_close(state.s, end.s)


@needs_triton
def test_no_later_step_reaches_an_earlier_output():
    q, k, v, s0, g = (x.detach() for x in case(100, 1, 1, 8, 8, "step"))
    out, _ = linear_scan(q, k, v, g, initial_state=ScanState(s0), engine=TRITON)
    for x in (q, k, v):
        x[:, :, 80:] += 1
    g[:, :, 80:] *= 2
    again, _ = linear_scan(q, k, v, g, initial_state=ScanState(s0), engine=TRITON)
    assert torch.equal(out[:, :, :80], again[:, :, :80])
    assert not torch.equal(out[:, :, 80:], again[:, :, 80:])


@needs_triton
@pytest.mark.parametrize("kind", ["none", "step"])
def test_strides_change_no_bit(kind):
    tensors = case(90, 2, 2, 16, 32, kind)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors[:3]]
    columns = [x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in tensors[:3]]
    results = []
    for given in (tensors, [*turned, *tensors[3:]], [*columns, *tensors[3:]]):
        q, k, v, s0, *g = given
        out, _ = linear_scan(q, k, v, *g, initial_state=ScanState(s0), engine=TRITON)
        # a gradient that is one number everywhere
        results.append([out, *torch.autograd.grad(out.sum(), given)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_triton
@pytest.mark.parametrize("kind", ["none", "step"])
def test_the_operators_are_sound_and_compile(kind):
    q, k, v, s0, *g = (x.detach() for x in case(20, 2, 2, 8, 12, kind))
    decay = g[0] if g else None
    segment = coin(2, 20, p=0.2).cumsum(-1).to(DEVICE)
    forward, backward = torch.ops.regard.triton_scan_forward, torch.ops.regard.triton_scan_backward
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward.default, (q, k, v, 0.5, decay, s0, segment), test_utils=tests)
    dout, ds = torch.ones_like(v), torch.ones_like(s0)
    torch.library.opcheck(backward.default, (dout, ds, q, k, v, 0.5, decay, s0, segment), test_utils=tests)

    def run(q, k, v):
        return linear_scan(q, k, v, decay, engine=TRITON)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plain, traced = run(*leaves), compiled(*leaves)
    assert torch.equal(plain, traced)
    for one, other in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (plain, traced)), strict=True):
        assert torch.equal(one, other)


@needs_triton
def test_a_second_derivative_is_refused():
    q, k, v, *_ = case(20, 1, 1, 8, 8, "none")
    out, _ = linear_scan(q, k, v, engine=TRITON)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@needs_triton
@pytest.mark.parametrize(
    "change, text",
    [
        ({"log_decay": torch.zeros(2, 2, 20, 16)}, "by key channel"),
        ({"is_causal": False}, "not causal"),
        ({"q": torch.zeros(2, 2, 20, 16, dtype=torch.float64)}, "not all float32, bfloat16 or float16"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(change, text):
    q, k, v, *_ = case(20, 2, 2, 16, 16, "none")
    given = {"q": q, "k": k, "v": v, **change}
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    with pytest.raises(Unsupported, match=text):
        linear_scan(**given, engine=TRITON)


def test_it_says_why_it_does_not_run_here(monkeypatch):
    q, k, v = normal((1, 2, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), dtype=torch.float32)
    monkeypatch.setattr(home, "_interpreted", lambda: False)
    monkeypatch.setattr(home, "installed", lambda name: False)
    with pytest.raises(Unsupported, match=r"pip install 'regard\[triton\]', the tensors are on cpu, not on CUDA"):
        linear_scan(q, k, v, engine=TRITON)
    monkeypatch.setattr(fla, "installed", lambda name: False)
    with pytest.raises(Unsupported, match=r"pip install flash-linear-attention, the tensors are on cpu.*float32"):
        linear_scan(q, k, v, engine="scan:fla")
    monkeypatch.setattr(fla, "installed", lambda name: True)
    segment, by_channel = torch.zeros(1, 20), torch.zeros(1, 2, 20, 8)
    reasons = fla.cannot(q.half(), k.half(), v.half(), by_channel, segment)
    assert reasons == [
        "the tensors are on cpu, not on CUDA", "the decay is by key channel", "there are document starts",
    ]  # fmt: skip


def test_the_choice_says_why_and_never_falls_on_kernels_unasked():
    q, k, v = normal((1, 2, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), dtype=torch.float32)
    with listen() as verdicts:
        linear_scan(q, k, v)
    seen = {v.name: v for v in verdicts}
    assert not seen[TRITON].chosen and not seen["scan:fla"].chosen and seen["scan:fla"].reasons
    names = [i.name for i in IMPLEMENTATIONS]
    assert names.index("scan:fla") < names.index("scan:torch") < names.index(TRITON)


@pytest.mark.parametrize("kind, groups", [("none", 4), ("none", 2), ("head", 4), ("step", 4)])
def test_a_call_lowered_to_flash_linear_attention_equals_the_definition(monkeypatch, kind, groups):
    """With a stand-in that takes what its `chunk_simple_gla` takes: (B, T, H, width) and a state for each head."""

    def chunk_simple_gla(
        q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
    ):  # fmt: skip
        assert q.shape[:3] == k.shape[:3] == v.shape[:3] and output_final_state
        assert g is None or g.shape == q.shape[:3]
        given = [x.transpose(1, 2) for x in (q, k, v)]
        decay = None if g is None else g.transpose(1, 2)
        out, s, _ = step_by_step(*given, decay, scale=q.shape[-1] ** -0.5 if scale is None else scale, s0=initial_state)
        return out.transpose(1, 2), s

    library = ModuleType("fla.ops.simple_gla")
    library.chunk_simple_gla = chunk_simple_gla
    for name, module in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), (library.__name__, library)):
        monkeypatch.setitem(sys.modules, name, module)
    tensors = [x.detach().cpu().requires_grad_() for x in case(12, 4, groups, 6, 5, kind)]
    q, k, v, s0, *g = tensors
    decay = g[0] if g else None
    if kind == "head":
        decay = decay[None, :, None]
    out, s = fla.scan(q, k, v, 0.7, decay, s0)
    found = [out, s, *torch.autograd.grad(out.cos().sum() + s.sin().sum(), tensors)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    q, k, v, s0, *g = exact
    out, state = linear_scan(q, k, v, *g, scale=0.7, initial_state=ScanState(s0), engine="reference")
    wanted = [out, state.s, *torch.autograd.grad(out.cos().sum() + state.s.sin().sum(), exact)]
    demand_near(found, wanted, 1e-6)
