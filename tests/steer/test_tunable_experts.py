"""Experts off, on and scaled, in three families and by three ways of computing them; and what uses them."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from regard import OptionError, TunableExperts, Unsupported, expert_contrast, expert_usage, record, steer
from regard.hosts.transformers.specimens import make, prompt

FAMILIES = ("mixtral", "qwen3_moe", "deepseek")
# deepseek's first layer is dense
LAYER = 1


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def routed(model, inputs, settings):
    with steer(model, settings):
        return record(model, inputs, sites=("router",))


def by_hand(router, row, off=(), on=()):
    """The experts of one token and their weights, of its logits (E,), by the words of each family's paper."""
    count, k = len(row), router.top_k
    if not hasattr(router, "e_score_correction_bias"):
        # softmax over those that are left, the best k, divided by their sum where the family does so
        left = [e for e in range(count) if e not in off]
        total = sum(math.exp(row[e]) for e in left)
        worth = {e: math.exp(row[e]) / total for e in left}
        chosen = sorted(left, key=lambda e: (e not in on, -worth[e]))[:k]
        whole = sum(worth[e] for e in chosen) if getattr(router, "norm_topk_prob", True) else 1.0
        return {e: worth[e] / whole for e in chosen}
    own = {e: 1 / (1 + math.exp(-row[e])) for e in range(count) if e not in off}
    worth = {e: own[e] + float(router.e_score_correction_bias[e]) for e in own}
    size = count // router.num_group
    groups = {g: sorted((worth[e] for e in own if e // size == g), reverse=True) for g in range(router.num_group)}
    # one that holds an expert which is on comes before all
    first = [g for g in groups if any(e // size == g for e in on)]
    best = sorted((g for g in groups if groups[g]), key=lambda g: (g not in first, -sum(groups[g][:2])))
    inside = best[: router.topk_group]
    chosen = sorted(own, key=lambda e: (e not in on, e // size not in inside, -worth[e]))[:k]
    whole = sum(own[e] for e in chosen) if router.norm_topk_prob else 1.0
    return {e: own[e] / whole * router.routed_scaling_factor for e in chosen}


TABLES = [
    {},
    {"off": (0,)},
    {"off": (2,)},
    {"on": (3,)},
    {"off": (1,), "on": (2,)},
    # in deepseek: one of each group, of which a token gets one
    {"off": (0, 2)},
    {"on": (0, 2)},
    {"off": (0, 1), "on": (3,)},
    {"on": (1, 3), "off": (0,)},
]


@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize(
    "name, normalised",
    [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False), ("deepseek", True), ("deepseek", False)],
)
def test_choice_and_weights_are_those_of_the_familys_rule(name, table, normalised):
    model, inputs = make(name), prompt(length=20)
    router = model.model.layers[LAYER].mlp.gate
    if name != "mixtral":
        router.norm_topk_prob = normalised
    with torch.no_grad():
        router.weight.normal_(0, 1, generator=torch.Generator().manual_seed(2))
        if name == "deepseek":
            # corrections of both signs, as large as the scores: they change the choice and no weight
            router.e_score_correction_bias.copy_(torch.tensor([0.4, -1.5, 0.3, -1.2]))
    off, on = (tuple((LAYER, e) for e in table.get(way, ())) for way in ("off", "on"))
    scores, weights, experts = routed(model, inputs, TunableExperts(off=off, on=on))["router", LAYER]
    seen = set()
    for row, given, chosen in zip(scores.tolist(), weights.tolist(), experts.tolist(), strict=True):
        wanted = by_hand(router, row, table.get("off", ()), table.get("on", ()))
        assert dict(zip(chosen, given, strict=True)) == pytest.approx(wanted, abs=1e-5)
        seen.add(tuple(sorted(chosen)))
    assert table or len(seen) > 1, "all tokens choose alike"


@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_never_chosen_and_every_token_keeps_its_experts(name):
    model, inputs = make(name), prompt(length=12)
    plain = record(model, inputs, sites=("router",))["router", LAYER]
    expert = int(plain[2].flatten().mode().values)
    tape = routed(model, inputs, TunableExperts(off=((LAYER, expert),)))
    scores, weights, experts = tape["router", LAYER]
    assert not (experts == expert).any() and experts.shape == plain[2].shape
    assert all(len(set(row)) == 2 for row in experts.tolist())
    if name == "mixtral":
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
        masked = scores.masked_fill(torch.arange(4) == expert, float("-inf")).softmax(-1)
        wanted = masked.topk(2, -1)
        torch.testing.assert_close(weights, wanted.values / wanted.values.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_off_without_another_in_its_place_is_a_projection_of_zeros(name, way):
    model, inputs = make(name), prompt(length=12)
    model.set_experts_implementation(way)
    with steer(model, TunableExperts(off=((LAYER, 2),), reroute=False)):
        ours = logits(model, inputs)
    with torch.no_grad():
        model.model.layers[LAYER].mlp.experts.down_proj[2] = 0
    torch.testing.assert_close(ours, logits(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_on_is_always_chosen_with_its_own_weight(name):
    model, inputs = make(name), prompt(length=12)
    scores, weights, experts = routed(model, inputs, TunableExperts(on=((LAYER, 3),)))["router", LAYER]
    assert (experts == 3).any(-1).all()
    if name == "mixtral":
        probabilities = scores.float().softmax(-1).gather(-1, experts)
        torch.testing.assert_close(weights, probabilities / probabilities.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_three_ways_of_computing_experts_agree(name):
    outs = []
    for way in ("eager", "batched_mm", "grouped_mm"):
        model = make(name)
        model.set_experts_implementation(way)
        with steer(model, TunableExperts(off=((LAYER, 0),), on=((2, 1),), scale={(LAYER, 1): 0.5})):
            outs.append(logits(model, prompt(length=12)))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[2], outs[0], rtol=1e-4, atol=1e-4)


def test_a_scale_multiplies_the_weight():
    model, inputs = make("mixtral"), prompt(length=12)
    plain = record(model, inputs, sites=("router",))["router", LAYER]
    half = routed(model, inputs, TunableExperts(scale={(LAYER, 1): 0.5}))["router", LAYER]
    assert torch.equal(half[2], plain[2])
    torch.testing.assert_close(half[1], torch.where(plain[2] == 1, plain[1] / 2, plain[1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_usage_adds_up_to_the_experts_of_a_token(name):
    model = make(name)
    prompts = list(prompt(batch=3, length=9)["input_ids"])
    for where in ("prompt", "answer"):
        usage = expert_usage(model, prompts, where=where, tokens=4)
        routed_layers = ~usage.isnan().all(-1)
        assert routed_layers.tolist() == [name != "deepseek", True, True]
        torch.testing.assert_close(usage[routed_layers].sum(-1), torch.full((int(routed_layers.sum()),), 2.0))


def test_usage_counts_what_a_loop_counts():
    model = make("mixtral")
    ids = prompt(batch=1, length=9)["input_ids"]
    tape = record(model, ids, sites=("router",))
    usage = expert_usage(model, [ids])
    for layer in range(3):
        for expert in range(4):
            wanted = sum(expert in row for row in tape["router", layer][2].tolist()) / 9
            assert usage[layer, expert] == pytest.approx(wanted)
    contrast = expert_contrast(usage, torch.zeros_like(usage), top=3)
    assert [r[2] for r in contrast.ranked] == sorted((r[2] for r in contrast.ranked), reverse=True)
    assert contrast.figure().data[0].type == "heatmap"


@pytest.mark.slow
def test_the_expert_of_a_domain_is_found_and_carries_it(record):
    """Two domains over one set of tokens; the first token tells which. Experts of layer 1 are trained apart by it."""
    torch.manual_seed(0)
    model = make("mixtral").train()
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randperm(20, generator=generator) for _ in range(2)]

    def batch(domain, rows=32, length=16):
        ids = torch.empty(rows, length, dtype=torch.int64)
        ids[:, 0] = 50 + domain
        ids[:, 1] = torch.randint(0, 20, (rows,), generator=generator)
        for t in range(2, length):
            ids[:, t] = tables[domain][ids[:, t - 1]]
        return ids

    def loss_of(domain):
        ids = batch(domain, 64)
        with torch.no_grad():
            out = model(ids).logits
        return float(F.cross_entropy(out[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()))

    class Tagged:
        """Tokens of domain d may use the experts 2 d and 2 d + 1 of layer 1 only."""

        card = TunableExperts.card

        def __init__(self, domain):
            barred = torch.ones(4, dtype=torch.bool)
            barred[2 * domain : 2 * domain + 2] = False
            self.barred = barred

        def on_router(self, step, choice):
            if choice.layer == LAYER:
                scores = choice.logits.masked_fill(self.barred, float("-inf")).float().softmax(-1)
                top = scores.topk(2, -1)
                choice.weights, choice.experts = top.values, top.indices
            return choice

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        domain = step % 2
        ids = batch(domain)
        with steer(model, Tagged(domain)):
            out = model(ids).logits
        # the router is told apart as well: it must put the domain's experts first by itself
        loss = F.cross_entropy(out[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
        gate = model.model.layers[LAYER].mlp.gate
        seen = []
        hook = gate.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o[0]))
        model(ids)
        hook.remove()
        mass = seen[0].float().softmax(-1)[:, 2 * domain : 2 * domain + 2].sum(-1)
        loss = loss - mass.clamp(min=1e-4).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    usage = [expert_usage(model, list(batch(domain, 8))) for domain in range(2)]
    contrast = expert_contrast(usage[0], usage[1], top=2)
    found = [(layer, expert) for layer, expert, _ in contrast.ranked]
    before = [loss_of(domain) for domain in range(2)]

    def risen(experts):
        with steer(model, TunableExperts(off=tuple(experts), reroute=True)):
            return [loss_of(domain) - before[domain] for domain in range(2)]

    rises = risen(found)
    pairs = {
        f"{layer}: {a}, {b}": risen([(layer, a), (layer, b)]) for layer in (0, 2) for a, b in combinations(range(4), 2)
    }
    pairs["1: 2, 3"] = risen([(LAYER, 2), (LAYER, 3)])
    record({"found": found, "loss": before, "rises": rises, "relevance": [r[2] for r in contrast.ranked],
            "rises of other pairs": pairs})  # fmt: skip
    assert set(found) == {(LAYER, 0), (LAYER, 1)}
    assert rises[0] >= 5 * max(rises[1], 0.01)
    # of other pairs none takes as much, and one drawn at random neither that much nor this domain alone
    assert rises[0] > max(first for first, _ in pairs.values())
    mean = [sum(pair[d] for pair in pairs.values()) / len(pairs) for d in range(2)]
    assert mean[0] < rises[0] / 4 and mean[0] < mean[1]


@pytest.mark.parametrize(
    "settings, name, error, message",
    [
        ({"off": ((0, 1),)}, "deepseek", Unsupported, "layer 0 has no router"),
        ({"off": ((1, 4),)}, "mixtral", OptionError, "experts 0 to 3"),
        ({"off": ((9, 1),)}, "mixtral", OptionError, "no layer 9"),
        ({"off": ((1, 0), (1, 1), (1, 2))}, "mixtral", OptionError, "too many are off"),
        ({"on": ((1, 0), (1, 1), (1, 2))}, "mixtral", OptionError, "3 are on"),
        ({"off": ((1, 0),)}, "llama", Unsupported, "no routers"),
    ],
)
def test_what_cannot_be_switched_is_refused(settings, name, error, message):
    with pytest.raises(error, match=message):
        steer(make(name), TunableExperts(**settings)).__enter__()


def test_off_and_on_at_once_and_bad_prompts_are_refused():
    with pytest.raises(OptionError, match="both off and on"):
        TunableExperts(off=((1, 0),), on=((1, 0),))
    with pytest.raises(OptionError, match="no prompts"):
        expert_usage(make("mixtral"), [])
    with pytest.raises(OptionError, match='"prompt" or "answer"'):
        expert_usage(make("mixtral"), [torch.tensor([3])], where="both")
