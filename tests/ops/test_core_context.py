from __future__ import annotations

import logging
import math

import pytest
import torch

import regard
from regard import (
    CoreContextAttention,
    OptionError,
    ShapeError,
    Unsupported,
    core_context_attention,
    core_pool,
    softmax_attention,
)
from regard.engines.dense import dense
from regard.ops.core_context import core_count
from regard.patterns import CoreContext
from tests.oracles import normal, softmax_row

SIZES = [(2, 4), (3, 4), (4, 3), (5, 5), (1, 2), (2, 1), (3, 7)]


def qkv(n=17, seed=0):
    return normal((2, 4, n, 6), (2, 2, n, 6), (2, 2, n, 5), seed=seed)


def whole(q, k, v, group, window, scale=None, core_bias=0.0):
    """Row by row from the definition: one softmax over the cores and the near tokens."""
    batch, heads, n, d = q.shape
    scale = d**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                closed = max(0, (i + 1 - window) // group)
                keys, values, added = [], [], []
                for c in range(closed):
                    inside = slice(c * group, (c + 1) * group)
                    weights = softmax_row(scale * k[b, h, inside] @ q[b, h, (c + 1) * group - 1])
                    keys.append(weights @ k[b, h, inside])
                    values.append(weights @ v[b, h, inside])
                    added.append(core_bias)
                for j in range(closed * group, i + 1):
                    keys.append(k[b, h, j])
                    values.append(v[b, h, j])
                    added.append(0.0)
                scores = scale * torch.stack(keys) @ q[b, h, i] + torch.tensor(added, dtype=q.dtype)
                out[b, h, i] = softmax_row(scores) @ torch.stack(values)
    return out


@pytest.mark.filterwarnings("ignore:groups of")
@pytest.mark.parametrize("group, window", SIZES)
def test_it_is_one_softmax_over_cores_and_near_tokens(group, window):
    q, k, v = qkv()
    out = core_context_attention(q, k, v, group=group, window=window, is_causal=True, scale=0.6)
    torch.testing.assert_close(out, whole(q, k, v, group, window, 0.6))


@pytest.mark.parametrize("group, window, n", [(2, 17, 17), (2, 30, 17), (4, 14, 17), (5, 13, 17)])
def test_up_to_a_window_and_a_group_it_is_causal_attention(group, window, n):
    q, k, v = qkv(n)
    out = core_context_attention(q, k, v, group=group, window=window, is_causal=True)
    torch.testing.assert_close(out, softmax_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("window", [1, 3, 8])
def test_groups_of_one_token_are_causal_attention(window):
    q, k, v = qkv()
    out = core_context_attention(q, k, v, group=1, window=window, is_causal=True)
    torch.testing.assert_close(out, softmax_attention(q, k, v, is_causal=True))


def test_with_equal_keys_in_a_group_only_the_logarithm_of_its_size_is_missing():
    group, window = 2, 4
    q, k, v = qkv()
    k = k[:, :, torch.arange(17) // group * group]
    full = softmax_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(whole(q, k, v, group, window, core_bias=math.log(group)), full)
    cores = core_pool(q, k, v, group)
    mask = CoreContext(group, window, "both", cores[0].shape[2]).dense(17, cores[0].shape[2] + 17)
    bias = torch.zeros(cores[0].shape[2] + 17).double()
    bias[: cores[0].shape[2]] = math.log(group)
    keys, values = (torch.cat((c, x.repeat_interleave(2, 1)), 2) for c, x in zip(cores, (k, v), strict=True))
    torch.testing.assert_close(dense(q, keys, values, mask=mask, bias=bias).out, full)
    out = core_context_attention(q, k, v, group=group, window=window, is_causal=True)
    assert (out - full).abs().max() > 0.01, "without it the far groups weigh as one token each"


def test_two_calls_and_a_merge_are_one_call_over_both():
    group, window = 3, 4
    q, k, v = qkv()
    core_k, core_v = core_pool(q, k, v, group)
    count = core_k.shape[2]
    keys, values = torch.cat((core_k, k.repeat_interleave(2, 1)), 2), torch.cat((core_v, v.repeat_interleave(2, 1)), 2)
    once = dense(q, keys, values, CoreContext(group, window, "both", count)).out
    torch.testing.assert_close(core_context_attention(q, k, v, group=group, window=window, is_causal=True), once)


@pytest.mark.parametrize("group, window", SIZES)
@pytest.mark.parametrize("n", [1, 9, 40])
def test_every_past_token_is_covered_once(group, window, n):
    cores, tokens = (CoreContext(group, window, part) for part in ("cores", "tokens"))
    counts = (
        tokens.dense(n, n)[0, 0].long() + cores.dense(n, n // group + 1)[0, 0].long().repeat_interleave(group, 1)[:, :n]
    )
    assert torch.equal(counts, torch.ones(n, n).tril().long())


@pytest.mark.parametrize("group, window", SIZES)
def test_the_number_of_scores_is_that_of_cores_and_window(group, window):
    n = 100
    counts = sum(
        CoreContext(group, window, part).row_counts(n, m).sum().item()
        for part, m in (("cores", n // group), ("tokens", n))
    )
    assert counts == sum(core_count(i, group, window) * (1 - group) + i + 1 for i in range(n))
    for i in range(window, n):
        near = i + 1 - core_count(i, group, window) * group
        assert near == window + (i + 1 - window) % group


def test_cores_belong_to_query_heads_and_read_the_last_query_only():
    q, k, v = (x.requires_grad_() for x in qkv(7))
    core_k, core_v = core_pool(q, k, v, 3)
    assert core_k.shape == (2, 4, 2, 6) and core_v.shape == (2, 4, 2, 5)
    grads = torch.autograd.grad(core_k.square().sum() + core_v.square().sum(), (q, k, v))
    read = (grads[0] != 0).any(-1).all(1)[0]
    assert read.tolist() == [False, False, True, False, False, True, False]
    for grad in grads[1:]:
        assert (grad[:, :, :6] != 0).any() and (grad[:, :, 6:] == 0).all()
    assert core_pool(q, k, v, 8)[1].shape == (2, 4, 0, 5)


def test_pooling_stays_among_the_keys_of_the_group():
    q, k, v = qkv(6)
    core_k, _ = core_pool(1e4 * q, k, v, 3)
    best = [(k[0, 0, g * 3 : g * 3 + 3] @ q[0, 0, g * 3 + 2]).argmax() + g * 3 for g in range(2)]
    torch.testing.assert_close(core_k[0, 0], k[0, 0, torch.stack(best)])
    core_k, _ = core_pool(0 * q, k, v, 3)
    torch.testing.assert_close(core_k[:, :2], k[:, :1].unflatten(2, (2, 3)).mean(3).expand(2, 2, 2, 6))


@pytest.mark.parametrize("group, window", [(2, 4), (3, 4)])
def test_no_output_changes_before_a_changed_token(group, window):
    q, k, v = qkv()
    before = core_context_attention(q, k, v, group=group, window=window, is_causal=True)
    for t in range(17):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 1
        after = core_context_attention(*changed, group=group, window=window, is_causal=True)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


@pytest.mark.parametrize("group, window", [(2, 3), (3, 3)])
def test_gradients_flow_through_the_pooling_weights(group, window):
    q, k, v = (x.requires_grad_() for x in normal((1, 2, 8, 3), (1, 1, 8, 3), (1, 1, 8, 2)))

    def run(q, k, v):
        return core_context_attention(q, k, v, group=group, window=window, is_causal=True)

    assert torch.autograd.gradcheck(run, (q, k, v))
    # the last row sees the group's keys through its core alone, whose weights depend on the group's last query
    (grad,) = torch.autograd.grad(run(q, k, v)[:, :, -1].square().sum(), q)
    assert (grad[:, :, group - 1] != 0).any() and (grad[:, :, 0] == 0).all()


def test_long_inputs_equal_the_dense_mask():
    group, window, n = 8, 48, 700
    q, k, v = normal((1, 2, n, 16), (1, 1, n, 16), (1, 1, n, 16), dtype=torch.float32)
    core_k, core_v = core_pool(q, k, v, group)
    keys, values = (torch.cat((c, x.expand_as(q)), 2) for c, x in ((core_k, k), (core_v, v)))
    once = dense(q, keys, values, CoreContext(group, window, "both", n // group)).out
    out = core_context_attention(q, k, v, group=group, window=window, is_causal=True)
    torch.testing.assert_close(out, once, rtol=1e-4, atol=1e-5)


def test_a_window_that_is_no_multiple_is_taken_and_noted(caplog):
    q, k, v = qkv()
    with caplog.at_level(logging.DEBUG, logger="regard"):
        core_context_attention(q, k, v, group=3, window=4, is_causal=True)
    assert "a window of 4 is no multiple of groups of 3" in caplog.text


def test_what_cannot_be_is_refused():
    q, k, v = qkv()
    with pytest.warns(UserWarning, match="groups of 5 tokens are longer than the window of 4"):
        core_context_attention(q, k, v, group=5, window=4, is_causal=True)
    with pytest.raises(OptionError, match="at least 1 token, not 0 and 4"):
        core_context_attention(q, k, v, group=0, window=4, is_causal=True)
    with pytest.raises(Unsupported, match="causal only"):
        core_context_attention(q, k, v, group=2, window=4)
    with pytest.raises(ShapeError, match="17 queries, 12 keys"):
        core_context_attention(q, k[:, :, :12], v[:, :, :12], is_causal=True)


@pytest.mark.parametrize("group, window", [(2, 4), (3, 4), (4, 4), (1, 1), (3, 7)])
@pytest.mark.parametrize("pieces", [(1,) * 23, (23,), (5, 1, 9, 8), (2, 2, 19)])
def test_decoding_from_cores_equals_the_parallel_form(group, window, pieces):
    torch.manual_seed(0)
    layer = CoreContextAttention(16, 4, kv_heads=2, group=group, window=window).double()
    (x,) = normal((2, 23, 16))
    state, outs, at = layer.init_state(2), [], 0
    for n in pieces:
        out, state = layer.prefill(x[:, at : at + n], state)
        outs.append(out)
        at += n
        assert state.core_k.shape[2] == at // group
        assert state.k.shape[2] <= window + group - 1
        assert state.size_bytes == layer.state_bytes(2, at)
    torch.testing.assert_close(torch.cat(outs, 1), layer(x, is_causal=True))


def test_the_cache_grows_by_one_core_a_group():
    layer = regard.mixer("core_context", 64, 4, group=16, window=64)
    plain = regard.mixer("softmax", 64, 4)
    assert layer.state_bytes(1, 64) < plain.state_bytes(1, 80)
    assert layer.state_bytes(1, 16384) < plain.state_bytes(1, 16384) / 14


def test_groups_are_counted_from_the_first_token_so_nothing_may_be_masked():
    layer = regard.mixer("core_context", 64, 4, group=4, window=8)
    mask = torch.ones(1, 8, dtype=torch.bool)
    for name in ("padding", "reset"):
        with pytest.raises(Unsupported, match="core_context takes no"):
            layer(torch.randn(1, 8, 64), is_causal=True, **{name: mask})
    with pytest.raises(Unsupported, match="takes no padding"):
        layer.prefill(torch.randn(1, 8, 64), layer.init_state(1), padding=mask)
