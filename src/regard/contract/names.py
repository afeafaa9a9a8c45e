"""Public access by name: a system is asked for by its slug, wherever its file lies."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from regard.contract.card import OpCard
from regard.contract.catalogue import Entry, catalogue, find
from regard.contract.errors import OptionError, UnknownName, near


def get(name: str) -> Any:
    """The public function or class of a system, by slug ("sigmoid") or room and slug ("mixers/based").

    Raises UnknownName with near names.
    """
    return find(name).load()


def op(name: str) -> Any:
    """The function of q, k, v of a system. Raises UnknownName if it has none."""
    return find(name, "ops").load()


def mixer(name: str, dim: int, heads: int, **options: Any) -> Any:
    """A new mixer module, tokens to tokens, by the slug of a mixer or of an op that decodes from a cache.

    dim: model width. heads: query heads. options: the mixer's own; for an op those of the attention layer and of the op.
    Raises UnknownName; OptionError for options it does not have.
    """
    entry = mixer_entry(name)
    if entry.room == "mixers":
        return _build(entry.load(), name, dim, heads, **options)
    return wrap(entry.load(), dim, heads, **options)


def wrap(op: Any, dim: int, heads: int, **options: Any) -> Any:
    """The attention layer over an op that decodes from keys and values, which may be your own.

    Raises OptionError for options that neither has; Unsupported for an op without decode="kv".
    """
    return import_module("regard.layers.attention").OpAttention(dim, heads, op=op, **options)


def mixers() -> dict[str, Entry]:
    """Every name that `mixer` takes -> the file behind it: mixers, and ops that decode from keys and values."""
    entries = catalogue().values()
    ops = {e.card.slug: e for e in entries if isinstance(e.card, OpCard) and e.card.decode == "kv"}
    own = {e.card.part_of or e.card.slug: e for e in entries if e.card.kind == "mixer"}
    return dict(sorted({**ops, **own}.items()))


def mixer_entry(name: str) -> Entry:
    """The file behind a mixer's name. Raises UnknownName with near names."""
    known = mixers()
    if name not in known:
        raise UnknownName(f"no mixer is called {name!r}{near(name, known)}; there are {', '.join(known)}")
    return known[name]


def model(name: str, **options: Any) -> Any:
    """A new model by slug. options: fields of its settings that differ from the first of its `SIZES`, or its keywords.

    Raises UnknownName, OptionError.
    """
    entry = find(name, "models")
    make, sizes = entry.load(), _sizes(entry)
    return make(_changed(name, next(iter(sizes.values())), options)) if sizes else _build(make, name, **options)


def build(name: str, **changes: Any) -> Any:
    """A new model at a published size ("dinat_tiny"): a row of a model's `SIZES`. changes: fields that differ from it.

    Raises UnknownName; OptionError for fields that the settings do not have.
    """
    entries = [e for e in catalogue().values() if e.room == "models"]
    # a size is mostly called after its model, which spares loading the others
    entries.sort(key=lambda e: not name.startswith(e.card.slug))
    known: list[str] = []
    for entry in entries:
        make, sizes = entry.load(), _sizes(entry)
        if name in sizes:
            return make(_changed(name, sizes[name], changes))
        known += sizes
    raise UnknownName(f"no model has the size {name!r}{near(name, known)}; there are {', '.join(known)}")


def _sizes(entry: Entry) -> dict[str, Any]:
    return getattr(import_module(entry.module), "SIZES", {})


def _changed(name: str, settings: Any, changes: dict[str, Any]) -> Any:
    fields = [f.name for f in dataclasses.fields(settings)]
    for field in changes:
        if field not in fields:
            raise OptionError(f"{name} has no {field!r}{near(field, fields)}; it has {', '.join(fields)}")
    return dataclasses.replace(settings, **changes)


def task(name: str, **options: Any) -> Any:
    """A benchmark task by slug. options: its settings. Raises UnknownName, OptionError."""
    return _build(find(name, "bench").load(), name, **options)


def _build(make: Any, name: str, *args: Any, **options: Any) -> Any:
    import inspect

    known = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for option in options:
            if option not in known:
                raise OptionError(f"{name} has no option {option!r}{near(option, known)}; it has {', '.join(known)}")
    return make(*args, **options)
