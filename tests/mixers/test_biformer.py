from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard.mixers.grid.biformer as biformer
from regard import BiLevelRoutingAttention, OptionError, ShapeError, Unsupported, bilevel_routing
from regard.layers.grids import from_regions, to_regions
from tests.oracles import normal


def layer(dim=16, heads=4, seed=0, **options):
    torch.manual_seed(seed)
    made = BiLevelRoutingAttention(dim, heads, **{"regions": 2, "topk": 2, "lce": 3, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.2 * torch.randn_like(p)
    return made


def by_gathering(m, x):
    """The released form: pool, choose, copy the chosen regions, attend; for grids that divide."""
    s, (batch, height, width, dim) = m.regions, x.shape
    h, w = height // s, width // s
    cut = x.view(batch, s, h, s, w, dim).permute(0, 1, 3, 2, 4, 5).reshape(batch, s * s, h * w, dim)
    q, k, v = F.linear(cut, m.qkv.weight, m.qkv.bias).chunk(3, -1)
    scores = (q.mean(2) * dim**-0.5) @ k.mean(2).transpose(1, 2)
    values, index = scores.topk(m.topk, -1)
    weights = values.softmax(-1) if m.soft else torch.ones_like(values)
    if m.kv_pool:
        p = m.kv_pool

        def pool(t):
            grid = t.view(batch * s * s, h, w, dim).permute(0, 3, 1, 2)
            return F.avg_pool2d(grid, p).permute(0, 2, 3, 1).reshape(batch, s * s, -1, dim)

        k, v_in = pool(k), pool(v)
    else:
        v_in = v
    out = torch.zeros_like(q)
    for b, r in product(range(batch), range(s * s)):
        keys = torch.cat([weights[b, r, i] * k[b, index[b, r, i]] for i in range(m.topk)])
        values_ = torch.cat([weights[b, r, i] * v_in[b, index[b, r, i]] for i in range(m.topk)])
        split = [t.view(-1, m.heads, dim // m.heads).transpose(0, 1) for t in (q[b, r], keys, values_)]
        row = (split[0] * dim**-0.5 @ split[1].transpose(1, 2)).softmax(-1) @ split[2]
        out[b, r] = row.transpose(0, 1).flatten(1)

    def join(t):
        return t.view(batch, s, s, h, w, dim).permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, dim)

    beside = F.conv2d(join(v).permute(0, 3, 1, 2), m.lce.weight, m.lce.bias, padding=m.lce.padding, groups=dim)
    return F.linear(join(out) + beside.permute(0, 2, 3, 1), m.proj.weight, m.proj.bias)


def test_regions_are_cut_row_by_row_and_put_back():
    x = torch.arange(24).view(1, 4, 6, 1)
    cut = to_regions(x, 2)
    assert cut[0, :, :, 0].tolist() == [
        [0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11], [12, 13, 14, 18, 19, 20], [15, 16, 17, 21, 22, 23],
    ]  # fmt: skip
    assert torch.equal(from_regions(cut, 2, (2, 3)), x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"topk": 1},
        {"topk": 3},
        {"regions": 4, "topk": 5},
        {"kv_pool": 2},
        {"soft": True},
        {"kv_pool": 2, "soft": True},
    ],
)
def test_it_is_the_gathering_form_with_its_gradients(options):
    m = layer(**options)
    (x,) = normal((2, 8, 16, 16))
    leaves = [x.requires_grad_(), *m.parameters()]
    out, wanted = m(x), by_gathering(m, x)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    seeds = torch.randn_like(out)
    found, there = (torch.autograd.grad((y * seeds).sum(), leaves) for y in (out, wanted))
    for got, want in zip(found, there, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_in_float32_it_is_the_gathering_form_to_five_places():
    m = layer().float()
    (x,) = normal((2, 8, 8, 16), dtype=torch.float32)
    torch.testing.assert_close(m(x), by_gathering(m, x), rtol=1e-5, atol=1e-5)


def full(m, x):
    q, k, v = m.qkv(x.flatten(1, 2)).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=m.scale).transpose(1, 2).flatten(2).view_as(x)
    v = m.qkv(x)[..., 2 * m.dim :]
    return out, m.lce(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_all_regions_make_it_full_attention_beside_the_convolution():
    m = layer(topk=4)
    (x,) = normal((2, 4, 6, 16))
    torch.testing.assert_close(m(x), m.proj(sum(full(m, x))))


def test_its_own_region_alone_is_window_attention():
    m = layer(topk=1, lce=0)
    (x,) = normal((2, 4, 6, 16))
    with torch.no_grad():
        # keys that are queries: the mean of a region is nearest to itself once regions differ enough
        m.qkv.weight[16:32], m.qkv.bias[16:32] = m.qkv.weight[:16], m.qkv.bias[:16]
    own = torch.zeros(2, 2, 16).double()
    own.view(4, 16)[torch.arange(4), torch.arange(4)] = 60.0
    x = x + from_regions(own.view(1, 4, 1, 16).expand(2, 4, 6, 16), 2, (2, 3))
    q, k, _ = m._split(to_regions(m.qkv(x), 2).flatten(1, 2))
    assert bilevel_routing(q, k, 1, 4).indices[:, 0, :, 0].tolist() == [[0, 1, 2, 3]] * 2
    parts = [m.proj(full_window(m, part)) for part in to_regions(x, 2).unbind(1)]
    torch.testing.assert_close(m(x), from_regions(torch.stack(parts, 1), 2, (2, 3)))


def full_window(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=m.scale).transpose(1, 2).flatten(2)


def test_the_choice_is_that_of_pooling_products_and_topk():
    q, k = normal((2, 3, 24, 4), (2, 3, 24, 4))
    found = bilevel_routing(q, k, 2, 6)
    assert (found.block_q, found.block_k, found.indices.dtype) == (4, 4, torch.int32)
    for b, r in product(range(2), range(6)):
        score = [
            sum(float(q[b, h, 4 * r : 4 * r + 4].mean(0) @ k[b, h, 4 * s : 4 * s + 4].mean(0)) for h in range(3))
            for s in range(6)
        ]
        best = sorted(range(6), key=lambda s: -score[s])[:2]
        assert sorted(found.indices[b, 0, r].tolist()) == sorted(best)


def test_every_row_has_the_keys_of_the_chosen_regions():
    q, k = normal((2, 3, 24, 4), (2, 3, 24, 4))
    assert (bilevel_routing(q, k, 2, 6).dense(24, 24).sum(-1) == 2 * 4).all()


def test_the_order_of_the_chosen_regions_does_not_matter():
    import dataclasses

    from regard.engines.block_sparse import block_sparse

    q, k, v = normal((2, 3, 24, 4), (2, 3, 24, 4), (2, 3, 24, 4))
    found = bilevel_routing(q, k, 3, 6)
    turned = dataclasses.replace(found, indices=found.indices.flip(-1))
    torch.testing.assert_close(block_sparse(q, k, v, turned).out, block_sparse(q, k, v, found).out, rtol=1e-12, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_the_scores_have_a_gradient_only_where_routing_is_soft(monkeypatch, soft):
    m, kept = layer(soft=soft), []

    def watched(*args, **options):
        kept.append(scores(*args, **options))
        kept[-1].retain_grad()
        return kept[-1]

    scores = biformer.region_scores
    monkeypatch.setattr(biformer, "region_scores", watched)
    m(normal((1, 4, 4, 16))[0]).square().sum().backward()
    assert (kept[0].grad is not None) is soft


def test_soft_routing_over_one_region_is_warned_of():
    with pytest.warns(UserWarning, match="topk of at least 2"):
        layer(soft=True, topk=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(soft=True, topk=2)


def test_masked_padding_takes_no_part():
    m = layer(regions=3, topk=2)
    (x,) = normal((2, 7, 8, 16))
    wide = F.pad(x, (0, 0, 0, 1, 0, 2))
    valid = F.pad(torch.ones(7, 8), (0, 1, 0, 2)).bool()
    q, k, v = m._split(to_regions(m.qkv(wide), 3).flatten(1, 2))
    real = to_regions(valid[None, ..., None], 3)[0, ..., 0]
    out = torch.zeros_like(q)
    for b, r in product(range(2), range(9)):
        means = [k[b].unflatten(1, (9, -1))[:, s][:, real[s]].mean(1).flatten() for s in range(9)]
        mine = q[b].unflatten(1, (9, -1))[:, r][:, real[r]].mean(1).flatten()
        best = torch.stack([mine @ other for other in means]).topk(2).indices.tolist()
        keys = [i for s in best for i in range(9 * s, 9 * s + 9) if real.flatten()[i]]
        rows = slice(9 * r, 9 * r + 9)
        out[b, :, rows] = F.scaled_dot_product_attention(q[b, :, rows], k[b][:, keys], v[b][:, keys], scale=m.scale)
    grid = from_regions(out.transpose(1, 2).flatten(2).unflatten(1, (9, 9)), 3, (3, 3))[:, :7, :8]
    values = m.qkv(x)[..., 32:].permute(0, 3, 1, 2)
    wanted = m.proj(grid + m.lce(values).permute(0, 2, 3, 1))
    torch.testing.assert_close(m(x), wanted)


def test_a_region_of_padding_alone_is_never_chosen():
    m = layer(regions=7, topk=4)
    (x,) = normal((1, 8, 8, 16))
    out = m(x.requires_grad_())
    assert out.shape == x.shape and out.isfinite().all()
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all()
    q, k = normal((1, 1, 6, 2), (1, 1, 6, 2))
    valid = torch.tensor([[True, True], [False, False], [True, False]])
    chosen = bilevel_routing(q, k, 3, 3, valid=valid).indices
    assert 1 not in chosen and (chosen == -1).sum() == 3


def test_legacy_padding_is_attended_and_dilutes_the_means():
    m, masked = layer(regions=3, pad="legacy"), layer(regions=3, pad="mask")
    (x,) = normal((2, 7, 8, 16))
    torch.testing.assert_close(m(x), by_gathering(m, F.pad(x, (0, 0, 0, 1, 0, 2)))[:, :7, :8])
    assert (m(x) - masked(x)).abs().max() > 1e-3
    (even,) = normal((2, 9, 6, 16))
    torch.testing.assert_close(m(even), masked(even))


def test_the_form_without_regions_is_that_of_the_released_last_stage():
    m = layer(topk=None)
    (x,) = normal((2, 3, 5, 16))
    q, k, v = F.linear(x.flatten(1, 2), m.qkv.weight).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view_as(x)
    beside = F.conv2d(x.permute(0, 3, 1, 2), m.lce.weight, m.lce.bias, padding=1, groups=16).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), m.proj(out + beside))
    assert m.qkv.bias is None


def test_the_scale_is_that_of_all_channels():
    assert layer().scale == 16**-0.5
    assert layer(topk=None).scale == 4**-0.5


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: layer(topk=5), OptionError, "1 to 4 can be chosen"),
        (lambda: layer(topk=0), OptionError, "1 to 4 can be chosen"),
        (lambda: layer(lce=4), OptionError, "odd kernel"),
        (lambda: layer(pad="zeros"), OptionError, "pad is 'zeros'"),
        (lambda: layer(kv_pool=0), OptionError, "kv_pool"),
        (lambda: layer(topk=None, soft=True), OptionError, "give topk"),
        (lambda: layer(dim=18), OptionError, "does not divide into 4 heads"),
        (lambda: layer(pad=None)(torch.zeros(1, 5, 4, 16)), ShapeError, "5x4 does not divide into 2x2 regions"),
        (lambda: layer(kv_pool=2)(torch.zeros(1, 6, 4, 16).double()), ShapeError, "3x2 places do not divide"),
        (lambda: layer()(torch.zeros(1, 4, 4, 16), is_causal=True), Unsupported, "not causal"),
        (lambda: bilevel_routing(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2), 4, 3), OptionError, "1 to 3"),
        (lambda: bilevel_routing(torch.zeros(1, 1, 7, 2), torch.zeros(1, 1, 7, 2), 1, 3), ShapeError, "multiple of 3"),
    ],
)
def test_what_cannot_be_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


