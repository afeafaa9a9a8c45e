from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

import regard.engines.scan_chunks
from regard import Causal, Documents, KeyValid, OptionError, ShapeError, SlidingWindow, Unsupported, merge
from regard.engines.scan import ScanState, SoftmaxState, as_scan, linear_scan, softmax_scan
from regard.engines.scan_chunks import chunk_outputs, chunk_states, prefix_states
from tests.oracles import coin, normal, scan

DECAYS = ["none", "head", "step"]


def decay(kind, batch, heads, n, seed=7):
    rate = torch.rand(batch, heads, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"none": None, "head": -rate[0, :, 0], "step": -2 * rate}[kind]


def qkv(n, heads=2, groups=2, d=3, e=4, batch=2, seed=0):
    return normal((batch, heads, n, d), (batch, groups, n, d), (batch, groups, n, e), seed=seed)


def positive(q, k, v):
    return q.abs() + 0.1, k.abs() + 0.1, v


@pytest.mark.parametrize(
    "n, chunk", [(1, 1), (1, 64), (7, 1), (7, 2), (7, 3), (7, 7), (7, 64), (64, 16), (65, 64), (63, 64)]
)
@pytest.mark.parametrize("kind", DECAYS)
def test_every_chunk_size_equals_the_recurrence(n, chunk, kind):
    q, k, v = qkv(n)
    g = decay(kind, 2, 2, n)
    out, state = linear_scan(q, k, v, g, scale=0.5, chunk_size=chunk, engine="scan:torch")
    want, s, _ = scan(q, k, v, g, scale=0.5)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.s, s)
    assert state.z is None
    assert state.seen == n


