"""Attention that is more than a softmax of q k': caps, sinks, biases of positions, and what a model may hand over besides."""

import pytest
import torch
import transformers as hf

from regard import Unsupported, recording, steer
from regard.hosts.transformers.specimens import SIZES, make, prompt
from tests.hosts.test_session import Scale, Scores, run


def capped():
    return hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=1, sliding_window=4)
    )


def with_sinks():
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    )


def with_biases():
    return make("t5")


KINDS = {"caps": capped, "sinks": with_sinks, "biases": with_biases}


def made(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    if kind == "caps":
        # in old versions of transformers sdpa leaves them out
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "sinks" in name:
                parameter.copy_(torch.randn_like(parameter) * (2.0 if "sinks" in name or "bias" in name else 0.3))
    return model


class Ignored(Scores):
    """What a function would do that had never heard of caps, sinks and biases."""

    def on_attention(self, call, follow):
        return follow(call.replace(softcap=None, sinks=None, bias=None))


@pytest.mark.parametrize("kind", KINDS)
def test_the_explicit_way_knows_caps_sinks_and_biases(kind):
    model, inputs = made(kind), prompt(length=12, padded=3)
    if kind == "biases":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, 4:]
    real = inputs["attention_mask"].bool() if kind != "biases" else slice(None)
    plain = run(model, inputs)[real]
    with steer(model, Scores()):
        torch.testing.assert_close(run(model, inputs)[real], plain, rtol=1e-4, atol=1e-4)
    with recording(model, sites=("weights",)) as tape:
        assert torch.equal(run(model, inputs)[real], plain)
    sums = tape["weights", 0].sum(-1)
    assert (sums[1].min() < 0.999) == (kind == "sinks"), "a learned sink takes weight and gives no value"
    # the engines go the fused way only where they can
    with steer(model, Scale(1.0)):
        torch.testing.assert_close(run(model, inputs)[real], plain, rtol=1e-4, atol=1e-4)
    with steer(model, Ignored()):
        assert (run(model, inputs)[real] - plain).abs().max() > 1e-2


def test_what_a_model_hands_over_and_nobody_knows_is_refused():
    model, inputs = make("llama"), prompt(length=8)
    plain = run(model, inputs)
    with steer(model, Scores()):
        with pytest.raises(
            Unsupported, match="LlamaAttention hands alibi to its attention, which regard does not know"
        ):
            model(**inputs, alibi=torch.ones(4))
        # None is nothing
        torch.testing.assert_close(run(model, {**inputs, "alibi": None}), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family, sizes",
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
        ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
        ("XGLM", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    ],
)
def test_families_whose_attention_is_their_own_are_refused_by_name(family, sizes):
    config = getattr(hf, f"{family}Config")(vocab_size=50, **sizes)
    model = getattr(hf, f"{family}ForCausalLM")(config).eval()
    plain = run(model, {"input_ids": prompt(length=6)["input_ids"]})
    with pytest.raises(Unsupported, match=f"'scores', and {family}ForCausalLM does not dispatch"):
        steer(model, Scores()).__enter__()
    assert torch.equal(run(model, {"input_ids": prompt(length=6)["input_ids"]}), plain)
