"""Hops against counting by hand, importance against what it must be, patterns that were planted."""

import re

import pytest
import torch
import transformers as hf

from regard import (
    Edit,
    HopProfile,
    OptionError,
    PatternMap,
    ShapeError,
    head_importance,
    hop_profile,
    joint_importance,
    mean_attention_distance,
    patch,
    vit_page,
)
from regard import record as record_of
from tests.explain.digit_vit import digits, in_a_cell, trained

METRICS = ("prob", "loss", "kl", "acc")


@pytest.fixture(scope="module")
def reader():
    """A small classifier of digits, learned in seconds, and what it is asked."""
    return trained(steps=250, cells=False, layers=2, width=32), digits("test")


def one_layer(table, heads=1):
    """Weights of one layer and image with the same table for every head."""
    return (table.expand(1, heads, *table.shape).float(),)


def chebyshev(grid):
    places = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    return [[max(abs(a - c), abs(b - d)) for c, d in places] for a, b in places]


# ---- hops


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_hops_are_those_counted_by_hand_and_sum_to_one(grid, prefix):
    n = grid[0] * grid[1] + prefix
    weights = tuple(torch.rand(2, 3, n, n).softmax(-1) for _ in range(2))
    found = hop_profile(weights, grid=grid, prefix_tokens=prefix)
    rings = chebyshev(grid)
    wanted = torch.zeros(2, 3, max(grid))
    for layer, table in enumerate(weights):
        mean = table.mean(0)
        for p, row in enumerate(rings):
            for q, k in enumerate(row):
                wanted[layer, :, k] += mean[:, prefix + p, prefix + q] / len(rings)
    torch.testing.assert_close(found.values, wanted)
    torch.testing.assert_close(found.values.sum(-1) + found.prefix, torch.ones(2, 3))
    assert (found.beyond == 0).all()
    if prefix:
        torch.testing.assert_close(found.from_prefix[1], weights[1].mean(0)[:, 0, prefix:].sum(-1))
    else:
        assert found.from_prefix.isnan().all()
    near = hop_profile(weights, grid=grid, prefix_tokens=prefix, max_hop=1)
    assert near.values.shape == (2, 3, 2)
    torch.testing.assert_close(near.values.sum(-1) + near.beyond + near.prefix, torch.ones(2, 3))


def test_uniform_attention_gives_the_sizes_of_rings_and_one_number_a_key():
    n = 5 * 5
    found = hop_profile(one_layer(torch.full((n, n), 1 / n)), grid=(5, 5))
    torch.testing.assert_close(found.values[0, 0], found.sizes / n)
    torch.testing.assert_close(found.per_key(), torch.full((1, 1, 5), 1 / n))
    assert found.sizes[0] == 1 and float(found.sizes.sum()) == pytest.approx(n)
    # eight neighbours inside, five at the sides, three in the corners
    assert float(found.sizes[1]) == pytest.approx((9 * 8 + 12 * 5 + 4 * 3) / 25)


