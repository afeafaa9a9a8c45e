"""What lies between the modules of a model: hooks that hand streams, tokens, routers' choices and outputs to effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.contract.attach import HIDDEN, AttentionCall
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.transformers.anatomy import Anatomy, Layer
from regard.hosts.transformers.attention import Attention
from regard.hosts.transformers.effects import Beside, Effects
from regard.hosts.transformers.masks import LateMask
from regard.hosts.transformers.passes import Passes


@dataclass
class Choice:
    """What a router chose for T tokens: logits (T, E), weights and experts (T, k); layer: of the stack."""

    layer: int
    router: nn.Module
    logits: Tensor
    weights: Tensor
    experts: Tensor


class Hooks(Beside):
    """The hooks on one model."""

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, effects: Effects, passes: Passes, attention: Attention
    ):
        self.model, self.anatomy, self.effects, self.passes = model, anatomy, effects, passes
        self.attention = attention
        self._hooks: list[Any] = []
        self._labelled = False

    def remove(self) -> None:
        """Take all of them away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def lay(self) -> None:
        """Lay those that the effects in force need."""
        main = self.anatomy.main
        self._hooks.append(main.base.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(main.base.register_forward_hook(self.passes.end))
        for stack in self.anatomy.stacks.values():
            for module in (stack.base, *(layer.module for layer in stack.layers)):
                self._hooks.append(module.register_forward_hook(self.passes.for_gradients(stack)))
        if self.effects.acting("on_z") and not self.model._can_set_attn_implementation():
            for layer in main.layers:
                if layer.out is None:
                    raise Unsupported(f"{type(self.model).__name__} has no output projection that was recognised")
                self._hooks.append(layer.out.register_forward_pre_hook(self._z_hook(layer)))
        if self.effects.acting("on_router"):
            for layer in main.layers:
                if layer.router is not None:
                    self._hooks.append(layer.router.register_forward_hook(self._router_hook(layer)))
        if self.effects.acting("on_logits") or self.effects.acting("on_output"):
            self._hooks.append(self.model.register_forward_hook(self._output_hook))
        if self.effects.acting("on_tokens"):
            self._hooks.append(self.model.register_forward_pre_hook(self._look_for_labels, with_kwargs=True))
            for layer in main.layers:
                self._hooks.append(layer.module.register_forward_pre_hook(self._tokens_hook(layer), with_kwargs=True))
        if any(getattr(effect, "needs_rotation", False) for _, effect in self.effects.pairs):
            for layer in main.layers:
                self._hooks.append(
                    layer.attention.register_forward_pre_hook(self._rotation_hook(layer), with_kwargs=True)
                )
        for site in dict.fromkeys(s for e in self.effects.acting("on_hidden") for s in e.hidden_sites):
            self._lay_stream(site)
        for effect in self.effects.acting("on_module"):
            for name, module in effect.modules.items():
                self._hooks.append(module.register_forward_hook(_tells(effect, name)))

    def _begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.attention.check()
        return self.passes.begin(base, args, kwargs)

    def _z_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            heads = self.model.config.num_attention_heads
            z = args[0].unflatten(-1, (heads, -1)).transpose(1, 2)
            call = AttentionCall(z, z, z, None, None, 1.0, layer.index, self.passes.step, self.anatomy.main.place)
            for effect in self.effects.acting("on_z"):
                z = effect.on_z(call, z)
            return (z.transpose(1, 2).flatten(2), *args[1:])

        return hook

    def _router_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, tuple) or len(output) != 3:
                raise Unsupported(
                    f"{type(module).__name__} does not choose experts itself in this version of transformers"
                )
            choice = Choice(layer.index, module, *output)
            for effect in self.effects.acting("on_router"):
                choice = effect.on_router(self.passes.step, choice)
            return choice.logits, choice.weights, choice.experts

        return hook

    def _output_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            raise Unsupported("logits are found by their name in the output: leave return_dict=False out")
        if self.effects.acting("on_logits"):
            logits = output.logits
            last = changed = logits[:, -1]
            for effect in self.effects.acting("on_logits"):
                changed = effect.on_logits(self.passes.step, self.passes.step.ids, changed)
            if changed is not last:
                output.logits = torch.cat((logits[:, :-1], changed.unsqueeze(1)), 1)
        for effect in self.effects.acting("on_output"):
            effect.on_output(self.passes.step, output)
        return output

    def _look_for_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._labelled = kwargs.get("labels") is not None

    def _tokens_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if x.shape[1] == 1 and self.passes.step.phase == "decode":
                return None
            at = self.passes.dropped.get(layer.index - 1)
            keep: Tensor | None = None
            for effect in self.effects.acting("on_tokens"):
                chosen = effect.on_tokens(self.passes.step, layer.index, x)
                if chosen is not None:
                    keep = chosen if keep is None else keep.gather(1, chosen)
            if keep is not None:
                if self._labelled:
                    raise Unsupported(
                        "tokens are dropped, so the logits are fewer than the labels: call it without labels"
                    )
                if bool((keep[:, -1] != x.shape[1] - 1).any()):
                    raise OptionError("the last token must be kept: the next one is read from it")
                x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
                at = keep if at is None else at.gather(1, keep)
            if at is None:
                return None
            self.passes.dropped[layer.index] = at
            kept = self.passes.kept(layer.index)
            if kept is not None:
                kept.arrive(at, self.passes.step.tokens)
            elif self.passes.cache is not None:
                raise Unsupported(f"layer {layer.index} has a sliding cache, which counts the tokens that it gets")
            args = (x, *args[1:]) if args else args
            return args, {**kwargs, **({} if args else {"hidden_states": x}), **_cut(kwargs, at)}

        return hook

    def _rotation_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer.index in self.passes.dropped:
                raise Unsupported(f"layer {layer.index} lost tokens, so its rotation is not that of the sequence")
            self.attention.rotations.see(layer.index, self.passes.step.start, module, args, kwargs)

        return hook

    def _lay_stream(self, site: str) -> None:
        if site not in HIDDEN:
            raise OptionError(f"{site!r} is no stream between modules; they are {', '.join(HIDDEN)}")
        main = self.anatomy.main
        if site == "final":
            if main.final is None:
                raise Unsupported(f"{type(self.model).__name__} has no final norm that was recognised")
            self._hooks.append(main.final.register_forward_hook(self._after(site, len(main.layers))))
            return
        for layer in main.layers[:1] if site == "embed" else main.layers:
            module, before = {
                "embed": (layer.module, True), "resid_pre": (layer.module, True), "resid_post": (layer.module, False),
                "resid_mid": (layer.before_mlp, True), "mlp_hidden": (layer.down, True),
                "attn_out": (layer.attn_out, False), "mlp_out": (layer.mlp_out, False),
            }[site]  # fmt: skip
            if module is None:
                raise Unsupported(f"{type(self.model).__name__} has no site {site!r} in layer {layer.index}")
            if before:
                self._hooks.append(module.register_forward_pre_hook(self._ahead(site, layer.index), with_kwargs=True))
            else:
                self._hooks.append(module.register_forward_hook(self._after(site, layer.index)))

    def _ahead(self, site: str, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._stream(site, layer, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._stream(site, layer, kwargs["hidden_states"])}

        return hook

    def _after(self, site: str, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._stream(site, layer, output[0]), *output[1:])
            return self._stream(site, layer, output)

        return hook

    def _stream(self, site: str, layer: int, x: Tensor) -> Tensor:
        for effect in self.effects.acting("on_hidden"):
            if site in effect.hidden_sites:
                x = effect.on_hidden(self.passes.step, site, layer, x)
        return x


def _tells(effect: Any, name: str) -> Callable[..., None]:
    return lambda module, args, output: effect.on_module(name, output)


def _cut(kwargs: dict[str, Any], at: Tensor) -> dict[str, Any]:
    """What the base model hands to every layer at full length, for the tokens that are left."""
    changed: dict[str, Any] = {}
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None:
        changed["position_embeddings"] = tuple(
            x.expand(at.shape[0], -1, -1).gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in embeddings
        )
    positions = kwargs.get("position_ids")
    if positions is not None:
        changed["position_ids"] = positions.expand(at.shape[0], -1).gather(1, at)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, LateMask):
        changed["attention_mask"] = mask.taking(at)
    return changed
