from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import OptionError, SelectiveTemperature, SelectiveTemperatureAttention, ShapeError
from regard.layers.attention import OpAttention
from regard.primitives.positions import rope
from tests.oracles import attention, normal


def layer(settle=True, **options):
    torch.manual_seed(0)
    made = SelectiveTemperatureAttention(16, 4, **options).double()
    if settle:
        for temperature in made.temperatures.values():
            if temperature.w is not None:
                torch.nn.init.normal_(temperature.w, std=0.4)
            if temperature.alpha is not None:
                torch.nn.init.constant_(temperature.alpha, 0.5)
    return made


def tau(temperature, projected, counts):
    """The definition for one token: projected (H, D), counts a number -> a number a head."""
    gate = 0.0 if temperature.alpha is None else temperature.gate(temperature.alpha) * math.log(max(counts, 1))
    token = (
        torch.zeros(len(projected)).double() if temperature.w is None else (F.silu(projected) * temperature.w).sum(-1)
    )
    if not temperature.per_head:
        token = token.sum().expand(len(projected))
    return token.tanh() + 1 + gate


def expected(layer, x, allowed):
    q, k, v = (
        to(x).view(*x.shape[:2], -1, layer.head_dim).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v)
    )
    counts = allowed.sum(-1)
    q, v = q.clone(), v.clone()
    for name, y in (("q", q), ("v", v)):
        if name in layer.temperatures:
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    y[b, :, t] *= tau(layer.temperatures[name], y[b, :, t], counts[b, t].item())[:, None]
    # the factor belongs to the token, so it is read before the rotation by its place
    q, k = rope(q, torch.arange(x.shape[1])), rope(k, torch.arange(x.shape[1]))
    out, _ = attention(q, k, v, allowed=allowed[:, None])
    return layer.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "options",
    [{}, {"on": ("q",)}, {"on": ("v",)}, {"token": False}, {"position": False}, {"per_head": True}, {"kv_heads": 2},
     {"gate": "double_exp"}, {"gate": "linear"}],
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_attention_of_tokens_scaled_one_by_one(options, causal):
    a, (x,) = layer(**options), normal((2, 7, 16))
    padding = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
    allowed = padding[:, None].expand(2, 7, 7)
    allowed = allowed & torch.ones(7, 7, dtype=torch.bool).tril() if causal else allowed
    torch.testing.assert_close(a(x, padding=padding, is_causal=causal), expected(a, x, allowed))


def test_a_layer_without_the_parts_is_plain_attention():
    a, (x,) = layer(settle=False, gate="linear"), normal((2, 7, 16))
    for temperature in a.temperatures.values():
        torch.nn.init.zeros_(temperature.alpha)
    plain = OpAttention(16, 4, op=regard.softmax_attention).double()
    plain.load_state_dict(a.state_dict(), strict=False)
    torch.testing.assert_close(a(x, is_causal=True), plain(x, is_causal=True), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", ["sigmoid", "double_exp", "linear"])
def test_a_new_layer_starts_near_plain_attention(gate):
    a, (x,) = layer(settle=False, gate=gate), normal((2, 64, 16))
    plain = OpAttention(16, 4, op=regard.softmax_attention).double()
    plain.load_state_dict(a.state_dict(), strict=False)
    assert (a(x, is_causal=True) - plain(x, is_causal=True)).abs().max() < 0.01


def test_scaling_a_query_scales_its_scores():
    q, k, v = normal((1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 3))
    taus = torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0]).double().view(1, 1, 5, 1)
    scores = taus * (q @ k.transpose(-1, -2) / 2)
    torch.testing.assert_close(regard.attend(taus * q, k, v), torch.softmax(scores, -1) @ v)


def test_a_larger_temperature_factor_makes_rows_sharper():
    (scores,) = normal((20, 9))
    entropies = []
    for factor in (0.1, 0.5, 1.0, 2.0, 5.0):
        weights = torch.softmax(factor * scores, -1)
        entropies.append(-(weights * weights.log()).sum(-1))
    assert all((a > b).all() for a, b in pairwise(entropies))


def test_the_first_position_feels_no_position_part():
    a, (x,) = layer(token=False), normal((1, 5, 16))
    plain = OpAttention(16, 4, op=regard.softmax_attention).double()
    plain.load_state_dict(a.state_dict(), strict=False)
    torch.testing.assert_close(a(x, is_causal=True)[:, 0], plain(x, is_causal=True)[:, 0])
    assert not torch.allclose(a(x, is_causal=True)[:, 1], plain(x, is_causal=True)[:, 1])


@pytest.mark.parametrize("pieces", [(1,) * 8, (3, 1, 4), (8,)])
def test_decoding_counts_the_cached_tokens(pieces):
    a, (x,) = layer(kv_heads=2), normal((2, 8, 16))
    state, outs, at = a.init_state(2), [], 0
    for n in pieces:
        out, state = a.prefill(x[:, at : at + n], state)
        outs.append(out)
        at += n
    torch.testing.assert_close(torch.cat(outs, 1), a(x, is_causal=True))


