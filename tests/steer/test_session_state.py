"""What interventions keep of a sequence goes where the sequence goes: beams, turns, pieces, other batches, after errors."""

import copy

import pytest
import torch

from regard import (
    AblateHeads,
    AttentionCalibration,
    AttentionSinks,
    CoreContextCache,
    HeavyHitters,
    HiP,
    KeyNorm,
    LargePiG,
    MoA,
    Recency,
    RetrievalAttention,
    Seer,
    SetAttention,
    ShareAttention,
    SnapKV,
    TunableExperts,
    Unsupported,
    steer,
)
from regard.contract.card import InterventionCard
from regard.hosts.transformers.specimens import make, prompt
from tests.steer.test_snapkv import Reading, generate

HEADS = {0: [0, 1], 1: [2, 3], 2: [0]}
PLAN = {
    "alphas": ((4, 4, 8, 8), (4, 8, 4, 8), (8, 8, 8, 4)),
    "betas": ((0, 0, 0.25, 0.25), (0, 0, 0, 0), (0, 0, 0, 0)),
    "block": 4,
}
WAYS = {
    "snapkv": SnapKV(budget=8, window=3, kernel=3),
    "heavy_hitters": HeavyHitters(budget=8, window=3),
    "attention_sinks": AttentionSinks(budget=8, sinks=2),
    "recency": Recency(budget=8),
    "key_norm": KeyNorm(budget=8, window=3),
    "core_context": CoreContextCache(group=2, window=4),
    "moa": MoA(PLAN),
    "retrieval_attention": RetrievalAttention(top_k=2, sinks=2, window=4, bound=2, index="flat"),
    "hip": HiP(budget=4, block_q=1, recent=2, sinks=1, dense_layers=0, refresh=3),
    "act": AttentionCalibration(heads=HEADS, alpha=1.2, decode="reuse"),
    "act of prompts": AttentionCalibration(heads=HEADS, alpha=1.2),
    "echoatt": ShareAttention(((0, 1), (2,))),
    "echoatt again": ShareAttention(((0, 1), (2,)), recompute=True),
    "largepig": LargePiG(candidate_layers=(1, 2), scale=20.0),
    "circuit_reuse": SetAttention(heads=HEADS, target=(2, 4), queries="all"),
    "scale": AblateHeads(heads=((0, 1), (1, 3))),
    "tunable_experts": TunableExperts(off=((0, 1), (1, 2))),
    "seerattention": Seer(block=4, ratio=0.4, dense_last=1),
}
# how far two sums of the same numbers may lie apart
NEAR = {"rtol": 1e-4, "atol": 1e-4}
WHOLE_PROMPTS = ("core_context", "seerattention")
ALL = pytest.mark.parametrize("way", WAYS)
IN_PIECES = pytest.mark.parametrize("way", [way for way in WAYS if way not in WHOLE_PROMPTS])


def model_of(way):
    return make("qwen3_moe" if way == "tunable_experts" else "llama")


def forced(model, ids, length):
    """The logits after each token that follows the prompt, a token a pass."""
    with torch.no_grad():
        out = model(ids[:, :length], use_cache=True)
        found = [out.logits[:, -1]]
        for place in range(length, ids.shape[1]):
            out = model(ids[:, place : place + 1], past_key_values=out.past_key_values)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1)


@ALL
def test_rows_that_change_places_write_as_each_would_alone(way):
    model, ids = model_of(way), prompt(batch=1, length=17)["input_ids"].repeat(3, 1)
    generator = torch.Generator().manual_seed(0)
    parents = torch.tensor(([0, 1, 2], [1, 1, 0], [2, 0, 0], [2, 1, 1], [0, 2, 0], [1, 0, 2], [2, 2, 1]))
    with torch.no_grad(), steer(model, WAYS[way]):
        out = model(ids, use_cache=True)
        for order in parents:
            out.past_key_values.reorder_cache(order)
            new = torch.randint(2, 50, (3, 1), generator=generator)
            ids = torch.cat((ids[order], new), 1)
            out = model(new, past_key_values=out.past_key_values)
        alone = torch.cat([forced(model, row[None], 17)[:, -1] for row in ids])
    torch.testing.assert_close(out.logits[:, -1], alone, **NEAR)
    plain = torch.cat([forced(model, row[None], 17)[:, -1] for row in ids])
    # what acts on prompts alone is in the cache
    assert (plain - alone).abs().max() > 1e-3