def test_looking_at_oneself_is_hop_zero_and_at_a_neighbour_hop_one():
    same = hop_profile(one_layer(torch.eye(16)), grid=(4, 4))
    assert same.values[0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    shifted = torch.zeros(16, 16)
    for y in range(4):
        for x in range(4):
            shifted[4 * y + x, 4 * y + (x + 1 if x < 3 else x - 1)] = 1
    assert hop_profile(one_layer(shifted), grid=(4, 4)).values[0, 0].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_transposed_grid_is_as_far_apart():
    h, w = 3, 5
    weights = torch.rand(1, 2, h * w, h * w).softmax(-1)
    order = torch.arange(h * w).view(h, w).T.flatten()
    turned = weights[:, :, order][:, :, :, order]
    a, b = mean_attention_distance((weights,), grid=(h, w)), mean_attention_distance((turned,), grid=(w, h))
    torch.testing.assert_close(a.values, b.values)
    torch.testing.assert_close(hop_profile((weights,), grid=(h, w)).values, hop_profile((turned,), grid=(w, h)).values)


def test_distances_are_those_counted_by_hand():
    grid, prefix = (3, 4), 1
    weights = torch.rand(2, 2, 13, 13).softmax(-1)
    places = [(y, x) for y in range(3) for x in range(4)]
    total = torch.zeros(2)
    for p, (a, b) in enumerate(places):
        row = weights[:, :, prefix + p, prefix:]
        far = torch.tensor([((a - c) ** 2 + (b - d) ** 2) ** 0.5 for c, d in places])
        total += ((row * far).sum(-1) / row.sum(-1)).mean(0) / len(places)
    torch.testing.assert_close(mean_attention_distance((weights,), grid=grid).values[0], total)
    assert mean_attention_distance(one_layer(torch.eye(12)), grid=grid).values.item() == 0


def test_the_tape_knows_the_grid_and_what_stands_before_it(reader):
    model, (images, _) = reader
    tape = record_of(model, {"pixel_values": images[:4]})
    assert tape.meta["grid"] == (4, 4, 1)
    found = hop_profile(tape)
    assert found.grid == (4, 4) and found.values.shape == (2, 4, 4)
    torch.testing.assert_close(found.values.sum(-1) + found.prefix, torch.ones(2, 4))


def test_more_tokens_before_the_grid_are_known_or_told_by_hand():
    config = hf.DeiTConfig(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    tape = record_of(hf.DeiTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 16, 16)})
    with pytest.raises(ShapeError, match=r"18 tokens are not 1 and a grid of 4 x 4: .*distillation"):
        hop_profile(tape, prefix_tokens=1)
    found = hop_profile(tape)
    assert torch.equal(hop_profile(tape, prefix_tokens=2).values, found.values)
    torch.testing.assert_close(found.values.sum(-1) + found.prefix, torch.ones(2, 4))
    # with a grid given, what is left over stands before it
    assert torch.equal(hop_profile(tape, grid=(4, 4)).values, found.values)


def test_images_that_are_not_square():
    config = hf.ViTConfig(
        image_size=(8, 24),
        patch_size=4,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    tape = record_of(hf.ViTModel(config).eval(), {"pixel_values": torch.randn(2, 3, 8, 24)})
    found = hop_profile(tape, grid=(2, 6), prefix_tokens=1)
    assert found.values.shape == (1, 2, 6) and torch.equal(hop_profile(tape).values, found.values)
    with pytest.raises(ShapeError, match="1 and a grid of 3 x 6"):
        hop_profile(tape, grid=(3, 6), prefix_tokens=1)
    del tape.meta["grid"]
    with pytest.raises(OptionError, match=r"give grid=\(h, w\)"):
        hop_profile(tape)


def test_models_of_windows_are_read_inside_them_and_flagged():
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 4], window_size=4)
    tape = record_of(hf.SwinModel(config).eval(), {"pixel_values": torch.randn(1, 3, 16, 16)})
    with pytest.raises(ShapeError, match="attends inside windows"):
        hop_profile(tape)
    found = hop_profile(tape, window=(4, 4))
    assert found.window and found.grid == (4, 4) and "inside windows" in found.figure().layout.title.text
    # a later stage has more heads
    assert found.values.shape == (2, 4, 4) and found.values[0, 2:].isnan().all()
    torch.testing.assert_close(found.values[0, :2].sum(-1), torch.ones(2))
    torch.testing.assert_close(found.values[1].sum(-1), torch.ones(4))
    assert mean_attention_distance(tape, window=(4, 4)).values[1].isfinite().all()
    with pytest.raises(OptionError, match="grid= or window="):
        hop_profile(tape, grid=(8, 8), window=(4, 4))


@pytest.mark.parametrize(
    "weights, options, error, message",
    [
        ((), {"grid": (2, 2)}, OptionError, "there are no weights"),
        ((torch.rand(1, 2, 4, 5),), {"grid": (2, 2)}, ShapeError, r"must be \(B, H, N, N\)"),
        ((torch.rand(1, 2, 4, 4),), {"grid": (2, 3)}, ShapeError, "4 tokens are not"),
        ((torch.rand(1, 2, 4, 4),), {"grid": (2, 2), "max_hop": -1}, OptionError, "at least 0, not -1"),
    ],
)
def test_bad_profiles_are_refused(weights, options, error, message):
    with pytest.raises(error, match=message):
        hop_profile(weights, **options)


# ---- importance


