"""`regard needle` on a pretrained model: which ways of giving up keys still find a number in text, and what SnapKV needs."""

import pytest
import torch

from regard import AblateHeads, SnapKV, retrieval_scores, steer
from regard.bench.needle.cases import Text
from regard.bench.needle.measure import Plan, Subject, measure, summary
from regard.bench.needle.ways import Way, read_way
from regard.bench.recall.needle import language_reference
from regard.bench.results import Results
from regard.contract.card import InterventionCard
from tests.smollm import smollm

pytestmark = pytest.mark.slow
ABOUT = "a number of seven digits, each a token of its own, hidden in Python's language reference, asked for in a chat"
MODEL = "SmolLM2-135M-Instruct, weights rounded to 4 bits, computed in bfloat16"
# the question and the end of its turn have 17 tokens; a number ends up to ten after the words that lead to it
FITTED = "window=16,kernel=21"


class Silent:
    def advance(self, step, note):
        pass


@pytest.fixture(scope="module")
def subject():
    model, tokenizer = smollm("bfloat16")
    return Subject("smollm2", model, Text(tokenizer, language_reference(), ABOUT, tokens=20))


def table(subject, ways, plan, folder):
    """name, way of asking -> the row of the summary; ways as text or made."""
    made = [read_way(way) if isinstance(way, str) else way for way in ways]
    lines = measure(subject, made, plan, Results(folder / "needle.jsonl"), Silent())
    return {(row["way"], row["ask"]): row for row in summary(lines)}


def shown(rows):
    return [{name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()} for row in rows.values()]


def ways_at(budget):
    return (
        f"snapkv:budget={budget},{FITTED}", f"snapkv:budget={budget}", f"heavy_hitters:budget={budget},window=16",
        f"attention_sinks:budget={budget}", f"recency:budget={budget}", f"key_norm:budget={budget},window=16",
        f"random_keys:budget={budget},window=16",
    )  # fmt: skip


def test_ways_of_giving_up_keys_on_smollm2(subject, record, tmp_path):
    depths = (0.1, 0.4, 0.6, 0.9)
    again = table(
        subject, ["full", *ways_at(256), *ways_at(128), *ways_at(64)], Plan((512,), depths, 2, ("again",)), tmp_path
    )
    late = ["full", *(way for budget in (256, 128) for way in ways_at(budget) if way != f"snapkv:budget={budget}")]
    later = table(subject, late, Plan((512,), depths, 2, ("later",)), tmp_path)
    few = ["full", f"snapkv:budget=128,{FITTED}", "heavy_hitters:budget=128,window=16", "recency:budget=128"]
    longer = table(subject, few, Plan((1024,), (0.3, 0.7), 2, ("again",)), tmp_path)
    record(
        {
            "model": MODEL, "case": ABOUT, "prompts": {"512": 8, "1024": 4}, "512, again": shown(again),
            "512, later": shown(later), "1024, again": shown(longer),
        }
    )  # fmt: skip
    full = again["full", "again"]
    assert full["accuracy"] >= 0.9
    for budget in (256, 128):
        snap = again[f"snapkv:budget={budget},{FITTED}", "again"]
        assert snap["accuracy"] >= 0.8
        assert snap["cache_bytes"] < 1.05 * full["cache_bytes"] * budget / 512
        for other in ("recency", "attention_sinks"):
            assert again[f"{other}:budget={budget}", "again"]["accuracy"] < snap["accuracy"]


def test_snapkv_needs_a_kernel_as_wide_as_what_is_to_be_found(subject, record, tmp_path):
    """The votes fall on the words before a number, and pooling has to carry them over its digits."""
    settings = [(32, 7), (16, 1), (16, 7), (16, 13), (16, 21), (32, 21), (8, 21), (4, 21)]
    ways = [f"snapkv:budget=128,window={window},kernel={kernel}" for window, kernel in settings]
    ways.append("snapkv:budget=128,window=16,kernel=21,group=max")
    rows = table(subject, ways, Plan((512,), (0.1, 0.4, 0.6, 0.9), 2, ("again",), seed=1), tmp_path)
    record({"model": MODEL, "case": ABOUT, "prompts": 8, "512, again": shown(rows)})
    found = [rows[way, "again"]["accuracy"] for way in ways]
    assert found[4] >= 0.8 and found[2] <= 0.4, "a kernel of 21 against one of 7, window 16"


