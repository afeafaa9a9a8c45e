"""Attention set on given places: what it gives, what it leaves, and what a model then says."""

import pytest
import torch

from regard import OptionError, SetAttention, ShapeError, SnapKV, recording, steer, tiny
from regard import record as record_tape
from regard.hosts.transformers.specimens import make, prompt
from tests.explain.induction_model import COPYING, VOCAB, induction_model
from tests.steer.test_snapkv import generate


def weights_of(model, inputs, *interventions):
    with steer(model, *interventions), recording(model, sites=("weights",)) as tape, torch.no_grad():
        model(**inputs)
    return tape


def test_a_full_weight_makes_a_head_look_at_the_targets_alone():
    model, inputs = make("llama"), prompt(length=12)
    plain = record_tape(model, inputs, sites=("weights",))
    tape = weights_of(model, inputs, SetAttention(heads={1: (0, 2)}, target=(3, 5)))
    wanted = torch.zeros(12)
    wanted[[3, 5]] = 0.5
    torch.testing.assert_close(tape["weights", 1][:, [0, 2], -1], wanted.expand(2, 2, -1))
    for heads, rows in (((1, 3), slice(None)), ((0, 2), slice(0, -1))):
        torch.testing.assert_close(
            tape["weights", 1][:, list(heads)][:, :, rows], plain["weights", 1][:, list(heads)][:, :, rows]
        )
    assert torch.equal(tape["weights", 0], plain["weights", 0])


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9])
def test_the_others_share_what_is_left_as_before(weight):
    model, inputs = make("llama"), prompt(length=12)
    plain = record_tape(model, inputs, sites=("weights",))["weights", 1][:, 2, -1]
    found = weights_of(model, inputs, SetAttention(heads={1: (2,)}, target=(4,), weight=weight))["weights", 1][:, 2, -1]
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    torch.testing.assert_close(found[:, 4], torch.full((2,), weight))
    others = [i for i in range(12) if i != 4]
    shares = (x[:, others] / x[:, others].sum(-1, keepdim=True) for x in (found, plain))
    torch.testing.assert_close(*shares)


def test_rows_that_see_no_target_stay_as_they_are():
    model, inputs = make("llama"), prompt(length=12, padded=3)
    plain = record_tape(model, inputs, sites=("weights",))["weights", 0]
    found = weights_of(model, inputs, SetAttention(heads={0: (1,)}, target=(5,), queries="all"))["weights", 0]
    first = torch.tensor([3 + 5, 5])
    for row in range(2):
        torch.testing.assert_close(found[row, 1, : first[row]], plain[row, 1, : first[row]])
        assert (found[row, 1, first[row] :, first[row]] > 0.9999).all()


def test_each_row_has_its_own_targets_and_pads_do_not_count():
    model, inputs = make("llama"), prompt(length=12, padded=4)
    found = weights_of(model, inputs, SetAttention(heads={-1: (3,)}, target=((0,), (-2, 1))))["weights", 2][:, 3, -1]
    assert found[0].nonzero().flatten().tolist() == [4]
    assert found[1].nonzero().flatten().tolist() == [1, 10]


@pytest.mark.parametrize("padded", [0, 3])
def test_decoding_looks_at_the_places_of_the_prompt(padded):
    model, inputs = make("llama"), prompt(length=10, padded=padded)
    looking = SetAttention(heads={0: (0,), 1: (2, 3)}, target=(2, -1), weight=0.7)
    with steer(model, looking), recording(model, sites=("weights",)) as tape:
        generate(model, inputs, 5)
    for step in range(1, 5):
        weights = tape["weights", 1, step][:, 2, 0]
        at = torch.tensor([[padded + 2, 9], [2, 9]])
        torch.testing.assert_close(weights.gather(1, at), torch.full((2, 2), 0.35))


@pytest.mark.parametrize("padded", [0, 3])
def test_all_queries_decode_as_in_parallel(padded):
    model, inputs = make("llama"), prompt(length=10, padded=padded)
    looking = SetAttention(heads={0: (0,), 1: (2, 3)}, target=(2, 6), weight=0.7, queries="all")
    with steer(model, looking):
        ours = generate(model, inputs, 5)
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 5, dtype=torch.int64)), 1)
        with torch.no_grad():
            parallel = model(input_ids=ours.sequences, attention_mask=mask).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(ours.logits, 1), parallel, rtol=1e-4, atol=1e-4)


