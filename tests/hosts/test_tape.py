"""What the tape holds is what the model did, and recording changes nothing."""

import pytest
import torch
import transformers as hf

from regard import Edit, OptionError, Unsupported, lens, patch, record, recording
from regard.hosts.contributions import head_outputs
from regard.hosts.transformers.anatomy import anatomy
from regard.hosts.transformers.specimens import DECODERS, make, prompt
from tests.hosts.test_session import given as full_inputs

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


def met(name, model, layer, inputs, weights):
    """Who may meet whom, by the definition of each family: bool, of the shape of the weights."""
    n, m = weights.shape[2:]
    i, j = torch.arange(n)[:, None], torch.arange(m)
    allowed = torch.ones(n, m, dtype=torch.bool) if name in ("bert", "vit") else j <= i
    if (getattr(model.config, "layer_types", None) or [""] * 9)[layer] == "sliding_attention":
        allowed = allowed & (i - j < model.config.sliding_window)
    allowed = allowed.expand(weights.shape).clone()
    if name not in ("vit", "t5"):
        allowed &= inputs["attention_mask"].bool()[:, None, None]
    return allowed


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
        allowed = met(name, model, layer, inputs, weights)
        # all is given to those who may be seen; a pad that sees nobody gives nothing
        assert (weights[~allowed] == 0).all()
        torch.testing.assert_close(weights.sum(-1), allowed.any(-1).float(), rtol=0, atol=1e-5)
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


@pytest.mark.parametrize("name", [*DECODERS, "vit"])
def test_heads_and_layers_sum_to_the_stream_before_the_final_norm(models, name):
    # experts are multiplied in single precision alone; a norm after the heads is told apart by probing
    near = 1e-5 if name in ("mixtral", "qwen3_moe", "deepseek") else 1e-6 if name == "gemma3" else 1e-8
    dtype = torch.float32 if near == 1e-5 else torch.float64
    model, inputs = make(name).to(dtype), kwargs_of(name)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    tape = record(model, inputs, sites=("embed", "z", "attn_out", "mlp_out", "resid_post"))
    total = tape["embed"]
    for layer in range(tape.meta["layers"]):
        parts = head_outputs(model, tape, layer)
        total = total + parts.heads.sum(2) + parts.rest + tape["mlp_out", layer]
    torch.testing.assert_close(total, tape["resid_post", -1], rtol=near, atol=near)


@pytest.mark.parametrize("name", ["llava", "qwen_vl"])
def test_recording_changes_no_bit_of_a_model_that_sees(models, name):
    model, inputs = models(name), full_inputs(name)
    with torch.no_grad():
        plain = model(**inputs)[0]
    tape = record(
        model,
        inputs,
        sites=(*STREAMS, *CALLS),
        modules=("model.visual" if name == "qwen_vl" else "model.vision_tower",),
    )
    assert torch.equal(tape.output[0], plain)
    assert torch.equal(tape.meta["ids"], inputs["input_ids"])
    assert torch.equal(tape.meta["image_tokens"], inputs["input_ids"] == 59) and tape.meta["image_tokens"].any()
    for layer in range(tape.meta["layers"]):
        weights, v, z = tape["weights", layer], tape["v", layer], tape["z", layer]
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-5)
        v = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
        torch.testing.assert_close((weights @ v).transpose(1, 2), z, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "t5"])
def test_gradients_of_every_kind_are_the_slopes_of_what_stands_there(models, name):
    model, inputs = models(name), full_inputs(name)
    sites = ("q", "k", "v", "scores", "weights", "z", "resid_pre", "attn_out", "mlp_out", "resid_post")

    def target(output):
        return output.logits[0, -1, 7]

    for site in sites:
        tape = record(model, inputs, sites=(site,), grads=True)
        tape.backward(target)
        slope, value = tape.grad(site, 1), tape[site, 1].detach()
        torch.manual_seed(5)
        way = torch.randn_like(value) * 1e-3
        with torch.no_grad():
            up, down = (_at(model, inputs, Edit(site, 1, value=value + sign * way), target) for sign in (1, -1))
        wanted = float((up - down) / 2)
        assert float((slope * way).sum()) == pytest.approx(wanted, rel=2e-2, abs=1e-4), site
        model.zero_grad()
    some = record(model, inputs, sites=("z",), heads=(1,), grads=True)
    some.backward(target)
    with pytest.raises(OptionError, match="without heads=, rows= and reduce="):
        some.grad("z", 1)
    model.zero_grad()


def _at(model, inputs, edit, target):
    with patch(model, [edit]):
        return target(model(**inputs))