SIDE, KINDS, ANSWERS = 4, 16, 4


def far_copies(count, generator):
    """Grids of 4 x 4 regions with a texture and an answer each; one asks for the answer of its texture's far copy.

    -> places (count, 8, 8, features), the asking region, the answer. The copy does not touch the asking region.
    """
    regions = torch.arange(SIDE**2)
    textures = torch.stack([torch.randperm(KINDS, generator=generator) for _ in range(count)])
    answers = torch.randint(ANSWERS, (count, SIDE**2), generator=generator)
    asking, row = torch.randint(SIDE**2, (count,), generator=generator), torch.arange(count)
    apart = [(regions // SIDE - asking[:, None] // SIDE).abs(), (regions % SIDE - asking[:, None] % SIDE).abs()]
    copy = torch.multinomial((torch.maximum(*apart) > 1).double(), 1, generator=generator)[:, 0]
    textures[row, copy] = textures[row, asking]
    features = torch.cat((F.one_hot(textures, KINDS), F.one_hot(answers, ANSWERS), torch.zeros(count, SIDE**2, 1)), -1)
    features[row, asking, KINDS:] = 0
    features[row, asking, -1] = 1
    grid = features.unflatten(1, (SIDE, SIDE)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return grid, asking, answers[row, copy]


class Matcher(nn.Module):
    """One layer over embedded places, read at the asking region."""

    def __init__(self, topk):
        super().__init__()
        self.embed, self.norm = nn.Linear(KINDS + ANSWERS + 1, 32), nn.LayerNorm(32)
        self.mixer = BiLevelRoutingAttention(32, 2, regions=SIDE, topk=topk, lce=0)
        self.head = nn.Linear(32, ANSWERS)

    def forward(self, grid, asking):
        x = self.embed(grid)
        x = to_regions(x + self.mixer(self.norm(x)), SIDE).mean(2)
        return self.head(x[torch.arange(len(x)), asking])


def accuracy(topk, steps):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Matcher(topk)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        grid, asking, answer = far_copies(64, generator)
        F.cross_entropy(model(grid, asking), answer).backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        grid, asking, answer = far_copies(2000, torch.Generator().manual_seed(1))
        return (model(grid, asking).argmax(1) == answer).double().mean().item()


@pytest.mark.slow
def test_routing_finds_a_texture_far_away_and_windows_do_not(record, monkeypatch):
    found = {"chance": 1 / ANSWERS, "steps": 1500, "routing_topk_2": accuracy(2, 1500)}
    own = torch.arange(SIDE**2, dtype=torch.int32).view(1, 1, -1, 1)
    monkeypatch.setattr(biformer, "choose_regions", lambda s, topk: own.expand(len(s), 1, -1, 1).contiguous())
    found["windows"] = accuracy(1, 1500)
    record(found)
    assert found["routing_topk_2"] > 0.95
    assert found["windows"] < 0.35
