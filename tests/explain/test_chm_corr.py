"""Answers by examples: ranking and votes by a loop, edits without new features, and the page, driven in a browser."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from regard import CHMNet, CHMSettings, CorrespondenceClassifier, OptionError, ShapeError

CHROMIUM = Path("/usr/bin/chromium")


def same(x):
    return x


def identity(features, others):
    return torch.arange(features[0].numel()).expand(len(others), -1)


def scene(count=40, classes=4, width=6, side=7, seed=0):
    """Pictures (count, width, side, side) that are their own features, and labels; the last ten repeat the first ten."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, width, side, side, generator=generator) + 0.5
    images[-10:] = images[:10]
    return images, torch.randint(classes, (count,), generator=generator)


def fitted(images, labels, **options):
    return CorrespondenceClassifier(same, **{"n": 12, "k": 5, **options}).fit(images, labels)


def nearest_by_hand(images, x, n):
    means = F.normalize(images.double().mean((2, 3)), dim=-1) @ F.normalize(x.double().mean((1, 2)), dim=-1)
    return sorted(range(len(images)), key=lambda i: (-round(float(means[i]), 9), i))[:n]


def by_hand(images, labels, x, *, n, k, threshold=0.55, top=5, mask=None):
    """(label, votes, ids in order, scores) by loops."""
    f = x.double().flatten(1).T
    count = len(f)
    scored = []
    for place, i in enumerate(nearest_by_hand(images, x, n)):
        g = images[i].double().flatten(1).T
        plain = (F.normalize(f, dim=-1) @ F.normalize(g, dim=-1).T).tolist()
        table = [[max(v, 0) for v in row] for row in plain]
        columns = [max(row[q] for row in table) for q in range(count)]
        importance = (f @ g.T).sum(1).tolist()
        c = []
        for p, row in enumerate(table):
            kept = [v * v * v / max(row) / columns[q] if v > 0 else 0.0 for q, v in enumerate(row)]
            c.append(plain[p][kept.index(max(kept))])
        if mask is None:
            low, high = min(importance), max(importance)
            kept = [v if (s - low) / (high - low) >= threshold else 0.0 for v, s in zip(c, importance, strict=True)]
            score = sum(sorted(kept)[-top:]) / top
        else:
            score = sum(v for v, on in zip(c, mask.flatten().tolist(), strict=True) if on) / count
        scored.append((-round(score, 7), place, i))
    scored.sort()
    votes: dict[int, int] = {}
    for _, _, i in scored[:k]:
        votes[int(labels[i])] = votes.get(int(labels[i]), 0) + 1
    label = min(votes, key=lambda one: (-votes[one], one))
    return label, votes, [i for *_, i in scored], [-s for s, *_ in scored]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mask", [None, torch.eye(7, dtype=torch.bool), torch.ones(7, 7).int()])
def test_ranking_and_votes_equal_a_loop(seed, mask):
    images, labels = scene(seed=seed)
    # near picture 2, which is also picture 32: equal scores
    x = images[2] + 0.3 * torch.randn(6, 7, 7)
    found = fitted(images, labels).predict(x, mask)
    label, votes, ids, scores = by_hand(images, labels, x, n=12, k=5, mask=mask)
    assert (found.label, found.votes) == (label, votes)
    assert list(found.votes.values()) == sorted(votes.values(), reverse=True)
    assert found.neighbours.tolist() == ids
    torch.testing.assert_close(found.scores, torch.tensor(scores, dtype=torch.float64), rtol=0, atol=2e-7)
    assert {2, 32} <= set(ids) and ids.index(32) == ids.index(2) + 1


@pytest.mark.parametrize("matcher", ["mutual_cosine", identity])
def test_a_picture_learned_by_heart_is_its_own_best_neighbour(matcher):
    images, labels = scene()
    found = fitted(images, labels, matcher=matcher).predict(images[17])
    assert int(found.neighbours[0]) == 17 and float(found.scores[0]) == 1
    assert torch.equal(found.similarities[0], torch.ones(7, 7, dtype=torch.float64))
    assert torch.equal(found.pairs[0], torch.arange(49).view(7, 7))
    assert float(found.scores[1]) < 1