class Held:
    """Where the keys stood that each layer held when the first token after the prompt was read."""

    card = InterventionCard(slug="held", title="held", exports=("x",), baseline=True, sites=("kv",))

    def __init__(self):
        self.of = {}

    def on_read(self, call, seen):
        if call.step.decoded == 1:
            self.of[call.layer] = call.positions[0, :, :-1]


@pytest.mark.parametrize("settings", [{}, {"window": 16, "kernel": 21}, {"window": 16, "kernel": 5, "pool": "avg"}])
def test_snapkv_keeps_what_the_rule_keeps_by_the_models_own_weights(settings):
    model, tokenizer = smollm()
    case = Text(tokenizer, language_reference(), ABOUT).cases(256, 0.5, 1)[0]
    read, then = (part[None] for part in case.parts("again"))
    ours, held = SnapKV(budget=64, **settings), Held()
    with torch.no_grad(), steer(model, ours, held):
        model(then, past_key_values=model(read, use_cache=True).past_key_values)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(read, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    assert len(held.of) == len(attentions) == 30
    window, kernel, prefix = ours.window, ours.kernel, read.shape[1] - ours.window
    for layer, weights in enumerate(attentions):
        votes = weights[0, :, -window:, :prefix].sum(1).view(3, 3, prefix).mean(1)
        padded = torch.nn.functional.pad(votes, (kernel // 2, kernel // 2)).unfold(1, kernel, 1)
        worth = padded.mean(-1) if ours.pool == "avg" else padded.amax(-1)
        assert (held.of[layer][:, -window:] == torch.arange(prefix, prefix + window)).all()
        for head in range(3):
            kept = held.of[layer][head, :-window]
            gone = torch.ones(prefix, dtype=torch.bool).index_fill(0, kept, False)
            # pooled votes tie: what stays is worth as much as anything that went
            assert len(set(kept.tolist())) == 64 - window
            assert worth[head, kept].min() >= worth[head, gone].max() * (1 - 1e-3)


def test_retrieval_heads_of_smollm2(subject, record, tmp_path):
    """Numbers are no longer told without the heads that look at them, and are without most draws of as many others.

    Some heads that look at no number are needed too, whichever else goes: a draw that holds one of them tells nothing.
    """
    depths, source = (0.1, 0.5, 0.9), subject.source
    cases = [case for depth in depths for case in source.cases(256, depth, 5, seed=3)]
    found = retrieval_scores(subject.model, None, cases, tokens=20)
    plan = Plan((256,), depths, 3, ("again",), seed=9)

    def accuracy(without):
        ways = [Way(name, (AblateHeads(heads=heads),)) for name, heads in without.items()]
        return {name: round(row["accuracy"], 3) for (name, _), row in table(subject, ways, plan, tmp_path).items()}

    best = accuracy({f"best {count}": found.top(count) for count in (1, 2, 4, 16)})
    draws = {f"{count} others, draw {seed}": found.others(count, seed=seed) for count in (4, 16) for seed in range(5)}
    others = accuracy(draws)
    broken = [draws[name] for name, share in others.items() if share < 0.5 and name.startswith("4 ")]
    alone = accuracy({f"{layer}.{head}": [(layer, head)] for draw in broken for layer, head in draw})
    whole = accuracy({"nothing": ()})["nothing"]
    record(
        {
            "model": MODEL, "case": ABOUT, "prompts_to_find": len(cases), "prompts_to_prune": 9, "tokens": 256,
            "recalled": int(found.counted.sum()), "heads": 270, "retrieval_heads_of_0.1_or_more": len(found.heads),
            "best": [f"{layer}.{head}: {float(found.scores[layer, head]):.3f}" for layer, head in found.top(16)],
            "accuracy_whole": whole, "accuracy_without_the_best": best, "accuracy_without_others": others,
            "accuracy_without_one_head_of_the_draws_of_4_that_broke_it": alone,
        }
    )  # fmt: skip
    assert whole >= 0.9
    for count in (4, 16):
        shares = sorted(share for name, share in others.items() if name.startswith(f"{count} "))
        assert best[f"best {count}"] <= 0.2 and shares[2] >= 0.8, "the median draw of others keeps most of it"
