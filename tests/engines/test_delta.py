from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from regard import OptionError, ShapeError, Unsupported
from regard.engines import native
from regard.engines.delta import delta_rule
from regard.engines.native import delta as kernels
from regard.engines.native import scan as scan_kernels
from regard.engines.scan import ScanState, linear_scan
from tests.oracles import coin, normal

DECAYS = ["none", "head", "step"]
built = pytest.mark.skipif(scan_kernels.missing() is not None, reason=f"no native scan: {scan_kernels.missing()}")
ISAS = [] if scan_kernels.missing() else native.isas()
ENGINES = ["delta:torch", "delta:reference"]


def decay(kind, batch, heads, n, seed=7):
    rate = torch.rand(batch, heads, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"none": None, "head": -rate[0, :, 0], "step": -2 * rate}[kind]


def inputs(n, heads=2, groups=None, d=3, e=4, batch=2, seed=0):
    """q, k of length 1, v, beta in (0, 1)."""
    q, k, v, beta = normal(
        (batch, groups or heads, n, d),
        (batch, groups or heads, n, d),
        (batch, heads, n, e),
        (batch, heads, n),
        seed=seed,
    )
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta.sigmoid()


def recurrence(q, k, v, beta, g=None, *, scale=1.0, key_valid=None, reset=None, s0=None):
    """(out, state) by S = S (e^g) (I - beta k k') + beta k v', one matrix after the other."""
    batch, heads, n, e = v.shape
    d = k.shape[-1]
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    out, states = torch.zeros_like(v), torch.zeros(batch, heads, d, e, dtype=v.dtype)
    for b in range(batch):
        for h in range(heads):
            s = torch.zeros(d, e, dtype=v.dtype) if s0 is None else s0[b, h]
            for t in range(n):
                if reset is not None and reset[b, t]:
                    s = torch.zeros_like(s)
                if key_valid is None or key_valid[b, t]:
                    x, y = k[b, h, t], beta[b, h, t]
                    forget = 1.0 if g is None else (g[h] if g.dim() == 1 else g[b, h, t]).exp()
                    s = (torch.eye(d, dtype=v.dtype) - y * torch.outer(x, x)) @ s * forget + y * torch.outer(
                        x, v[b, h, t]
                    )
                out[b, h, t] = scale * q[b, h, t] @ s
            states[b, h] = s
    return out, states


@pytest.mark.parametrize("n, chunk", [(1, 1), (1, 64), (7, 1), (7, 3), (7, 7), (65, 64), (63, 64), (64, 16)])
@pytest.mark.parametrize("kind", DECAYS)
def test_every_chunk_size_equals_the_recurrence(n, chunk, kind):
    q, k, v, beta = inputs(n)
    g = decay(kind, 2, 2, n)
    out, state = delta_rule(q, k, v, beta, g, scale=0.5, chunk_size=chunk, engine="delta:torch")
    want, s = recurrence(q, k, v, beta, g, scale=0.5)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.s, s)
    assert state.seen == n


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", DECAYS)
def test_every_option_together_equals_the_recurrence(engine, kind):
    n, heads = 23, 4
    q, k, v, beta = inputs(n, heads, 2)
    g = decay(kind, 2, heads, n)
    valid, reset = coin(2, n), coin(2, n, p=0.15, seed=3)
    (s0,) = normal((2, heads, 3, 4), seed=5)
    options = {"scale": 0.3, "key_valid": valid, "reset": reset}
    out, state = delta_rule(
        q, k, v, beta, g, **options, initial_state=ScanState(s0, None, 11), chunk_size=5, engine=engine
    )
    want, s = recurrence(q, k, v, beta, g, **options, s0=s0)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.s, s)
    assert state.seen == 11 + n


