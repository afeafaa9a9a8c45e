"""Models as people have them: with adapters, compiled, parallel, offloaded, in 16 bits, loaded with another attention."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from regard import SnapKV, Unsupported, lens, record, recording, steer, swap
from regard.contract.attach import model_inside
from regard.contract.card import InterventionCard
from regard.hosts.contributions import head_outputs
from regard.hosts.transformers.specimens import DECODERS, make, prompt

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def card(*sites):
    return InterventionCard(slug="test", title="test", exports=("x",), baseline=True, sites=sites)


class Heads:
    """One head's output, another in every layer: layers that are taken for each other show."""

    card = card("z")

    def on_z(self, call, z):
        factors = torch.ones(z.shape[1], 1, 1, dtype=z.dtype)
        factors[call.layer] = -2.0
        return z * factors if call.main else z


class Stream:
    """A stream between modules alone: attention stays the model's own."""

    card = card()
    hidden_sites = ("attn_out",)

    def on_hidden(self, step, site, layer, x):
        return x * 0.5 if layer == 1 else x


class Logits:
    card = card("logits")

    def on_logits(self, step, ids, logits):
        return logits * 2


class Scores:
    """Looks at the scores, so that the explicit way runs."""

    card = card("scores")

    def on_scores(self, call, scores):
        return scores


class Within(nn.Module):
    """Somebody's own module around a model."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model, nn.Linear(2, 2)

    def forward(self, **given):
        return self.backbone(**given)


def given(name):
    torch.manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = prompt(length=9, padded=2)
    return {**inputs, "decoder_input_ids": inputs["input_ids"][:, :6]} if name == "t5" else inputs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def state(model):
    """What a session could leave behind."""
    found = {}
    for name, module in model.named_modules():
        own = {k: list(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        found[name] = own, [id(x) for x in vars(module)["_modules"].values()]
    return found, {k: v.clone() for k, v in model.state_dict().items()}


def same(before, after):
    return before[0] == after[0] and all(torch.equal(x, after[1][name]) for name, x in before[1].items())


def lora(name="llama", **options):
    """A model with adapters that do something."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    with warnings.catch_warnings():
        # of weights that GPT-2 keeps transposed
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(name), peft.LoraConfig(**options)).eval()
    torch.manual_seed(7)
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        nn.init.normal_(parameter, std=0.1)
    return model


# ---- adapters


