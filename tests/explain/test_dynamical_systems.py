from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import (
    DSF,
    OptionError,
    ShapeError,
    Unsupported,
    as_dynamical_system,
    gated_recurrence,
    lightning_attention,
    linear_attention,
    normalised_linear_attention,
    selective_state_space,
    sigmoid_attention,
    softmax_attention,
    taylor_linear_attention,
)
from regard.contract.card import OpCard
from regard.contract.catalogue import catalogue
from regard.primitives.feature_maps import elu1
from regard.primitives.mixing_matrix import mixing_matrix
from tests.oracles import normal

# every op that keeps a state of fixed size, also those that come later
STATEFUL = [
    name
    for name, e in catalogue().items()
    if isinstance(e.card, OpCard) and e.card.decode == "state" and e.room == "ops"
]


def qk(n=9, d=3):
    return normal((2, 4, n, d), (2, 2, n, d))


def extra(name, n=9):
    return {"eta_logit": normal((2, 4, n))[0]} if "dynamical_systems" in name else {}


@pytest.mark.parametrize("name", STATEFUL)
def test_the_matrix_of_every_linear_op_gives_its_output(name):
    op, (q, k) = regard.get(name), qk()
    (v,) = normal((2, 2, 9, 5), seed=1)
    system = as_dynamical_system(op, q, k, options=extra(name))
    matrix = system.mixing_matrix()
    out = op(q, k, v, is_causal=True, **op.card.options, **extra(name))
    torch.testing.assert_close(matrix @ v.repeat_interleave(2, 1), out)
    columns = mixing_matrix(op, q, k, 4, is_causal=True, **op.card.options, **extra(name))
    torch.testing.assert_close(matrix, columns)


def test_there_are_such_ops():
    assert {"linear", "lightning", "based", "flow", "ops/dynamical_systems"} <= set(STATEFUL)


@pytest.mark.parametrize("name", STATEFUL)
def test_blocks_below_the_diagonal_have_at_most_the_rank_of_the_state(name):
    q, k = qk(16, 2)
    system = as_dynamical_system(regard.get(name), q, k, options=extra(name, 16))
    matrix = system.mixing_matrix()
    for cut in (4, 8, 12):
        ranks = torch.linalg.matrix_rank(matrix[:, :, cut:, :cut], rtol=1e-9)
        assert (ranks <= system.state_size).all()
    if system.state_size < 4:
        assert (torch.linalg.matrix_rank(matrix[:, :, 8:, :8], rtol=1e-9) == system.state_size).all()


@pytest.mark.parametrize("slug, size", [("linear", 4), ("lightning", 4), ("based", 1 + 4 + 10), ("flow", 4)])
def test_layers_are_read_from_their_tokens(slug, size):
    torch.manual_seed(0)
    layer = regard.mixer(slug, 16, 4, **({"feature_dim": 4} if slug == "based" else {}))
    (x,) = normal((2, 7, 16), dtype=torch.float32)
    before = {name: w.clone() for name, w in layer.state_dict().items()}
    system = as_dynamical_system(layer, x)
    assert system.state_size == size
    v = layer.to_v(x).unflatten(-1, (4, -1)).transpose(1, 2)
    mixed = (system.mixing_matrix().float() @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.read_out(mixed, x), layer(x, is_causal=True), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(w, before[name]) for name, w in layer.state_dict().items())


def test_learned_rotations_of_a_layer_count_from_the_first_token():
    layer = regard.mixer("lightning", 8, 2, lrpe=True)
    (x,) = normal((1, 6, 8), dtype=torch.float32)
    v = layer.to_v(x).unflatten(-1, (2, -1)).transpose(1, 2)
    system = as_dynamical_system(layer, x)
    mixed = (system.mixing_matrix().float() @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.read_out(mixed, x), layer(x, is_causal=True), rtol=1e-4, atol=1e-5)


def test_the_transition_of_a_decay_is_the_decay_and_its_memory_is_finite():
    q, k = qk(12)
    decay = (0.5, 0.7, 0.9, 1.0)
    system = as_dynamical_system(lightning_attention, q, k, options={"decay": decay})
    assert system.transition.shape == (2, 4, 12, 1)
    spectrum = system.decay_spectrum()
    assert spectrum.shape == (2, 4, 12, 3)
    torch.testing.assert_close(spectrum[0, :, 5, 0], torch.tensor(decay).double())
    memory = system.effective_memory(0.1)
    assert memory.dtype == torch.int64
    for head, factor in enumerate(decay):
        for i in range(12):
            assert memory[1, head, i] == sum(factor ** (i - j) >= 0.1 for j in range(i + 1))


