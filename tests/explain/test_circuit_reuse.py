"""Path patching against runs made by hand, on models whose circuit is known, and on a trained one."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from regard import (
    CircuitOverlap,
    Edit,
    OptionError,
    PatchEffects,
    ShapeError,
    activation_patching,
    circuit_overlap,
    joint_effect,
    lens,
    logit_diff,
    patch,
    path_patching,
    recording,
    tiny,
)
from regard import record as record_tape
from regard.contract.attach import open_session
from regard.hosts.contributions import freeze_norm, head_outputs
from regard.hosts.transformers.specimens import make, prompt
from tests.explain.induction_model import COPYING, DUPLICATE, PREVIOUS, VOCAB, induction_model

NEAR = {"rtol": 1e-4, "atol": 1e-5}


def difference(logits, position=-1):
    """A metric that no row lacks."""
    return logits[:, position, 3] - logits[:, position, 7]


def pair(padded=0, seed=5, keep_last=False):
    """Two prompts of one padding."""
    clean, corrupt = prompt(batch=2, length=9, padded=padded), prompt(batch=2, length=9, padded=padded, seed=seed)
    if keep_last:
        corrupt["input_ids"][:, -1] = clean["input_ids"][:, -1]
    return clean, corrupt


class Nothing(nn.Module):
    """A feed-forward part that says nothing."""

    def forward(self, x):
        return torch.zeros_like(x)


class Frozen(nn.Module):
    """A final norm whose scale is that of one run."""

    def __init__(self, norm, stream):
        super().__init__()
        self.norm = freeze_norm(norm, stream)

    def forward(self, x):
        # rows of many senders lie behind each other
        return x * self.norm.scale.repeat(len(x) // len(self.norm.scale), 1, 1) * self.norm.gain


def attention_alone():
    """Llama without norms and feed-forward parts."""
    model = make("llama")
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.mlp = Nothing()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def by_hand(model, clean, corrupt, receiver, position, *, freeze_mlps=False):
    """All heads of all layers, one after the other, with two runs each."""
    sites = ("z", "mlp_out")
    a, b = (record_tape(model, x, sites=sites) for x in (clean, corrupt))
    before, after = (difference(t.output.logits).mean() for t in (a, b))
    layers, heads = a.meta["layers"], a.meta["heads"]
    found = torch.zeros(layers, heads)
    for layer in range(layers):
        for head in range(heads):
            edits = [Edit("z", at, from_tape=a) for at in range(layers)]
            edits.append(Edit("z", layer, heads=(head,), positions=(position,), from_tape=b))
            if freeze_mlps:
                # a part that is frozen would receive nothing
                kept = [at for at in range(layers) if receiver != ("mlp_out", at)]
                edits += [Edit("mlp_out", at, from_tape=a) for at in kept]
            if receiver == ("logits",):
                with patch(model, edits), torch.no_grad():
                    out = model(**clean).logits
            else:
                site = receiver[2] if len(receiver) == 3 else receiver[0]
                at = receiver[0] if len(receiver) == 3 else receiver[1]
                some = None
                if len(receiver) == 3:
                    some = (receiver[1] if site == "q" else receiver[1] * a.meta["key_heads"] // heads,)
                with patch(model, edits), recording(model, sites=(site,)) as tape, torch.no_grad():
                    model(**clean)
                with patch(model, [Edit(site, at, heads=some, positions=(position,), from_tape=tape)]), torch.no_grad():
                    out = model(**clean).logits
            found[layer, head] = (difference(out).mean() - before) / (after - before)
    return found


RECEIVERS = [("logits",), (1, 2, "q"), (2, 3, "k"), (2, 1, "v"), ("resid_pre", 2), ("mlp_out", 1), ("resid_post", 1)]


@pytest.mark.parametrize("receiver", RECEIVERS, ids=str)
@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_it_equals_the_full_loop_by_hand(receiver, freeze_mlps):
    model = make("llama")
    clean, corrupt = pair()
    position = -1 if receiver == ("logits",) else 4
    found = path_patching(
        model, clean, corrupt, difference, receivers=[receiver], position=position, freeze_mlps=freeze_mlps, rows=7
    )
    wanted = by_hand(model, clean, corrupt, receiver, position, freeze_mlps=freeze_mlps)
    torch.testing.assert_close(found.values, wanted, **NEAR)
    # nothing above the receiver sends, and something below it does
    reach = {3: lambda: receiver[0], 2: lambda: receiver[1] + (receiver[0] != "resid_pre"), 1: lambda: 3}[
        len(receiver)
    ]()
    assert not found.values[reach:].any() and found.values[:reach].abs().max() > 1e-3


@pytest.mark.parametrize("position", [-1, None, (3, 4)])
def test_the_same_prompt_twice_has_no_effect(position):
    model, (clean, _) = make("llama"), pair()
    for receivers in ([("logits",)], [(1, 2, "q"), (2, 0, "k")]):
        found = path_patching(model, clean, clean, difference, receivers=receivers, position=position)
        assert found.values.abs().max() < 1e-5
    assert activation_patching(model, clean, clean, difference).values.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("position", [-1, None])
def test_all_senders_and_the_embeddings_are_the_corrupted_run(name, position):
    model, (clean, corrupt) = make(name), pair()
    whole = joint_effect(model, clean, corrupt, difference, embeddings=True, position=position)
    assert whole == pytest.approx(1.0, abs=1e-4)
    assert abs(joint_effect(model, clean, corrupt, difference, position=position) - 1.0) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_direct_effect_is_the_lens_of_what_the_head_says_otherwise(name):
    model, (clean, corrupt) = make(name), pair(keep_last=True)
    base = open_session(model, ()).anatomy.main
    a = record_tape(model, clean, sites=("z", "resid_post"))
    frozen = Frozen(base.final, a["resid_post", -1])
    setattr(base.base, "norm" if name == "llama" else "ln_f", frozen)
    a, b = (record_tape(model, x, sites=("z",)) for x in (clean, corrupt))
    before, after = (difference(t.output.logits).mean() for t in (a, b))
    found = path_patching(model, clean, corrupt, difference, freeze_mlps=True).values * (after - before)
    for layer in range(3):
        said = head_outputs(model, b, layer).heads - head_outputs(model, a, layer).heads
        for head in range(4):
            wanted = difference(lens(model, said[:, :, head])).mean()
            torch.testing.assert_close(found[layer, head], wanted, rtol=1e-5, atol=1e-5)


def test_direct_effects_of_attention_alone_sum_to_one():
    model, (clean, corrupt) = attention_alone(), pair(keep_last=True)
    found = path_patching(model, clean, corrupt, difference)
    assert float(found.values.sum()) == pytest.approx(1.0, abs=1e-4)
    assert (found.values.abs() > 1e-3).sum() > 6


def test_order_and_padding_of_the_batch_are_irrelevant():
    model = make("llama")
    clean, corrupt = pair(padded=3)
    receivers = [(1, 2, "q"), (2, 1, "k")]
    whole = path_patching(model, clean, corrupt, difference, receivers=receivers)
    turned = path_patching(
        model, *({k: v.flip(0) for k, v in x.items()} for x in (clean, corrupt)), difference, receivers=receivers
    )
    torch.testing.assert_close(whole.values, turned.values, **NEAR)
    # each row alone, the first without its pads; effects are of mean metrics, so weigh rows by their own difference
    alone = [
        path_patching(model, *({k: v[row : row + 1, cut:] for k, v in x.items()} for x in (clean, corrupt)), difference,
                      receivers=receivers) for row, cut in ((0, 3), (1, 0))
    ]  # fmt: skip
    weighed = sum(x.values * (x.corrupt - x.clean) for x in alone) / sum(x.corrupt - x.clean for x in alone)
    torch.testing.assert_close(whole.values, weighed, rtol=1e-3, atol=1e-4)


def test_senders_together_in_a_pass_or_alone_are_one():
    model, (clean, corrupt) = make("gpt2"), pair()
    for run in (path_patching, activation_patching, partial(activation_patching, site="mlp_out")):
        found = [run(model, clean, corrupt, difference, rows=rows).values for rows in (1, 7, 64)]
        torch.testing.assert_close(found[0], found[1], **NEAR)
        torch.testing.assert_close(found[0], found[2], **NEAR)


def test_a_head_that_talks_at_another_place_has_no_direct_path_to_the_last_logits():
    model, (clean, corrupt) = make("llama"), pair(keep_last=True)
    found = path_patching(model, clean, corrupt, difference, position=4)
    assert found.values.abs().max() < 1e-5
    # through keys and values of heads it has one
    assert activation_patching(model, clean, corrupt, difference, position=4).values.abs().max() > 1e-3


def test_each_row_may_have_its_own_place():
    model, (clean, corrupt) = make("llama"), pair()
    at = torch.tensor([3, 6])
    run = partial(path_patching, model, receivers=[(1, 2, "k")])
    whole = run(clean, corrupt, difference, position=at)
    rows = [
        run(*({k: v[i : i + 1] for k, v in x.items()} for x in (clean, corrupt)), difference, position=int(at[i]))
        for i in range(2)
    ]
    weighed = sum(x.values * (x.corrupt - x.clean) for x in rows) / sum(x.corrupt - x.clean for x in rows)
    torch.testing.assert_close(whole.values, weighed, rtol=1e-3, atol=1e-4)


def test_the_highest_receiver_says_how_far_senders_reach():
    # the released code stops at the lowest
    model, (clean, corrupt) = make("llama"), pair()
    both = path_patching(model, clean, corrupt, difference, receivers=[(1, 0, "q"), (2, 0, "q")])
    assert both.values[1].abs().max() > 1e-4


def test_query_heads_share_the_keys_of_their_group():
    model, (clean, corrupt) = make("llama"), pair()
    run = partial(path_patching, model, clean, corrupt, difference, position=4)
    first, second, other = (run(receivers=[(2, head, "k")]).values for head in (0, 1, 2))
    assert torch.equal(first, second) and not torch.allclose(first, other)


def test_activation_patching_of_a_whole_stream_is_the_corrupted_run():
    model, (clean, corrupt) = make("llama"), pair()
    found = activation_patching(model, clean, corrupt, difference, site="resid_post")
    assert found.across == "position" and found.values.shape == (3, 9)
    assert float(found.values[-1, -1]) == pytest.approx(1.0, abs=1e-4)
    assert not found.values[-1, :-1].abs().max() > 1e-5
    a, b = (record_tape(model, x, sites=("mlp_out",)) for x in (clean, corrupt))
    with patch(model, [Edit("mlp_out", 1, positions=(4,), from_tape=b)]), torch.no_grad():
        out = difference(model(**clean).logits).mean()
    wanted = (out - difference(a.output.logits).mean()) / (found.corrupt - found.clean)
    cell = activation_patching(model, clean, corrupt, difference, site="mlp_out").values[1, 4]
    torch.testing.assert_close(cell, wanted, **NEAR)


def induction_pair(rows=8, length=10, seed=0):
    """x1 … xn x1 … xk, and the same with another token instead of the first xk; what comes next, and where."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.stack([torch.randperm(VOCAB, generator=generator)[: length + 1] for _ in range(rows)])
    at = 4
    clean = torch.cat((some[:, :length], some[:, : at + 1]), 1)
    corrupt = clean.clone()
    corrupt[:, at] = some[:, length]
    return clean, corrupt, clean[:, at + 1], at + 1