@pytest.mark.parametrize("engine", ["scan:torch", "scan:reference"])
@pytest.mark.parametrize("divide_by", ["none", "sum", "abs1"])
@pytest.mark.parametrize("kind", DECAYS)
def test_every_option_together_equals_the_recurrence(engine, divide_by, kind):
    n, heads, groups = 23, 4, 2
    q, k, v = positive(*qkv(n, heads, groups))
    g = decay(kind, 2, heads, n)
    valid, reset = coin(2, n), coin(2, n, p=0.15, seed=3)
    states = groups if g is None else heads
    s0, z0 = normal((2, states, 3, 4), (2, states, 3), seed=5)
    start = ScanState(s0, None if divide_by == "none" else z0.abs(), 11)
    out, state = linear_scan(
        q, k, v, g, scale=0.3, divide_by=divide_by, key_valid=valid, reset=reset, initial_state=start, chunk_size=5,
        engine=engine,
    )  # fmt: skip
    want, s, z = scan(q, k, v, g, scale=0.3, divide_by=divide_by, key_valid=valid, reset=reset, s0=s0, z0=z0.abs())
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.s, s[:, :: heads // states])
    if divide_by != "none":
        torch.testing.assert_close(state.z, z[:, :: heads // states])
    assert state.seen == 11 + n


@pytest.mark.parametrize("engine", ["scan:torch", "scan:reference"])
@pytest.mark.parametrize("divide_by", ["none", "sum", "abs1"])
def test_gradients_reach_every_input_the_start_and_the_end(engine, divide_by):
    q, k, v = positive(*qkv(5, 2, 1, 2, 2, 1))
    g = decay("step", 1, 2, 5)
    s0, z0 = normal((1, 2, 2, 2), (1, 2, 2), seed=5)
    inputs = [x.requires_grad_() for x in (q, k, v, g, s0, z0.abs())]

    def run(q, k, v, g, s0, z0):
        start = ScanState(s0, None if divide_by == "none" else z0)
        out, state = linear_scan(
            q, k, v, g, scale=0.4, divide_by=divide_by, initial_state=start, chunk_size=2, engine=engine
        )
        return (out, state.s) if divide_by == "none" else (out, state.s, state.z)

    if divide_by == "none":
        run_none, inputs = lambda q, k, v, g, s0: run(q, k, v, g, s0, None), inputs[:-1]
        assert torch.autograd.gradcheck(run_none, inputs)
        assert torch.autograd.gradgradcheck(run_none, inputs)
    else:
        assert torch.autograd.gradcheck(run, inputs)


def test_gradients_of_a_head_decay_padding_and_resets():
    q, k, v = (x.requires_grad_() for x in qkv(6, 2, 2, 2, 2, 1))
    g = decay("head", 1, 2, 6).requires_grad_()
    valid, reset = (
        torch.tensor([[True, False, True, True, False, True]]),
        torch.tensor([[False, False, True, False, True, False]]),
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v, g: linear_scan(q, k, v, g, key_valid=valid, reset=reset, chunk_size=4)[0], (q, k, v, g)
    )


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("cuts", [(4, 9), (1, 2), (16,), ()])
def test_a_scan_may_be_cut_and_continued_anywhere(kind, cuts):
    q, k, v = positive(*qkv(17, 4, 2))
    g = decay(kind, 2, 4, 17)
    want, end = linear_scan(q, k, v, g, divide_by="sum", chunk_size=4)
    state, outs = None, []
    for a, b in zip((0, *cuts), (*cuts, 17), strict=True):
        piece = g[:, :, a:b] if kind == "step" else g
        out, state = linear_scan(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], piece, divide_by="sum", chunk_size=4, initial_state=state
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    torch.testing.assert_close(state.s, end.s)
    torch.testing.assert_close(state.z, end.z)
    assert state.seen == end.seen == 17


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("engine", [None, "scan:step", "scan:torch", "scan:reference"])
def test_step_by_step_equals_all_at_once_in_float32(kind, engine):
    q, k, v = (x.float() for x in positive(*qkv(200, 2, 2, 8, 8)))
    g = decay(kind, 2, 2, 200)
    g = None if g is None else g.float()
    want, _ = linear_scan(q, k, v, g, divide_by="sum")
    state, outs = None, []
    for t in range(200):
        now = slice(t, t + 1)
        piece = g[:, :, now] if kind == "step" else g
        out, state = linear_scan(
            q[:, :, now], k[:, :, now], v[:, :, now], piece, divide_by="sum", initial_state=state, engine=engine
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want, atol=1e-5, rtol=1e-5)


def test_continuing_leaves_the_old_state_usable():
    q, k, v = qkv(6)
    _, state = linear_scan(q, k, v)
    before = state.s.clone()
    first, _ = linear_scan(q, k, v, initial_state=state)
    again, _ = linear_scan(q, k, v, initial_state=state)
    assert torch.equal(state.s, before)
    assert torch.equal(first, again)


def test_no_output_depends_on_a_later_token():
    q, k, v = (x.requires_grad_() for x in qkv(11))
    g = decay("step", 2, 2, 11).requires_grad_()
    out, _ = linear_scan(q, k, v, g, chunk_size=4)
    for t in range(11):
        for x in torch.autograd.grad(out[:, :, t].sum(), (k, v, g), retain_graph=True):
            assert (x[:, :, t + 1 :] == 0).all()
            assert t == 0 or (x[:, :, t] != 0).any()


@pytest.mark.parametrize("kind", DECAYS)
def test_padding_anywhere_changes_no_real_row(kind):
    n, real = 14, 9
    valid = torch.zeros(2, n, dtype=torch.bool)
    valid[0, [0, 1, 3, 4, 5, 8, 9, 12, 13]], valid[1, -real:] = True, True
    q, k, v = positive(*qkv(n))
    g = decay(kind, 2, 2, n)
    out, state = linear_scan(q, k, v, g, divide_by="sum", key_valid=valid, chunk_size=4)
    for b in range(2):
        alone = [x[b : b + 1, :, valid[b]] for x in (q, k, v)]
        piece = g[b : b + 1, :, valid[b]] if kind == "step" else g
        want, end = linear_scan(*alone, piece, divide_by="sum")
        torch.testing.assert_close(out[b : b + 1, :, valid[b]], want)
        torch.testing.assert_close(state.s[b : b + 1], end.s)
        torch.testing.assert_close(state.z[b : b + 1], end.z)


def test_a_prefix_of_padding_gives_zero_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in positive(*qkv(6)))
    valid = torch.tensor([[False, False, True, True, True, True]])
    out, _ = linear_scan(q, k, v, divide_by="sum", key_valid=valid)
    assert (out[:, :, :2] == 0).all()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert (gradients[0][:, :, :2] == 0).all()
    assert all((g[:, :, :2] == 0).all() and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("starts", [(), (0,), (5,), (1, 2, 8, 13), (4, 8, 12)])
def test_document_starts_equal_one_call_for_each_document(kind, chunk, starts):
    n = 15
    q, k, v = positive(*qkv(n))
    g = decay(kind, 2, 2, n)
    reset = torch.zeros(2, n, dtype=torch.bool)
    reset[:, list(starts)] = True
    s0, z0 = normal((2, 2, 3, 4), (2, 2, 3), seed=5)
    out, state = linear_scan(
        q, k, v, g, divide_by="sum", reset=reset, chunk_size=chunk, initial_state=ScanState(s0, z0.abs())
    )
    edges = sorted({0, *starts, n})
    for a, b in pairwise(edges):
        piece = g[:, :, a:b] if kind == "step" else g
        start = ScanState(s0, z0.abs()) if a == 0 and 0 not in starts else None
        want, end = linear_scan(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], piece, divide_by="sum", initial_state=start)
        torch.testing.assert_close(out[:, :, a:b], want)
    torch.testing.assert_close(state.s, end.s)
    torch.testing.assert_close(state.z, end.z)


def test_nothing_of_an_earlier_document_leaks_not_even_huge_values():
    q, k, v = qkv(8)
    v[:, :, :3] = 1e300
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[:, 3] = True
    out, state = linear_scan(q, k, v, reset=reset, chunk_size=8)
    want, end = linear_scan(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:])
    torch.testing.assert_close(out[:, :, 3:], want)
    torch.testing.assert_close(state.s, end.s)


def test_long_sequences_pass_from_span_to_span(monkeypatch):
    monkeypatch.setattr(regard.engines.scan_chunks, "SPAN", 8)
    monkeypatch.setattr(regard.engines.scan_chunks, "POSITIONS", 8)
    q, k, v = positive(*qkv(30, 4, 2))
    g = decay("step", 2, 4, 30)
    valid, reset = coin(2, 30), coin(2, 30, p=0.1, seed=3)
    s0, z0 = normal((2, 4, 3, 4), (2, 4, 3), seed=5)
    out, state = linear_scan(
        q, k, v, g, divide_by="sum", key_valid=valid, reset=reset, initial_state=ScanState(s0, z0.abs()), chunk_size=3
    )
    want, s, z = scan(q, k, v, g, divide_by="sum", key_valid=valid, reset=reset, s0=s0, z0=z0.abs())
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.s, s)
    torch.testing.assert_close(state.z, z)


