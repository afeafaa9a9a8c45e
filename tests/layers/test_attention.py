from __future__ import annotations

import pytest
import torch
from torch import nn

import regard
from regard import OptionError, ShapeError, Unsupported, attend
from regard.layers.attention import OpAttention
from regard.layers.feed_forward import SGLU, SwiGLU
from regard.primitives.positions import rope
from tests.oracles import attention, coin, normal

OPTIONS = {"softmax": {}, "sliding_window": {"window": 4}, "sigmoid": {"length": 10}, "softplus_reweight": {}}


def layer(slug="softmax", dim=16, heads=4, **options):
    torch.manual_seed(0)
    return OpAttention(dim, heads, op=regard.op(slug), **{**OPTIONS[slug], **options}).double()


@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2}, {"kv_heads": 1, "head_dim": 6}, {"head_dim": 10, "bias": True}])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_projections_rotation_heads_and_the_op(shape, causal):
    a, (x,) = layer(**shape), normal((2, 7, 16))
    groups, width = shape.get("kv_heads", 4), shape.get("head_dim", 4)
    q, k, v = (
        to(x).view(2, 7, h, width).transpose(1, 2) for to, h in ((a.to_q, 4), (a.to_k, groups), (a.to_v, groups))
    )
    q, k = rope(q, torch.arange(7)), rope(k, torch.arange(7))
    out, _ = attention(q, k, v, allowed=torch.ones(7, 7, dtype=torch.bool).tril() if causal else None)
    torch.testing.assert_close(a(x, is_causal=causal), a.to_out(out.transpose(1, 2).reshape(2, 7, 4 * width)))


def test_it_equals_torch_with_the_same_weights():
    a, (x,) = layer(rotary=False, bias=True), normal((2, 7, 16))
    reference = nn.MultiheadAttention(16, 4, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([to.weight for to in (a.to_q, a.to_k, a.to_v)]))
        reference.in_proj_bias.copy_(torch.cat([to.bias for to in (a.to_q, a.to_k, a.to_v)]))
        reference.out_proj.load_state_dict(a.to_out.state_dict())
    padding = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    want, _ = reference(x, x, x, key_padding_mask=~padding, need_weights=False)
    torch.testing.assert_close(a(x, padding=padding), want)


def test_the_query_key_norm_is_over_the_head_and_before_the_rotation():
    a, (x,) = layer(qk_norm=True), normal((2, 7, 16))
    q, k, v = (to(x).view(2, 7, 4, 4).transpose(1, 2) for to in (a.to_q, a.to_k, a.to_v))
    q, k = (rope(nn.functional.layer_norm(y, (4,)), torch.arange(7)) for y in (q, k))
    torch.testing.assert_close(a(x), a.to_out(attend(q, k, v).transpose(1, 2).flatten(2)))


def test_rotary_base_reaches_the_angles():
    x = normal((1, 7, 16))[0]
    assert not torch.allclose(layer()(x), layer(rotary_base=10.0)(x))


def test_a_context_is_read_without_positions():
    a, (x, context) = layer(context_dim=12), normal((2, 5, 16), (2, 8, 12))
    padding = coin(2, 8) | (torch.arange(8) == 0)
    out = a(x, context, padding=padding)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(a(x, context[:, order], padding=padding[:, order]), out)
    shorter = context.clone()
    shorter[~padding] = 1e3
    torch.testing.assert_close(a(x, shorter, padding=padding), out)


