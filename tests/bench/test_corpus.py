import pytest
import torch

from regard.bench.task import IGNORED
from regard.bench.text.corpus import LONG_LINE, read_corpus
from regard.contract.errors import OptionError


@pytest.fixture
def folder(tmp_path):
    shared = "this long line stands in every single file"
    for i in range(40):
        body = "\n".join(f"line {j} of file {i} holds its own long text" for j in range(30))
        (tmp_path / f"f{i:02}.txt").write_text(f"short {i % 3}\n{shared}\n{body}\n")
    return tmp_path


def text_of(stream):
    return bytes(stream[stream < 256].tolist()).decode()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:400"])
def test_no_long_line_of_a_held_out_file_is_trained_on(folder, tokenizer):
    corpus = read_corpus([folder], seq_len=32, tokenizer="bytes")
    train = {line.strip() for line in text_of(corpus.streams["train"]).split("\n")}
    held = text_of(corpus.streams["test"]) + "\n" + text_of(corpus.streams["validation"])
    held_lines = {line.strip() for line in held.split("\n") if len(line.strip()) >= LONG_LINE}
    assert "this long line stands in every single file" in held_lines
    assert held_lines and not held_lines & train
    other = read_corpus([folder], seq_len=32, tokenizer=tokenizer)
    assert int(other.token_bytes[other.streams["train"].long()].sum()) == len(text_of(corpus.streams["train"]).encode())


def test_files_stay_whole_and_rows_repeat_with_their_seed(folder):
    corpus = read_corpus([folder], seq_len=64)
    rows, again = corpus.build("train", 16, 5), corpus.build("train", 16, 5)
    assert torch.equal(rows.inputs, again.inputs)
    assert torch.equal(
        rows.inputs[:, 1:][rows.targets[:, :-1] != IGNORED], rows.targets[:, :-1][rows.targets[:, :-1] != IGNORED]
    )
    assert not torch.equal(rows.inputs, corpus.build("validation", 16, 5).inputs)
    # the mark between files is never asked for
    assert not (rows.targets == 256).any()


def test_the_source_is_told(folder):
    assert "40 files" in read_corpus([folder], seq_len=16).source


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda p: p / "nowhere", "does not exist"),
        (lambda p: _write(p / "empty.txt", b""), "all is empty"),
        (lambda p: _write(p / "binary.bin", b"\0\1\2" * 100), "1 files are binary"),
        (lambda p: _write(p / "tiny.txt", b"a few words\n"), "fewer than one row"),
    ],
)
def test_text_that_cannot_serve_is_refused(tmp_path, make, text):
    with pytest.raises(OptionError, match=text):
        read_corpus([make(tmp_path)], seq_len=256)


def test_an_unknown_tokenizer_is_refused(folder):
    with pytest.raises(OptionError, match="bpe:N"):
        read_corpus([folder], seq_len=32, tokenizer="words")


def _write(path, data):
    path.write_bytes(data)
    return path