def test_all_cells_are_the_plain_mean_and_none_is_refused():
    images, labels = scene()
    found = fitted(images, labels).predict(images[3] + 0.2 * torch.randn(6, 7, 7))
    whole = found.edit(torch.ones(7, 7, dtype=torch.bool))
    torch.testing.assert_close(whole.scores, whole.similarities.mean((1, 2)), rtol=0, atol=1e-15)
    with pytest.raises(OptionError, match="choose at least one cell"):
        found.edit(torch.zeros(7, 7, dtype=torch.bool))
    # the rule of an edit is the mean over all cells, not over those chosen
    one = torch.zeros(7, 7, dtype=torch.bool)
    one[2, 5] = True
    assert torch.equal(found.edit(one).scores, found.edit(one).similarities[:, 2, 5] / 49)


def test_equal_votes_go_to_the_smaller_class():
    images, _ = scene(count=30)
    labels = torch.tensor([3, 1] * 15)
    found = fitted(images, labels, n=30, k=30).predict(images[0])
    assert found.votes == {1: 15, 3: 15} and list(found.votes) == [1, 3] and found.label == 1


def test_where_all_neighbours_vote_patches_change_nothing():
    images, labels = scene(count=60)
    learned = fitted(images, labels, n=20, k=20)
    for seed in range(5):
        x = torch.randn(6, 7, 7, generator=torch.Generator().manual_seed(seed))
        found = learned.predict(x)
        assert found.votes == found.nearest_votes == found.edit(torch.eye(7).int()).votes
        nearest = nearest_by_hand(images, x, 20)
        votes = [int(labels[i]) for i in nearest]
        assert found.label == max(sorted(set(votes)), key=votes.count)
        assert sorted(found.neighbours.tolist()) == sorted(nearest) != found.neighbours.tolist()


def test_an_edit_computes_no_features():
    calls = []

    def counted(x):
        calls.append(len(x))
        return x

    def matcher(features, others):
        calls.append("match")
        return identity(features, others)

    images, labels = scene()
    learned = CorrespondenceClassifier(counted, matcher, n=12, k=5).fit(images, labels)
    assert calls == [40]
    found = learned.predict(images[0])
    assert calls == [40, 1, "match"]
    for mask in (torch.eye(7).bool(), torch.ones(7, 7).bool(), None):
        edited = found.edit(mask)
        assert edited.near is found.near and edited.edit(None).votes == found.votes
    assert calls == [40, 1, "match"]


def test_the_matcher_follows_an_object_that_moves_by_other_rows_than_columns():
    generator = torch.Generator().manual_seed(1)
    thing = torch.rand(16, 3, 3, generator=generator) * 3

    def at(y, x):
        picture = 0.05 * torch.rand(16, 7, 7, generator=generator)
        picture[:, y : y + 3, x : x + 3] = thing
        return picture

    others = torch.rand(20, 16, 7, 7, generator=generator)
    start, moved = at(2, 1), at(1, 3)
    images = torch.cat((start[None], moved[None], others))
    learned = fitted(images, torch.arange(22), n=22)
    object_cells = torch.zeros(7, 7, dtype=torch.bool)
    object_cells[2:5, 1:4] = True
    for mask in (None, object_cells):
        found = learned.predict(start, mask)
        ranks = found.neighbours.tolist()
        assert ranks[:2] == [0, 1]
        pairs = found.pairs[1]
        for y in range(2, 5):
            for x in range(1, 4):
                assert int(pairs[y, x]) == (y - 1) * 7 + x + 2
        drop = 1 - float(found.scores[1] / found.scores[0])
        assert drop < 0.01
    # without following the score falls
    still = fitted(images, torch.arange(22), n=22, matcher=identity).predict(start, object_cells)
    assert float(still.scores[still.neighbours.tolist().index(1)]) < 0.9 * float(still.scores[0])


