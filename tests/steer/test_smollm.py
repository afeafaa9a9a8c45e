"""What LargePiG and ACT do for a small pretrained model, with intervals; no claim that they help it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard import AttentionCalibration, LargePiG, read_sinks, search_heads, steer
from regard import record as record_of
from regard.hosts.text import cut
from tests.docstrings import docstring_pairs
from tests.smollm import smollm

pytestmark = pytest.mark.slow
MODEL = "SmolLM2-135M-Instruct, weights rounded to 4 bits, computed in bfloat16"
CITIES = (
    "Oslo", "Lima", "Cairo", "Hanoi", "Quito", "Accra", "Riga", "Tunis", "Perth", "Osaka", "Turin", "Porto", "Leeds",
    "Dakar", "Minsk", "Sofia",
)  # fmt: skip
PARTS = (
    "bra",
    "tol",
    "vik",
    "mer",
    "zun",
    "hal",
    "ost",
    "pel",
    "gri",
    "dax",
    "lom",
    "fen",
    "qua",
    "rish",
    "tev",
    "yor",
)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return smollm("bfloat16")


def compared(plain, ours, seed=0):
    """Shares of right answers to the same questions, and the difference with its 95 % interval (bootstrap)."""
    both = torch.tensor([plain, ours], dtype=torch.float64)
    drawn = torch.randint(len(plain), (4000, len(plain)), generator=torch.Generator().manual_seed(seed))
    differences = (both[1] - both[0])[drawn].mean(1)
    interval = differences.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    share = both.mean(1)
    return {
        "plain": round(float(share[0]), 3), "steered": round(float(share[1]), 3),
        "difference": round(float(share[1] - share[0]), 3), "interval": [round(x, 3) for x in interval.tolist()],
        "answers_changed": int((both[0] != both[1]).sum()),
    }  # fmt: skip


def keepers(count, rows, seed=0):
    """(text, question, name): names that nobody has, one a city."""
    rng = np.random.default_rng(seed)
    for _ in range(rows):
        cities = rng.permutation(CITIES)[:count].tolist()
        names = ["".join(rng.permutation(PARTS)[:3]).capitalize() for _ in cities]
        asked = int(rng.integers(count))
        text = " ".join(f"The keeper of {city} is {name}." for city, name in zip(cities, names, strict=True))
        yield text, f"The keeper of {cities[asked]} is", names[asked]


def test_smollm2_points_at_names_that_nobody_has(model_and_tokenizer, record):
    model, tokenizer = model_and_tokenizer
    cases = list(keepers(16, 32))
    gate = {"divergence": "jsd", "scale": 1.44, "normalise": True}
    # the model has no begin token, so that its sink is the first word; the heads that look at what is copied lie in layers
    # 17 and 18 of 30. way -> the first token of the source, options
    ways = {
        "largepig": (0, {}), "largepig, without the first word": (1, {}), "jsd, scale 1.44": (0, gate),
        "jsd, without the first word": (1, gate),
        "jsd, without the first word, layer 18": (1, gate | {"attention_layer": 18}),
    }  # fmt: skip
    right = {way: [] for way in ("plain", *ways)}
    for text, question, name in cases:
        tokens = cut(tokenizer, f"{text}\n\n{question}")
        ids, end = torch.tensor([tokens.ids]), tokens.span(0, len(text))[1]
        for way in right:
            effects = [LargePiG(source=(ways[way][0], end), **ways[way][1])] if way in ways else []
            with steer(model, *effects), torch.no_grad():
                written = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
                )
            right[way].append(tokenizer.decode(written[0, ids.shape[1] :]).strip().startswith(name))
    figures = {way: compared(right["plain"], right[way]) for way in ways}
    record({"model": MODEL, "task": "16 keepers with names made up, one asked for", "rows": 32, "ways": figures})
    assert 0 < figures["largepig"]["plain"] < 1, "there is something to gain and something to lose"


def questions(rows, options=6, seed=0):
    """(summary, details, which of them belongs to it), of docstrings."""
    pairs, rng = docstring_pairs(seed), np.random.default_rng(seed)
    for row in range(rows):
        name, own = pairs[row]
        others = [pairs[i][1] for i in rng.choice(np.arange(rows, len(pairs)), options - 1, replace=False)]
        place = int(rng.integers(options))
        yield name.partition(": ")[2], [*others[:place], own, *others[place:]], place


def test_smollm2_tells_which_details_belong_to_a_summary(model_and_tokenizer, record):
    model, tokenizer = model_and_tokenizer

    def padded(summary, details):
        """The summary after each of the details, padded on the left."""
        end = tokenizer(f" {summary}")["input_ids"]
        rows = [tokenizer(f"Details: {some}\nSummary:")["input_ids"] + end for some in details]
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, -len(row) :], mask[i, -len(row) :] = torch.tensor(row), 1
        return ids, mask, len(end)

    @torch.no_grad()
    def chances(summary, details):
        """log p of the summary after each of the details."""
        ids, mask, count = padded(summary, details)
        logits = model(ids, attention_mask=mask, logits_to_keep=count + 1).logits[:, :-1].float()
        return (
            -F.cross_entropy(logits.flatten(0, 1), ids[:, -count:].flatten(), reduction="none")
            .view(len(ids), -1)
            .sum(1)
        )

    def right(model, some):
        return [int(chances(summary, details).argmax()) == place for summary, details, place in some]

    def margin(model, some):
        """The mean log p of the right one among all: it moves where single answers do not yet."""
        return float(np.mean([float(chances(s, d).log_softmax(0)[place]) for s, d, place in some]))

    cases = list(questions(72))
    calibration, test = cases[:10], cases[10:]
    ids, mask, _ = padded(*calibration[0][:2])
    with torch.no_grad():
        tape = record_of(model, {"input_ids": ids, "attention_mask": mask}, sites=("weights",), reduce="full")
    counts = read_sinks(tape).counts
    tried, inner = {}, counts[2:-1]
    for flat in inner.flatten().topk(12).indices.tolist():
        tried.setdefault(2 + flat // inner.shape[1], []).append(flat % inner.shape[1])
    found = search_heads(model, lambda heads: AttentionCalibration(heads=heads), margin, calibration, heads=tried)
    plain, figures = right(model, test), {}
    for way, heads in {"heads that gain": found.better(), "all heads": "all"}.items():
        with steer(model, AttentionCalibration(heads=heads)):
            figures[way] = compared(plain, right(model, test))
    record(
        {
            "model": MODEL, "task": "which of 6 details belongs to a summary, of docstrings", "rows": len(test),
            "rows_to_choose": len(calibration), "heads_tried": 12, "heads_with_sinks": int((counts > 0).sum()),
            "gains_of_mean_log_p": {f"{layer}.{head}": round(gain, 4) for (layer, head), gain in found.gains.items()},
            "heads_that_gain": found.better(), "ways": figures,
        }
    )  # fmt: skip
    assert figures["all heads"]["plain"] > 0.4, "chance is 1 / 6"
