"""Our patterns, ops and mixers in the layers of a loaded model.

A pattern narrows who may meet whom; an op takes the place of softmax between the model's own projections; a mixer takes
the place of the whole attention, with the projections carried over where they fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.contract import names
from regard.contract.attach import AttentionCall, Session, model_inside, open_session
from regard.contract.card import InterventionCard, OpCard
from regard.contract.catalogue import find
from regard.contract.errors import OptionError, UnknownName, Unsupported
from regard.hosts.calls import one_pattern
from regard.hosts.transformers.anatomy import Layer, anatomy

# our mixers' projections <- what families call theirs
_CARRIED = {
    "to_q": ("q_proj", "query", "q"), "to_k": ("k_proj", "key", "k"), "to_v": ("v_proj", "value", "v"),
    "to_out": ("o_proj", "out_proj", "o"),
}  # fmt: skip


@dataclass
class Swap:
    """What was put in; `undo` takes it out again, and so does the end of a `with` block around it.

    layers: where. carried: for a mixer, "layer.projection" of every weight that was taken over.
    """

    layers: tuple[int, ...]
    carried: tuple[str, ...] = ()
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def undo(self) -> None:
        """Put back what was there."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *error: Any) -> None:
        self.undo()


def swap(
    model: PreTrainedModel,
    *,
    pattern: Any = None,
    mixer: str | None = None,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Swap:
    """Put a pattern, or a mixer by name, into layers of a loaded model.

    pattern: who may meet whom, besides the model's own mask. mixer: an op that takes patterns ("sigmoid",
    "sliding_window", …), between the model's own projections and with its cache; or a mixer module ("based", …), which
    has weights of its own, takes over projections that fit, and runs without a cache. layers: which, negative from the
    last, None for all. options: of the op or mixer. Raises OptionError, UnknownName, Unsupported.
    """
    if (pattern is None) == (mixer is None):
        raise OptionError("give pattern= or mixer=, one of them")
    model = model_inside(model)
    stack = anatomy(model).main
    chosen = stack.chosen(layers)
    if pattern is not None:
        if options:
            raise OptionError(f"a pattern takes no options, not {', '.join(options)}")
        return _by_session(model, chosen, _Narrow(pattern, chosen))
    assert mixer is not None
    op = _op(mixer)
    if op is not None:
        return _by_session(model, chosen, _Instead(op, chosen, options))
    return _by_module(model, [stack.layers[layer] for layer in chosen], mixer, options)


def _op(name: str) -> Any:
    try:
        entry = find(name, "ops")
    except UnknownName:
        return None
    card = entry.card
    assert isinstance(card, OpCard)
    return entry.load() if card.decode == "kv" and "pattern" in card.accepts else None


def _by_session(model: PreTrainedModel, layers: tuple[int, ...], effect: Any) -> Swap:
    session: Session = open_session(model, (effect,))
    session.__enter__()
    return Swap(layers, (), [lambda: session.__exit__(None, None, None)])


_CARD = InterventionCard(slug="swap", title="swap", exports=("swap",), baseline=True, sites=("scores",))


class _Narrow:
    """A pattern beside the model's own mask."""

    card = _CARD

    def __init__(self, pattern: Any, layers: tuple[int, ...]):
        self.pattern, self.layers = pattern, layers

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        if not call.main or call.layer not in self.layers:
            return follow()
        if call.positions is not None:
            raise Unsupported("a pattern speaks of all keys; this cache has given up some")
        own = call.pattern
        return follow(call.replace(pattern=self.pattern if own is None else own & self.pattern))


class _Instead:
    """An op in place of softmax attention."""

    card = _CARD

    def __init__(self, op: Any, layers: tuple[int, ...], options: dict[str, Any]):
        known = list(inspect.signature(op).parameters)
        for option in options:
            if option not in known:
                raise OptionError(f"{op.card.slug} has no option {option!r}; it has {', '.join(known[3:])}")
        self.op, self.layers, self.options = op, layers, options

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        if not call.main or call.layer not in self.layers:
            return follow()
        if call.bias is not None or call.sinks is not None or call.softcap is not None:
            raise Unsupported(f"{self.op.card.slug} knows no biases, sinks and caps, which this model's scores have")
        pattern, offset = one_pattern(call)
        given = {"scale": call.scale} if "scale" in self.op.card.accepts else {}
        z = self.op(call.q, call.k, call.v, pattern=pattern, q_offset=offset, **given, **self.options)
        return follow(call.instead_of(z, self.op.card.slug))


class _Mixed(nn.Module):
    """Our mixer where the model's attention was: the same call, the same result, no cache."""

    def __init__(self, mixer: nn.Module, is_causal: bool):
        super().__init__()
        self.mixer, self.is_causal = mixer, is_causal

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None, **others: Any
    ) -> tuple[Tensor, None]:
        """(B, N, C) -> (B, N, C), and no weights."""
        if past_key_values is not None:
            raise Unsupported("a mixer with weights of its own runs without a cache: use_cache=False")
        padding = None
        if isinstance(attention_mask, Tensor):
            # the last query of a causal mask sees every key that is there
            visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1
            padding = visible[:, 0, -1].expand(hidden_states.shape[0], -1)
        return self.mixer(hidden_states, padding=padding, is_causal=self.is_causal), None


def _by_module(model: PreTrainedModel, layers: list[Layer], name: str, options: dict[str, Any]) -> Swap:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    done = Swap(tuple(layer.index for layer in layers))
    carried = []
    for layer in layers:
        made = names.mixer(name, config.hidden_size, heads, **options)
        like = next(layer.attention.parameters())
        made = made.to(dtype=like.dtype, device=like.device).train(layer.attention.training)
        carried += [f"{layer.index}.{part}" for part in _carry(layer.attention, made)]
        parent, attribute = _holder(layer.module, layer.attention)
        causal = getattr(layer.attention, "is_causal", True)
        setattr(parent, attribute, _Mixed(made, causal))
        done._undo.append(partial(setattr, parent, attribute, layer.attention))
    done.carried = tuple(carried)
    return done


@torch.no_grad()
def _carry(attention: nn.Module, mixer: nn.Module) -> list[str]:
    """Take over the projections of one shape; their names."""
    taken = []
    for ours, theirs in _CARRIED.items():
        mine: Any = getattr(mixer, ours, None)
        other: Any = next((getattr(attention, name) for name in theirs if hasattr(attention, name)), None)
        if (
            not isinstance(mine, nn.Linear)
            or not isinstance(other, nn.Linear)
            or mine.weight.shape != other.weight.shape
        ):
            continue
        mine.weight.copy_(other.weight)
        if mine.bias is not None:
            mine.bias.copy_(other.bias) if other.bias is not None else mine.bias.zero_()
        taken.append(ours)
    return taken


def _holder(layer: nn.Module, attention: nn.Module) -> tuple[nn.Module, str]:
    for module in layer.modules():
        for name, child in module.named_children():
            if child is attention:
                return module, name
    raise Unsupported("the layer does not hold its attention")
