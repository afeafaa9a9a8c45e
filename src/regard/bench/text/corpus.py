"""Text to compare systems on: any files or folders, split by file, as bytes or byte-pair tokens.

No line of 20 characters or more that stands in a held-out file is ever trained on: such lines are cut from the
training files.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regard.bench.task import IGNORED, SPLIT_SEEDS, Rows, Split
from regard.contract.card import TaskCard
from regard.contract.errors import OptionError
from regard.contract.optional import need

CARD = TaskCard(
    slug="corpus",
    title="Text: the next byte or token of your own files",
    baseline=True,
    exports=("Corpus", "read_corpus"),
    version="1",
    metric="bits per byte on held-out files",
    chance="8 bits per byte, for even guessing among bytes",
)

LONG_LINE = 20
# files in a hundred that are held out for the test and for choosing settings
_TEST_SHARE, _VALIDATION_SHARE = 5, 5
_BEGIN = 256
_LARGEST_FILE = 8 << 20


@dataclass(frozen=True)
class Corpus:
    """Token streams of the three splits. vocab_size: tokens. token_bytes: bytes each token stands for, int64 (vocab,).

    source: where the text came from, for people. seq_len: tokens a row.
    """

    streams: dict[str, Tensor]
    vocab_size: int
    token_bytes: Tensor
    source: str
    seq_len: int

    @property
    def chance(self) -> float:
        """Bits per byte of guessing evenly."""
        return 8.0

    def build(self, split: Split, rows: int, seed: int = 0) -> Rows:
        """`rows` windows at random places of a split: the target is the next token. Raises OptionError if it is too short."""
        stream = self.streams[split]
        if len(stream) <= self.seq_len:
            raise OptionError(
                f"the {split} part of the text has {len(stream)} tokens, fewer than one row of {self.seq_len + 1}: "
                "give more text or a smaller --length"
            )
        rng = np.random.Generator(np.random.PCG64([seed, SPLIT_SEEDS[split]]))
        start = torch.from_numpy(rng.integers(0, len(stream) - self.seq_len, size=rows))
        windows = stream[start[:, None] + torch.arange(self.seq_len + 1)].long()
        targets = windows[:, 1:].clone()
        # a new file is not foretold by the one before
        targets[self.token_bytes[targets] == 0] = IGNORED
        return Rows(windows[:, :-1], targets)


def read_corpus(
    paths: Iterable[str | Path] = (), *, seq_len: int = 512, tokenizer: str = "bytes", most_bytes: int = 64 << 20
) -> Corpus:
    """Read text files below `paths` (none: the Python standard library's own source text) and split them by file.

    tokenizer: "bytes", or "bpe:N" for a byte-pair vocabulary of N tokens trained on the training files alone.
    most_bytes: reading stops after so many. Raises OptionError for missing, empty or binary input and for too
    little text; MissingExtra for "bpe" without the tokenizers library.
    """
    given = [Path(p) for p in paths]
    texts, source = _read(given or [Path(sysconfig.get_paths()["stdlib"])], most_bytes, by_default=not given)
    parts = _split(texts)
    held_out = {line for split in ("validation", "test") for text in parts[split] for line in _long_lines(text)}
    parts["train"] = [
        "\n".join(line for line in text.split("\n") if len(line.strip()) < LONG_LINE or line.strip() not in held_out)
        for text in parts["train"]
    ]
    if tokenizer == "bytes":
        streams = {split: _bytes_stream(texts) for split, texts in parts.items()}
        sizes = torch.ones(_BEGIN + 1, dtype=torch.int64)
        sizes[_BEGIN] = 0
        corpus = Corpus(streams, _BEGIN + 1, sizes, source, seq_len)
    else:
        corpus = _byte_pairs(parts, tokenizer, source, seq_len)
    for split in ("train", "validation", "test"):
        corpus.build(split, 1)
    return corpus


def _read(paths: list[Path], most_bytes: int, *, by_default: bool) -> tuple[list[tuple[str, str]], str]:
    texts: list[tuple[str, str]] = []
    total = binary = 0
    for root in paths:
        if not root.exists():
            raise OptionError(f"{root} does not exist; give files or folders of text")
        for path in [root] if root.is_file() else sorted(_files(root, only_python=by_default)):
            if total >= most_bytes:
                break
            data = path.read_bytes()[:_LARGEST_FILE]
            if b"\0" in data:
                binary += 1
                continue
            text = data.decode("utf-8", errors="replace").replace("\r\n", "\n")
            if text.strip():
                name = path.name if root.is_file() else path.relative_to(root).as_posix()
                texts.append((name, text))
                total += len(data)
    where = (
        "the source text of the Python standard library on this machine" if by_default else ", ".join(map(str, paths))
    )
    if not texts:
        raise OptionError(
            f"there is no text in {where}" + (f": {binary} files are binary" if binary else ": all is empty")
        )
    skipped = f", {binary} binary files left out" if binary else ""
    return texts, f"{where} ({len(texts)} files, {total / 1e6:.1f} MB{skipped})"


def _files(root: Path, *, only_python: bool) -> Iterable[Path]:
    for path in root.rglob("*.py" if only_python else "*"):
        hidden = any(
            part.startswith(".") or part in ("site-packages", "__pycache__") for part in path.relative_to(root).parts
        )
        if path.is_file() and not hidden:
            yield path


def _split(texts: list[tuple[str, str]]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    if len(texts) < 3:
        # too few files to split by file: by place, in blocks of lines
        lines = "\n".join(text for _, text in texts).split("\n")
        cuts = [round(len(lines) * share / 100) for share in (100 - _TEST_SHARE - _VALIDATION_SHARE, 100 - _TEST_SHARE)]
        pieces = (lines[: cuts[0]], lines[cuts[0] : cuts[1]], lines[cuts[1] :])
        return {split: ["\n".join(piece)] for split, piece in zip(parts, pieces, strict=True)}
    # ordered by a hash of the name, so that a file stays in its part when others come
    ordered = sorted(texts, key=lambda pair: hashlib.sha256(pair[0].encode()).hexdigest())
    test = max(len(ordered) * _TEST_SHARE // 100, 1)
    validation = max(len(ordered) * _VALIDATION_SHARE // 100, 1)
    for place, (_, text) in enumerate(ordered):
        split = "test" if place < test else "validation" if place < test + validation else "train"
        parts[split].append(text)
    return parts


def _long_lines(text: str) -> Iterable[str]:
    return (stripped for line in text.split("\n") if len(stripped := line.strip()) >= LONG_LINE)


def _bytes_stream(texts: list[str]) -> Tensor:
    pieces = []
    for text in texts:
        pieces.append(np.array([_BEGIN], dtype=np.int16))
        pieces.append(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int16))
    return torch.from_numpy(np.concatenate(pieces))


def _byte_pairs(parts: dict[str, list[str]], tokenizer: str, source: str, seq_len: int) -> Corpus:
    kind, _, size = tokenizer.partition(":")
    if kind != "bpe" or not size.isdigit() or int(size) < 300:
        raise OptionError(f"the tokenizer is {tokenizer!r}; it is 'bytes' or 'bpe:N' with N of at least 300 tokens")
    library = need("tokenizers", "bench")
    bpe = library.Tokenizer(library.models.BPE())
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=int(size) - 1, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(parts["train"], trainer)
    begin = bpe.get_vocab_size()
    streams = {}
    for split, texts in parts.items():
        ids: list[int] = []
        for encoded in bpe.encode_batch(texts):
            ids.append(begin)
            ids.extend(encoded.ids)
        streams[split] = torch.tensor(ids, dtype=torch.int32)
    # in the byte-level alphabet one character stands for one byte
    sizes = [len(bpe.id_to_token(token)) for token in range(begin)] + [0]
    return Corpus(streams, begin + 1, torch.tensor(sizes), source, seq_len)
