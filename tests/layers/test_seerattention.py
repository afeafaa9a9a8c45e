from __future__ import annotations

import math

import pytest
import torch

from regard import Causal, OptionError, ShapeError
from regard.engines.block_sparse import block_sparse
from regard.layers.seerattention import SeerGate, seer_gate, seer_select
from regard.primitives.positions import rope
from tests.oracles import normal

POOL = {"avg": lambda x: x.mean(0), "max": lambda x: x.amax(0), "min": lambda x: x.amin(0)}


def gate(**options):
    torch.manual_seed(0)
    return SeerGate(4, 2, 8, **{"block": 4, "hidden": 6, **options}).double()


def qk(n=18, batch=2, seed=0):
    return normal((batch, 4, n, 8), (batch, 2, n, 8), seed=seed)


def expected(made, q, k, valid=None):
    """One tile after the other."""
    batch, n = q.shape[0], q.shape[2]
    count = -(-n // made.block)
    logits = torch.full((batch, 4, count, count), float("-inf")).double()
    for b in range(batch):
        for h in range(4):
            for a in range(count):
                for c in range(a + 1):
                    parts = []
                    for x, pools, weight, place in (
                        (q[b, h], made.pool_q, made.weight_q[h], a),
                        (k[b, h // 2], made.pool_k, made.weight_k[h // 2], c),
                    ):
                        rows = [t for t in range(place * made.block, min((place + 1) * made.block, n))]
                        rows = rows if valid is None else [t for t in rows if valid[b, t]]
                        if not rows:
                            parts.append(None)
                            continue
                        joined = torch.cat([POOL[pool](x[rows]) for pool in pools]) @ weight
                        if made.rotary_base is not None:
                            joined = rope(joined[None], torch.tensor([place * made.block]), base=made.rotary_base)[0]
                        parts.append(joined)
                    if parts[1] is not None:
                        query = torch.zeros(made.hidden).double() if parts[0] is None else parts[0]
                        logits[b, h, a, c] = query @ parts[1] / made.hidden**0.5
    return logits


@pytest.mark.parametrize("n", [18, 16, 4, 3, 1])
@pytest.mark.parametrize(
    "options", [{}, {"pool_q": ("max", "avg")}, {"pool_k": ("avg",)}, {"rotary_base": None, "hidden": 5}]
)
def test_the_gate_compares_pooled_queries_and_keys(n, options):
    made, (q, k) = gate(**options), qk(n)
    torch.testing.assert_close(made(q, k), expected(made, q, k))


def test_the_default_pools_are_the_average_of_queries_and_max_min_average_of_keys():
    made = SeerGate(4, 2, 8)
    assert (made.pool_q, made.pool_k, made.block, made.hidden) == (("avg",), ("max", "min", "avg"), 64, 128)
    assert made.weight_q.shape == (4, 8, 128) and made.weight_k.shape == (2, 24, 128)


def test_new_weights_are_made_and_not_left_as_memory():
    for _ in range(3):
        made = SeerGate(4, 2, 8)
        for weight in (made.weight_q, made.weight_k):
            bound = math.sqrt(6 / (weight.shape[1] + 128))
            assert weight.isfinite().all() and weight.abs().max() <= bound
            assert weight.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_keys_may_be_a_block_wider_than_a_head():
    # the released kernel needs block <= head_dim
    made, (q, k) = gate(block=32), qk(70)
    torch.testing.assert_close(made(q, k), expected(made, q, k))


def test_padding_takes_no_part_in_a_pool():
    made, (q, k) = gate(), qk(18)
    valid = torch.ones(2, 18, dtype=torch.bool)
    valid[0, :6] = False
    valid[1, -3:] = False
    out = made(q, k, key_valid=valid)
    some = ~torch.isneginf(out)
    torch.testing.assert_close(out, expected(made, q, k, valid))
    noise = [torch.where(valid[:, None, :, None], x, 99 * torch.randn_like(x)) for x in (q, k)]
    torch.testing.assert_close(made(*noise, key_valid=valid), out)
    # the blocks of padding alone are no choice
    assert not some[0, :, :, 0].any() and some[0, :, 1:, 1].all() and not some[1, :, :, 4].any()


def test_blocks_of_padding_on_the_left_shift_nothing():
    made, (q, k) = gate(), qk(18)
    padded = [torch.cat((torch.full_like(x[:, :, :8], 7.0), x), 2) for x in (q, k)]
    valid = torch.arange(26).expand(2, 26) >= 8
    out = made(*padded, key_valid=valid)
    torch.testing.assert_close(out[:, :, 2:, 2:], made(q, k))
    assert torch.isneginf(out[..., :2]).all()


@pytest.mark.parametrize("n", [16, 18])
@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"threshold": 0.0}])
def test_choosing_all_blocks_is_dense_attention(n, options):
    made, (q, k) = gate(), qk(n)
    selection = made.select(q, k, dense_last=0, **options)
    (v,) = normal((2, 2, n, 6), seed=1)
    out = block_sparse(q, k, v, selection).out
    torch.testing.assert_close(out, block_sparse(q, k, v, Causal()).out)


