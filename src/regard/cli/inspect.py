"""inspect: what every head of a model does with a text or a picture, as one page that opens offline."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from regard.contract.errors import OptionError
from regard.contract.optional import need

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="tiny-lm, or a folder with a model of transformers")
    parser.add_argument("input", nargs="?", metavar="TEXT|FILE", help="a text, a text file or a picture")
    parser.add_argument("--tokens", type=int, default=512, help="of the input at most (512)")
    parser.add_argument("--out", type=Path, default=Path("regard-inspect.html"), metavar="FILE", help="the page")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(given: argparse.Namespace) -> int:
    from regard.explain.overview.overview import overview

    if given.tokens < 2:
        raise OptionError(f"--tokens is at least 2, not {given.tokens}")
    model, folder = _model(given.model)
    inputs, names = _inputs(model, folder, given.input, given.tokens)
    seen = overview(model, inputs, names)
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


def _inputs(model: Any, folder: Path, given: str | None, most: int) -> tuple[dict[str, Any], list[str] | None]:
    path = Path(given) if given is not None and len(given) < 4096 else None
    is_file = path is not None and path.is_file()
    if is_file and path is not None and path.suffix.lower() in _PICTURES:
        return _picture(model, path), None
    if model.main_input_name == "pixel_values":
        raise OptionError(f"{type(model).__name__} reads pictures: give the path of one")
    text = path.read_text(encoding="utf-8", errors="replace") if is_file and path is not None else given
    if text is None:
        text = "When the cat saw the dog, the cat ran. When the dog saw the cat, the dog sat."
    if not text:
        raise OptionError("the text is empty")
    tokenizer = need("transformers", "hf").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
    inputs = {name: x for name, x in inputs.items() if name in ("input_ids", "attention_mask", "token_type_ids")}
    return inputs, tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())


def _picture(model: Any, path: Path) -> dict[str, Any]:
    """The picture in the model's size, its values around 0."""
    if model.main_input_name != "pixel_values":
        raise OptionError(f"{type(model).__name__} reads no pictures: give a text")
    numpy, torch = need("numpy", "explain"), need("torch", "explain")
    size = model.config.image_size
    picture = need("PIL.Image", "explain").open(path).convert("RGB").resize((size, size))
    values = torch.from_numpy(numpy.asarray(picture).copy()).float() / 127.5 - 1
    return {"pixel_values": values.permute(2, 0, 1)[None]}
