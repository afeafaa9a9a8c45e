"""Tiny models with random weights that systems are tried on, and what these are called with.

A specimen's name is a family of transformers ("llama"), a room and slug ("models/vit", "mixers/based", "ops/linear"),
"sequence" for our language model over softmax, "vit_classifier", or "cnn", a network of plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from regard._doors import DOORS
from regard.checks.watching import TAPED
from regard.contract import names
from regard.contract.catalogue import find
from regard.contract.optional import need
from regard.hosts.tape import recording

SEQUENCE: dict[str, Any] = {"vocab": 60, "dim": 32, "depth": 2, "heads": 4, "mixer": "softmax", "hidden": 48}
_IMAGES = (2, 3, 16, 16)
_CLASSES = 5


@dataclass(frozen=True, eq=False)
class _Case:
    """A prompt, and the places in it of what its answer is to copy."""

    prompt: Tensor
    needle: tuple[int, int]


def make(name: str, seed: int = 0, **options: Any) -> Any:
    """A specimen in evaluation mode; an op as it is. options: of our own models, beside those of the card."""
    room, _, slug = name.rpartition("/")
    if room == "ops":
        return names.op(slug)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not room and name not in _MAKERS:
            need("transformers", "hf")
            return import_module("regard.hosts.transformers.specimens").make(name, seed)
        if room:
            model = {"models": _model, "mixers": _mixer}[room](slug, options)
        else:
            model = _MAKERS[name](options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def distinguish(model: nn.Module) -> None:
    """Give a model unlike modes, gradients and wishes for them, so that it shows where they are set for all of it."""
    parts = [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    parts[-1].training = True
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[-1].grad = torch.ones_like(parameters[-1])


def given(word: str, name: str, model: Any) -> Any:
    """What a word of `GIVEN` means for a specimen, always the same values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _GIVEN[word](name, model)


def reads_images(name: str) -> bool:
    """Whether a specimen is called with images."""
    return name.startswith(("vit", "cnn")) or name == "models/vit"


def _model(slug: str, options: dict[str, Any]) -> Any:
    return names.model(slug, **{**find(slug, "models").card.options, **options})


def _mixer(slug: str, options: dict[str, Any]) -> Any:
    return names.mixer(slug, 16, 4, **{**find(slug, "mixers").card.options, **options})


def _sequence(options: dict[str, Any]) -> Any:
    room = import_module(DOORS["SequenceModel"])
    return room.SequenceModel(room.SequenceSettings(**{**SEQUENCE, **options}))


def _vit_classifier(options: dict[str, Any]) -> Any:
    hf: Any = need("transformers", "hf")
    sizes = import_module("regard.hosts.transformers.specimens").VISION
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, num_labels=_CLASSES, **options))


def _cnn(options: dict[str, Any]) -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, _CLASSES),
    )  # fmt: skip


_MAKERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "sequence": _sequence, "vit_classifier": _vit_classifier, "cnn": _cnn,
}  # fmt: skip


def _ids(seed: int = 1, rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def _images(name: str, model: Any) -> Tensor:
    return torch.randn(_IMAGES)


def _labels(name: str, model: Any) -> Tensor:
    return torch.tensor([1, 3])


def _inputs(name: str, model: Any) -> dict[str, Tensor]:
    if reads_images(name):
        return {"pixel_values": _images(name, model)}
    ids = _ids()
    mask = torch.ones_like(ids)
    # a row with pads
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _tape(name: str, model: Any) -> Any:
    sites = (*TAPED, "weights") if model.get_output_embeddings() is not None else ("weights", "z", "q", "k", "v")
    with recording(model, sites=sites) as tape, torch.no_grad():
        model(**_inputs(name, model))
    return tape


def _answered(name: str, model: Any) -> list[tuple[Tensor, Tensor]]:
    ids = _ids()
    return [(ids, torch.arange(ids.shape[1]).expand_as(ids) >= 7)]


def _cases(name: str, model: Any) -> list[Any]:
    """Prompts with a token in them that the model itself writes after them."""
    found = []
    for ids in _ids(rows=4, length=24):
        with torch.no_grad():
            written = model.generate(
                ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=16, do_sample=False, pad_token_id=0
            )
        copied = torch.isin(ids, written[0, len(ids) :]).nonzero().flatten().tolist()
        found += [_Case(ids, (place, place + 1)) for place in copied[:1]]
    return found


def _metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 7]


def _features(name: str, model: Any) -> Callable[[Tensor], Tensor]:
    """What the convolutions of "cnn" make of images: (B, 8, 8, 8)."""
    return lambda images: model[:6](images)


def _generator(name: str, model: Any) -> nn.Module:
    """Images of codes that are such features."""
    return nn.ConvTranspose2d(8, 3, 2, stride=2).eval()


def _condition(name: str, model: Any) -> Callable[[Tensor, int], Tensor]:
    return lambda images, target: model(images).log_softmax(-1)[:, target]


def _method(model: Any, x: Tensor, classes: Tensor) -> Tensor:
    """Maps of gradient times input."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        scores = model(x).gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(scores, x)
    return (gradient * x).sum(1, keepdim=True).detach()


def _heads(name: str, model: Any, *, seed: int) -> Tensor:
    return torch.randn(6, 2, 3, 8, generator=torch.Generator().manual_seed(seed))


_GIVEN: dict[str, Callable[[str, Any], Any]] = {
    "model": lambda name, model: model,
    "inputs": _inputs,
    "ids": lambda name, model: _ids(),
    "other ids": lambda name, model: _ids(5),
    "one row": lambda name, model: _ids()[:1],
    "prompts": lambda name, model: list(_ids()),
    "cases": _cases,
    "answered ids": _answered,
    "next tokens": lambda name, model: torch.tensor([3, 9]),
    "metric": lambda name, model: _metric,
    "tape": _tape,
    "images": _images,
    "one image": lambda name, model: _images(name, model)[0],
    "labelled images": lambda name, model: [(_images(name, model), _labels(name, model))],
    "images and labels": lambda name, model: (_images(name, model), _labels(name, model)),
    "method": lambda name, model: _method,
    "features": _features,
    "generator": _generator,
    "condition": _condition,
    "tokens": lambda name, model: torch.randn(2, 6, 16),
    "queries": lambda name, model: torch.randn(2, 2, 6, 4),
    "weights": lambda name, model: torch.randn(9, 9).tril().exp().tril().softmax(-1).tril(),
    "maps": lambda name, model: torch.randn(2, 1, 4, 4),
    "heads": partial(_heads, seed=1),
    "other heads": partial(_heads, seed=2),
}
