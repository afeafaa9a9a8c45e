"""Core context on a model: the op on prompts, the same from the cut cache, and nothing kept that is a core."""

import pytest
import torch

from regard import CoreContextCache, OptionError, Unsupported, core_context_attention, steer
from regard import record as record_once
from regard.hosts.transformers.specimens import make, prompt
from tests.steer.test_snapkv import generate


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_prompt_runs_the_op(family):
    model, inputs = make(family), prompt(length=24)
    with steer(model, CoreContextCache(group=3, window=6)):
        tape = record_once(model, inputs, sites=("q", "k", "v", "z"))
    for layer in range(3):
        q, k, v = (tape[kind, layer] for kind in "qkv")
        wanted = core_context_attention(q, k, v, group=3, window=6, is_causal=True, scale=tape.meta["scale"])
        torch.testing.assert_close(tape["z", layer].transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group, window", [(3, 6), (4, 6), (2, 4), (1, 5)])
@pytest.mark.parametrize("length", [5, 20, 23])
def test_writing_from_the_cut_cache_is_one_pass(group, window, length):
    model, inputs = make("llama"), prompt(length=length)
    with torch.no_grad(), steer(model, CoreContextCache(group=group, window=window)) as session:
        out = generate(model, inputs, 9)
        held = session.report()[0]["kept"]
        whole = model(out.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, -9:], rtol=1e-4, atol=1e-4)
    assert max(held) <= window + group


def test_a_window_that_covers_all_is_the_model_to_the_bit():
    model, inputs = make("llama"), prompt(length=20, padded=3)
    plain = generate(model, inputs)
    with steer(model, CoreContextCache(group=4, window=64)):
        ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


def test_what_it_cannot_do_is_refused():
    model = make("llama")
    with pytest.raises(OptionError, match="at least 1 token"):
        CoreContextCache(group=0)
    with steer(model, CoreContextCache(group=2, window=4)):
        with pytest.raises(Unsupported, match="row by row"):
            generate(model, prompt(length=20, padded=3))
        with pytest.raises(Unsupported, match="in pieces"):
            generate(model, prompt(length=20), prefill_chunk_size=6)


@pytest.mark.parametrize("group, window", [(3, 6), (2, 4), (1, 5)])
def test_beams_take_their_cores_along(group, window):
    model, inputs = make("llama"), prompt(length=20)
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "output_scores": True}
    with torch.no_grad(), steer(model, CoreContextCache(group=group, window=window)):
        out = generate(model, inputs, 10, **options)
        log_p = model(out.sequences[:, :-1], use_cache=False).logits[:, 19:].log_softmax(-1)
    alone = log_p.gather(2, out.sequences[:, 20:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, alone, rtol=1e-4, atol=1e-3)
    # else there would be nothing to take along
    assert (out.beam_indices[:, :10] != out.beam_indices[:, :1]).any()


def test_a_prompt_of_one_token_gets_its_cores():
    model, inputs = make("llama"), prompt(length=1)
    with torch.no_grad(), steer(model, CoreContextCache(group=2, window=4)):
        out = generate(model, inputs, 12)
        whole = model(out.sequences[:, :-1], use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_layers_with_a_window_stay_as_they_are():
    model, inputs = make("gemma3"), prompt(length=20)
    plain = record_once(model, inputs, sites=("z",))
    with steer(model, CoreContextCache(group=2, window=4)):
        tape = record_once(model, inputs, sites=("z",))
        generate(model, inputs, 5)
    assert torch.equal(tape["z", 0], plain["z", 0])
    assert (tape["z", 1] - plain["z", 1]).abs().max() > 1e-3


def test_masks_and_caches_from_elsewhere_are_refused():
    model, inputs = make("llama"), prompt(length=20)
    with torch.no_grad():
        cache = model(inputs["input_ids"], use_cache=True).past_key_values
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., 3:7, 2] = False
    with torch.no_grad(), steer(model, CoreContextCache(group=2, window=4)):
        with pytest.raises(Unsupported, match="before the block"):
            model(inputs["input_ids"][:, :1], past_key_values=cache)
        with pytest.raises(Unsupported, match="mask of its own"):
            model(inputs["input_ids"], attention_mask=mask)
