"""The causal mask taken off and put back: who sees whom, by gradients and by recorded weights."""

import pytest
import torch
import transformers as hf

from regard import Bidirectional, Unsupported, record, steer
from regard.hosts.transformers.anatomy import anatomy
from regard.hosts.transformers.specimens import DECODERS, make, prompt

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def reach(model, inputs, row=1):
    """How much the first token's last state depends on the last token's embedding."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    base = anatomy(model).main.base
    out = base(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    first = int(inputs["attention_mask"][row].argmax())
    generator = torch.Generator().manual_seed(5)
    (grad,) = torch.autograd.grad((out[row, first] * torch.randn(out.shape[-1], generator=generator)).sum(), embeds)
    return float(grad[row, -1].abs().max())


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_first_token_sees_the_last_inside_the_block_alone(family, attention):
    model, inputs = make(family), prompt(length=8, padded=2)
    model.set_attn_implementation(attention)
    for row in (0, 1):
        assert reach(model, inputs, row) == 0
        with steer(model, Bidirectional()):
            assert reach(model, inputs, row) > 1e-6
        assert reach(model, inputs, row) == 0
    assert "is_causal" not in vars(model.config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek"])
def test_weights_reach_all_tokens_but_pads(family):
    model, inputs = make(family), prompt(length=8, padded=3)
    plain = record(model, inputs, sites=("weights",))["weights", 1]
    assert not plain.triu(1).any()
    with steer(model, Bidirectional()):
        alone = model(**inputs)[0]
        tape = record(model, inputs, sites=("weights", "resid_post"))
        torch.testing.assert_close(model(**inputs)[0], alone, rtol=0, atol=0)
    weights = tape["weights", 1]
    assert (weights[0, :, 3:, :3] == 0).all()
    assert (weights[0, :, 3:, 3:] > 0).all() and (weights[1] > 0).all()
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(4, 8), rtol=1e-5, atol=1e-5)


def test_a_sliding_window_becomes_two_sided():
    model, inputs = make("gemma3"), prompt(length=12)
    with steer(model, Bidirectional()):
        weights = record(model, inputs, sites=("weights",))["weights", 0][1, 0]
    i = torch.arange(12)
    assert (weights[(i[:, None] - i[None]).abs() < 4] > 0).all()
    assert (weights[(i[:, None] - i[None]).abs() > 4] == 0).all()


def test_a_setting_that_was_there_is_there_again():
    model = make("llama")
    model.config.is_causal = True
    with steer(model, Bidirectional()), steer(model, Bidirectional()):
        assert model.config.is_causal is False
    assert model.config.is_causal is True
    with pytest.raises(ZeroDivisionError), steer(model, Bidirectional()):
        _ = 1 / 0
    assert model.config.is_causal is True


def test_a_model_that_is_not_causal_stays_as_it_is():
    model, inputs = make("bert"), prompt(length=8, padded=2)
    plain = model(**inputs)[0]
    with steer(model, Bidirectional()):
        assert torch.equal(model(**inputs)[0], plain)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: make("t5"), "T5ForConditionalGeneration is no language model of one stack"),
        (lambda: make("vit"), "ViTModel does not get its mask"),
        # its attention has a causal table of its own, which the setting leaves in force
        (
            lambda: hf.GPTNeoForCausalLM(
                hf.GPTNeoConfig(
                    vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
                    bos_token_id=1, eos_token_id=2,
                )
            ),
            "GPTNeoForCausalLM does not dispatch",
        ),
        (lambda: hf.FalconForCausalLM(hf.FalconConfig(**SIZES)), "FalconForCausalLM does not dispatch"),
        (lambda: torch.nn.Linear(2, 2), "no host knows"),
    ],
)  # fmt: skip
def test_models_that_keep_order_otherwise_are_refused(model, message):
    model = model()
    with pytest.raises(Unsupported, match=message):
        steer(model, Bidirectional()).__enter__()
    assert not hasattr(getattr(model, "config", None), "is_causal")


def test_recurrent_layers_are_refused():
    model = make("llama")
    model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(Unsupported, match="layers of linear_attention, which stay causal"):
        steer(model, Bidirectional()).__enter__()
