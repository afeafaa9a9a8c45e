"""inspect: what every head of a model does with a text or a picture, as one page that opens offline."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regard.contract.errors import OptionError, RegardError
from regard.contract.optional import need
from regard.hosts.text import tokenizer_of

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
# of a prompt that hides a needle, at most
_NEEDLE_TOKENS = 256


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="tiny-lm, or a folder with a model of transformers")
    parser.add_argument("input", nargs="?", metavar="TEXT|FILE", help="a text, a text file or a picture")
    parser.add_argument(
        "--needles", type=int, default=4, help="hidden in the text to find retrieval heads by; 0 for none (4)"
    )
    parser.add_argument("--tokens", type=int, default=512, help="of the input at most (512)")
    parser.add_argument("--out", type=Path, default=Path("regard-inspect.html"), metavar="FILE", help="the page")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(given: argparse.Namespace) -> int:
    from regard.explain.overview.overview import overview

    if given.tokens < 2 or given.needles < 0:
        raise OptionError(f"--tokens is at least 2 and --needles at least 0, not {given.tokens} and {given.needles}")
    model, folder = _model(given.model)
    picture = _picture_of(given.input)
    if picture is not None:
        seen = overview(model, _picture(model, picture))
    else:
        text = _text(model, given.input)
        tokenizer = tokenizer_of(folder)
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=given.tokens)
        inputs = {name: x for name, x in inputs.items() if name in ("input_ids", "attention_mask", "token_type_ids")}
        names = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        needles, answer, why = _needles(model, tokenizer, text, given.needles)
        seen = overview(model, inputs, names, needles=needles, answer=answer)
        seen = replace(seen, told=why) if why else seen
    given.out.parent.mkdir(parents=True, exist_ok=True)
    seen.write(given.out)
    facts = seen.summary()
    if given.json:
        json.dump(facts, sys.stdout, indent=1)
        print()
        return 0
    console = need("rich.console", "bench").Console()
    for name, value in facts.items():
        console.print(f"{name}: {value}", markup=False, highlight=False)
    console.print(f"page: {given.out.resolve()}", markup=False, soft_wrap=True)
    return 0


def _model(name: str) -> tuple[Any, Path]:
    """(the model in evaluation mode, the folder of its tokenizer or image settings)."""
    if name == "tiny-lm":
        from regard.bench.proving.tiny import lm
        from regard.bench.proving.tiny_lm import WEIGHTS

        return lm()[0], WEIGHTS
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise OptionError(f"{name!r} is neither tiny-lm nor a folder with a config.json")
    hf = need("transformers", "hf")
    # the class that the weights were saved as: an LM keeps its head, an encoder has none
    architectures = hf.AutoConfig.from_pretrained(folder, local_files_only=True).architectures or []
    kind = getattr(hf, architectures[0], None) if architectures else None
    kind = hf.AutoModel if kind is None else kind
    return kind.from_pretrained(folder, local_files_only=True).eval(), folder


def _picture_of(given: str | None) -> Path | None:
    path = _file(given)
    return path if path is not None and path.suffix.lower() in _PICTURES else None


def _text(model: Any, given: str | None) -> str:
    """The text that was given, or that of the file that was given."""
    if model.main_input_name == "pixel_values":
        raise OptionError(f"{type(model).__name__} reads pictures: give the path of one")
    path = _file(given)
    text = given if path is None else path.read_text(encoding="utf-8", errors="replace")
    if text is None:
        return "When the cat saw the dog, the cat ran. When the dog saw the cat, the dog sat."
    if not text:
        raise OptionError("the text is empty")
    return text


def _file(given: str | None) -> Path | None:
    # what is longer is no path, and asking for it fails
    path = Path(given) if given is not None and len(given) < 4096 else None
    return path if path is not None and path.is_file() else None


def _needles(model: Any, tokenizer: Any, text: str, count: int) -> tuple[Sequence[Any], int, str]:
    """(prompts of a needle each, at equal steps of depth; tokens of an answer; why there are none, if it is to be said)."""
    from regard.bench.needle.cases import Notes, Source, Text

    if count == 0 or not model.can_generate():
        return (), 1, ""
    # scores are those of greedy answers, whatever the model's settings for chats are
    model.generation_config.do_sample, model.generation_config.num_beams = False, 1
    depths = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    try:
        source: Source = Notes() if Notes.fit(model, tokenizer) else Text(tokenizer, text, "the text")
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NEEDLE_TOKENS
        length = min(_NEEDLE_TOKENS, most - source.tokens)
        return [source.cases(length, depth, 1, i)[0] for i, depth in enumerate(depths)], source.tokens, ""
    except RegardError as error:
        return (), 1, f"no needle could be hidden ({error})"


def _picture(model: Any, path: Path) -> dict[str, Any]:
    """The picture in the model's size, its values around 0."""
    if model.main_input_name != "pixel_values":
        raise OptionError(f"{type(model).__name__} reads no pictures: give a text")
    from regard.hosts.transformers.session import sides

    numpy, torch = need("numpy", "explain"), need("torch", "explain")
    size = sides(model.config.image_size)
    if size is None:
        raise OptionError(f"{type(model).__name__} does not say how large its pictures are: {model.config.image_size}")
    picture = need("PIL.Image", "explain").open(path).convert("RGB").resize((size[1], size[0]))
    values = torch.from_numpy(numpy.asarray(picture).copy()).float() / 127.5 - 1
    return {"pixel_values": values.permute(2, 0, 1)[None]}