def test_a_head_that_writes_nothing_is_worth_nothing(reader):
    model, (images, labels) = reader
    projection = model.vit.layers[1].attention.o_proj
    before = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight[:, 8:16] = 0
    try:
        for mode in ("zero", "mean", "taylor"):
            found = head_importance(model, [(images[:60], labels[:60])], mode=mode)
            assert all((values[1, 1] == 0).all() for values in found.values.values()), mode
            assert found.values["loss"][0, 0] != 0
    finally:
        with torch.no_grad():
            projection.weight.copy_(before)


def test_importance_is_what_pruned_weights_change(reader):
    model, (images, labels) = reader
    images, labels = images[:50], labels[:50]
    found = head_importance(model, [(images[:20], labels[:20]), (images[20:], labels[20:])])
    with torch.no_grad():
        plain = model(images).logits.softmax(-1)
        projection = model.vit.layers[0].attention.o_proj.weight
        before = projection.clone()
        projection[:, 16:24] = 0
        pruned = model(images).logits.softmax(-1)
        projection.copy_(before)
    own = torch.arange(50), labels
    wanted = {
        "prob": plain[own] - pruned[own],
        "loss": plain[own].log() - pruned[own].log(),
        "kl": (plain * (plain / pruned).log()).sum(-1),
        "acc": (plain.argmax(-1) == labels).float() - (pruned.argmax(-1) == labels).float(),
    }
    for metric in METRICS:
        assert found.per_image[metric].shape == (50, 2, 4)
        torch.testing.assert_close(found.per_image[metric][:, 0, 2], wanted[metric], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.values[metric], found.per_image[metric].mean(0))
    assert found.whole["acc"] == pytest.approx(float((plain.argmax(-1) == labels).float().mean()))
    joint = joint_importance(model, [(images, labels)], [(0, 2)])
    assert joint["loss"] == pytest.approx(float(found.values["loss"][0, 2]), rel=1e-4)


def test_the_mean_stands_for_a_head_that_always_says_the_same(reader):
    """Where a head's output hardly varies its mean is it; zero is not."""
    model, (images, labels) = reader
    found = {m: head_importance(model, [(images[:1], labels[:1])], metrics=("kl",), mode=m) for m in ("zero", "mean")}
    value = model.vit.layers[1].attention.v_proj
    kept = value.weight.detach().clone()
    with torch.no_grad():
        value.weight[:8] = 0
    try:
        constant = {
            m: head_importance(model, [(images[:9], labels[:9])], metrics=("kl",), mode=m) for m in ("zero", "mean")
        }
    finally:
        with torch.no_grad():
            value.weight.copy_(kept)
    # only its bias is left
    assert constant["mean"].values["kl"][1, 0].abs() < 1e-6 < constant["zero"].values["kl"][1, 0]
    assert found["mean"].values["kl"][1, 0] > 1e-6


def test_the_mean_that_stands_for_a_head_is_over_all_images_and_tokens(reader):
    model, (images, labels) = reader
    images, labels = images[:30], labels[:30]
    z = record_of(model, {"pixel_values": images}, sites=("z",))["z", 0]
    with patch(model, [Edit("z", 0, heads=(2,), value=z[:, :, 2].mean((0, 1)))]), torch.no_grad():
        pruned = model(images).logits.log_softmax(-1)
    with torch.no_grad():
        plain = model(images).logits.log_softmax(-1)
    wanted = (plain - pruned).gather(1, labels[:, None]).mean()
    # batches of other sizes count by their images
    batches = [(images[:25], labels[:25]), (images[25:], labels[25:])]
    found = head_importance(model, batches, metrics=("loss",), mode="mean").values["loss"][0, 2]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    joint = joint_importance(model, batches, [(0, 2)], metrics=("loss",), mode="mean")
    assert joint["loss"] == pytest.approx(float(wanted), rel=1e-4)


def test_pruning_several_at_once_is_not_the_sum(reader):
    model, (images, labels) = reader
    batch = [(images[:200], labels[:200])]
    single = head_importance(model, batch, metrics=("loss",)).values["loss"]
    heads = [(0, h) for h in range(4)]
    together = joint_importance(model, batch, heads, metrics=("loss",))
    assert abs(together["loss"] - float(single[0].sum())) > 0.05
    assert together["loss"] > float(single[0].max())


