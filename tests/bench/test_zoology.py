import numpy as np
import pytest
import torch

from regard.bench.recall.zoology import MQAR, ar_hits, mqar_grid, ppl_split
from regard.bench.task import IGNORED, fingerprint
from regard.contract.errors import OptionError


def test_every_row_asks_every_key_once_at_an_even_place_after_the_context():
    task = MQAR(256, 64, 8, random_non_queries=False)
    rows = task.build("train", 200)
    for x, y in zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True):
        keys, values = x[0:16:2], x[1:16:2]
        asked = [p for p, label in enumerate(y) if label != IGNORED]
        assert len(asked) == 8
        assert all(p >= 16 and p % 2 == 0 for p in asked)
        assert sorted(x[p] for p in asked) == sorted(keys)
        assert len(set(keys)) == 8 and len(set(values)) == 8
        assert all(1 <= k < 128 for k in keys) and all(128 <= v < 256 for v in values)
        assert all(y[p] == values[keys.index(x[p])] for p in asked)
        assert all(x.count(k) == 2 for k in keys)
        assert all(token == 0 for p, token in enumerate(x) if p >= 16 and p not in asked)


def test_a_dictionary_solves_it_and_the_commonest_value_does_not():
    task = MQAR(256, 64, 8)
    rows = task.build("test", 2000)
    right = total = 0
    for x, y in zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True):
        known = dict(zip(x[0:16:2], x[1:16:2], strict=True))
        for p, label in enumerate(y):
            if label != IGNORED:
                right += known[x[p]] == label
                total += 1
    assert right == total
    labels = rows.targets[rows.targets != IGNORED]
    assert labels.bincount().max() / len(labels) <= task.chance + 0.01


def test_slots_follow_the_sequential_law_without_replacement():
    task = MQAR(64, 16, 2, power_a=0.01)
    space = 6
    p = np.arange(1, space + 1) ** (0.01 - 1.0)
    rng = np.random.default_rng(1)
    rows = 20_000
    simulated = np.zeros(space)
    for _ in range(rows):
        simulated[rng.choice(space, size=2, replace=False, p=p / p.sum())] += 1
    drawn = np.zeros(space)
    targets = task.build("train", rows, seed=3).targets
    for place in range(space):
        drawn[place] = (targets[:, 4 + 2 * place] != IGNORED).sum()
    # two samples of one law: chi-square with 5 degrees of freedom, 20.5 at one in a thousand
    chi2 = (((drawn - simulated) ** 2) / (drawn + simulated)).sum()
    assert chi2 < 20.5
    first = MQAR(64, 16, 1, power_a=1.0).build("train", rows, seed=4).targets
    uniform = np.array([(first[:, 2 + 2 * s] != IGNORED).sum() for s in range(7)])
    assert ((uniform - rows / 7) ** 2 / (rows / 7)).sum() < 22.5


def test_gap_from_key_brings_the_last_keys_nearer_than_the_official_law():
    near = MQAR(256, 128, 8, gap="from_key").build("train", 4000).targets
    last_key = MQAR(256, 128, 8, gap="from_key").build("train", 4000).inputs[:, 14]
    x = MQAR(256, 128, 8, gap="from_key").build("train", 4000).inputs
    place = (x[:, 16:] == last_key[:, None]).float().argmax(1)
    first_place = (x[:, 16:] == x[:, :1]).float().argmax(1)
    assert near.shape == (4000, 128)
    assert place.float().mean() < first_place.float().mean()


def test_the_same_seed_gives_the_same_rows_filler_included_and_no_test_row_is_trained_on():
    task = MQAR(256, 64, 8)
    first, again = task.build("train", 500, 7), task.build("train", 500, 7)
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.inputs, task.build("train", 500, 8).inputs)
    train = {tuple(row) for row in first.inputs.tolist()}
    assert not train & {tuple(row) for row in task.build("test", 500, 7).inputs.tolist()}
    assert fingerprint(task) == fingerprint(MQAR(256, 64, 8)) != fingerprint(MQAR(256, 64, 4))


def test_filler_that_equals_a_key_has_no_label():
    rows = MQAR(40, 32, 8).build("train", 300)
    twice = 0
    for x, y in zip(rows.inputs.tolist(), rows.targets.tolist(), strict=True):
        keys = x[0:16:2]
        twice += sum(x[p] in keys and y[p] == IGNORED for p in range(16, 32))
        assert sum(label != IGNORED for label in y) == 8
    assert twice > 0


@pytest.mark.parametrize(
    "options, text",
    [
        ({"seq_len": 63}, "even"),
        ({"seq_len": 64, "num_kv_pairs": 17}, r"4\*num_kv_pairs <= seq_len"),
        ({"vocab_size": 64, "seq_len": 64}, "vocab_size > seq_len"),
        ({"vocab_size": 66, "seq_len": 64, "num_kv_pairs": 0}, "a pair"),
        ({"power_a": 0.0}, "power_a"),
        ({"gap": "from_end"}, "from_end"),
    ],
)
def test_impossible_tasks_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        MQAR(**options)


def test_the_published_grids():
    assert [(t.seq_len, t.num_kv_pairs) for t in mqar_grid("paper")] == [(64, 4), (128, 8), (256, 16), (512, 64)]
    assert len(mqar_grid("based")) == 7
    with pytest.raises(OptionError):
        mqar_grid("large")


def test_recall_hits_are_bigrams_seen_before_and_rare_in_training():
    ids = torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2]])
    assert ar_hits(ids).tolist() == [[False, False, False, False, True, False, False, True]]
    assert not ar_hits(ids, training_counts={(1, 2): 2000}).any()
    assert ar_hits(ids, training_counts={(1, 2): 10}).sum() == 2


def test_perplexity_is_split_into_hits_and_the_rest():
    ids = torch.tensor([[1, 2, 1, 2]])
    logits = torch.zeros(1, 4, 4)
    logits[0, 2, 2] = 50.0
    on, rest = ppl_split(logits, ids, ar_hits(ids))
    assert on == pytest.approx(1.0) and rest == pytest.approx(4.0)
