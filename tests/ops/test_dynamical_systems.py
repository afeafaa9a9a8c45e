from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import (
    Causal,
    KeyValid,
    OptionError,
    ShapeError,
    Unsupported,
    linear_attention,
    normalised_linear_attention,
    normalised_linear_attention_step,
)
from regard.bench.recall.zoology import MQAR
from regard.bench.training import Recipe, train
from regard.layers.scanning import ScanMixer
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from tests.oracles import attention, coin, normal

ETA = {"exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid}


def inputs(n=9, m=9):
    return normal((2, 4, n, 5), (2, 2, m, 5), (2, 2, m, 6), (2, 4, n))


def expected(q, k, v, logit, kind, allowed=None):
    phi = [F.elu(x) + 1 for x in (q, k)]
    return attention(*phi, v, allowed=allowed, scale=1.0, weigh=lambda s: s)[0] / ETA[kind](logit)[..., None]


@pytest.mark.parametrize("kind", ETA)
@pytest.mark.parametrize("n, m, causal", [(9, 9, True), (9, 9, False), (4, 7, False), (1, 1, True), (70, 70, True)])
def test_the_sum_is_divided_by_a_number_of_the_asking_token(n, m, causal, kind):
    q, k, v, logit = inputs(n, m)
    allowed = Causal().dense(n, m) if causal else None
    out = normalised_linear_attention(q, k, v, logit, kind=kind, is_causal=causal)
    torch.testing.assert_close(out, expected(q, k, v, logit, kind, allowed))


def test_with_the_sum_of_weights_as_eta_it_is_linear_attention():
    q, k, v, _ = inputs()
    phi_q, phi_k = F.elu(q) + 1, (F.elu(k) + 1).repeat_interleave(2, 1)
    total = (phi_q * phi_k.cumsum(2)).sum(-1)
    out = normalised_linear_attention(q, k, v, total.log(), is_causal=True)
    torch.testing.assert_close(out, linear_attention(q, k, v, is_causal=True, eps=0.0))


def test_hidden_keys_and_steps():
    q, k, v, logit = inputs()
    pattern = Causal() & KeyValid().bind(key_valid=coin(2, 9))
    out = normalised_linear_attention(q, k, v, logit, pattern=pattern)
    torch.testing.assert_close(out, expected(q, k, v, logit, "exp", pattern.dense(9, 9)))
    whole = normalised_linear_attention(q, k, v, logit, is_causal=True, kind="softplus")
    state, outs = None, []
    for t in range(9):
        part = [x[:, :, t : t + 1] for x in (q, k, v, logit)]
        out, state = normalised_linear_attention_step(*part, kind="softplus", state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole)
    assert state.s.shape == (2, 2, 5, 6) and state.z is None


@pytest.mark.parametrize("kind", ETA)
def test_gradients_are_those_of_finite_differences(kind):
    q, k, v, logit = (x.requires_grad_() for x in normal((1, 2, 4, 3), (1, 1, 4, 3), (1, 1, 4, 2), (1, 2, 4)))

    def run(*tensors):
        return normalised_linear_attention(*tensors, kind=kind, is_causal=True)

    assert torch.autograd.gradcheck(run, (q, k, v, logit))


@pytest.mark.parametrize("kind", ETA)
@pytest.mark.parametrize("value", [-1e4, -80.0, 80.0, 1e4])
def test_no_logit_makes_a_result_that_is_not_a_number(kind, value):
    q, k, v, _ = inputs()
    q, k, v = (x.float().requires_grad_() for x in (q, k, v))
    logit = torch.full((2, 4, 9), value, requires_grad=True)
    hidden = KeyValid().bind(key_valid=torch.zeros(2, 9, dtype=torch.bool))
    out = normalised_linear_attention(q, k, v, logit, kind=kind, pattern=Causal() & hidden)
    assert (out == 0).all()
    if value > 0:
        out = normalised_linear_attention(q, k, v, logit, kind=kind, is_causal=True)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v, logit)))


def test_what_does_not_fit_is_refused():
    q, k, v, logit = inputs()
    with pytest.raises(OptionError, match="exp, softplus, sigmoid"):
        normalised_linear_attention(q, k, v, logit, kind="relu")
    with pytest.raises(ShapeError, match="eta_logit"):
        normalised_linear_attention(q, k, v, logit[:, :, :4])
    with pytest.raises(Unsupported, match="as many queries as keys"):
        normalised_linear_attention(*inputs(4, 7), is_causal=True)


class Normalised(ScanMixer):
    """Projections around the op; the number is a projection of the token."""

    def __init__(self, dim, heads, kind):
        width = dim // heads
        super().__init__(dim, heads, feature_dim=width, value_dim=None, feature_size=width, divided=False)
        self.to_eta, self.kind = nn.Linear(dim, heads), kind

    def _run(self, x, state, padding, reset):
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        if self.kind == "sum":
            out = linear_attention(q, k, v, is_causal=True)
        else:
            out = normalised_linear_attention(q, k, v, self.to_eta(x).transpose(1, 2), kind=self.kind, is_causal=True)
        return self.read_out(out.transpose(1, 2).flatten(2), x), state


@pytest.mark.slow
def test_normalised_attention_recalls(tmp_path, record):
    task = MQAR(256, 64, 8)
    recipe = Recipe(1000, 64, 1e-2, 0, "accuracy", "recall", 256, 1000, early_stop=True)
    figures = {}
    for kind in ("exp", "softplus", "sum"):
        torch.manual_seed(0)
        model = SequenceModel(
            SequenceSettings(vocab=256, dim=64, depth=2, heads=4, mixer=("short_conv", "linear"), hidden=0)
        )
        model.blocks[1].mixer = Normalised(64, 4, kind)
        outcome = train(model, task, recipe, checkpoint=tmp_path / kind)
        figures[kind] = {"accuracy": outcome.value, "steps": outcome.steps}
    task_words = "MQAR vocab 256, length 64, 8 pairs, width 64, 4 heads; 64 rows a step, lr 1e-2, at most 1000 steps"
    record({"task": task_words, "chance": task.chance, **figures})
    assert figures["exp"]["accuracy"] >= 0.95, figures
    assert figures["softplus"]["accuracy"] >= 0.95, figures
