"""The wrapper of every op: shapes by the card's spec, claims by the card, then the body.

The body is the definition. It hands its scores to an engine; `engine="reference"` is the plain form of that engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from regard.contract.card import OpCard
from regard.contract.errors import OptionError, Unsupported, near
from regard.contract.shapes import bind, check_types, parse
from regard.contract.split import current

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class Operator(Protocol[P, R_co]):
    """What type checkers see: the body's own signature, and the card."""

    card: OpCard

    @property
    def reference(self) -> Callable[P, R_co]:
        """The body on the plain form of its engine: slow, exact, differentiable any number of times."""
        ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run on the best engine, or on the one named by `engine`."""
        ...


# option -> the word on the card that claims it
_SHARED = {"pattern": "pattern", "mask": "mask", "bias": "bias", "scale": "scale", "dropout_p": "dropout"}


def operator(card: OpCard) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Wrap the body of an op: check shapes and dtypes, refuse what the card does not claim, run the body.

    Raises ShapeError naming tensor and axis; Unsupported for unclaimed options; OptionError for unknown engines.
    """
    spec = parse(card.spec)
    names = tuple(name for name, _ in spec.inputs)
    count = len(names)
    unclaimed = tuple((option, word) for option, word in _SHARED.items() if word not in card.accepts)

    def wrap(body: Callable[P, R]) -> Operator[P, R]:
        hint = "; other tokens go into extra_k, extra_v" if "extra_k" in body.__annotations__ else ""

        def call(*args: Any, **options: Any) -> R:
            tensors = (
                args if len(args) == count else args + tuple(options.pop(n) for n in names[len(args) :] if n in options)
            )
            if len(tensors) != count:
                raise TypeError(f"{card.slug} takes the tensors {', '.join(names)}; {len(tensors)} were given")
            sizes = bind(spec, tensors, card.slug)
            check_types(tensors, names, card.slug)
            if options:
                _refuse(card, unclaimed, options)
            _refuse_shape(card, sizes, options, hint)
            split = current()
            if split is not None:
                split.admit(card.slug)
            return body(*tensors, **options)  # type: ignore[call-arg,arg-type]

        def reference(*args: Any, **options: Any) -> R:
            return call(*args, **{**options, "engine": "reference"})

        update_wrapper(call, body)
        call.card = card  # type: ignore[attr-defined]
        call.reference = reference  # type: ignore[attr-defined]
        return cast("Operator[P, R]", call)

    return wrap


def _refuse(card: OpCard, unclaimed: tuple[tuple[str, str], ...], options: dict[str, Any]) -> None:
    for option, word in unclaimed:
        value = options.get(option)
        if value is not None and not (option == "dropout_p" and value == 0):
            raise Unsupported(f"{card.slug} takes no {option}; {_who('accepts', word)}")
    engine = options.get("engine")
    if engine is not None and engine != "reference" and engine.partition(":")[0] not in card.engines:
        known = ("reference", *card.engines)
        raise OptionError(f"{card.slug} has no engine {engine!r}{near(engine, known)}; it has {', '.join(known)}")


def _refuse_shape(card: OpCard, sizes: dict[str, int], options: dict[str, Any], hint: str) -> None:
    pattern = options.get("pattern")
    causal = bool(options.get("is_causal")) or (pattern is not None and pattern.causal)
    if causal and "causal_self" not in card.attends:
        raise Unsupported(f"{card.slug} is not causal; {_who('attends', 'causal_self')}")
    if not causal and "self" not in card.attends and "cross" not in card.attends:
        raise Unsupported(f"{card.slug} is causal only: pass is_causal=True; {_who('attends', 'self')}")
    if sizes.get("n") != sizes.get("m", sizes.get("n")) and not causal and "cross" not in card.attends:
        raise Unsupported(
            f"{card.slug} has {sizes['n']} queries and {sizes['m']} keys; {_who('attends', 'cross')}{hint}"
        )


def _who(field: str, word: str) -> str:
    from regard.contract.catalogue import systems_that

    return f"these claim {word}: {', '.join(systems_that(**{field: word})) or 'none'}"
