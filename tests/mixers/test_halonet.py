from __future__ import annotations

import importlib.util
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from regard import Halo, HaloAttention, OptionError, ShapeError, Unsupported
from tests.oracles import normal


def layer(dim=12, heads=2, seed=0, **options):
    torch.manual_seed(seed)
    return HaloAttention(dim, heads, **{"block": 4, "halo": 2, **options}).double()


def projected(m, x):
    """q (B, H, Y, X, D) of every place and k, v, as the layer projects them."""
    q = F.linear(x, m.q.weight, m.q.bias).unflatten(-1, (m.heads, m.head_dim)).permute(0, 3, 1, 2, 4)
    kv = F.linear(x, m.kv.weight, m.kv.bias).unflatten(-1, (m.heads, -1)).permute(0, 3, 1, 2, 4)
    return q, kv[..., : m.head_dim], kv[..., m.head_dim :]


def by_loops(m, x):
    """Place by place, key by key of its window."""
    (batch, height, width, _), b, h, s = x.shape, m.block, m.halo, m.stride
    q, k, v = projected(m, x)
    out = torch.zeros(batch, height // s, width // s, m.heads, v.shape[-1], dtype=x.dtype)
    window = b + 2 * h
    for i, a, y, z in product(range(batch), range(m.heads), range(0, height, s), range(0, width, s)):
        top, left = y // b * b - h, z // b * b - h
        query, scores, values = q[i, a, y, z], [], []
        step = s if m.strided == "pixels" else 1
        row, column = (y % b) // s * step, (z % b) // s * step
        for down, right in product(range(window), range(window)):
            ky, kz = top + down, left + right
            inside = 0 <= ky < height and 0 <= kz < width
            if not inside and m.border == "mask":
                continue
            rel = query @ m.rel_height[down - row + window - 1] + query @ m.rel_width[right - column + window - 1]
            dot = query @ k[i, a, ky, kz] if inside else torch.zeros((), dtype=x.dtype)
            scores.append(m.head_dim**-0.5 * (dot + rel) if m.scale_rel else m.head_dim**-0.5 * dot + rel)
            values.append(v[i, a, ky, kz] if inside else torch.zeros_like(v[i, a, 0, 0]))
        out[i, y // s, z // s, a] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out.flatten(3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"border": "zero"},
        {"block": 2, "halo": 3},
        {"block": 2, "halo": 3, "border": "zero"},
        {"stride": 2},
        {"stride": 2, "border": "zero", "strided": "queries"},
        {"stride": 2, "strided": "queries"},
        {"scale_rel": True, "head_dim": 3, "dim_out": 10, "bias": True},
        {"block": 1, "halo": 1},
        {"halo": 0, "border": "zero"},
    ],
)
def test_it_is_every_key_of_the_window_with_its_term(options):
    m = layer(**options)
    (x,) = normal((2, 4, 8, 12))
    leaves = [x.requires_grad_(), *m.parameters()]
    out, wanted = m(x), by_loops(m, x)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    seeds = torch.randn_like(out)
    found, there = (torch.autograd.grad((y * seeds).sum(), leaves) for y in (out, wanted))
    for got, want in zip(found, there, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def heads_attend(m, x, mask, bias):
    """Attention over all places by a mask and a bias, both (N, N) or (B, H, N, N)."""
    q, k, v = (t.flatten(2, 3) for t in projected(m, x))
    table = torch.where(mask, bias, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, table)
    return out.transpose(1, 2).flatten(2).view(*x.shape[:3], -1)


def relative(m, x):
    """q . r[key - query] on both axes for all pairs, (B, H, N, N); 0 beyond the table."""
    height, width = x.shape[1:3]
    q = projected(m, x)[0].flatten(2, 3)
    y, z = torch.arange(height * width) // width, torch.arange(height * width) % width
    middle = m.block + 2 * m.halo - 1 + m.halo
    total = 0
    for place, table in ((y, m.rel_height), (z, m.rel_width)):
        index = place[None] - place[:, None] + middle
        inside = (index >= 0) & (index < len(table))
        scores = q @ table.T
        total = total + torch.where(
            inside, scores.gather(3, index.clamp(0, len(table) - 1).expand(*q.shape[:3], -1)), 0
        )
    return total


def test_the_offset_zero_is_a_halo_behind_the_middle_of_the_table():
    m = layer(heads=1, block=4, halo=2)
    assert m.rel_height.shape == (2 * 8 - 1, 12)
    (x,) = normal((1, 8, 8, 12))
    mask = Halo((8, 8), 4, 2).dense(64, 64)
    torch.testing.assert_close(m(x), heads_attend(m, x, mask, relative(m, x)))


def test_a_query_of_one_channel_picks_a_row_of_the_table():
    m = layer(dim=2, heads=1, block=3, halo=1)
    with torch.no_grad():
        m.q.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        m.kv.weight.zero_()
        m.kv.weight[2:] = torch.eye(2)
        m.rel_width.zero_()
        m.rel_height.zero_()
        m.rel_height[:, 0] = torch.arange(9.0)
    # a query of (1, 0) and keys of 0: the weights are the softmax of the table alone
    x = torch.zeros(1, 6, 6, 2).double()
    x[..., 0] = 1
    x[..., 1] = torch.arange(36).view(6, 6)
    x[0, 1, 1] = torch.tensor([1.0, 7.0])
    out = m(x)[0, 1, 1, 1]
    rows = [0, 1, 2, 3]
    scores = torch.stack([m.rel_height[y - 1 + 1 + 4, 0] for y in rows]).double()
    weights = scores.repeat_interleave(4).softmax(0)
    values = torch.stack([x[0, y, z, 1] for y in rows for z in range(4)])
    torch.testing.assert_close(out, weights @ values)


def test_without_a_halo_it_is_window_attention_with_the_term():
    m = layer(halo=0)
    (x,) = normal((2, 8, 8, 12))
    y, z = torch.arange(64) // 8, torch.arange(64) % 8
    same = (y[None] // 4 == y[:, None] // 4) & (z[None] // 4 == z[:, None] // 4)
    torch.testing.assert_close(m(x), heads_attend(m, x, same, relative(m, x)))


def test_a_window_over_the_whole_map_is_global_attention():
    m = layer(block=4, halo=4)
    (x,) = normal((2, 8, 8, 12))
    torch.testing.assert_close(m(x), heads_attend(m, x, torch.ones(64, 64, dtype=torch.bool), relative(m, x)))


def test_blocks_of_one_place_are_a_sliding_window_cut_at_the_borders():
    m = layer(block=1, halo=2)
    (x,) = normal((2, 5, 6, 12))
    y, z = torch.arange(30) // 6, torch.arange(30) % 6
    near = ((y[None] - y[:, None]).abs() <= 2) & ((z[None] - z[:, None]).abs() <= 2)
    torch.testing.assert_close(m(x), heads_attend(m, x, near, relative(m, x)))


def test_borders_of_zeros_differ_in_blocks_at_the_border_alone():
    masked, zero = layer(block=2, halo=2), layer(block=2, halo=2, border="zero")
    (x,) = normal((1, 12, 12, 12))
    apart = (masked(x) - zero(x)).abs().amax(-1)[0]
    assert (apart[2:-2, 2:-2] < 1e-12).all()
    assert (apart[:2] > 1e-9).all() and (apart[:, -2:] > 1e-9).all()


def test_strided_queries_are_every_second_output():
    plain, strided = layer(), layer(stride=2)
    strided.load_state_dict(plain.state_dict())
    (x,) = normal((2, 8, 8, 12))
    torch.testing.assert_close(strided(x), plain(x)[:, ::2, ::2])


@pytest.mark.parametrize("options", [{}, {"border": "zero"}, {"stride": 2}])
def test_gradients_agree_with_differences(options):
    m = layer(dim=4, block=2, halo=1, **options)
    (x,) = normal((1, 4, 4, 4))
    assert torch.autograd.gradcheck(m, (x.requires_grad_(),))

    def by_tables(height, width):
        return torch.func.functional_call(m, {"rel_height": height, "rel_width": width}, (x.detach(),))

    assert torch.autograd.gradcheck(by_tables, (m.rel_height, m.rel_width))


@pytest.mark.parametrize(
    "make, error, text",
    [
        (
            lambda: layer()(torch.zeros(1, 6, 8, 12).double()),
            ShapeError,
            "6x8.*pad to a multiple of block or choose block",
        ),
        (lambda: layer(stride=3), OptionError, "stride is 3"),
        (lambda: layer(block=3, stride=2), OptionError, "block of 3"),
        (lambda: layer(block=0), OptionError, "block"),
        (lambda: layer(halo=-1), OptionError, "halo"),
        (lambda: layer(border="wrap"), OptionError, "border is 'wrap'"),
        (lambda: layer(strided="rows"), OptionError, "strided is 'rows'"),
        (lambda: layer(dim=15), OptionError, "does not divide into 2 heads"),
        (lambda: layer()(torch.zeros(1, 8, 8, 12), is_causal=True), Unsupported, "not causal"),
    ],
)
def test_what_cannot_be_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"block_size": 4, "halo_size": 1}, {"block": 4, "halo": 1}),
        ({"block_size": 4, "halo_size": 3, "stride": 2}, {"block": 4, "halo": 3, "stride": 2}),
        ({"block_size": 2, "halo_size": 3, "dim_head": 8, "dim_out": 16, "scale_pos_embed": True},
         {"block": 2, "halo": 3, "head_dim": 8, "dim_out": 16, "scale_rel": True}),
    ],
)  # fmt: skip
def test_with_its_weights_it_is_the_layer_of_timm(theirs, ours):
    import timm.layers.halo_attn as timm_halo

    torch.manual_seed(0)
    reference = timm_halo.HaloAttn(32, num_heads=4, **theirs)
    m = HaloAttention(32, 4, border="zero", strided="queries", **ours)
    m.load_state_dict(
        {
            "q.weight": reference.q.weight.flatten(1),
            "kv.weight": reference.kv.weight.flatten(1),
            "rel_height": reference.pos_embed.height_rel,
            "rel_width": reference.pos_embed.width_rel,
        }
    )
    (x,) = normal((2, 8, 12, 32), dtype=torch.float32)
    wanted = reference(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), wanted, rtol=1e-5, atol=1e-5)
