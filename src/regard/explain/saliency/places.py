"""Activations at the places of an image inside a model, and the gradient of a score there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError, Unsupported
from regard.hosts.plain import record_modules
from regard.hosts.tape import record
from regard.primitives.maps import Target, class_scores, to_grid, token_grid

Inputs = Mapping[str, Any] | Tensor
Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "final"]


@dataclass(frozen=True, eq=False)
class Places:
    """activation, gradient: (B, C, h, w), in float32 at least. name: of where they stand."""

    activation: Tensor
    gradient: Tensor
    name: str

    @property
    def silent(self) -> bool:
        """Whether the score depends on no place."""
        return not bool(self.gradient.any())

    def heard(self) -> Places:
        """The same. Raises OptionError where they are silent."""
        if self.silent:
            raise OptionError(
                f"the target depends on no place at {self.name}: it is read elsewhere, say at another token; take an "
                "earlier layer"
            )
        return self


def places(
    model: Any,
    inputs: Inputs,
    target: Target,
    layer: int | str,
    site: str,
    grid: tuple[int, int] | None,
    prefix_tokens: int | None,
) -> Places:
    """Run a model once, and differentiate each row's score by what stands at the places of a layer.

    layer: the name of a module, which gives (B, C, h, w), or (B, N, C) with grid=; or for models of transformers the number
    of a layer, at `site`. Frozen weights do no harm, where the input is no ids. No weight's gradient changes. Raises
    OptionError, ShapeError, Unsupported.
    """
    if isinstance(layer, str):
        tape = record_modules(model, inputs, (layer,), grads=True)
        if tape.steps() != 1:
            raise Unsupported(f"the module {layer!r} ran {tape.steps()} times in one pass; name one that runs once")
        x, name = tape[layer, 0], f"the module {layer!r}"
    else:
        word = "pixel_values" if isinstance(inputs, Tensor) and inputs.is_floating_point() else "input_ids"
        given = {word: inputs} if isinstance(inputs, Tensor) else dict(inputs)
        # so that there are gradients in a model whose weights are frozen
        given = {key: value.detach().requires_grad_() if _floats(value) else value for key, value in given.items()}
        tape = record(model, given, sites=(site,), layers=None if site == "final" else (layer,), grads=True)
        x, name = tape[site, 0 if site == "final" else layer], f"{site} of layer {layer}"
    if not x.requires_grad:
        raise Unsupported(f"no gradient reaches {name}: let a weight before it require one, or give layer= by its name")
    with torch.enable_grad():
        # rows do not mix, so that the sum keeps their gradients apart
        score = class_scores(tape.output, target)[0].sum()
        gradient = torch.autograd.grad(score, x, allow_unused=True)[0] if score.requires_grad else None
    pair = [x.detach(), torch.zeros_like(x) if gradient is None else gradient]
    if x.dim() == 3:
        where = token_grid(x.shape[1], tape.meta.get("grid"), grid=grid, prefix_tokens=prefix_tokens)
        pair = [to_grid(tensor, where) for tensor in pair]
    elif x.dim() != 4:
        raise ShapeError(
            f"{name} gives {tuple(x.shape)}; a map needs (B, C, h, w), or tokens (B, N, C) and grid=(h, w)"
        )
    high = torch.promote_types(x.dtype, torch.float32)
    return Places(pair[0].to(high), pair[1].to(high), name)


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
