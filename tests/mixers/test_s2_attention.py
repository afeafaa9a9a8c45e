from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from regard import OptionError, ShardedAttention, Unsupported
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.patterns import Causal, StridedBlocks
from regard.primitives.positions import rope
from tests.oracles import normal


def layer(heads=4, kv_heads=2, seed=0, **options):
    torch.manual_seed(seed)
    options = {"block": 16, "local": 1, "vstride": 2, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ShardedAttention(4 * heads, heads, kv_heads=kv_heads, **options).double()


def seen(heads, kv_heads, n, *, block=16, local=1, vstride=2, step=1, offset=0, dense_heads=0, homo=False):
    """The definition of the paper, pair by pair: bool (H, n, n)."""
    out = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        m = 0 if homo else h // (heads // kv_heads)
        for i in range(n):
            for j in range(i + 1):
                near = i // block - j // block < local
                out[h, i, j] = near or (j // block + m * step + offset) % vstride == 0 or m >= kv_heads - dense_heads
    return out


SETTINGS = [
    {},
    {"vstride": 3},
    {"local": 2, "vstride": 4, "offset": 1},
    {"vstride": 4, "dense_heads": 1},
    {"vstride": 4, "step": 2},
    {"vstride": 4, "homo": True},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_it_is_attention_under_the_mask_of_the_definition_forward_and_backward(options):
    a, (x,) = layer(**options), normal((2, 70, 16))
    out = a(x, is_causal=True)
    q, k, v = (
        to(x).view(2, 70, -1, 4).transpose(1, 2) for to in (a.to_q, a.to_k, a.to_v)
    )  # fmt: skip
    q, k = rope(q, torch.arange(70)), rope(k, torch.arange(70))
    mask = seen(4, 2, 70, **options)
    want = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask[None]
    )  # fmt: skip
    want = a.to_out(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, want)
    (upstream,) = normal((2, 70, 16), seed=4)
    for got, wanted in zip(
        torch.autograd.grad((out * upstream).sum(), list(a.parameters())),
        torch.autograd.grad((want * upstream).sum(), list(a.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("options", [{"vstride": 1}, {"vstride": 1, "local": 0}, {"local": 5, "vstride": 4}])
def test_without_a_stride_or_with_a_long_band_it_is_dense_and_causal(options):
    a, (x,) = layer(**options), normal((2, 70, 16))
    q, k, v = (to(x).view(2, 70, -1, 4).transpose(1, 2) for to in (a.to_q, a.to_k, a.to_v))
    q, k = rope(q, torch.arange(70)), rope(k, torch.arange(70))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(a(x, is_causal=True), a.to_out(want.transpose(1, 2).flatten(2)))


def residues(kv_heads, vstride, step):
    return {m * step % vstride for m in range(kv_heads)}


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("vstride", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("step", ["cover", "official"])
def test_the_heads_see_the_whole_past_exactly_if_their_phases_hit_every_block(kv_heads, share, vstride, step):
    heads = kv_heads * share
    pattern = StridedBlocks(16, 1, vstride, step=step, heads=heads, kv_heads=kv_heads)
    n = 16 * (vstride + 2)
    union = pattern.dense(n, n).any(1)[0]
    whole = bool((union == Causal().dense(n, n)[0, 0]).all())
    assert whole is pattern.covers()
    # the released step divides by query heads, also where key heads share them
    size = 1 if step == "cover" else max(1, vstride // heads)
    assert whole is (len(residues(kv_heads, vstride, size)) == vstride)


@pytest.mark.parametrize("heads, kv_heads, step", [(8, 8, "official"), (32, 8, "official"), (8, 4, "cover")])
def test_a_layer_whose_heads_lose_blocks_says_so(heads, kv_heads, step):
    with pytest.warns(UserWarning, match="do not see every block"):
        ShardedAttention(64, heads, kv_heads=kv_heads, vstride=16, step=step)


def test_a_layer_that_covers_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShardedAttention(64, 16, vstride=16)
        ShardedAttention(64, 8, kv_heads=4, vstride=16, dense_heads=1)


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("pieces", [(1,) * 70, (33, 1, 20, 16), (64, 1, 1, 1, 1, 1, 1)])
def test_decoding_with_the_shards_is_the_whole(options, pieces):
    a, (x,) = layer(**options), normal((2, 70, 16))
    whole, outs, at = a(x, is_causal=True), [], 0
    with torch.no_grad():
        state = a.init_state(2)
        for n in pieces:
            out, state = a.prefill(x[:, at : at + n], state)
            outs.append(out)
            at += n
    torch.testing.assert_close(torch.cat(outs, 1), whole)


def test_decoding_in_float32_is_the_whole_to_1e_5():
    a, (x,) = layer(vstride=4).float(), normal((2, 70, 16), dtype=torch.float32)
    state, outs = a.init_state(2), []
    with torch.no_grad():
        for t in range(70):
            out, state = a.step(x[:, t : t + 1], state)
            outs.append(out)
        assert (torch.cat(outs, 1) - a(x, is_causal=True)).abs().max() < 1e-5


@pytest.mark.parametrize("options", SETTINGS)
def test_each_head_holds_exactly_the_keys_that_it_still_needs(options):
    a, (x,) = layer(**options), normal((1, 140, 16))
    keys = rope(a.to_k(x).view(1, 140, 2, 4).transpose(1, 2), torch.arange(140))
    later = seen(4, 2, 140 + 64, **options)
    with torch.no_grad():
        state = a.init_state(1)
        for n in range(1, 141):
            _, state = a.step(x[:, n - 1 : n], state)
            assert state.size_bytes == a.state_bytes(1, n)
            for m in range(2):
                # some query from position n on sees it
                needed = later[2 * m, n:, :n].any(0)
                torch.testing.assert_close(state.keys[m], keys[:, m, :n][:, needed])
                assert [j for j in range(n) if a.pattern.needed_after(2 * m, j) >= n] == needed.nonzero()[:, 0].tolist()


def test_the_cache_grows_by_one_block_in_vstride():
    a = layer(heads=8, kv_heads=8, vstride=8, local=2)
    for n in (1024, 8192):
        # at the start of a block a head holds the one before it, and an eighth of the others
        assert a.state_bytes(1, n) == 2 * 8 * (16 + (n - 16) / 8) * 4 * 8


@pytest.mark.parametrize("vstride, local", [(2, 1), (4, 2), (8, 1)])
def test_the_share_of_pairs_follows_the_formula(vstride, local):
    heads, blocks = vstride, 4 * vstride
    pattern = StridedBlocks(16, local, vstride, heads=heads)
    tiles = pattern.dense(16 * blocks, 16 * blocks)[0, :, 15::16, ::16].sum().item()
    # of the blocks up to its own, a query block sees `local`, and each of the others in one head of vstride
    near = sum(min(p + 1, local) for p in range(blocks))
    far = sum(max(p + 1 - local, 0) for p in range(blocks))
    assert tiles == heads * near + heads * far / vstride


@pytest.mark.parametrize(
    "options, text",
    [
        ({"local": 0}, "local"),
        ({"block": 24}, "power of two"),
        ({"block": 8}, "power of two from 16 on"),
        ({"dense_heads": 3}, "dense"),
        ({"homo": True, "dense_heads": 1}, "homo"),
        ({"step": "rotate"}, "cover"),
    ],
)
def test_bad_settings_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        layer(**options)


def test_what_would_move_the_blocks_is_refused():
    a, (x,) = layer(), normal((2, 7, 16))
    mask = torch.ones(2, 7, dtype=torch.bool)
    for options, text in (
        ({}, "pass is_causal=True"),
        ({"is_causal": True, "padding": mask}, "takes no padding"),
        ({"is_causal": True, "reset": mask}, "takes no reset"),
    ):
        with pytest.raises(Unsupported, match=text):
            a(x, **options)
    with pytest.raises(Unsupported, match="takes no padding"):
        a.prefill(x, a.init_state(2), padding=mask)
    with pytest.raises(Unsupported, match="reads no context"):
        a(x, x)


# a needle in block 1 of 6, asked for in the last; near is a block of 16, the distance at least 64
BLOCK, BLOCKS, VALUES, ASK = 16, 6, 16, 16
LENGTH = BLOCK * BLOCKS


def needles(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ASK + 1, 48, (rows, LENGTH), generator=generator)
    value = torch.randint(0, VALUES, (rows,), generator=generator)
    place = torch.randint(BLOCK, 2 * BLOCK, (rows,), generator=generator)
    ids[torch.arange(rows), place] = value
    ids[:, -1] = ASK
    return ids, value


def model(mixers, **options):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = {"block": BLOCK, "local": 1, "vstride": 4, **options}
        return SequenceModel(
            SequenceSettings(
                vocab=48, dim=64, depth=2, heads=4, mixer=mixers, options={"s2_attention": sharded}, hidden=0
            )
        )


def reaches(made):
    """Does the answer depend on the needle? The largest gradient of the last logits by the embeddings of block 1."""
    ids, _ = needles(4, 1)
    table = made.embed(ids).detach().requires_grad_()
    x = table
    for block in made.blocks:
        x = block(x, padding=None, reset=None, is_causal=True)
    made.head(made.norm(x))[:, -1].square().sum().backward()
    return float(table.grad[:, BLOCK : 2 * BLOCK].abs().max())


def test_a_block_outside_of_one_shard_cannot_be_reached_and_shards_of_many_heads_reach_it():
    assert reaches(model("s2_attention", homo=True)) == 0
    assert reaches(model("s2_attention")) > 0
    assert reaches(model(("softmax", "s2_attention"), homo=True)) > 0


def accuracy_after(made, steps):
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        ids, value = needles(64, 1000 + step)
        loss = F.cross_entropy(made(ids)[:, -1, :VALUES], value)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ids, value = needles(2000, 7)
        return float((made(ids)[:, -1, :VALUES].argmax(-1) == value).float().mean())


@pytest.mark.slow
def test_s2_attention_copies_a_needle_beyond_its_band(record):
    steps = 400
    figures = {
        "task": f"one of {VALUES} values in block 1 of {BLOCKS} blocks of {BLOCK}, asked at the end; local 1 block, "
        f"vstride 4; 64 rows a step, {steps} steps",
        "softmax + s2_attention": accuracy_after(model(("softmax", "s2_attention")), steps),
        "s2_attention twice": accuracy_after(model("s2_attention"), steps),
        "s2_attention twice, homo": accuracy_after(model("s2_attention", homo=True), steps),
        "chance": 1 / VALUES,
    }
    record(figures)
    assert figures["softmax + s2_attention"] >= 0.95
    assert abs(figures["s2_attention twice, homo"] - figures["chance"]) <= 0.03
