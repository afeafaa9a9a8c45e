"""Parts that add up to logits, feed-forward parts whose sources are planted, and a last layer that holds back."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from regard import (
    Edit,
    MLPDecomposition,
    OptionError,
    ShapeError,
    SuppressLastLayer,
    Unsupported,
    decompose_mlp,
    direct_logit_attribution,
    fit_sources,
    last_layer_shift,
    lens,
    patch,
    steer,
    tiny,
)
from regard import record as record_tape
from regard.contract.attach import open_session
from regard.hosts.contributions import freeze_norm, head_outputs
from regard.hosts.transformers.specimens import make, prompt

# its configs take more keywords than they declare
hf: object = transformers
PARTS = ("embed", "z", "mlp_out", "resid_post", "logits")
LAST = ("z", "resid_pre", "attn_out", "mlp_out", "resid_post")
MIDDLE = ("z", "resid_pre", "resid_mid", "mlp_out")
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "deepseek", "gpt2"]


# norms and heads apart


@pytest.mark.parametrize("norm", [nn.LayerNorm(7), nn.RMSNorm(8), nn.Identity(), None])
def test_a_frozen_norm_is_the_norm_at_its_stream_and_linear_elsewhere(norm):
    width = 7 if isinstance(norm, nn.LayerNorm) else 8
    for parameter in norm.parameters() if norm is not None else ():
        nn.init.normal_(parameter)
    x, a, b = torch.randn(3, 5, width), torch.randn(5, width), torch.randn(5, width)
    frozen = freeze_norm(norm, x)
    wanted = x if norm is None else norm(x)
    torch.testing.assert_close(frozen(x) + frozen.bias, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen(a + 2 * b), frozen(a) + 2 * frozen(b), rtol=1e-4, atol=1e-5)
    assert frozen.centred == isinstance(norm, nn.LayerNorm)


def test_what_is_no_norm_is_refused():
    with pytest.raises(Unsupported, match="Tanh is no norm"):
        freeze_norm(nn.Tanh(), torch.randn(3, 8))


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_biases_are_what_attention_adds(name):
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tape = record_tape(model, prompt(length=9), sites=("z", "attn_out"))
    for layer in (0, -1):
        found = head_outputs(model, tape, layer)
        torch.testing.assert_close(found.heads.sum(2) + found.rest, tape["attn_out", layer], rtol=1e-4, atol=1e-4)
        with patch(model, [Edit("z", layer % 3, heads=(1,), value=0.0)]):
            without = record_tape(model, prompt(length=9), sites=("attn_out",))["attn_out", layer]
        if name != "gemma3":
            torch.testing.assert_close(tape["attn_out", layer] - without, found.heads[:, :, 1], rtol=1e-3, atol=1e-4)
    with pytest.raises(OptionError, match="record z without heads="):
        head_outputs(model, record_tape(model, prompt(length=9), sites=("z",), heads=(1,)), 0)


# direct attribution


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("position", [-1, 4])
def test_what_the_parts_say_adds_up_to_the_logit(name, position):
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tape = record_tape(model, prompt(length=9, padded=2), sites=PARTS)
    right, wrong = torch.tensor([3, 8]), torch.tensor([5, 1])
    logits = tape.output.logits[:, position].double()
    size = float(logits.abs().max())
    for other, wanted in ((None, 0.0), (wrong, logits.gather(1, wrong[:, None])[:, 0])):
        found = direct_logit_attribution(model, tape, right, other, position=position)
        wanted = logits.gather(1, right[:, None])[:, 0] - wanted
        torch.testing.assert_close(found.total.double(), wanted, rtol=1e-4, atol=1e-5 * size)
    assert found.heads.shape == (2, 3, 4) and found.mlp.shape == (2, 3)


def test_it_is_exact_in_double_precision():
    model = make("gpt2").double()
    model.lm_head.bias = nn.Parameter(torch.randn(60, dtype=torch.float64))
    tape = record_tape(model, prompt(length=9), sites=PARTS)
    right, wrong = torch.tensor([3, 8]), torch.tensor([5, 1])
    found = direct_logit_attribution(model, tape, right, wrong)
    logits = tape.output.logits[:, -1]
    wanted = logits[[0, 1], right] - logits[[0, 1], wrong]
    torch.testing.assert_close(found.total, wanted, rtol=1e-9, atol=1e-9)


def test_a_part_says_what_the_lens_reads_of_it():
    model = make("llama")
    tape = record_tape(model, prompt(length=9), sites=PARTS)
    found = direct_logit_attribution(model, tape, torch.tensor([3, 8]))
    last = tape["resid_post", -1][:, -1]
    scale = last.square().mean(-1, keepdim=True).rsqrt()
    said = model.lm_head(tape["mlp_out", 1][:, -1] * scale * model.model.norm.weight)
    torch.testing.assert_close(found.mlp[:, 1], said[[0, 1], [3, 8]], rtol=1e-4, atol=1e-4)
    grown = found.accumulated
    for place, stream in enumerate((tape["embed"], *(tape["resid_post", layer] for layer in range(3)))):
        said = model.lm_head(stream[:, -1] * scale * model.model.norm.weight)
        torch.testing.assert_close(grown[:, place], said[[0, 1], [3, 8]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grown[:, -1] + found.bias, found.total)


def test_the_copying_heads_of_tiny_lm_say_the_answer():
    model, _ = tiny.lm()
    cases = tiny.note_cases(16, 128, seed=2)
    given = {"input_ids": cases.ids, "attention_mask": cases.valid.long()}
    tape = record_tape(model, given, sites=PARTS)
    others = cases.ids.gather(1, cases.note_spans[..., 1] - 1)
    answer = cases.answers[:, 0]
    wrong = torch.stack([row[row != a][0] for row, a in zip(others, answer, strict=True)])
    found = direct_logit_attribution(model, tape, answer, wrong)
    by_layer = found.heads.mean(0).sum(1)
    assert by_layer.argmax() == 1 and by_layer[1] > 0.5 * found.total.mean()


def test_a_model_that_scales_its_logits_is_refused():
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = hf.GraniteConfig(**sizes, num_key_value_heads=4, residual_multiplier=0.3, logits_scaling=2.0)
    model = hf.GraniteForCausalLM(config).eval()
    tape = record_tape(model, prompt(length=9), sites=PARTS)
    with pytest.raises(Unsupported, match="GraniteForCausalLM add up to"):
        direct_logit_attribution(model, tape, torch.tensor([3, 8]))


# sources of a feed-forward part


def planted_sources(prompts=60, count=5, width=16, noise=0.0):
    x = torch.randn(prompts, count, width, dtype=torch.float64)
    alpha = torch.tensor([1.5, -0.7, 0.0, 0.2, 3.0], dtype=torch.float64)[:count]
    c = torch.randn(width, dtype=torch.float64)
    y = torch.einsum("s,bsc->bc", alpha, x) + c + noise * torch.randn(prompts, width, dtype=torch.float64)
    return y, x, alpha, c


def test_planted_coefficients_are_found():
    y, x, alpha, c = planted_sources()
    found = fit_sources(y, x)
    torch.testing.assert_close(found.coefficients, alpha, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.intercept, c, rtol=1e-4, atol=1e-4)
    assert found.r2 == pytest.approx(1.0, abs=1e-9) and found.held_out == pytest.approx(1.0, abs=1e-9)


def test_what_is_only_noise_explains_nothing_of_prompts_that_were_not_fitted():
    _, x, _, _ = planted_sources(prompts=12, width=2)
    found = fit_sources(torch.randn(12, 2, dtype=torch.float64), x)
    assert found.r2 > 0 > found.held_out
    noisy = fit_sources(*planted_sources(noise=3.0)[:2])
    assert 0.3 < noisy.held_out < 0.95


def split_model():
    """One layer whose heads write into subspaces of four, apart from each other and from the embeddings, without a bias."""
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=4, head_dim=4)).eval()
    basis = torch.linalg.qr(torch.randn(32, 32)).Q
    layer = model.model.layers[0]
    with torch.no_grad():
        for parameter in layer.self_attn.parameters():
            parameter.normal_(0, 0.5)
        layer.self_attn.o_proj.weight.copy_(basis[:, :16])
        model.model.embed_tokens.weight.copy_(torch.randn(60, 16) @ basis[:, 16:].T)
    return model, layer, basis


def planted_mlp(weights, rest):
    """A feed-forward part that is linear: so much of each head's subspace, and of the rest."""
    model, layer, basis = split_model()
    by = torch.tensor([w for w in weights for _ in range(4)] + [rest] * 16)
    layer.mlp = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        layer.mlp.weight.copy_(basis @ torch.diag(by) @ basis.T)
    return model