@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit", "t5"])
def test_a_model_with_adapters_is_steered_as_the_merged_one(name):
    model, inputs = lora(name), given(name)
    merged = copy.deepcopy(model).merge_and_unload()
    before, plain = state(model), run(model, inputs)
    torch.testing.assert_close(plain, run(merged, inputs), rtol=1e-4, atol=1e-4)
    tape = record(model, inputs, sites=("weights", "z"))
    assert torch.equal(tape.output[0], plain)
    theirs = record(merged, inputs, sites=("weights", "z"))
    for layer in theirs.layers("z"):
        torch.testing.assert_close(tape["z", layer][1], theirs["z", layer][1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(tape["weights", layer][1], theirs["weights", layer][1], rtol=1e-3, atol=1e-4)
    with steer(model, Heads()):
        steered = run(model, inputs)
    with steer(merged, Heads()):
        torch.testing.assert_close(steered, run(merged, inputs), rtol=1e-3, atol=1e-3)
    assert (steered - plain).abs().max() > 1e-3
    assert torch.equal(run(model, inputs), plain) and same(before, state(model))


def test_the_readings_know_a_model_with_adapters():
    model, inputs = lora(), given("llama")
    tape = record(model, inputs, sites=("resid_post", "z", "attn_out"))
    torch.testing.assert_close(lens(model, tape["resid_post", -1]), tape.output.logits, rtol=1e-5, atol=1e-5)
    parts = head_outputs(model, tape, 1)
    torch.testing.assert_close(parts.heads.sum(2) + parts.rest, tape["attn_out", 1], rtol=1e-4, atol=1e-5)
    with steer(model, SnapKV(budget=4, window=2)) as session:
        model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert max(session.report()[0]["kept"]) < 11
    with model.disable_adapter(), recording(model, sites=("z",)) as bare:
        model(**inputs)
    assert torch.equal(bare["z", 2], record(make("llama"), inputs, sites=("z",))["z", 2])


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_that_an_adapter_learns_are_tokens_or_keys_more(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, inputs = peft.get_peft_model(make("llama"), config).eval(), given("llama")
    plain = run(model, inputs)
    tape = record(model, inputs, sites=("weights",))
    assert torch.equal(tape.output.logits, plain)
    queries = 12 if kind == "PromptTuningConfig" else 9
    assert tape["weights", 0].shape == (2, 4, queries, 12)
    with steer(model, Heads()):
        assert (run(model, inputs) - plain).abs().max() > 1e-3
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("way", ["steer", "swap"])
def test_adapters_learn_under_steering_and_nothing_else_does(way):
    model, inputs = lora(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=SEVEN).train(), given("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with steer(model, Heads(), Scores()) if way == "steer" else swap(model, mixer="sigmoid", length=9):
        torch.manual_seed(0)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimiser.step()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {n for n in before if "lora_" in n} and len(touched) == 2 * 7 * 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
        assert parameter.grad is None or bool(parameter.grad.isfinite().all())


# ---- compiled


def in_place(model):
    model.compile(backend="eager")
    return model


def its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def its_base(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def its_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def layers_around(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


COMPILED = {
    "around": lambda model: torch.compile(model, backend="eager"),
    "in one graph": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "outside": lambda model: torch.compile(Within(model), backend="eager"),
    "in place": in_place, "its forward": its_forward, "its base": its_base, "its layers": its_layers,
    "around its layers": layers_around,
}  # fmt: skip


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("steered", ["the one that is called", "the one inside"])
def test_a_model_compiled_before_is_steered_as_if_it_were_not(how, steered, compiler):
    if (how, steered) == ("in one graph", "the one inside"):
        pytest.skip("torch itself refuses to leave a full graph; the next test")
    model, inputs = make("llama"), given("llama")
    plain = make("llama")
    called = COMPILED[how](model)
    compiled = run(called, inputs)
    before = state(called)
    for what in (Stream(), Heads(), Logits()):
        with steer(plain, what):
            wanted = run(plain, inputs)
        with steer(called if steered == "the one that is called" else model, what):
            assert torch.equal(run(called, inputs), wanted)
        assert torch.equal(run(called, inputs), compiled)
    with recording(called, sites=("resid_post", "weights")) as tape:
        run(called, inputs)
    assert tape.layers("resid_post") == tape.layers("weights") == [0, 1, 2]
    assert same(before, state(called))


def test_a_full_graph_of_a_model_steered_inside_is_refused_and_not_run(compiler):
    model, inputs = make("llama"), given("llama")
    called = torch.compile(model, backend="eager", fullgraph=True)
    run(called, inputs)
    with steer(model, Stream()), pytest.raises(RuntimeError, match="fullgraph=True found no compiled frames"):
        run(called, inputs)


def test_what_was_compiled_serves_again_afterwards(compiler):
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    model, inputs = make("llama"), given("llama")
    called = torch.compile(model, backend=count)
    run(called, inputs)
    made = len(graphs)
    with steer(called, Heads()):
        run(called, inputs)
    run(called, inputs)
    assert made >= 1 and len(graphs) == made


def test_a_model_with_adapters_that_was_compiled_is_steered(compiler):
    model, inputs = lora(), given("llama")
    with steer(model, Heads()):
        wanted = run(model, inputs)
    called = torch.compile(model, backend="eager")
    plain = run(called, inputs)
    with steer(called, Heads()):
        assert torch.equal(run(called, inputs), wanted)
    assert torch.equal(run(called, inputs), plain)


def test_the_signature_of_a_steered_model_is_its_own():
    model = make("llama")
    own = inspect.signature(model.forward)
    with steer(model, Heads()):
        assert inspect.signature(model.forward) == own
    assert "forward" not in vars(model)


# ---- around


def test_a_model_inside_anything_is_found():
    model, inputs = make("llama"), given("llama")
    with steer(model, Heads()):
        wanted = run(model, inputs)
    for outer in (Within(model), nn.DataParallel(model, device_ids=[]), nn.Sequential(Within(model))):
        assert model_inside(outer) is model
        called = outer if not isinstance(outer, nn.Sequential) else outer[0]
        with steer(outer, Heads()):
            assert torch.equal(run(called, inputs), wanted)
        assert torch.equal(record(called, inputs).output[0], run(model, inputs))
        torch.testing.assert_close(lens(outer, torch.ones(1, 32)), lens(model, torch.ones(1, 32)))


def test_none_and_several_and_copies_are_refused():
    with pytest.raises(
        Unsupported, match=r"no host knows a torch.*Sequential; there are hosts for models of transformers"
    ):
        steer(nn.Sequential(nn.Linear(2, 2)), Heads())
    with pytest.raises(Unsupported, match=r"no host knows a builtins\.str"):
        steer("llama", Heads())
    with pytest.raises(Unsupported, match=r"holds several models \(LlamaForCausalLM, BertModel\): give the one"):
        steer(nn.ModuleList([make("llama"), make("bert")]), Heads())
    model = make("llama")
    assert model_inside(nn.ModuleList([model, Within(model)])) is model
    parallel = nn.DataParallel(model, device_ids=[])
    parallel.device_ids = [0, 1]
    with pytest.raises(Unsupported, match="DataParallel runs copies of the model on 2 devices"):
        steer(parallel, Heads())


def test_accelerates_hooks_and_precision_stay():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    inputs = given("llama")
    model = make("llama")
    with steer(model, Heads()):
        wanted = run(model, inputs)
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    assert next(offloaded.parameters()).device.type == "meta"
    plain, before = run(offloaded, inputs), sorted(vars(offloaded))
    with steer(offloaded, Heads()):
        assert torch.equal(run(offloaded, inputs), wanted)
    assert torch.equal(run(offloaded, inputs), plain) and sorted(vars(offloaded)) == before
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(make("llama"))
    plain = run(prepared, inputs)
    assert (plain - run(make("llama"), inputs)).abs().max() > 1e-4, "autocast stands around the model"
    assert torch.equal(record(prepared, inputs, sites=("weights",)).output[0], plain)
    with steer(prepared, Heads()):
        assert (run(prepared, inputs) - plain).abs().max() > 1e-3
    assert torch.equal(run(prepared, inputs), plain)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# ---- precision and attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*DECODERS, "bert", "vit", "t5"])
def test_models_in_16_bits_are_recorded_to_the_bit_and_steered_in_their_precision(name, dtype):
    model = make(name).to(dtype)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in given(name).items()}
    plain = run(model, inputs)
    tape = record(model, inputs, sites=("weights", "z"))
    assert torch.equal(tape.output[0], plain)
    assert tape["weights", 0].dtype == tape["z", 0].dtype == dtype
    with steer(model, Scores()):
        explicit = run(model, inputs)
    assert explicit.dtype == dtype
    # the explicit way rounds in other places
    assert (explicit - plain)[1].abs().max() <= 8 * torch.finfo(dtype).eps * plain[1].abs().max()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("way", ["eager", "flex_attention"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "bert"])
def test_a_model_loaded_with_another_attention_keeps_it(name, way):
    inputs = given(name)
    # uncompiled, FlexAttention runs anywhere
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(name)
        model.set_attn_implementation(way)
        plain = run(model, inputs)
        tape = record(model, inputs, sites=("weights", "z"))
        assert torch.equal(tape.output[0], plain)
        with steer(model, Scores()):
            torch.testing.assert_close(run(model, inputs)[1], plain[1], rtol=1e-4, atol=1e-5)
        with steer(model, Heads()):
            steered = run(model, inputs)
        assert torch.equal(run(model, inputs), plain) and model.config._attn_implementation == way
        other = make(name)
        theirs = record(other, inputs, sites=("weights",))
        with steer(other, Heads()):
            torch.testing.assert_close(steered[1], run(other, inputs)[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tape["weights", 1][1], theirs["weights", 1][1], rtol=1e-4, atol=1e-5)
