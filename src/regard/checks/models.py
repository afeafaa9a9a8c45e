"""Checks of models: mixers stacked. The first export is the module; `SIZES` beside it has its published settings.

The example says what goes in: "b n v" token ids below v, "b c y x" images, "b n c" tokens, "b c" codes.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from regard.checks.battery import Subject, demand, demand_near, verifies
from regard.checks.tolerances import SAME
from regard.checks.untouched import changed, state
from regard.contract.optional import need


def build(subject: Subject) -> Any:
    """The model of the card's options: fields over those of the first of `SIZES`, or keywords where there are none."""
    options, sizes = subject.card.options, sizes_of(subject)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if subject.card.stands_on:
            return subject.main(foreign(subject.card), **options).double()
        if sizes:
            return subject.main(dataclasses.replace(next(iter(sizes.values())), **options)).double()
        return subject.main(**options).double()


def foreign(card: Any) -> Any:
    """A tiny model of the kind that a model stands on."""
    need("transformers", "hf")
    from regard.hosts.transformers.specimens import make

    return make(card.stands_on)


def sizes_of(subject: Subject) -> dict[str, Any]:
    """The published settings beside the model."""
    return getattr(sys.modules[subject.entry.module], "SIZES", {})


def example(card: Any, n: int | None = None) -> Tensor:
    """An input by the card's example; n: another length."""
    sizes = card.sizes
    if "v" in sizes:
        return torch.randint(sizes["v"], (sizes["b"], n or sizes["n"]))
    letters = "bcyx" if "y" in sizes else "bnc" if "n" in sizes else "bc"
    return torch.randn([n if a == "n" and n else sizes[a] for a in letters], dtype=torch.float64)


@verifies("model")
def model_runs(subject: Subject) -> None:
    """Built from its options it answers for every row alone, with finite numbers, the same bits twice."""
    model = build(subject).eval()
    x = example(subject.card)
    out = model(x)
    demand(out.shape[0] == x.shape[0], f"{x.shape[0]} rows gave {tuple(out.shape)}")
    demand(out.isfinite().all(), "the output is not finite")
    demand(torch.equal(out, model(x)), "two calls differ")
    demand_near(model(x[:1]), out[:1], SAME[torch.float64], "one row of the batch alone")


@verifies("model")
def model_trains(subject: Subject) -> None:
    """A gradient that is finite and not all 0 reaches every parameter."""
    model = build(subject)
    out = model(example(subject.card))
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        demand(parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient reaches {name}")
        demand(parameter.grad.isfinite().all(), f"the gradient of {name} is not finite")  # type: ignore[union-attr]


@verifies("model")
def sizes_build(subject: Subject) -> None:
    """Every row of SIZES is a flat frozen dataclass and can be built."""
    for name, settings in sizes_of(subject).items():
        parameters = getattr(type(settings), "__dataclass_params__", None)
        frozen = parameters is not None and parameters.frozen
        demand(frozen, f"SIZES[{name!r}] is a {type(settings).__name__}, not a frozen dataclass")
        with torch.device("meta"):
            model = subject.main(settings)
        demand(sum(p.numel() for p in model.parameters()) > 0, f"SIZES[{name!r}] has no parameters")


@verifies("model", lambda card: card.decode)
def model_decodes(subject: Subject) -> None:
    """Prefill in pieces, then steps, equals the parallel form in float64; an old state stays usable."""
    model = build(subject).eval()
    x = example(subject.card)
    n = x.shape[1]
    whole = model(x)
    first, state = model.prefill(x[:, :2], model.init_state(x.shape[0]))
    second, middle = model.prefill(x[:, 2 : n - 2], state)
    outs, state = [first, second], middle
    for t in range(n - 2, n):
        out, state = model.step(x[:, t : t + 1], state)
        outs.append(out)
    demand_near(torch.cat(outs, 1), whole, SAME[torch.float64], "prefill in pieces, then steps")
    again, _ = model.step(x[:, n - 2 : n - 1], middle)
    demand_near(again, whole[:, n - 2 : n - 1], SAME[torch.float64], "a step from an old state, after later ones")
    said, held = model.state_bytes(x.shape[0], n), state.size_bytes
    demand(said == held, f"state_bytes says {said} after {n} tokens, the state holds {held}")


@verifies("model", lambda card: bool(card.stands_on))
def foreign_model_is_left_alone(subject: Subject) -> None:
    """What the foreign model answers, its settings, hooks and mode are the same before and after it is stood on."""
    model, x = foreign(subject.card), example(subject.card)
    before, answer = state(model), model(x)[0]
    subject.main(model, **subject.card.options)(x)
    left = changed(before, state(model))
    demand(not left, f"not as before: {', '.join(left[:3])}")
    demand(torch.equal(model(x)[0], answer), "it answers otherwise than before")