@ALL
def test_beams_have_the_scores_of_their_texts(way):
    model, inputs = model_of(way), prompt(length=17)
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "output_scores": True}
    with steer(model, WAYS[way]):
        out = generate(model, inputs, 7, **options)
        for text, score in zip(out.sequences, out.sequences_scores, strict=True):
            log_p = forced(model, text[None, :-1], 17)[0].log_softmax(-1)
            alone = log_p.gather(1, text[17:, None]).sum()
            torch.testing.assert_close(score, alone, rtol=1e-4, atol=1e-3)
    assert len({tuple(text) for text in out.sequences.tolist()}) == 6


@ALL
def test_a_second_text_in_the_block_is_the_first_of_another(way):
    model = model_of(way)
    texts = [prompt(batch=2, length=18), prompt(batch=3, length=19, seed=5), prompt(batch=1, length=9, seed=6)]
    with steer(model, WAYS[way]):
        together = [generate(model, text) for text in (*texts, texts[0])]
    for text, found in zip((*texts, texts[0]), together, strict=True):
        with steer(model, WAYS[way]):
            alone = generate(model, text)
        assert all(torch.equal(a, b) for a, b in zip(alone.logits, found.logits, strict=True))


class Fails:
    """Breaks a pass off in layer 1."""

    card = InterventionCard(slug="fails", title="fails", exports=("x",), baseline=True, sites=("kv",))

    def __init__(self, passes):
        self.left = passes

    def on_read(self, call, seen):
        if call.layer == 1:
            self.left -= 1
            if self.left == 0:
                raise ValueError("broken off")


@ALL
@pytest.mark.parametrize("passes", [1, 4])
def test_a_text_after_one_that_broke_off_is_as_ever(way, passes):
    model, inputs, other = model_of(way), prompt(length=18), prompt(batch=3, length=20, seed=5)
    with steer(model, WAYS[way]):
        wanted = generate(model, inputs)
    with steer(model, WAYS[way], Fails(passes)):
        with pytest.raises(ValueError, match="broken off"):
            generate(model, other)
        found = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(wanted.logits, found.logits, strict=True))


def talk(model, lengths, seed):
    """A conversation of two turns, a pass at a time: gives the logits of each pass."""
    generator = torch.Generator().manual_seed(seed)
    cache = None
    for length in lengths:
        for tokens in (length, 1, 1, 1):
            ids = torch.randint(2, 50, (2, tokens), generator=generator)
            # around each pass: generators that take turns would leave gradients off
            with torch.no_grad():
                out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            yield out.logits[:, -1]