def test_the_importance_is_that_of_the_paper():
    images, labels = scene(count=20)
    x = images[4] + 0.1 * torch.randn(6, 7, 7)
    found = fitted(images, labels).predict(x)
    f, g = x.double().flatten(1).T, images[int(found.neighbours[0])].double().flatten(1).T
    table = (f / f.mean(0).norm() / 49) @ (g / g.mean(0).norm() / 49).T
    s = table.sum(1)
    torch.testing.assert_close(found.heat[0].flatten(), (s - s.min()) / (s.max() - s.min()))


def test_a_map_without_differences_leaves_every_cell_in():
    images = torch.ones(12, 4, 7, 7) * torch.rand(12, 4, 1, 1)
    found = fitted(images, torch.arange(12)).predict(images[5])
    assert bool((found.heat == 1).all()) and int(found.neighbours[0]) == 5 and float(found.scores[0]) == 1


def test_cells_without_features_are_like_nothing():
    images = torch.zeros(12, 4, 7, 7)
    images[:, :, 3, 3] = torch.rand(12, 4) + 0.1
    found = fitted(images, torch.arange(12)).predict(images[5])
    assert int(found.neighbours[0]) == 5 and bool(found.scores.isfinite().all())
    assert float(found.similarities[0, 3, 3]) == 1 and float(found.similarities[0].sum()) == 1
    # one cell is in the mask, and the mean is still over five
    assert float(found.scores[0]) == 0.2


def test_cells_that_hinder_are_left_out_by_an_edit():
    """Two classes differ in the object's cells alone; clutter like the other class's pictures is nearer on the whole."""
    generator = torch.Generator().manual_seed(0)
    things = torch.rand(2, 8, 2, 2, generator=generator)
    clutter = torch.rand(2, 8, 7, 7, generator=generator)
    images, labels = [], torch.arange(40) % 2
    for label in labels.tolist():
        picture = clutter[label] + 0.3 * torch.rand(8, 7, 7, generator=generator)
        picture[:, 1:3, 2:4] = things[label]
        images.append(picture)
    x = clutter[1].clone()
    x[:, 1:3, 2:4] = things[0]
    found = fitted(torch.stack(images), labels, n=40, k=15).predict(x)
    assert next(iter(found.nearest_votes)) == found.label == 1
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[1:3, 2:4] = True
    assert found.edit(mask).label == 0 and found.edit(mask).votes == {0: 15}
    assert found.edit(~mask).label == 1


def test_pictures_are_matched_by_a_network_of_pictures():
    net = CHMNet(CHMSettings(stem_dim=8, dims=(8, 16), depths=(1, 1), side=32)).eval()
    images, labels = torch.rand(14, 3, 28, 28), torch.arange(14) % 3
    learned = CorrespondenceClassifier(nn.AvgPool2d(4), net, n=6, k=3).fit(images, labels)
    found = learned.predict(images[3])
    assert torch.equal(found.near.pairs.flatten(1), net.cells(images[3], found.near.images, (7, 7)))
    for rank in range(6):
        f, g = F.avg_pool2d(images[3], 4).flatten(1), F.avg_pool2d(images[found.neighbours[rank]], 4).flatten(1)
        expected = F.cosine_similarity(f, g[:, found.pairs[rank].flatten()], dim=0)
        torch.testing.assert_close(found.similarities[rank].flatten().float(), expected, rtol=0, atol=1e-5)


def test_the_best_pairs_of_a_neighbour():
    images, labels = scene()
    found = fitted(images, labels).predict(images[3] + 0.5 * torch.randn(6, 7, 7))
    for rank in (0, 4):
        pair = found.correspondence(rank)
        assert pair.id == int(found.neighbours[rank]) and pair.label == int(labels[pair.id])
        counted = found.similarities[rank].flatten() * (found.heat[rank] >= 0.55).flatten()
        torch.testing.assert_close(pair.similarities, counted.topk(5).values)
        assert torch.equal(pair.matches, found.pairs[rank].flatten()[pair.cells])
        torch.testing.assert_close(pair.similarities.mean(), found.scores[rank])
    edited = found.edit(torch.eye(7).bool()).correspondence()
    assert sorted(edited.cells.tolist()) == [8 * i for i in range(7)]
    assert edited.similarities.tolist() == sorted(edited.similarities.tolist(), reverse=True)
    with pytest.raises(OptionError, match="rank is 0 to 11, not 12"):
        found.correspondence(12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 60}, "k at most n, which is 50"),
        ({"k": 0}, "at least 1"),
        ({"top": 50}, "top 50 is a number of the 49 cells"),
        ({"threshold": 1.5}, "lies in 0 to 1"),
        ({"matcher": "chm"}, "give a CHMNet"),
        ({"matcher": "cosine"}, '"mutual_cosine"'),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        CorrespondenceClassifier(same, **options)


