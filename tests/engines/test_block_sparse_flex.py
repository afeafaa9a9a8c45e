"""The lowering to FlexAttention, through torch's uncompiled function on the CPU; the compiled kernel needs CUDA."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from regard import Causal, Documents, Sinks, SlidingWindow
from regard.engines import flex
from regard.engines.block_sparse import block_sparse
from regard.engines.dense import prepare
from regard.primitives.biases import Indexed
from tests.oracles import normal

N = 150
PATTERNS = {
    "all": None,
    "strict": Causal(strict=True),
    "window": Causal() & SlidingWindow(20) | Sinks(3),
    "documents": Causal() & Documents().bind(doc=(torch.arange(N) // 41)[None].expand(2, -1)),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("options", ["plain", "bias", "indexed", "sinks", "score_mod"])
def test_a_lowered_call_equals_the_definition(name, options):
    q, k, v = normal((2, 4, N, 16), (2, 2, N, 16), (2, 2, N, 16), dtype=torch.float32)
    bias, table, sinks = normal((2, 1, 1, N), (1, 4, 1, 2 * N), (1, 4, 1), dtype=torch.float32, seed=3)
    places = torch.arange(N)
    given = {
        "plain": {},
        "bias": {"bias": bias},
        "indexed": {"indexed": [Indexed(table, places + N, places)]},
        "sinks": {"sinks": sinks},
        "score_mod": {"score_mod": lambda s, b, h, i, j: s - 0.01 * (i - j)},
    }[options]
    call = prepare(q, k, v, PATTERNS[name], return_lse=True, scale=0.3, **given)
    with torch.no_grad():
        got = flex.attend(call, flex_attention)
    want = block_sparse(q, k, v, PATTERNS[name], return_lse=True, scale=0.3, engine="reference", **given)
    torch.testing.assert_close(got.out, want.out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=2e-5, rtol=2e-5)


def test_positions_are_absolute():
    q, k, v = normal((1, 2, 20, 16), (1, 2, N, 16), (1, 2, N, 16), dtype=torch.float32)
    given = {"q_offset": 100, "score_mod": lambda s, b, h, i, j: s - 0.01 * (i - j), "return_lse": True}
    call = prepare(q, k, v, Causal() & SlidingWindow(30), **given)
    with torch.no_grad():
        got = flex.attend(call, flex_attention)
    want = block_sparse(q, k, v, Causal() & SlidingWindow(30), engine="reference", **given)
    torch.testing.assert_close(got.out, want.out, atol=2e-5, rtol=2e-5)