@ALL
def test_texts_that_take_turns_are_as_each_alone(way):
    model = model_of(way)
    lengths = (16,) if way in WHOLE_PROMPTS else (16, 7)
    alone = []
    for seed in (1, 2):
        with steer(model, WAYS[way]):
            alone.append(list(talk(model, lengths, seed)))
    with steer(model, WAYS[way]):
        together = list(zip(talk(model, lengths, 1), talk(model, lengths, 2), strict=True))
    for wanted, found in zip(alone, zip(*together, strict=True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@ALL
def test_a_copy_of_the_cache_goes_on_as_the_cache(way):
    if way == "retrieval_attention":
        pytest.skip("an index of a copy is made anew, from keys in other order")
    if way == "largepig":
        pytest.skip("whose ids are those of the last pass of all")
    model, ids = model_of(way), prompt(length=18)["input_ids"]
    new = torch.tensor([[7], [9]])
    with torch.no_grad(), steer(model, WAYS[way]):
        cache = model(ids, use_cache=True).past_key_values
        model(new, past_key_values=cache)
        found = [model(new, past_key_values=copy.deepcopy(cache)).logits for _ in range(2)]
        found.append(model(new, past_key_values=cache).logits)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def held_of(model, settings, inputs, **options):
    reading = Reading()
    with steer(model, settings, reading):
        out = generate(model, inputs, **options)
    return reading.held, out


EVICT = ("snapkv", "heavy_hitters", "attention_sinks", "recency", "key_norm")


@pytest.mark.parametrize("way", EVICT)
@pytest.mark.parametrize("padded, beams", [(0, 1), (6, 1), (3, 3)])
@pytest.mark.parametrize("piece", [1, 2, 5, 6, 16, 17])
def test_keys_stay_whatever_the_pieces_of_a_prompt(way, padded, beams, piece):
    # the last pieces are 1, 2, 3, 6, 2 and 1 tokens long
    model, inputs = make("llama"), prompt(length=18, padded=padded)
    wanted, whole = held_of(model, WAYS[way], inputs, num_beams=beams)
    held, found = held_of(model, WAYS[way], inputs, num_beams=beams, prefill_chunk_size=piece)
    assert held and all(torch.equal(positions, wanted[layer]) for layer, positions in held.items())
    assert torch.equal(found.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(whole.logits), **NEAR)


@pytest.mark.parametrize("settings", [{}, {"group": "max"}, {"pool": "avg", "kernel": 1, "window": 6}], ids=str)
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "deepseek", "mixtral"])
@pytest.mark.parametrize("padded", [0, 6])
def test_the_window_votes_over_pieces_in_every_family(family, padded, settings):
    model, inputs = make(family), prompt(length=18, padded=padded)
    ours = SnapKV(**{"budget": 9, "window": 5, "kernel": 3, **settings})
    wanted, _ = held_of(model, ours, inputs)
    for piece in (2, 8):
        held, _ = held_of(model, ours, inputs, prefill_chunk_size=piece)
        assert held and all(torch.equal(positions, wanted[layer]) for layer, positions in held.items())


@pytest.mark.parametrize("way", EVICT)
@pytest.mark.parametrize("padded", [0, 4])
def test_a_second_turn_may_come_in_pieces(way, padded):
    model, first = make("llama"), prompt(length=18, padded=padded)
    with steer(model, WAYS[way]):
        out = generate(model, first)
    more = prompt(length=7, seed=3)["input_ids"]
    inputs = {"input_ids": torch.cat((out.sequences, more), 1)}
    inputs["attention_mask"] = torch.cat((first["attention_mask"], torch.ones(2, 13, dtype=torch.int64)), 1)

    cache = generate(model, first).past_key_values
    at_once, in_pieces = (
        generate(model, inputs, past_key_values=copy.deepcopy(cache), prefill_chunk_size=piece).logits[0]
        for piece in (None, 3)
    )
    if (at_once - in_pieces).abs().max() > 1e-3:
        pytest.skip("this version of transformers reads the first turn again, whoever steers")

    def second(**options):
        return held_of(model, WAYS[way], inputs, past_key_values=copy.deepcopy(out.past_key_values), **options)

    wanted, whole = second()
    # the last token that was written is read first: 8 tokens
    for piece in (3, 5, 7):
        held, found = second(prefill_chunk_size=piece)
        assert held and all(torch.equal(positions, wanted[layer]) for layer, positions in held.items())
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(whole.logits), **NEAR)