def test_the_spectrum_is_sorted_and_memory_is_that_of_the_slowest_channel():
    transition = torch.tensor([0.1, -0.9, 0.5]).double().expand(1, 1, 4, 3)
    ones = torch.ones(1, 1, 4, 3, dtype=torch.float64)
    system = DSF(transition, ones, ones)
    torch.testing.assert_close(system.decay_spectrum()[0, 0, 2], torch.tensor([0.9, 0.5, 0.1]).double())
    assert system.effective_memory(0.85)[0, 0].tolist() == [1, 2, 2, 2]
    assert system.effective_memory(1e-9)[0, 0].tolist() == [1, 2, 3, 4]


def test_a_normaliser_in_the_recurrence_telescopes_and_leaves_the_matrix_alone():
    q, k = qk()
    system = as_dynamical_system(linear_attention, q, k, options={"eps": 0.0})
    torch.testing.assert_close(system.transition, torch.ones_like(system.transition))
    eta = (elu1(q) * elu1(k).repeat_interleave(2, 1).cumsum(2)).sum(-1)
    inside = system.rescaled(eta)
    torch.testing.assert_close(inside.mixing_matrix(), system.mixing_matrix())
    torch.testing.assert_close(inside.outputs, elu1(q))
    for i, j in ((8, 2), (5, 4), (3, 0)):
        product = inside.transition[:, :, j + 1 : i + 1, 0].prod(-1)
        torch.testing.assert_close(product, eta[:, :, j] / eta[:, :, i])
    torch.testing.assert_close(system.mixing_matrix().sum(-1), torch.ones(2, 4, 9).double())


def test_normalised_attention_divides_rows():
    q, k = qk()
    (logit,) = normal((2, 4, 9))
    plain = as_dynamical_system(normalised_linear_attention, q, k, options={"eta_logit": torch.zeros_like(logit)})
    divided = as_dynamical_system(normalised_linear_attention, q, k, options={"eta_logit": logit, "kind": "softplus"})
    torch.testing.assert_close(divided.mixing_matrix(), plain.mixing_matrix() / F.softplus(logit)[..., None])
    torch.testing.assert_close(plain.inputs, elu1(k).repeat_interleave(2, 1))


def s6_by_loops(delta, a, b, c, u):
    out = torch.zeros_like(u)
    for row in range(u.shape[0]):
        for channel in range(u.shape[1]):
            h = torch.zeros(a.shape[1], dtype=torch.float64)
            for t in range(u.shape[2]):
                step = delta[row, channel, t]
                h = torch.exp(-step * a[channel]) * h + step * b[row, t] * u[row, channel, t]
                out[row, channel, t] = (c[row, t] * h).sum()
    return out


def test_a_selective_state_space_is_its_recurrence():
    delta, a, b, c, u = normal((2, 3, 7), (3, 4), (2, 7, 4), (2, 7, 4), (2, 3, 7))
    delta, a = F.softplus(delta), a.abs()
    matrix = selective_state_space(delta, a, b, c).mixing_matrix()
    torch.testing.assert_close((matrix @ u[..., None])[..., 0], s6_by_loops(delta, a, b, c, u))


def test_without_decay_it_is_linear_attention_with_keys_scaled_by_the_step():
    delta, b, c = normal((1, 1, 8), (1, 8, 4), (1, 8, 4))
    delta = 1e-3 * F.softplus(delta)
    system = selective_state_space(delta, torch.zeros(1, 4), b, c)
    keys = (delta[..., None] * b[:, None]).double()
    want = lightning_attention(c[:, None], keys, torch.eye(8).double()[None, None], decay=(1.0,), is_causal=True)
    torch.testing.assert_close(system.mixing_matrix(), want)


def test_a_gated_recurrence_is_its_recurrence():
    rate, recurrence, gate, u = normal((3,), (2, 3, 7), (2, 3, 7), (2, 3, 7))
    system = gated_recurrence(rate, recurrence, gate, sharpness=2.0)
    h, outs = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(7):
        lam = torch.sigmoid(-rate) ** (2.0 * torch.sigmoid(recurrence[:, :, t]))
        h = lam * h + (1 - lam**2).sqrt() * torch.sigmoid(gate[:, :, t]) * u[:, :, t]
        outs.append(h)
    torch.testing.assert_close((system.mixing_matrix() @ u[..., None])[..., 0], torch.stack(outs, -1))
    assert system.state_size == 1