@pytest.mark.parametrize("kind", DECAYS)
def test_shared_key_heads_equal_repeated_ones(kind):
    q, k, v = qkv(13, 6, 2)
    g = decay(kind, 2, 6, 13)
    out, state = linear_scan(q, k, v, g, chunk_size=4)
    want, repeated = linear_scan(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), g, chunk_size=4)
    torch.testing.assert_close(out, want)
    # without a decay of its own a query head shares the state of its key head
    assert state.s.shape[1] == (2 if kind == "none" else 6)
    torch.testing.assert_close(state.s.repeat_interleave(6 // state.s.shape[1], 1), repeated.s)


def by_channel(q, k, v, g, *, scale=1.0, key_valid=None, reset=None, s0=None):
    """(out, state) of a scan whose decay g (B, H, N, D) differs by key channel."""
    s = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=k.dtype) if s0 is None else s0
    outs = []
    for t in range(q.shape[2]):
        if reset is not None:
            s = torch.where(reset[:, t, None, None, None], torch.zeros_like(s), s)
        valid = True if key_valid is None else key_valid[:, t, None, None, None]
        new = g[:, :, t, :, None].exp() * s + k[:, :, t, :, None] * v[:, :, t, None]
        s = torch.where(torch.as_tensor(valid), new, s)
        outs.append(scale * torch.einsum("bhd,bhde->bhe", q[:, :, t], s))
    return torch.stack(outs, 2), s


@pytest.mark.parametrize("engine", ["scan:torch", "scan:reference"])
@pytest.mark.parametrize("n, chunk", [(1, 1), (7, 3), (40, 16), (70, 64), (33, 20)])
def test_a_decay_by_key_channel_equals_the_recurrence(engine, n, chunk):
    q, k, v = qkv(n)
    g = -3 * torch.rand(2, 2, n, 3, dtype=torch.float64)
    valid, reset, (s0,) = coin(2, n), coin(2, n, p=0.1, seed=3), normal((2, 2, 3, 4), seed=5)
    for options in ({}, {"key_valid": valid, "reset": reset}):
        out, state = linear_scan(
            q, k, v, g, scale=0.5, chunk_size=chunk, initial_state=ScanState(s0), engine=engine, **options
        )
        want, s = by_channel(q, k, v, g, scale=0.5, s0=s0, **options)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(state.s, s)


def test_a_decay_by_key_channel_never_overflows():
    q, k, v = (x.float().requires_grad_() for x in qkv(130))
    g = torch.full((2, 2, 130, 3), -90.0, requires_grad=True)
    out, _ = linear_scan(q, k, v, g)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, g)))