def test_the_keys_of_the_copying_head_come_from_the_previous_token_head():
    model = induction_model()
    clean, corrupt, answer, place = induction_pair()
    metric = partial(logit_diff, correct=answer, wrong=(answer + 1) % VOCAB)
    to_logits = path_patching(model, clean, corrupt, metric)
    assert to_logits.top(1) == [COPYING] and to_logits.values[COPYING] > 0.9
    to_keys = path_patching(model, clean, corrupt, metric, receivers=[(*COPYING, "k")], position=place)
    assert to_keys.top(1) == [PREVIOUS] and to_keys.values[PREVIOUS] > 0.9
    others = to_keys.values.clone()
    others[PREVIOUS] = 0
    assert others.abs().max() < 0.05
    # the other parts of the circuit receive nothing from it
    for receiver in ((*COPYING, "q"), (*DUPLICATE, "k")):
        found = path_patching(model, clean, corrupt, metric, receivers=[receiver], position=place)
        assert found.values.abs().max() < 0.05
    circuit = [*to_logits.heads(0.5), *to_keys.heads(0.5)]
    assert circuit_overlap(circuit, [PREVIOUS, COPYING]).share == 1.0


def trained_pair(rows=32):
    """Keys and values of tiny-lm that come twice."""
    generator = torch.Generator().manual_seed(3)
    some = torch.stack([torch.randperm(128, generator=generator)[:41] for _ in range(rows)]) + 259
    at = 20
    clean = torch.cat((torch.full((rows, 1), 256), some[:, :40], some[:, : at + 1]), 1)
    corrupt = clean.clone()
    corrupt[:, at + 1] = some[:, 40]
    return clean, corrupt, some[:, at + 1], at + 2


