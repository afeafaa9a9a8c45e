from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from regard import LightningAttention, OptionError, ShapeError, Unsupported
from regard.engines.scan import linear_scan
from regard.ops.lightning import lightning_decay
from tests.oracles import coin, normal


def layer(**options):
    torch.manual_seed(0)
    return LightningAttention(16, 4, **options).double()


@pytest.mark.parametrize("head_dim", [None, 6])
def test_it_is_activated_projections_a_norm_and_a_gate(head_dim):
    a, (x,) = layer(layer=1, layers=4, head_dim=head_dim), normal((2, 9, 16))
    width = head_dim or 4
    q, k, v = (to(x).view(2, 9, 4, width).transpose(1, 2) for to in (a.to_q, a.to_k, a.to_v))
    i, j = torch.arange(9)[:, None], torch.arange(9)
    powers = lightning_decay(4, 1, 4)[:, None, None] ** (i - j).clamp(min=0) * (j <= i)
    o = (F.silu(q) @ F.silu(k).transpose(-1, -2) * powers) @ v
    o = o.transpose(1, 2).flatten(2)
    rms = o.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(a(x, is_causal=True), (o / rms * (x @ a.to_gate.weight.T)) @ a.to_out.weight.T)


def test_the_norm_has_no_gain_and_leaves_an_rms_of_one():
    a, (x,) = layer(), normal((2, 9, 16))
    assert not list(a.norm.parameters())
    torch.testing.assert_close(a.norm(7 * x).square().mean(-1), torch.ones(2, 9).double())


def test_no_projection_has_a_bias():
    assert all(p.dim() == 2 for p in layer().parameters())


def test_casting_the_layer_leaves_the_decay_exact():
    a = layer(layer=3, layers=4)
    assert a.bfloat16().decay == tuple(lightning_decay(4, 3, 4).tolist())
    assert min(a.decay) > 0.999, "bfloat16 would round these to 1"


@pytest.mark.parametrize("pieces", [(200,), (150, 50), (192, *([1] * 8))])
def test_decoding_after_chunks_equals_the_parallel_form_in_training_and_evaluation(pieces):
    a, (x,) = layer(), normal((1, 200, 16))
    want = a(x, is_causal=True)
    for training in (True, False):
        a.train(training)
        state, outs, at = a.init_state(1), [], 0
        for n in pieces:
            out, state = a.prefill(x[:, at : at + n], state)
            outs.append(out)
            at += n
        torch.testing.assert_close(torch.cat(outs, 1), want[:, :at])
        torch.testing.assert_close(a(x, is_causal=True), want)


def test_the_state_of_a_half_precision_layer_is_float32_and_of_fixed_size():
    a = layer().bfloat16()
    _, state = a.prefill(torch.randn(2, 50, 16).bfloat16(), a.init_state(2))
    assert state.s.dtype == torch.float32
    assert state.size_bytes == a.state_bytes(2, 50) == a.state_bytes(2, 10**6) == 4 * 2 * 4 * 4 * 4


def test_padding_in_front_changes_no_real_row():
    a, (x,) = layer(), normal((1, 6, 16))
    padded = torch.cat((torch.full((1, 3, 16), 7.0).double(), x), 1)
    padding = torch.tensor([[False] * 3 + [True] * 6])
    torch.testing.assert_close(a(padded, padding=padding, is_causal=True)[:, 3:], a(x, is_causal=True))


def scanned(q, k, v):
    return linear_scan(q, k, v, torch.tensor([-0.1, -0.01]))[0]


def table(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def test_timing_training_costs_the_same_a_token_at_any_length():
    best = {}
    # in turns and in processor time, so that a busy machine slows all
    for _ in range(9):
        for run in (scanned, table):
            for n in (1024, 4096):
                q, k, v = (torch.randn(4096 // n, 2, n, 32, requires_grad=True) for _ in range(3))
                start = time.process_time()
                run(q, k, v).sum().backward()
                best[run, n] = min(best.get((run, n), float("inf")), time.process_time() - start)
    assert best[scanned, 4096] / best[scanned, 1024] < 1.5
    assert best[table, 4096] / best[table, 1024] > 2.5


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda a, x: a(x), Unsupported, "causal only: pass is_causal=True"),
        (lambda a, x: a(x, x, is_causal=True), Unsupported, "reads no context"),
        (lambda a, x: a(x[..., :8], is_causal=True), ShapeError, "C = 16"),
        (lambda a, x: a(x, padding=coin(2, 8), is_causal=True), ShapeError, "padding"),
        (lambda a, x: a.prefill(x, a.init_state(3)), ShapeError, "initial state"),
        (lambda a, x: layer(layer=4, layers=4), OptionError, "not one of 4 layers"),
        (lambda a, x: LightningAttention(18, 4), OptionError, "give head_dim="),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(layer(), normal((2, 9, 16))[0])