def test_equal_channels_are_one_decay_a_step():
    q, k, v = qkv(70)
    g = decay("step", 2, 2, 70)
    torch.testing.assert_close(linear_scan(q, k, v, g[..., None].expand(2, 2, 70, 3))[0], linear_scan(q, k, v, g)[0])


def everything(kind, n, *, dtype=torch.float64, wide=3):
    """q, k, v, initial state, decay where there is one."""
    (s0,) = normal((2, 2, wide, 4), seed=5)
    g = decay(kind, 2, 2, n) if kind != "channel" else -2 * torch.rand(2, 2, n, wide, dtype=torch.float64)
    return [x.to(dtype) for x in (*qkv(n, d=wide), s0, *(() if g is None else (g,)))]


def with_state(engine=None, **options):
    def run(q, k, v, s0, g=None):
        out, state = linear_scan(q, k, v, g, initial_state=ScanState(s0), engine=engine, **options)
        return out, state.s

    return run


@pytest.mark.parametrize("kind", [*DECAYS, "channel"])
@pytest.mark.parametrize("chunk", [1, 5, 20, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_all_derivatives_of_the_torch_way_equal_those_of_the_reference(kind, chunk, masked):
    n = 37
    inputs = [x.requires_grad_() for x in everything(kind, n)]
    options = {"key_valid": coin(2, n), "reset": coin(2, n, p=0.1, seed=3)} if masked else {}
    directions = normal(*(tuple(x.shape) for x in inputs), seed=9)
    found = []
    for engine in ("scan:torch", "scan:reference"):
        run = with_state(engine, chunk_size=chunk, **options)
        out, s = run(*inputs)
        first = torch.autograd.grad((out, s), inputs, (out.detach().cos(), s.detach().sin()), create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        second = torch.autograd.grad(along, inputs)
        _, forward = torch.func.jvp(run, tuple(x.detach() for x in inputs), tuple(directions))
        found.append([*first, *second, *forward])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", [*DECAYS, "channel"])
def test_it_maps_over_a_further_axis_and_over_gradients(kind):
    inputs = [x.requires_grad_() for x in everything(kind, 21)]
    run = with_state(chunk_size=8)
    stacked = [torch.stack((x, 0.5 * x)).detach() for x in inputs]
    mapped = torch.func.vmap(run)(*stacked)
    for i in range(2):
        torch.testing.assert_close(tuple(x[i] for x in mapped), run(*(x[i] for x in stacked)))

    def loss(*given):
        return run(*given)[0].cos().sum()

    each = torch.func.vmap(torch.func.grad(loss))(*stacked)
    torch.testing.assert_close(each[0], torch.autograd.grad(loss(*inputs), inputs)[0].detach())
    out = run(*inputs)[0]
    rows = torch.eye(out[0, 0].numel(), dtype=out.dtype).view(-1, *out[0, 0].shape)
    jacobian = torch.autograd.grad(out[0, 0], inputs[0], rows, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(jacobian[-1], torch.autograd.grad(out[0, 0, -1, -1], inputs[0])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_compiles_as_one_graph(dtype):
    inputs = [x.requires_grad_() for x in everything("step", 12, dtype=dtype)]
    run = with_state(chunk_size=8, reset=coin(2, 12, p=0.1, seed=3))
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)
    torch.testing.assert_close(got, want)
    found, expected = (torch.autograd.grad(x[0].cos().sum() + x[1].sum(), inputs) for x in (got, want))
    torch.testing.assert_close(found, expected)


def test_one_tensor_may_stand_for_all_under_compilation():
    (x,) = normal((1, 2, 20, 4))
    got = torch.compile(lambda x: linear_scan(x, x, x)[0], fullgraph=True, backend="aot_eager")(x.requires_grad_())
    torch.testing.assert_close(got, linear_scan(x, x, x)[0])


@pytest.mark.parametrize("seed", range(40))
def test_a_scan_may_be_cut_anywhere_whatever_the_options(seed):
    dice = random.Random(seed)
    n, chunk, heads = dice.randint(2, 150), dice.choice([1, 3, 16, 64]), dice.choice([2, 4])
    kind, dtype = dice.choice(DECAYS), dice.choice([torch.float64, torch.float32])
    q, k, v = (x.to(dtype) for x in positive(*qkv(n, heads, 2, seed=seed)))
    g = decay(kind, 2, heads, n)
    g = None if g is None else g.to(dtype)
    options = {"divide_by": dice.choice(["none", "sum", "abs1"]), "chunk_size": chunk}
    valid = coin(2, n, p=0.8, seed=seed) if dice.random() < 0.5 else None
    reset = coin(2, n, p=0.05, seed=seed + 1) if dice.random() < 0.5 else None

    def run(a, b, state=None):
        masks = {
            "key_valid": None if valid is None else valid[:, a:b],
            "reset": None if reset is None else reset[:, a:b],
        }
        piece = g[:, :, a:b] if kind == "step" else g
        return linear_scan(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], piece, initial_state=state, **masks, **options)

    want, end = run(0, n)
    state, outs = None, []
    cuts = sorted({0, n, *(dice.randint(1, n - 1) for _ in range(3))})
    for a, b in pairwise(cuts):
        out, state = run(a, b, state)
        outs.append(out)
    near = {} if dtype is torch.float64 else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(torch.cat(outs, 2), want, **near)
    torch.testing.assert_close(state.s, end.s, **near)
    assert state.seen == n


def test_the_decay_of_an_earlier_document_gets_no_gradient_and_no_noise():
    q, k, v = qkv(40)
    g = decay("step", 2, 2, 40).requires_grad_()
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, [9, 25]] = True
    out, _ = linear_scan(q, k, v, g, reset=reset, chunk_size=8)
    gradient = torch.autograd.grad(out[:, :, 9:25].sum(), g)[0]
    assert (gradient[:, :, [9, 25]] == 0).all()
    assert (gradient[:, :, 25:] == 0).all()
    assert (gradient[:, :, :9] == 0).all()
    assert (gradient[:, :, 10:24] != 0).any()


@pytest.mark.parametrize("rate", [-90.0, -1e4, float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forgetting_everything_leaves_the_diagonal(rate, dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(200))
    g = torch.full((2, 2, 200), rate, dtype=dtype, requires_grad=True)
    out, state = linear_scan(q, k, v, g)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v)
    torch.testing.assert_close(state.s, k[:, :, -1, :, None] * v[:, :, -1, None])
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v, g)))


