"""What the tape holds is what the model did, and recording changes nothing."""

import pytest
import torch
import transformers as hf

from regard import Edit, OptionError, Unsupported, lens, patch, record, recording
from regard.hosts.transformers.anatomy import anatomy
from regard.hosts.transformers.specimens import DECODERS, make, prompt

STREAMS = ("embed", "resid_pre", "attn_out", "mlp_out", "resid_post", "final")
CALLS = ("q", "k", "v", "scores", "weights", "z")


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: made.setdefault(name, make(name))


def kwargs_of(name, padded=0):
    if name == "vit":
        torch.manual_seed(2)
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = prompt(length=10, padded=padded)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :6]
    return inputs


@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit", "t5"])
@pytest.mark.parametrize("padded", [0, 3])
def test_recording_changes_no_bit_and_the_parts_fit(models, name, padded):
    model, inputs = models(name), kwargs_of(name, padded)
    with torch.no_grad():
        plain = model(**inputs)[0]
    sites = (*STREAMS, *CALLS)
    if name in ("bert", "t5"):
        sites = ("embed", "attn_out", "mlp_out", "resid_post", *CALLS)
    tape = record(model, inputs, sites=sites)
    assert torch.equal(tape.output[0], plain)
    main = anatomy(model).main
    for layer in range(len(main.layers)):
        weights, v, z = tape["weights", layer], tape["v", layer], tape["z", layer]
        sums = weights.sum(-1)
        seen = sums.round()
        torch.testing.assert_close(sums, seen, rtol=0, atol=1e-5)
        v = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
        torch.testing.assert_close((weights @ v).transpose(1, 2)[1], z[1], rtol=1e-4, atol=1e-5)
        out = main.layers[layer].out
        if name not in ("gemma3",):
            # rows that are real; pads may hold anything
            torch.testing.assert_close(out(z.flatten(2))[1], tape["attn_out", layer][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_the_stream_is_the_sum_of_what_joined_it(models, name):
    model = models(name)
    tape = record(model, prompt(length=9), sites=("embed", "attn_out", "mlp_out", "resid_post", "resid_mid"))
    total = tape["embed", 0]
    for layer in range(tape.meta["layers"]):
        total = total + tape["attn_out", layer]
        torch.testing.assert_close(total, tape["resid_mid", layer], rtol=1e-5, atol=1e-5)
        total = total + tape["mlp_out", layer]
    torch.testing.assert_close(total, tape["resid_post", -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_lens_of_the_last_stream_is_the_model(models, name):
    model, inputs = models(name), prompt(length=9)
    tape = record(model, inputs, sites=("resid_post", "final", "logits"))
    wanted = tape.output.logits
    torch.testing.assert_close(lens(model, tape["resid_post", -1]), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(lens(model, tape["final", 0], norm=False), wanted)
    assert torch.equal(tape["logits", 0], wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("padded", [0, 4])
def test_sums_entropies_and_tops_are_those_of_the_whole_weights(models, name, padded):
    model, inputs = models(name), prompt(length=70, padded=padded)
    whole = record(model, inputs)
    kinds = ("column_sum", "entropy", "sink_mass", "top_k", "last_row")
    some = record(model, inputs, reduce=kinds, count=3)
    for layer in range(3):
        weights = whole["weights", layer].float()
        torch.testing.assert_close(some["weights:column_sum", layer], weights.sum(2), rtol=1e-4, atol=1e-5)
        entropy = torch.special.entr(weights).sum(-1)
        torch.testing.assert_close(some["weights:entropy", layer], entropy, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(some["weights:sink_mass", layer], weights[..., :3].sum(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(some["weights:last_row", layer], weights[:, :, -1:], rtol=1e-4, atol=1e-6)
        top = some["weights:top_k", layer]
        torch.testing.assert_close(top.weights, weights.topk(3, -1).values, rtol=1e-4, atol=1e-6)


def test_rows_heads_and_layers_choose(models):
    model, inputs = models("llama"), prompt(length=9)
    whole = record(model, inputs, sites=("weights", "z"))
    some = record(model, inputs, sites=("weights", "z"), rows=(0, -1), heads=(1, 3), layers=(-1,))
    assert some.layers("weights") == [2]
    torch.testing.assert_close(some["weights", 2], whole["weights", 2][:, [1, 3]][:, :, [0, -1]])
    torch.testing.assert_close(some["z", 2], whole["z", 2][:, [0, -1]][:, :, [1, 3]])
    assert torch.equal(whole.get("z", 1, head=2), whole["z", 1][:, :, 2])
    assert whole.stack("weights").shape == (3, 2, 4, 9, 9)
    assert all(torch.equal(a, b) for a, b in zip(whole.attentions(), whole.stack("weights"), strict=True))


def test_decoding_steps_are_rows_of_one_pass(models):
    model, inputs = models("llama"), prompt(length=9)
    with recording(model, sites=("weights", "z")) as tape:
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = record(model, ids[:, :-1], sites=("weights", "z"))
    assert tape.steps() == 4
    for step in range(1, 4):
        row = 8 + step
        torch.testing.assert_close(
            tape["weights", 1, step][:, :, 0], whole["weights", 1][:, :, row, : row + 1], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(tape["z", 1, step][:, 0], whole["z", 1][:, row], rtol=1e-4, atol=1e-5)


def test_gradients_of_weights_are_those_of_eager_attention(models):
    model, inputs = models("llama"), prompt(length=9)
    tape = record(model, inputs, grads=True)
    tape.backward(lambda output: output.logits[0, -1, 7])
    model.set_attn_implementation("eager")
    try:
        output = model(**inputs, output_attentions=True)
        for weights in output.attentions:
            weights.retain_grad()
        output.logits[0, -1, 7].backward()
        for layer, weights in enumerate(output.attentions):
            torch.testing.assert_close(tape.grad("weights", layer), weights.grad, rtol=1e-4, atol=1e-6)
    finally:
        model.set_attn_implementation("sdpa")
        model.zero_grad()


@pytest.mark.parametrize(
    "site", ["q", "k", "v", "scores", "weights", "z", "resid_pre", "attn_out", "mlp_out", "resid_mid"]
)
def test_a_patch_with_its_own_value_is_nothing_and_with_another_something(models, site):
    model, inputs, other = models("llama"), prompt(length=9), prompt(length=9, seed=5)
    clean, corrupt = (record(model, x, sites=(site,)) for x in (inputs, other))
    with patch(model, [Edit(site, 1, from_tape=clean)]):
        same = model(**inputs).logits
    torch.testing.assert_close(same, clean.output.logits, rtol=1e-5, atol=1e-5)
    with patch(model, [Edit(site, 1, from_tape=corrupt)]), recording(model, sites=(site,)) as tape:
        changed = model(**inputs).logits
    assert (changed - clean.output.logits).abs().max() > 1e-3
    torch.testing.assert_close(tape[site, 1], corrupt[site, 1], rtol=1e-5, atol=1e-6)


def test_the_whole_of_a_layer_from_another_run_is_that_run(models):
    model, inputs, other = models("llama"), prompt(length=9), prompt(length=9, seed=5)
    corrupt = record(model, other, sites=("embed",))
    with patch(model, [Edit("embed", 0, from_tape=corrupt)]):
        out = model(**inputs).logits
    torch.testing.assert_close(out, corrupt.output.logits, rtol=1e-6, atol=1e-6)


def test_heads_and_positions_of_an_edit_leave_the_others(models):
    model, inputs = models("llama"), prompt(length=9)
    with patch(model, [Edit("z", 0, heads=(1,), positions=(-1,), value=0.0)]), recording(model, sites=("z",)) as tape:
        model(**inputs)
    plain = record(model, inputs, sites=("z",))
    assert (tape["z", 0][:, -1, 1] == 0).all()
    changed = tape["z", 0].clone()
    changed[:, -1, 1] = plain["z", 0][:, -1, 1]
    assert torch.equal(changed, plain["z", 0])


def test_ablating_a_head_is_leaving_its_columns_out(models):
    model, inputs = models("llama"), prompt(length=9)
    with patch(model, [Edit("z", 1, heads=(2,), value=0.0)]):
        ablated = model(**inputs).logits
    projection = anatomy(model).main.layers[1].out
    before = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight[:, 16:24] = 0
        wanted = model(**inputs).logits
        projection.weight.copy_(before)
    torch.testing.assert_close(ablated, wanted, rtol=1e-5, atol=1e-6)


def test_too_much_is_refused_before_it_is_kept(models):
    with pytest.raises(Unsupported, match=r"more than .* GiB: keep fewer"):
        record(models("llama"), prompt(length=40), limit_bytes=1000)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sites": ("weight",)}, OptionError, "did you mean 'weights'"),
        ({"reduce": "rows"}, OptionError, "not kept as 'rows'"),
        ({"reduce": "entropy", "rows": (0,)}, OptionError, "leave reduce out"),
        ({"sites": ("router",)}, Unsupported, "LlamaForCausalLM has no routers"),
    ],
)
def test_what_cannot_be_recorded_is_refused(models, options, error, message):
    with pytest.raises(error, match=message):
        record(models("llama"), prompt(length=9), **options)


def test_an_address_that_is_not_there_says_what_is(models):
    tape = record(models("llama"), prompt(length=9), layers=(1,))
    with pytest.raises(OptionError, match=r"it holds weights, layers \[1\]"):
        tape["weights", 0]
    assert ("weights", 1) in tape and ("weights", 0) not in tape
    assert tape.name("weights", 3) == "blocks.3.attn.hook_pattern"


def test_models_without_dispatch_are_refused_by_name():
    config = hf.FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = hf.FalconForCausalLM(config).eval()
    with pytest.raises(Unsupported, match="FalconForCausalLM does not dispatch its attention"):
        record(model, prompt(length=9))
    tape = record(model, prompt(length=9), sites=("resid_post",))
    assert tape["resid_post", 1].shape == (2, 9, 32)


def test_routers_are_recorded(models):
    tape = record(models("mixtral"), prompt(length=9), sites=("router",))
    logits, weights, experts = tape["router", 0]
    assert logits.shape == (18, 4) and weights.shape == experts.shape == (18, 2)


def test_an_edit_takes_one_way():
    with pytest.raises(OptionError, match="one of value="):
        Edit("z", 0)
    with pytest.raises(OptionError, match="did you mean 'weights'"):
        Edit("wieghts", 0, value=0.0)
    with pytest.raises(OptionError, match="needs the tape="):
        patch(None, [], freeze=(("z", 0),))