def many(length=8, rows=64):
    return prompt(batch=rows, length=length, seed=9)


def test_a_linear_part_is_decomposed_exactly():
    weights = (-1.0, 0.5, 2.0, 0.0)
    model = planted_mlp(weights, 0.7)
    tape = record_tape(model, many(), sites=MIDDLE)
    found = decompose_mlp(model, tape, 0)
    torch.testing.assert_close(found.coefficients.float(), torch.tensor([*weights, 0.7]), rtol=1e-4, atol=1e-4)
    assert found.r2 > 1 - 1e-6 and found.held_out > 1 - 1e-6 and not found.parallel
    assert found.sources == ("head 0", "head 1", "head 2", "head 3", "resid")
    assert found.intercept.abs().max() < 1e-4
    # without the earlier stream it is left in what is missed
    assert decompose_mlp(model, tape, 0, sources="heads").held_out < 0.95


def test_sources_are_scaled_as_the_norm_scales_them():
    model = planted_mlp((-1.0, 0.5, 2.0, 0.0), 0.7)
    tape = record_tape(model, many(), sites=MIDDLE)
    parts = head_outputs(model, tape, 0)
    raw = torch.cat((parts.heads[:, -1], tape["resid_pre", 0][:, -1:]), 1)
    assert fit_sources(tape["mlp_out", 0][:, -1], raw).r2 < 0.99