@pytest.mark.parametrize("slug", OPTIONS)
@pytest.mark.parametrize("pieces", [(10,), (1,) * 10, (3, 1, 5, 1), (6, 4)])
def test_prefill_in_any_pieces_equals_the_parallel_form(slug, pieces):
    a, (x,) = layer(slug, kv_heads=2), normal((2, 10, 16))
    want = a(x, is_causal=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            state, outs, at = a.init_state(2), [], 0
            for n in pieces:
                out, state = (a.step if n == 1 else a.prefill)(x[:, at : at + n], state)
                outs.append(out)
                at += n
        torch.testing.assert_close(torch.cat(outs, 1), want)
        assert state.seen == 10


@pytest.mark.parametrize("slug", OPTIONS)
def test_left_padding_changes_no_real_row(slug):
    a, (x,) = layer(slug), normal((1, 6, 16))
    padded = torch.cat((torch.full((1, 3, 16), 7.0).double(), x), 1)
    padding = torch.tensor([[False] * 3 + [True] * 6])
    want = a(x, is_causal=True)
    torch.testing.assert_close(a(padded, padding=padding, is_causal=True)[:, 3:], want)
    out, state = a.prefill(padded[:, :5], a.init_state(1), padding=padding[:, :5])
    rest, _ = a.prefill(padded[:, 5:], state)
    torch.testing.assert_close(torch.cat((out, rest), 1)[:, 3:], want)


@pytest.mark.parametrize("slug", OPTIONS)
def test_document_starts_equal_separate_calls_up_to_rotation(slug):
    # relative rotations are the same in a document that starts later
    a, (x,) = layer(slug), normal((1, 9, 16))
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[:, 4] = True
    out = a(x, reset=reset, is_causal=True)
    torch.testing.assert_close(out[:, :4], a(x[:, :4], is_causal=True))
    torch.testing.assert_close(out[:, 4:], a(x[:, 4:], is_causal=True))


@pytest.mark.parametrize("slug", OPTIONS)
@pytest.mark.parametrize("length", [1, 3, 20])
def test_state_bytes_are_the_bytes_of_the_state(slug, length):
    a = layer(slug, kv_heads=2)
    _, state = a.prefill(torch.randn(3, length, 16).double(), a.init_state(3))
    assert a.state_bytes(3, length) == state.size_bytes


def test_a_window_bounds_the_state():
    a = layer("sliding_window")
    assert a.state_bytes(1, 10) == a.state_bytes(1, 10**5) == a.state_bytes(1, 4)
    assert layer().state_bytes(1, 10**5) == 10**5 * layer().state_bytes(1, 1)


def test_the_rows_of_a_state_can_be_reordered():
    a, (x,) = layer(), normal((2, 6, 16))
    _, state = a.prefill(x[:, :5], a.init_state(2))
    swapped, _ = a.step(x[[1, 0], 5:], state.select(torch.tensor([1, 0])))
    straight, _ = a.step(x[:, 5:], state)
    torch.testing.assert_close(swapped, straight[[1, 0]])


def test_parameters_are_those_of_four_projections():
    a = layer(dim=32, heads=8, kv_heads=2, head_dim=6)
    assert sum(p.numel() for p in a.parameters()) == 2 * 32 * 8 * 6 + 2 * 32 * 2 * 6


def test_a_card_may_set_how_its_op_wants_the_layer():
    assert isinstance(layer("sigmoid").norm_q, nn.LayerNorm)
    assert isinstance(layer("sigmoid", qk_norm=False).norm_q, nn.Identity)
    assert isinstance(layer("softmax").norm_q, nn.Identity)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: layer(heads=4, kv_heads=3), OptionError, "4 query heads cannot share 3 key heads"),
        (lambda: layer(dim=18), OptionError, "give head_dim="),
        (lambda: layer(head_dim=5), OptionError, "even head_dim, not 5"),
        (lambda: layer(heads=0), OptionError, "0 query heads"),
        (lambda: layer(windw=4), OptionError, "has no option 'windw'"),
        (lambda: layer("sliding_window", windoww=4), OptionError, "did you mean 'window'"),
        (lambda: OpAttention(16, 4, op=regard.op("sigmoid")), OptionError, "sigmoid needs length="),
        (lambda: OpAttention(16, 4, op=regard.op("lightning")), Unsupported, "does not decode from keys and values"),
    ],
)
def test_bad_settings_are_refused_at_construction(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda a, x: a(x[0]), ShapeError, r"must be \(B, N, C\) with C = 16"),
        (lambda a, x: a(x[..., :8]), ShapeError, "C = 16"),
        (lambda a, x: a(x, padding=torch.ones(2, 7)), ShapeError, "padding is torch.float32"),
        (lambda a, x: a(x, padding=coin(2, 6)), ShapeError, r"must be bool \(2, 7\)"),
        (lambda a, x: a(x, reset=coin(1, 7)), ShapeError, "reset"),
        (lambda a, x: a(x, x[:1]), ShapeError, "with B = 2"),
        (lambda a, x: a(x, x, is_causal=True), OptionError, "with a context there is no order"),
        (lambda a, x: a(x, x, reset=coin(2, 7)), OptionError, "not of a context"),
        (lambda a, x: a.prefill(x, a.init_state(2), padding=coin(2, 6)), ShapeError, "padding"),
    ],
)
def test_bad_calls_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(layer(), normal((2, 7, 16))[0])


def test_the_feed_forwards_are_their_equations():
    (x,) = normal((2, 3, 8))
    for kind, act in ((SwiGLU, nn.functional.silu), (SGLU, lambda y: y)):
        unit = kind(8, 20).double()
        torch.testing.assert_close(unit(x), (act(x @ unit.gate.weight.T) * (x @ unit.up.weight.T)) @ unit.down.weight.T)
