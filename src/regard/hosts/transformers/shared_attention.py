"""Layers without query and key projections, which use the queries and keys of another layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from regard.contract.errors import OptionError, Unsupported
from regard.hosts.transformers.anatomy import anatomy

# what queries and keys pass before they are rotated; a follower takes what came out at its leader
_SHARED = ("q_proj", "k_proj", "q_norm", "k_norm")


class ValuesLayer(DynamicLayer):
    """A layer of the cache that holds values (B, G, M, E) alone; its keys are those of its leader's layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, leader: DynamicLayer) -> None:
        super().__init__()
        self.leader = leader

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states[..., :0], value_states)
        keys = self.leader.keys
        assert keys is not None
        if keys.shape[2] != self.values.shape[2]:
            raise Unsupported(
                f"the leader holds {keys.shape[2]} keys for {self.values.shape[2]} values: keys of layers that share "
                "attention cannot be given up"
            )
        return keys, self.values

    def get_seq_length(self) -> int:
        return self.values.shape[-2] if self.is_initialized else 0


class Echo(nn.Module):
    """Stands where a projection or a norm of a follower stood, and gives what its leader's gave."""

    def __init__(self, heard: Heard, last: bool):
        super().__init__()
        self.heard, self.last = heard, last

    def forward(self, x: Tensor) -> Tensor:
        value = self.heard.value
        if value is None or value.shape[:2] != x.shape[:2]:
            raise Unsupported(
                "a layer that shares attention ran without its leader before it; with gradient checkpointing switch that off"
            )
        if self.last:
            self.heard.value = None
        return value


class Heard:
    """A forward hook that keeps what its module gave, until the last follower has taken it."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.value = output


class KeepValues:
    """A forward pre-hook on a follower's attention: its layer of the cache becomes one of values."""

    def __init__(self, leader: int, follower: int):
        self.leader, self.follower = leader, follower

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return
        if len(cache.layers) == self.follower:
            cache.layers.append(DynamicLayer())
        found = cache.layers[self.follower]
        if isinstance(found, ValuesLayer):
            return
        if type(found) is not DynamicLayer or found.is_initialized:
            raise Unsupported(
                f"layer {self.follower} shares attention and keeps values only, which a {type(found).__name__} that is "
                "in use or of a fixed kind cannot; start with a new DynamicCache, without interventions on it"
            )
        cache.layers[self.follower] = ValuesLayer(cache.layers[self.leader])


def share(model: PreTrainedModel, blocks: Sequence[Sequence[int]]) -> None:
    """Make the layers of each block but its first use the queries and keys of the first. Raises OptionError, Unsupported."""
    layers = anatomy(model).main.layers
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    blocks = [block for block in blocks if len(block) > 1]
    for block in blocks:
        for index in block:
            _check(layers[index].attention, index, "full_attention" if kinds is None else kinds[index])
        shapes = {tuple(getattr(layers[i].attention, name).weight.shape for name in _SHARED[:2]) for i in block}
        if len(shapes) > 1:
            raise Unsupported(f"the layers {tuple(block)} differ in heads or width")
    for first, *followers in blocks:
        leader = layers[first].attention
        for name in _SHARED:
            if not hasattr(leader, name):
                continue
            heard = Heard()
            getattr(leader, name).register_forward_hook(heard)
            for index in followers:
                setattr(layers[index].attention, name, Echo(heard, index == followers[-1]))
        for index in followers:
            layers[index].attention.register_forward_pre_hook(KeepValues(first, index), with_kwargs=True)


def _check(attention: nn.Module, index: int, kind: str) -> None:
    name = type(attention).__name__
    parts = [getattr(attention, part, None) for part in _SHARED[:2]]
    if any(isinstance(part, Echo) for part in parts) or any(
        isinstance(hook, Heard)
        for part in parts
        if isinstance(part, nn.Module)
        for hook in part._forward_hooks.values()
    ):
        raise OptionError(f"layer {index} shares its attention already")
    if not all(isinstance(part, nn.Linear) for part in parts):
        raise Unsupported(f"{name} of layer {index} has no q_proj and k_proj of its own to take away")
    if kind != "full_attention":
        raise Unsupported(f"layer {index} is of kind {kind!r}: only full layers share without projections")
    if getattr(attention, "attention_dropout", 0.0):
        raise Unsupported(
            f"{name} drops {attention.attention_dropout} of its weights, in each layer others: set attention_dropout to 0"
        )