def test_pictures_that_cannot_be_learned_are_refused():
    images, labels = scene()
    settings = CorrespondenceClassifier(same, n=12, k=5)
    with pytest.raises(OptionError, match="need labels"):
        settings.fit(images, None)
    with pytest.raises(OptionError, match="1 pictures have no label"):
        settings.fit(images, torch.cat((labels[:-1], torch.tensor([-1]))))
    with pytest.raises(ShapeError, match=r"labels \(39,\)"):
        settings.fit(images, labels[:-1])
    with pytest.raises(OptionError, match="n=12 neighbours cannot be found"):
        settings.fit(images[:8], labels[:8])
    with pytest.raises(ShapeError, match=r"\(40, 6, 7, 7\) of 40 pictures; \(40, D, 5, 5\) is required"):
        CorrespondenceClassifier(same, grid=5, n=12, k=5).fit(images, labels)
    with pytest.raises(OptionError, match="there are 2 names"):
        settings.fit(images, labels, names=("a", "b"))


def test_questions_that_cannot_be_answered_are_refused():
    images, labels = scene()
    learned = fitted(images, labels)
    with pytest.raises(ShapeError, match="it is one picture"):
        learned.predict(images[:1])
    with pytest.raises(ShapeError, match=r"must be \(7, 7\)"):
        learned.predict(images[0], torch.ones(49))
    with pytest.raises(OptionError, match="nothing between"):
        learned.predict(images[0], torch.full((7, 7), 0.5))
    for matcher, error, message in (
        (lambda f, g: torch.zeros(len(g), 48).long(), ShapeError, r"\(12, 48\) torch.int64; int64 \(12, 49\)"),
        (lambda f, g: torch.full((len(g), 49), 49), OptionError, "names cells 49 to 49; there are 0 to 48"),
    ):
        with pytest.raises(error, match=message):
            fitted(images, labels, matcher=matcher).predict(images[0])


def read_png(address):
    raw = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return torch.from_numpy(np.array(Image.open(io.BytesIO(raw)))).permute(2, 0, 1)


