"""The baselines of giving up keys: what each keeps, and that the cache never holds more than it may."""

import pytest
import torch

from regard import AttentionSinks, HeavyHitters, KeyNorm, RandomKeysKept, Recency, recording, steer
from regard.hosts.transformers.specimens import make, prompt
from regard.steer.cache.evict import best
from tests.steer.test_snapkv import Reading, generate

WAYS = (Recency, AttentionSinks, HeavyHitters, KeyNorm, RandomKeysKept)


def held_of(settings, inputs, tokens=3):
    reading = Reading()
    with steer(make("llama"), settings, reading) as session:
        generate(session.model, inputs, tokens)
        return reading.held, session.report()


def test_recency_keeps_the_last_and_sinks_keep_the_first_too():
    held, _ = held_of(Recency(budget=6), prompt(length=20))
    # the token being read joins the five
    assert all((p == torch.arange(15, 20)).all() for p in held.values())
    held, _ = held_of(AttentionSinks(budget=6, sinks=2), prompt(length=20))
    assert all((p == torch.tensor([0, 1, 17, 18, 19])).all() for p in held.values())


def test_sinks_of_a_padded_row_are_its_first_real_keys():
    held, _ = held_of(AttentionSinks(budget=6, sinks=2), prompt(length=20, padded=4))
    assert all((p[0] == torch.tensor([4, 5, 17, 18, 19])).all() for p in held.values())


@pytest.mark.parametrize("way", [Recency, AttentionSinks, HeavyHitters])
def test_the_cache_never_holds_more_than_the_budget(way):
    model, inputs = make("llama"), prompt(length=20, padded=2)
    settings = way(budget=9, window=2)
    sizes = []

    class Watch(Reading):
        def on_read(self, call, seen):
            if call.step.phase == "decode":
                sizes.append(call.kept.keys.shape[2])

    with steer(model, settings, Watch()):
        generate(model, inputs, 8)
    assert set(sizes) == {9}


def test_heavy_hitters_add_up_all_rows():
    model, inputs = make("llama"), prompt(length=20, padded=3)
    reading, settings = Reading(), HeavyHitters(budget=9, window=3)
    with recording(model, steps=False) as tape:
        generate(model, inputs, 2)
    with steer(model, settings, reading):
        generate(model, inputs, 2)
    for layer, positions in reading.held.items():
        sums = tape["weights", layer].sum(2).unflatten(1, (2, 2)).sum(2)
        real = inputs["attention_mask"].bool()
        sums = sums.masked_fill(~real[:, None], -1.0)
        sums[..., -3:] = 100
        wanted = sums.topk(8, -1).indices.sort(-1).values
        assert torch.equal(positions, wanted)


def test_key_norm_keeps_small_keys():
    model, inputs = make("llama"), prompt(length=20)
    with recording(model, sites=("k",), steps=False) as tape:
        generate(model, inputs, 2)
    reading = Reading()
    with steer(model, KeyNorm(budget=8, window=2), reading):
        generate(model, inputs, 2)
    for layer, positions in reading.held.items():
        norms = tape["k", layer].norm(dim=-1)
        norms[..., -2:] = 0
        assert torch.equal(positions, (-norms).topk(8, -1).indices.sort(-1).values)


def test_random_keys_are_drawn_by_the_seed():
    a, _ = held_of(RandomKeysKept(budget=8, window=2, seed=1), prompt(length=20))
    b, _ = held_of(RandomKeysKept(budget=8, window=2, seed=1), prompt(length=20))
    c, _ = held_of(RandomKeysKept(budget=8, window=2, seed=2), prompt(length=20))
    assert all(torch.equal(a[layer], b[layer]) for layer in a)
    assert not all(torch.equal(a[layer], c[layer]) for layer in a)


def test_a_ratio_is_a_share_of_the_prompt():
    _, report = held_of(KeyNorm(budget=None, ratio=0.5, window=2), prompt(length=20), tokens=3)
    # of 20 keys 10 stay, two more were written
    assert all(row["kept"] == [12.0, 12.0] for row in report)


def test_layers_choose():
    _, report = held_of(KeyNorm(budget=8, window=2, layers=(1,)), prompt(length=20))
    assert [row["kept"][0] for row in report] == [22.0, 10.0, 22.0]


def test_pads_go_first_and_the_window_stays():
    scores = torch.tensor([[[9.0, 8.0, 1.0, 2.0, 3.0, 0.0]]])
    real = torch.tensor([[[False, False, True, True, True, True]]])
    assert best(scores, real, 3, 1).tolist() == [[[3, 4, 5]]]
    assert best(scores, real, 5, 1).tolist() == [[[-1, 2, 3, 4, 5]]]
    assert best(scores, real, 2, 1, sinks=1).tolist() == [[[2, 5]]]
