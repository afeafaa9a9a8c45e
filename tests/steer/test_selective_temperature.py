"""Position temperature against scores that are scaled row by row."""

import math

import pytest
import torch
import transformers as hf

from regard import OptionError, PositionTemperature, record, steer
from regard.hosts.transformers.specimens import make, prompt
from regard.steer.scores.reweight import AttentionReweight
from tests.steer.test_snapkv import generate


def neox():
    torch.manual_seed(0)
    config = hf.GPTNeoXConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = hf.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


MODELS = {"llama": lambda: make("llama"), "gpt2": lambda: make("gpt2"), "pythia": neox}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("beta", [0.4, -0.1])
def test_it_is_the_softmax_of_scaled_scores(name, padded, beta):
    model, inputs = MODELS[name](), prompt(length=12, padded=padded)

    def scaled(call, scores):
        tau = torch.ones(2, 1, 12, 1)
        for row, start in enumerate((padded, 0)):
            for i in range(start, 12):
                tau[row, 0, i] = 1 + beta * math.log(i - start + 1)
        return scores * tau

    with steer(model, AttentionReweight(rule=scaled, stage="scores")):
        wanted = model(**inputs).logits
    with steer(model, PositionTemperature(beta=beta)):
        found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert (found - model(**inputs).logits)[real].abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_first_token_stays_and_steps_equal_the_parallel_pass(name):
    model, inputs = MODELS[name](), prompt(length=10)
    plain = model(**inputs).logits
    with steer(model, PositionTemperature(beta=0.5)):
        torch.testing.assert_close(model(**inputs).logits[:, 0], plain[:, 0], rtol=1e-5, atol=1e-5)
        ours = generate(model, inputs, 5)
        parallel = model(ours.sequences).logits[:, 9:-1]
    torch.testing.assert_close(torch.stack(ours.logits, 1), parallel, rtol=1e-4, atol=1e-4)


def test_rows_get_spikier_with_beta():
    model, inputs, before = make("llama"), prompt(length=12), None
    for beta in (-0.3, 0.0, 0.3, 1.0):
        with steer(model, PositionTemperature(beta=beta, layers=(0,))):
            entropy = record(model, inputs, layers=(0,), reduce="entropy")["weights", 0][:, :, 1:]
        assert before is None or (entropy < before + 1e-5).all()
        before = entropy


def test_layers_choose_and_beta_is_finite():
    model, inputs = make("llama"), prompt(length=12)
    plain = record(model, inputs, sites=("z",))
    with steer(model, PositionTemperature(beta=0.5, layers=(1,))):
        tape = record(model, inputs, sites=("z",))
    assert torch.equal(tape["z", 0], plain["z", 0]) and not torch.equal(tape["z", 1], plain["z", 1])
    with pytest.raises(OptionError, match="finite"):
        PositionTemperature(beta=float("nan"))
