from __future__ import annotations

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import OptionError, SparseQueryAttention, attend, sqa_heads
from regard.layers.attention import OpAttention
from tests.oracles import normal

VARIANTS = {"sqa": (8, 4), "ssqa": (8, 8), "xsqa": (4, 4), "xsmqa": (4, 1)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_of_sixteen_heads(variant):
    assert sqa_heads(16, variant) == VARIANTS[variant]


@pytest.mark.parametrize("query_heads, kv_heads", [(8, 4), (8, 8), (4, 4), (4, 1), (16, 4), (16, 16), (6, 3)])
def test_it_is_grouped_attention_of_fewer_heads_of_the_same_width(query_heads, kv_heads):
    torch.manual_seed(0)
    a = SparseQueryAttention(64, 16, query_heads=query_heads, kv_heads=kv_heads)
    grouped = OpAttention(64, query_heads, kv_heads=kv_heads, head_dim=4, op=regard.softmax_attention)
    grouped.load_state_dict(a.state_dict())
    (x,) = normal((2, 9, 64), dtype=torch.float32)
    for causal in (True, False):
        assert torch.equal(a(x, is_causal=causal), grouped(x, is_causal=causal))
    assert sum(p.numel() for p in a.parameters()) == 2 * 64 * query_heads * 4 + 2 * 64 * kv_heads * 4


def test_all_heads_make_it_plain_attention():
    a = SparseQueryAttention(64, 16, query_heads=16, kv_heads=16)
    plain = OpAttention(64, 16, op=regard.softmax_attention)
    plain.load_state_dict(a.state_dict())
    (x,) = normal((2, 9, 64), dtype=torch.float32)
    assert torch.equal(a(x), plain(x))


def test_half_and_quarter_are_the_default():
    a = SparseQueryAttention(64, 16)
    assert (a.heads, a.kv_heads, a.head_dim) == (8, 4, 4)


def test_the_width_is_explicit_so_any_number_of_query_heads_will_do():
    # deriving widths by integer division, as the released code does, breaks here
    a = SparseQueryAttention(48, 12, query_heads=8, kv_heads=4)
    assert a.head_dim == 4
    assert a(torch.zeros(1, 3, 48)).shape == (1, 3, 48)


@pytest.mark.parametrize("bias", [True, False])
def test_all_projections_follow_one_choice_of_bias(bias):
    a = SparseQueryAttention(64, 16, bias=bias)
    assert {to.bias is not None for to in (a.to_q, a.to_k, a.to_v, a.to_out)} == {bias}


def score_flops(heads, groups):
    q, k, v = normal((1, heads, 64, 16), (1, groups, 64, 16), (1, groups, 64, 16))
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, engine="reference")
    return counter.get_total_flops()


def test_work_falls_with_the_query_heads_and_the_cache_with_the_key_heads():
    full = score_flops(16, 16)
    assert full == 2 * 2 * 16 * 64 * 64 * 16
    for heads, groups in VARIANTS.values():
        assert score_flops(heads, groups) * 16 == full * heads
    plain = OpAttention(64, 16, op=regard.softmax_attention)
    for heads, groups in VARIANTS.values():
        a = SparseQueryAttention(64, 16, query_heads=heads, kv_heads=groups)
        assert a.state_bytes(2, 100) * 16 == plain.state_bytes(2, 100) * groups


def test_timing_a_quarter_of_the_query_heads_attends_twice_as_fast_at_4096():
    inputs = {heads: torch.randn(1, heads, 4096, 32) for heads in (8, 2)}
    best = dict.fromkeys(inputs, float("inf"))
    # in turns and in processor time, so that a busy machine slows both
    for _ in range(8):
        for heads, q in inputs.items():
            start = time.process_time()
            with torch.no_grad():
                attend(q, q, q, is_causal=True)
            best[heads] = min(best[heads], time.process_time() - start)
    assert best[8] / best[2] >= 2


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: SparseQueryAttention(64, 16, query_heads=6, kv_heads=4), "6 query heads cannot share 4 key heads"),
        (lambda: SparseQueryAttention(64, 16, query_heads=32, kv_heads=4), "at most the 16 query heads"),
        (lambda: SparseQueryAttention(66, 16), "give head_dim="),
        (lambda: SparseQueryAttention(64, 6), "give query_heads= and kv_heads="),
        (lambda: sqa_heads(16, "ysqa"), "there are sqa, ssqa, xsqa, xsmqa"),
        (lambda: sqa_heads(6, "xsqa"), "do not divide"),
    ],
)
def test_bad_settings_are_refused(make, text):
    with pytest.raises(OptionError, match=text):
        make()
