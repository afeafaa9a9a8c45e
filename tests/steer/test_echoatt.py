"""Layers that share attention: inside a block of steer, and for good."""

import copy
import warnings

import pytest
import torch
import transformers as hf

from regard import (
    AttentionCalibration,
    OptionError,
    Recency,
    ShareAttention,
    Unsupported,
    record,
    recording,
    share_attention_,
    steer,
)
from regard.hosts.transformers.shared_attention import ValuesLayer
from regard.hosts.transformers.specimens import SIZES, make, prompt
from tests.steer.test_snapkv import generate

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral")


def llama(layers, seed=0, **options):
    torch.manual_seed(seed)
    config = hf.LlamaConfig(**{**SIZES, "num_hidden_layers": layers}, **options)
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "deepseek"])
@pytest.mark.parametrize("padded", [0, 4])
def test_followers_attend_exactly_as_their_leader(family, recompute, padded):
    model, inputs = make(family), prompt(length=12, padded=padded)
    with torch.no_grad():
        plain = model(**inputs).logits
    with steer(model, ShareAttention(((1, 2),), recompute=recompute)):
        tape = record(model, inputs, sites=("weights", "z", "v"))
    assert torch.equal(tape["weights", 2], tape["weights", 1])
    assert not torch.allclose(tape["weights", 1], tape["weights", 0])
    v = tape["v", 2]
    v = v.repeat_interleave(4 // v.shape[1], 1)
    torch.testing.assert_close((tape["weights", 1] @ v).transpose(1, 2), tape["z", 2], rtol=1e-5, atol=1e-5)
    assert (tape.output.logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_one_change_no_bit(recompute):
    model, inputs = make("llama"), prompt(length=12, padded=3)
    plain = generate(model, inputs)
    with steer(model, ShareAttention(((0,), (2,)), recompute=recompute)):
        ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))
    share_attention_(model, ((0,), (1,), (2,)))
    ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


def test_sharing_changes_nothing_where_layers_attend_alike():
    model, inputs = llama(4), prompt(length=12)
    with torch.no_grad():
        first = model.model.layers[1]
        # a layer that adds nothing to the stream, and a next one with its projections
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        for name in ("q_proj", "k_proj"):
            getattr(model.model.layers[2].self_attn, name).weight.copy_(getattr(first.self_attn, name).weight)
        plain = model(**inputs).logits
        for recompute in (False, True):
            with steer(model, ShareAttention(((1, 2),), recompute=recompute)):
                torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-5, atol=1e-5)
        share_attention_(model, ((1, 2),))
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("blocks", [((1, 2),), ((0, 1, 2),)])
def test_the_changed_model_equals_the_steered_one_and_decodes_as_in_parallel(family, padded, blocks):
    model, inputs = make(family), prompt(length=12, padded=padded)
    with steer(model, ShareAttention(blocks)):
        wanted = generate(model, inputs)
    with steer(model, ShareAttention(blocks, recompute=True)):
        again = generate(model, inputs)
    share_attention_(model, blocks)
    ours = generate(model, inputs)
    assert torch.equal(ours.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    parallel = model(ours.sequences, attention_mask=mask, position_ids=places).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(ours.logits, 1), parallel, rtol=1e-4, atol=1e-4)


def test_beams_choose_rows_of_leaders_and_followers_alike():
    model, inputs = make("llama"), prompt(length=12, padded=4)
    with steer(model, ShareAttention(((0, 1, 2),))):
        wanted = generate(model, inputs, num_beams=3).sequences
    share_attention_(model, ((0, 1, 2),))
    assert torch.equal(generate(model, inputs, num_beams=3).sequences, wanted)


def test_followers_have_no_projections_and_keep_no_keys():
    model = make("llama")
    before = sum(p.numel() for p in model.parameters())
    taken = sum(
        getattr(model.model.layers[layer].self_attn, name).weight.numel()
        for layer in (1, 2)
        for name in ("q_proj", "k_proj")
    )
    share_attention_(model, ((0, 1, 2),))
    assert sum(p.numel() for p in model.parameters()) == before - taken
    # a full cache, and one whose layers come as they are needed
    for cache in (None, hf.DynamicCache()):
        kept = model(**prompt(length=12), past_key_values=cache, use_cache=True).past_key_values
        assert kept.get_seq_length() == 12
        assert [type(layer) is ValuesLayer for layer in kept.layers] == [False, True, True]
        assert [layer.keys.numel() for layer in kept.layers] == [2 * 2 * 12 * 8, 0, 0]
        assert all(layer.values.shape == (2, 2, 12, 8) for layer in kept.layers)
    with recording(model, sites=("q", "k")) as tape:
        generate(model, prompt(length=12), 3)
    for step in range(3):
        for site in ("q", "k"):
            assert torch.equal(tape[site, 2, step], tape[site, 0, step])


def test_norms_of_queries_and_keys_are_the_leaders():
    model = make("qwen3")
    before = sum(p.numel() for p in model.parameters())
    taken = sum(p.numel() for name, p in model.model.layers[2].self_attn.named_parameters() if name[:2] in ("q_", "k_"))
    share_attention_(model, ((1, 2),))
    assert sum(p.numel() for p in model.parameters()) == before - taken


