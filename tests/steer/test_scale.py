"""Heads and parts scaled or taken out, against the same done to the weights."""

import pytest
import torch
import transformers as hf

from regard import AblateHeads, OptionError, ScaleComponents, Tape, Unsupported, patch, record, recording, steer
from regard import Edit as Change
from regard.hosts.transformers.anatomy import anatomy
from regard.hosts.transformers.specimens import make, prompt
from tests.steer.test_snapkv import generate


def columns(model, layer, head, by):
    """Multiply the columns of the output projection that a head writes through."""
    out = anatomy(model).main.layers[layer].out
    width = out.weight.shape[0 if isinstance(out, hf.pytorch_utils.Conv1D) else 1] // 4
    with torch.no_grad():
        part = slice(head * width, (head + 1) * width)
        if isinstance(out, hf.pytorch_utils.Conv1D):
            out.weight[part] *= by
        else:
            out.weight[:, part] *= by


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3", "deepseek", "bert"])
def test_a_head_scaled_is_its_columns_scaled(family):
    inputs = prompt(length=10, padded=2)
    for head, by in ((2, 0.0), (0, 3.0), (3, -0.5)):
        model, other = make(family), make(family)
        columns(other, 1, head, by)
        wanted = other(**inputs)[0]
        assert (wanted - model(**inputs)[0]).abs().max() > 1e-4
        with steer(model, ScaleComponents({("head", -2, head): by})):
            torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-4)
        if by == 0:
            with steer(model, AblateHeads(heads=[(1, head)])):
                torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_dispatch_loses_heads_too():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.FalconForCausalLM(hf.FalconConfig(**sizes)).eval()
    ids = prompt(length=8)["input_ids"]
    plain = model(ids).logits
    with steer(model, AblateHeads(heads=[(0, 1)])):
        found = model(ids).logits
    with torch.no_grad():
        model.transformer.h[0].self_attention.dense.weight[:, 8:16] = 0
    assert (plain - found).abs().max() > 1e-4
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(Unsupported, match="Falcon"):
        steer(model, AblateHeads(heads=[(0, 1)], mode="mask_query")).__enter__()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_parts_scaled_join_the_stream_scaled(family):
    model, inputs = make(family), prompt(length=10)
    plain = record(model, inputs, sites=("attn_out", "mlp_out", "resid_pre", "resid_post"))
    for kind in ("attn", "mlp"):
        with steer(model, ScaleComponents({(kind, -1): 0.25})):
            tape = record(model, inputs, sites=("attn_out", "mlp_out", "resid_pre", "resid_post"))
        torch.testing.assert_close(tape[f"{kind}_out", 2], 0.25 * plain[f"{kind}_out", 2], rtol=1e-5, atol=1e-6)
        total = tape["resid_pre", 2] + tape["attn_out", 2] + tape["mlp_out", 2]
        torch.testing.assert_close(tape["resid_post", 2], total, rtol=1e-5, atol=1e-5)
        for layer in (0, 1):
            assert torch.equal(tape["resid_post", layer], plain["resid_post", layer])


def test_several_parts_at_once_and_factors_of_1():
    model, inputs = make("llama"), prompt(length=10, padded=2)
    plain = generate(model, inputs)
    for nothing in ({}, {("attn", 0): 1.0, ("mlp", -1): 1.0, ("head", 1, 2): 1.0}):
        with steer(model, ScaleComponents(nothing)):
            ours = generate(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))
    with steer(model, ScaleComponents({("attn", 0): 0.5, ("head", 1, 2): 0.0, ("head", 1, 0): 2.0})):
        found = model(**inputs).logits
    part, more = ScaleComponents({("attn", 0): 0.5}), ScaleComponents({("head", 1, 0): 2.0})
    with steer(model, part, AblateHeads(heads=[(1, 2)])), steer(model, more):
        torch.testing.assert_close(model(**inputs).logits, found, rtol=1e-5, atol=1e-5)
    after = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, after.logits, strict=True))


@pytest.mark.parametrize("padded", [0, 3])
def test_a_mean_is_that_of_the_real_tokens_on_the_tape(padded):
    model, inputs = make("llama"), prompt(length=10, padded=padded)
    tape = record(model, prompt(length=12, padded=4, seed=5), sites=("z",))
    z = tape["z", 1]
    mean = torch.cat((z[0, 4:], z[1])).mean(0)[2]
    with steer(model, AblateHeads(heads=[(1, 2)], mode="mean", tape=tape)):
        found = model(**inputs).logits
    with patch(model, [Change("z", 1, heads=[2], value=mean)]):
        torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padded", [0, 4])