PATCHED = (
    "embed",
    "resid_pre",
    "q",
    "k",
    "v",
    "scores",
    "weights",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
)


@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit", "t5"])
def test_in_every_family_a_patch_with_its_own_values_is_nothing(models, name):
    model, inputs = models(name), kwargs_of(name)
    lacking = {"resid_mid"} if name in ("bert", "t5") else set()
    sites = [site for site in PATCHED if site not in lacking]
    tape = record(model, inputs, sites=sites)
    size = float(tape.output[0].abs().max())
    for site in sites:
        with torch.no_grad(), patch(model, [Edit(site, layer, from_tape=tape) for layer in tape.layers(site)]):
            same = model(**inputs)[0]
        torch.testing.assert_close(
            same, tape.output[0], rtol=1e-4, atol=1e-5 * size, msg=lambda text, site=site: f"{site}: {text}"
        )


@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit"])
def test_in_every_family_the_first_layer_of_another_run_is_that_run(models, name):
    model, inputs, other = models(name), kwargs_of(name), kwargs_of(name)
    if name == "vit":
        other = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        other = prompt(length=10, seed=5)
    sites = [site for site in PATCHED if not (site == "resid_mid" and name == "bert")]
    corrupt, clean = (record(model, x, sites=sites) for x in (other, inputs))
    with torch.no_grad(), patch(model, [Edit(site, 0, from_tape=corrupt) for site in sites]):
        out = model(**inputs)[0]
    torch.testing.assert_close(out, corrupt.output[0], rtol=1e-4, atol=1e-5)
    assert (out - clean.output[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit", "t5", "llava", "qwen_vl"])
def test_in_every_family_nothing_is_left_after_a_recording_and_after_an_error_in_it(name):
    model, inputs = make(name), full_inputs(name)
    with torch.no_grad():
        # some families hook their own parts at the first run
        model(**inputs)
    modules = dict(model.named_modules())
    before = {n: (sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in modules.items()}
    configs = {n: m.config._attn_implementation for n, m in modules.items() if hasattr(m, "config")}
    last = anatomy(model).main.layers[-1].module

    def fail(module, args, output):
        raise ValueError("in the middle")

    record(model, inputs, sites=("weights", "resid_post"), modules=("",))
    hook = last.register_forward_hook(fail)
    with pytest.raises(ValueError, match="in the middle"):
        record(model, inputs, sites=("weights", "resid_post"), grads=True)
    hook.remove()
    with pytest.raises(Unsupported, match="more than"):
        record(model, inputs, limit_bytes=10)
    after = {n: (sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in modules.items()}
    assert after == before
    assert configs == {n: m.config._attn_implementation for n, m in modules.items() if hasattr(m, "config")}


def test_modules_are_reached_by_their_names(models):
    model, inputs = models("llama"), prompt(length=9)
    names = ("model.layers.1.mlp.gate_proj", "model.layers.1.self_attn", "model", "model.layers.2")
    with torch.no_grad():
        plain = model(**inputs)
    tape = record(model, inputs, sites=("resid_post", "attn_out", "final"), modules=names)
    assert torch.equal(tape.output.logits, plain.logits)
    assert tape.module(names[0]).shape == (2, 9, 48)
    # of several values the first: attention gives its output and weights, the stack its last stream
    assert torch.equal(tape.module(names[1]), tape["attn_out", 1])
    assert torch.equal(tape.module("model"), tape["final"])
    assert torch.equal(tape.module("model.layers.2"), tape["resid_post", 2])
    assert torch.equal(tape["model.layers.2"], tape["resid_post", 2])
    # those whose output is a site need no naming
    assert torch.equal(tape.module("model.layers.0"), tape["resid_post", 0])
    assert torch.equal(tape.module("model.layers.0.self_attn.o_proj"), tape["attn_out", 0])
    assert torch.equal(tape.module("model.norm"), tape["final"])
    with pytest.raises(OptionError, match=r"record with modules=\('model.layers.0.mlp',\), or sites=\('mlp_out',\)"):
        tape.module("model.layers.0.mlp")
    with pytest.raises(OptionError, match=r"no module 'model.layer.0' \(did you mean 'model.layers.0'"):
        record(model, inputs, modules=("model.layer.0",))


def test_modules_are_counted_by_their_calls_and_hold_what_the_model_used(models):
    model, inputs = models("llama"), prompt(length=9)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    name = "model.layers.1"
    with recording(model, sites=("resid_post",), modules=(name, "lm_head")) as tape:
        model.generate(**inputs, **options)
    assert tape.steps() == 4
    for step in range(4):
        assert torch.equal(tape.module(name, step=step), tape["resid_post", 1, step])
    with recording(model, sites=(), modules=(name,), steps=False) as first:
        model.generate(**inputs, **options)
    assert torch.equal(first.module(name), tape.module(name))
    with pytest.raises(OptionError, match="step 1, is on the tape"):
        first.module(name, step=1)
    # a patch laid later is in what is recorded
    with recording(model, sites=(), modules=(name,)) as tape, patch(model, [Edit("resid_post", 1, value=0.5)]):
        model(**inputs)
    assert (tape.module(name) == 0.5).all()


def test_gradients_of_modules(models):
    model, inputs = models("llama"), prompt(length=9)
    tape = record(
        model, inputs, sites=("mlp_out",), modules=("model.layers.1.mlp", "model.layers.0.self_attn"), grads=True
    )
    tape.backward(lambda output: output.logits[0, -1, 7])
    assert torch.equal(tape.grad("model.layers.1.mlp", 0), tape.grad("mlp_out", 1))
    assert tape.grad("model.layers.0.self_attn", 0).abs().max() > 0
    model.zero_grad()


def test_what_gives_no_tensor_is_refused(models):
    model = models("llama")

    class Odd(torch.nn.Identity):
        def forward(self, x):
            return "text"

    model.odd = Odd()
    try:
        with recording(model, modules=("odd",)), pytest.raises(Unsupported, match="the module 'odd' gives a str"):
            model.odd(1)
    finally:
        del model.odd


def test_names_of_another_tool_lead_to_the_same_places_and_back(models):
    model, inputs = models("llama"), prompt(length=9)
    tape = record(model, inputs, sites=(*STREAMS, *CALLS, "resid_mid", "mlp_hidden"))
    for (kind, layer, _), value in tape.items():
        name = tape.name(kind, layer)
        assert tape.place(name) == (kind, layer)
        assert torch.equal(tape[name], value)
    assert torch.equal(tape["pattern", 2], tape["weights", 2])
    assert torch.equal(tape["attn_scores", -1], tape["scores", 2])
    with pytest.raises(
        OptionError, match=r"no kind is called 'blocks.1.attn.hook_patern' \(did you mean 'blocks.1.attn.hook_pattern'"
    ):
        tape["blocks.1.attn.hook_patern"]
    with pytest.raises(OptionError, match="'weights' stands in every layer"):
        tape["weights"]


def test_logits_are_on_the_tape_of_a_run(models):
    model, inputs = models("llama"), prompt(length=9)
    for sites in (("weights",), ("logits",)):
        tape = record(model, inputs, sites=sites)
        assert torch.equal(tape["logits"], tape.output.logits)
    with recording(model) as tape:
        model(**inputs)
    with pytest.raises(OptionError, match="nothing of 'logits'"):
        tape["logits"]


def test_values_are_kept_where_and_as_one_wants_them(models):
    model, inputs = models("mixtral"), prompt(length=9)
    tape = record(model, inputs, sites=("weights", "resid_post", "router"), device="cpu", dtype=torch.bfloat16)
    whole = record(model, inputs, sites=("weights", "resid_post", "router"))
    assert torch.equal(tape["weights", 1], whole["weights", 1].bfloat16())
    assert tape["resid_post", 0].dtype == torch.bfloat16
    logits, _, experts = tape["router", 0]
    assert logits.dtype == torch.bfloat16 and torch.equal(experts, whole["router", 0][2])
    assert record(model, inputs, device="meta")["weights", 0].device.type == "meta"
    held = sum(x.nbytes for _, x in record(model, inputs, dtype=torch.bfloat16).items())
    record(model, inputs, dtype=torch.bfloat16, limit_bytes=held + 2 * 2 * 4 * 9 * 9)
    with pytest.raises(OptionError, match="leave device= and dtype= out"):
        record(model, inputs, grads=True, dtype=torch.bfloat16)


def test_weights_are_reduced_by_a_function(models):
    model, inputs = models("llama"), prompt(length=9)

    def furthest(weights):
        return weights.argmax(-1)

    whole = record(model, inputs)
    tape = record(model, inputs, reduce=furthest, heads=(0, 2))
    assert torch.equal(tape["weights", 1], whole["weights", 1][:, [0, 2]].argmax(-1))
    both = record(model, inputs, reduce=(furthest, "entropy"))
    assert torch.equal(both["weights:furthest", 1], whole["weights", 1].argmax(-1))
    assert both["weights:entropy", 1].shape == (2, 4, 9)


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