def coloured(count=24, classes=3):
    """Pictures of colours between 0 and 1, side 28, and features of 7 x 7; the second half repeats the first."""
    generator = torch.Generator().manual_seed(5)
    images = F.interpolate(torch.rand(count, 3, 7, 7, generator=generator), (28, 28))
    images[count // 2 :] = images[: count // 2]
    labels = torch.randint(classes, (count,), generator=generator)
    learned = CorrespondenceClassifier(nn.AvgPool2d(4), n=16, k=4).fit(images, labels, names=("a <b>", "bee", "sea"))
    return images, learned.predict(images[1] * 0.9 + 0.1 * torch.rand(3, 28, 28, generator=generator))


def data_of(path):
    return json.loads(path.read_text().partition('id="data">')[2].partition("</script>")[0])


def test_the_page_holds_what_was_found(tmp_path):
    images, found = coloured()
    found.write(tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert torch.equal(
        torch.tensor(data["similarities"], dtype=torch.float64) * data["step"], found.near.similarities.flatten(1)
    )
    assert torch.equal(torch.tensor(data["pairs"]), found.near.pairs.flatten(1))
    assert torch.equal(torch.tensor(data["automatic"]).bool(), found.near.automatic.flatten(1))
    assert data["ids"] == found.near.ids.tolist() and data["mask"] is None and data["names"]["0"] == "a <b>"
    shown = read_png(data["images"][0])
    assert torch.equal(shown, (images[found.near.ids[0]] * 255).round().to(torch.uint8))
    assert "a <b>" not in (tmp_path / "page.html").read_text()
    found.edit(torch.eye(7).int()).write(tmp_path / "edited.html")
    assert data_of(tmp_path / "edited.html")["mask"] == torch.eye(7).int().flatten().tolist()


def test_pictures_of_any_range_and_size_are_shown(tmp_path):
    images = torch.randn(6, 2, 300, 150)
    learned = CorrespondenceClassifier(nn.AdaptiveAvgPool2d(7), n=3, k=3).fit(images, torch.arange(6))
    learned.predict(images[0]).write(tmp_path / "page.html")
    shown = read_png(data_of(tmp_path / "page.html")["query"])
    assert shown.shape == (3, 224, 112) and torch.equal(shown[0], shown[1]) and int(shown.max()) > int(shown.min())


def test_figures_show_the_pairs():
    _, found = coloured()
    figure = found.figure(3)
    assert len(figure.layout.images) == 4 and figure.layout.annotations[0].text.startswith("<b>")
    best = found.correspondence(0)
    assert len(figure.data[1].x) == 5 and len(figure.data[0].x) >= 5
    pair = best.figure()
    lines = [trace for trace in pair.data if trace.mode == "lines"]
    assert len(pair.layout.images) == 2 and len(lines) == 5
    row, column = divmod(int(best.cells[0]), 7)
    assert (lines[0].x[0], lines[0].y[0]) == ((column + 0.5) / 7, 1 - (row + 0.5) / 7)
    row, column = divmod(int(best.matches[0]), 7)
    assert lines[0].y[1] == 1 - (row + 0.5) / 7 and lines[0].x[1] > 1


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def read_page(page):
    """(label, votes, ids and scores in order) as a person sees them."""
    label = int(page.locator("#label").get_attribute("data-label"))
    votes = {
        int(a): int(b)
        for a, b in page.eval_on_selector_all("#votes li", "x => x.map(e => [e.dataset.label, e.dataset.votes])")
    }
    cards = "#voting button, #silent button"
    ids = page.eval_on_selector_all(cards, "x => x.map(e => Number(e.dataset.id))")
    scores = page.eval_on_selector_all(cards, "x => x.map(e => Number(e.dataset.score))")
    return label, votes, ids, scores


def mask_on(page):
    pressed = page.eval_on_selector_all("#cells button", 'x => x.map(e => e.getAttribute("aria-pressed") === "true")')
    return torch.tensor(pressed).view(7, 7)


def as_page(prediction):
    """The same of a prediction; every number is to be the same, bit for bit."""
    return prediction.label, prediction.votes, prediction.neighbours.tolist(), prediction.scores.tolist()


def test_the_page_edits_as_python_does(tmp_path, browser):
    _, found = coloured()
    found.write(tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 1200, "height": 1000}, reduced_motion="reduce")
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{tmp_path / 'page.html'}")
    first = read_page(page)
    assert first == as_page(found)
    assert torch.equal(mask_on(page), found.selected)
    # a cell that counts for exactly half of those that vote is shown as one that counts
    halves = found.near.automatic[found.order[:4]].sum(0) == 2
    assert halves.any() and found.selected[halves].all()
    # each picture is learned twice: half of the scores are equal
    assert len(set(first[3])) < len(first[3])

    # the first click starts from the mask that is shown
    page.click('[data-cell="3"]')
    mask = found.selected.clone()
    mask[0, 3] ^= True
    assert torch.equal(mask_on(page), mask) and read_page(page) == as_page(found.edit(mask))

    generator = torch.Generator().manual_seed(0)
    answers = set()
    for count in (1, 2, 5, 12, 30):
        page.click("#none")
        for cell in torch.randperm(49, generator=generator)[:count].tolist():
            page.click(f'[data-cell="{cell}"]')
        mask = mask_on(page)
        assert int(mask.sum()) == count
        seen = read_page(page)
        assert seen == as_page(found.edit(mask))
        answers.add((seen[0], tuple(seen[2])))
        assert f"{count} of 49 cells count" in page.locator("#said").inner_text()
        assert page.locator("#links line").count() == 2 * count
    assert len(answers) > 3

    page.click("#invert")
    assert torch.equal(mask_on(page), ~mask) and read_page(page) == as_page(found.edit(~mask))
    page.click("#all")
    whole = as_page(found.edit(torch.ones(7, 7)))
    assert read_page(page) == whole
    # no cell: it says so and keeps the last answer
    page.click("#none")
    assert "No cell is chosen" in page.locator("#said").inner_text()
    assert read_page(page) == whole and not mask_on(page).any()
    page.click("#automatic")
    assert read_page(page) == first and torch.equal(mask_on(page), found.selected)
    assert page.locator("#automatic").get_attribute("aria-pressed") == "true"
    assert not errors
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_the_page_is_worked_by_keys_by_drawing_and_by_touch(tmp_path, browser):
    _, found = coloured()
    found.write(tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 1200, "height": 1000}, reduced_motion="reduce")
    page.goto(f"file://{tmp_path / 'page.html'}")
    page.focus("#none")
    page.keyboard.press("Enter")
    page.focus("#invert")
    # one tab leads into the cells, one out of them
    for key in (
        "Tab",
        "ArrowRight",
        "ArrowDown",
        "ArrowDown",
        "Space",
        "End",
        "Space",
        "ArrowRight",
        "ArrowUp",
        "Enter",
    ):
        page.keyboard.press(key)
    wanted = torch.zeros(7, 7, dtype=torch.bool)
    wanted[2, 1] = wanted[2, 6] = wanted[1, 6] = True
    assert torch.equal(mask_on(page), wanted) and read_page(page) == as_page(found.edit(wanted))
    page.keyboard.press("Space")
    wanted[1, 6] = False
    assert torch.equal(mask_on(page), wanted) and read_page(page) == as_page(found.edit(wanted))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.id") == str(int(found.edit(wanted).neighbours[0]))

    box = page.locator("#cells").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5 / 7, box["y"] + box["height"] * 4.5 / 7)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 3.5 / 7, box["y"] + box["height"] * 4.5 / 7, steps=8)
    page.mouse.up()
    page.mouse.move(box["x"] + box["width"] * 5.5 / 7, box["y"] + box["height"] * 4.5 / 7, steps=4)
    wanted[4, :4] = True
    assert torch.equal(mask_on(page), wanted) and read_page(page) == as_page(found.edit(wanted))

    # another neighbour is shown, and the answer stays
    page.locator("#voting button").nth(2).click()
    other = found.edit(wanted).correspondence(2)
    assert f"{other.score:.3f}" in page.locator("#which").inner_text()
    assert read_page(page) == as_page(found.edit(wanted))

    touched = browser.new_context(has_touch=True, viewport={"width": 390, "height": 800}).new_page()
    touched.goto(f"file://{tmp_path / 'page.html'}")
    touched.tap("#none")
    touched.tap('[data-cell="8"]')
    wanted = torch.zeros(7, 7, dtype=torch.bool)
    wanted[1, 1] = True
    assert torch.equal(mask_on(touched), wanted) and read_page(touched) == as_page(found.edit(wanted))
    assert touched.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_tells_equal_votes_and_where_a_mask_was_given(tmp_path, browser):
    images, _ = scene(count=20)
    learned = CorrespondenceClassifier(same, n=20, k=20).fit(images, torch.arange(20) % 2, names=("first", "second"))
    found = learned.predict(images[7], torch.eye(7))
    assert found.votes == {0: 10, 1: 10}
    found.write(tmp_path / "page.html")
    page = browser.new_page(reduced_motion="reduce")
    page.goto(f"file://{tmp_path / 'page.html'}")
    assert read_page(page) == as_page(found) and torch.equal(mask_on(page), torch.eye(7).bool())
    assert page.locator("#tie").inner_text() == "first and second have equally many votes: the first class wins."
    assert page.locator("#silent").count() == 0 and page.locator("#label").inner_text() == "first"


