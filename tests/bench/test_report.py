"""The report is one page that opens offline, whatever part of a run it is given; opened and clicked in Chromium."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from regard.bench import report
from regard.bench.results import WriteError
from regard.bench.summary import METRICS
from regard.contract.errors import MissingExtra
from tests.bench.made_results import SYSTEMS, made_results

CHROMIUM = Path("/usr/bin/chromium")
PLOTS = ("text_final", "text_tokens", "text_seconds", "recall_state", "recall_tokens")
COSTS = ("prefill_ms", "decode_ms", "state_bytes", "peak_mib")


def without_speed(lines):
    return [line for line in lines if line["kind"] != "speed"]


def unmeasured(lines):
    return [{**line, **dict.fromkeys(COSTS[1:])} if line["kind"] == "speed" else line for line in lines]


PARTIAL = {
    "nothing": ([], "Nothing has been measured yet."),
    "only asked": (made_results()[:1], "Text has not been measured yet."),
    "text only": (made_results(tasks=("text",)), "Recall was not part of this run."),
    "recall only": (made_results(tasks=("recall",)), "Text was not part of this run."),
    "one length": (made_results(lengths=(2048,)), "Only one length was measured"),
    "one system": (made_results(systems=("based",), seeds=1), "no other system was measured"),
    "no speed": (without_speed(made_results()), "State sizes have not been measured"),
    "empty speed": (unmeasured(made_results()), "decoding and peak memory at 512 tokens not measured"),
    "searching": (made_results(settled=False), "still searching its learning rate"),
    "diverged": (
        made_results(diverged=tuple((task, slug) for task in METRICS for slug in SYSTEMS)),
        "diverged with 2 of 2",
    ),
    "no run line": (made_results()[1:], "All figures"),
    "flat curve": ([{**x, "curve": x["curve"][:1]} if "curve" in x else x for x in made_results()], "All figures"),
    "no curve": ([{**x, "curve": []} if "curve" in x else x for x in made_results()], "After training"),
}


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page of lines, offline; at the end nothing was asked of the network and nothing went wrong."""
    contexts, troubles = [], []

    def open_page(lines, width=1200, scheme="light"):
        path = tmp_path / "report.html"
        report.write_report(lines, path)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: request.url == path.as_uri() or troubles.append(f"asked for {request.url}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def traces(page, plot):
    """system -> whether its traces are visible, as plotly has them."""
    return page.evaluate(
        "id => Object.fromEntries(document.getElementById(id).data.filter(t => t.meta).map(t => [t.meta, t.visible]))",
        plot,
    )


def names(page):
    return page.eval_on_selector_all("#figures tbody tr", "rows => rows.map(row => row.dataset.system)")


def test_the_page_fetches_nothing():
    text = report.page(made_results())
    assert not re.search(r"""<(?:script|link|img|iframe|object|embed)\b[^>]*\b(?:src|href|data)\s*=""", text)
    assert not re.search(r"""\b(?:src|href)\s*=\s*["']?(?:https?:)?//""", text.replace(plotly_js(), ""))
    assert "default-src 'none'" in text and "@import" not in text.replace(plotly_js(), "")
    assert text.count(plotly_js()) == 1


def plotly_js():
    return pytest.importorskip("plotly.offline").get_plotlyjs()


def test_answers_come_first_and_quick_says_that_it_is_rough():
    text = report.page(made_results(quick=True, seeds=1))
    places = [text.index(part) for part in ("These figures are rough", 'id="answers"', 'id="text"', 'id="recall"')]
    places += [text.index(part) for part in ('id="cost"', 'id="table"', 'id="how"')]
    assert places == sorted(places)
    assert "These figures are rough" not in report.page(made_results())


def test_all_text_is_escaped():
    lines = made_results(systems=("softmax",))
    evil = "<img src=x onerror=alert(1)></script>"
    lines[0].update(data=evil, matched=evil, systems={evil: {"title": evil, "options": {evil: evil}}})
    lines[0]["settings"][evil] = evil
    lines[1].update(cpu=evil)
    for line in lines[2:]:
        line.update(system=evil, hardware=evil, engine=evil, regard=evil, reason=evil)
    assert "<img" not in report.page(lines).replace(plotly_js(), "")


def test_a_hostile_name_is_only_text(opened):
    lines = made_results(systems=("softmax",))
    evil = "<b onclick=x>&amp;</b>"
    lines[0]["systems"] = {evil: {"title": evil, "options": {}}}
    for line in lines[2:]:
        line["system"] = evil
    page = opened(lines)
    assert page.locator(".chip").inner_text() == evil
    assert page.locator("#text_final .ytick").text_content() == evil
    assert page.locator("#recall_state .annotation-text").first.text_content() == evil


def test_it_needs_the_bench_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"regard\[bench\]"):
        report.write_report(made_results(), tmp_path / "report.html")