def test_a_trained_model_has_the_circuit_that_its_weights_show():
    model, _ = tiny.lm()
    clean, corrupt, answer, place = trained_pair(8)
    metric = partial(logit_diff, correct=answer, wrong=answer.roll(1))
    to_logits = path_patching(model, clean, corrupt, metric)
    # weights call head 2 of the first layer one of the previous token, and all of the second layer induction heads
    assert {layer for layer, _ in to_logits.heads(0.1)} == {1}
    receivers = [(1, head, "k") for head in range(4)]
    to_keys = path_patching(model, clean, corrupt, metric, receivers=receivers, position=place)
    assert to_keys.top(1) == [(0, 2)] and to_keys.values[0, 2] > 0.3


def note_pair(rows):
    """Notes of tiny-lm, and the same with a key that nobody asks for before the answer; the answer, others, where it stands."""
    cases = tiny.note_cases(rows, 128, seed=4)
    row = torch.arange(rows)
    key = cases.needle_spans[:, 0, 0] + 1
    corrupt = cases.ids.clone()
    corrupt[row, key] = torch.tensor([next(k for k in range(259, 323) if k not in ids) for ids in cases.ids.tolist()])
    values = cases.ids.gather(1, cases.note_spans[..., 1] - 1)
    answer = cases.answers[:, 0]
    others = values[values != answer[:, None]].view(rows, -1)
    given = [{"input_ids": ids, "attention_mask": cases.valid.long()} for ids in (cases.ids, corrupt)]
    return *given, answer, others, key + 1


