"""BlockMasks against torch's own, and what flex_attention makes of them against masked attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from regard.contract.errors import OptionError, ShapeError
from regard.patterns import (
    Causal,
    Documents,
    Explicit,
    Full,
    KeyValid,
    Neighborhood,
    PerHead,
    Prefix,
    Sinks,
    SlidingWindow,
    TokenSelection,
)
from regard.patterns.flex import layout_mask
from tests.oracles import coin
from tests.patterns.test_selection import slots

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
DOC = torch.arange(100)[None] // torch.tensor([[30], [17]])
PATTERNS = [
    Full(), Causal(), Causal() & SlidingWindow(20) | Sinks(3), ~Causal(), Prefix(0), Causal(strict=True),
    PerHead([Causal(), SlidingWindow(9), Full(), Prefix(5)]), Neighborhood((10, 10), 3),
    (Causal() & Documents()).bind(doc=DOC), KeyValid(rows=True).bind(key_valid=coin(2, 100)),
    Explicit().bind(mask=coin(2, 4, 100, 100)),
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("n, m, q_offset", [(100, 100, 0), (64, 96, 4), (1, 100, 99)])
def test_the_lists_are_those_that_torch_makes(pattern, n, m, q_offset):
    if m != 100 and not hasattr(pattern, "code"):
        pytest.skip("data of this length has its own test")
    found = pattern.flex(2, 4, n, m, block=16, q_offset=q_offset)
    want = create_block_mask(found.mask_mod, 2, 4, n, m, device="cpu", BLOCK_SIZE=16)
    rows, columns = -(-n // 16), -(-m // 16)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert getattr(found, name).dtype == torch.int32
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        assert getattr(found, indices).shape[2:] == (rows, columns)
        mine = getattr(found, counts).expand(2, 4, rows)
        assert torch.equal(mine, getattr(want, counts))
        here, there = getattr(found, indices).expand(2, 4, rows, columns), getattr(want, indices)
        for place in (mine > 0).nonzero().tolist():
            b, h, r = place
            assert here[b, h, r, : mine[b, h, r]].tolist() == sorted(there[b, h, r, : mine[b, h, r]].tolist())
    assert found.seq_lengths == (n, m)


@pytest.fixture
def plain(monkeypatch):
    """Flex attention as it is written, without tracing it for every shape."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def attended(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask.expand(2, 4, *mask.shape[2:]), enable_gqa=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_flex_attention_is_masked_attention(plain, pattern):
    q, k, v = torch.randn(2, 4, 100, 8), torch.randn(2, 2, 100, 8), torch.randn(2, 2, 100, 8)
    out = flex_attention(q, k, v, block_mask=pattern.flex(2, 4, 100, 100, block=16), enable_gqa=True)
    mask = pattern.dense(100, 100)
    torch.testing.assert_close(out, attended(q, k, v, mask))
    assert (out[~mask.any(-1).expand(2, 4, 100)] == 0).all()


def test_a_selection_goes_to_flex_by_its_bits(plain):
    q, k, v = torch.randn(3, 2, 4, 60, 8)
    for heads, block in ((1, 16), (4, 24)):
        chosen = TokenSelection(slots(2, heads, 60, 60, 20), within=Causal())
        mask = layout_mask(chosen.to_layout(60, 60, block=(block, block)), 2, 4)
        out = flex_attention(q, k, v, block_mask=mask)
        torch.testing.assert_close(out, attended(q, k, v, chosen.dense(60, 60)))
    full = layout_mask(Full().layout(60, 60, block=(16, 16)), 2, 4)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=full), F.scaled_dot_product_attention(q, k, v))


def test_compiled_flex_attention_is_masked_attention():
    torch._dynamo.reset()
    pattern = Causal() & SlidingWindow(300) | Sinks(3)
    q, k, v = torch.randn(3, 1, 2, 500, 16)
    mask = pattern.flex(1, 2, 500, 500, block=128)
    assert int(mask.full_kv_num_blocks.sum()) > 0
    out = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, pattern.dense(500, 500)))


def test_bad_calls_are_refused():
    with pytest.raises(ShapeError, match="4 heads"):
        PATTERNS[6].flex(1, 3, 100, 100)
    with pytest.raises(OptionError, match="at least 1 row"):
        Causal().flex(1, 1, 8, 8, block=0)
    with pytest.raises(OptionError, match="square"):
        layout_mask(Causal().layout(8, 8, block=(4, 8)), 1, 1)
    with pytest.raises(OptionError, match="needs data"):
        Documents().flex(1, 1, 8, 8)
