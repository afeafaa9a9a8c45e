"""SnapKV against its definition, and against the whole cache with the same keys hidden."""

import pytest
import torch
import torch.nn.functional as F

from regard import OptionError, SnapKV, Unsupported, snap_votes, steer
from regard.contract.attach import intervention
from regard.contract.card import InterventionCard
from regard.hosts.transformers.specimens import make, prompt
from tests.oracles import normal

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mixtral", "gpt2", "deepseek")


def generate(model, inputs, tokens=6, **options):
    options = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(**inputs, max_new_tokens=tokens, output_logits=True, return_dict_in_generate=True, **options)


class Reading:
    """Keeps the positions that each layer held when writing began."""

    card = InterventionCard(slug="reading", title="reading", exports=("x",), baseline=True, sites=("kv",))

    def __init__(self):
        self.held = {}

    def on_read(self, call, seen):
        if call.step.decoded == 1 and call.positions is not None:
            self.held[call.layer] = call.positions[..., :-1]


class Hide:
    """The oracle: the whole cache, with prompt keys hidden that `held` does not name."""

    card = InterventionCard(slug="hide", title="hide", exports=("x",), baseline=True, sites=("scores",))

    def __init__(self, held, length):
        self.held, self.length = held, length

    def on_scores(self, call, scores):
        if call.step.phase == "prefill" or call.layer not in self.held:
            return scores
        held = self.held[call.layer]
        seen = torch.zeros(*held.shape[:2], call.k.shape[2] + 1, dtype=torch.bool)
        seen.scatter_(2, held.masked_fill(held < 0, call.k.shape[2]), True)
        seen[..., self.length :] = True
        seen = seen[..., :-1].repeat_interleave(scores.shape[1] // held.shape[1], 1)
        return scores.masked_fill(~seen.unsqueeze(2), float("-inf"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [0, 5])
def test_it_is_the_whole_cache_with_the_other_keys_hidden(family, padded):
    model, inputs = make(family), prompt(length=20, padded=padded)
    reading = Reading()
    with steer(model, SnapKV(budget=8, window=3, kernel=3), reading):
        ours = generate(model, inputs)
    assert reading.held
    with steer(model, Hide(reading.held, 20)):
        wanted = generate(model, inputs)
    assert torch.equal(ours.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(wanted.logits), rtol=1e-5, atol=1e-5)
    plain = generate(model, inputs)
    assert (torch.stack(plain.logits) - torch.stack(ours.logits)).abs().max() > 1e-3


def test_a_budget_beyond_the_prompt_changes_no_bit():
    model, inputs = make("llama"), prompt(length=20, padded=3)
    plain = generate(model, inputs)
    with steer(model, SnapKV(budget=20, window=3)):
        ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


def test_votes_equal_a_loop():
    q, k = normal((2, 4, 3, 8), (2, 2, 10, 8))
    for pool, kernel in (("max", 3), ("avg", 5), ("max", 1)):
        found = snap_votes(q, k, kernel=kernel, pool=pool)
        for b in range(2):
            for g in range(2):
                votes = torch.zeros(10, dtype=torch.float64)
                for h in (2 * g, 2 * g + 1):
                    for row in range(3):
                        scores = torch.stack([q[b, h, row] @ k[b, g, j] / 8**0.5 for j in range(10 - 2 + row)])
                        votes[: len(scores)] += scores.softmax(0) / 2
                prefix = votes[:7]
                wanted = torch.stack(
                    [
                        (lambda w: w.max() if pool == "max" else w.sum() / kernel)(
                            prefix[max(j - kernel // 2, 0) : j + kernel // 2 + 1]
                        )
                        for j in range(7)
                    ]
                )
                torch.testing.assert_close(found[b, g].double(), wanted, rtol=1e-6, atol=1e-7)


def test_kept_positions_are_sorted_hold_the_window_and_the_largest_votes():
    model, inputs = make("llama"), prompt(length=20)
    reading, kept = Reading(), {}

    class Look(Reading):
        def on_read(self, call, seen):
            if call.step.phase == "prefill":
                q = call.q[:, :, -4:]
                kept[call.layer] = snap_votes(q, call.k, kernel=1)

    with steer(model, SnapKV(budget=9, window=4, kernel=1), reading, Look()):
        generate(model, inputs, 2)
    for layer, positions in reading.held.items():
        assert (positions.diff(dim=-1) > 0).all()
        assert (positions[..., -4:] == torch.arange(16, 20)).all()
        wanted = kept[layer].topk(5, -1).indices.sort(-1).values
        assert torch.equal(positions[..., :5], wanted)


def test_pads_never_stay_while_a_real_key_goes_and_rows_do_not_meet():
    model = make("llama")
    inputs = prompt(length=20, padded=6)
    reading, alone = Reading(), Reading()
    settings = SnapKV(budget=12, window=3, kernel=3)
    with steer(model, settings, reading):
        both = generate(model, inputs)
    single = {"input_ids": inputs["input_ids"][:1, 6:], "attention_mask": inputs["attention_mask"][:1, 6:]}
    with steer(model, settings, alone):
        one = generate(model, single)
    torch.testing.assert_close(torch.stack(both.logits)[:, :1], torch.stack(one.logits), rtol=1e-4, atol=1e-4)
    for layer, positions in reading.held.items():
        assert (positions[0] >= 6).all(), "a pad was kept"
        assert torch.equal(positions[0] - 6, alone.held[layer][0])


def test_rows_with_fewer_real_keys_than_the_budget_keep_them_all():
    model, inputs, reading = make("llama"), prompt(length=20, padded=14), Reading()
    with steer(model, SnapKV(budget=8, window=3), reading):
        generate(model, inputs)
    for positions in reading.held.values():
        assert ((positions[0] >= 0).sum(-1) == 6).all()
        assert ((positions[1] >= 0).sum(-1) == 8).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_memory_is_as_promised_and_sliding_layers_are_left_alone(family):
    model, inputs = make(family), prompt(length=30)
    with steer(model, SnapKV(budget=10, window=3)) as session:
        out = generate(model, inputs, 5)
        report = session.report()
        kinds = [type(layer).__name__ for layer in out.past_key_values.layers]
    full = kinds.count("KeptLayer")
    assert full == (3 if family == "llama" else 2) and len(report) == full
    for row in report:
        # the last token that is written is never read
        assert row["kept"] == [14.0, 14.0] and row["seen"] == 34
        assert row["bytes"] == 2 * 2 * 2 * 14 * 8 * 4
    if family == "gemma3":
        assert out.past_key_values.layers[0].keys.shape[2] <= 4


def test_neighbours_of_a_peak_stay_with_a_kernel():
    # one key that the window looks at, and the next one that it does not
    q = F.one_hot(torch.tensor([0]), 8).double().view(1, 1, 1, 8).expand(1, 1, 2, 8) * 20
    k = torch.zeros(1, 1, 12, 8, dtype=torch.float64)
    k[0, 0, 4, 0] = 1
    mask = torch.ones(1, 1, 2, 12, dtype=torch.bool)
    assert 5 not in snap_votes(q, k, mask, kernel=1)[0, 0].topk(1).indices
    assert set(snap_votes(q, k, mask, kernel=3)[0, 0].topk(3).indices.tolist()) == {3, 4, 5}


def test_beams_and_chunks_and_second_turns():
    model, inputs = make("llama"), prompt(length=18)
    with steer(model, SnapKV(budget=8, window=3)):
        generate(model, inputs, num_beams=3)
        chunked = generate(model, inputs, prefill_chunk_size=6)
        whole = generate(model, inputs)
        assert torch.equal(chunked.sequences, whole.sequences)
        cache = whole.past_key_values
        longer = {"input_ids": torch.cat((whole.sequences, inputs["input_ids"]), 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        again = generate(model, longer, 3, past_key_values=cache)
        assert again.past_key_values.layers[0].keys.shape[2] == 8 + 2


def test_a_hand_written_loop_counts_positions_on():
    model, inputs = make("llama"), prompt(length=20)
    with torch.no_grad(), steer(model, SnapKV(budget=8, window=3)):
        by_hand = model(inputs["input_ids"], use_cache=True)
        ids, tokens = by_hand.logits[:, -1:].argmax(-1), []
        for _ in range(4):
            tokens.append(ids)
            by_hand = model(ids, past_key_values=by_hand.past_key_values)
            ids = by_hand.logits[:, -1:].argmax(-1)
        generated = generate(model, inputs, 4).sequences[:, 20:]
    assert torch.equal(torch.cat(tokens, 1), generated)


def test_a_prompt_shorter_than_the_window_stays_whole():
    model, inputs = make("llama"), prompt(length=5)
    plain = generate(model, inputs)
    with steer(model, SnapKV(budget=40, window=32)):
        ours = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 32}, "must exceed the window"),
        ({"kernel": 4}, "kernel is odd"),
        ({"window": 0, "budget": 4}, "window votes"),
        ({"pool": "sum"}, 'pool is "max" or "avg"'),
        ({"ratio": 1.5, "budget": None}, "share of the prompt"),
        ({"ratio": 0.5}, "give budget=.*or ratio="),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        SnapKV(**options)


def test_caches_that_keep_their_keys_in_place_are_refused():
    model, inputs = make("llama"), prompt(length=12)
    with steer(model, SnapKV(budget=8, window=3)), pytest.raises(Unsupported, match="StaticCache"):
        generate(model, inputs, cache_implementation="static")


def test_two_that_own_the_cache_are_refused():
    with pytest.raises(Unsupported, match="both own the site 'kv'"):
        steer(make("llama"), SnapKV(budget=40), SnapKV(budget=50)).__enter__()


def test_a_class_that_is_not_frozen_is_no_intervention():
    with pytest.raises(TypeError, match="frozen dataclass"):
        intervention(Reading.card)(Reading)
