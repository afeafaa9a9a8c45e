"""How a layer turns its queries and keys by their positions: seen in what it is handed, undone by its own function.

    turned = a R(p) x,    and the same function with cos / a^2 and -sin / a^2 gives x back  (a: of YaRN and others)

That a layer does turn this way is not believed: one token goes through it with and without its rotation.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from regard.contract.errors import Unsupported

# (q, k, cos, sin) -> (q, k), as families define it
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Rotation:
    """What one layer does to the vectors of heads. cos, sin: (B|1, M, R), of all tokens so far; None for no rotation.

    function: the family's, of the first `width` channels; None while only position 0 was seen.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    function: Turn | None = None
    width: int = 0

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        """x (B, H, …, N, D) as the layer turns it at places: int64 (N,), or broadcastable to (B, H, …, N)."""
        return self._apply(x, places, back=False)

    def undo(self, x: Tensor, places: Tensor) -> Tensor:
        """What gives x (B, H, …, N, D) when it is turned at these places."""
        return self._apply(x, places, back=True)

    def _apply(self, x: Tensor, places: Tensor, *, back: bool) -> Tensor:
        if self.function is None or self.cos is None or self.sin is None:
            return x
        lead = x.shape[:-1]
        if places.dim() == 1:
            x, cos, sin = x.flatten(1, -3), self.cos[:, places], self.sin[:, places]
        else:
            rows = torch.arange(len(self.cos), device=x.device).view(-1, *[1] * (places.dim() - 1))
            cos, sin = (table[rows, places].expand(*lead, -1).flatten(0, -3) for table in (self.cos, self.sin))
            x = x.flatten(0, -3).unsqueeze(1)
        if back:
            square = cos * cos + sin * sin
            cos, sin = cos / square, -sin / square
        return _rotated(self.function, self.width, x, cos, sin).reshape(*lead, -1)


class Rotations:
    """The rotations of a model's layers, gathered pass by pass.

    owners: module -> what gives what its attention function is sent to, which one token of every layer goes around.
    """

    def __init__(self, owners: MutableMapping[nn.Module, Callable[[], Any]]):
        self.owners = owners
        self.layers: dict[int, Rotation] = {}
        self._joined: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(self, layer: int, start: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what an attention layer is handed for the tokens from `start` on. Raises Unsupported."""
        if layer == 0:
            self._joined = []
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        handed, name = given.get("position_embeddings"), type(module).__name__
        if handed is None:
            if any("rotary" in word.lower() for word in vars(sys.modules[type(module).__module__])):
                raise Unsupported(f"{name} is not handed its rotation, and so nobody else can undo it")
            self.layers[layer] = Rotation()
            return
        if not isinstance(handed, tuple) or len(handed) != 2 or any(x.is_complex() or x.dim() != 3 for x in handed):
            raise Unsupported(f"{name} is handed other positions than a cosine and a sine for each token")
        cos, sin = handed
        before = self.layers.get(layer) if start else None
        if before is None or before.cos is None or before.sin is None or before.cos.shape[1] < start:
            if start:
                raise Unsupported(f"the rotation of {start} tokens was not seen: they came before the session")
            before = Rotation(cos, sin)
        else:
            joined = [self._join(old[:, :start], old, new) for old, new in ((before.cos, cos), (before.sin, sin))]
            before = replace(before, cos=joined[0], sin=joined[1])
        if before.function is None and bool(sin[0].any()):
            function, width = self._way(module, given, cos, sin)
            before = replace(before, function=function, width=width)
        self.layers[layer] = before

    def _join(self, kept: Tensor, old: Tensor, new: Tensor) -> Tensor:
        # layers are handed the same tensors
        for a, b, made in self._joined:
            if a is old and b is new:
                return made
        rows = max(kept.shape[0], new.shape[0])
        made = torch.cat((kept.expand(rows, -1, -1), new.expand(rows, -1, -1)), 1)
        self._joined.append((old, new, made))
        return made

    @torch.no_grad()
    def _way(self, module: nn.Module, given: dict[str, Any], cos: Tensor, sin: Tensor) -> tuple[Turn, int]:
        """The function that turns, and how many channels it takes, such that one token is turned as the layer does it."""
        # the token that is turned most
        at = int(sin[0].abs().sum(-1).argmax())
        cos, sin = cos[:1, at : at + 1], sin[:1, at : at + 1]
        one = {**given, "hidden_states": given["hidden_states"][:1, at : at + 1]}
        turned = self._made(module, {**one, "position_embeddings": (cos, sin)})
        plain = self._made(module, {**one, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))})
        if all(map(torch.equal, turned, plain)):
            return _leave, 0
        function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if function is not None and list(inspect.signature(function).parameters)[:4] == ["q", "k", "cos", "sin"]:
            for width in (plain[0].shape[-1], cos.shape[-1]):
                try:
                    ours = [_rotated(function, width, x, cos, sin) for x in plain]
                except RuntimeError:
                    # it takes vectors of another width
                    continue
                if all(_near(a, b) for a, b in zip(ours, turned, strict=True)):
                    return function, width
        raise Unsupported(f"{type(module).__name__} turns queries and keys in a way that is not known, so not undone")

    def _made(self, module: nn.Module, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The queries and keys that a layer sends to its attention function, without a cache."""
        owner = self.owners[module]
        self.owners[module] = lambda: _Stop
        try:
            # families call the cache by different names
            module.forward(
                **{n: None if isinstance(x, Cache) or n == "attention_mask" else x for n, x in given.items()}
            )
        except _Stop as stop:
            return stop.q, stop.k
        finally:
            self.owners[module] = owner
        raise Unsupported(f"{type(module).__name__} does not send its queries and keys to an attention function")


class _Stop(Exception):
    """Thrown out of a layer with its queries and keys, which the rest of it does not need."""

    def __init__(self, q: Tensor, k: Tensor):
        super().__init__()
        self.q, self.k = q, k

    @classmethod
    def attend(cls, module: nn.Module, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise cls(q, k)


def _rotated(function: Turn, width: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, N, D) turned by cos, sin (B|1, N, R)."""
    # the function wants keys too: none of them
    turned = function(x[..., :width], x[:, :0, :, :width], cos, sin)[0]
    return torch.cat((turned, x[..., width:]), -1) if width < x.shape[-1] else turned


def _leave(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-2 * float(b.abs().max())