def chosen(selection):
    """Bool (B, H, n, n) of the lists of a selection."""
    count = selection.indices.shape[2]
    mask = torch.zeros(*selection.indices.shape[:3], count + 1, dtype=torch.bool)
    return mask.scatter(-1, selection.indices.long().remainder(count + 1), True)[..., :count]


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.36, 0.51, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("count", [5, 12, 40])
def test_a_ratio_keeps_the_counted_share(ratio, count):
    (logits,) = normal((2, 4, count, count))
    logits = logits.masked_fill(~torch.ones(count, count, dtype=torch.bool).tril(), float("-inf"))
    mask = chosen(seer_select(logits, block=4, ratio=ratio, dense_last=0))
    kept = max(int((1 - math.sqrt(1 - ratio)) * count + 1e-9), 1)
    rows = torch.arange(1, count + 1).clamp(max=kept)
    assert torch.equal(mask.sum(-1), rows.expand(2, 4, count))
    assert not mask.triu(1).any() and mask.diagonal(dim1=-2, dim2=-1).all()
    # the share of the table's triangle that was asked for, up to the rounding of a row's count
    assert abs(1 - (1 - kept / count) ** 2 - ratio) <= max(2 / count, 1 - (1 - 1 / count) ** 2)
    for r in range(count):
        row = logits[0, 0, r].clone()
        row[r] = float("inf")
        assert set(mask[0, 0, r].nonzero().flatten().tolist()) == set(
            row[: r + 1].topk(min(kept, r + 1)).indices.tolist()
        )


def test_a_share_that_floats_round_down_is_kept():
    # (1 - sqrt(1 - 0.36)) 5 is 1, in floats a little less
    assert int((1 - math.sqrt(1 - 0.36)) * 5) == 0
    logits = torch.zeros(1, 1, 10, 10).masked_fill(~torch.ones(10, 10, dtype=torch.bool).tril(), float("-inf"))
    mask = chosen(seer_select(logits, block=4, ratio=0.36, dense_last=0))
    assert mask[0, 0, -1].sum() == 2


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2, 0.9, 2.0])
def test_a_threshold_keeps_what_weighs_as_much_and_never_leaves_a_row_empty(threshold):
    (logits,) = normal((2, 4, 9, 9))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    logits = logits.masked_fill(~causal, float("-inf"))
    mask = chosen(seer_select(logits, block=4, threshold=threshold, dense_last=0))
    own = torch.eye(9, dtype=torch.bool)
    assert torch.equal(mask, ((torch.softmax(logits, -1) >= threshold) & causal) | own)
    assert mask.any(-1).all()


def test_the_last_rows_may_keep_everything():
    (logits,) = normal((1, 2, 9, 9))
    logits = logits.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    some, last = (chosen(seer_select(logits, ratio=0.2, dense_last=count)) for count in (0, 2))
    assert torch.equal(last[:, :, :7], some[:, :, :7]) and not torch.equal(some[:, :, 7:], last[:, :, 7:])
    assert last[:, :, 7, :8].all() and last[:, :, 8].all() and not last[:, :, 7, 8].any()


def test_a_sequence_shorter_than_a_block_has_no_gate():
    made, (q, k) = gate(), qk(3)
    assert made.select(q, k, ratio=0.1) == Causal()
    assert made.select(*qk(4), ratio=0.1) != Causal()


@pytest.mark.parametrize(
    "other", [{"block": 8}, {"hidden": 4}, {"pool_k": ("min", "max", "avg")}, {"pool_q": ("max",)}]
)
def test_a_gate_of_other_settings_is_not_loaded(other):
    here, there = gate(), gate(**other)
    with pytest.raises(OptionError, match=r"the gate to load has block.*this one has block 4, hidden 6") as error:
        here.load_state_dict(there.state_dict())
    assert f"block {there.block}, hidden {there.hidden}" in str(error.value)
    again = gate()
    again.load_state_dict({name: value + 0 for name, value in here.state_dict().items()})


def test_gradients_reach_the_weights():
    made, (q, k) = gate(), qk(18)
    logits = made(q, k)
    logits.masked_fill(torch.isneginf(logits), 0.0).square().sum().backward()
    assert made.weight_q.grad.abs().max() > 0 and made.weight_k.grad.abs().max() > 0


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: gate(block=0), OptionError, "at least 1 token"),
        (lambda: gate(hidden=5), OptionError, "even hidden width"),
        (lambda: gate(pool_q=()), OptionError, "at least one"),
        (lambda: gate(pool_k=("mean",)), OptionError, "different ones of avg, max, min"),
        (lambda: gate(pool_k=("max", "max")), OptionError, "different ones"),
        (lambda: SeerGate(4, 3, 8), OptionError, "multiple"),
        (lambda: gate()(qk(8)[0], qk(9)[1]), ShapeError, "8 tokens, k has 9"),
        (lambda: gate()(*qk(8), key_valid=torch.ones(2, 8)), ShapeError, "must be bool"),
        (lambda: seer_gate(*qk(8), torch.zeros(4, 8, 6), torch.zeros(2, 8, 6)), ShapeError, "pooled width of 24"),
        (lambda: seer_select(torch.zeros(1, 1, 3, 3)), OptionError, "give one of them"),
        (lambda: seer_select(torch.zeros(1, 1, 3, 3), ratio=0.5, threshold=0.1), OptionError, "give one of them"),
        (lambda: seer_select(torch.zeros(1, 1, 3, 3), ratio=0.0), OptionError, "in \\(0, 1\\]"),
        (lambda: seer_select(torch.zeros(1, 1, 3, 3), ratio=1.1), OptionError, "in \\(0, 1\\]"),
        (lambda: seer_select(torch.zeros(1, 1, 3, 3), threshold=-1.0), OptionError, "at least 0"),
        (lambda: seer_select(torch.zeros(1, 1, 3, 3), ratio=0.5, dense_last=-1), OptionError, "at least 0"),
    ],
)
def test_bad_input_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
