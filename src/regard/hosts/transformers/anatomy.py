"""Which modules of a transformers model are its stacks, layers, attention, projections: read off the module tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regard.contract.errors import OptionError, Unsupported

# the names under which families keep these parts of a layer
_OUT = ("o_proj", "c_proj", "out_proj", "dense", "o", "proj")
_MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "DenseReluDense")
_DOWN = ("down_proj", "c_proj", "fc2", "wo", "w2", "dense")
_BEFORE_MLP = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "ln_2",
    "layernorm_after",
    "layer_norm2",
    "norm2",
)
_FINAL = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layernorm", "post_layernorm")
_CROSS = ("cross", "EncDec", "encoder_attn")


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a stack; parts that it lacks, or that were not recognised, are None.

    module: the layer. attention, cross: what calls the attention function. out: the output projection of `attention`;
    attn_out, mlp_out: the modules whose output joins the stream; before_mlp: the norm whose input is the middle of the
    stream; down: the last projection of the feed-forward part. router: what chooses experts.
    """

    index: int
    module: nn.Module
    attention: nn.Module
    cross: nn.Module | None = None
    out: nn.Module | None = None
    attn_out: nn.Module | None = None
    before_mlp: nn.Module | None = None
    mlp_out: nn.Module | None = None
    down: nn.Module | None = None
    router: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers that follow each other. place: "" for a model's only or language stack, else "encoder", "decoder",
    "vision". base: the module that holds the layers and runs them."""

    place: str
    base: nn.Module
    layers: tuple[Layer, ...]
    final: nn.Module | None = None

    def chosen(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """Which layers these are, counted from the first: negative ones from the last, None for all. Raises OptionError."""
        count = len(self.layers)
        if layers is None:
            return tuple(range(count))
        for layer in layers:
            if not -count <= layer < count:
                raise OptionError(f"there is no layer {layer}: the layers are 0 to {count - 1}, or -1 to -{count}")
        return tuple(layer % count for layer in layers)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The stacks of a model by place, and its last one, which reads text and writes logits."""

    stacks: dict[str, Stack] = field(default_factory=dict)

    @property
    def main(self) -> Stack:
        """The stack that cache, tokens and logits belong to."""
        return self.stacks[next(p for p in ("", "decoder", "encoder", "vision") if p in self.stacks)]


def anatomy(model: nn.Module) -> Anatomy:
    """Find the stacks of a model. Raises Unsupported for one without attention layers."""
    found: dict[str, tuple[str, nn.ModuleList]] = {}
    names = dict(model.named_modules())
    lists = [
        (name, module)
        for name, module in names.items()
        if isinstance(module, nn.ModuleList) and len(module) and all(any(_leaves(layer)) for layer in module)
    ]
    # T5 keeps the parts of one layer in a list of their own
    outermost = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists)]
    for name, module in outermost:
        found[_place(name, [n for n, _ in outermost])] = (name, module)
    if not found:
        raise Unsupported(f"{type(model).__name__} has no stack of attention layers that was recognised")
    stacks = {}
    for place, (name, module) in found.items():
        base = names[name.rpartition(".")[0]]
        final = _first(base, _FINAL)
        if final is None and "." in name:
            final = _first(names[name.rpartition(".")[0].rpartition(".")[0]], _FINAL)
        stacks[place] = Stack(place, base, tuple(_layer(i, layer) for i, layer in enumerate(module)), final)
    return Anatomy(stacks)


def _leaves(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute attention: named so, with projections, and none of their own kind inside."""
    for name, module in layer.named_modules():
        if "Attention" not in type(module).__name__ or not any(isinstance(c, nn.Module) for c in module.children()):
            continue
        if not any("Attention" in type(inner).__name__ for inner in module.modules() if inner is not module):
            yield name, module


def _place(name: str, others: list[str]) -> str:
    if "vision" in name or "visual" in name:
        return "vision"
    for side, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if side in name and any(other in o for o in others):
            return side
    return ""


def _layer(index: int, layer: nn.Module) -> Layer:
    leaves = list(_leaves(layer))
    cross = next((m for n, m in leaves if any(word in n for word in _CROSS)), None)
    name, attention = next((n, m) for n, m in leaves if m is not cross)
    modules = dict(layer.named_modules())
    parts: Any = layer
    out = _first(attention, _OUT)
    if out is None:
        # BERT keeps it beside: attention.self and attention.output.dense
        beside: Any = modules.get(name.rpartition(".")[0])
        out = _first(beside.output, _OUT) if beside is not None and hasattr(beside, "output") else None
    mlp = next((m for n, m in modules.items() if n.rpartition(".")[2] in _MLP), None)
    if mlp is None and hasattr(parts, "intermediate"):
        # BERT: intermediate, then output with the projection, norm and sum
        down = mlp_out = _first(parts.output, _OUT)
    else:
        down, mlp_out = (None, None) if mlp is None else (_first(mlp, _DOWN), mlp)
    attn_out = out
    if hasattr(parts, "pre_feedforward_layernorm"):
        # norms on both sides of each part
        attn_out, mlp_out = parts.post_attention_layernorm, parts.post_feedforward_layernorm
    router = next((m for m in layer.modules() if type(m).__name__.lower().endswith("topkrouter")), None)
    return Layer(index, layer, attention, cross, out, attn_out, _first(layer, _BEFORE_MLP), mlp_out, down, router)


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(module, n) for n in names if isinstance(getattr(module, n, None), nn.Module)), None)
