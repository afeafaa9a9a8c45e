"""Any torch module, known by the names of its parts alone: what they take in and give out, and the gradients there.

The tape's kinds are the names, its steps count the calls of a part: `tape["features.3", 0]`, `tape.grad("features.3", 0)`.
What is recorded is a value of its own, so that a part that works in place changes what comes after it and not the tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.contract.errors import OptionError, Unsupported, near
from regard.hosts.tape import Tape

Side = Literal["output", "input"]


def record_modules(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    names: Sequence[str],
    *,
    side: Side = "output",
    grads: bool = False,
    limit_bytes: int = 2 << 30,
) -> Tape:
    """Run a model once, as it stands, and return the tape; the options are those of `recording_modules`.

    inputs: the model's keywords, or its one argument.
    """
    opened = recording_modules(model, names, side=side, grads=grads, limit_bytes=limit_bytes)
    with opened as tape, torch.set_grad_enabled(grads):
        tape.output = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    return tape


@contextmanager
def recording_modules(
    model: nn.Module,
    names: Sequence[str],
    *,
    side: Side = "output",
    grads: bool = False,
    limit_bytes: int = 2 << 30,
) -> Iterator[Tape]:
    """Record what some parts of a model make in every pass inside the block; its output stays the same, bit for bit.

    names: of modules, as `named_modules` says them. side: what a part gives out, or what it takes in; of several values the
    first. grads: keep the graph, and start one where no weight before the part wants a gradient; what a part takes in has
    the gradient that comes through this part. limit_bytes: more is refused. Afterwards no hook is left, also after an error.
    Raises OptionError for an unknown name, Unsupported for a part that handles no tensor, and beyond the limit.
    """
    if side not in ("output", "input"):
        raise OptionError(f'side is "output" or "input", not {side!r}')
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise OptionError(f"{type(model).__name__} has no module {name!r}{near(name, modules)}")
    tape = Tape(meta={"modules": tuple(names)})
    recorder = _Recorder(tape, grads, limit_bytes)
    hooks = []
    try:
        for name in dict.fromkeys(names):
            if side == "output":
                hooks.append(modules[name].register_forward_hook(recorder.after(name)))
            else:
                hooks.append(modules[name].register_forward_pre_hook(recorder.ahead(name), with_kwargs=True))
        yield tape
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder:
    def __init__(self, tape: Tape, grads: bool, limit: int):
        self.tape, self.grads, self.limit, self.held = tape, grads, limit, 0
        self.calls: dict[str, int] = {}

    def after(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple | list) and output:
                rest = [self._keep(name, output[0]), *output[1:]]
                return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
            return self._keep(name, output)

        return hook

    def ahead(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._keep(name, args[0]), *args[1:]), kwargs
            first = next(iter(kwargs), "")
            return args, {**kwargs, first: self._keep(name, kwargs.get(first))}

        return hook

    def _keep(self, name: str, x: Any) -> Tensor:
        """Put a value on the tape; what goes on is another one that depends on it."""
        if not isinstance(x, Tensor):
            raise Unsupported(f"the module {name!r} handles a {type(x).__name__}; only tensors can be recorded")
        self.held += x.nbytes
        if self.held > self.limit:
            raise Unsupported(
                f"the tape would hold more than {self.limit / 2**30:.1f} GiB: name fewer modules, or raise limit_bytes="
            )
        if not self.grads:
            kept = x.detach().clone()
        elif x.requires_grad:
            kept = x.clone()
            kept.retain_grad()
        else:
            kept = x.detach().clone().requires_grad_(x.is_floating_point())
        step = self.calls.get(name, 0)
        self.calls[name] = step + 1
        self.tape._values[name, 0, step] = kept
        return kept.clone() if self.grads else x
