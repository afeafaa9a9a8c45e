"""Attention calibration against loops, on models with planted sinks, and on tiny-lm, which has none."""

import time

import numpy as np
import pytest
import torch
import transformers as hf

from regard import (
    AttentionCalibration,
    Causal,
    OptionError,
    SnapKV,
    Unsupported,
    read_sinks,
    record,
    recording,
    search_heads,
    steer,
    tiny,
)
from regard.bench.proving.notes import source
from regard.contract.attach import AttentionCall, Step
from regard.hosts.transformers.specimens import make, prompt
from regard.steer.scores.reweight import AttentionReweight
from tests.oracles import normal
from tests.steer.test_snapkv import generate

EVERY = {layer: [0, 1, 2, 3] for layer in range(3)}


def calibrated(weights, start, beta, bar):
    """One head's weights (N, N), pads up to `start`, by the words of the paper; and the sinks."""
    n = len(weights)
    means = {j: sum(weights[i, j] for i in range(j, n)) / (n - j) for j in range(start, n)}
    sinks = [j for j in means if means[j] > bar][1:]
    out = weights.clone()
    for i in range(start, n):
        seen = [j for j in sinks if j <= i]
        others = [j for j in range(start, i + 1) if j not in sinks]
        freed = sum((1 - beta) * weights[i, j] for j in seen)
        total = sum(weights[i, j] for j in others)
        if total > 0:
            for j in seen:
                out[i, j] = beta * weights[i, j]
            for j in others:
                out[i, j] = weights[i, j] + freed * weights[i, j] / total
    return out, sinks


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "deepseek", "mixtral"])
@pytest.mark.parametrize("padded", [0, 4])
def test_the_first_layer_equals_a_loop(family, padded):
    model, inputs = make(family), prompt(length=16, padded=padded)
    heads, alpha, beta = {0: [0, 2]}, 1.2, 0.3
    plain = record(model, inputs, sites=("weights",), layers=(0,))["weights", 0].double()
    with steer(model, AttentionCalibration(heads=heads, beta=beta, alpha=alpha)):
        found = record(model, inputs, sites=("weights",), layers=(0,))["weights", 0].double()
    some = 0
    for b, start in enumerate((padded, 0)):
        for head in range(4):
            wanted, sinks = calibrated(plain[b, head], start, beta, alpha / (16 - start))
            some += len(sinks) if head in heads[0] else 0
            wanted = wanted if head in heads[0] else plain[b, head]
            torch.testing.assert_close(found[b, head, start:], wanted[start:], rtol=1e-5, atol=1e-6)
    assert some > 0
    rows = found[1]
    torch.testing.assert_close(rows.sum(-1), torch.ones(4, 16, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (rows >= 0).all() and not rows.triu(1).any()


def test_beta_0_hides_the_sinks_and_renormalises():
    model, inputs = make("llama"), prompt(length=16)
    settings = AttentionCalibration(heads={0: [1]}, beta=0.0, alpha=1.2)
    reading = read_sinks(record(model, inputs, sites=("weights",), layers=(0,)), alpha=1.2)
    assert reading.positions(0, 1)

    def hide(call, scores):
        return scores.masked_fill(reading.sinks[0][:, :, None], float("-inf"))

    with steer(model, AttentionReweight(rule=hide, stage="scores", heads={0: [1]})):
        wanted = model(**inputs).logits
    with steer(model, settings):
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)


def test_without_sinks_no_bit_changes():
    model, inputs = make("llama"), prompt(length=16, padded=2)
    plain = generate(model, inputs)
    for settings in (
        AttentionCalibration(heads=EVERY, beta=1.0, alpha=0.1),
        AttentionCalibration(heads=EVERY, alpha=None, threshold=1.0),
        AttentionCalibration(heads={}),
    ):
        with steer(model, settings):
            ours = generate(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


def test_a_row_in_a_batch_is_calibrated_as_alone_with_pads_on_either_side():
    model, inputs = make("llama"), prompt(length=16, padded=5)
    settings = AttentionCalibration(heads=EVERY, alpha=1.2)
    with steer(model, settings):
        alone = model(inputs["input_ids"][:1, 5:]).logits[0]
        left = model(**inputs).logits[0, 5:]
        right = {name: torch.cat((x[:, 5:], x[:, :5]), 1) for name, x in inputs.items()}
        right["attention_mask"][1] = 1
        behind = model(**right).logits[0, :11]
    assert (alone - model(inputs["input_ids"][:1, 5:]).logits[0]).abs().max() > 1e-2
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(behind, alone, rtol=1e-4, atol=1e-4)


def test_a_sliding_layer_takes_the_rows_that_see_a_key():
    model, inputs = make("gemma3"), prompt(length=16)
    plain = record(model, inputs, sites=("weights",), layers=(0,))["weights", 0].double()
    seen = torch.ones(16, 16).tril().triu(-3)
    means = plain.sum(-2) / seen.sum(0)
    above = means > 3.0 / 16
    sinks = above & (above.cumsum(-1) > 1)
    assert sinks.any()
    with steer(model, AttentionCalibration(heads={0: [0, 1, 2, 3]}, alpha=3.0, beta=0.5)):
        found = record(model, inputs, sites=("weights",), layers=(0,))["weights", 0].double()
    # the last row, the only one whose keys are all in its window
    row, hit = plain[:, :, -1], sinks
    rest = row.masked_fill(hit, 0).sum(-1, keepdim=True)
    freed = 0.5 * (row * hit).sum(-1, keepdim=True)
    wanted = torch.where(rest > 0, torch.where(hit, 0.5 * row, row * (1 + freed / rest)), row)
    torch.testing.assert_close(found[:, :, -1], wanted, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_the_calibrated_weights():
    effect = AttentionCalibration(heads={0: [0, 1]}, alpha=1.1).start(steer(make("llama")))

    def calibrate(q, k, v):
        call = AttentionCall(q, k, v, Causal(), None, 0.5, 0, Step(0, "prefill", 0, 7))

        def follow():
            assert effect.wants(call) and effect.sinks[0].any()
            return call.heads(effect.on_weights(call, call.weights()))

        return effect.on_attention(call, follow)

    tensors = [x.requires_grad_() for x in normal((1, 2, 7, 4), (1, 2, 7, 4), (1, 2, 7, 4))]
    assert torch.autograd.gradcheck(calibrate, tensors)
    model = make("llama")
    with steer(model, AttentionCalibration(heads=EVERY, alpha=1.2)):
        model(**prompt(length=12)).logits.sum().backward()
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_steps_are_left_alone_or_take_the_sinks_of_the_prompt():
    model, inputs = make("llama"), prompt(length=16, padded=3)
    heads = {0: [0, 1, 2, 3]}
    settings = {"heads": heads, "alpha": 1.2, "beta": 0.3}
    with recording(model, sites=("weights",), layers=(0,)) as plain:
        wanted = generate(model, inputs, 3)
    sinks = read_sinks(plain, alpha=1.2).sinks[0]
    assert sinks.any()
    for decode in ("off", "reuse"):
        found = {}

        class Watch:
            card, reads_only, there = AttentionReweight.card, True, found

            def on_read(self, call, seen, there=found):
                if call.step.decoded == 1 and call.layer == 0:
                    there["plain"], there["weights"] = call.weights(), seen.weights

        with steer(model, AttentionCalibration(**settings, decode=decode), Watch()):
            generate(model, inputs, 3)
        if decode == "off":
            assert found["weights"] is None
            continue
        row = found["plain"][:, :, 0]
        hit = torch.nn.functional.pad(sinks, (0, 1))
        rest, freed = row.masked_fill(hit, 0).sum(-1, keepdim=True), 0.7 * (row * hit).sum(-1, keepdim=True)
        wanted = torch.where(hit, 0.3 * row, row * (1 + freed / rest))
        torch.testing.assert_close(found["weights"][:, :, 0], wanted, rtol=1e-5, atol=1e-6)


def test_reused_sinks_follow_beams_and_keys_that_are_given_up():
    model, inputs = make("llama"), prompt(length=16, padded=2)
    settings = AttentionCalibration(heads=EVERY, alpha=1.2, decode="reuse")
    with steer(model, settings):
        both = generate(model, inputs, 4, num_beams=3).sequences[:1, 16:]
        alone = generate(model, {k: x[:1, 2:] for k, x in inputs.items()}, 4, num_beams=3).sequences[:, 14:]
        assert torch.equal(both, alone)
    with steer(model, settings, SnapKV(budget=8, window=3)) as session:
        generate(model, inputs, 4)
        assert all(row["kept"][0] < 16 for row in session.report())


def test_reuse_needs_a_cache_that_keeps_its_keys():
    model, inputs = make("gemma3"), prompt(length=16)
    with (
        steer(model, AttentionCalibration(heads={0: [0]}, decode="reuse")),
        pytest.raises(Unsupported, match="window of keys"),
    ):
        generate(model, inputs, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 1.5}, "share of its weight"),
        ({"beta": -0.1}, "share of its weight"),
        ({"threshold": 0.1}, "give alpha=.*or threshold="),
        ({"alpha": None}, "give alpha=.*or threshold="),
        ({"decode": "on"}, 'decode is "off"'),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        AttentionCalibration(heads={0: [0]}, **options)


@pytest.mark.parametrize(
    "heads, message", [({0: [4]}, "3 layers of 4 heads"), ({3: [0]}, "3 layers"), ("all", "leaves out the first two")]
)
def test_heads_that_the_model_lacks_are_refused(heads, message):
    with pytest.raises(OptionError, match=message):
        steer(make("llama"), AttentionCalibration(heads=heads)).__enter__()


def test_all_heads_are_those_of_the_layers_between():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=5)).eval()
    inputs = prompt(length=16)
    with steer(model, AttentionCalibration(heads="all", alpha=1.0)):
        found = record(model, inputs, sites=("weights",))
    with steer(model, AttentionCalibration(heads={2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}, alpha=1.0)):
        wanted = record(model, inputs, sites=("weights",))
    plain = record(model, inputs, sites=("weights",))
    assert all(torch.equal(a, b) for a, b in zip(found.attentions(), wanted.attentions(), strict=True))
    assert [torch.equal(found["weights", i], plain["weights", i]) for i in range(3)] == [True, True, False]