@pytest.mark.parametrize("way", ["weights", "recompute", "surgery"])
def test_gradients_reach_the_leader_from_its_followers(way):
    model, inputs = make("llama"), prompt(length=12)
    if way == "surgery":
        share_attention_(model, ((1, 2),))
    blocks = () if way == "surgery" else ((1, 2),)
    # nothing leaves the leader but what its follower takes
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    with steer(model, ShareAttention(blocks, recompute=way == "recompute")):
        model(**inputs).logits.sum().backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[1].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_dropout_falls_once_on_the_leaders_weights():
    model, inputs = llama(3, attention_dropout=0.5).train(), prompt(length=12)
    with steer(model, ShareAttention(((1, 2),))):
        tape = record(model, inputs, sites=("weights", "z", "v"))
    weights = tape["weights", 1]
    assert torch.equal(tape["weights", 2], weights)
    dropped = (weights[:, :, -1] == 0).float().mean()
    assert 0.3 < dropped < 0.7
    for layer in (1, 2):
        v = tape["v", layer].repeat_interleave(2, 1)
        torch.testing.assert_close((weights @ v).transpose(1, 2), tape["z", layer], rtol=1e-5, atol=1e-5)
    with steer(model, ShareAttention(((1, 2),), recompute=True)), pytest.raises(Unsupported, match="dropout"):
        model(**inputs)
    with pytest.raises(Unsupported, match="set attention_dropout to 0"):
        share_attention_(model, ((1, 2),))


def test_what_changes_the_leaders_weights_is_shared_with_them():
    model, inputs = make("llama"), prompt(length=16)
    act = AttentionCalibration(heads={0: [0, 1, 2, 3]}, alpha=1.2)
    with steer(model, act, ShareAttention(((0, 1),))):
        tape = record(model, inputs, sites=("weights",))
    with steer(model, act):
        alone = record(model, inputs, sites=("weights",))
    assert torch.equal(tape["weights", 1], alone["weights", 0])
    assert not torch.allclose(alone["weights", 0], record(model, inputs, sites=("weights",))["weights", 0])


def test_the_changed_model_can_be_copied_trained_and_saved(tmp_path):
    model, inputs = make("qwen3"), prompt(length=12)
    share_attention_(model, ((1, 2),))
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(2)
        assert not torch.allclose(other(**inputs).logits, model(**inputs).logits)
        other.model.layers[1].self_attn.q_proj.weight.mul_(2)
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = share_attention_(type(model).from_pretrained(tmp_path), ((1, 2),))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "blocks, error, message",
    [
        (((0, 2),), OptionError, "consecutive layers"),
        (((1, 0),), OptionError, "consecutive layers"),
        (((),), OptionError, "consecutive layers"),
        (((2, 3),), OptionError, "beyond the 3 layers"),
        (((0, 1), (1, 2)), OptionError, "layer 1 is in two blocks"),
    ],
)
def test_blocks_that_cannot_be_are_refused(blocks, error, message):
    model = make("llama")
    for share in (lambda: steer(model, ShareAttention(blocks)).__enter__(), lambda: share_attention_(model, blocks)):
        with pytest.raises(error, match=message):
            share()


def test_layers_of_different_kinds_and_heads_are_refused():
    gemma = make("gemma3")
    for share in (
        lambda: steer(gemma, ShareAttention(((0, 1),))).__enter__(),
        lambda: share_attention_(gemma, ((0, 1),)),
    ):
        with pytest.raises(Unsupported, match="different kinds"):
            share()
    with pytest.raises(Unsupported, match="no q_proj and k_proj"):
        share_attention_(make("gpt2"), ((0, 1),))
    with pytest.raises(Unsupported, match="no q_proj and k_proj"):
        share_attention_(make("deepseek"), ((0, 1),))
    sliding = hf.Qwen2Config(**SIZES, sliding_window=4, use_sliding_window=True, layer_types=["sliding_attention"] * 3)
    with pytest.raises(Unsupported, match="sliding_attention"):
        share_attention_(hf.Qwen2ForCausalLM(sliding), ((0, 1),))
    model = llama(3)
    attention = model.model.layers[1].self_attn
    attention.k_proj = torch.nn.Linear(32, 32, bias=False)
    attention.v_proj = torch.nn.Linear(32, 32, bias=False)
    attention.num_key_value_groups = 1
    with steer(model, ShareAttention(((0, 1),))), pytest.raises(Unsupported, match="differ in heads"):
        model(**prompt(length=6))
    with pytest.raises(Unsupported, match="differ in heads"):
        share_attention_(model, ((0, 1),))


def test_layers_that_hold_different_keys_are_refused():
    model, inputs = make("llama"), prompt(length=16)
    evict = Recency(budget=6, layers=(1,))
    with steer(model, ShareAttention(((0, 1),)), evict), pytest.raises(Unsupported, match="hold different keys"):
        generate(model, inputs)
    share_attention_(model, ((0, 1),))
    with steer(model, Recency(budget=6)), pytest.raises(Unsupported, match="keeps values only"):
        generate(model, inputs)
    with pytest.raises(Unsupported, match="Static"):
        generate(model, inputs, cache_implementation="static")


def test_a_follower_without_its_leader_says_so():
    model = share_attention_(make("llama"), ((1, 2),))
    with pytest.raises(OptionError, match="shares its attention already"):
        share_attention_(model, ((0, 1),))
    with pytest.raises(OptionError, match="shares its attention already"):
        share_attention_(model, ((1, 2),))
    model.train()
    # its name changed between versions
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    with pytest.raises(Unsupported, match="without its leader"):
        model(**prompt(length=6)).logits.sum().backward()
