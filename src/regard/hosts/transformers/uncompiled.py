"""A compiled model as it was written: graphs that were compiled before a session know nothing of its hooks.

What was compiled stays, and serves again when the session is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule


def compiled_parts(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(part, attribute, value) that make every part of a model run as it was written, compiled in place or around another."""
    for module in model.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield module, "_compiled_call_impl", None
        if isinstance(module, OptimizedModule):
            yield module, "forward", module._orig_mod.__call__


def run_as_written(alone: Callable[[], AbstractContextManager[None]], *models: nn.Module) -> Callable[[], None]:
    """Let models run as they were written, whoever calls them; what is returned undoes it. alone: in which they run.

    Those who compiled a model hold the graph, and a model does not know them. Graphs are compiled for the `forward` that was
    there: another one stops them.
    """
    before = {model: vars(model).get("forward") for model in models}
    for model, own in before.items():
        model.forward = _AsWritten(model, own, alone)

    def undo() -> None:
        for model, own in before.items():
            if own is None:
                del model.forward
            else:
                model.forward = own

    return undo


class _AsWritten:
    """The `forward` of a model, outside all graphs. In a copy of the model it is that of the copy."""

    def __init__(
        self, model: nn.Module, own: Callable[..., Any] | None, alone: Callable[[], AbstractContextManager[None]]
    ):
        self.model, self.alone, self.own = model, alone, getattr(own, "_torchdynamo_orig_callable", own)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return MethodType(type(self.model).forward, self.model) if self.own is None else self.own

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.alone():
            return self.__wrapped__(*args, **kwargs)