def test_an_older_page_survives_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WriteError, match="No space left"):
        report.write_report(made_results(), path)
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shade", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart_by_everyone(shade):
    colours = np.array([[int(pair[shade][i : i + 2], 16) / 255 for i in (1, 3, 5)] for pair in report.PALETTE])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    # Machado, Oliveira and Fernandes 2009, full severity: normal, protanopia, deuteranopia, tritanopia
    sights = [
        np.eye(3).tolist(),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    one, other = np.triu_indices(len(colours), 1)
    for sight in sights:
        seen = oklab(np.clip(linear @ np.array(sight).T, 0, 1))
        assert np.linalg.norm(seen[one] - seen[other], axis=1).min() > 0.08
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    background = 0.0117 if shade else 1.0
    contrast = (np.maximum(luminance, background) + 0.05) / (np.minimum(luminance, background) + 0.05)
    assert contrast.min() > 2.5


def oklab(linear):
    cones = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        ).T
    )
    return (
        cones
        @ np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        ).T
    )


def test_styles_do_not_repeat():
    styles = [tuple(report.style(index).values()) for index in range(30)]
    assert len(set(styles)) == 30


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (400, "light")])
def test_the_page_fits_and_draws_everything(opened, tmp_path, width, scheme):
    page = opened(made_results(), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for plot in PLOTS + COSTS:
        assert page.locator(f"#{plot} .main-svg").count() > 0
        assert set(traces(page, plot)) == set(SYSTEMS)
    colour = page.evaluate("document.getElementById('decode_ms').data.find(t => t.meta === 'based').line.color")
    assert colour == report.style(SYSTEMS.index("based"))[scheme]
    shot = page.screenshot(full_page=True, path=tmp_path / "report.png")
    assert len(shot) > 100_000


def test_a_chip_hides_a_system_everywhere_and_brings_it_back(opened):
    page = opened(made_results())
    chip = page.locator('.chip[data-system="based"]')
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    for plot in PLOTS + COSTS:
        assert traces(page, plot) == {name: name != "based" for name in SYSTEMS}
    assert page.locator('#figures tr[data-system="based"]').get_attribute("class") == "off"
    page.locator(".all").click()
    assert all(traces(page, "recall_state").values()) and not page.locator(".all").is_visible()


def test_a_double_click_shows_one_system_alone_and_hovering_lights_it(opened):
    page = opened(made_results())
    page.locator('.chip[data-system="sqa"]').hover()
    dim = "document.getElementById('decode_ms').data.filter(t => t.opacity < 1).map(t => t.meta)"
    assert sorted(page.evaluate(dim)) == sorted(set(SYSTEMS) - {"sqa"})
    page.locator('.chip[data-system="sqa"]').dblclick()
    assert traces(page, "decode_ms") == {name: name == "sqa" for name in SYSTEMS}


def test_a_header_sorts_and_what_is_missing_stays_last(opened):
    lines = made_results(diverged=(("text", "linear"),))
    page = opened(lines)
    text = page.locator("#figures thead button", has_text="Text")
    text.click()
    first = names(page)
    assert first[0] == "softmax" and first[-1] == "linear"
    assert page.locator('#figures th[aria-sort="ascending"]').count() == 1
    text.click()
    assert names(page) == [*first[:-1][::-1], "linear"]
    page.locator("#figures thead button", has_text="System").click()
    assert names(page) == sorted(SYSTEMS)


def test_the_choosers_change_length(opened):
    page = opened(made_results())
    shown = "heads => heads.filter(h => !h.hidden).length"
    assert page.eval_on_selector_all("#figures th[data-length]", shown) == 4
    page.locator('[data-chooser="table"] button[data-length="all"]').click()
    assert page.eval_on_selector_all("#figures th[data-length]", shown) == 24
    point = "document.getElementById('recall_state').data.find(t => t.meta === 'softmax').x[0]"
    assert page.evaluate(point) == 4096 * 2048
    page.locator('[data-chooser="recall_state"] button[data-length="16384"]').click()
    assert page.evaluate(point) == 4096 * 16384


def test_colours_follow_the_theme(opened):
    page = opened(made_results())
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "want => document.getElementById('decode_ms').data.find(t => t.meta === 'softmax').line.color === want",
        arg=report.style(0)["dark"],
    )


@pytest.mark.parametrize("name", PARTIAL)
def test_a_partial_run_is_shown_with_what_it_lacks(opened, name):
    lines, says = PARTIAL[name]
    page = opened(lines)
    assert says in page.locator("body").text_content()
    assert page.locator("#how").is_visible()