def test_a_cache_that_gave_up_keys_is_looked_at_by_place():
    model, inputs = make("llama"), prompt(length=40)
    looking = SetAttention(heads={1: (2,)}, target=(-1, -2))
    with steer(model, SnapKV(budget=12, window=4), looking), recording(model, sites=("weights",)) as tape:
        generate(model, inputs, 4)
    weights = tape["weights", 1, 2][:, 2, 0]
    assert weights.shape[-1] < 40
    # the last two tokens of the prompt are in SnapKV's window and kept; one token was written behind them
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights[weights > 0], torch.full((4,), 0.5))


def test_sliding_layers_are_counted_from_their_end():
    model, inputs = make("gemma3"), prompt(length=10)
    with steer(model, SetAttention(heads={0: (1,)}, target=(-1,))), recording(model, sites=("weights",)) as tape:
        generate(model, inputs, 4)
    # a window of four: the prompt's last token is the third, then the second key from the end
    for step in (1, 2):
        row = tape["weights", 0, step][:, 1, 0]
        assert (row.argmax(-1) == row.shape[-1] - 1 - step).all() and (row.amax(-1) > 0.9999).all()


def test_a_copying_head_copies_what_it_is_made_to_look_at():
    model = induction_model()
    once = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[:10]
    ids = torch.cat((once, once[:4]))[None]
    with torch.no_grad():
        assert int(model(ids).logits[0, -1].argmax()) == int(once[4])
        for place in (1, 7):
            with steer(model, SetAttention(heads={COPYING[0]: (COPYING[1],)}, target=(place,))):
                assert int(model(ids).logits[0, -1].argmax()) == int(once[place])
            with steer(model, SetAttention(heads={0: (1,)}, target=(place,))):
                assert int(model(ids).logits[0, -1].argmax()) == int(once[4])


@pytest.mark.slow
def test_tiny_lm_tells_the_note_that_its_copying_heads_are_made_to_look_at(record):
    model, _ = tiny.lm()
    cases = tiny.note_cases(48, 256, seed=4)
    rows = torch.arange(48)
    other = cases.note_spans[rows, (cases.asked[:, 0] + 1) % 8, 1] - 1
    first = cases.valid.to(torch.uint8).argmax(1)
    target = tuple((int(at),) for at in other - first)
    given = {"input_ids": cases.ids, "attention_mask": cases.valid.long()}
    figures = {}
    every = (0, 1, 2, 3)
    for name, heads in (("none", {}), ("layer 0", {0: every}), ("layer 1", {1: every}), ("layer 2", {2: every})):
        with steer(model, SetAttention(heads=heads, target=target)), torch.no_grad():
            said = model(**given).logits[:, -1].argmax(-1)
        shares = {"note asked for": said == cases.answers[:, 0], "note looked at": said == cases.ids[rows, other]}
        figures[name] = {what: round(float(x.float().mean()), 4) for what, x in shares.items()}
    record(figures)
    assert figures["none"]["note asked for"] >= 0.95 and figures["layer 1"]["note looked at"] >= 0.95
    assert figures["layer 2"]["note asked for"] >= 0.9


@pytest.mark.parametrize("options, text", [
    ({"weight": 1.5}, "0 to 1, not 1.5"), ({"queries": "first"}, 'queries is "last"'), ({"target": ()}, "target is empty"),
    ({"target": ((1,), ())}, "target is empty"),
])  # fmt: skip
def test_settings_that_cannot_be(options, text):
    with pytest.raises(OptionError, match=text):
        SetAttention(**{"heads": {0: (0,)}, "target": (1,), **options})


def test_what_the_model_or_the_prompt_lacks_is_refused():
    model, inputs = make("llama"), prompt(length=12, padded=4)
    for heads in ({3: (0,)}, {0: (4,)}):
        with pytest.raises(OptionError, match="3 layers of 4 heads"):
            steer(model, SetAttention(heads=heads, target=(0,))).__enter__()
    for target in ((8,), (-9,)):
        looking = SetAttention(heads={0: (0,)}, target=target)
        with steer(model, looking), pytest.raises(OptionError, match="of row 0: its prompt has 8 tokens"):
            model(**inputs)
    looking = SetAttention(heads={0: (0,)}, target=((1,), (2,), (3,)))
    with steer(model, looking), pytest.raises(ShapeError, match="targets for 3 rows, and 2 came"):
        model(**inputs)