def test_slopes_go_with_pruning_on_a_classifier_of_digits(reader):
    model, (images, labels) = reader
    pruned = head_importance(model, [(images, labels)], metrics=("loss",)).values["loss"]
    slopes = head_importance(model, [(images, labels)], mode="taylor").values["loss"]
    assert correlation(pruned, slopes) > 0.8


def test_slopes_of_an_image_are_those_of_its_own_loss(reader):
    model, (images, labels) = reader
    together = head_importance(model, [(images[:6], labels[:6])], mode="taylor").per_image["loss"]
    alone = [head_importance(model, [(images[i : i + 1], labels[i : i + 1])], mode="taylor") for i in range(6)]
    torch.testing.assert_close(together, torch.cat([a.per_image["loss"] for a in alone]), rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_after_pruning_the_model_is_the_same_bit_for_bit(reader):
    model, (images, labels) = reader
    with torch.no_grad():
        before = model(images[:20]).logits
        for mode in ("zero", "mean", "taylor"):
            head_importance(model, [(images[:20], labels[:20])], mode=mode)
        assert torch.equal(model(images[:20]).logits, before)


def test_bad_importances_are_refused(reader):
    model, (images, labels) = reader
    batch = [(images[:2], labels[:2])]
    with pytest.raises(OptionError, match="there is no metric 'f1'"):
        head_importance(model, batch, metrics=("f1",))
    with pytest.raises(OptionError, match='mode is "zero", "mean" or "taylor"'):
        head_importance(model, batch, mode="resample")
    with pytest.raises(OptionError, match="there is no batch"):
        head_importance(model, [])
    with pytest.raises(OptionError, match="a layer below 2 and a head below 4"):
        joint_importance(model, batch, [(2, 0)])
    with pytest.raises(OptionError, match="prune them"):
        joint_importance(model, batch, [(0, 0)], mode="taylor")


# ---- patterns


def planted(each=8, side=5, seed=0):
    """Tables of four families: near, own row, own column, first token; and which family each is of."""
    generator = torch.Generator().manual_seed(seed)
    n = side * side
    y, x = torch.arange(n) // side, torch.arange(n) % side
    far = ((y[:, None] - y).abs() + (x[:, None] - x).abs()).float()
    scores = {
        "near": -1.5 * far,
        "row": 5.0 * (y[:, None] == y),
        "column": 5.0 * (x[:, None] == x),
        "first": 5.0 * (torch.arange(n) == 0).expand(n, n),
    }
    tables = [
        (s + 0.8 * torch.randn(n, n, generator=generator)).softmax(-1) for s in scores.values() for _ in range(each)
    ]
    return torch.stack(tables), torch.arange(4).repeat_interleave(each)


def purity(groups, families):
    return sum(int(families[groups == g].bincount().max()) for g in groups.unique()) / len(groups)


@pytest.mark.parametrize("arch", ["pca", "mlp", "conv"])
def test_planted_families_are_apart(arch):
    tables, families = planted()
    # four layers of eight heads each, shuffled so that no layer is a family
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    weights = tuple(tables[order].view(4, 1, 8, 25, 25))
    found = PatternMap.fit(weights, arch=arch, steps=150)
    assert found.points.shape == (32, 2) and found.origin[9] == (-1, 1, 1)
    assert purity(found.clusters(4), families[order]) >= 0.95
    assert {int(families[order][i]) for i in found.representatives(4)} == {0, 1, 2, 3}
    again = PatternMap.fit(weights, arch=arch, steps=150)
    assert torch.equal(again.points, found.points)
    assert found.error < float((tables / tables.amax((1, 2), keepdim=True)).var(0).mean())


def test_heads_that_follow_the_image_are_seen_image_by_image():
    tables, _ = planted(each=2)
    rows, columns = tables[2:4], tables[4:6]
    # head 0 changes with the image, head 1 does not
    weights = (torch.stack([torch.stack([rows[0], rows[1]]), torch.stack([columns[0], rows[1]])]),)
    found = PatternMap.fit(weights, arch="pca", latent=1, per_image=True)
    assert found.origin == ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1))
    groups = found.clusters(2).tolist()
    assert groups[0] == groups[1] == groups[3] != groups[2]
    mean = PatternMap.fit(weights + weights, arch="pca", latent=1)
    torch.testing.assert_close(mean.tables[0], weights[0][:, 0].mean(0))