def test_a_decay_of_zero_forgets_nothing():
    q, k, v = qkv(13)
    for g in (torch.zeros(2), torch.zeros(2, 2, 13)):
        torch.testing.assert_close(linear_scan(q, k, v, g.double())[0], linear_scan(q, k, v)[0])


@pytest.mark.parametrize("pattern", ["steady", "bursts", "once, then slow"])
def test_float32_keeps_its_digits_whatever_was_forgotten_before(pattern):
    n = 4096
    t = torch.arange(n)
    g = (
        {
            "steady": torch.full((n,), -0.5),
            "bursts": torch.where(t % 64 < 32, -100.0, -0.01),
            "once, then slow": torch.where(t < 3000, -100.0, -0.001),
        }[pattern]
        .double()
        .expand(1, 1, n)
    )
    q, k, v = (x / 4 for x in qkv(n, 1, 1, 16, 16, 1))
    want, end = linear_scan(q, k, v, g)
    out, state = linear_scan(q.float(), k.float(), v.float(), g.float())
    # a sum of log decays in float32 gives 1e-2 in the last case
    assert (out - want).norm() / want.norm() < 2e-6
    assert (state.s - end.s).norm() / end.s.norm() < 2e-6


def bf16_state_error(q, k, v, accumulate):
    """Relative error of the final state when 64-step chunks are added in `accumulate`."""
    exact = k.double().transpose(-1, -2) @ v.double()
    s = torch.zeros(exact.shape, dtype=accumulate)
    for at in range(0, k.shape[2], 64):
        s = s + (k[:, :, at : at + 64].float().transpose(-1, -2) @ v[:, :, at : at + 64].float()).to(accumulate)
    return ((s.double() - exact).norm() / exact.norm()).item()


def test_the_state_of_half_precision_inputs_is_kept_in_float32():
    q, k, v = (x.bfloat16() for x in qkv(4096, 2, 2, 16, 16, 1))
    out, state = linear_scan(q, k, v)
    exact = k.double().transpose(-1, -2) @ v.double()
    assert out.dtype == torch.bfloat16
    assert state.s.dtype == torch.float32
    assert (state.s.double() - exact).norm() / exact.norm() < 1e-3
    assert bf16_state_error(q, k, v, torch.float32) < 1e-3
    assert bf16_state_error(q, k, v, torch.bfloat16) > 1e-3, "the bound must be one that a bf16 state breaks"


