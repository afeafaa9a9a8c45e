"""Checks of ways of writing, on a tiny random model of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.checks.battery import Subject, demand, verifies
from regard.checks.untouched import changed, state
from regard.contract.optional import need

PROMPT = 12
WRITTEN = 8


@verifies("decoding")
def decoding_is_a_frozen_value(subject: Subject) -> None:
    """The first export is a frozen dataclass that can be called; equal settings make equal values."""
    cls: Any = subject.main
    params = getattr(cls, "__dataclass_params__", None)
    demand(params is not None and params.frozen, f"{cls.__name__} is no frozen dataclass")
    demand(callable(_make(subject)), f"{cls.__name__} cannot be called, so generate cannot use it")
    demand(_make(subject) == _make(subject), "two with equal settings are not equal")


@verifies("decoding")
def writes_after_the_prompt(subject: Subject) -> None:
    """Every sequence begins with its prompt, goes on with tokens of the vocabulary and is not longer than allowed."""
    model, given = _model(), _inputs(3)
    found = _write(subject, model, given)
    ids = given["input_ids"]
    each = subject.card.generate.get("num_return_sequences", 1)
    demand(found.shape[0] == each * len(ids), f"{len(found)} sequences came of {len(ids)} prompts, not {each} of each")
    demand(torch.equal(found[:, :PROMPT], ids.repeat_interleave(each, 0)), "a sequence does not begin with its prompt")
    demand(PROMPT < found.shape[1] <= PROMPT + WRITTEN, f"{found.shape[1] - PROMPT} tokens were written, of {WRITTEN}")
    inside = (found >= 0) & (found < model.config.vocab_size)
    demand(inside.all(), "there are tokens outside the vocabulary")


@verifies("decoding")
def changes_what_is_written(subject: Subject) -> None:
    """With the card's options something else is written than the library writes."""
    model, given = _model(), _inputs()
    demand(_different(_write(subject, model, given), _library(subject, model, given)), "it is what the library writes")


@verifies("decoding", lambda card: bool(card.off))
def off_is_the_library(subject: Subject) -> None:
    """With the settings that the card calls off, what is written is what the library writes, best first."""
    model = _model()
    for padded in (0, 5):
        given = _inputs(padded)
        found = _write(subject, model, given, **subject.card.off)
        demand(not _different(found, _library(subject, model, given)), f"the sequences differ (pads: {padded})")


@verifies("decoding")
def cache_changes_nothing(subject: Subject) -> None:
    """With and without a cache the same is written."""
    model, given = _model(), _inputs()
    found = _write(subject, model, given)
    demand(not _different(found, _write(subject, model, {**given, "use_cache": False})), "the sequences differ")


@verifies("decoding", lambda card: card.padding)
def rows_are_written_alone(subject: Subject) -> None:
    """A row of a batch, with pads on its left, is written as if it were alone and without pads."""
    model, both = _model(), _inputs(5)
    each = subject.card.generate.get("num_return_sequences", 1)
    together = _write(subject, model, both)[:each, 5:]
    alone = _write(subject, model, {name: x[:1, 5:] for name, x in both.items()})
    demand(not _different(together, alone), "the row with pads is written otherwise")


@verifies("decoding")
def leaves_the_model(subject: Subject) -> None:
    """Weights, settings, attributes and hooks of the model are as before."""
    model = _model()
    before = state(model)
    _write(subject, model, _inputs())
    left = changed(before, state(model))
    demand(not left, f"not as before: {', '.join(left[:3])}")


def _make(subject: Subject, **changes: Any) -> Any:
    return subject.main(**{**subject.card.options, **changes})


def _model() -> Any:
    need("transformers", "hf")
    from regard.hosts.transformers.specimens import make

    model = make("llama")
    # with ends, so that some hypotheses are finished before others
    model.generation_config.eos_token_id = [30, 36]
    # transformers fills with an end where the pad is 0
    model.generation_config.pad_token_id = 59
    return model


def _inputs(padded: int = 0) -> dict[str, Any]:
    from regard.hosts.transformers.specimens import prompt

    return prompt(length=PROMPT, padded=padded)


def _write(subject: Subject, model: Any, given: dict[str, Any], **changes: Any) -> Tensor:
    found: Tensor = model.generate(
        **given, **subject.card.generate, max_new_tokens=WRITTEN, do_sample=False,
        custom_generate=_make(subject, **changes),
    )  # fmt: skip
    return found


def _library(subject: Subject, model: Any, given: dict[str, Any]) -> Tensor:
    found: Tensor = model.generate(**given, **subject.card.generate, max_new_tokens=WRITTEN, do_sample=False)
    return found


def _different(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a, b)
