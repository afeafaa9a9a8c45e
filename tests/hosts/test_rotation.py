"""Queries and keys before rotation, against what the projections of every family give."""

import pytest
import torch
import transformers as hf

from regard import OptionError, Recency, Unsupported, record, recording, steer
from regard.contract.card import InterventionCard
from regard.hosts.transformers.specimens import SIZES, make, prompt
from tests.hosts.test_session import given


class Reader:
    """Notes q and k before rotation, and the keys' positions, by step and layer."""

    card = InterventionCard(slug="test", title="test", exports=("x",), baseline=True, sites=("q", "k"))
    needs_rotation = True

    def __init__(self):
        self.seen, self.positions, self.calls = {}, {}, {}

    def on_attention(self, call, follow):
        if call.main:
            place = (call.step.index, call.layer)
            self.seen[place], self.positions[place], self.calls[place] = call.unrotated(), call.positions, call
        return follow()


class Projections:
    """What comes out of the projections, or of the norms of heads after them: (B, N, H, D), by pass and layer."""

    def __init__(self, model, names=("q", "k")):
        self.out, self.hooks = {}, []
        for number, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for name in names:
                last = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
                width = attention.head_dim
                self.hooks.append(last.register_forward_hook(self._note(number, name, width)))

    def _note(self, layer, name, width):
        def hook(module, args, out):
            # one row is the token that is tried
            if len(out) == 1:
                return
            # some norms get heads before tokens
            tokens = self.tokens
            made = (
                out.transpose(1, 2) if out.dim() == 4 and out.shape[2] == tokens else out.reshape(2, tokens, -1, width)
            )
            self.out.setdefault((name, layer), []).append(made.transpose(1, 2))

        return hook


def heads_of(out, heads):
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)


def passes(model, inputs, reader, pieces=(13, 1, 5, 1)):
    """A prompt in pieces under the reader, and what the projections gave."""
    truth, cache, start = Projections(model), None, 0
    with torch.no_grad(), steer(model, reader):
        for size in pieces:
            truth.tokens = size
            part = {"input_ids": inputs["input_ids"][:, start : start + size]}
            part["attention_mask"] = inputs["attention_mask"][:, : start + size]
            cache = model(**part, past_key_values=cache, use_cache=True).past_key_values
            start += size
    for hook in truth.hooks:
        hook.remove()
    return truth.out


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
OTHERS = {
    "llama, yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, rope_parameters=YARN)),
    "glm": lambda: hf.GlmForCausalLM(hf.GlmConfig(**SIZES, head_dim=8)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(
        hf.Cohere2Config(**SIZES, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1])),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**SIZES, partial_rotary_factor=0.5)),
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3_moe", *OTHERS])
def test_it_is_what_the_projections_give(name):
    torch.manual_seed(0)
    model = OTHERS[name]().eval() if name in OTHERS else make(name)
    reader = Reader()
    truth = passes(model, prompt(length=20, padded=3), reader)
    assert len(reader.seen) == 4 * 3
    for (step, layer), (q, k) in reader.seen.items():
        keys = torch.cat(truth["k", layer][: step + 1], 2)
        torch.testing.assert_close(q, truth["q", layer][step], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(k, keys[:, :, -k.shape[2] :], rtol=1e-4, atol=1e-4)
    # and it is undone, where there is something to undo
    turned = [reader.calls[0, layer].q for layer in range(3)]
    assert sum((a - truth["q", layer][0]).abs().max() > 0.01 for layer, a in enumerate(turned)) >= 2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_a_tape_holds_them_unrotated_when_asked(name):
    model, inputs = make(name), prompt(length=9, padded=2)
    truth = Projections(model)
    truth.tokens = 9
    with torch.no_grad():
        model(**inputs)
    for hook in truth.hooks:
        hook.remove()
    tape, turned = (record(model, inputs, sites=("q", "k", "v"), rotated=rotated) for rotated in (False, True))
    for layer in range(3):
        for kind in ("q", "k"):
            torch.testing.assert_close(tape[kind, layer], truth.out[kind, layer][0], rtol=1e-4, atol=1e-4)
            assert (turned[kind, layer] - tape[kind, layer]).abs().max() > 0.01
        assert torch.equal(tape["v", layer], turned["v", layer])
    some = record(model, inputs, sites=("q",), rotated=False, heads=(1,), rows=(-1,))
    torch.testing.assert_close(some["q", 1], tape["q", 1][:, [1]][:, :, [-1]])
    with pytest.raises(OptionError, match="leave rotated=False out"):
        record(model, inputs, sites=("q",), rotated=False, grads=True)


def test_models_without_rotation_are_recorded_as_they_are():
    model, inputs = make("gpt2"), prompt(length=9)
    one, other = (record(model, inputs, sites=("q", "k"), rotated=rotated) for rotated in (False, True))
    assert torch.equal(one["q", 1], other["q", 1]) and torch.equal(one["k", 1], other["k", 1])


def test_positions_of_three_axes_are_undone():
    model, reader = make("qwen_vl"), Reader()
    made = {}
    layer = model.model.language_model.layers[1].self_attn
    hook = layer.k_proj.register_forward_hook(lambda module, args, out: made.__setitem__(len(out), out))
    with torch.no_grad(), steer(model, reader):
        model(**given("qwen_vl"))
    hook.remove()
    torch.testing.assert_close(reader.seen[0, 1][1], heads_of(made[2], 2), rtol=1e-4, atol=1e-4)


def test_kept_keys_are_turned_back_from_their_own_places():
    model, reader = make("llama"), Reader()
    truth = passes(model, prompt(length=20), reader)
    cut = Reader()
    # the baseline gives up keys before it is read
    with torch.no_grad(), steer(model, Recency(budget=6), cut):
        model.generate(**prompt(length=20), max_new_tokens=4, do_sample=False, pad_token_id=0)
    positions, (_, k) = cut.positions[1, 0], cut.seen[1, 0]
    assert positions.shape[2] == 6 and int(positions.min()) > 10
    old = torch.cat(truth["k", 0], 2).gather(2, positions[..., :5, None].expand(-1, -1, -1, 8))
    torch.testing.assert_close(k[:, :, :5], old, rtol=1e-4, atol=1e-4)


def test_vectors_are_moved_to_other_places():
    model, reader = make("llama"), Reader()
    truth = passes(model, prompt(length=20), reader, pieces=(20,))
    call, k = reader.calls[0, 1], truth["k", 1][0]
    moved = call.rotation.turn(k[:, :, 3:5], torch.tensor([9, 2]))
    alone = call.rotation.turn(k, torch.full((20,), 9))
    torch.testing.assert_close(moved[:, :, 0], alone[:, :, 3])
    # each head and row to a place of its own
    places = torch.arange(2 * 2 * 5 * 3).view(2, 2, 5, 3) % 20
    many = k[:, :, :15].unflatten(2, (5, 3))
    out = call.rotation.turn(many, places)
    for b, g, r, m in ((0, 1, 2, 0), (1, 0, 4, 2)):
        want = call.rotation.turn(many[b : b + 1, g : g + 1, r, m : m + 1], places[b, g, r, m : m + 1])
        torch.testing.assert_close(out[b, g, r, m], want[0, 0, 0])
    torch.testing.assert_close(call.rotation.undo(out, places), many)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "t5"])
