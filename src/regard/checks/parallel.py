"""Checks of functions whose sequence is split over processes; here one process holds all of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from regard.checks.battery import Subject, demand, demand_near, verifies
from regard.checks.ops import cases, gradients, inputs, names
from regard.checks.tolerances import GRADIENT, SAME
from regard.contract.catalogue import find


@verifies("parallel")
def splits_by_group(subject: Subject) -> None:
    """Options are keyword-only, none swallows others, and the groups of processes are options that may be left out."""
    parameters = list(inspect.signature(subject.main).parameters.values())
    for parameter in parameters[len(names(subject.card)) :]:
        demand(parameter.kind is not parameter.VAR_KEYWORD, f"**{parameter.name} would swallow a misspelt option")
        given = parameter.kind is parameter.KEYWORD_ONLY or parameter.default is None
        demand(given, f"the option {parameter.name} is neither keyword-only nor None by default")
    groups = [p for p in parameters if p.name.endswith("group")]
    demand(groups, "there is no option group")
    for group in groups:
        demand(group.default is None, f"{group.name} must be given; None must do")


@verifies("parallel")
def alone_equals_one_process(subject: Subject) -> None:
    """One process that holds the whole sequence gives what the op of the card gives: output and gradients."""
    card = subject.card
    whole = find(card.whole, "ops").load()
    for case in cases(card):
        tensors = inputs(card, {"m": card.sizes["n"]}, grad=True)
        expected = whole(*tensors, **case.options, **card.whole_options)
        out = subject.main(*tensors, **_flags(subject, case.causal))
        demand_near(out, expected, SAME[torch.float64], f"{case.what}, against {card.whole}")
        for name, found, wanted in zip(names(card), gradients(out, tensors), gradients(expected, tensors), strict=True):
            demand_near(
                found, wanted, GRADIENT[torch.float64], f"{case.what}: gradient of {name}, against {card.whole}"
            )


@verifies("parallel")
def alone_sends_nothing(subject: Subject) -> None:
    """In a world of one process nothing is sent, forward or backward, and the same bits come out as without a world."""
    causal = "causal_self" in subject.card.attends
    tensors = inputs(subject.card, {"m": subject.card.sizes["n"]}, grad=True)
    flags = _flags(subject, causal)
    out = subject.main(*tensors, **flags)
    expected = [out, *gradients(out, tensors)]
    groups = [name for name in inspect.signature(subject.main).parameters if name.endswith("group")]
    with _world_of_one() as group, _Messages() as messages, torch.autograd.set_multithreading_enabled(False):
        out = subject.main(*tensors, **flags, **dict.fromkeys(groups, group))
        found = [out, *gradients(out, tensors)]
    demand(not messages.names, f"a world of one process sent {', '.join(messages.names)}")
    for name, a, b in zip(("the output", *names(subject.card)), found, expected, strict=True):
        demand(torch.equal(a, b), f"{name} differs between a world of one process and no world")


def _flags(subject: Subject, causal: bool) -> dict[str, Any]:
    return {"is_causal": causal, **subject.card.options}


@contextmanager
def _world_of_one() -> Iterator[Any]:
    """A group of this process alone; a world is made where there is none, and taken down again."""
    if dist.is_initialized():
        yield dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class _Messages(TorchDispatchMode):
    """The names of the operators of torch.distributed that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))
