"""Sessions on every family: what acts, in which order, and that nothing stays."""

import copy

import pytest
import torch
from torch import nn

from regard import OptionError, SnapKV, Unsupported, recording, steer
from regard.contract.card import InterventionCard
from regard.hosts.transformers.specimens import DECODERS, MAKERS, make, prompt


def card(*sites, owns=()):
    return InterventionCard(slug="test", title="test", exports=("x",), baseline=True, sites=sites, owns=owns)


class Scale:
    """z of one layer times a number."""

    card = card("z")

    def __init__(self, factor, layer=0):
        self.factor, self.layer = factor, layer

    def on_z(self, call, z):
        return z * self.factor if call.layer == self.layer and call.place in ("", "decoder") else z


class Scores:
    """Looks at the scores, so that the explicit way runs, and adds to them."""

    card = card("scores")

    def __init__(self, plus=0.0):
        self.plus = plus

    def on_scores(self, call, scores):
        return scores + self.plus


def given(name, padded=0):
    torch.manual_seed(3)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = prompt(length=24, padded=padded)
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :7]
    if name == "llava":
        inputs["input_ids"][:, 6:22] = 59
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    if name == "qwen_vl":
        inputs["input_ids"][:, 5] = 57
        inputs["input_ids"][:, 6:10] = 59
        inputs["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 16)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 59).int()
    return inputs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", MAKERS)
def test_the_explicit_way_is_the_models_own_and_the_fast_one_is_it_to_the_bit(name):
    model, inputs = make(name), given(name, padded=0 if name in ("llava", "qwen_vl") else 3)
    plain = run(model, inputs)
    with recording(model, sites=("z",)) as tape:
        assert torch.equal(run(model, inputs), plain)
    assert len(tape.layers("z")) == tape.meta["layers"]
    real = torch.ones_like(plain[..., 0], dtype=torch.bool)
    if "attention_mask" in inputs and name != "t5":
        real = inputs["attention_mask"].bool()
    with steer(model, Scores()):
        explicit = run(model, inputs)
    torch.testing.assert_close(explicit[real], plain[real], rtol=1e-4, atol=1e-4)
    with steer(model, Scale(0.5)):
        assert (run(model, inputs) - plain).abs().max() > 1e-4
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("name", [*DECODERS, "t5", "llava", "qwen_vl"])
def test_writing_through_the_explicit_way_is_writing(name):
    model, inputs = make(name), given(name)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    with steer(model, Scores()):
        assert torch.equal(model.generate(**inputs, **options), plain)
    with steer(model, Scores()):
        beams = model.generate(**inputs, **options, num_beams=3)
    assert torch.equal(model.generate(**inputs, **options, num_beams=3), beams)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_implementation_that_was_there_comes_back(before):
    model, inputs = make("llama"), prompt(length=9)
    model.set_attn_implementation(before)
    plain = model(**inputs, output_attentions=before == "eager")
    with recording(model, sites=("z",)):
        inside = model(**inputs, output_attentions=before == "eager")
    assert torch.equal(inside.logits, plain.logits)
    if before == "eager":
        assert all(torch.equal(a, b) for a, b in zip(inside.attentions, plain.attentions, strict=True))
    assert model.config._attn_implementation == before


def test_the_vision_tower_keeps_its_own():
    model, inputs = make("llava"), given("llava")
    places = set()

    class Look:
        card = card("weights")

        def on_read(self, call, seen):
            places.add(call.place)

    with steer(model, Look()):
        run(model, inputs)
        assert model.config.text_config._attn_implementation == "regard"
        assert model.config.vision_config._attn_implementation == "sdpa"
    assert places == {""}
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_sessions_stack_and_may_end_in_any_order():
    model, inputs = make("llama"), prompt(length=9)
    plain = run(model, inputs)
    with steer(model, Scale(0.5)):
        half = run(model, inputs)
        with steer(model, Scale(0.5)):
            quarter = run(model, inputs)
        assert torch.equal(run(model, inputs), half)
    with steer(model, Scale(0.25)):
        assert torch.equal(run(model, inputs), quarter)
    first, second = steer(model, Scale(0.5)), steer(model, Scale(0.25))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with_second = run(model, inputs)
    second.__exit__(None, None, None)
    assert torch.equal(with_second, quarter)
    assert torch.equal(run(model, inputs), plain)


def test_order_is_that_of_the_arguments():
    model, inputs = make("llama"), prompt(length=9)
    order = []

    class Tell(Scores):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def on_scores(self, call, scores):
            order.append(self.name)
            return scores

    with steer(model, Tell("a"), Tell("b")):
        run(model, inputs)
    assert order[:2] == ["a", "b"]


def test_an_error_in_the_model_or_at_the_start_leaves_nothing():
    model, inputs = make("llama"), prompt(length=9)
    plain = run(model, inputs)

    class Fails:
        card = card("z")

        def on_z(self, call, z):
            raise ValueError("no")

    class FailsAtOnce:
        card = card("z")

        def start(self, session):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"), steer(model, Fails()):
        run(model, inputs)
    with pytest.raises(ValueError, match="no"), steer(model, Scale(0.5), FailsAtOnce()):
        pass
    with (
        pytest.raises(Unsupported, match="no routers"),
        steer(model, Scale(0.5), type("R", (), {"card": card("router")})()),
    ):
        pass
    assert torch.equal(run(model, inputs), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_copy_made_inside_is_refused_with_a_reason():
    model, inputs = make("llama"), prompt(length=9)
    with steer(model, Scale(0.5)):
        other = copy.deepcopy(model)
        with pytest.raises(Unsupported, match="copy models outside"):
            run(other, inputs)


@pytest.mark.parametrize("make_mask", ["float", "bool"])
def test_masks_of_four_axes_are_read(make_mask):
    model, ids = make("llama"), prompt(length=9)["input_ids"]
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    causal[5:, 2] = False
    mask = causal[None, None].expand(2, 1, 9, 9)
    if make_mask == "float":
        mask = torch.zeros(2, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    plain = run(model, {"input_ids": ids, "attention_mask": mask})
    with steer(model, Scores()):
        torch.testing.assert_close(run(model, {"input_ids": ids, "attention_mask": mask}), plain, rtol=1e-4, atol=1e-5)


class Drop:
    """The tokens site: after `layer` some prompt tokens go no further."""

    card = card("tokens")

    def __init__(self, layer, keep):
        self.layer, self.keep = layer, keep

    def on_tokens(self, step, layer, x):
        return self.keep.expand(x.shape[0], -1) if layer == self.layer else None


class HideDropped(Scores):
    """The oracle: from a layer on, nobody sees the dropped tokens."""

    def __init__(self, layer, keep, length):
        self.layer = layer
        self.hidden = torch.ones(length, dtype=torch.bool)
        self.hidden[keep] = False

    def on_scores(self, call, scores):
        if call.layer < self.layer:
            return scores
        hidden = torch.zeros(scores.shape[-1], dtype=torch.bool)
        hidden[: len(self.hidden)] = self.hidden
        return scores.masked_fill(hidden, float("-inf"))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("cached", [True, False])
def test_dropped_tokens_are_as_if_hidden_from_there_on(name, padded, cached):
    model, inputs = make(name), prompt(length=20, padded=padded)
    keep = torch.tensor([0, 2, 5, 6, 7, 11, 15, 16, 19])
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5, "use_cache": cached}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    if not cached:
        options["max_new_tokens"] = 1
    with steer(model, Drop(1, keep)):
        ours = model.generate(**inputs, **options)
    with steer(model, HideDropped(1, keep, 20)):
        wanted = model.generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)


def test_tokens_cannot_be_dropped_before_a_sliding_cache():
    model = make("gemma3")
    with (
        steer(model, Drop(0, torch.tensor([0, 3, 8]))),
        pytest.raises(Unsupported, match="layer 0 has a sliding cache"),
    ):
        model.generate(**prompt(length=9), max_new_tokens=2, pad_token_id=0)


def test_a_stack_of_fixed_length_is_refused():
    with pytest.raises(Unsupported, match="GPT2LMHeadModel shapes its output"):
        steer(make("gpt2"), Drop(1, torch.arange(3))).__enter__()


def test_the_last_token_must_stay():
    model = make("llama")
    with steer(model, Drop(1, torch.tensor([0, 1, 2]))), pytest.raises(OptionError, match="last token must be kept"):
        run(model, prompt(length=9))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek"])
def test_an_expert_that_is_given_no_weight_is_an_expert_of_zeros(name):
    model, inputs = make(name), prompt(length=9)

    class Off:
        card = card("router")

        def on_router(self, step, choice):
            choice.weights = choice.weights.masked_fill(choice.experts == 1, 0.0)
            return choice

    with steer(model, Off()):
        ours = run(model, inputs)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith("Experts"):
                module.down_proj[1] = 0
    torch.testing.assert_close(ours, run(model, inputs), rtol=1e-4, atol=1e-4)


def test_logits_of_the_next_token_are_changed_and_no_others():
    model, inputs = make("llama"), prompt(length=9)

    class Ban:
        card = card("logits")

        def on_logits(self, step, ids, logits):
            return logits.index_fill(-1, torch.tensor([7]), float("-inf"))

    plain = run(model, inputs)
    with steer(model, Ban()):
        out = run(model, inputs)
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(out[:, :-1], plain[:, :-1]) and (out[:, -1, 7] == float("-inf")).all()
    assert not (written[:, 9:] == 7).any()


def test_settings_are_changed_for_the_session_only():
    model, inputs = make("llama"), prompt(length=9)

    class Bidirectional:
        card = card("weights")

        def start(self, session):
            session.change(model.config, "is_causal", False)
            return self

    had = hasattr(model.config, "is_causal")
    if not had:
        model.config.is_causal = True
    with steer(model, Bidirectional(), Scores()), recording(model) as tape:
        run(model, inputs)
    assert (tape["weights", 0][:, :, 0, -1] > 0).all()
    assert model.config.is_causal is True


def test_foreign_models_and_foreign_things_are_refused():
    with pytest.raises(Unsupported, match="no host knows a torch"):
        steer(nn.Linear(2, 2), SnapKV())
    with pytest.raises(OptionError, match="is no intervention; write"):
        steer(make("llama"), SnapKV)
    with pytest.raises(OptionError, match="is no intervention"):
        steer(make("llama"), "snapkv")


def test_an_empty_session_is_no_session():
    model, inputs = make("llama"), prompt(length=9)
    plain = run(model, inputs)
    with steer(model):
        assert model.config._attn_implementation == "sdpa"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.equal(run(model, inputs), plain)
