"""The page of a model's heads: what it holds is what was recorded, and it opens offline."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import regard
from regard import OptionError, overview
from regard import record as record_once
from regard.cli.main import main
from regard.hosts.transformers.specimens import make, prompt

CHROMIUM = Path("/usr/bin/chromium")


def data_of(page):
    text = page.partition('id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_the_page_holds_the_recorded_weights(tmp_path):
    model, ids = make("llama"), prompt(batch=1, length=30)["input_ids"]
    seen = overview(model, ids)
    seen.write(tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text())
    weights = record_once(model, ids).stack("weights")[:, 0]
    for layer in range(3):
        for head in range(4):
            raw = np.frombuffer(zlib.decompress(base64.b64decode(data["tables"][layer][head])), dtype=np.uint8)
            shown = (torch.from_numpy(raw.reshape(30, 30).astype("float32")) / 255) ** 2
            assert (shown - weights[layer, head]).abs().max() < 0.005
    assert [m["title"] for m in data["maps"]][:2] == ["weight on the first token", "entropy of the weights"]
    torch.testing.assert_close(torch.tensor(data["maps"][0]["values"]), weights[..., 1:, 0].mean(-1), rtol=0, atol=1e-3)
    assert len(data["maps"]) == 5 and data["tokens"] == [str(i) for i in ids[0].tolist()]


def test_encoders_have_no_kinds_and_pictures_a_grid(tmp_path):
    bert = overview(make("bert"), prompt(batch=1, length=12)["input_ids"], [f"t{i}" for i in range(12)])
    assert bert.kinds is None and bert.tokens[3] == "t3"
    torch.manual_seed(0)
    vit = overview(make("vit"), {"pixel_values": torch.randn(1, 3, 16, 16)})
    assert vit.grid == (4, 4, 1) and len(vit.tokens) == 17
    vit.write(tmp_path / "vit.html")
    assert data_of((tmp_path / "vit.html").read_text())["grid"] == [4, 4, 1]


def test_a_long_input_leaves_the_tables_out(tmp_path):
    model = regard.tiny.lm()[0]
    ids = regard.tiny.note_cases(1, 900).ids
    seen = overview(model, ids, kinds=False)
    assert seen.weights is None and seen.sinks.values.shape == (3, 4)
    seen.write(tmp_path / "page.html")
    assert data_of((tmp_path / "page.html").read_text())["tables"] == []


def test_tiny_lm_shows_its_previous_token_head():
    seen = overview(*regard.tiny.lm()[:1], regard.tiny.note_cases(1, 128).ids)
    assert seen.kinds is not None
    assert seen.kinds.heads("previous", threshold=0.3)[0][0] == 0
    assert json.dumps(seen.summary())


@pytest.mark.parametrize(
    "inputs, tokens, message",
    [
        ({"input_ids": torch.ones(2, 5, dtype=torch.int64)}, None, "not a batch of 2"),
        (
            {"input_ids": torch.ones(1, 5, dtype=torch.int64), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
            None,
            "leave pads out",
        ),
        (torch.ones(1, 5, dtype=torch.int64), ["a"], "1 names for 5 tokens"),
    ],
)
def test_inputs_that_make_no_page_are_refused(inputs, tokens, message):
    with pytest.raises(OptionError, match=message):
        overview(make("llama"), inputs, tokens)


def test_the_command_writes_a_page_of_a_text_and_of_a_picture(tmp_path, capsys):
    assert main(["inspect", "tiny-lm", "def f(x): return x", "--out", str(tmp_path / "a.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 3
    assert (tmp_path / "a.html").stat().st_size > 1e6
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "p.png")
    make("vit").save_pretrained(tmp_path / "vit")
    assert main(["inspect", str(tmp_path / "vit"), str(tmp_path / "p.png"), "--out", str(tmp_path / "b.html")]) == 0
    assert data_of((tmp_path / "b.html").read_text())["grid"] == [4, 4, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [(["nowhere", "text"], "neither tiny-lm nor a folder"), (["tiny-lm", "", "--tokens", "9"], "the text is empty")],
)
def test_what_cannot_be_inspected_is_one_line(arguments, message, capsys, tmp_path):
    assert main(["inspect", *arguments, "--out", str(tmp_path / "x.html")]) == 2
    assert message in capsys.readouterr().err


def test_the_page_works_in_a_browser(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    overview(make("llama"), prompt(batch=1, length=12)["input_ids"]).write(tmp_path / "page.html")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        errors, asked = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{tmp_path / 'page.html'}")
        page.select_option("#layer", "1")
        page.locator("#table").click(position={"x": 5, "y": 60})
        page.wait_for_timeout(300)
        page.locator("#table").hover(position={"x": 5, "y": 60})
        assert "looks at" in page.locator("#said").inner_text()
        assert page.locator("#text span.asks").count() == 1
        assert not errors
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
        browser.close()