def test_what_a_neuron_takes_back_is_erased():
    model, layer, _ = split_model()
    tape = record_tape(model, many(), sites=("z",))
    # what head 2 says of one token, whatever the prompt, is the direction of a neuron that takes it back
    said = F.normalize(head_outputs(model, tape, 0).heads[:, -1, 2].mean(0), dim=0)
    layer.mlp = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        layer.mlp.weight.copy_(-4 * torch.outer(said, said))
    tape = record_tape(model, many(), sites=MIDDLE)
    found = decompose_mlp(model, tape, 0)
    assert found.coefficients[2] < -0.3
    assert found.coefficients[[0, 1, 3]].abs().max() < 0.1


def test_a_layer_norm_bias_goes_to_the_intercept():
    model = make("gpt2")
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.ln_2.bias.normal_()
            layer.ln_2.weight.uniform_(0.5, 1.5)
            layer.attn.c_proj.bias.normal_()
    model.transformer.h[1].mlp = nn.Linear(32, 32)
    with torch.no_grad():
        model.transformer.h[1].mlp.weight.copy_(0.4 * torch.eye(32))
        model.transformer.h[1].mlp.bias.normal_()
    found = decompose_mlp(model, record_tape(model, many(), sites=MIDDLE), 1)
    torch.testing.assert_close(found.coefficients.float(), torch.full((5,), 0.4), rtol=1e-3, atol=1e-3)
    wanted = 0.4 * model.transformer.h[1].ln_2.bias + model.transformer.h[1].mlp.bias
    torch.testing.assert_close(found.intercept.float(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["phi", "neox"])
def test_a_part_beside_attention_stands_on_the_earlier_stream(name):
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if name == "phi":
        model, sites = hf.PhiForCausalLM(hf.PhiConfig(**sizes, pad_token_id=0)).eval(), ("z", "resid_pre", "mlp_out")
    else:
        model, sites = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes)).eval(), MIDDLE
    layer = open_session(model, ()).anatomy.main.layers[1].module
    layer.mlp = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        layer.mlp.weight.copy_(1.3 * torch.eye(32))
    found = decompose_mlp(model, record_tape(model, many(), sites=sites), 1)
    assert found.parallel and found.sources == ("resid",)
    assert float(found.coefficients) == pytest.approx(1.3, abs=1e-4) and found.held_out > 1 - 1e-6


