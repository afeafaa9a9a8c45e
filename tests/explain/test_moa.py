"""MoA's influence against removing pairs one by one, its plans against trying all of them."""

import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F

from regard import Causal, KeyValid, SequenceModel, SequenceSettings, SinkBand
from regard.contract.errors import MissingExtra, OptionError, ShapeError, Unsupported
from regard.engines.block_sparse import block_sparse
from regard.explain.heads import moa
from regard.explain.heads.moa import (
    Influence,
    attention_influence,
    fit_moa,
    layer_influence,
    moa_front,
    own_answers,
    predicted_loss,
)
from regard.patterns.elastic import MoAPlan, band_blocks, seen_blocks
from tests.oracles import attention, normal

LENGTHS = (64, 128)


def small(mixer="softmax", depth=2, dtype=torch.float64, gain=1.0, **settings):
    torch.manual_seed(1)
    model = SequenceModel(SequenceSettings(vocab=17, dim=16, depth=depth, heads=2, mixer=mixer, hidden=32, **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(3.0)
            if name.endswith("to_out.weight"):
                weight.mul_(gain)
    return model.to(dtype)


def batch_of(batch, n, answers=5, seed=0):
    ids = torch.randint(17, (batch, n), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(n).ge(n - answers).expand(batch, n).clone()


def answer_loss(model, ids, answers):
    logits = model(ids)[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(picked * answers[:, 1:]).sum(1) / answers[:, 1:].sum(1)


def without(q, k, v, h, i, j, step, pattern):
    """The head outputs, row i of head h moved by `step` of what removing key j and normalising again does."""
    mask = pattern.dense(q.shape[2], k.shape[2]).expand(q.shape[0], q.shape[1], -1, -1)
    out, _ = attention(q, k, v, allowed=mask)
    less = mask.clone()
    less[:, h, i, j] = False
    moved = out.clone()
    rest = (q[:, h, i] @ k[:, h * k.shape[1] // q.shape[1]].transpose(-1, -2))[:, 0] * q.shape[3] ** -0.5
    weights = rest.masked_fill(~less[:, h, i], float("-inf")).softmax(-1).nan_to_num(0.0)
    removed = (weights[:, None] @ v[:, h * k.shape[1] // q.shape[1]])[:, 0]
    moved[:, h, i] += step * (removed - out[:, h, i])
    return moved


def removed_by_hand(q, k, v, dz, mask, scale):
    """The change of sum(dz z) for every pair, one row of weights after the other."""
    heads, n, m = q.shape[1], q.shape[2], k.shape[2]
    found = torch.zeros(q.shape[0], heads, n, m, dtype=torch.float64)
    for b, h, i, j in itertools.product(range(q.shape[0]), range(heads), range(n), range(m)):
        if mask[b, h, i, j]:
            g = h * k.shape[1] // heads
            scores = (k[b, g] @ q[b, h, i] * scale).masked_fill(~mask[b, h, i], float("-inf"))
            fewer = scores.clone()
            fewer[j] = float("-inf")
            change = fewer.softmax(0).nan_to_num(0.0) - scores.softmax(0)
            found[b, h, i, j] = (change @ v[b, g]) @ dz[b, h, i]
    return found


@pytest.mark.parametrize("scale", [None, 12.0])
def test_influence_is_the_change_of_a_linear_loss(scale):
    q, k, v, dz = normal((1, 4, 9, 4), (1, 2, 9, 4), (1, 2, 9, 3), (1, 4, 9, 3))
    mask = Causal().dense(9, 9).expand(1, 4, 9, 9)
    expected = removed_by_hand(q, k, v, dz, mask, 0.5 if scale is None else scale)
    found = layer_influence([(q, k, v, dz)], scale=scale, block=1, magnitude=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_single_key_takes_its_whole_row_along():
    q, k, v, dz = normal((1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4))
    valid = torch.tensor([[False, False, True, True, False, True]])
    pattern = Causal() & KeyValid().bind(key_valid=valid)
    found = layer_influence([(q, k, v, dz)], pattern=pattern, block=1, magnitude=False)[0]
    torch.testing.assert_close(found[:, 2, 2], -(dz[0, :, 2] * v[0, :, 2]).sum(-1))
    assert not found[:, :2].any(), "a row of nothing"
    torch.testing.assert_close(found, removed_by_hand(q, k, v, dz, pattern.dense(6, 6).expand(1, 2, 6, 6), 0.5)[0])


def test_a_weight_of_nearly_one_keeps_its_digits():
    # 1 - A is 3e-9 here, of which float32 knows nothing
    q, v, dz = torch.full((1, 1, 3, 1), 19.6), torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 3, 1), torch.ones(1, 1, 3, 1)
    k = torch.tensor([1.0, 0.0, 0.0]).view(1, 1, 3, 1)
    found = layer_influence([(q, k, v, dz)], scale=1.0, block=1, magnitude=False)[0, 0]
    assert found[2, 0].item() == pytest.approx(3.5 - 1.0, rel=1e-5)
    assert found[1, 0].item() == pytest.approx(2.0 - 1.0, rel=1e-5)


@pytest.mark.parametrize("step, gain", [(1e-4, 1.0), (1.0, 2e-4)])
def test_influence_is_the_change_of_the_loss_of_a_model(step, gain):
    model, (ids, answers) = small(gain=gain), batch_of(1, 9)
    found = attention_influence(model, [(ids, answers)], block=1, magnitude=False).tables[9]
    with torch.no_grad():
        before = answer_loss(model, ids, answers)
    largest, counted = found.abs().max(), 0
    for layer, block in enumerate(model.blocks):
        for h, i, j in itertools.product(range(2), range(9), range(9)):
            expected = found[layer, h, i, j].item()
            if abs(expected) < 0.005 * largest:
                continue
            block.mixer.attend = lambda q, k, v, *, pattern, q_offset, h=h, i=i, j=j: without(
                q, k, v, h, i, j, step, pattern
            )
            with torch.no_grad():
                change = (answer_loss(model, ids, answers) - before).item() / step
            del block.mixer.attend
            assert change == pytest.approx(expected, rel=0.05)
            counted += 1
    assert counted >= 40 and not found.triu(1).any()


def test_blocks_sum_their_pairs():
    layer = tuple(normal((2, 2, 50, 8), (2, 2, 50, 8), (2, 2, 50, 8), (2, 2, 50, 8)))
    pairs = layer_influence([layer], block=1, magnitude=False)
    for block in (7, 16, 64, 100):
        n = -(-50 // block)
        whole = F.pad(pairs, (0, n * block - 50, 0, n * block - 50))
        shape = (1, 2, n, block, n, block)
        torch.testing.assert_close(
            layer_influence([layer], block=block, magnitude=False), whole.view(shape).sum((3, 5))
        )
    one = tuple(x[:1] for x in layer), tuple(x[1:] for x in layer)
    parts = [layer_influence([x], block=16) for x in one]
    torch.testing.assert_close(layer_influence([layer], block=16), (parts[0] + parts[1]) / 2)
    assert (layer_influence([layer], block=16) >= layer_influence([layer], block=16, magnitude=False).abs()).all()


def test_no_more_than_a_tile_of_rows_is_held(monkeypatch):
    asked = []
    readout = moa.readout
    monkeypatch.setattr(moa, "readout", lambda *a, rows, **o: (asked.append(len(rows)), readout(*a, rows=rows, **o))[1])
    x = normal((1, 2, 300, 8), dtype=torch.float32)[0]
    layer_influence(iter([(x, x, x, x)] * 2), block=16)
    assert sum(asked) == 600 and max(asked) == 64


def test_sequences_are_averaged_by_length():
    model, (ids, answers) = small(), batch_of(3, 12)
    answers[1, :10] = False
    together = attention_influence(model, [(ids, answers)], block=4)
    split = attention_influence(model, [(ids[:1], answers[:1]), (ids[1:], answers[1:]), batch_of(1, 20)], block=4)
    assert sorted(split.tables) == [12, 20] and split.tables[20].shape == (2, 2, 5, 5)
    torch.testing.assert_close(together.tables[12], split.tables[12])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(frozen):
    model, (ids, answers) = small().requires_grad_(not frozen), batch_of(1, 12)
    before, state = model(ids), {name: set(m.__dict__) for name, m in model.named_modules()}
    with torch.no_grad():
        attention_influence(model, [(ids, answers)], block=4)
    assert torch.equal(model(ids), before)
    assert all(p.grad is None for p in model.parameters())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == state
    with pytest.raises(IndexError):
        attention_influence(model, [(ids + 100, answers)])
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == state


def test_an_attend_of_the_users_own_stays():
    model, (ids, answers) = small(depth=1), batch_of(1, 12)
    layer = model.blocks[0].mixer
    own = layer.attend
    layer.attend = own
    attention_influence(model, [(ids, answers)], block=4)
    assert layer.__dict__["attend"] is own


def test_frozen_and_shared_keys_and_half_precision():
    model, batch = small("sqa", options={"sqa": {"query_heads": 2, "kv_heads": 1}}), batch_of(2, 12)
    found = attention_influence(model, [batch], block=4).tables[12]
    torch.testing.assert_close(attention_influence(model.requires_grad_(False), [batch], block=4).tables[12], found)
    half = attention_influence(model.bfloat16(), [batch], block=4).tables[12]
    assert half.dtype == torch.float32 and F.cosine_similarity(half.flatten(), found.flatten().float(), 0) > 0.98


def test_own_answers_are_the_models_likeliest():
    model, (prompts, _) = small(dtype=torch.float32), batch_of(2, 8)
    ids, answers = own_answers(model, prompts, 4)
    assert torch.equal(ids[:, :8], prompts) and answers.sum() == 8 and answers[:, 8:].all()
    assert torch.equal(model(ids)[:, 7:-1].argmax(-1), ids[:, 8:])


@pytest.mark.parametrize(
    "mixer, options",
    [("sigmoid", {"length": 12}), ("sliding_window", {"window": 3}), ("based", {}), ("softmax", {"is_causal": False})],
)
def test_what_is_not_causal_softmax_is_refused(mixer, options):
    causal = options.get("is_causal", True)
    given = {} if not causal else {"options": {mixer: options}}
    model = small(mixer, dtype=torch.float32, is_causal=causal, **given)
    with pytest.raises(Unsupported, match=r"causal softmax|no attention layer"):
        attention_influence(model, [batch_of(1, 12)], block=4)


def test_bad_batches_and_layers():
    model, (ids, answers) = small(depth=1), batch_of(1, 12)
    x = torch.zeros(1, 2, 8, 4)
    with pytest.raises(ShapeError, match="token ids and bool answers"):
        attention_influence(model, [(ids, answers.long())])
    with pytest.raises(ShapeError, match="token ids and bool answers"):
        attention_influence(model, [(ids, answers[:, 1:])])
    with pytest.raises(OptionError, match="every sequence needs an answer"):
        attention_influence(model, [(ids, torch.arange(12)[None] == 0)])
    with pytest.raises(OptionError, match="no batch"):
        attention_influence(model, [])
    with pytest.raises(OptionError, match="no layer"):
        layer_influence([])
    with pytest.raises(OptionError, match="block is a number of tokens"):
        layer_influence([(x, x, x, x)], block=0)
    with pytest.raises(ShapeError, match="dz the rows of q"):
        layer_influence([(x, x, x, x[:, :1])])
    with pytest.raises(ShapeError, match="layers differ"):
        layer_influence([(x, x, x, x), (x[:, :1],) * 4])


# plans


def influence(layers=1, heads=3, lengths=LENGTHS, block=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for n in lengths:
        blocks = -(-n // block)
        table = torch.rand(layers, heads, blocks, blocks, generator=generator) ** 4
        tables[n] = (table * torch.rand(layers, heads, 1, 1, generator=generator)).tril()
    return Influence(tables, block)


def masked_by_hand(found, plan, n):
    """The sum of the influence over the blocks that the plan's patterns hide, pair by pair of blocks."""
    total = 0.0
    for layer in range(plan.layers):
        seen = plan.pattern(layer, n).dense(n, n)[0, :, :: plan.block, :: plan.block]
        low = torch.ones(seen.shape[1:], dtype=torch.bool).tril()
        total += found.tables[n][layer].double()[low & ~seen].sum().item()
    return total


def everything(found, rules, lengths, budget, distinct=None):
    """All plans within the budget at all lengths."""
    layers, heads = found.tables[lengths[0]].shape[:2]
    for chosen in itertools.product(range(len(rules)), repeat=layers * heads):
        rows = [chosen[layer * heads : (layer + 1) * heads] for layer in range(layers)]
        if distinct is not None and any(len(set(row)) > distinct for row in rows):
            continue
        plan = MoAPlan([[rules[r][0] for r in row] for row in rows], [[rules[r][1] for r in row] for row in rows], 16)
        if all(plan.density(n) <= budget + 1e-9 for n in lengths):
            yield plan


RULES = [(16.0, 0.0), (0.0, 0.25), (40.0, 0.125), (0.0, 0.75)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.5, 0.6, 0.75])
@pytest.mark.parametrize("layers, heads, distinct", [(1, 3, None), (3, 1, None), (1, 3, 2), (1, 3, 1)])
def test_the_plan_at_one_length_is_the_best_of_all(seed, budget, layers, heads, distinct):
    found = influence(layers, heads, seed=seed)
    plan = fit_moa(found, [128], budget, rules=RULES, distinct=distinct)
    values = [predicted_loss(found, other, 128) for other in everything(found, RULES, [128], budget, distinct)]
    assert predicted_loss(found, plan, 128) == pytest.approx(min(values), rel=1e-6)
    assert len(values) > 1 and max(values) > min(values)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distinct", [None, 2])
def test_no_plan_beats_one_of_the_front(seed, distinct):
    found = influence(1, 3, lengths=(64, 96, 128), seed=seed)
    for lengths in ([64, 128], [64, 96, 128]):
        front = moa_front(found, lengths, 0.6, rules=RULES, distinct=distinct)
        every = list(everything(found, RULES, lengths, 0.6, distinct))
        values = torch.tensor([[predicted_loss(found, plan, n) for n in lengths] for plan in every])
        own = torch.tensor([[predicted_loss(found, plan, n) for n in lengths] for plan in front])
        for row in own:
            assert not ((values <= row + 1e-6).all(1) & (values < row - 1e-5).any(1)).any()
        # the best at every single length is among them
        torch.testing.assert_close(own.min(0).values, values.min(0).values)
        assert len(set(front)) == len(front)


def test_the_front_reaches_between_its_ends():
    # aims that pull apart: the last heads matter at one length, the first at the other
    near, far = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 8, 8)
    near[..., 3, 1], far[..., 7, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    # wide at the short length only, wide at the long one only
    rules = [(48.0, 0.0), (-112.0, 2.0)]
    found = Influence({64: near, 128: far}, 16)
    front = moa_front(found, LENGTHS, 0.9, rules=rules)
    every = list(everything(found, rules, LENGTHS, 0.9))
    values = {(predicted_loss(found, p, 64), predicted_loss(found, p, 128)) for p in every}
    best = {a for a in values if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in values)}
    own = {(predicted_loss(found, p, 64), predicted_loss(found, p, 128)) for p in front}
    assert own <= best and len(own) >= 3, "more than the two ends"
    plan = fit_moa(found, LENGTHS, 0.9, rules=rules)
    assert sum(predicted_loss(found, plan, n) for n in LENGTHS) == min(a + b for a, b in own)


@pytest.mark.parametrize("budget", [0.3, 0.45, 0.7, 0.9])
def test_the_budget_holds_at_every_length(budget):
    lengths = (128, 256, 512, 1000)
    found = influence(2, 4, lengths=(128, 256, 500))
    plan = fit_moa(found, [128, 256, 512, 1000], budget, validation=500)
    for n in (*lengths, 500):
        assert plan.density(n) <= budget
        seen = torch.cat([plan.pattern(layer, n).dense(n, n) for layer in range(2)], 1)[..., ::16]
        assert seen.sum(-1).amax(-1).double().mean() / -(-n // 16) == pytest.approx(plan.density(n))
    wider = fit_moa(found, [128, 256, 512, 1000], min(1.0, budget + 0.1), validation=500)
    assert sum(predicted_loss(found, wider, n) for n in (128, 256)) < sum(
        predicted_loss(found, plan, n) for n in (128, 256)
    )


def test_predicted_loss_is_what_the_patterns_hide():
    found = influence(2, 3, lengths=(100, 256))
    for plan in moa_front(found, [100, 256], 0.6):
        for n in (100, 256):
            assert predicted_loss(found, plan, n) == pytest.approx(masked_by_hand(found, plan, n), rel=1e-9)


def test_the_unseen_length_chooses():
    found = influence(1, 4, lengths=(64, 128, 256), seed=3)
    front = moa_front(found, LENGTHS, 0.75, validation=256)
    plan = fit_moa(found, LENGTHS, 0.75, validation=256)
    losses = [predicted_loss(found, other, 256) for other in front]
    assert plan in front and predicted_loss(found, plan, 256) == min(losses) < max(losses)


def test_rules_of_a_layer_are_limited():
    found = influence(2, 4, seed=5)
    free = fit_moa(found, [128], 0.6)
    for distinct in (1, 2):
        plan = fit_moa(found, [128], 0.6, distinct=distinct)
        kinds = [len(set(zip(plan.alphas[layer], plan.betas[layer], strict=True))) for layer in range(2)]
        assert max(kinds) <= distinct
        assert predicted_loss(found, plan, 128) > predicted_loss(found, free, 128)


def test_a_gap_costs_no_more_than_it_says():
    found = influence(2, 8, seed=7)
    best, near = (predicted_loss(found, fit_moa(found, [128], 0.6, gap=gap), 128) for gap in (0.0, 0.2))
    assert best <= near <= best / 0.8


def test_the_grid_is_the_papers_and_keeps_within_the_length():
    rules = moa._grid([1024, 4096, 16384], [1024, 2048, 4096], 64)
    assert {alpha for alpha, _ in rules} == {64.0, 0.0, 1024.0, 2048.0, 3072.0, 4096.0}
    assert (0.0, 1.0) in rules and (64.0, 0.0) in rules and (-1024.0, 1.0) not in rules
    for alpha, beta in rules:
        assert alpha + beta * 1024 > 0 and alpha + beta * 4096 <= 4096 and alpha + beta * 16384 <= 16384


def test_a_budget_below_the_narrowest_plan():
    found = influence(1, 3)
    with pytest.raises(OptionError, match=r"infeasible: the smallest plan has density 0\.5 "):
        fit_moa(found, LENGTHS, 0.4)
    with pytest.raises(OptionError, match=r"infeasible: the smallest plan has density 0\.25 "):
        fit_moa(found, [128], 0.2)
    # two rules that are each wide at one length: mixed, two heads of three are narrow at each
    crossed = [(48.0, 0.0), (-112.0, 2.0)]
    densities = [[seen_blocks(band_blocks(*r, n, 16), n, 16) / (n // 16) for n in LENGTHS] for r in crossed]
    assert densities == [[1.0, 0.5], [0.5, 1.0]]
    with pytest.raises(OptionError, match=r"density 0\.8333 "):
        fit_moa(found, LENGTHS, 0.8, rules=crossed)
    with pytest.raises(OptionError, match=r"density 1 "):
        fit_moa(found, LENGTHS, 0.8, rules=crossed, distinct=1)
    plan = fit_moa(found, LENGTHS, 0.84, rules=crossed)
    assert sorted(map(plan.density, LENGTHS)) == pytest.approx([2 / 3, 5 / 6])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"budget": 0.0}, "budget is a mean density"),
        ({"budget": 1.5}, "budget is a mean density"),
        ({"budget": float("nan")}, "budget is a mean density"),
        ({"lengths": [32]}, r"none of the lengths \[32\] has a table.*\[64, 128\]"),
        ({"lengths": []}, "none of the lengths"),
        ({"lengths": [64, 0]}, "a length is at least 1"),
        ({"lengths": [64], "validation": 64}, "validation must be a length"),
        ({"lengths": [64], "validation": 200}, "validation must be a length"),
        ({"distinct": 0}, "distinct is a number of rules"),
        ({"gap": 1.0}, "gap is a share"),
        ({"rules": []}, "no rule to choose from"),
        ({"rules": [(float("inf"), 0.0)]}, "a rule has a finite alpha"),
        ({"rules": [(64.0, -0.5)]}, "a rule has a finite alpha"),
    ],
)
def test_settings_that_cannot_be(change, text):
    with pytest.raises(OptionError, match=text):
        fit_moa(influence(), **{"lengths": LENGTHS, "budget": 0.6, **change})


def test_tables_that_cannot_be():
    good = influence().tables[64]
    with pytest.raises(ShapeError, match=r"128 tokens is \(1, 3, 4, 4\).*\(1, 3, 8, 8\)"):
        Influence({64: good, 128: good}, 16)
    with pytest.raises(ShapeError, match="layers and heads"):
        Influence({64: good, 128: torch.zeros(1, 2, 8, 8)}, 16)
    with pytest.raises(OptionError, match="not finite"):
        Influence({64: good / 0}, 16)
    with pytest.raises(OptionError, match="at least one length"):
        Influence({}, 16)
    with pytest.raises(OptionError, match="at least 1, not 0"):
        Influence({64: good}, 0)
    with pytest.raises(OptionError, match="influence of later keys"):
        fit_moa(Influence({64: torch.ones(1, 3, 4, 4)}, 16), [64], 0.6)
    plan = fit_moa(influence(), LENGTHS, 0.6)
    with pytest.raises(OptionError, match="1 layers of 3 heads in blocks of 16, the influence for 2 of 3"):
        predicted_loss(influence(2), plan, 64)
    with pytest.raises(OptionError, match="no table of 65 tokens"):
        predicted_loss(influence(), plan, 65)


def test_without_scipy_the_extra_is_named(monkeypatch):
    for name in ("scipy.optimize", "scipy.sparse"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"regard\[explain\]"):
        fit_moa(influence(), LENGTHS, 0.6)


# from the influence of a model to its masked forward


def attend_by(model, plan, engine):
    """Let the attention layers see what the plan lets them."""
    for layer, block in enumerate(model.blocks):
        block.mixer.attend = lambda q, k, v, *, pattern, q_offset, layer=layer: (
            block_sparse(q, k, v, plan.pattern(layer, q.shape[2]), engine=engine).out
        )


def test_a_budget_of_one_is_the_dense_model():
    model, batches = small(dtype=torch.float32), [batch_of(2, n, seed=n) for n in (96, 150)]
    plan = fit_moa(attention_influence(model, batches, block=16), [96, 150, 400], 1.0)
    expected = [model(ids) for ids, _ in batches]
    assert plan.density(96) == plan.density(150) == 1.0
    attend_by(model, plan, "block_sparse")
    for (ids, _), logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["block_sparse:torch", "block_sparse"])
def test_the_masked_forward_is_that_of_the_dense_mask(engine):
    model, (ids, answers) = small(dtype=torch.float32), batch_of(2, 150)
    plan = fit_moa(attention_influence(model, [(ids, answers)], block=16), [150], 0.5)
    assert any(len(set(plan.band_blocks(layer, 150))) > 1 for layer in range(2))
    dense = model(ids)
    results = []
    for way in ("block_sparse:reference", engine):
        attend_by(model, plan, way)
        loss = answer_loss(model, ids, answers).sum()
        results.append((model(ids), *torch.autograd.grad(loss, list(model.parameters()))))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (results[0][0] - dense).abs().max() > 1e-2


def test_a_plan_for_other_heads_is_refused():
    plan = fit_moa(influence(1, 3), LENGTHS, 0.6)
    q = torch.zeros(1, 2, 64, 8)
    with pytest.raises(ShapeError, match="3 heads; q has"):
        block_sparse(q, q, q, plan.pattern(0, 64))
    with pytest.raises(OptionError, match="layers 0 to 0, but not 1"):
        plan.pattern(1, 64)


def test_a_head_that_looks_far_gets_the_wide_band():
    n, block = 512, 16
    place = torch.arange(n, dtype=torch.float64)
    wanted = torch.stack((place, place / 2))
    waves = torch.exp(torch.linspace(0, -6, 32, dtype=torch.float64))

    def code(x):
        angles = x[..., None] * waves
        return torch.cat((angles.cos(), angles.sin()), -1)

    q, k = code(wanted)[None], code(place).expand(1, 2, n, 64)
    v, dz = normal((1, 2, n, 8), (1, 2, n, 8))
    found = Influence({n: layer_influence([(q, k, v, dz)], scale=2.0, block=block)}, block)
    plan = fit_moa(found, [n], 0.5)
    near, far = plan.band_blocks(0, n)
    assert far >= 16 > near
    uniform = MoAPlan([[7 * block + 128.0] * 2], [[0.0] * 2], block)
    assert uniform.density(n) == 0.5 >= plan.density(n)
    whole = block_sparse(q, k, v, Causal(), scale=2.0).out
    change = [(block_sparse(q, k, v, p.pattern(0, n), scale=2.0).out - whole).norm().item() for p in (plan, uniform)]
    assert change[0] < 0.5 * change[1]


def test_plans_travel_as_json():
    plan = fit_moa(influence(2, 3), LENGTHS, 0.6)
    assert MoAPlan.from_json(plan.to_json()) == plan
    assert set(json.loads(plan.to_json())) == {"alphas", "betas", "block"}
    assert plan.pattern(0, 64).patterns[0] == Causal() & SinkBand(16, 1, plan.band_blocks(0, 64)[0])


def test_more_budget_is_nearer_to_the_dense_model():
    model, (ids, answers) = small(dtype=torch.float32), batch_of(2, 256, answers=200)
    found = attention_influence(model, [(ids, answers)], block=16)
    with torch.no_grad():
        dense = model(ids).log_softmax(-1)
        apart = []
        for budget in (0.125, 0.25, 0.4, 0.6, 0.8, 1.0):
            attend_by(model, fit_moa(found, [256], budget), "block_sparse")
            masked = model(ids).log_softmax(-1)
            apart.append(F.kl_div(masked, dense, log_target=True, reduction="none").sum(-1).mean().item())
            for block in model.blocks:
                del block.mixer.attend
    assert apart == sorted(apart, reverse=True) and apart[-1] < 1e-6 < apart[-2]


def test_the_figure_shows_what_a_band_would_hide():
    pytest.importorskip("plotly")
    influence = Influence({16: torch.rand(2, 3, 4, 4).tril(), 32: torch.rand(2, 3, 8, 8).tril()}, 4)
    figure = influence.figure()
    assert [trace.visible for trace in figure.data] == [False, True]
    for trace, length in zip(figure.data, (16, 32), strict=True):
        assert trace.x == tuple(range(0, length, 4)) and trace.y[4] == "layer 1, head 1"
        for blocks in range(1, length // 4 + 1):
            # a band of so many blocks in head 4, and all other heads see everything
            alphas = tuple(tuple(4.0 * blocks if (la, h) == (1, 1) else 32.0 for h in range(3)) for la in range(2))
            plan = MoAPlan(alphas, ((0.0,) * 3,) * 2, block=4)
            hidden = predicted_loss(influence, plan, length)
            assert float(trace.z[4][blocks:].sum()) == pytest.approx(hidden, abs=1e-6)
