"""Pixels taken away one after the other, against loops and against what must be best; maps against known places."""

from functools import partial
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import (
    OptionError,
    ShapeError,
    faithfulness,
    gradcam,
    linear_approx,
    lrp,
    normgrad,
    pointing_game,
    salient_relevance,
)
from tests.explain.pasted_digits import Pasted, mass, pointed, read_rightly, trained


def network(channels=2, classes=4, size=(5, 6)):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * size[0] * size[1], 8), nn.Tanh(), nn.Linear(8, classes)
    ).eval()


def images(batch=3, channels=2, size=(5, 6)):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def by_hand(model, x, maps, classes, steps, fill):
    """Row by row, pixel by pixel; without equal places."""
    found = torch.zeros(2, len(x), steps + 1)
    for row, (image, values) in enumerate(zip(x, maps[:, 0], strict=True)):
        falling = sorted(range(values.numel()), key=lambda i: -float(values.flatten()[i]))
        for which, order in enumerate((falling, falling[::-1])):
            for step in range(steps + 1):
                changed = image.clone()
                for place in order[: round(len(order) * step / steps)]:
                    y, z = divmod(place, values.shape[1])
                    changed[:, y, z] = image.mean((1, 2)) if fill == "mean" else fill
                with torch.no_grad():
                    found[which, row, step] = model(changed[None]).softmax(-1)[0, classes[row]]
    return found


@pytest.mark.parametrize("fill", ["mean", 0.0, -1.5])
@pytest.mark.parametrize("steps", [4, 7])
def test_curves_are_those_of_a_loop(fill, steps):
    model, x, maps = network(), images(), torch.rand(3, 1, 5, 6)
    classes = torch.tensor([2, 0, 3])
    found = faithfulness(model, x, maps, classes, steps=steps, fill=fill, batch=2)
    wanted = by_hand(model, x, maps, classes, steps, fill)
    torch.testing.assert_close(found.deletion, wanted[0])
    torch.testing.assert_close(found.insertion, wanted[1])
    torch.testing.assert_close(found.shares, torch.arange(steps + 1) / steps)
    # both begin with the image and end with none of it
    assert torch.equal(found.deletion[:, [0, -1]], found.insertion[:, [0, -1]])
    middles = (wanted[..., 1:] + wanted[..., :-1]).mean(2) / 2
    torch.testing.assert_close(torch.stack((found.deletion_area, found.insertion_area)), middles)
    torch.testing.assert_close(found.road, (wanted[1] - wanted[0])[:, 1:-1].mean(1) / 2)


def test_the_class_stays_that_of_the_whole_image():
    model, x, maps = network(), images(), torch.rand(3, 1, 5, 6)
    likeliest = model(x).argmax(-1)
    assert (model(torch.zeros_like(x)).argmax(-1) != likeliest).any()
    given = partial(faithfulness, model, x, maps, fill=0.0)
    assert torch.equal(given().deletion, given(likeliest).deletion)
    logit = given(lambda output: output[:, 1]).deletion
    torch.testing.assert_close(logit[:, 0], model(x)[:, 1].detach())


def test_the_contributions_of_a_linear_model_are_the_best_order():
    """Of all orders of five pixels none falls sooner, or later from the other end."""
    torch.manual_seed(2)
    weight, x = torch.randn(5), torch.rand(1, 1, 1, 5)

    def score(output):
        return output.flatten(1) @ weight

    def read(order):
        maps = torch.zeros(5)
        maps[list(order)] = torch.arange(5.0, 0, -1)
        found = faithfulness(nn.Identity(), x, maps.view(1, 1, 1, 5), score, steps=5, fill=0.0)
        return float(found.deletion_area), float(found.insertion_area)

    every = [read(order) for order in permutations(range(5))]
    best = faithfulness(nn.Identity(), x, x * weight, score, steps=5, fill=0.0)
    assert float(best.deletion_area) == pytest.approx(min(a for a, _ in every), abs=1e-6)
    assert float(best.insertion_area) == pytest.approx(max(b for _, b in every), abs=1e-6)
    worst = faithfulness(nn.Identity(), x, -x * weight, score, steps=5, fill=0.0)
    assert float(worst.road) == pytest.approx(-float(best.road), abs=1e-6) and float(best.road) > 0.1


def hidden_by(x, maps, step, steps, **options):
    """What the model is shown without the most relevant share."""
    seen = []

    def model(images):
        seen.append(images.clone())
        return images.flatten(1)

    faithfulness(model, x, maps, lambda output: output.sum(1), steps=steps, **options)
    return seen[2 * step]


