"""What the battery sees of an intervention, and what it tries systems on."""

import dataclasses

import pytest
import torch

from regard import (
    AblateHeads,
    AttentionCalibration,
    CoreContextCache,
    HiP,
    LargePiG,
    RetrievalAttention,
    ScaleComponents,
    SetAttention,
    ShareAttention,
    SnapKV,
    SuppressLastLayer,
)
from regard.checks import specimens
from regard.checks.untouched import changed, same, state
from regard.checks.watching import ORDER, TAPED, differences, place, run, watch
from regard.contract.card import GIVEN, SITES
from regard.hosts.transformers.specimens import make, prompt


@pytest.mark.parametrize(
    "intervention, sites, first",
    [
        (SnapKV(budget=8, window=3), {"kv"}, place(1, 0, "kv")),
        (ScaleComponents({("head", 1, 0): 0.5, ("mlp", 2): 0.5}), {"z", "mlp_out"}, place(0, 1, "z")),
        (SuppressLastLayer(attention=0.5), {"attn_out"}, place(0, 2, "attn_out")),
        (RetrievalAttention(top_k=2, sinks=2, window=4), {"scores"}, place(1, 0, "scores")),
        (CoreContextCache(group=2, window=4), {"scores", "kv"}, place(0, 0, "scores")),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_changed_is_seen_where_it_stands(intervention, sites, first):
    watched, tape = watch(make("llama"), intervention, prompt(length=24))
    assert {at.site for at in watched.written} == sites
    assert min(watched.written) == first
    plain = run(make("llama"), prompt(length=24))
    assert not differences(plain, tape, first)
    later = differences(plain, tape, place(9, 0, "embed"))
    assert later and later[0] >= first


@pytest.mark.parametrize(
    "intervention",
    [
        AblateHeads(heads=[(0, 1)], mode="mask_query"),
        ShareAttention(((0, 1), (2,)), recompute=True),
        AttentionCalibration(heads={0: [0, 1, 2], 1: [1, 3]}, alpha=1.5, decode="reuse"),
        SetAttention(heads={0: (0, 2)}, target=(2, 5), queries="all"),
        LargePiG(contrast=True, candidate_layers=(1,)),
        HiP(budget=4, block_q=1, recent=2, sinks=1, dense_layers=1, refresh=2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_settings_beside_those_of_the_card_keep_to_its_sites(intervention):
    plain = run(make("llama"), prompt(length=24))
    watched, tape = watch(make("llama"), intervention, prompt(length=24))
    assert watched.written
    assert all(set(one_of) & set(intervention.card.sites) for one_of in watched.written.values())
    assert not differences(plain, tape, watched.first(intervention.card.sites))


def test_places_stand_in_the_order_of_a_pass():
    assert set(TAPED) <= set(ORDER) and set(ORDER) <= set(SITES)
    assert place(0, 2, "z") < place(0, 2, "attn_out") < place(0, 3, "q") < place(0, 0, "final") < place(0, 0, "logits")
    assert place(0, 0, "logits") < place(1, 0, "embed") < place(1, 0, "kv") < place(1, 0, "k")


def test_every_word_of_a_card_means_something_and_always_the_same():
    assert set(specimens._GIVEN) == set(GIVEN)
    for name, words in {
        "llama": ("inputs", "ids", "cases", "tape"), "vit_classifier": ("inputs", "images", "labelled images", "tape"),
        "cnn": ("images", "one image", "images and labels"), "sequence": ("answered ids",), "mixers/based": ("tokens",),
    }.items():  # fmt: skip
        model = specimens.make(name)
        assert not changed(state(model), state(specimens.make(name)))
        for word in words:
            before = torch.get_rng_state()
            assert same(specimens.given(word, name, model), specimens.given(word, name, model)), (name, word)
            assert torch.equal(before, torch.get_rng_state())
    assert specimens.given("cases", "llama", specimens.make("llama"))


def test_two_values_are_the_same_to_the_bit():
    @dataclasses.dataclass(eq=False)
    class Found:
        values: torch.Tensor
        more: dict

    def found(x, y=1.0):
        return Found(torch.tensor([1.0, float("nan"), x]), {"of": [(float("nan"), y)]})

    assert same(found(2.0), found(2.0))
    assert not same(found(2.0), found(2.0000002))
    assert not same(found(2.0), found(2.0, 1))
    assert not same(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not same(torch.ones(2), torch.ones(2, 1))


def test_what_is_left_behind_is_named():
    model = specimens.make("cnn")
    before = state(model)
    model[0].weight.data[0, 0, 0, 0] += 1e-6
    model[1].running_mean += 1
    model[3].stride = 3
    model[5].register_forward_hook(lambda module, given, out: out)
    model[8].bias.grad = torch.zeros(5)
    model[2].train()
    left = changed(before, state(model))
    for name in (
        "the value of 0.weight", "the value of 1.running_mean", "attributes of 3", "hooks of 5", "the gradient of 8.bias",
        "the mode of 2",
    ):  # fmt: skip
        assert name in left
