"""Our sequence models behind transformers' interface."""

import pytest
import torch
import transformers as hf

from regard import OptionError, RegardForCausalLM, SequenceModel, SequenceSettings

MIXERS = ("softmax", "based", "lightning", ("short_conv", "softmax"), "aaren")


def make(mixer, **options):
    torch.manual_seed(0)
    return SequenceModel(SequenceSettings(vocab=40, dim=32, depth=2, heads=2, mixer=mixer, hidden=48, **options)).eval()


def prompt():
    torch.manual_seed(1)
    return torch.randint(2, 40, (2, 9))


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_is_loaded(tmp_path, mixer, tied):
    model = make(mixer, tied=tied)
    ids = prompt()
    RegardForCausalLM.of(model).save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, RegardForCausalLM)
    assert again.sequence.settings == model.settings
    # loaded weights lie elsewhere in memory, which may move the last bit
    torch.testing.assert_close(again(ids).logits, model(ids), rtol=1e-6, atol=1e-6)
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.sequence.named_parameters())
    assert (again.sequence.head.weight is again.sequence.embed.weight) == tied
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_greedy_writing_is_our_own(mixer):
    model, ids = make(mixer), prompt()
    wrapped = RegardForCausalLM.of(model)
    ours = model.generate(ids, 6, temperature=0)
    theirs = wrapped.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)
    assert torch.equal(wrapped.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False), ours)


@pytest.mark.parametrize("mixer", ["softmax", "based"])
def test_beams_with_states_are_beams_without(mixer):
    wrapped, ids = RegardForCausalLM.of(make(mixer)), prompt()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(wrapped.generate(ids, **options), wrapped.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("mixer", ["softmax", "based", "lightning"])
def test_left_padding_changes_nothing(mixer):
    wrapped, ids = RegardForCausalLM.of(make(mixer)), prompt()[:1]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), ids), 1)
    mask = (torch.arange(13) >= 4)[None].long()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = wrapped.generate(ids, **options)[:, 9:]
    assert torch.equal(wrapped.generate(padded, attention_mask=mask, **options)[:, 13:], wanted)


def test_the_loss_is_that_of_the_next_tokens():
    model, ids = make("softmax"), prompt()
    labels = ids.clone()
    labels[:, :4] = -100
    out = RegardForCausalLM.of(model)(ids, labels=labels)
    logits = model(ids)
    wanted = torch.nn.functional.cross_entropy(logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    assert model.embed.weight.grad is not None


def test_an_encoder_is_refused():
    with pytest.raises(OptionError, match="an encoder writes nothing"):
        RegardForCausalLM.of(make("softmax", is_causal=False))