def test_gaps_are_the_weighted_means_of_their_neighbours():
    x, maps = images(2), torch.rand(2, 1, 5, 6)
    for step in (1, 3, 4):
        shown = hidden_by(x, maps, step, 5, noise=0.0)
        for row in range(2):
            gone = maps[row, 0].flatten().argsort(descending=True)[: round(30 * step / 5)].tolist()
            rest = [i for i in range(30) if i not in gone]
            assert torch.equal(shown[row].flatten(1)[:, rest], x[row].flatten(1)[:, rest])
            # the whole system at once
            table, known = torch.zeros(30, 30, dtype=torch.float64), x[row].flatten(1).T.double().clone()
            for i in range(30):
                if i in rest:
                    table[i, i] = 1
                    continue
                known[i] = 0
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        y, z = i // 6 + dy, i % 6 + dx
                        if (dy or dx) and 0 <= y < 5 and 0 <= z < 6:
                            w = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
                            table[i, i] += w
                            table[i, 6 * y + z] -= w
            wanted = torch.linalg.solve(table, known).T.view(2, 5, 6).float()
            torch.testing.assert_close(shown[row], wanted, rtol=1e-3, atol=1e-4)


def test_nothing_left_is_the_mean_and_noise_is_small_and_drawn_by_the_seed():
    x, maps = images(2), torch.rand(2, 1, 5, 6)
    torch.testing.assert_close(hidden_by(x, maps, 4, 4, noise=0.0), x.mean((2, 3), keepdim=True).expand_as(x))
    plain, noisy, same, other = (
        hidden_by(x, maps, 2, 4, noise=noise, seed=seed) for noise, seed in ((0.0, 0), (0.1, 0), (0.1, 0), (0.1, 1))
    )
    gone = plain != x
    assert torch.equal(noisy, same) and not torch.equal(noisy, other)
    assert torch.equal(noisy[~gone], x[~gone]) and 0.05 < float((noisy - plain)[gone].std()) < 0.2


def test_a_blur_keeps_what_is_even_and_takes_what_is_fine():
    maps = torch.rand(1, 1, 40, 30)
    even = hidden_by(torch.full((1, 2, 40, 30), 0.7), maps, 4, 4, fill="blur")
    torch.testing.assert_close(even, torch.full_like(even, 0.7))
    fine = torch.zeros(1, 1, 40, 30)
    fine[..., ::2] = 1
    shown = hidden_by(fine, maps, 4, 4, fill="blur")
    assert (shown - 0.5).abs().max() < 0.05
    spot = torch.zeros(1, 1, 41, 41)
    spot[..., 20, 20] = 1
    shown = hidden_by(spot, torch.rand(1, 1, 41, 41), 4, 4, fill="blur")[0, 0]
    # a Gaussian of 4.1 pixels, the same in every direction
    assert float(shown[20, 24] / shown[20, 20]) == pytest.approx(
        float(torch.tensor(-16 / (2 * 4.1**2)).exp()), rel=1e-3
    )
    torch.testing.assert_close(shown, shown.T)


def test_small_maps_are_enlarged_and_equal_places_have_no_order():
    model, x = network(size=(8, 8)), images(size=(8, 8))
    small = torch.rand(3, 1, 2, 2)
    large = F.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    for steps in (2, 8):
        a, b = (faithfulness(model, x, m, 1, steps=steps, fill=0.0) for m in (small, large))
        assert torch.equal(a.deletion, b.deletion)
    shown = hidden_by(torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), 2, 4, fill=0.0)[0, 0]
    # neither the upper nor the lower half goes first
    assert 4 < int(shown[:4].sum()) < 28


