from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import regard.ops.hip as hip
from regard import Causal, Documents, OptionError, Unsupported, hip_attention, hip_select, softmax_attention
from regard.checks.battery import checks, run, subjects
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from tests.notes import VOCAB, answered, note_rows, train_on
from tests.oracles import attention, coin, normal

SMALL = {"recent": 3, "sinks": 1}


def qkv(n=40, m=None, heads=4, groups=2, d=8, batch=2, seed=0):
    m = n if m is None else m
    return normal((batch, heads, n, d), (batch, groups, m, d), (batch, groups, m, 6), seed=seed)


def block_scores(q, k, rows, block_k, end):
    """For one head: the largest q . k of the given rows with each key block, keys from `end` on left out."""
    scores = (q[rows] @ k[:end].T).amax(0)
    return [float(piece.max()) for piece in scores.split(block_k)]


def search(values, count, kept, representative):
    """The tree over ranges, one node after the other."""
    if count <= kept:
        return list(range(count))
    nodes = [(t * count // kept, (t + 1) * count // kept) for t in range(kept)]
    while max(stop - start for start, stop in nodes) > 1:
        halves = []
        for start, stop in nodes:
            middle = start + (stop - start) // 2
            halves += [(a, b) for a, b in ((start, middle), (middle, stop)) if b > a]
        at = {"first": lambda a, b: a, "center": lambda a, b: a + (b - a) // 2}
        if representative == "oracle":
            worth = [max(values[a:b]) for a, b in halves]
        else:
            worth = [values[at[representative](a, b)] for a, b in halves]
        order = sorted(range(len(halves)), key=lambda i: -worth[i])[:kept]
        nodes = [halves[i] for i in order]
    return sorted(start for start, _ in nodes)


def each_row(q, k, block_q, block_k, recent, q_offset=0):
    """(batch row, head, query block, rows, key blocks in reach, end) of every list that a selection holds."""
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t, first in enumerate(range(0, q.shape[2], block_q)):
                rows = list(range(first, min(first + block_q, q.shape[2])))
                end = q_offset + rows[-1] + 1
                yield b, h, t, rows, -(-max(end - recent, 0) // block_k), end


def chosen(selection, b, h, t):
    return [int(i) for i in selection.indices[b, h, t] if i >= 0]


@pytest.mark.parametrize("representative", ["first", "center", "oracle"])
@pytest.mark.parametrize(
    "n, budget, block_q, block_k, recent", [(40, 8, 4, 2, 3), (37, 5, 8, 1, 2), (50, 9, 1, 3, 1), (33, 30, 4, 2, 8)]
)
def test_the_search_is_the_search_in_a_tree(n, budget, block_q, block_k, recent, representative):
    q, k, _ = qkv(n)
    options = {"oracle": True} if representative == "oracle" else {"representative": representative}
    found = hip_select(q, k, budget=budget, block_q=block_q, block_k=block_k, recent=recent, **options)
    kept = -(-budget // block_k)
    for b, h, t, rows, count, end in each_row(q, k, block_q, block_k, recent):
        values = block_scores(q[b, h], k[b, h // 2], rows, block_k, end)
        assert chosen(found, b, h, t) == search(values, count, kept, representative)


@pytest.mark.parametrize(
    "n, budget, block_q, block_k", [(64, 8, 4, 2), (61, 11, 8, 1), (90, 12, 1, 3), (200, 7, 16, 1)]
)
def test_the_oracle_finds_exactly_the_best_blocks(n, budget, block_q, block_k):
    q, k, _ = qkv(n)
    found = hip_select(q, k, budget=budget, block_q=block_q, block_k=block_k, oracle=True, **SMALL)
    kept = -(-budget // block_k)
    for b, h, t, rows, count, end in each_row(q, k, block_q, block_k, SMALL["recent"]):
        values = torch.tensor(block_scores(q[b, h], k[b, h // 2], rows, block_k, end)[:count])
        assert chosen(found, b, h, t) == sorted(values.topk(min(kept, count)).indices.tolist())


def test_the_oracle_finds_them_where_every_score_is_negative():
    q, k, _ = qkv(64)
    found = hip_select(q.abs(), -k.abs(), budget=6, block_q=1, block_k=1, oracle=True, **SMALL)
    for b, h, t, rows, count, end in each_row(q, k, 1, 1, SMALL["recent"]):
        values = torch.tensor(block_scores(q[b, h].abs(), -k[b, h // 2].abs(), rows, 1, end)[:count])
        assert chosen(found, b, h, t) == sorted(values.topk(min(6, count)).indices.tolist())


def test_any_number_of_blocks_gives_as_many_distinct_ones_and_can_reach_the_last():
    # the best block is the last one: the released bounds, int(B / n * i) in floats, lose it for 15 blocks and 11 ranges
    for kept in range(1, 14):
        n = 60
        q, k = torch.ones(1, 1, n, 1), torch.arange(n, dtype=torch.float32).view(1, 1, n, 1)
        found = hip_select(q, k, budget=kept, block_q=1, block_k=1, recent=1).indices[0, 0]
        for t in range(n):
            blocks = [int(i) for i in found[t] if i >= 0]
            assert len(set(blocks)) == len(blocks) == min(kept, t)
            assert blocks == list(range(t - min(kept, t), t))
    assert int(15 / 11 * 11) == 14


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n, budget, block_q, block_k", [(77, 6, 4, 2), (64, 11, 1, 1), (130, 8, 16, 4)])
def test_scores_that_grow_or_fall_with_position_are_found_exactly(sign, n, budget, block_q, block_k):
    q = torch.rand(1, 2, n, 1).double() + 0.5
    k = sign * torch.rand(1, 1, n, 1).double().cumsum(2)
    best = hip_select(q, k, budget=budget, block_q=block_q, block_k=block_k, oracle=True, **SMALL)
    found = hip_select(q, k, budget=budget, block_q=block_q, block_k=block_k, **SMALL)
    assert torch.equal(found.indices, best.indices)


@pytest.mark.parametrize("block_q, block_k", [(1, 1), (4, 2), (32, 2), (7, 3)])
def test_a_budget_for_all_keys_is_dense_causal_attention(block_q, block_k):
    q, k, v = qkv(50)
    out = hip_attention(q, k, v, budget=50, block_q=block_q, block_k=block_k, is_causal=True, **SMALL)
    torch.testing.assert_close(out, softmax_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("engine", [None, "reference", "block_sparse:torch"])
@pytest.mark.parametrize("block_q, block_k, recent, sinks", [(1, 1, 1, 0), (4, 2, 3, 1), (8, 3, 5, 4), (16, 4, 2, 0)])
def test_it_attends_to_the_found_blocks_the_recent_keys_and_the_sinks(block_q, block_k, recent, sinks, engine):
    q, k, v = qkv(45)
    options = {"budget": 8, "block_q": block_q, "block_k": block_k, "recent": recent, "sinks": sinks}
    found = hip_select(q, k, **options)
    allowed = torch.zeros(2, 4, 45, 45, dtype=torch.bool)
    for b, h, t, rows, *_ in each_row(q, k, block_q, block_k, recent):
        for i in rows:
            for block in chosen(found, b, h, t):
                allowed[b, h, i, block * block_k : (block + 1) * block_k] = True
            allowed[b, h, i, max(0, i - recent + 1) : i + 1] = True
            allowed[b, h, i, :sinks] = True
            allowed[b, h, i, i + 1 :] = False
    out = hip_attention(q, k, v, is_causal=True, engine=engine, **options)
    torch.testing.assert_close(out, attention(q, k, v, allowed=allowed)[0])


@pytest.mark.parametrize("options", [{"block_q": 4}, {"block_q": 16, "recent": 1}, {"block_q": 8, "oracle": True}])
def test_no_row_sees_a_later_key_and_no_block_hears_of_a_later_block(options):
    q, k, v = (t.requires_grad_() for t in qkv(48))
    options = {"budget": 6, "block_k": 2, **SMALL, **options}
    out = hip_attention(q, k, v, is_causal=True, **options)
    for i in (0, 5, 20, 46):
        dk, dv = torch.autograd.grad(out[:, :, i].square().sum(), (k, v), retain_graph=True)
        assert not dk[:, :, i + 1 :].any() and not dv[:, :, i + 1 :].any()
    block = options["block_q"]
    cut = 2 * block
    later = [torch.cat((t[:, :, :cut], 9 * torch.randn_like(t[:, :, cut:])), 2) for t in (q, k, v)]
    again = hip_attention(*later, is_causal=True, **options)
    torch.testing.assert_close(again[:, :, :cut], out[:, :, :cut])


def test_a_row_of_a_block_hears_of_the_later_rows_of_its_block_only_through_the_choice():
    # what the docstring warns of: with block_q > 1 a cached step and the whole differ
    q, k, v = qkv(64)
    options = {"budget": 4, "block_k": 2, **SMALL}
    whole = hip_attention(q, k, v, block_q=8, is_causal=True, **options)
    other = torch.cat((q[:, :, :60], -q[:, :, 60:]), 2)
    again = hip_attention(other, k, v, block_q=8, is_causal=True, **options)
    torch.testing.assert_close(again[:, :, :56], whole[:, :, :56])
    assert not torch.allclose(again[:, :, 56:60], whole[:, :, 56:60])


@pytest.mark.parametrize("t", [0, 1, 7, 30, 47])
def test_a_step_with_blocks_of_one_query_is_the_row_of_the_whole(t):
    q, k, v = qkv(48)
    options = {"budget": 6, "block_q": 1, "block_k": 2, **SMALL}
    whole = hip_attention(q, k, v, is_causal=True, **options)
    step = hip_attention(
        q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], pattern=Causal(), q_offset=t, **options
    )
    torch.testing.assert_close(step, whole[:, :, t : t + 1])
    blocks = hip_select(q, k, **options).indices[:, :, t : t + 1]
    alone = hip_select(q[:, :, t : t + 1], k[:, :, : t + 1], q_offset=t, **options).indices
    assert torch.equal(blocks[..., : alone.shape[3]], alone) and not (blocks[..., alone.shape[3] :] >= 0).any()


def test_blocks_of_a_prefill_in_pieces_are_those_of_the_whole():
    q, k, v = qkv(64)
    options = {"budget": 6, "block_q": 8, "block_k": 2, **SMALL}
    whole = hip_attention(q, k, v, is_causal=True, **options)
    piece = hip_attention(q[:, :, 32:48], k[:, :, :48], v[:, :, :48], pattern=Causal(), q_offset=32, **options)
    torch.testing.assert_close(piece, whole[:, :, 32:48])


@pytest.mark.parametrize("n, budget, block_q, block_k", [(256, 16, 16, 2), (300, 10, 8, 1), (128, 6, 1, 2)])
def test_the_number_of_scores_grows_with_the_logarithm(monkeypatch, n, budget, block_q, block_k):
    q, k, _ = qkv(n, heads=1, groups=1, batch=1)
    made = [0] * -(-n // block_q)
    value = hip._Search.value

    def counted(self, block, begin):
        for c in range(block.shape[2]):
            made[begin + c] += block.shape[3]
        return value(self, block, begin)

    monkeypatch.setattr(hip._Search, "value", counted)
    hip_select(q, k, budget=budget, block_q=block_q, block_k=block_k, **SMALL)
    kept = -(-budget // block_k)
    for _, _, t, _, count, _ in each_row(q, k, block_q, block_k, SMALL["recent"]):
        bound = 2 * kept * (math.ceil(math.log2(count / kept)) + 1) if count > kept else 0
        assert made[t] <= bound
    assert max(made) > 0


def test_little_memory_at_a_time_changes_nothing(monkeypatch):
    q, k, _ = qkv(90)
    options = {"budget": 6, "block_q": 4, "block_k": 2, **SMALL}
    whole = hip_select(q, k, **options).indices
    monkeypatch.setattr(hip, "GATHERED", 1)
    assert torch.equal(hip_select(q, k, **options).indices, whole)


def correlated(n, d, length, generator):
    """Unit vectors that forget themselves over about `length` steps."""
    keep = math.exp(-1 / length)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows = [noise[0]]
    for t in range(1, n):
        rows.append(keep * rows[-1] + math.sqrt(1 - keep**2) * noise[t])
    return torch.stack(rows)


def recall_of(n=512, kept=16, length=16, draws=40):
    """Softmax mass of the best blocks that HiP finds, and that the best of as many scored blocks drawn at random hold."""
    generator = torch.Generator().manual_seed(0)
    found = {"hip": 0.0, "random": 0.0}
    for _ in range(draws):
        k, q = correlated(n, 16, length, generator), 2 * torch.randn(1, 16, generator=generator, dtype=torch.float64)
        weights = torch.softmax(q[0] @ k.T / 4, 0)
        count = (n - 1) // 2 + (n - 1) % 2
        mass = torch.stack([piece.sum() for piece in weights[: 2 * count].split(2)])
        values = torch.stack([piece.max() for piece in (q[0] @ k.T)[: 2 * count].split(2)])
        true = mass.topk(kept).indices
        index = hip_select(
            q[None, None], k[None, None], budget=2 * kept, block_q=1, block_k=2, recent=1, q_offset=n - 1
        ).indices[0, 0, 0]
        scored = 2 * kept * math.ceil(math.log2(count / kept))
        some = torch.randperm(count, generator=generator)[:scored]
        drawn = some[values[some].topk(kept).indices]
        for name, blocks in (("hip", index), ("random", drawn)):
            both = [int(b) for b in blocks if b in true]
            found[name] += float(mass[both].sum() / mass[true].sum()) / draws
    return found


def test_it_recalls_more_than_as_many_scores_at_random_where_near_keys_are_alike():
    found = recall_of(draws=12)
    assert found["hip"] > found["random"] + 0.05


def test_hidden_keys_are_neither_scored_nor_read():
    q, k, _ = qkv(48)
    valid = coin(2, 48, p=0.7)
    options = {"budget": 6, "block_q": 4, "block_k": 2, **SMALL}
    found = hip_select(q, k, key_valid=valid, **options)
    noise = torch.where(valid[:, None, :, None], k, 50 * torch.randn_like(k))
    assert torch.equal(hip_select(q, noise, key_valid=valid, **options).indices, found.indices)
    assert not torch.equal(hip_select(q, noise, **options).indices, found.indices)
    assert not found.dense(48, 48)[~valid[:, None, None].expand(2, 4, 48, 48)].any()
    # a block without a visible key is behind all others
    far = torch.ones(2, 48, dtype=torch.bool)
    far[:, 2:20] = False
    oracle = hip_select(q, k, key_valid=far, oracle=True, **{**options, "budget": 10}).indices[:, :, -1]
    assert not ((oracle >= 1) & (oracle < 10)).any()


def test_a_negative_scale_turns_the_order_round():
    q, k, v = qkv(40)
    options = {"budget": 4, "block_q": 4, "block_k": 2, "is_causal": True, **SMALL}
    torch.testing.assert_close(
        hip_attention(q, k, v, scale=-0.3, **options), hip_attention(-q, k, v, scale=0.3, **options)
    )


def test_the_claims_hold_with_blocks_of_queries():
    """The battery again, but for what only blocks of one query can do."""
    (subject,) = [s for s in subjects("hip") if s.name == "ops/hip"]
    card = dataclasses.replace(subject.card, options={"budget": 4, "block_q": 4, "block_k": 1, "recent": 2, "sinks": 0})
    subject = dataclasses.replace(subject, card=card)
    without = {"card_is_attached", "decodes_from_a_cache", "attends_causal_self"}
    for check in checks():
        if check.kind == "op" and check.name not in without:
            row = run(check, subject)
            assert row.status != "failed", f"{check.name}: {row.message}"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"budget": 1, "block_k": 2}, "at least one block of 2 keys, not 1"),
        ({"block_q": 0}, "at least one row"),
        ({"block_k": 0}, "at least one row"),
        ({"recent": 0}, "at least 1 recent key"),
        ({"sinks": -1}, "at least 0"),
        ({"representative": "last"}, "'first' or 'center'"),
        ({"q_offset": 30, "block_q": 32}, "start at 30, inside a block of 32"),
    ],
)
def test_bad_settings_are_refused(options, text):
    q, k, v = qkv(32, 64)
    with pytest.raises(OptionError, match=text):
        hip_attention(q, k, v, pattern=Causal(), **{"budget": 8, **options})


def test_other_patterns_are_refused():
    with pytest.raises(Unsupported, match=r"Causal\(\) alone"):
        hip_attention(*qkv(8), pattern=Causal() & Documents().bind(doc=torch.zeros(2, 8, dtype=torch.long)))


def reader(name, **options):
    """A short convolution, then attention; every attention has the same weights by name."""
    torch.manual_seed(0)
    return SequenceModel(
        SequenceSettings(
            vocab=VOCAB, dim=64, depth=2, heads=2, mixer=("short_conv", name), options={name: options}, hidden=0
        )
    )


@pytest.mark.slow
def test_hip_finds_a_passage_that_a_window_of_its_budget_loses(record):
    full = reader("softmax")
    stages = {}
    for length, tokens in ((64, 4096), (512, 4096)):
        make = lambda step, n=length, rows=tokens // length: note_rows(  # noqa: E731
            rows, n, asks=8, repeats=1 if n == 64 else (1, 2, 4)[step % 3], seed=step
        )
        stages[length] = train_on(full, make, 500, lr=3e-3, stop=0.99)
    budget = {"budget": 64, "recent": 32, "sinks": 4}
    models = {
        "full": full,
        "hip": reader("hip", block_q=8, block_k=2, **budget),
        "hip, every block scored": reader("hip", block_q=8, block_k=2, oracle=True, **budget),
        "window and sinks of as many keys": reader("hip", budget=1, block_k=1, block_q=8, recent=95, sinks=4),
    }
    figures = {
        "task": "512 tokens, 8 notes in the first 384, one asked at the end; 256 rows",
        "keys read": "64 found + 32 recent + 4 sinks",
        "running accuracy and steps of training": stages,
        "chance": 1 / 8,
        "mass of the best blocks found, as many scores at random": recall_of(),
    }
    for repeats in (1, 4):
        ids, targets = note_rows(256, 512, repeats=repeats, until=384, seed=10**6)
        for name, model in models.items():
            model.load_state_dict(full.state_dict())
            figures[f"{name}, notes of {2 * repeats} tokens"] = answered(model, ids, targets)
    record(figures)
    assert figures["full, notes of 8 tokens"] >= 0.98
    assert figures["hip, notes of 8 tokens"] >= 0.9
    assert figures["window and sinks of as many keys, notes of 8 tokens"] <= 0.2
    assert figures["hip, every block scored, notes of 2 tokens"] >= 0.9