def test_a_state_that_is_rounded_between_steps_would_be_seen():
    q, k, v = (x.bfloat16() for x in qkv(512, 2, 2, 16, 16, 1))
    exact = k.double().transpose(-1, -2) @ v.double()
    errors = {}
    for rounding in (torch.float32, torch.bfloat16):
        state = None
        for t in range(512):
            now = slice(t, t + 1)
            _, state = linear_scan(q[:, :, now], k[:, :, now], v[:, :, now], initial_state=state)
            state = state.to(rounding)
        errors[rounding] = ((state.s.double() - exact).norm() / exact.norm()).item()
    assert errors[torch.float32] < 1e-3 < errors[torch.bfloat16]


@pytest.mark.parametrize("divide_by", ["none", "sum", "abs1"])
@pytest.mark.parametrize("n, m", [(7, 7), (3, 10), (10, 3)])
def test_without_order_every_query_reads_the_whole_sum(divide_by, n, m):
    q, k, v = normal((2, 4, n, 3), (2, 2, m, 3), (2, 2, m, 4))
    q, k = q.abs(), k.abs()
    valid = coin(2, m, seed=2)
    out, state = linear_scan(q, k, v, divide_by=divide_by, is_causal=False, key_valid=valid, eps=1e-6)
    table = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * valid[:, None, None]
    total = table.sum(-1, keepdim=True)
    want = (
        table
        @ v.repeat_interleave(2, 1)
        / {"none": 1, "sum": total + 1e-6, "abs1": total.abs().clamp(min=1)}[divide_by]
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state.s, (k * valid[:, None, :, None]).transpose(-1, -2) @ v)


def test_the_three_primitives_compose_to_the_scan():
    q, k, v = qkv(12)
    g = decay("step", 2, 2, 12)
    cut = [x.view(2, 2, 3, 4, -1) for x in (q, k, v)]
    c = g.view(2, 2, 3, 4).cumsum(-1)
    added = chunk_states(cut[1], cut[2], c)
    before, end = prefix_states(added, c[..., -1], None, None)
    own = torch.ones(4, 4, dtype=torch.bool).tril().view(1, 1, 1, 1, 4, 4)
    out = chunk_outputs(cut[0][:, :, None], cut[1], cut[2], c, before, own, None)
    want, s, _ = scan(q, k, v, g)
    torch.testing.assert_close(out.reshape(2, 2, 12, 4), want)
    torch.testing.assert_close(end, s)
    torch.testing.assert_close(before[:, :, 1], added[:, :, 0])


def test_autocast_leaves_the_state_alone():
    q, k, v = (x.float() for x in qkv(40))
    want, end = linear_scan(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = linear_scan(q, k, v)
    assert torch.equal(out, want)
    assert torch.equal(state.s, end.s)


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"divide_by": "max"}, OptionError, "one of none, sum, abs1"),
        ({"chunk_size": 0}, OptionError, "at least 1 step"),
        ({"log_decay": torch.zeros(3)}, ShapeError, r"\(H,\) = \(2,\)"),
        ({"log_decay": torch.zeros(2, 2, 7)}, ShapeError, r"\(B, H, N\) = \(2, 2, 8\)"),
        ({"log_decay": torch.zeros(2), "is_causal": False}, Unsupported, "belong to a causal scan"),
        ({"reset": coin(2, 8), "is_causal": False}, Unsupported, "belong to a causal scan"),
        ({"initial_state": ScanState(torch.zeros(2, 2, 3, 4)), "is_causal": False}, Unsupported, "belong to a causal"),
        ({"reset": coin(2, 7)}, ShapeError, r"bool \(B, N\) = \(2, 8\)"),
        ({"key_valid": coin(2, 7)}, ShapeError, r"bool \(B, M\) = \(2, 8\)"),
        ({"key_valid": torch.ones(2, 8)}, ShapeError, "key_valid is torch.float32"),
        ({"initial_state": ScanState(torch.zeros(2, 2, 4, 4))}, ShapeError, r"\(B, G, D, E\) = \(2, 2, 3, 4\)"),
        ({"initial_state": ScanState(torch.zeros(2, 2, 3, 4)), "divide_by": "sum"}, OptionError, "without a division"),
        ({"engine": "scan:fpga"}, OptionError, "no engine 'scan:fpga'"),
        ({"engine": "scan:step"}, Unsupported, "not one causal step"),
    ],
)
def test_bad_calls_are_refused_with_the_reason(options, error, text):
    q, k, v = qkv(8)
    with pytest.raises(error, match=text):
        linear_scan(q, k, v, **options)


