"""All ways of writing, under a session that changes nothing: the same tokens, and no trace afterwards."""

import copy

import pytest
import torch
from transformers import StaticCache, cache_utils

from regard import SnapKV, Unsupported, recording, steer
from regard.hosts.transformers.specimens import make, prompt
from tests.hosts.test_session import Scale, Scores, run
from tests.hosts.test_wrapped import same, state

WAYS = {
    "greedy": {}, "beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2}, "in pieces": {"prefill_chunk_size": 5},
    "without a cache": {"use_cache": False}, "guided": {"guidance_scale": 1.5},
    "with attentions": {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True},
    "by look-up": {"prompt_lookup_num_tokens": 2},
}  # fmt: skip
SESSIONS = {
    "scores": lambda model: steer(model, Scores()),
    "heads": lambda model: steer(model, Scale(1.0)),
    "tape": lambda model: recording(model, sites=("weights", "z", "resid_post", "logits", "final")),
}


def write(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    out = model.generate(**inputs, **options)
    return out if isinstance(out, torch.Tensor) else out.sequences


@pytest.mark.parametrize("name, side", [("llama", "left"), ("gemma3", "right"), ("gpt2", "left"), ("t5", "right")])
def test_every_way_of_writing_is_as_ever(name, side):
    model, inputs = make(name), prompt(length=12)
    inputs["attention_mask"][0, slice(4) if side == "left" else slice(-4, None)] = 0
    for way, options in WAYS.items():
        given = {key: x[1:] for key, x in inputs.items()} if way == "by look-up" else inputs
        if name == "t5" and way in ("in pieces", "guided"):
            # transformers cuts the mask of the encoder to the first piece, and guides decoders only
            continue
        wanted = write(model, given, **options)
        before = state(model)
        for session, opened in SESSIONS.items():
            with opened(model):
                assert torch.equal(write(model, given, **options), wanted), (way, session)
        assert same(before, state(model)), way


def test_a_draft_model_and_the_one_that_checks_it():
    model, draft, inputs = make("llama"), make("llama", seed=1), prompt(batch=1, length=9)
    plain = write(model, inputs)
    with recording(model, sites=("z",)), recording(draft, sites=("z",)):
        assert torch.equal(write(model, inputs, assistant_model=draft), plain)
    with steer(model, Scale(0.5)):
        wanted = write(model, inputs)
        assert torch.equal(write(model, inputs, assistant_model=draft), wanted)
    assert not torch.equal(wanted, plain)


def test_guidance_writes_two_sequences_in_turns_and_each_gives_up_keys_of_its_own():
    model, inputs, other = make("llama"), prompt(length=30), prompt(length=24, seed=9)
    options = {"guidance_scale": 1.5, "negative_prompt_ids": other["input_ids"], "return_dict_in_generate": True}
    options |= {"output_logits": True, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cut = SnapKV(budget=10, window=4)
    with steer(model, cut):
        guided = model.generate(**inputs, **options, negative_prompt_attention_mask=other["attention_mask"])
    cache, mask, ids = None, inputs["attention_mask"], inputs["input_ids"]
    with torch.no_grad(), steer(model, cut):
        for step in range(5):
            out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[:, -1], guided.logits[step], rtol=1e-4, atol=1e-4)
            cache, ids = out.past_key_values, guided.sequences[:, 30 + step : 31 + step]
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    assert max(layer.keys.shape[2] for layer in cache.layers) < 30


def test_a_second_turn_goes_on_with_the_cache_of_the_first():
    model, inputs = make("llama"), prompt(length=12, padded=3)
    options = {"return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for opened in SESSIONS.values():
        with opened(model):
            first = model.generate(**inputs, **options)
            ids = torch.cat((first.sequences, prompt(length=5, seed=8)["input_ids"]), 1)
            mask = torch.cat((inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)), 1)
            both = {"input_ids": ids, "attention_mask": mask}
            second = write(model, both, past_key_values=copy.deepcopy(first.past_key_values))
        assert torch.equal(second, write(model, both, past_key_values=first.past_key_values))
        assert torch.equal(second, write(model, both))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_gradients_and_precision(mode):
    model, inputs = make("llama"), prompt(length=12, padded=3)
    for lower in (False, True):
        with mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            plain = model(**inputs).logits
            with recording(model, sites=("weights", "z")):
                assert torch.equal(model(**inputs).logits, plain)
            with steer(model, Scores()):
                near = 3e-2 if lower else 1e-4
                torch.testing.assert_close(model(**inputs).logits[1], plain[1], rtol=near, atol=near)
    with mode(), steer(model, SnapKV(budget=6, window=2)):
        cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)), 1)
    with torch.no_grad(), steer(model, SnapKV(budget=6, window=2)):
        model(torch.full((2, 1), 5), attention_mask=mask, past_key_values=cache)


class FakeQuantizedLayer(cache_utils.QuantizedLayer):
    """Keys in half precision, as libraries for quantised caches keep theirs."""

    def _quantize(self, tensor, axis):
        return tensor.half()

    def _dequantize(self, tensor):
        return tensor.float()


def test_quantised_caches_are_read_and_never_cut():
    model, inputs = make("llama"), prompt(length=20, padded=3)

    def quantised():
        return cache_utils.Cache(layers=[FakeQuantizedLayer(residual_length=4) for _ in range(3)])

    wanted = write(model, inputs, past_key_values=quantised())
    for opened in SESSIONS.values():
        with opened(model):
            assert torch.equal(write(model, inputs, past_key_values=quantised()), wanted)
    with steer(model, SnapKV(budget=8, window=3)), pytest.raises(Unsupported, match="cannot give up keys"):
        write(model, inputs, past_key_values=quantised())


def test_caches_of_a_fixed_size_are_right_in_a_pass_and_refused_by_generate():
    model, inputs = make("llama"), prompt(length=12, padded=3)
    with torch.no_grad(), steer(model, Scores()):
        out = model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=32)).logits
    torch.testing.assert_close(out[1], run(model, inputs)[1], rtol=1e-4, atol=1e-4)
    with steer(model, Scores()), pytest.raises(Unsupported, match="use a DynamicCache"):
        write(model, inputs, cache_implementation="static")
    with steer(model, SnapKV(budget=8, window=3)), pytest.raises(Unsupported, match="use a DynamicCache"):
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=32))


def test_attention_that_the_model_returns_is_that_of_the_session():
    model, inputs = make("llama"), prompt(length=9)
    model.set_attn_implementation("eager")
    plain = model(**inputs, output_attentions=True)
    for way in ("eager", "sdpa"):
        model.set_attn_implementation(way)
        with steer(model, Scores()):
            inside = model(**inputs, output_attentions=True, output_hidden_states=True)
        assert len(inside.hidden_states) == 4
        for ours, theirs in zip(inside.attentions, plain.attentions, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
