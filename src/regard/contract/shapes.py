"""Shape specs: "q: b h n d, k: b g m d -> b h n d" names every axis once, for checks, tests and error texts.

Letters: b batch, h query heads, g key heads, n queries, m keys, d key width, e value width, c model width,
l landmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from regard.contract.errors import OptionError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

AXES = {
    "b": "batch",
    "h": "query heads",
    "g": "key heads",
    "n": "queries",
    "m": "keys",
    "d": "key width",
    "e": "value width",
    "c": "model width",
    "l": "landmarks",
}


@dataclass(frozen=True)
class Spec:
    """inputs: (tensor name, its axis letters) in order; outputs: the axis letters of each result."""

    inputs: tuple[tuple[str, tuple[str, ...]], ...]
    outputs: tuple[tuple[str, ...], ...]


@cache
def parse(spec: str) -> Spec:
    """Read a spec line. Raises OptionError if it is malformed."""
    left, arrow, right = spec.partition("->")
    if not arrow:
        raise OptionError(f"the spec {spec!r} has no '->'")
    inputs = []
    for part in left.split(","):
        name, colon, axes = part.partition(":")
        if not colon:
            raise OptionError(f"the spec {spec!r} has an input without a name: {part.strip()!r}")
        inputs.append((name.strip(), tuple(axes.split())))
    return Spec(tuple(inputs), tuple(tuple(part.split()) for part in right.split(",")))


def bind(spec: Spec, tensors: tuple[Tensor, ...], system: str) -> dict[str, int]:
    """The size of every axis letter. Raises ShapeError naming the tensor, the axis and both sizes."""
    sizes: dict[str, int] = {}
    for (name, axes), tensor in zip(spec.inputs, tensors, strict=True):
        shape = tensor.shape
        if len(shape) != len(axes):
            raise ShapeError(
                f"{system}: {name} has {len(shape)} axes {tuple(shape)}; it must have {len(axes)}: {' '.join(axes)} "
                f"({', '.join(AXES.get(a, a) for a in axes)})"
            )
        for position, axis in enumerate(axes):
            if sizes.setdefault(axis, shape[position]) != shape[position]:
                raise ShapeError(
                    f"{system}: axis {axis} ({AXES.get(axis, axis)}) of {name} is {shape[position]}, "
                    f"but an earlier tensor has {sizes[axis]}; shapes are "
                    + ", ".join(f"{n} {tuple(t.shape)}" for (n, _), t in zip(spec.inputs, tensors, strict=True))
                )
    if "g" in sizes and "h" in sizes and (sizes["g"] == 0 or sizes["h"] % sizes["g"]):
        raise ShapeError(
            f"{system}: {sizes['h']} query heads cannot share {sizes['g']} key heads; "
            "the query heads must be a multiple of the key heads"
        )
    return sizes


def check_types(tensors: tuple[Tensor, ...], names: tuple[str, ...], system: str) -> None:
    """Raise ShapeError if dtypes or devices differ, or the dtype is not a floating type (autocast may mix dtypes)."""
    first = tensors[0]
    if not first.is_floating_point():
        raise ShapeError(f"{system}: {names[0]} is {first.dtype}; attention needs a floating dtype")
    for name, tensor in zip(names[1:], tensors[1:], strict=True):
        if tensor.device != first.device:
            raise ShapeError(f"{system}: {name} is on {tensor.device} but {names[0]} on {first.device}")
        if tensor.dtype is not first.dtype:
            import torch

            if first.is_meta or not torch.is_autocast_enabled(first.device.type):
                raise ShapeError(
                    f"{system}: {name} is {tensor.dtype} but {names[0]} is {first.dtype}; cast one of them"
                )


_DTYPES = {
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "fp64": "float64",
}


def read_tensors(text: str, spec: Spec) -> tuple[Any, ...]:
    """Meta tensors from "q=2,8,4096,64:bf16 k=…"; k and v default to q's shape, the dtype to float32."""
    import torch

    given: dict[str, tuple[list[int], str]] = {}
    for word in text.split():
        name, equals, rest = word.partition("=")
        sizes, _, dtype = rest.partition(":")
        if not equals or not all(s.isdigit() for s in sizes.split(",")):
            raise OptionError(f"cannot read {word!r}; write it as q=2,8,4096,64:bf16")
        if name not in dict(spec.inputs):
            raise OptionError(f"there is no tensor {name!r}; the inputs are {', '.join(n for n, _ in spec.inputs)}")
        dtype = _DTYPES.get(dtype or "fp32", dtype)
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise OptionError(f"unknown dtype {dtype!r}; one of {', '.join(_DTYPES)}")
        given[name] = ([int(s) for s in sizes.split(",")], dtype)
    if not given:
        raise OptionError("give at least q, such as q=2,8,4096,64:bf16")
    default = next(iter(given.values()))
    tensors = []
    for name, _ in spec.inputs:
        shape, dtype = given.get(name, default)
        tensors.append(torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
    return tuple(tensors)
