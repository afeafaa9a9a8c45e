"""What must be as before once something has run: a model to the last bit, random numbers, values that were given."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, tuple, type(None))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that may be left behind: values, gradients, flags, hooks, attributes, settings."""
    found: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"the value of {name}"] = tensor.detach().clone()
        found[f"requires_grad of {name}"] = tensor.requires_grad
        found[f"the gradient of {name}"] = None if tensor.grad is None else tensor.grad.clone()
    for name, module in model.named_modules():
        of = f"of {name or 'the model'}"
        found[f"the mode {of}"] = module.training
        found[f"hooks {of}"] = [len(getattr(module, kind)) for kind in _HOOKS]
        found[f"forward {of}"] = getattr(module.forward, "__func__", module.forward)
        found[f"attributes {of}"] = {
            key: value if isinstance(value, _PLAIN) else None for key, value in vars(module).items()
        }
    for name in ("config", "generation_config"):
        for key, value in getattr(getattr(model, name, None), "__dict__", {}).items():
            found[f"{name}.{key}"] = repr(value)
    return found


def randomness() -> dict[str, Any]:
    """The states of the generators that all share, and whether gradients are kept."""
    generator = np.random.get_state(legacy=False)
    return {
        "torch's random numbers": torch.get_rng_state(), "Python's random numbers": random.getstate(),
        "numpy's random numbers": repr(generator), "the mode of gradients": torch.is_grad_enabled(),
    }  # fmt: skip


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two states."""
    return [name for name in {**before, **after} if not same(before.get(name), after.get(name))]


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit, whatever they are made of; NaN equals NaN."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype is b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and not isinstance(a, str | bytes):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)