class Digits:
    """Digits of 16 x 16 pixels somewhere in 28 x 28, alone or over pieces of other digits."""

    def __init__(self):
        from sklearn.datasets import load_digits

        data = load_digits()
        self.labels = torch.tensor(data.target)
        self.large = F.interpolate(torch.tensor(data.images).float()[:, None] / 16, (16, 16), mode="bilinear")[:, 0]
        self.generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.labels), generator=self.generator)
        self.train, self.test = order[:1400], order[1400:]

    def draw(self, which, pieces):
        """Images (n, 1, 28, 28) and the digits' cells, bool (n, 7, 7)."""
        count = len(which)
        images, cells = torch.zeros(count, 1, 28, 28), torch.zeros(count, 7, 7, dtype=torch.bool)

        def random(high, shape):
            return torch.randint(high, shape, generator=self.generator).tolist()

        places, others = random(4, (count, 2)), self.train[random(len(self.train), (count, pieces))]
        cuts, spots = random(3, (count, pieces, 2)), random(21, (count, pieces, 2))
        for i, (y, x) in enumerate(places):
            for other, (cut_y, cut_x), (to_y, to_x) in zip(others[i], cuts[i], spots[i], strict=True):
                piece = self.large[other, 4 * cut_y : 4 * cut_y + 8, 4 * cut_x : 4 * cut_x + 8]
                spot = images[i, 0, to_y : to_y + 8, to_x : to_x + 8]
                spot.copy_(torch.maximum(spot, piece))
            images[i, 0, 4 * y : 4 * y + 16, 4 * x : 4 * x + 16] = self.large[which[i]]
            cells[i, y : y + 4, x : x + 4] = True
        return images, cells