def test_a_resampled_head_says_what_it_says_at_real_tokens_of_the_tape(padded):
    model, inputs = make("llama"), prompt(length=10)
    other = record(model, prompt(length=12, padded=padded, seed=5), sites=("z",))
    heads = [(0, 1), (2, 3), (2, 0)]
    free = record(model, inputs, sites=("z",))
    with steer(model, AblateHeads(heads=heads, mode="resample", tape=other)):
        ours = record(model, inputs, sites=("z",))
    real = [(row, place) for row in range(2) for place in range(padded if row == 0 else 0, 12)]
    drawn = {}
    for layer, head in heads:
        said = torch.stack([other["z", layer][row, place, head] for row, place in real])
        away = torch.cdist(ours["z", layer][:, :, head].flatten(0, 1), said)
        assert (away.amin(1) < 1e-5).all()
        drawn[layer, head] = away.argmin(1)
    # one token speaks through all heads, another at every place
    assert torch.equal(drawn[0, 1], drawn[2, 3]) and torch.equal(drawn[0, 1], drawn[2, 0])
    assert len(drawn[0, 1].unique()) > 8
    assert torch.equal(ours["z", 0][:, :, [0, 2, 3]], free["z", 0][:, :, [0, 2, 3]])

    def logits(seed):
        with steer(model, AblateHeads(heads=heads, mode="resample", tape=other, seed=seed)):
            return model(**inputs).logits

    torch.testing.assert_close(logits(0), ours.output.logits)
    assert not torch.allclose(logits(0), logits(1))


def test_a_resampled_head_draws_anew_at_every_token_written():
    model, inputs = make("llama"), prompt(length=6)
    other = record(model, prompt(length=12, seed=5), sites=("z",))
    with steer(model, AblateHeads(heads=[(1, 2)], mode="resample", tape=other)), recording(model, sites=("z",)) as tape:
        model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    said = torch.cat([tape["z", 1, step][:, 0, 2] for step in range(1, 5)])
    away = torch.cdist(said, other["z", 1][:, :, 2].flatten(0, 1))
    assert (away.amin(1) < 1e-5).all() and len(away.argmin(1).unique()) >= 5


@pytest.mark.parametrize("padded", [0, 3])
def test_a_head_without_queries_gives_the_mean_of_the_values_in_sight(padded):
    model, inputs = make("llama"), prompt(length=10, padded=padded)
    with steer(model, AblateHeads(heads=[(1, 2), (-1, 0)], mode="mask_query")):
        tape = record(model, inputs, sites=("z", "v", "weights"))
    v, z = tape["v", 1], tape["z", 1]
    for row, start in enumerate((padded, 0)):
        for i in range(start, 10):
            torch.testing.assert_close(z[row, i, 2], v[row, 1, start : i + 1].mean(0), rtol=1e-5, atol=1e-6)
    assert tape["weights", 2][1, 0, 9].std() < 1e-6 < tape["weights", 2][1, 1, 9].std()


def test_a_cross_attention_keeps_its_heads():
    model, inputs = make("t5"), prompt(length=8)
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    calls = []

    class Watch:
        card, reads_only = AblateHeads.card, True

        def on_read(self, call, seen):
            calls.append((call.place, call.kind, call.layer, bool((seen.z[:, 1] == 0).all())))

    with steer(model, AblateHeads(heads=[(0, 1)]), Watch()):
        model(**inputs)
    assert [call for call in calls if call[3]] == [("decoder", "self", 0, True)]


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: AblateHeads(heads=[(0, 1)], mode="median"), 'mode is "zero"'),
        (lambda: AblateHeads(heads=[(0, 1)], mode="resample"), "takes? a tape="),
        (lambda: AblateHeads(heads=[(0, 1)], tape=Tape()), "no other mode does"),
        (lambda: AblateHeads(heads=[(0, 1)], mode="mean"), "takes? a tape="),
        (lambda: ScaleComponents({("heads", 0, 1): 1.0}), "is no part"),
        (lambda: ScaleComponents({("head", 0): 1.0}), "is no part"),
        (lambda: ScaleComponents({("mlp", 0, 1): 1.0}), "is no part"),
        (lambda: steer(make("llama"), AblateHeads(heads=[(3, 0)])).__enter__(), "3 layers of 4 heads"),
        (lambda: steer(make("llama"), AblateHeads(heads=[(0, 4)])).__enter__(), "3 layers of 4 heads"),
        (lambda: steer(make("llama"), ScaleComponents({("mlp", -4): 0.0})).__enter__(), "layer -4: there are 3 layers"),
    ],
)
def test_what_cannot_be_is_refused(make_it, message):
    with pytest.raises(OptionError, match=message):
        make_it()


def test_the_card_names_the_sites_of_each_intervention():
    assert ScaleComponents.card.sites == ("z", "attn_out", "mlp_out")
    assert AblateHeads.card.sites == ("z",)
    assert AblateHeads(heads=[(0, 1)], mode="mask_query").card.sites == ("q",)