@pytest.mark.parametrize("kind", ["none", "step"])
def test_gradients_reach_every_input_the_start_and_the_end(kind):
    tensors = [*inputs(5, 2, 1, 2, 2, 1), *normal((1, 2, 2, 2), seed=5)]
    if kind == "step":
        tensors.append(decay("step", 1, 2, 5))
    tensors = [x.requires_grad_() for x in tensors]
    valid, reset = torch.tensor([[True, True, False, True, True]]), torch.tensor([[False, False, False, True, False]])
    for options in ({}, {"key_valid": valid, "reset": reset}):

        def run(q, k, v, beta, s0, g=None, options=options):
            out, state = delta_rule(
                q, k, v, beta, g, scale=0.4, initial_state=ScanState(s0), chunk_size=2, engine="delta:torch", **options
            )
            return out, state.s

        assert torch.autograd.gradcheck(run, tensors)
        assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_gradients_equal_the_reference(kind, chunk):
    n = 37
    tensors = [*inputs(n, 4, 2), *normal((2, 4, 3, 4), seed=5)]
    g = decay(kind, 2, 4, n)
    tensors = [x.requires_grad_() for x in (*tensors, *(() if g is None else (g,)))]
    valid, reset = coin(2, n), coin(2, n, p=0.1, seed=3)
    found = []
    for engine in ENGINES:
        q, k, v, beta, s0, *rest = tensors
        out, state = delta_rule(
            q,
            k,
            v,
            beta,
            *rest,
            key_valid=valid,
            reset=reset,
            initial_state=ScanState(s0),
            chunk_size=chunk,
            engine=engine,
        )
        found.append(torch.autograd.grad(out.cos().sum() + state.s.sin().sum(), tensors))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("cuts", [(4, 9), (1, 2), (16,), ()])
def test_it_may_be_cut_and_continued_anywhere(kind, cuts):
    q, k, v, beta = inputs(17, 4, 2)
    g = decay(kind, 2, 4, 17)
    want, end = delta_rule(q, k, v, beta, g, chunk_size=4)
    state, outs = None, []
    for a, b in pairwise((0, *cuts, 17)):
        piece = g[:, :, a:b] if kind == "step" else g
        now = [x[:, :, a:b] for x in (q, k, v, beta)]
        out, state = delta_rule(*now, piece, chunk_size=4, initial_state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    torch.testing.assert_close(state.s, end.s)
    assert state.seen == 17


@pytest.mark.parametrize("engine", [None, "delta:step", "delta:torch", "delta:reference"])
def test_step_by_step_equals_all_at_once_in_float32(engine):
    q, k, v, beta = (x.float() for x in inputs(150, d=8, e=8))
    g = decay("step", 2, 2, 150).float()
    want, _ = delta_rule(q, k, v, beta, g)
    state, outs = None, []
    for t in range(150):
        now = [x[:, :, t : t + 1] for x in (q, k, v, beta, g)]
        out, state = delta_rule(*now, initial_state=state, engine=engine)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", DECAYS)
def test_padding_anywhere_changes_no_real_row_whatever_it_holds(kind):
    n = 14
    valid = coin(2, n)
    q, k, v, beta = inputs(n)
    g = decay(kind, 2, 2, n)
    k, v = (x.masked_fill(~valid[:, None, :, None], float("nan")) for x in (k, v))
    out, state = delta_rule(q, k, v, beta, g, key_valid=valid, chunk_size=4)
    for b in range(2):
        alone = [x[b : b + 1, :, valid[b]] for x in (q, k, v, beta)]
        want, end = delta_rule(*alone, g[b : b + 1, :, valid[b]] if kind == "step" else g)
        torch.testing.assert_close(out[b : b + 1, :, valid[b]], want)
        torch.testing.assert_close(state.s[b : b + 1], end.s)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_document_starts_equal_one_call_for_each_document(kind, chunk):
    n, starts = 15, (1, 2, 8, 13)
    q, k, v, beta = inputs(n)
    g = decay(kind, 2, 2, n)
    reset = torch.zeros(2, n, dtype=torch.bool)
    reset[:, list(starts)] = True
    (s0,) = normal((2, 2, 3, 4), seed=5)
    out, state = delta_rule(q, k, v, beta, g, reset=reset, chunk_size=chunk, initial_state=ScanState(s0))
    for a, b in pairwise((0, *starts, n)):
        now = [x[:, :, a:b] for x in (q, k, v, beta)]
        start = ScanState(s0) if a == 0 else None
        want, end = delta_rule(*now, g[:, :, a:b] if kind == "step" else g, initial_state=start)
        torch.testing.assert_close(out[:, :, a:b], want)
    torch.testing.assert_close(state.s, end.s)


def test_no_output_depends_on_a_later_token():
    q, k, v, beta = (x.requires_grad_() for x in inputs(11))
    g = decay("step", 2, 2, 11).requires_grad_()
    out, _ = delta_rule(q, k, v, beta, g, chunk_size=4)
    for t in range(11):
        for x in torch.autograd.grad(out[:, :, t].sum(), (k, v, beta, g), retain_graph=True):
            # the sums that give the gradient of the decay leave their rounding
            torch.testing.assert_close(x[:, :, t + 1 :], torch.zeros_like(x[:, :, t + 1 :]), atol=1e-14, rtol=0)
            assert t == 0 or (x[:, :, t] != 0).any()


def test_a_full_correction_stores_the_value_exactly():
    _, k, v, _ = inputs(9, d=8)
    out, _ = delta_rule(k, k, v, torch.ones(2, 2, 9).double())
    torch.testing.assert_close(out, v)


def test_with_orthogonal_keys_it_is_linear_attention():
    _, _, v, beta = inputs(8, d=8)
    q, k = normal((2, 2, 8, 8))[0], torch.eye(8).double().expand(2, 2, 8, 8)
    torch.testing.assert_close(delta_rule(q, k, v, beta)[0], linear_scan(q, k, beta[..., None] * v)[0])


def test_a_wrong_order_of_decay_and_correction_would_be_seen():
    q, k, v, beta = inputs(6)
    g = decay("step", 2, 2, 6)
    s, outs = torch.zeros(2, 2, 3, 4).double(), []
    for t in range(6):
        # the error against the state before it decays
        error = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k[:, :, t], s)
        s = s * g[:, :, t, None, None].exp() + k[:, :, t, :, None] * (beta[:, :, t, None] * error)[..., None, :]
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    assert (torch.stack(outs, 2) - delta_rule(q, k, v, beta, g)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("rate", [-90.0, float("-inf")])
def test_forgetting_everything_leaves_the_own_value(rate):
    q, k, v, beta = (x.float().requires_grad_() for x in inputs(130))
    g = torch.full((2, 2, 130), rate, requires_grad=True)
    out, _ = delta_rule(q, k, v, beta, g)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * beta[..., None] * v)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, beta, g)))