def test_a_causal_scan_of_other_keys_is_refused():
    q, k, v = qkv(8)
    with pytest.raises(Unsupported, match="8 and 6"):
        linear_scan(q, k[:, :, :6], v[:, :, :6])


def test_patterns_become_padding_and_document_starts():
    valid, doc = coin(2, 6), torch.tensor([[0, 0, 3, 3, 3, 4], [1, 1, 1, 1, 1, 1]])
    pattern = Causal() & KeyValid().bind(key_valid=valid) & Documents().bind(doc=doc)
    causal, key_valid, reset = as_scan(pattern, False, "this")
    assert causal
    assert torch.equal(key_valid, valid)
    assert reset[0].nonzero().flatten().tolist() == [2, 5]
    assert not reset[1].any()
    assert as_scan(None, True, "this") == (True, None, None)
    assert as_scan(KeyValid().bind(key_valid=valid), False, "this")[0] is False


@pytest.mark.parametrize(
    "pattern, error, text",
    [
        (Causal() & SlidingWindow(3), Unsupported, "this keeps one state"),
        (Causal(strict=True), Unsupported, "cannot follow"),
        (Causal() | KeyValid().bind(key_valid=coin(1, 4)), Unsupported, "cannot follow"),
        (~Causal(), Unsupported, "cannot follow"),
        (KeyValid(rows=True).bind(key_valid=coin(1, 4)), Unsupported, "cannot follow"),
        (Documents().bind(doc=torch.zeros(1, 4)), Unsupported, r"needs Causal\(\) & Documents"),
        (Causal() & Documents(), OptionError, r"call .bind\(doc="),
        (Causal() & Documents().bind(doc=torch.tensor([[0, 1, 0]])), OptionError, "must not decrease"),
    ],
)
def test_patterns_that_a_state_cannot_follow_are_refused(pattern, error, text):
    with pytest.raises(error, match=text):
        as_scan(pattern, False, "this")


def test_a_pattern_beside_is_causal_is_refused():
    with pytest.raises(OptionError, match="says it twice"):
        as_scan(Causal(), True, "this")


def prefix_softmax(scores, v):
    return torch.stack(
        [torch.softmax(scores[..., : t + 1], -1)[..., None, :] @ v[..., : t + 1, :] for t in range(v.shape[-2])], 2
    ).squeeze(3)


@pytest.mark.parametrize("n", [1, 2, 7, 65, 130])
def test_the_softmax_scan_is_softmax_over_every_prefix(n):
    scores, v = normal((2, 3, n), (2, 3, n, 4))
    out, state = softmax_scan(5 * scores, v)
    torch.testing.assert_close(out, prefix_softmax(5 * scores, v))
    torch.testing.assert_close(state.lse, torch.logsumexp(5 * scores, -1))
    torch.testing.assert_close(state.out, out[:, :, -1])


def test_the_softmax_scan_has_exact_gradients():
    scores, v = (x.requires_grad_() for x in normal((1, 2, 6), (1, 2, 6, 3)))
    valid, reset = torch.tensor([[False, True, True, False, True, True]]), torch.tensor([[False] * 4 + [True, False]])
    assert torch.autograd.gradcheck(lambda s, v: softmax_scan(s, v)[0], (scores, v))
    assert torch.autograd.gradgradcheck(lambda s, v: softmax_scan(s, v)[0], (scores, v))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda s, v: softmax_scan(s, v, key_valid=valid, reset=reset)[0], (scores, v))


def test_the_softmax_scan_hands_over_anywhere():
    scores, v = (x.requires_grad_() for x in normal((2, 3, 11), (2, 3, 11, 4)))
    want, end = softmax_scan(scores, v)
    for cut in (1, 5, 10):
        first, state = softmax_scan(scores[..., :cut], v[..., :cut, :])
        second, last = softmax_scan(scores[..., cut:], v[..., cut:, :], initial_state=state)
        torch.testing.assert_close(torch.cat((first, second), 2), want)
        torch.testing.assert_close(last.lse, end.lse)
        gradient = torch.autograd.grad(second.sum(), (scores, v))
        whole = torch.autograd.grad(want[:, :, cut:].sum(), (scores, v), retain_graph=True)
        for g, w in zip(gradient, whole, strict=True):
            torch.testing.assert_close(g, w)


