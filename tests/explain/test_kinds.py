"""Kinds of heads are found where they were built in, and not where nothing is."""

import pytest
import torch

import regard
from regard import HeadKinds, OptionError, Unsupported, head_kinds
from regard import record as record_of
from regard.hosts.transformers.specimens import make
from tests.explain.induction_model import COPYING, DUPLICATE, PREVIOUS, induction_model


def test_heads_that_were_built_are_told_by_kind():
    found = head_kinds(induction_model(), period=24)
    assert found.heads("previous") == [PREVIOUS]
    assert found.heads("induction") == [COPYING]
    assert found.heads("duplicate") == [DUPLICATE]
    assert found.previous[PREVIOUS] > 0.99 and found.induction[COPYING] > 0.95
    # it looks at the same token twice: at itself and at the first time
    assert found.duplicate[DUPLICATE] == pytest.approx(0.5, abs=0.01)
    for kind, own, uniform in zip(
        ("previous", "duplicate", "induction"), (PREVIOUS, DUPLICATE, COPYING), found.uniform, strict=True
    ):
        rest = getattr(found, kind).clone()
        rest[own] = 0
        assert rest.max() < 4 * uniform


def test_a_head_that_looks_at_all_alike_gets_the_uniform_share():
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    found = head_kinds(model, period=10)
    for kind, uniform in zip(("previous", "duplicate", "induction"), found.uniform, strict=True):
        torch.testing.assert_close(getattr(found, kind), torch.full((3, 4), uniform), rtol=1e-4, atol=1e-6)


def test_scores_are_the_means_of_single_weights():
    model = make("llama")
    found = head_kinds(model, period=6, rows=2, tokens=range(10, 40), begin=1, seed=3)
    generator = torch.Generator().manual_seed(3)
    once = torch.stack([torch.arange(10, 40)[torch.randperm(30, generator=generator)[:6]] for _ in range(2)])
    ids = torch.cat((torch.ones(2, 1, dtype=torch.long), once, once), 1)
    weights = record_of(model, ids)["weights", 1]
    for kind, rows, back in (
        ("previous", range(1, 13), 1),
        ("duplicate", range(7, 13), 6),
        ("induction", range(7, 13), 5),
    ):
        wanted = torch.stack([weights[:, :, i, i - back] for i in rows]).mean((0, 1))
        torch.testing.assert_close(getattr(found, kind)[1], wanted)


def test_the_same_seed_gives_the_same_scores_and_another_others():
    model = make("gpt2")
    a, b, c = (head_kinds(model, period=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.induction, b.induction) and not torch.equal(a.induction, c.induction)


def test_encoders_are_read_too():
    found = head_kinds(make("bert"), period=8)
    # a begin, and twice eight, all of them seen
    assert found.uniform[0] == pytest.approx(1 / 17) and found.previous.shape == (3, 4)


def test_tiny_lm_has_heads_of_both_kinds_that_induction_needs():
    model, _ = regard.tiny.lm()
    found = head_kinds(model, period=20, rows=2, tokens=range(256))
    layers = {layer for layer, _ in found.heads("induction")}
    assert layers == {1} and len(found.heads("induction")) == 4
    assert [layer for layer, _ in found.heads("previous")] == [0]
    assert found.induction[2].max() < 3 * found.uniform[2]


def test_the_figure_has_a_panel_for_each_kind():
    some = torch.rand(2, 3)
    figure = HeadKinds(some, some, some, (0.1, 0.1, 0.1), 5).figure()
    assert len(figure.data) == 3 and all(trace.z.shape == (2, 3) for trace in figure.data)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"period": 1}, "at least 2 and 1"),
        ({"rows": 0}, "at least 2 and 1"),
        ({"tokens": [5]}, "at least 2 ids below 60"),
        ({"tokens": [5, 60]}, "at least 2 ids below 60"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        head_kinds(make("llama"), **options)


def test_unknown_kinds_and_hosts_are_refused():
    some = torch.rand(2, 3)
    with pytest.raises(OptionError, match="there is no kind 'copying'"):
        HeadKinds(some, some, some, (0.1, 0.1, 0.1), 5).heads("copying")
    model = torch.nn.Linear(2, 2)
    model.config = make("llama").config
    model.device = torch.device("cpu")
    with pytest.raises(Unsupported, match="no host knows a torch"):
        head_kinds(model)
