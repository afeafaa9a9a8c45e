"""HiP on a model: the op in the layers that it acts on, dense ones before, and searches that serve several tokens."""

import sys

import pytest
import torch

import regard
from regard import HiP, OptionError, Unsupported, hip_attention, steer
from regard import record as record_once
from regard.hosts.transformers.specimens import make, prompt
from regard.ops.hip import hip_select
from tests.steer.test_snapkv import generate

SMALL = {"budget": 6, "block_k": 2, "recent": 3, "sinks": 1}


def test_layers_run_the_op_after_dense_ones():
    model, inputs = make("llama"), prompt(length=24)
    given = HiP(**SMALL, block_q=4, dense_layers=1)
    plain = record_once(model, inputs, sites=("z",))
    with steer(model, given):
        tape = record_once(model, inputs, sites=("q", "k", "v", "z"))
    assert torch.equal(tape["z", 0], plain["z", 0])
    for layer in (1, 2):
        q, k, v = (tape[kind, layer] for kind in "qkv")
        wanted = hip_attention(q, k, v, is_causal=True, scale=tape.meta["scale"], block_q=4, **SMALL)
        torch.testing.assert_close(tape["z", layer].transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


def test_writing_is_the_prompt_row_by_row_with_single_rows():
    model, inputs = make("llama"), prompt(length=24)
    with torch.no_grad(), steer(model, HiP(**SMALL, block_q=1, dense_layers=0)):
        out = generate(model, inputs, 6)
        whole = model(out.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -6:], rtol=1e-4, atol=1e-4)


def test_a_search_serves_several_tokens(monkeypatch):
    model, inputs, found = make("llama"), prompt(length=24), []

    def counted(q, k, **options):
        found.append(options["q_offset"])
        return hip_select(q, k, **options)

    monkeypatch.setattr(sys.modules[HiP.__module__], "hip_select", counted)
    for refresh, places in ((1, range(24, 33)), (4, (24, 28, 32))):
        with steer(model, HiP(**SMALL, block_q=1, dense_layers=0, refresh=refresh)):
            # a search of one text does not serve the next, nor that of a turn the turn after it
            for _ in range(2):
                found.clear()
                out = generate(model, inputs, 10)
                assert found == [place for place in (0, *places) for _ in range(3)]
            found.clear()
            more = {"input_ids": torch.cat((out.sequences, inputs["input_ids"][:, :1]), 1)}
            generate(model, more, 2, past_key_values=out.past_key_values)
            assert found == [33] * 3 + [35] * 3


def test_a_budget_that_covers_all_is_the_model_to_the_bit():
    model, inputs = make("llama"), prompt(length=20, padded=3)
    plain = generate(model, inputs)
    with steer(model, HiP(budget=64, dense_layers=0)):
        ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


@pytest.mark.slow
def test_hip_on_tiny_lm(record):
    """Notes are single tokens: their neighbours' keys do not point to them, and the tree is built on such pointing."""
    model = regard.tiny.lm()[0]
    cases = regard.tiny.note_cases(64, 512, gap=64)
    scores = {}
    with torch.no_grad():
        for budget in (64, 128, 256, 400):
            for block_k in (1, 2):
                way = HiP(budget=budget, block_q=8, block_k=block_k, recent=32, sinks=4, dense_layers=1)
                with steer(model, way):
                    right = cases.right(model(cases.ids).logits)
                scores[f"budget {budget}, blocks of {block_k}"] = float(right.float().mean())
    record({"notes": 8, "length": 512, "rows": 64, "chance": 0.125, "accuracy": scores})
    assert scores["budget 400, blocks of 1"] > scores["budget 64, blocks of 1"] > 0.125


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dense_layers": -1}, "dense_layers is at least 0"),
        ({"budget": 1, "block_k": 2}, "the budget at least block_k"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        HiP(**options)


def test_pads_are_refused():
    model = make("llama")
    with steer(model, HiP(**SMALL, dense_layers=0)), pytest.raises(Unsupported, match="row by row"):
        generate(model, prompt(length=20, padded=3))