def test_softmax_is_the_limit_of_polynomials():
    q, k = qk(8, 3)
    # |a| <= 1
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    want = mixing_matrix(softmax_attention, q, k, 8, is_causal=True, scale=1.0)
    errors = []
    for order in range(7):
        system = as_dynamical_system(softmax_attention, q, k, order=order, options={"scale": 1.0})
        assert system.state_size == math.comb(3 + order, order)
        errors.append((system.mixing_matrix() - want).abs().sum(-1).max().item())
    assert all(later < earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 1e-3
    second = as_dynamical_system(softmax_attention, q, k, order=2)
    based = as_dynamical_system(taylor_linear_attention, q, k)
    torch.testing.assert_close(second.mixing_matrix(), based.mixing_matrix())


def test_what_has_no_such_form_is_refused():
    q, k = qk()
    with pytest.raises(OptionError, match="pass order="):
        as_dynamical_system(softmax_attention, q, k)
    with pytest.raises(OptionError, match="at least 0, not -1"):
        as_dynamical_system(softmax_attention, q, k, order=-1)
    with pytest.raises(OptionError, match="scale alone, not mask"):
        as_dynamical_system(softmax_attention, q, k, order=2, options={"mask": torch.ones(9, 9, dtype=torch.bool)})
    with pytest.raises(Unsupported, match="inline has no causal state space form: it is not causal"):
        as_dynamical_system(regard.op("inline"), q, k)
    with pytest.raises(Unsupported, match="sigmoid has no causal state space form: its state grows"):
        as_dynamical_system(sigmoid_attention, q, k, options={"length": 9})
    with pytest.raises(OptionError, match="order is the degree of softmax's polynomial"):
        as_dynamical_system(linear_attention, q, k, order=2)
    with pytest.raises(OptionError, match="pattern cannot be given"):
        as_dynamical_system(linear_attention, q, k, options={"pattern": regard.Causal()})
    with pytest.raises(OptionError, match="pass eta_logit in options"):
        as_dynamical_system(normalised_linear_attention, q, k)
    with pytest.raises(Unsupported, match="ops with a card"):
        as_dynamical_system(lambda q, k, v: v, q, k)
    for bad in (None, k[:, :, :4]):
        with pytest.raises(ShapeError, match="must be"):
            as_dynamical_system(linear_attention, q, bad)
    with pytest.raises(ShapeError, match="at least one step"):
        as_dynamical_system(linear_attention, q[:, :, :0], k[:, :, :0])
    x = torch.zeros(1, 3, 16)
    with pytest.raises(Unsupported, match="Aaren has no causal state space form"):
        as_dynamical_system(regard.mixer("aaren", 16, 4), x)
    with pytest.raises(OptionError, match="from its tokens alone"):
        as_dynamical_system(regard.mixer("linear", 16, 4), x, order=2)
    with pytest.raises(ShapeError, match="C = 16"):
        as_dynamical_system(regard.mixer("linear", 16, 4), x[..., :5])


def test_a_system_whose_parts_do_not_fit_is_refused():
    ones = torch.ones(1, 2, 4, 3)
    for parts in ((ones[..., :2], ones, ones), (ones, ones, ones[:, :1]), (ones, ones, ones, ones)):
        with pytest.raises(ShapeError, match=r"\(B, H, N, S\)"):
            DSF(*parts)
    system = DSF(ones, ones, ones, ones[..., 0])
    torch.testing.assert_close(system.mixing_matrix().diagonal(dim1=-2, dim2=-1), torch.full((1, 2, 4), 4.0))
    with pytest.raises(OptionError, match=r"in \(0, 1\]"):
        system.effective_memory(0.0)
    with pytest.raises(ShapeError, match=r"\(B, H, N\)"):
        system.rescaled(ones)


def test_the_figure_shows_the_matrix_and_what_is_kept():
    pytest.importorskip("plotly")
    n = 6
    system = selective_state_space(*normal((2, 10, n), (10, 3), (2, n, 3), (2, n, 3)))
    figure = system.figure(row=1)
    assert len(figure.data) == 2 * 8
    matrix, kept = figure.data[2 * 3].z, figure.data[2 * 3 + 1].z
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    assert torch.equal(torch.tensor(matrix).isnan(), ~seen)
    assert torch.equal(torch.tensor(matrix)[seen], system.mixing_matrix()[1, 3][seen])
    assert torch.equal(torch.tensor(kept), system.decay_spectrum()[1, 3].T)
    with pytest.raises(OptionError, match="row is 0 to 1"):
        system.figure(row=2)