def reader(data, pool, epochs=12, batch=64):
    """The features (B, 64, 7, 7) of a small network that has learned to read digits without clutter."""

    def conv(a, b, stride=1):
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())

    torch.manual_seed(0)
    features = nn.Sequential(conv(1, 16), conv(16, 32, 2), conv(32, 32), conv(32, 64, 2), conv(64, 64))
    model = nn.Sequential(features, pool, nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * -(-len(data.train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(epochs):
        which = data.train[torch.randperm(len(data.train), generator=data.generator)]
        images, _ = data.draw(which, 0)
        for start in range(0, len(which), batch):
            rows = slice(start, start + batch)
            loss = F.cross_entropy(model(images[rows]), data.labels[which[rows]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return features.eval()


@pytest.mark.slow
def test_digits_are_read_by_examples(record):
    pools = {"largest": nn.AdaptiveMaxPool2d(1), "mean": nn.AdaptiveAvgPool2d(1)}
    figures = {}
    for name, pool in pools.items():
        data = Digits()
        features = reader(data, pool)
        images, _ = data.draw(data.train, 0)
        learned = CorrespondenceClassifier(features).fit(images, data.labels[data.train])
        for pieces in (0, 4):
            queries, cells = data.draw(data.test, pieces)
            right = dict.fromkeys(("nearest", "automatic", "digit_chosen", "digit_left_out"), 0)
            for x, mine, truth in zip(queries, cells, data.labels[data.test].tolist(), strict=True):
                found = learned.predict(x)
                right["nearest"] += next(iter(found.nearest_votes)) == truth
                right["automatic"] += found.label == truth
                right["digit_chosen"] += found.edit(mine).label == truth
                right["digit_left_out"] += found.edit(~mine).label == truth
            percent = {way: round(100 * count / len(queries), 1) for way, count in right.items()}
            figures[f"pooled by the {name}, {pieces} pieces of clutter"] = percent
    record({"percent_right": figures, "test_pictures": len(data.test), "n": 50, "k": 20})
    for percent in figures.values():
        assert percent["automatic"] >= percent["nearest"] - 1
    cluttered = figures["pooled by the largest, 4 pieces of clutter"]
    assert cluttered["digit_chosen"] >= cluttered["nearest"] + 5
    assert cluttered["digit_chosen"] > cluttered["digit_left_out"] + 5