def test_float32_and_bfloat16_stay_near_float64_over_a_long_sequence():
    q, k, v, beta = inputs(2048, d=16, e=16, batch=1)
    g = 0.05 * decay("step", 1, 2, 2048)
    want, end = delta_rule(q, k, v, beta, g)
    out, state = delta_rule(*(x.float() for x in (q, k, v, beta, g)))
    assert (out - want).norm() / want.norm() < 2e-6
    assert (state.s - end.s).norm() / end.s.norm() < 2e-6
    half = [x.bfloat16() for x in (q, k, v, beta)]
    out, state = delta_rule(*half, g.float())
    assert (out.dtype, state.s.dtype) == (torch.bfloat16, torch.float32)
    want, end = delta_rule(*(x.double() for x in half), g)
    assert (state.s - end.s).norm() / end.s.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_maps_over_a_further_axis_and_compiles_as_one_graph(dtype):
    tensors = [*inputs(9, batch=3), decay("step", 3, 2, 9), *normal((3, 2, 3, 4), seed=5)]
    tensors = [x.to(dtype) for x in tensors]

    def run(q, k, v, beta, g, s0):
        out, state = delta_rule(q, k, v, beta, g, initial_state=ScanState(s0), chunk_size=4)
        return out, state.s

    mapped = torch.func.vmap(lambda *x: tuple(y[0] for y in run(*(t[None] for t in x))))(*tensors)
    torch.testing.assert_close(mapped, run(*tensors))
    tensors = [x.requires_grad_() for x in tensors]
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors)
    torch.testing.assert_close(got, want)
    found, expected = (torch.autograd.grad(x[0].cos().sum() + x[1].sum(), tensors) for x in (got, want))
    torch.testing.assert_close(found, expected)


@built
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(1, 16, 16), (64, 16, 32), (65, 33, 17), (130, 80, 48), (200, 128, 128)])
@pytest.mark.parametrize("kind", DECAYS)
def test_every_instruction_set_equals_float64_forward_and_backward(monkeypatch, isa, size, kind):
    code = native.isa_code(isa)
    monkeypatch.setattr(native, "isa_code", lambda _: code)
    n, d, e = size
    tensors = [x.float() for x in (*inputs(n, 2, 1, d, e), *normal((2, 2, d, e), seed=5))]
    g = decay(kind, 2, 2, n)
    tensors = [*tensors, *(() if g is None else (g.float(),))]
    native.poison(True)
    try:
        for options in ({}, {"key_valid": coin(2, n, p=0.8), "reset": coin(2, n, p=0.05, seed=3)}):
            found = []
            for engine, wide in (("delta:native", torch.float32), ("delta:torch", torch.float64)):
                given = [x.to(wide).requires_grad_() for x in tensors]
                q, k, v, beta, s0, *rest = given
                start = ScanState(s0)
                out, state = delta_rule(q, k, v, beta, *rest, scale=0.7, initial_state=start, engine=engine, **options)
                dout, ds = (x.to(wide) for x in normal(tuple(out.shape), tuple(state.s.shape), seed=9))
                found.append([out, state.s, *torch.autograd.grad((out, state.s), given, (dout, ds))])
            # the gradient of a decay is a sum over all later steps that almost cancels
            limits = [2e-6] * 7 + [2e-5]
            for got, want, limit in zip(*found, limits[: len(found[0])], strict=True):
                assert (got - want).norm() / want.norm().clamp(min=1.0) < limit
    finally:
        native.poison(False)


