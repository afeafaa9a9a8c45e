"""The page of a model's heads: what it holds is what was recorded, and it opens offline."""

import base64
import json
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import regard
from regard import OptionError, overview, retrieval_scores
from regard import record as record_once
from regard.bench.needle.cases import Notes, Text
from regard.cli.main import main
from regard.hosts.transformers.specimens import make, prompt
from tests.minilm import minilm
from tests.text_lm import save_text_lm, text_lm, text_tokenizer

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


def test_retrieval_heads_are_those_of_the_needles_that_were_given(tmp_path):
    model, cases = regard.tiny.lm()[0], Notes(8).cases(200, 0.5, 6)
    seen = overview(model, regard.tiny.note_cases(1, 64).ids, needles=cases, answer=1)
    found = retrieval_scores(model, None, cases, tokens=1)
    assert torch.equal(seen.retrieval.scores, found.scores)
    assert seen.summary()["retrieval_heads"] == found.heads and found.scores[found.heads[0]] >= 0.5
    assert seen.summary()["retrieval"] == f"{int(found.counted.sum())} of 6 needles were recalled"
    seen.write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    last = data_of(page)["maps"][-1]
    assert last["title"] == "retrieval scores"
    torch.testing.assert_close(torch.tensor(last["values"]), found.scores, rtol=0, atol=1e-4)
    layer, head = found.heads[0]
    assert f"Retrieval heads (0.1 and more): {layer}.{head}" in page and "of 6 needles were recalled." in page


def test_the_page_says_why_there_are_no_retrieval_heads(tmp_path):
    ids = prompt(batch=1, length=12)["input_ids"]
    needles = Text(text_tokenizer(), "A cat sat on a mat. " * 40, "x").cases(160, 0.5, 2)
    for model, given, reason in [
        (make("bert"), needles, "BertModel writes no text, so it has no retrieval heads"),
        (text_lm(), (), "no needles were given, so retrieval heads were not looked for"),
        (text_lm(), needles, "the model did not recall any needle, so no head can be scored"),
    ]:
        seen = overview(model, ids, needles=given, answer=8)
        assert seen.retrieval is None and seen.told == reason
        assert "retrieval_heads" not in seen.summary() and seen.summary()["retrieval"] == reason
        seen.write(tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert f"Retrieval heads: {reason}." in page
        assert not any("retrieval" in m["title"] for m in data_of(page)["maps"])


def test_minilm_on_512_tokens_is_quick(tmp_path):
    model, tokenizer = minilm()
    inputs = tokenizer("the cat sat on the mat and looked at the dog " * 60, return_tensors="pt", truncation=True)
    # optional libraries are imported at first use
    overview(model, inputs["input_ids"][:, :9]).write(tmp_path / "page.html")
    begin = time.process_time()
    seen = overview(model, dict(inputs))
    seen.write(tmp_path / "page.html")
    assert time.process_time() - begin < 5
    assert len(seen.tokens) == 512 and "so it has no retrieval heads." in (tmp_path / "page.html").read_text()


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
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "p.png")
    make("vit").save_pretrained(tmp_path / "vit")
    assert main(["inspect", str(tmp_path / "vit"), str(tmp_path / "p.png"), "--out", str(tmp_path / "b.html")]) == 0
    assert data_of((tmp_path / "b.html").read_text())["grid"] == [4, 4, 1]


def inspected(folder, tmp_path, capsys, *more):
    assert main(["inspect", str(folder), *more, "--out", str(tmp_path / "x.html"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_hides_needles_in_what_it_was_given(tmp_path, capsys):
    found = inspected("tiny-lm", tmp_path, capsys, "def f(x): return x", "--needles", "6")
    recalled = found["retrieval"].removesuffix(" of 6 needles were recalled")
    # no head of the first layer knows what is asked for
    assert int(recalled) >= 5 and found["retrieval_heads"] and min(layer for layer, _ in found["retrieval_heads"]) > 0
    assert inspected("tiny-lm", tmp_path, capsys, "x", "--needles", "1")["retrieval"].endswith(
        " of 1 needles were recalled"
    )
    for chat in (False, True):
        folder = save_text_lm(tmp_path / f"lm-{chat}", chat=chat)
        # what a chat model is published with
        settings = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "temperature": 0.6}))
        found = inspected(folder, tmp_path, capsys, "The cat sat. It slept.")
        assert found["retrieval"] == "the model did not recall any needle, so no head can be scored"
    none = inspected(tmp_path / "lm-False", tmp_path, capsys, "The cat sat.", "--needles", "0")
    assert none["retrieval"].startswith("no needles were given")


def test_a_tokenizer_without_numbers_hides_no_needle(tmp_path, capsys):
    parts, hf = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    made = parts.Tokenizer(parts.models.WordLevel({"<unk>": 0, "the": 1, "cat": 2, "sat": 3}, unk_token="<unk>"))
    made.pre_tokenizer = parts.pre_tokenizers.Whitespace()
    make("llama").save_pretrained(tmp_path / "lm")
    hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(tmp_path / "lm")
    found = inspected(tmp_path / "lm", tmp_path, capsys, "the cat sat")
    assert found["tokens"] == 3
    assert found["retrieval"].startswith("no needle could be hidden (the tokenizer does not give back a number")


def test_pictures_need_not_be_square_nor_have_one_token_before_them(tmp_path, capsys):
    image, hf = pytest.importorskip("PIL.Image", reason="Pillow is not installed"), pytest.importorskip("transformers")
    image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "p.png")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf.DeiTModel(hf.DeiTConfig(**sizes, image_size=(16, 24), patch_size=4)).save_pretrained(tmp_path / "deit")
    found = inspected(tmp_path / "deit", tmp_path, capsys, str(tmp_path / "p.png"))
    assert (
        found["tokens"] == 4 * 6 + 2 and found["retrieval"] == "DeiTModel writes no text, so it has no retrieval heads"
    )
    assert data_of((tmp_path / "x.html").read_text())["grid"] == [4, 6, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_folder_without_tokenizer_is_one_line(family, tmp_path, capsys):
    make(family).save_pretrained(tmp_path / "lm")
    assert main(["inspect", str(tmp_path / "lm"), "the cat", "--out", str(tmp_path / "x.html")]) == 2
    assert "has no tokenizer: save the model's own there" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "text"], "neither tiny-lm nor a folder"),
        (["tiny-lm", "", "--tokens", "9"], "the text is empty"),
        (["tiny-lm", "text", "--needles", "-1"], "--needles at least 0"),
    ],
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
