from __future__ import annotations

import pytest
import torch

from regard import GatedShortConv, OptionError, ShapeError, Unsupported
from tests.oracles import coin, normal


def layer(**options):
    torch.manual_seed(0)
    return GatedShortConv(6, **options).double()


@pytest.mark.parametrize("options", [{}, {"kernel": 1}, {"kernel": 4}, {"expand": 4}])
def test_it_is_a_gate_times_a_convolution(options):
    a, (x,) = layer(**options), normal((2, 9, 6))
    inner = a.up(x)
    weight, kernel = a.conv.conv.weight[:, 0], options.get("kernel", 3)
    want = torch.zeros_like(inner)
    for t in range(9):
        for back in range(min(kernel, t + 1)):
            want[:, t] += weight[:, kernel - 1 - back] * inner[:, t - back]
    want = a.down((x @ a.gate.weight.T + a.gate.bias) * (want + a.conv.conv.bias))
    torch.testing.assert_close(a(x, is_causal=True), want)


def test_it_reaches_its_kernel_and_no_further():
    a, (x,) = layer(kernel=3), normal((1, 9, 6))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(a(x, is_causal=True)[:, 5].sum(), x)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [3, 4, 5]


@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 4)])
@pytest.mark.parametrize("expand", [1, 2])
def test_pieces_equal_the_whole(pieces, expand):
    a, (x,) = layer(expand=expand), normal((2, 9, 6))
    state, outs, at = a.init_state(2), [], 0
    for n in pieces:
        out, state = a.prefill(x[:, at : at + n], state)
        outs.append(out)
        at += n
    torch.testing.assert_close(torch.cat(outs, 1), a(x, is_causal=True))
    assert state.size_bytes == a.state_bytes(2, 9) == a.state_bytes(2, 10**6) == 2 * 2 * 6 * expand * 8


@pytest.mark.parametrize("expand", [1, 2])
def test_padding_in_front_is_the_start_of_the_sequence(expand):
    a, (x,) = layer(expand=expand), normal((1, 6, 6))
    padded = torch.cat((torch.full((1, 3, 6), 7.0).double(), x), 1)
    padding = torch.tensor([[False] * 3 + [True] * 6])
    want = a(x, is_causal=True)
    torch.testing.assert_close(a(padded, padding=padding, is_causal=True)[:, 3:], want)
    out, state = a.prefill(padded[:, :4], a.init_state(1), padding=padding[:, :4])
    rest, _ = a.prefill(padded[:, 4:], state)
    torch.testing.assert_close(torch.cat((out, rest), 1)[:, 3:], want)


def test_documents_are_separate():
    a, (x,) = layer(), normal((1, 9, 6))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, [4, 5]] = True
    out = a(x, reset=reset, is_causal=True)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        torch.testing.assert_close(out[:, start:end], a(x[:, start:end], is_causal=True))


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda a, x: a(x), Unsupported, "softmax does both"),
        (lambda a, x: a(x, x, is_causal=True), Unsupported, "softmax does both"),
        (lambda a, x: a(x[..., :5], is_causal=True), ShapeError, "C = 6"),
        (lambda a, x: a(x, padding=coin(2, 8), is_causal=True), ShapeError, "padding"),
        (lambda a, x: layer(kernel=0), OptionError, "at least 1 token"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(layer(), normal((2, 9, 6))[0])