@pytest.mark.parametrize("options, text", [
    ({"sources": "all"}, 'sources is "heads"'), ({"held_out": 0.0}, "above 0 and below 1"), ({"held_out": 1.0}, "above 0"),
])  # fmt: skip
def test_settings_that_cannot_be(options, text):
    model = make("llama")
    with pytest.raises(OptionError, match=text):
        decompose_mlp(model, record_tape(model, many(rows=12), sites=MIDDLE), 1, **options)


def test_too_few_prompts_are_refused():
    model = make("llama")
    for rows, sources in ((7, "heads+resid"), (6, "heads")):
        tape = record_tape(model, many(rows=rows), sites=MIDDLE)
        with pytest.raises(OptionError, match=f"{rows} prompts, 2 of them held out, are too few"):
            decompose_mlp(model, tape, 1, sources=sources)
        more = record_tape(model, many(rows=rows + 1), sites=MIDDLE)
        assert isinstance(decompose_mlp(model, more, 1, sources=sources), MLPDecomposition)
    with pytest.raises(OptionError, match="the tape lacks resid_pre, mlp_out"):
        decompose_mlp(model, record_tape(model, many(), sites=("z",)), 1)
    with pytest.raises(ShapeError, match=r"outputs are \(3, 4\)"):
        fit_sources(torch.zeros(3, 4), torch.zeros(3, 2, 5))


# the last layer


def test_stages_are_the_lens_of_the_stream_and_parts_are_taken_from_its_end():
    model = make("llama")
    tape = record_tape(model, prompt(length=9), sites=LAST)
    answers = torch.tensor([3, 8])
    found = last_layer_shift(model, tape, answers)
    before, after = tape["resid_pre", -1], tape["resid_post", -1]
    for stage, stream in enumerate((before, before + tape["attn_out", -1], after)):
        p = lens(model, stream[:, -1]).softmax(-1)
        mine = p[[0, 1], answers]
        torch.testing.assert_close(found.probability[:, stage], mine, rtol=1e-3, atol=1e-6)
        assert found.rank[:, stage].tolist() == (p > mine[:, None]).sum(-1).tolist()
    with steer(model, SuppressLastLayer(mlp=0.0)), torch.no_grad():
        without = model(**prompt(length=9)).logits[:, -1].softmax(-1)[[0, 1], answers]
    torch.testing.assert_close(found.probability_without[:, -1], without, rtol=1e-3, atol=1e-6)
    assert found.parts == ("head 0", "head 1", "head 2", "head 3", "attention", "mlp")
    mlp = tape["mlp_out", -1]
    with patch(model, [Edit("z", 2, heads=(1,), value=0.0), Edit("mlp_out", 2, value=mlp)]), torch.no_grad():
        without = model(**prompt(length=9)).logits[:, -1].softmax(-1)[[0, 1], answers]
    torch.testing.assert_close(found.probability_without[:, 1], without, rtol=1e-3, atol=1e-6)
    likeliest = last_layer_shift(model, tape)
    assert (likeliest.rank[:, -1] == 0).all()
    with pytest.raises(ShapeError, match="answers are"):
        last_layer_shift(model, tape, torch.tensor([3]))


def unsure(model):
    """A last feed-forward part that says one thing to all: a direction no token is read along, which the norm then pays for."""
    last = model.model.layers[-1]
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight.mul_(40)
    last.mlp = nn.Linear(32, 32)
    with torch.no_grad():
        last.mlp.weight.zero_()
        last.mlp.bias.zero_()
        last.mlp.bias[0] = 60.0
    return model


def test_a_last_part_that_holds_back_is_seen_and_held_back():
    model = unsure(make("llama"))
    inputs = prompt(length=9)
    found = last_layer_shift(model, record_tape(model, inputs, sites=LAST))
    assert found.suppression.argmax() == 5 and found.suppression[5] > 0.05

    def top(*changes):
        with steer(model, *changes), torch.no_grad():
            return float(model(**inputs).logits[:, -1].softmax(-1).amax(-1).mean())

    plain = top()
    assert top(SuppressLastLayer(mlp=0.5)) > plain + 0.01
    assert top(SuppressLastLayer(mlp=0.0)) > top(SuppressLastLayer(mlp=0.5))
    assert top(SuppressLastLayer(mlp=1.0)) == plain