def test_left_padding_is_not_counted():
    a, (x,) = layer(), normal((1, 6, 16))
    padded = torch.cat((torch.full((1, 3, 16), 5.0).double(), x), 1)
    padding = torch.tensor([[False] * 3 + [True] * 6])
    out, state = a.prefill(padded[:, :5], a.init_state(1), padding=padding[:, :5])
    rest, _ = a.prefill(padded[:, 5:], state)
    want = a(x, is_causal=True)
    torch.testing.assert_close(a(padded, padding=padding, is_causal=True)[:, 3:], want)
    torch.testing.assert_close(torch.cat((out, rest), 1)[:, 3:], want)


def test_documents_count_from_their_own_start():
    a, (x,) = layer(), normal((1, 9, 16))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, 4] = True
    out = a(x, reset=reset, is_causal=True)
    torch.testing.assert_close(out[:, :4], a(x[:, :4], is_causal=True))
    torch.testing.assert_close(out[:, 4:], a(x[:, 4:], is_causal=True))


@pytest.mark.parametrize("n", [4, 5, 8])
def test_padding_of_a_context_is_not_counted_whatever_the_number_of_queries(n):
    a, (x, context) = layer(), normal((1, n, 16), (1, 5, 16))
    padded = torch.cat((context, torch.full((1, 3, 16), 5.0).double()), 1)
    padding = torch.tensor([[True] * 5 + [False] * 3])
    torch.testing.assert_close(a(x, padded, padding=padding), a(x, context))


def test_values_are_scaled_where_they_stand_and_not_where_they_are_read():
    a, (x,) = layer(on=("v",), position=False), normal((1, 6, 16))
    # tanh(w . silu(v)) = -1 at token 2 alone takes exactly its value away
    values = a.to_v(x).view(1, 6, 4, 4)
    a.temperatures["v"].w.data.zero_()
    direction = F.silu(values[0, 2])
    others = F.silu(values[0, [0, 1, 3, 4, 5]]).flatten(1)
    free = direction.flatten() - others.T @ torch.linalg.lstsq(others.T, direction.flatten()[:, None]).solution[:, 0]
    a.temperatures["v"].w.data = (-60 * free / (free @ direction.flatten())).view(4, 4)
    q, k = (rope(to(x).view(1, 6, 4, 4).transpose(1, 2), torch.arange(6)) for to in (a.to_q, a.to_k))
    without = values.transpose(1, 2).clone()
    without[:, :, 2] = 0
    want = a.to_out(attention(q, k, without)[0].transpose(1, 2).flatten(2))
    torch.testing.assert_close(a(x), want)
    # and the row of token 2 is not emptied
    assert a(x)[0, 2].abs().max() > 1e-3


def test_gradients_reach_every_new_parameter():
    a, (x,) = layer(settle=False), normal((2, 7, 16))
    a(x, is_causal=True).square().sum().backward()
    for temperature in a.temperatures.values():
        assert temperature.w.grad.abs().max() > 0
        assert temperature.alpha.grad.abs() > 0


def test_the_new_parameters_are_few():
    a = SelectiveTemperatureAttention(512, 8)
    plain = OpAttention(512, 8, op=regard.softmax_attention)
    count, base = (sum(p.numel() for p in m.parameters()) for m in (a, plain))
    assert count - base == 2 * (512 + 1)
    assert (count - base) / base < 0.005


def test_negative_factors_are_allowed_unless_a_least_one_is_set():
    counts = torch.ones(1, 1, 5, dtype=torch.int64)
    (projected,) = normal((1, 2, 5, 4))
    for clamp_min, least in ((None, 0.0), (0.25, 0.25)):
        temperature = SelectiveTemperature(2, 4, clamp_min=clamp_min).double()
        torch.nn.init.constant_(temperature.w, -50.0)
        factors = temperature(projected.abs(), counts)
        assert factors.min() >= least - 1e-9
        assert (factors.min() < 0.1) == (clamp_min is None)


def test_settings_of_the_released_code():
    assert torch.sigmoid(torch.tensor(-7.0)) < 1e-3
    counts = torch.tensor([[[1, 10]]])
    temperature = SelectiveTemperature(1, 2, token=False, gate="double_exp")
    factors = temperature(torch.zeros(1, 1, 2, 2), counts).flatten()
    torch.testing.assert_close(factors, torch.tensor([1.0, 1 + math.exp(-math.exp(2.0)) * math.log(10)]))
    assert math.exp(-math.exp(2.0)) == pytest.approx(6.2e-4, rel=0.01)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: layer(gate="relu"), OptionError, "one of sigmoid, double_exp, linear"),
        (lambda: layer(on=("k",)), OptionError, "names 'q', 'v' or both"),
        (lambda: layer(on=()), OptionError, "names 'q', 'v' or both"),
        (lambda: SelectiveTemperature(4, 4)(torch.zeros(1, 2, 5, 4), torch.ones(1, 1, 5)), ShapeError, "4 heads of 4"),
        (lambda: SelectiveTemperature(4, 4)(torch.zeros(1, 4, 5, 8), torch.ones(1, 1, 5)), ShapeError, "4 heads of 4"),
    ],
)
def test_bad_settings_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