@pytest.mark.slow
def test_tiny_lm_uses_one_circuit_for_notes_and_repeats(record):
    model, _ = tiny.lm()
    figures, circuits = {}, {}
    for task, (clean, corrupt, answer, wrong, place) in {
        "notes": note_pair(24), "repeats": [*(p := trained_pair(24))[:3], p[2].roll(1), p[3]]
    }.items():  # fmt: skip
        metric = partial(logit_diff, correct=answer, wrong=wrong)
        to_logits = path_patching(model, clean, corrupt, metric)
        receivers = [(*head, "k") for head in to_logits.heads(0.05)]
        to_keys = path_patching(model, clean, corrupt, metric, receivers=receivers, position=place)
        circuits[task] = {*to_logits.heads(0.05), *to_keys.heads(0.05)}
        figures[task] = {
            "logit_difference": [round(to_logits.clean, 3), round(to_logits.corrupt, 3)],
            "to_logits": [[round(x, 4) for x in row] for row in to_logits.values.tolist()],
            "to_keys": [[round(x, 4) for x in row] for row in to_keys.values.tolist()],
            "heads": sorted(map(list, circuits[task])),
        }
    figures["overlap"] = circuit_overlap(circuits["notes"], circuits["repeats"]).share
    record(figures)
    assert circuits["notes"] == {(0, 2), (1, 0), (1, 1), (1, 2), (1, 3)}
    assert figures["overlap"] >= 0.8
    assert all(figures[task]["to_keys"][0][2] > 0.9 for task in circuits)


def test_what_two_circuits_share():
    values = torch.tensor([[0.5, -0.2, 0.0], [0.01, 0.3, 0.2]])
    first = PatchEffects(values, "head", 1.0, 0.0)
    assert first.heads(0.2) == [(0, 0), (1, 1), (0, 1), (1, 2)]
    second = PatchEffects(values.flip(0), "head", 1.0, 0.0)
    found = circuit_overlap(first, second, 0.25)
    assert (found.both, found.first, found.second) == ({*()}, {(0, 0), (1, 1)}, {(1, 0), (0, 1)}) and found.share == 0
    assert circuit_overlap(first, first, 0.1).share == 1
    some = circuit_overlap([(0, 0), (1, 1), (1, 2)], first, 0.25)
    assert some.share == pytest.approx(2 / 3)
    assert some.precision == pytest.approx(2 / 3) and some.recall == 1
    assert circuit_overlap([(0, 0)], [(0, 0), (1, 1)]).recall == 0.5
    assert circuit_overlap([], [(0, 0)]).precision == 0


def test_figures_show_what_was_found():
    pytest.importorskip("plotly")
    model, (clean, corrupt) = make("llama"), pair()
    found = path_patching(model, clean, corrupt, difference)
    assert found.figure().data[0].z.shape == (3, 4) and "logits" in found.figure().layout.title.text
    figure = activation_patching(model, clean, corrupt, difference, site="resid_pre").figure()
    assert figure.layout.xaxis.title.text == "position"
    drawn = CircuitOverlap(frozenset({(0, 1)}), frozenset({(1, 2)}), frozenset()).figure()
    assert [trace.name for trace in drawn.data] == ["both", "first", "second"] and drawn.data[1].x == (2,)


def test_a_patch_of_a_layer_leaves_the_encoder_alone():
    model, inputs = make("t5"), prompt(length=9)
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :6]
    seen = []
    with patch(model, [Edit("z", 0, fn=lambda x: seen.append(tuple(x.shape)) or x)]), torch.no_grad():
        model(**inputs)
    assert seen == [(2, 6, 4, 8)]