def test_what_is_not_rotated_stays(name):
    model, reader = make(name), Reader()
    with torch.no_grad(), steer(model, reader):
        model(**given(name))
    for place, (q, k) in reader.seen.items():
        assert torch.equal(q, reader.calls[place].q) and torch.equal(k, reader.calls[place].k)
    assert reader.seen


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_trying_a_token_leaves_the_cache_alone(name):
    neox = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    model = make("llama") if name == "llama" else hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**neox)).eval()
    plain = model.generate(**prompt(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    reader = Reader()
    with steer(model, reader):
        ours = model.generate(**prompt(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(plain, ours)
    q, k = reader.seen[3, 0]
    assert reader.calls[0, 0].rotation.function is not None and (q.shape[2], k.shape[2]) == (1, 15)


def test_a_first_token_alone_tells_nothing_yet():
    model, reader = make("llama"), Reader()
    truth = passes(model, prompt(length=4), reader, pieces=(1, 1, 2))
    keys = torch.cat(truth["k", 2], 2)
    torch.testing.assert_close(reader.seen[2, 2][1], keys, rtol=1e-4, atol=1e-4)


def test_writing_with_beams():
    model, reader = make("llama"), Reader()
    plain = model.generate(**prompt(padded=3), num_beams=3, max_new_tokens=4, pad_token_id=0)
    with steer(model, reader):
        assert torch.equal(model.generate(**prompt(padded=3), num_beams=3, max_new_tokens=4, pad_token_id=0), plain)


def test_gradients_flow_through_it():
    model, reader = make("qwen3"), Reader()
    with steer(model, reader):
        model(**prompt())
        (found,) = torch.autograd.grad(
            reader.seen[0, 1][0].square().sum(), [model.model.layers[0].self_attn.k_proj.weight]
        )
    assert found.isfinite().all() and found.abs().max() > 0


def test_what_cannot_be_undone_is_refused():
    with (
        steer(make("deepseek"), Reader()) as session,
        pytest.raises(Unsupported, match="turns queries and keys in a way"),
    ):
        session.model(**prompt())
    turns_itself = hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=60, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))
    with pytest.raises(Unsupported, match="GPTJ"), steer(turns_itself, Reader()):
        turns_itself(**prompt())
    model = make("llama")
    cache = model(**prompt()).past_key_values
    with steer(model, Reader()), pytest.raises(Unsupported, match="rotation of 12 tokens was not seen"):
        model(torch.full((2, 1), 5), past_key_values=cache)


def test_an_effect_says_that_it_needs_the_rotation():
    class Forgot(Reader):
        needs_rotation = False

    with steer(make("llama"), Forgot()) as session, pytest.raises(OptionError, match="`needs_rotation`"):
        session.model(**prompt())


def test_nothing_is_recorded_or_laid_unless_an_effect_needs_it():
    model = make("llama")
    with recording(model, sites=("z",)) as tape:
        model(**prompt())
        assert not model.model.layers[0].self_attn._forward_pre_hooks
    assert tape.layers("z")
    with steer(model, Reader()):
        assert model.model.layers[0].self_attn._forward_pre_hooks
    assert not model.model.layers[0].self_attn._forward_pre_hooks