class Reader(nn.Module):
    """Reads the left half alone."""

    def forward(self, x):
        left = x[..., : x.shape[3] // 2].mean((1, 2, 3))
        return torch.stack((left, torch.zeros_like(left)), 1)


def test_road_tells_a_map_that_knows_from_one_that_does_not():
    x = torch.rand(6, 1, 8, 8) + 1
    knows = torch.zeros(6, 1, 8, 8)
    knows[..., :4] = torch.rand(6, 1, 8, 4) + 1
    drawn = faithfulness(Reader(), x, torch.rand(6, 1, 8, 8), 0, fill=0.0)
    good = faithfulness(Reader(), x, knows, 0, fill=0.0)
    assert (good.deletion_area < drawn.deletion_area).all() and (good.insertion_area > drawn.insertion_area).all()
    assert (good.road > 0.05).all() and drawn.road.abs().max() < 0.05


def test_nothing_of_it_is_left():
    model, x = network(), images()
    x.requires_grad_()
    found = faithfulness(model, x, torch.rand(3, 1, 5, 6))
    assert not found.deletion.requires_grad and x.grad is None
    assert all(p.grad is None for p in model.parameters())


def test_pointing_is_a_hit_on_or_near_the_object():
    maps = torch.zeros(3, 1, 6, 8)
    maps[0, 0, 1, 2] = maps[1, 0, 5, 7] = maps[2, 0, 1, 5] = 2.0
    maps[1, 0, 0, 0], maps[2, 0, 0, 0] = 1.0, -4.0
    objects = torch.zeros(3, 1, 6, 8, dtype=torch.bool)
    objects[:, :, 0:2, 1:4] = True
    found = pointing_game(maps, objects)
    assert found.hits.tolist() == [True, False, False] and found.accuracy == pytest.approx(1 / 3)
    torch.testing.assert_close(found.mass, torch.tensor([1.0, 0.0, 0.0]))
    # the last one is two pixels to the right
    for tolerance, hits in ((1.9, False), (2.0, True)):
        assert pointing_game(maps, objects, tolerance=tolerance).hits.tolist() == [True, False, hits]
    wide = F.interpolate(objects.float(), (12, 16)).bool()
    assert torch.equal(pointing_game(maps, wide).hits, found.hits)
    silent = pointing_game(torch.zeros(3, 1, 6, 8), objects)
    assert silent.mass.tolist() == [0, 0, 0]


def test_pointing_is_what_the_test_of_digits_counts():
    data = Pasted()
    _, _, cells = data.draw(data.test[:50])
    maps = torch.rand(50, 1, 16, 16)
    objects = torch.zeros(50, 1, 16, 16, dtype=torch.bool)
    for row, cell in enumerate(cells.tolist()):
        objects[row, 0, 8 * (cell // 2) : 8 * (cell // 2) + 8, 8 * (cell % 2) : 8 * (cell % 2) + 8] = True
    found = pointing_game(maps, objects)
    assert found.accuracy == pytest.approx(pointed(maps, cells)) and 0 < found.accuracy < 1
    torch.testing.assert_close(found.mass, mass(maps, cells))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"maps": torch.rand(3, 5, 6)}, ShapeError, r"maps \(B, 1, h, w\), not"),
        ({"maps": torch.rand(2, 1, 5, 6)}, ShapeError, "images are"),
        ({"maps": torch.full((3, 1, 5, 6), torch.nan)}, OptionError, "not finite"),
        ({"steps": 1}, OptionError, "steps is at least 2"),
        ({"noise": -1.0}, OptionError, "noise 0 or more"),
        ({"batch": 0}, OptionError, "batch at least 1"),
        ({"fill": "blurr"}, OptionError, "fill is one of linear, mean, blur"),
        ({"target": 4}, OptionError, "classes 0 to 3"),
    ],
)
def test_what_cannot_be_is_refused(options, error, message):
    options = {"maps": torch.rand(3, 1, 5, 6), **options}
    with pytest.raises(error, match=message):
        faithfulness(network(), images(), options.pop("maps"), options.pop("target", None), **options)


def test_objects_that_are_not_there_are_refused():
    maps, objects = torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    for given, error in ((objects.float(), ShapeError), (objects[:1], ShapeError), (objects & False, OptionError)):
        with pytest.raises(error):
            pointing_game(maps, given)
    with pytest.raises(OptionError, match="tolerance is 0 or more"):
        pointing_game(maps, objects, tolerance=-1)


def test_figures():
    found = faithfulness(network(), images(), torch.rand(3, 1, 5, 6), steps=4)
    assert [len(trace.y) for trace in found.figure().data] == [5, 5]
    game = pointing_game(torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4) > 0.5)
    assert "point at the object" in game.figure().layout.title.text


@pytest.mark.slow
def test_faithfulness_of_maps_of_pasted_digits(record):
    data = Pasted()
    model = trained(data, epochs=30)
    x, labels, cells, accuracy = read_rightly(model, data, 100)
    maps = {
        "normgrad": normgrad(model, x, labels, layer="3"),
        "gradcam": gradcam(model, x, labels, layer="5"),
        "gradcam, eigen_smooth": gradcam(model, x, labels, layer="5", eigen_smooth=True),
        "gradient times activation": linear_approx(model, x, labels, layer="3"),
        "relevance": lrp(model, x, labels).pixels,
        "salient relevance": salient_relevance(model, x, labels, size=100).saliency,
        "drawn": torch.rand(len(x), 1, 16, 16),
    }
    figures = {}
    for name, some in maps.items():
        figures[name] = {"mass on the digit's cell": round(float(mass(some.clamp(min=0), cells).nanmean()), 3)}
        for fill in ("linear", 0.0):
            found = faithfulness(model, x, some, labels, fill=fill)
            figures[name][f"filled by {'0' if fill == 0 else fill}"] = {
                "deletion": round(float(found.deletion_area.mean()), 3),
                "insertion": round(float(found.insertion_area.mean()), 3),
                "road": round(float(found.road.mean()), 3),
            }
    record({"accuracy": accuracy, "images": len(x), "maps": figures})
    for name, line in figures.items():
        if name != "drawn":
            assert line["filled by linear"]["road"] > figures["drawn"]["filled by linear"]["road"] + 0.1, name
    assert abs(figures["drawn"]["filled by linear"]["road"]) < 0.05
