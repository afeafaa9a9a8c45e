"""Checkpoints of training runs: parameters, optimiser states and a few facts in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.optim import Optimizer

from regard.bench.results import write_atomically


def save_checkpoint(path: Path, model: nn.Module, optimizers: Sequence[Optimizer], recipe: str, facts: Any) -> None:
    """Rewrite the file whole. recipe: text of what makes two runs the same; facts: what JSON can hold."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            # get, not []: asking a state for a parameter it lacks would add it
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    write_atomically(path, save(tensors, {"recipe": recipe, "facts": json.dumps(facts)}))


def load_checkpoint(path: Path, model: nn.Module, optimizers: Sequence[Optimizer], recipe: str) -> Any:
    """Put model and optimisers where the file left them, and give its facts.

    None, with everything left as it was, if there is no file, it is damaged, or it is of another recipe or other shapes.
    """
    if not path.exists():
        return None
    named = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["recipe"] != recipe or any(tensors[f"model.{name}"].shape != p.shape for name, p in named.items()):
            return None
        facts = json.loads(about["facts"])
    except (SafetensorError, KeyError, ValueError, OSError):
        return None
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[f"model.{name}"])
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, field, name = key.split(".", 2)
            owner[named[name]].state[named[name]][field] = value
    return facts