@built
def test_the_native_way_reads_strided_rows_and_gives_the_same_bits_with_two_threads():
    n = 90
    tensors = [x.float() for x in (*inputs(n, 3, d=16, e=32), decay("step", 2, 3, n))]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    results = []
    for given, threads in ((tensors, 1), (turned, 1), (tensors, 2)):
        given = [x.detach().requires_grad_() for x in given]
        torch.set_num_threads(threads)
        try:
            out, _ = delta_rule(*given, engine="delta:native")
            results.append([out, *torch.autograd.grad(out.sum(), given)])
        finally:
            torch.set_num_threads(1)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@built
def test_second_derivatives_of_the_native_way_are_those_of_the_torch_way():
    tensors = [*inputs(70, d=16, e=16), decay("step", 2, 2, 70)]
    found = []
    for wide in (torch.float32, torch.float64):
        given = [x.to(wide).requires_grad_() for x in tensors]
        out, _ = delta_rule(*given, engine="delta:native" if wide == torch.float32 else "delta:torch")
        first = torch.autograd.grad(out.cos().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(sum(x.sin().sum() for x in first), given))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() / want.norm() < 1e-4


@built
@pytest.mark.parametrize("kind", ["none", "step"])
def test_the_operators_are_sound(kind):
    q, k, v, beta = (x.float() for x in inputs(20, d=16, e=24))
    (s0,) = normal((2, 2, 16, 24), dtype=torch.float32)
    g = None if kind == "none" else decay("step", 2, 2, 20).float()
    segment = coin(2, 20, p=0.2).cumsum(-1)
    tests = ("test_schema", "test_faketensor")
    operators = torch.ops.regard
    torch.library.opcheck(operators.delta_rule_forward.default, (q, k, v, beta, g, s0, segment), test_utils=tests)
    given = (torch.ones_like(v), s0, q, k, v, beta, g, s0, segment)
    torch.library.opcheck(operators.delta_rule_backward.default, given, test_utils=tests)


@built
def test_the_native_way_says_what_it_cannot_run():
    q, k, v, beta = inputs(8)
    with pytest.raises(Unsupported, match="not all float32"):
        delta_rule(q, k, v, beta, engine="delta:native")
    assert kernels.cannot(q.float(), k.float(), v.float()) == []
    assert "bfloat16, not float32" in str(kernels.cannot(q.bfloat16(), k.bfloat16(), v.bfloat16()))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"k": torch.zeros(2, 2, 8, 4)}, ShapeError, "k is"),
        ({"v": torch.zeros(2, 3, 8, 4)}, ShapeError, "q is|v is|beta"),
        ({"v": torch.zeros(2, 2, 7, 4)}, ShapeError, "v is"),
        ({"beta": torch.zeros(2, 2, 7)}, ShapeError, r"beta is .* \(B, H, N\) = \(2, 2, 8\)"),
        ({"log_decay": torch.zeros(3)}, ShapeError, "log_decay is"),
        ({"key_valid": torch.ones(2, 8)}, ShapeError, "key_valid is torch.float32"),
        ({"reset": coin(2, 7)}, ShapeError, "reset is"),
        ({"chunk_size": 0}, OptionError, "at least 1 step"),
        ({"initial_state": ScanState(torch.zeros(2, 2, 4, 4))}, ShapeError, r"\(B, H, D, E\) = \(2, 2, 3, 4\)"),
        ({"engine": "delta:step"}, Unsupported, "not one step"),
        ({"engine": "delta:fpga"}, OptionError, "no engine 'delta:fpga'"),
    ],
)
def test_bad_calls_are_refused_with_the_reason(change, error, text):
    q, k, v, beta = inputs(8)
    with pytest.raises(error, match=text):
        delta_rule(**{"q": q, "k": k, "v": v, "beta": beta, **change})
