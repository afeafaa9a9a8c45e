"""Patterns, ops and mixers in loaded models."""

import pytest
import torch

from regard import Causal, OptionError, SlidingWindow, UnknownName, Unsupported, record, sigmoid_attention, swap
from regard.hosts.transformers.specimens import make, prompt


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_pattern_is_a_mask_in_these_layers(name):
    model, inputs = make(name), prompt(length=12)
    plain = logits(model, inputs)
    with swap(model, pattern=SlidingWindow(3), layers=(-1,)):
        ours = logits(model, inputs)
        tape = record(model, inputs)
    assert (ours - plain).abs().max() > 1e-4
    assert (tape["weights", 2][:, :, 8, :6] == 0).all() and (tape["weights", 1][:, :, 8, :6] > 0).any()
    assert torch.equal(logits(model, inputs), plain)
    with swap(model, pattern=Causal()):
        torch.testing.assert_close(logits(model, inputs), plain, rtol=1e-5, atol=1e-5)


def test_writing_under_a_pattern_is_one_pass_under_it():
    model, inputs = make("llama"), prompt(length=12)
    with swap(model, pattern=SlidingWindow(4)):
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        whole = logits(model, {"input_ids": out.sequences[:, :-1]})
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [0, 3])
def test_an_op_takes_the_place_of_softmax(padded):
    model, inputs = make("llama"), prompt(length=12, padded=padded)
    plain = logits(model, inputs)
    with swap(model, mixer="softmax"):
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(logits(model, inputs)[real], plain[real], rtol=1e-5, atol=1e-5)
    with swap(model, mixer="sigmoid", layers=(0,), length=12):
        tape = record(model, inputs, sites=("q", "k", "v", "z"))
    q, k, v = (tape[kind, 0][1:] for kind in "qkv")
    wanted = sigmoid_attention(q, k, v, pattern=Causal(), scale=tape.meta["scale"], length=12)
    torch.testing.assert_close(tape["z", 0][1:].transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_those_of_softmax_are_not_read():
    model, inputs = make("llama"), prompt(length=12)
    with swap(model, mixer="sigmoid", layers=(0,), length=12), pytest.raises(Unsupported, match="layer 0 runs sigmoid"):
        record(model, inputs)


def test_an_op_writes_from_the_models_cache():
    model, inputs = make("llama"), prompt(length=12)
    with swap(model, mixer="sliding_window", window=4):
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        whole = logits(model, {"input_ids": out.sequences[:, :-1]})
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -5:], rtol=1e-4, atol=1e-4)


def test_a_mixer_carries_over_what_fits_and_trains():
    model, inputs = make("llama"), prompt(length=12)
    plain = logits(model, inputs)
    weight = model.model.layers[1].self_attn.v_proj.weight
    with swap(model, mixer="lightning", layers=(1,)) as done:
        mixed = model.model.layers[1].self_attn.mixer
        out = model(**inputs, use_cache=False).logits
        out.sum().backward()
        assert all(p.grad is not None for p in mixed.parameters() if p.requires_grad)
        model.zero_grad()
        with pytest.raises(Unsupported, match="use_cache=False"):
            model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
        later = inputs["input_ids"].clone()
        later[:, -1] = 3
        again = logits(model, {"input_ids": later}, use_cache=False)
        torch.testing.assert_close(again[:, :-1], logits(model, inputs, use_cache=False)[:, :-1], rtol=1e-4, atol=1e-4)
    assert all(name.startswith("1.") for name in done.carried)
    assert model.model.layers[1].self_attn.v_proj.weight is weight
    assert torch.equal(logits(model, inputs), plain)


def test_projections_of_one_shape_are_taken_over():
    model = make("llama")
    with swap(model, mixer="selective_temperature", layers=(0,), kv_heads=2) as done:
        assert set(done.carried) == {"0.to_q", "0.to_k", "0.to_v", "0.to_out"}
        taken = model.model.layers[0].self_attn.mixer.to_v.weight
    assert torch.equal(taken, model.model.layers[0].self_attn.v_proj.weight)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, OptionError, "give pattern= or mixer="),
        ({"pattern": Causal(), "mixer": "softmax"}, OptionError, "give pattern= or mixer="),
        ({"pattern": Causal(), "window": 3}, OptionError, "takes no options"),
        ({"mixer": "sliding_window", "windw": 3}, OptionError, "has no option 'windw'"),
        ({"mixer": "softmaxx"}, UnknownName, "softmax"),
    ],
)
def test_what_cannot_be_put_in_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        swap(make("llama"), **options)