def test_shifting_all_scores_changes_nothing():
    scores, v = normal((1, 2, 30), (1, 2, 30, 4))
    torch.testing.assert_close(softmax_scan(scores + 123.0, v)[0], softmax_scan(scores, v)[0])


def test_scores_of_ten_thousand_stay_finite_in_float32():
    scores, v = normal((1, 2, 100), (1, 2, 100, 4), dtype=torch.float32)
    scores = (1e4 * scores.sign()).requires_grad_()
    v.requires_grad_()
    out, _ = softmax_scan(scores, v)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.square().sum(), (scores, v))))
    torch.testing.assert_close(out.double(), prefix_softmax(scores.double(), v.double()), atol=2e-3, rtol=0)


def test_early_prefixes_of_small_scores_survive_a_later_large_one():
    # subtracting the maximum over the whole row and cumulating, as some do, makes these prefixes 0 / 0
    scores, v = normal((1, 1, 50), (1, 1, 50, 4), dtype=torch.float32)
    scores[..., 40:] += 500.0
    assert (scores - scores.max()).exp().cumsum(-1)[..., 0] == 0
    torch.testing.assert_close(softmax_scan(scores, v)[0], prefix_softmax(scores, v), atol=1e-4, rtol=1e-4)


def test_float32_noise_of_the_softmax_scan_is_small():
    scores, v = normal((1, 2, 2048), (1, 2, 2048, 8))
    scores = (60 * scores).float()
    out, _ = softmax_scan(scores, v.float())
    assert (out - softmax_scan(scores.double(), v.float().double())[0]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prefix_without_valid_keys_gives_zero_and_no_gradient_in_the_softmax_scan(dtype):
    scores, v = (x.requires_grad_() for x in normal((2, 2, 7), (2, 2, 7, 3), dtype=dtype))
    valid = torch.tensor([[False, False, True, False, True, True, True], [False] * 7])
    out, state = softmax_scan(scores, v, key_valid=valid)
    assert (out[0, :, :2] == 0).all()
    assert (out[1] == 0).all()
    want = prefix_softmax(scores[:1][:, :, valid[0]], v[:1][:, :, valid[0]])
    torch.testing.assert_close(out[:1][:, :, valid[0]], want)
    torch.testing.assert_close(out[0, :, 3], out[0, :, 2])
    gradients = torch.autograd.grad(out.square().sum(), (scores, v))
    assert all(g.isfinite().all() and (g[1] == 0).all() and (g[0][:, ~valid[0]] == 0).all() for g in gradients)
    after, _ = softmax_scan(scores, v, initial_state=state)
    torch.testing.assert_close(after[1:], prefix_softmax(scores, v)[1:])


def test_documents_of_the_softmax_scan_are_separate_calls():
    scores, v = normal((2, 2, 12), (2, 2, 12, 3))
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, [3, 4, 9]] = True
    start = SoftmaxState(*normal((2, 2), (2, 2, 3), seed=3))
    out, state = softmax_scan(scores, v, reset=reset, initial_state=start)
    torch.testing.assert_close(out[:, :, :3], softmax_scan(scores[..., :3], v[:, :, :3], initial_state=start)[0])
    for a, b in ((3, 4), (4, 9), (9, 12)):
        torch.testing.assert_close(out[:, :, a:b], prefix_softmax(scores[..., a:b], v[:, :, a:b]))
    torch.testing.assert_close(state.lse, torch.logsumexp(scores[..., 9:], -1))


def test_the_combination_of_states_is_associative():
    scores, v = normal((1, 2, 9), (1, 2, 9, 4))
    want, end = softmax_scan(scores, v)
    for seed in range(10):
        dice = random.Random(seed)
        line = [(v[:, :, t : t + 1], scores[..., t : t + 1]) for t in range(9)]
        while len(line) > 1:
            at = dice.randrange(len(line) - 1)
            line[at : at + 2] = [merge(*zip(*line[at : at + 2], strict=True))]
        torch.testing.assert_close(line[0][0], want[:, :, -1:], atol=1e-12, rtol=0)
        torch.testing.assert_close(line[0][1][..., 0], end.lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("valid", [coin(2, 6), torch.ones(2, 7)])
def test_padding_of_the_wrong_kind_is_refused_by_the_softmax_scan(valid):
    scores, v = normal((2, 2, 7), (2, 2, 7, 3))
    with pytest.raises(ShapeError, match="key_valid"):
        softmax_scan(scores, v, key_valid=valid)