def test_bad_pattern_maps_are_refused():
    tables = (torch.rand(1, 4, 6, 6),)
    with pytest.raises(OptionError, match='arch is "conv", "mlp" or "pca"'):
        PatternMap.fit(tables, arch="vae")
    with pytest.raises(OptionError, match="4 tables cannot be placed by 4 numbers"):
        PatternMap.fit(tables, latent=4)
    with pytest.raises(ShapeError, match="differ in tokens"):
        PatternMap.fit((*tables, torch.rand(1, 4, 5, 5)))
    with pytest.raises(OptionError, match="4 tables make 1 to 4 clusters, not 5"):
        PatternMap.fit(tables, arch="pca").clusters(5)


# ---- figures


def test_figures_hold_the_numbers(reader):
    model, (images, labels) = reader
    found = hop_profile(record_of(model, {"pixel_values": images[:4]}))
    figure = found.figure()
    assert len(figure.data) == 8 and "grid of 4 x 4" in figure.layout.title.text
    torch.testing.assert_close(torch.as_tensor(figure.data[5].y), found.values[1, 1])
    importance = head_importance(model, [(images[:20], labels[:20])])
    assert [trace.z.shape for trace in importance.figure().data] == [(2, 4)] * 4


def test_one_page_holds_it_all_and_needs_no_network(reader, tmp_path):
    model, (images, labels) = reader
    path = tmp_path / "heads.html"
    importance = head_importance(model, [(images[:20], labels[:20])])
    vit_page(record_of(model, {"pixel_values": images[:4]}), path, importance=importance, clusters=2)
    page = path.read_text()
    assert page.count("Plotly.newPlot") >= 4 and "What pruning a head changes" in page
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", page)
    # the library stands in it once
    assert len(page) < 8_000_000


def test_a_profile_is_a_plain_value():
    some = torch.rand(1, 2, 3)
    assert isinstance(
        HopProfile(some, some[..., 0], some[..., 0], some[..., 0], torch.ones(3), (3, 3)).per_key(), torch.Tensor
    )


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.slow
def test_heads_of_a_reader_of_digits(record):
    model = trained(steps=1500, cells=True)
    images, labels = digits("test")
    images, _ = in_a_cell(images, torch.Generator().manual_seed(9))
    batch = [(images, labels)]
    importance = {mode: head_importance(model, batch, mode=mode) for mode in ("zero", "mean", "taylor")}
    slopes = importance["taylor"].values["loss"]
    agreement = {
        f"{metric}, {mode}": correlation(importance[mode].values[metric], slopes)
        for mode in ("zero", "mean")
        for metric in METRICS
    }
    tape = record_of(model, {"pixel_values": images[:64]})
    hops, far = hop_profile(tape), mean_attention_distance(tape)
    uniform = mean_attention_distance((torch.full((1, 1, 64, 64), 1 / 64),), grid=(8, 8))
    order = importance["zero"].values["loss"].flatten().argsort()
    halves = {
        name: joint_importance(model, batch, [divmod(i, 4) for i in some.tolist()])
        for name, some in (("six least", order[:6]), ("six most", order[6:]))
    }
    record(
        {
            "task": "a digit in one of four cells of noise, 64 patches, 3 layers of 4 heads, 397 images of the test split",
            "accuracy": importance["zero"].whole["acc"],
            "loss_without_each_head": [
                [round(x, 4) for x in row] for row in importance["zero"].values["loss"].tolist()
            ],
            "slope_of_each_gate": [[round(x, 4) for x in row] for row in slopes.tolist()],
            "correlation_of_slopes": {name: round(value, 3) for name, value in agreement.items()},
            "mean_distance": [[round(x, 3) for x in row] for row in far.values.tolist()],
            "mean_distance_of_uniform_attention": round(float(uniform.values), 3),
            "share_within_one_hop": [[round(x, 3) for x in row] for row in hops.values[..., :2].sum(-1).tolist()],
            "pruned_together": halves,
        }
    )
    assert importance["zero"].whole["acc"] > 0.8
    assert agreement["loss, zero"] > 0.8
    assert halves["six most"]["loss"] > halves["six least"]["loss"]