def test_a_factor_of_one_changes_no_bit_and_heads_are_scaled_within_attention():
    model, inputs = make("llama"), prompt(length=9)
    with torch.no_grad():
        plain = model(**inputs).logits
        for same in (SuppressLastLayer(), SuppressLastLayer(mlp=1.0, heads={2: 1.0})):
            with steer(model, same):
                assert torch.equal(model(**inputs).logits, plain)
        with steer(model, SuppressLastLayer(heads={1: 0.0}, attention=0.5, mlp=0.2)):
            tape = record_tape(model, inputs, sites=("z", "attn_out", "mlp_out"))
    free = record_tape(model, inputs, sites=("z", "attn_out", "mlp_out"))
    assert torch.equal(tape["mlp_out", 1], free["mlp_out", 1]) and torch.equal(tape["attn_out", 1], free["attn_out", 1])
    assert not tape["z", 2][:, :, 1].any()
    torch.testing.assert_close(
        tape["attn_out", 2], 0.5 * head_outputs(model, tape, 2).heads.sum(2), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(OptionError, match="3 layers of 4 heads"):
        steer(model, SuppressLastLayer(heads={4: 0.0})).__enter__()


def facts(smoothing, seed, subjects=40, relations=3, answers=24):
    """A model of three layers that learnt facts with smoothed labels, its prompts and their answers."""
    torch.manual_seed(seed)
    table = torch.randint(answers, (subjects, relations))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=answers + subjects + relations, **sizes, num_key_value_heads=4)
    )
    subject, relation = (
        x.flatten() for x in torch.meshgrid(torch.arange(subjects), torch.arange(relations), indexing="ij")
    )
    ids, wanted = torch.stack((answers + subjects + relation, answers + subject), 1), table[subject, relation]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):
        logits = model(ids, use_cache=False).logits[:, -1]
        optimizer.zero_grad()
        F.cross_entropy(logits, wanted, label_smoothing=smoothing).backward()
        optimizer.step()
    return model.eval(), ids, wanted


@pytest.mark.slow
def test_a_model_of_smoothed_labels_is_surer_without_half_of_its_last_part(record):
    from regard import ScaleComponents

    figures = {}
    for smoothing in (0.0, 0.1, 0.3):
        for seed in range(3):
            model, ids, wanted = facts(smoothing, seed)
            line = {}
            for name, layer in (("plain", None), ("layer 0", 0), ("layer 1", 1), ("last layer", 2)):
                scale = ScaleComponents({} if layer is None else {("mlp", layer): 0.5})
                with steer(model, scale), torch.no_grad():
                    p = model(ids).logits[:, -1].softmax(-1)
                right = float((p.argmax(-1) == wanted).float().mean())
                line[name] = {"top_probability": round(float(p.amax(-1).mean()), 4), "accuracy": round(right, 4)}
            figures[f"smoothing {smoothing}, seed {seed}"] = line
    record(figures)
    gains = {
        name: {part: line[part]["top_probability"] - line["plain"]["top_probability"] for part in line}
        for name, line in figures.items()
    }
    for name, gain in gains.items():
        if "smoothing 0.0" not in name:
            assert gain["last layer"] > 0.002, name
            assert gain["layer 0"] < gain["last layer"] and gain["layer 1"] < gain["last layer"], name


def test_figures_show_what_was_found():
    pytest.importorskip("plotly")
    model = make("llama")
    tape = record_tape(model, many(rows=16), sites=(*LAST, "embed", "logits", "resid_mid"))
    found = direct_logit_attribution(model, tape, torch.full((16,), 3))
    assert found.figure().data[0].z.shape == (3, 5)
    assert list(decompose_mlp(model, tape, 1).figure().data[0].x)[-1] == "resid"
    shift = last_layer_shift(model, tape).figure()
    assert [trace.name for trace in shift.data] == ["after", "without"] and len(shift.data[1].x) == 6