def test_a_loop_of_ones_own_may_read_in_pieces_and_little_is_kept_of_them():
    model, ids, reading = make("llama"), prompt(length=40)["input_ids"], Reading()
    wanted, _ = held_of(model, SnapKV(budget=12, window=6), {"input_ids": ids})
    with torch.no_grad(), steer(model, SnapKV(budget=12, window=6), reading):
        cache = None
        for start, end in ((0, 20), (20, 30), (30, 36), (36, 38), (38, 40)):
            cache = model(ids[:, start:end], past_key_values=cache, use_cache=True).past_key_values
            kept = cache.layers[0]
            # queries of the window, and who saw what
            assert sum(note.numel() for note in kept.notes.values()) == 2 * 6 * (4 * 8 + end)
            assert all(note.untyped_storage().nbytes() == note.nbytes for note in kept.notes.values())
        model(ids[:, :1], past_key_values=cache)
        assert not kept.notes and kept.keys.shape[2] == 13
    assert all(torch.equal(positions, wanted[layer]) for layer, positions in reading.held.items())


def test_a_prefix_may_be_read_once_for_several_prompts():
    model, prefix = make("llama"), prompt(length=20)["input_ids"]
    endings = [prompt(length=2, seed=seed)["input_ids"] for seed in (4, 5)]
    settings = SnapKV(budget=9, window=5, kernel=3)
    with torch.no_grad(), steer(model, settings):
        cache = model(prefix, use_cache=True).past_key_values
    for ending in endings:
        inputs = {"input_ids": torch.cat((prefix, ending), 1)}
        wanted, _ = held_of(model, settings, inputs)
        held, _ = held_of(model, settings, inputs, past_key_values=copy.deepcopy(cache))
        assert all(torch.equal(positions, wanted[layer]) for layer, positions in held.items())


def test_what_a_copy_of_a_prefix_goes_on_with_may_be_pointed_at():
    model, prefix, ending = make("llama"), prompt(length=14)["input_ids"], prompt(length=4, seed=4)["input_ids"]
    settings = LargePiG(candidate_layers=(1, 2), scale=20.0)
    with torch.no_grad(), steer(model, settings):
        wanted = model(torch.cat((prefix, ending), 1)).logits[:, -1]
        cache = model(prefix, use_cache=True).past_key_values
        found = model(ending, past_key_values=copy.deepcopy(cache)).logits[:, -1]
        torch.testing.assert_close(found, wanted, **NEAR)
        with pytest.raises(Unsupported, match="before the block"):
            model(ending, past_key_values=copy.deepcopy(cache))


@IN_PIECES
@pytest.mark.parametrize("padded", [0, 3])
def test_a_prompt_in_pieces_is_the_prompt(way, padded):
    if way in ("moa", "hip") and padded:
        pytest.skip("blocks are counted from the first token, which pads would move")
    if way in ("act", "act of prompts"):
        pytest.skip("earlier rows cannot know what later rows make a sink")
    model, inputs = model_of(way), prompt(length=18, padded=padded)
    settings = MoA(PLAN, length=18) if way == "moa" else WAYS[way]
    with steer(model, settings):
        whole, found = generate(model, inputs), generate(model, inputs, prefill_chunk_size=8)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(whole.logits), **NEAR)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("decode", ["off", "reuse"])
@pytest.mark.parametrize("padded", [0, 5])
def test_the_last_piece_is_calibrated_by_the_sums_of_the_whole_prompt(family, decode, padded):
    model, inputs = make(family), prompt(length=18, padded=padded)
    layer = 0 if family == "llama" else 1
    settings = AttentionCalibration(heads={layer: [0, 1, 2, 3]}, alpha=1.2, beta=0.2, decode=decode)
    found = []

    class Look(Reading):
        def on_read(self, call, seen):
            if call.layer == layer and call.step.phase == "prefill":
                rows = (call.weights() if seen.weights is None else seen.weights)[:, :, -2:]
                # the sinks that what is written takes over
                self.found = rows, [] if call.kept is None else list(call.kept.marks.values())

    for piece in (None, 16, 7):
        look = Look()
        with steer(model, settings, look):
            generate(model, inputs, 3, prefill_chunk_size=piece)
        found.append(look.found)
    assert bool(found[0][1]) == (decode == "reuse")
    for rows, sinks in found[1:]:
        torch.testing.assert_close(rows, found[0][0], **NEAR)
        assert all(torch.equal(a, b) for a, b in zip(sinks, found[0][1], strict=True))
