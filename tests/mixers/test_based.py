from __future__ import annotations

import warnings

import pytest
import torch

import regard
from regard import OptionError, TaylorLinearAttention, Unsupported
from tests.oracles import attention, normal


def layer(**options):
    torch.manual_seed(0)
    return TaylorLinearAttention(16, 4, **{"feature_dim": 3, **options}).double()


@pytest.mark.parametrize("head_dim", [None, 6])
def test_it_is_narrow_projections_without_positions(head_dim):
    a, (x,) = layer(head_dim=head_dim), normal((2, 9, 16))
    q, k, v = (to(x).unflatten(-1, (4, -1)).transpose(1, 2) for to in (a.to_q, a.to_k, a.to_v))
    assert q.shape[-1] == 3

    def row(s):
        return (1 + s + s**2 / 2) / (1 + s + s**2 / 2).sum()

    o, _ = attention(q, k, v, allowed=torch.ones(9, 9, dtype=torch.bool).tril(), weigh=row)
    torch.testing.assert_close(a(x, is_causal=True), a.to_out(o.transpose(1, 2).flatten(2)))


def test_no_projection_has_a_bias():
    assert all(p.dim() == 2 for p in layer().parameters())


def test_earlier_tokens_may_change_places():
    # a mixer without positions sees a set
    a, (x,) = layer(), normal((1, 9, 16))
    order = torch.tensor([3, 1, 0, 7, 2, 4, 6, 5, 8])
    torch.testing.assert_close(a(x[:, order], is_causal=True)[:, -1], a(x, is_causal=True)[:, -1])


@pytest.mark.parametrize("pieces", [(140,), (130, 10), (135, 1, 1, 1, 1, 1)])
def test_prefill_and_steps_equal_the_parallel_form(pieces):
    a, (x,) = layer(), normal((2, 140, 16))
    state, outs, at = a.init_state(2), [], 0
    for n in pieces:
        out, state = a.prefill(x[:, at : at + n], state)
        outs.append(out)
        at += n
    torch.testing.assert_close(torch.cat(outs, 1), a(x, is_causal=True))


@pytest.mark.parametrize("feature_dim, features", [(3, 10), (8, 45), (16, 153)])
def test_the_state_holds_the_features_times_the_width_and_one(feature_dim, features):
    a = layer(feature_dim=feature_dim).bfloat16()
    _, state = a.prefill(torch.randn(2, 5, 16).bfloat16(), a.init_state(2))
    assert state.s.dtype == torch.float32
    assert state.size_bytes == a.state_bytes(2, 5) == a.state_bytes(2, 10**6) == 2 * 4 * features * (4 + 1) * 4


def test_wide_features_are_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(feature_dim=32)
    with pytest.warns(UserWarning, match="feature_dim 33 makes a state of 595 keys"):
        layer(feature_dim=33)


def test_the_window_beside_it_is_exact_and_refuses_nothing_less_than_a_key():
    torch.manual_seed(0)
    window, (x,) = regard.mixer("sliding_window", 16, 4, window=9).double(), normal((2, 9, 16))
    full = regard.mixer("softmax", 16, 4).double()
    full.load_state_dict(window.state_dict())
    torch.testing.assert_close(window(x, is_causal=True), full(x, is_causal=True))
    # a window counts keys with the own one, so that is how many the cache must hold
    assert window.state_bytes(1, 10**5) == full.state_bytes(1, 9)
    with pytest.raises(OptionError, match="at least 1 key"):
        regard.mixer("sliding_window", 16, 4, window=0)(x.float(), is_causal=True)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda a, x: a(x), Unsupported, "causal only"),
        (lambda a, x: a(x, x, is_causal=True), Unsupported, "reads no context"),
        (lambda a, x: layer(feature_dim=0), OptionError, "at least 1, not 0"),
        (lambda a, x: TaylorLinearAttention(18, 4), OptionError, "give head_dim="),
        (lambda a, x: TaylorLinearAttention(16, 0), OptionError, "0 heads"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(layer(), normal((2, 9, 16))[0])