def test_a_model_that_reads_and_writes_is_patched_where_it_writes():
    model, inputs = make("t5"), prompt(length=9)
    clean = inputs | {"decoder_input_ids": inputs["input_ids"][:, :6]}
    corrupt = inputs | {"decoder_input_ids": prompt(length=6, seed=7)["input_ids"]}
    found = path_patching(model, clean, corrupt, difference)
    assert found.values.shape == (2, 4) and found.values.abs().max() > 1e-3


@pytest.mark.parametrize("options, text", [
    ({"senders": [(2, 0)], "receivers": [(2, 1, "k")]}, r"\[\(2, 0\)\] lie above every receiver"),
    ({"senders": [(2, 0)], "receivers": [("resid_pre", 2)]}, "too late"),
    ({"senders": [(3, 0)]}, "layer 3: there are 3 layers"), ({"senders": [(0, 4)]}, r"\(0, 4\) is no head"),
    ({"senders": "some"}, 'senders are "all"'), ({"receivers": [(0, 1, "k")]}, "no head sends to layer 0"),
    ({"receivers": []}, "no receiver"), ({"receivers": [("logits",), (1, 1, "q")]}, "give logits alone"),
    ({"receivers": [(1, 1, "z")]}, "receives nothing"), ({"receivers": [("mlp", 1)]}, "receives nothing"),
    ({"position": 9}, "the prompts have 9 tokens"), ({"position": ()}, "the prompts have 9 tokens"),
    ({"rows": 0}, "at least 1"),
])  # fmt: skip
def test_settings_that_cannot_be(options, text):
    with pytest.raises(OptionError, match=text):
        path_patching(make("llama"), *pair(), difference, **options)


def test_inputs_that_cannot_be():
    model, (clean, corrupt) = make("llama"), pair()
    shorter = {k: v[:, 1:] for k, v in corrupt.items()}
    with pytest.raises(ShapeError, match=r"\(2, 9\), corrupted ones \(2, 8\)"):
        path_patching(model, clean, shorter, difference)
    with pytest.raises(ShapeError, match="different token lengths"):
        path_patching(model, pair(padded=2)[0], corrupt, difference)
    with pytest.raises(OptionError, match="the same metric"):
        path_patching(model, clean, corrupt, lambda logits: logits.new_ones(2))
    with pytest.raises(ShapeError, match=r"the metric gave \(2, 60\)"):
        path_patching(model, clean, corrupt, lambda logits: logits[:, -1])
    with pytest.raises(OptionError, match="not finite"):
        path_patching(model, clean, corrupt, lambda logits: logits[:, -1, 0] / 0)
    with pytest.raises(OptionError, match="input_ids is missing"):
        path_patching(model, {"inputs_embeds": torch.zeros(1, 2, 3)}, corrupt, difference)
    with pytest.raises(ShapeError, match="a row of the batch each"):
        path_patching(model, clean, corrupt, difference, position=torch.tensor([1, 2, 3]))
    with pytest.raises(ShapeError, match="3 correct"):
        logit_diff(torch.zeros(2, 9), torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]))
    with pytest.raises(OptionError, match="did you mean 'mlp_out'"):
        activation_patching(model, clean, corrupt, difference, site="mlp_uot")
    with pytest.raises(OptionError, match="position= is for z alone"):
        activation_patching(model, clean, corrupt, difference, site="mlp_out", position=1)
    effects = PatchEffects(torch.zeros(2, 3), "head", 1.0, 0.0)
    for threshold, text in ((None, "above 0, not None"), (0.1, "lower the threshold")):
        with pytest.raises(OptionError, match=text):
            circuit_overlap(effects, effects, threshold)
    with pytest.raises(OptionError, match="of positions"):
        circuit_overlap(PatchEffects(torch.ones(2, 3), "position", 1.0, 0.0), effects, 0.1)


def test_several_wrong_answers_count_by_their_mean():
    logits = torch.arange(10.0).view(2, 5)
    found = logit_diff(logits, torch.tensor([4, 0]), torch.tensor([[0, 2], [1, 3]]))
    assert found.tolist() == [3.0, -2.0]


def test_nothing_is_left_on_the_model():
    model, (clean, corrupt) = make("llama"), pair()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        plain = model(**clean).logits
    path_patching(model, clean, corrupt, difference, receivers=[(2, 1, "k")])
    with torch.no_grad():
        assert torch.equal(model(**clean).logits, plain)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
