"""Interventions on a transformers model: attention through the library's registries, all else through hooks.

A model under sessions has one `Attached`, which knows its modules and the effects in force; leaving the last session
takes it away, and the model is as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from regard.contract import attach
from regard.contract.attach import HIDDEN, AttentionCall, Seen, Step
from regard.contract.errors import OptionError, Unsupported
from regard.hosts.transformers.anatomy import Anatomy, Layer, anatomy
from regard.hosts.transformers.kept_layer import KeptLayer
from regard.hosts.transformers.masks import LateMask, who_meets
from regard.hosts.transformers.rotation import Rotations
from regard.hosts.transformers.uncompiled import compiled_parts, run_as_written

NAME = "regard"
# what the effects' methods need of the model
_AT_ATTENTION = ("on_scores", "on_weights", "on_z", "on_attention", "on_kv", "on_read", "on_tokens")
# keywords of attention functions that change no result, and those that `_Seen` takes in
_HARMLESS = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "sliding_window", "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache_position",
    "position_embeddings", "num_items_in_batch", "logits_to_keep", "is_causal", "mm_token_type_ids", "token_type_ids",
    "cross_attention_mask", "head_mask", "block_sequence_ids",
}  # fmt: skip
_KNOWN = {"s_aux", "position_bias", "softcap"}
# what stood in an attribute that was not there
_ABSENT = object()
# parameters that stand before the patches of an image, a token in each row
_BEFORE_GRID = {"cls_token", "class_embedding", "distillation_token", "register_tokens"}
# families whose stack hands on as many tokens as it got, whatever its layers return
_FIXED_LENGTH = {"gpt2"}


@dataclass
class Choice:
    """What a router chose for T tokens: logits (T, E), weights and experts (T, k); layer: of the stack."""

    layer: int
    router: nn.Module
    logits: Tensor
    weights: Tensor
    experts: Tensor


class TransformersSession(attach.Session):
    """Interventions at work on a transformers model; `attached` is what the sessions of one model share."""

    attached: Attached

    def __enter__(self) -> TransformersSession:
        self.attached = Attached.of(self.model)
        try:
            self.attached.add(self)
        except BaseException:
            self.attached.remove(self)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.attached.remove(self)

    def change(self, thing: Any, name: str, value: Any) -> None:
        """Set an attribute, of a config say, until this session ends; one that was not there is taken away again."""
        self.attached.changes.setdefault(self, []).append((thing, name, getattr(thing, name, _ABSENT)))
        setattr(thing, name, value)

    @property
    def anatomy(self) -> Anatomy:
        """The model's stacks and layers, inside the block and outside."""
        return _MODELS[self.model].anatomy if self.model in _MODELS else anatomy(self.model)

    def facts(self) -> dict[str, Any]:
        """What a tape says of the model: heads, key_heads, head_dim, rotary_base (of layers that see all; None without
        rotation), layer_types, and the grid of an image model."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        facts = {"heads": heads, "key_heads": getattr(config, "num_key_value_heads", None) or heads}
        # models whose stages differ have a list of heads, and no one width
        whole = config.hidden_size // heads if isinstance(heads, int) else None
        facts["head_dim"] = getattr(config, "head_dim", None) or whole
        rope = getattr(config, "rope_parameters", None) or {}
        facts["rotary_base"] = rope.get("full_attention", rope).get("rope_theta")
        facts["layer_types"] = getattr(config, "layer_types", None)
        facts["image_token"] = getattr(self.model.config, "image_token_id", None)
        image, patch = (sides(getattr(config, name, None)) for name in ("image_size", "patch_size"))
        if image is not None and patch is not None:
            names = self.model.named_parameters()
            before = sum(p.numel() // p.shape[-1] for name, p in names if name.rpartition(".")[2] in _BEFORE_GRID)
            facts["grid"] = (image[0] // patch[0], image[1] // patch[1], before)
        return facts

    def report(self) -> list[dict[str, Any]]:
        """Of every cached layer: tokens seen, keys held by each head (the mean over rows), bytes."""
        rows = []
        for layer, kept in enumerate(self.attached.layers_kept()):
            if not kept.is_initialized:
                continue
            held = (kept.positions_of_all() >= 0).sum(-1).float().mean(0)
            rows.append({"layer": layer, "seen": kept.seen, "kept": held.tolist(), "bytes": kept.nbytes})
        return rows


def sides(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size in a config: a number, two of them, or names with numbers; None for anything else."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    return tuple(size) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def open_session(model: PreTrainedModel, interventions: Sequence[Any]) -> TransformersSession:
    """A session on a model of transformers."""
    return TransformersSession(model, interventions)


class Attached:
    """One model's modules, and the effects of its sessions in their order."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.anatomy = anatomy(model)
        self.effects: list[tuple[attach.Session, Any]] = []
        self.changes: dict[attach.Session, list[tuple[Any, str, Any]]] = {}
        self.where: dict[nn.Module, tuple[str, int, str]] = {}
        for stack in self.anatomy.stacks.values():
            for layer in stack.layers:
                self.where[layer.attention] = (stack.place, layer.index, "self")
                if layer.cross is not None:
                    self.where[layer.cross] = (stack.place, layer.index, "cross")
        self.step = Step(0, "prefill", 0, 0)
        self.cache: Cache | None = None
        self._hooks: list[Any] = []
        self._before: list[tuple[Any, str]] = []
        self._compile_again: Callable[[], None] | None = None
        self._dropped: dict[int, Tensor] = {}
        self._rotations = Rotations(_MODULES)
        self._of_prompt = False

    @staticmethod
    def of(model: PreTrainedModel) -> Attached:
        """What is attached to a model, new if nothing is."""
        if model not in _MODELS:
            _MODELS[model] = Attached(model)
        return _MODELS[model]

    def __deepcopy__(self, memo: Any) -> Attached:
        # copies of the model are refused when they run; what is alive around it is not copied with them
        return self

    def add(self, session: attach.Session) -> None:
        """Let a session's interventions act. Raises Unsupported for a site that is missing or owned already."""
        owned = {
            site: i.card.slug
            for other in dict.fromkeys(s for s, _ in self.effects)
            for i in other.interventions
            for site in i.card.owns
        }
        for given in session.interventions:
            card = given.card
            for site in card.owns:
                if site in owned:
                    raise Unsupported(f"{card.slug} and {owned[site]} both own the site {site!r}: use one of them")
                owned[site] = card.slug
            self._need(card.slug, card.sites)
            self.effects.append((session, given.start(session) if hasattr(given, "start") else given))
        if self.effects:
            for part, name, value in compiled_parts(session.outer):
                session.change(part, name, value)
        self._lay()

    def remove(self, session: attach.Session) -> None:
        """End a session; with the last one nothing is left on the model."""
        self.effects = [(s, e) for s, e in self.effects if s is not session]
        for thing, name, value in reversed(self.changes.pop(session, [])):
            if value is _ABSENT:
                delattr(thing, name)
            else:
                setattr(thing, name, value)
        self._lay()
        if not self.effects:
            _MODELS.pop(self.model, None)

    def acting(self, method: str) -> list[Any]:
        """The effects that have a method, in order; those that only read come last, to see what the model used."""
        found = [effect for _, effect in self.effects if getattr(effect, method, None) is not None]
        return sorted(found, key=lambda effect: getattr(effect, "reads_only", False))

    def layers_kept(self) -> list[KeptLayer]:
        """The layers of the cache in use that keep positions."""
        return [] if self.cache is None else [x for x in self.cache.layers if isinstance(x, KeptLayer)]

    def _need(self, slug: str, sites: Sequence[str]) -> None:
        name = type(self.model).__name__
        dispatches = self.model._can_set_attn_implementation()
        for site in sites:
            if site in ("q", "k", "v", "scores", "weights", "kv", "tokens") and not dispatches:
                raise Unsupported(f"{slug} needs the site {site!r}, and {name} does not dispatch its attention")
            if site == "tokens" and self.model.config.model_type in _FIXED_LENGTH:
                raise Unsupported(f"{slug} drops tokens, and {name} shapes its output by the tokens that came in")
            if site == "router" and not any(layer.router for layer in self.anatomy.main.layers):
                raise Unsupported(f"{slug} needs the site 'router', and {name} has no routers")
            if site == "logits" and self.model.get_output_embeddings() is None:
                raise Unsupported(f"{slug} needs the site 'logits', and {name} has none")

    def _lay(self) -> None:
        """Lay the hooks that the effects in force need, and take away the others."""
        own = vars(self.model)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        wanted = any(self.acting(method) for method in _AT_ATTENTION)
        if wanted and not self._before and self.model._can_set_attn_implementation():
            self._dispatch()
        elif not wanted and self._before:
            for config, implementation in self._before:
                config._attn_implementation_internal = implementation
            self._before = []
        if self.effects and self._compile_again is None:
            self._compile_again = run_as_written(self.model, self.anatomy.main.base)
        if not self.effects:
            if self._compile_again is not None:
                self._compile_again()
                self._compile_again = None
            if getattr(own.get("_prefill"), "__self__", None) is self:
                del own["_prefill"]
            return
        main = self.anatomy.main
        if "_prefill" not in own and hasattr(self.model, "_prefill"):
            own["_prefill"] = self._read_prompt
        self._hooks.append(main.base.register_forward_pre_hook(self._begin, with_kwargs=True))
        if self.acting("on_z") and not self.model._can_set_attn_implementation():
            for layer in main.layers:
                if layer.out is None:
                    raise Unsupported(f"{type(self.model).__name__} has no output projection that was recognised")
                self._hooks.append(layer.out.register_forward_pre_hook(self._z_hook(layer)))
        if self.acting("on_router"):
            for layer in main.layers:
                if layer.router is not None:
                    self._hooks.append(layer.router.register_forward_hook(self._router_hook(layer)))
        if self.acting("on_logits") or self.acting("on_output"):
            self._hooks.append(self.model.register_forward_hook(self._output_hook))
        if self.acting("on_tokens"):
            for layer in main.layers:
                self._hooks.append(layer.module.register_forward_pre_hook(self._tokens_hook(layer), with_kwargs=True))
        if any(getattr(effect, "needs_rotation", False) for _, effect in self.effects):
            for layer in main.layers:
                self._hooks.append(
                    layer.attention.register_forward_pre_hook(self._rotation_hook(layer), with_kwargs=True)
                )
        for site in dict.fromkeys(s for e in self.acting("on_hidden") for s in e.hidden_sites):
            self._lay_stream(site)
        for effect in self.acting("on_module"):
            for name, module in effect.modules.items():
                self._hooks.append(module.register_forward_hook(_tells(effect, name)))

    # ---- attention

    def _dispatch(self) -> None:
        """Send the model's attention here. The vision tower beside a language model keeps its own."""
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, _late_mask)
        stacks = [s for s in self.anatomy.stacks.values() if s.place != "vision" or s is self.anatomy.main]
        places = {stack.place for stack in stacks}
        modules = [module for module, (place, _, _) in self.where.items() if place in places]
        # models look their mask function up in the config of the stack, or in their own
        parts: list[Any] = [*modules, *(stack.base for stack in stacks)]
        if not self.model.config.sub_configs:
            parts.append(self.model)
        configs: dict[int, Any] = {id(part.config): part.config for part in parts if hasattr(part, "config")}
        self._before = [(config, config._attn_implementation) for config in configs.values()]
        for config in configs.values():
            config._attn_implementation_internal = NAME
        for module in modules:
            _MODULES[module] = self

    def before(self, module: nn.Module) -> str:
        """The implementation that a module had."""
        return next((name for config, name in self._before if config is module.config), "sdpa")

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, scaling: float | None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What transformers calls: out (B, N, H, E), and the weights if the model's own way returns them."""
        place, index, kind = self.where[module]
        name = self.before(module)
        main = place == self.anatomy.main.place and kind == "self"
        kept = self._kept(index) if main else None
        theirs: list[Tensor | None] = [None]

        def plain() -> Tensor:
            given = mask.as_made_for(name) if isinstance(mask, LateMask) and mask.rows is None else mask
            given = given.dense() if isinstance(given, LateMask) else given
            own = _own_function(module, name)
            out, theirs[0] = own(module, q, k, v, given, dropout=dropout, scaling=scaling, **more)
            return out.transpose(1, 2)

        positions = None if kept is None else kept.positions
        if positions is None and main and index in self._dropped:
            positions = self._dropped[index].unsqueeze(1)
        call = self._call(module, q, k, v, mask, dropout, scaling, positions, more)
        call = replace(
            call, place=place, kind=kind, layer=index, main=main, kept=kept, plain=plain if positions is None else None,
            rotation=self._rotations.layers.get(index) if main else None,
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
            q, k, v, pattern, visible, q.shape[-1] ** -0.5 if scaling is None else scaling, 0, self.step, bias=bias,
            sinks=None if sinks is None else sinks.view(1, -1, 1, 1), softcap=more.get("softcap"), dropout_p=dropout,
            q_offset=offset, positions=positions,
        )  # fmt: skip

    def _through(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """The call through all effects; (z, weights if somebody looked at them)."""
        made: list[Tensor | None] = [None]

        def finish(call: AttentionCall) -> Tensor:
            scores = weights = None
            on_scores, on_weights = (
                [e for e in self.acting(method) if not hasattr(e, "wants") or e.wants(call)]
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
            for effect in self.acting("on_z"):
                z = effect.on_z(call, z)
            for effect in self.acting("on_read"):
                effect.on_read(call, Seen(z, scores, weights))
            made[0] = weights
            return z

        follow: Callable[[AttentionCall], Tensor] = finish
        for effect in reversed(self.acting("on_attention")):
            follow = _around(effect, follow)
        return follow(call), made[0]

    # ---- cache and steps

    def _read_prompt(self, *args: Any, is_first_iteration: bool = True, **kwargs: Any) -> Any:
        """What generate runs to read a prompt, in one pass or in pieces; a last piece of one token is no decoding step."""
        own: Any = type(self.model)
        self._of_prompt = is_first_iteration
        try:
            return own._prefill(self.model, *args, is_first_iteration=is_first_iteration, **kwargs)
        finally:
            self._of_prompt = False

    def _begin(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the main stack runs: which step this is, and the cache as one that can be kept in part."""
        past = kwargs.get("past_key_values")
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ids is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            ids = args[0]
        x = embeds if embeds is not None else ids if ids is not None else next((a for a in args if a is not None), None)
        if x is None or x.dim() < 2:
            return None
        tokens = x.shape[1]
        needs_cache = bool(self.acting("on_kv") or self.acting("on_tokens"))
        if needs_cache and past is None and kwargs.get("use_cache", getattr(base.config, "use_cache", False)):
            kwargs["past_key_values"] = past = DynamicCache(config=base.config)
        own = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
        if own is not None and needs_cache:
            self._adopt(own)
        start = own.get_seq_length() if own is not None else 0
        padding = kwargs.get("attention_mask")
        padding = padding.bool() if isinstance(padding, Tensor) and padding.dim() == 2 else None
        decoding = start > 0 and tokens == 1 and not self._of_prompt
        fresh = own is None or start == 0
        # what a cache held before it came here is no pass of this sequence
        first = fresh or (own is not self.cache and not decoding)
        if not decoding:
            self._dropped = {}
        self.step = Step(
            index=0 if first else self.step.index + 1, phase="decode" if decoding else "prefill", start=start,
            tokens=tokens, padding=padding, ids=ids, decoded=self.step.decoded + 1 if decoding and not fresh else 0,
        )  # fmt: skip
        self.cache = own
        if own is not None and decoding:
            for effect in self.acting("on_kv"):
                for layer, kept in enumerate(own.layers):
                    if isinstance(kept, KeptLayer) and kept.is_initialized:
                        effect.on_kv(self.step, layer, kept)
        return args, kwargs

    def _adopt(self, cache: Cache) -> None:
        """Make the full layers of a cache such that they can give up keys."""
        if cache.is_compileable or cache.offloading:
            raise Unsupported(f"a {type(cache).__name__} keeps its keys in place; use a DynamicCache")
        if cache.layer_class_to_replicate is not None:
            while len(cache.layers) < len(self.anatomy.main.layers):
                cache.layers.append(cache.layer_class_to_replicate())
        for place, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[place] = _kept(layer)
            elif "Quantized" in type(layer).__name__:
                raise Unsupported(f"a layer of type {type(layer).__name__} cannot give up keys; use a DynamicCache")

    def _kept(self, index: int) -> KeptLayer | None:
        layers = [] if self.cache is None else self.cache.layers
        found = layers[index] if index < len(layers) else None
        return found if isinstance(found, KeptLayer) else None

    # ---- hooks

    def _z_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            heads = self.model.config.num_attention_heads
            z = args[0].unflatten(-1, (heads, -1)).transpose(1, 2)
            call = AttentionCall(z, z, z, None, None, 1.0, layer.index, self.step, self.anatomy.main.place)
            for effect in self.acting("on_z"):
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
            for effect in self.acting("on_router"):
                choice = effect.on_router(self.step, choice)
            return choice.logits, choice.weights, choice.experts

        return hook

    def _output_hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.acting("on_logits"):
            logits = output.logits
            last = changed = logits[:, -1]
            for effect in self.acting("on_logits"):
                changed = effect.on_logits(self.step, self.step.ids, changed)
            if changed is not last:
                output.logits = torch.cat((logits[:, :-1], changed.unsqueeze(1)), 1)
        for effect in self.acting("on_output"):
            effect.on_output(self.step, output)
        return output

    def _tokens_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            if x.shape[1] == 1 and self.step.phase == "decode":
                return None
            at = self._dropped.get(layer.index - 1)
            keep: Tensor | None = None
            for effect in self.acting("on_tokens"):
                chosen = effect.on_tokens(self.step, layer.index, x)
                if chosen is not None:
                    keep = chosen if keep is None else keep.gather(1, chosen)
            if keep is not None:
                if bool((keep[:, -1] != x.shape[1] - 1).any()):
                    raise OptionError("the last token must be kept: the next one is read from it")
                x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
                at = keep if at is None else at.gather(1, keep)
            if at is None:
                return None
            self._dropped[layer.index] = at
            kept = self._kept(layer.index)
            if kept is not None:
                kept.arrive(at, self.step.tokens)
            elif self.cache is not None:
                raise Unsupported(f"layer {layer.index} has a sliding cache, which counts the tokens that it gets")
            args = (x, *args[1:]) if args else args
            return args, {**kwargs, **({} if args else {"hidden_states": x}), **_cut(kwargs, at)}

        return hook

    def _rotation_hook(self, layer: Layer) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer.index in self._dropped:
                raise Unsupported(f"layer {layer.index} lost tokens, so its rotation is not that of the sequence")
            self._rotations.see(layer.index, self.step.start, module, args, kwargs)

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
        for effect in self.acting("on_hidden"):
            if site in effect.hidden_sites:
                x = effect.on_hidden(self.step, site, layer, x)
        return x


# which model is under sessions, and whose attention is whose: an attention function is handed its module alone
_MODELS: WeakKeyDictionary[nn.Module, Attached] = WeakKeyDictionary()
_MODULES: WeakKeyDictionary[nn.Module, Attached] = WeakKeyDictionary()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    attached = _MODULES.get(module)
    if attached is None:
        raise Unsupported(
            f"this {type(module).__name__} is of no model under steer or record: copy models outside them"
        )
    return attached.attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def _late_mask(**arguments: Any) -> LateMask:
    return LateMask(arguments)


def _own_function(module: nn.Module, name: str) -> Callable[..., Any]:
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]
    return AttentionInterface()[name]  # type: ignore[no-any-return]


def _kept(layer: DynamicLayer) -> KeptLayer:
    made = KeptLayer()
    if layer.keys is not None and layer.values is not None and layer.keys.numel():
        made.update(layer.keys, layer.values)
    return made


def _tells(effect: Any, name: str) -> Callable[..., None]:
    return lambda module, args, output: effect.on_module(name, output)


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