# ---- behaviour

BEGIN, ASKS, DELIMITER, FILLERS, VALUES = 1, 2, 3, range(4, 20), range(20, 28)
PLANTED = (1, 0)


def planted():
    """A Llama of three layers whose head (1, 0) copies the value to the query, if a delimiter does not draw it away.

    Every query scores the first token and the delimiter 4 above all others; the asking one scores values 4 above too.
    The other heads are random.
    """
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=28, hidden_size=64, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12}, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            for name in ("q_proj", "k_proj"):
                getattr(layer.self_attn, name).weight.normal_(0, 0.25)
            layer.self_attn.o_proj.weight.normal_(0, 0.01)
        # one direction a token; the norm makes it 8 long
        model.model.embed_tokens.weight.copy_(torch.eye(28, 64))
        attention, one = model.model.layers[PLANTED[0]].self_attn, 1 / 8
        q, k, v = (getattr(attention, name).weight[:16] for name in ("q_proj", "k_proj", "v_proj"))
        for x in (q, k, v):
            x.zero_()
        # the last pairs of the head hardly rotate
        q[7], q[6, ASKS] = 4 * one, 4 * one
        k[7, [BEGIN, DELIMITER]] = 4 * one
        k[6, list(VALUES)] = 4 * one
        attention.o_proj.weight[:, :16] = 0
        for i, value in enumerate(VALUES):
            v[i, value] = one
            attention.o_proj.weight[value, i] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[list(VALUES), list(VALUES)] = 2.0
    return model


