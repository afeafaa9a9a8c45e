from __future__ import annotations

import pytest
import torch

from regard import Causal, Documents, OptionError, Unsupported, sliding_window_attention, softmax_attention
from tests.oracles import attention, normal


def qkv(n=30):
    return normal((2, 4, n, 8), (2, 2, n, 8), (2, 2, n, 6))


@pytest.mark.parametrize("n, window", [(30, 4), (30, 7), (31, 1), (5, 4), (9, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_holds_the_nearer_keys_and_the_own_one(n, window, causal):
    q, k, v = qkv(n)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    allowed = (i - j >= 0) & (i - j < window) if causal else (i - j).abs() < window
    out = sliding_window_attention(q, k, v, window=window, is_causal=causal)
    torch.testing.assert_close(out, attention(q, k, v, allowed=allowed)[0])


@pytest.mark.parametrize("window", [30, 100])
def test_a_window_as_long_as_the_sequence_is_full_attention(window):
    q, k, v = qkv()
    for causal in (True, False):
        out = sliding_window_attention(q, k, v, window=window, is_causal=causal)
        torch.testing.assert_close(out, softmax_attention(q, k, v, is_causal=causal))


def test_a_window_of_one_returns_the_own_value():
    q, k, v = qkv()
    out = sliding_window_attention(q, k, v, window=1, is_causal=True)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))


def test_a_further_pattern_limits_it():
    q, k, v = qkv()
    doc = (torch.arange(30) // 7)[None]
    out = sliding_window_attention(q, k, v, window=5, pattern=Documents().bind(doc=doc))
    i, j = torch.arange(30)[:, None], torch.arange(30)
    torch.testing.assert_close(out, attention(q, k, v, allowed=((i - j).abs() < 5) & (doc == doc.T))[0])


def test_the_keys_behind_the_window_need_not_be_kept():
    q, k, v = qkv()
    whole = sliding_window_attention(q, k, v, window=5, is_causal=True)
    for t in (3, 4, 5, 29):
        first = max(0, t - 4)
        row = sliding_window_attention(
            q[:, :, t : t + 1],
            k[:, :, first : t + 1],
            v[:, :, first : t + 1],
            window=5,
            pattern=Causal(),
            q_offset=t - first,
        )
        torch.testing.assert_close(row, whole[:, :, t : t + 1])


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(window):
    with pytest.raises(OptionError, match="at least 1 key"):
        sliding_window_attention(*qkv(), window=window, is_causal=True)


def test_other_keys_are_refused_where_nothing_says_their_positions():
    q, k, v = qkv()
    with pytest.raises(Unsupported, match="30 queries and 20 keys"):
        sliding_window_attention(q, k[:, :, :20], v[:, :, :20], window=4)
