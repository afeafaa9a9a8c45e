"""A model's attention, sent from the library's registries through the effects."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from regard.contract.attach import AttentionCall, Seen
from regard.contract.errors import Unsupported
from regard.hosts.transformers.anatomy import Anatomy
from regard.hosts.transformers.effects import Beside, Effects
from regard.hosts.transformers.masks import LateMask, who_meets
from regard.hosts.transformers.passes import COPIED, Passes
from regard.hosts.transformers.rotation import Rotations

NAME = "regard"
# keywords of attention functions that change no result, and those that a call takes in
_HARMLESS = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "sliding_window", "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache_position",
    "position_embeddings", "num_items_in_batch", "logits_to_keep", "is_causal", "mm_token_type_ids", "token_type_ids",
    "cross_attention_mask", "head_mask", "block_sequence_ids",
}  # fmt: skip
_KNOWN = {"s_aux", "position_bias", "softcap"}


class Attention(Beside):
    """The attention layers of a model. The vision tower beside a language model keeps its own way.

    rotations: what the layers of the main stack do to queries and keys by their places, as far as it was seen.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, effects: Effects, passes: Passes):
        self.model, self.anatomy, self.effects, self.passes = model, anatomy, effects, passes
        self.rotations = Rotations(_OWNERS)
        self._where: dict[nn.Module, tuple[str, int, str]] = {}
        self._stacks = [s for s in anatomy.stacks.values() if s.place != "vision" or s is anatomy.main]
        for stack in self._stacks:
            for layer in stack.layers:
                self._where[layer.attention] = (stack.place, layer.index, "self")
                if layer.cross is not None:
                    self._where[layer.cross] = (stack.place, layer.index, "cross")
        self._before: list[tuple[Any, str]] = []

    def claim(self) -> None:
        """Make the layers this model's. Raises Unsupported where another model with sessions has them."""
        for module in self._where:
            other = _owner(module)
            if other is not None and other is not self:
                raise Unsupported(
                    f"the layers of this {type(self.model).__name__} are those of a {type(other.model).__name__} that is "
                    "under steer or record: open all sessions on the same of the two"
                )
        _OWNERS.update(dict.fromkeys(self._where, ref(self)))

    def leave(self) -> None:
        """Let go of the layers."""
        for module in self._where:
            if _owner(module) is self:
                del _OWNERS[module]

    def switch(self, on: bool) -> None:
        """Send the model's attention here, or to where it went before. Raises Unsupported for a copy made in a session."""
        if on and not self._before:
            AttentionInterface.register(NAME, _attend)
            AttentionMaskInterface.register(NAME, _late_mask)
            # models look their mask function up in the config of the stack, or in their own
            parts: list[Any] = [*self._where, *(stack.base for stack in self._stacks)]
            if not self.model.config.sub_configs:
                parts.append(self.model)
            configs: dict[int, Any] = {id(part.config): part.config for part in parts if hasattr(part, "config")}
            if any(config._attn_implementation == NAME for config in configs.values()):
                raise Unsupported(COPIED.format(f"this {type(self.model).__name__}"))
            self._before = [(config, config._attn_implementation) for config in configs.values()]
            for config in configs.values():
                config._attn_implementation_internal = NAME
        elif not on:
            for config, implementation in self._before:
                # what was set meanwhile stays
                if config._attn_implementation == NAME:
                    config._attn_implementation_internal = implementation
            self._before = []

    def check(self) -> None:
        """Raise Unsupported where the attention goes elsewhere though it was sent here."""
        for config, _ in self._before:
            if config._attn_implementation != NAME:
                raise Unsupported(
                    f"the attention of this {type(self.model).__name__} was set to {config._attn_implementation!r} inside a "
                    "session, which then no longer sees it: call set_attn_implementation before steer or record"
                )

    def before(self, module: nn.Module) -> str | None:
        """The implementation that a module, of this model or of another with the same config, had."""
        return next((name for config, name in self._before if config is module.config), None)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, scaling: float | None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What transformers calls: out (B, N, H, E), and the weights if the model's own way returns them."""
        place, index, kind = self._where[module]
        main = place == self.anatomy.main.place and kind == "self"
        kept = self.passes.kept(index) if main else None
        theirs: list[Tensor | None] = [None]

        def plain() -> Tensor:
            name = self.before(module)
            assert name is not None
            out, theirs[0] = _as_before(name, module, q, k, v, mask, dropout=dropout, scaling=scaling, **more)
            return out.transpose(1, 2)

        positions = None if kept is None else kept.positions
        if positions is None and main and index in self.passes.dropped:
            positions = self.passes.dropped[index].unsqueeze(1)
        call = self._call(module, q, k, v, mask, dropout, scaling, positions, more)
        call = replace(
            call, place=place, kind=kind, layer=index, main=main, kept=kept, plain=plain if positions is None else None,
            rotation=self.rotations.layers.get(index) if main else None,
        )  # fmt: skip
        z, weights = self._through(call)
        return z.transpose(1, 2), theirs[0] if weights is None else weights

    def _call(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, scaling: float | None,
        positions: Tensor | None, more: dict[str, Any],
    ) -> AttentionCall:  # fmt: skip
        strange = [name for name, x in more.items() if x is not None and name not in _HARMLESS | _KNOWN]
        if strange:
            raise Unsupported(
                f"{type(module).__name__} hands {', '.join(strange)} to its attention, which regard does not know"
            )
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        pattern, visible, bias, offset = who_meets(mask, causal, q.shape[2])
        if positions is not None:
            pattern, visible, offset = None, _of_kept(mask, positions, q.shape[1]), 0
        position_bias = more.get("position_bias")
        if position_bias is not None:
            bias = position_bias if bias is None else bias + position_bias
        sinks = more.get("s_aux")
        return AttentionCall(
            q, k, v, pattern, visible, q.shape[-1] ** -0.5 if scaling is None else scaling, 0, self.passes.step, bias=bias,
            sinks=None if sinks is None else sinks.view(1, -1, 1, 1), softcap=more.get("softcap"), dropout_p=dropout,
            q_offset=offset, positions=positions,
        )  # fmt: skip

    def _through(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """The call through all effects; (z, weights if somebody looked at them)."""
        made: list[Tensor | None] = [None]

        def finish(call: AttentionCall) -> Tensor:
            scores = weights = None
            on_scores, on_weights = (
                [e for e in self.effects.acting(method) if not hasattr(e, "wants") or e.wants(call)]
                for method in ("on_scores", "on_weights")
            )
            if on_scores or on_weights:
                scores = call.scores()
                for effect in on_scores:
                    scores = effect.on_scores(call, scores)
                weights = call.weights(scores)
                for effect in on_weights:
                    weights = effect.on_weights(call, weights)
                z = call.heads(weights)
            else:
                z = call.run()
            for effect in self.effects.acting("on_z"):
                z = effect.on_z(call, z)
            for effect in self.effects.acting("on_read"):
                effect.on_read(call, Seen(z, scores, weights))
            made[0] = weights
            return z

        follow: Callable[[AttentionCall], Tensor] = finish
        for effect in reversed(self.effects.acting("on_attention")):
            follow = _around(effect, follow)
        return follow(call), made[0]


# whose an attention layer is: its function is handed nothing but the layer
_OWNERS: WeakKeyDictionary[nn.Module, Callable[[], Any]] = WeakKeyDictionary()


def _owner(module: nn.Module) -> Any:
    return _OWNERS.get(module, lambda: None)()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    owner = _owner(module)
    if owner is not None:
        return owner.attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)  # type: ignore[no-any-return]
    # a model that has its config in common with one that is steered goes its own way
    others = dict.fromkeys(made() for made in _OWNERS.values())
    name = next((found for other in others if isinstance(other, Attention) and (found := other.before(module))), None)
    if name is None:
        raise Unsupported(COPIED.format(f"this {type(module).__name__}"))
    return _as_before(name, module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _as_before(
    name: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """What the implementation of a name makes of a call."""
    if isinstance(mask, LateMask):
        mask = mask.as_made_for(name) if mask.rows is None else mask.dense()
    eager = sys.modules[type(module).__module__].eager_attention_forward if name == "eager" else None
    return (eager or AttentionInterface()[name])(module, q, k, v, mask, **more)  # type: ignore[no-any-return]


def _late_mask(**arguments: Any) -> LateMask:
    return LateMask(arguments)


def _around(effect: Any, follow: Callable[[AttentionCall], Tensor]) -> Callable[[AttentionCall], Tensor]:
    return lambda call: effect.on_attention(call, lambda changed=call: follow(changed))


def _of_kept(mask: Any, positions: Tensor, heads: int) -> Tensor | None:
    """The columns of a mask at the positions of kept keys (B, G, M): bool (B, G or H, N, M); None if all may meet."""
    there = positions >= 0
    if mask is None:
        visible = there.unsqueeze(2)
    else:
        dense = mask.dense() if isinstance(mask, LateMask) else mask
        place = positions.clamp(min=0).unsqueeze(2).expand(-1, -1, dense.shape[2], -1)
        columns = dense.expand(positions.shape[0], positions.shape[1], -1, -1).gather(3, place)
        visible = columns & there.unsqueeze(2)
    if bool(visible.all()):
        return None
    groups = heads // positions.shape[1]
    return visible.repeat_interleave(groups, 1) if positions.shape[1] > 1 else visible