def asked(rows=32, length=20):
    """ids (B, N) with one value, one delimiter and a query at the end; answers (B,)."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(FILLERS[0], FILLERS[-1] + 1, (rows, length), generator=draw)
    ids[:, 0], ids[:, -1] = BEGIN, ASKS
    places = torch.rand(rows, length - 6, generator=draw).argsort(-1)[:, :2] + 2
    answers = torch.randint(VALUES[0], VALUES[-1] + 1, (rows,), generator=draw)
    ids.scatter_(1, places[:, :1], DELIMITER).scatter_(1, places[:, 1:], answers[:, None])
    return ids, answers


@torch.no_grad()
def probability(model, data):
    ids, answers = data
    return model(ids).logits[:, -1].softmax(-1).gather(1, answers[:, None]).mean().item()


def test_calibrating_the_head_that_a_delimiter_draws_away_helps_and_others_do_not():
    model, data = planted(), asked()
    search = search_heads(model, lambda heads: AttentionCalibration(heads=heads), probability, data, heads=EVERY)
    assert search.baseline == probability(model, data)
    assert next(iter(search.gains)) == PLANTED
    others = [gain for place, gain in search.gains.items() if place != PLANTED]
    assert len(others) == 11
    assert search.gains[PLANTED] > 0.05
    assert max(others) < 0.1 * search.gains[PLANTED]
    assert search.better(0.05) == {1: [0]}
    # the delimiter it is: the sink that is found in the head, beside the first token
    reading = read_sinks(record(model, data[0], sites=("weights",)))
    for row in range(4):
        assert reading.positions(*PLANTED, row) == (data[0][row] == DELIMITER).nonzero().flatten().tolist()


@torch.no_grad()
def accuracy(model, cases):
    right = [part.right(model(part.ids, attention_mask=part.valid.long()).logits) for part in cases.split(4)]
    return torch.cat(right).float().mean().item()


@torch.no_grad()
def log_probability(model, ids):
    return model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean().item()


def cases_of_tiny_lm(rows):
    """Notes that tiny-lm does not all find, and text."""
    text = torch.from_numpy(np.asarray(source("test"))[: rows * 256].astype(np.int64)).view(rows, 256)
    return (
        tiny.note_cases(rows, 1024, notes=48, asks=24),
        tiny.note_cases(rows, 1024, notes=48, asks=24, seed=100),
        text,
    )


def test_on_tiny_lm_calibration_takes_from_heads_that_need_their_keys():
    model, _ = tiny.lm()
    cases = tiny.note_cases(4, 256, notes=8)
    assert accuracy(model, cases) == 1.0
    reading = read_sinks(record(model, {"input_ids": cases.ids, "attention_mask": cases.valid}, sites=("weights",)))
    # no head rests on the first token
    assert reading.means[..., 0].mean(1).max() < 0.15
    # the head that looks one back has a large mean at late keys, which few rows may see: the rule takes them for sinks
    with steer(model, AttentionCalibration(heads={0: [3]})):
        assert accuracy(model, cases) <= 0.75


@pytest.mark.slow
def test_calibration_does_not_help_tiny_lm(request):
    """tiny-lm has no sinks: no head found on one half of the cases helps on the other."""
    write, start, model = request.getfixturevalue("record"), time.process_time(), tiny.lm()[0]
    tuned, held, text = cases_of_tiny_lm(8)
    reading = read_sinks(record(model, {"input_ids": held.ids[:4]}, sites=("weights",)))
    figures = {
        "weight on the first token, largest mean of a head": round(reading.means[..., 0].mean(1).max().item(), 3),
        "keys called sinks, mean of a head, of 1024": [[round(x, 1) for x in row] for row in reading.counts.tolist()],
    }
    for name, metric, data, other in (
        ("notes, 48 of them, accuracy", accuracy, tuned, held),
        ("text, log probability", log_probability, text[:4], text[4:]),
    ):
        search = search_heads(model, lambda heads: AttentionCalibration(heads=heads), metric, data, heads=EVERY)
        plain = metric(model, other)
        with steer(model, AttentionCalibration(heads=search.better() or {0: []})):
            chosen = metric(model, other)
        figures[name] = {
            "baseline": round(search.baseline, 4),
            "gains": {f"{layer}.{head}": round(gain, 4) for (layer, head), gain in search.gains.items()},
            "held out": round(plain, 4),
            "held out, heads that gained calibrated": round(chosen, 4),
        }
        assert max(search.gains.values()) < 0.02
        assert chosen - plain < 0.02
    write({**figures, "cpu_s": round(time.process_time() - start, 1)})


def test_layers_are_counted_from_the_last_too():
    model = make("llama")
    given = prompt(length=24)
    logits = []
    for heads in ({-1: [1, 2]}, {2: [1, 2]}):
        with steer(model, AttentionCalibration(heads=heads, alpha=1.1)):
            logits.append(model(**given).logits)
    assert torch.equal(*logits) and not torch.equal(logits[0], model(**given).logits)
