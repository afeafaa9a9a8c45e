"""The passes of a model: which step each one is, the cache that it goes on with, and that they come one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from regard.contract.attach import Step
from regard.contract.errors import Unsupported
from regard.hosts.transformers.anatomy import Anatomy, Stack
from regard.hosts.transformers.effects import Beside, Effects
from regard.hosts.transformers.kept_layer import KeptLayer

COPIED = (
    "{} is of no model under steer or record, though it was made ready for one: copy models outside sessions, and give "
    "each a config of its own"
)


class Passes(Beside):
    """The pass that runs, `step`, and the cache in use. dropped: layer -> the tokens that it gets, int64 (B, N')."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, effects: Effects):
        self.model, self.anatomy, self.effects = model, anatomy, effects
        self.step = Step(0, "prefill", 0, 0)
        self.cache: Cache | None = None
        self.dropped: dict[int, Tensor] = {}
        # sequences may take turns, each with a cache of its own
        self._steps: WeakKeyDictionary[Cache, Step] = WeakKeyDictionary()
        self._of_prompt = False
        self._running = RLock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A pass, or a part of one. Raises Unsupported while another thread runs one."""
        if not self._running.acquire(blocking=False):
            raise Unsupported(
                f"two threads run one {type(self.model).__name__} under steer or record: let them take turns, pass by "
                "pass, or give each a model of its own"
            )
        try:
            yield
        finally:
            self._running.release()

    def read_prompt(self, *args: Any, is_first_iteration: bool = True, **kwargs: Any) -> Any:
        """What generate runs to read a prompt, in one pass or in pieces; a last piece of one token is no decoding step."""
        own: Any = type(self.model)
        self._of_prompt = is_first_iteration
        try:
            return own._prefill(self.model, *args, is_first_iteration=is_first_iteration, **kwargs)
        finally:
            self._of_prompt = False

    def begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the main stack runs: which step this is, and the cache as one that can be kept in part."""
        if base is not self.anatomy.main.base:
            raise Unsupported(COPIED.format(f"this {type(base).__name__}"))
        with self.alone():
            given = (
                {**dict(zip(inspect.signature(base.forward).parameters, args, strict=False)), **kwargs}
                if args
                else kwargs
            )
            ids, x = given.get("input_ids"), given.get("inputs_embeds")
            if x is None:
                x = ids if ids is not None else next((x for x in given.values() if isinstance(x, Tensor)), None)
            if x is None or x.dim() < 2:
                return None
            self.cache = self._cache_of(base, given)
            self._next(ids, x.shape[1], given.get("attention_mask"))
            if self.cache is not None and self.step.phase == "decode":
                for effect in self.effects.acting("on_kv"):
                    for layer, kept in enumerate(self.cache.layers):
                        if isinstance(kept, KeptLayer) and kept.is_initialized:
                            effect.on_kv(self.step, layer, kept)
        return (), given

    def _cache_of(self, base: Any, given: dict[str, Any]) -> Cache | None:
        """The cache of the main stack's own keys, made here where an effect needs it and none was given."""
        past = given.get("past_key_values")
        needed = bool(self.effects.acting("on_kv") or self.effects.acting("on_tokens"))
        if needed and past is None and given.get("use_cache", getattr(base.config, "use_cache", False)):
            given["past_key_values"] = past = DynamicCache(config=base.config)
        own: Cache | None = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
        if own is not None:
            if needed:
                self._adopt(own)
            known = self.effects.at_attention()
            for kept in own.layers:
                if isinstance(kept, KeptLayer):
                    kept.served = known
        return own

    def _next(self, ids: Tensor | None, tokens: int, mask: Any) -> None:
        """The step that follows the last one over the same cache."""
        start = 0 if self.cache is None else self.cache.get_seq_length()
        decoding = start > 0 and tokens == 1 and not self._of_prompt
        before = self.step if self.cache is None else self._steps.get(self.cache, self.step)
        # what a cache held before it came here is no pass of this sequence
        first = start == 0 or (self.cache not in self._steps and not decoding)
        if not decoding:
            self.dropped = {}
        self.step = Step(
            index=0 if first else before.index + 1, phase="decode" if decoding else "prefill", start=start,
            tokens=tokens, padding=mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None, ids=ids,
            decoded=before.decoded + 1 if decoding else 0, notes={} if start == 0 else dict(before.notes),
        )  # fmt: skip
        self.effects.again = False
        if self.cache is not None:
            self._steps[self.cache] = self.step

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
            elif any("Quantized" in base.__name__ for base in type(layer).__mro__):
                raise Unsupported(f"a layer of type {type(layer).__name__} cannot give up keys; use a DynamicCache")

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the main stack ran: the cache that it made itself belongs to this step."""
        made = getattr(output, "past_key_values", None)
        own = made.self_attention_cache if isinstance(made, EncoderDecoderCache) else made
        if self.cache is None and isinstance(own, Cache):
            self.cache = own
            self._steps[own] = self.step

    def kept(self, index: int) -> KeptLayer | None:
        """A layer of the cache in use, if it can give up keys."""
        layers = [] if self.cache is None else self.cache.layers
        found = layers[index] if index < len(layers) else None
        return found if isinstance(found, KeptLayer) else None

    def for_gradients(self, stack: Stack) -> Callable[..., None]:
        """A forward hook: checkpointed layers run again for their gradients, and must find then what they found now."""
        first = stack.layers[0].module

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not (torch.is_grad_enabled() and module.training and getattr(first, "gradient_checkpointing", False)):
                return
            x = output if isinstance(output, Tensor) else output[0]
            if x.requires_grad:
                x.register_hook(partial(self._again, self.step, tuple(self.effects.pairs)))

        return hook

    def _again(self, step: Step, pairs: tuple[Any, ...], grad: Tensor) -> None:
        now = self.effects.pairs
        if len(now) != len(pairs) or any(a is not b for a, b in zip(now, pairs, strict=True)):
            raise Unsupported(
                "layers with gradient checkpointing run again for their gradients: call backward in the same sessions as "
                "forward (record(..., grads=True) has left its own: use recording), or switch checkpointing off"
            )
        self.step, self.effects.again = step, True


def _kept(layer: DynamicLayer) -> KeptLayer:
    made = KeptLayer()
    if layer.keys is not None and layer.values is not None and layer.keys.numel():
        made.update(layer.keys, layer.values)
    return made
