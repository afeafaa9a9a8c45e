"""Rules on scores and weights: what they reach and what they cannot."""

import pytest
import torch

from regard import OptionError, ShapeError, record, recording, steer
from regard.hosts.transformers.specimens import make, prompt
from regard.steer.scores.reweight import AttentionReweight
from tests.steer.test_snapkv import generate


def double(call, table):
    """A rule that leaves no row as it was."""
    return table * torch.linspace(1, 3, table.shape[-1])


@pytest.mark.parametrize("stage", ["scores", "weights"])
@pytest.mark.parametrize("padded", [0, 3])
def test_a_rule_that_changes_nothing_gives_every_bit_of_the_eager_model(stage, padded):
    model, inputs = make("llama"), prompt(length=12, padded=padded)
    model.set_attn_implementation("eager")
    plain = model(**inputs).logits
    with steer(model, AttentionReweight(rule=lambda call, table: table, stage=stage)):
        found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(found[real], plain[real])


@pytest.mark.parametrize("stage", ["scores", "weights"])
def test_other_layers_heads_and_queries_are_not_heard(stage):
    model, inputs = make("llama"), prompt(length=12)
    table = record(model, inputs, sites=("weights",))
    for heads in ((1, 2), {1: (1, 2)}):
        rule = AttentionReweight(rule=double, layers=(1,), heads=heads, queries="last", stage=stage)
        with steer(model, rule), recording(model, sites=("weights",)) as tape:
            model(**inputs)
        assert torch.equal(tape["weights", 0], table["weights", 0])
        changed = (tape["weights", 1] - table["weights", 1]).abs().amax((0, 3)) > 1e-4
        assert changed.nonzero().tolist() == [[1, 11], [2, 11]]


@pytest.mark.parametrize("padded", [0, 3])
def test_no_weight_goes_where_a_row_may_not_look(padded):
    model, inputs = make("llama"), prompt(length=12, padded=padded)
    seen = torch.ones(12, 12).bool().tril() & inputs["attention_mask"].bool()[:, None, None]
    for options in ({"stage": "scores"}, {"stage": "weights"}, {"stage": "weights", "renormalise": True}):
        with steer(model, AttentionReweight(rule=lambda call, table: table.abs() + 1.0, **options)):
            tape = record(model, inputs, sites=("weights",))
        for layer in range(3):
            weights = tape["weights", layer]
            assert not weights.masked_select(~seen).any()
            rows = seen.any(-1).expand(weights.shape[:3])
            if options != {"stage": "weights"}:
                torch.testing.assert_close(weights.sum(-1)[rows], torch.ones(int(rows.sum())))


def test_a_rule_that_looks_at_keys_alone_decodes_as_in_parallel():
    model, inputs = make("llama"), prompt(length=10)
    for stage in ("scores", "weights"):
        # by the key's place from the first, which is the same in both
        with steer(model, AttentionReweight(rule=lambda call, t: t * (torch.arange(t.shape[-1]) % 3 + 1), stage=stage)):
            ours = generate(model, inputs, 5)
            parallel = model(ours.sequences).logits[:, 9:-1]
        torch.testing.assert_close(torch.stack(ours.logits, 1), parallel, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match='stage is "scores"'):
        AttentionReweight(rule=double, stage="z")
    with pytest.raises(OptionError, match="leave renormalise out"):
        AttentionReweight(rule=double, stage="scores", renormalise=True)
    model = make("llama")
    with steer(model, AttentionReweight(rule=lambda call, t: t[..., :1])), pytest.raises(ShapeError, match="returned"):
        model(**prompt(length=6))
