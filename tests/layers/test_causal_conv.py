from __future__ import annotations

import pytest
import torch

from regard import OptionError
from regard.layers.causal_conv import CausalConv1d
from tests.oracles import coin, normal


def conv(kernel, bias=True, channels=3):
    torch.manual_seed(kernel)
    return CausalConv1d(channels, kernel, bias=bias).double()


def loop(layer, x, reset=None):
    weight, bias = layer.conv.weight[:, 0], layer.conv.bias
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for back in range(layer.kernel):
                at = t - back
                if at < 0 or (reset is not None and reset[b, at + 1 : t + 1].any()):
                    break
                out[b, t] += weight[:, layer.kernel - 1 - back] * x[b, at]
            if bias is not None:
                out[b, t] += bias
    return out


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_it_sees_the_token_and_those_before(kernel, n, bias):
    layer, (x,) = conv(kernel, bias), normal((2, n, 3))
    torch.testing.assert_close(layer(x), loop(layer, x))


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_taps_do_not_reach_over_a_document_start(kernel, n):
    layer, (x,), reset = conv(kernel), normal((2, n, 3)), coin(2, n, p=0.4)
    torch.testing.assert_close(layer(x, reset=reset), loop(layer, x, reset))


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("cuts", [(), (1,), (2, 3, 4), (5, 8)])
def test_pieces_and_steps_equal_the_whole(kernel, cuts):
    layer, (x,) = conv(kernel), normal((2, 9, 3))
    state, outs = layer.init_state(2), []
    for a, b in zip((0, *cuts), (*cuts, 9), strict=True):
        out, state = layer.prefill(x[:, a:b], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x))
    assert state.seen == 9
    assert state.tail.shape == (2, kernel - 1, 3)
    assert torch.equal(state.tail, x[:, 9 - (kernel - 1) :])


def test_the_old_state_stays_usable():
    layer, (x,) = conv(3), normal((1, 6, 3))
    _, state = layer.prefill(x[:, :3], layer.init_state(1))
    first, _ = layer.prefill(x[:, 3:], state)
    again, _ = layer.prefill(x[:, 3:], state)
    assert torch.equal(first, again)


def test_a_kernel_of_nothing_is_refused():
    with pytest.raises(OptionError, match="at least 1 token, not 0"):
        CausalConv1d(3, 0)
