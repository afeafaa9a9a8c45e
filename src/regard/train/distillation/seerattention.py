"""Distillation of SeerAttention's gates: the pooled attention map of a frozen model is what its gates learn.

    T[a, b] = max of the softmax weights in tile (a, b), rows over their sum;   loss = sum over layers KL(T || softmax(S))

The first quarter of the block rows is left out: it has few blocks to choose from.
Departs from the released code: KL is taken per row and averaged over rows; there it is averaged over all elements,
masked ones too (reduction="official"), so that its size shrinks with the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.contract.errors import OptionError, Unsupported
from regard.engines.readout import readout
from regard.layers.attention import OpAttention
from regard.layers.seerattention import SeerGate
from regard.ops.softmax import softmax_attention
from regard.patterns import Bound, Causal, KeyValid, Pattern
from regard.primitives.positions import rope


class GateDistillation(nn.Module):
    """A gate for every softmax attention layer of a model, and the loss that trains them: `loss(model, batch)`.

    model: with attention layers over the softmax op, causal; it is not changed and not trained. block, hidden, pool_q,
    pool_k: of each `SeerGate`. skip: share of the first block rows without loss, in [0, 1). reduction: "rows", the
    mean over the rows of blocks of every head; "official", the mean over all elements. Its parameters are the gates'.
    Raises Unsupported for a model without such a layer; OptionError.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        block: int = 64,
        hidden: int = 128,
        pool_q: tuple[str, ...] = ("avg",),
        pool_k: tuple[str, ...] = ("max", "min", "avg"),
        skip: float = 0.25,
        reduction: Literal["rows", "official"] = "rows",
    ):
        super().__init__()
        if not 0 <= skip < 1:
            raise OptionError(f"skip is a share of the block rows in [0, 1), not {skip}")
        if reduction not in ("rows", "official"):
            raise OptionError(f"reduction is {reduction!r}; it is 'rows' or 'official'")
        layers = _softmax_layers(model)
        if not layers:
            raise Unsupported(
                f"{type(model).__name__} has no attention layer over the softmax op, whose weights a gate could learn"
            )
        self.skip, self.reduction = skip, reduction
        weight = next(model.parameters())
        self.gates = nn.ModuleDict(
            {
                _key(name): SeerGate(
                    layer.heads, layer.kv_heads, layer.head_dim, block=block, hidden=hidden, pool_q=pool_q,
                    pool_k=pool_k, rotary_base=layer.rotary_base if layer.rotary else None,
                )
                for name, layer in layers.items()
            }
        ).to(weight.device)  # fmt: skip

    def forward(self, model: nn.Module, batch: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
        """{"gate_kl": the loss} of token ids, or of the keyword arguments of the model. Raises OptionError."""
        layers = _softmax_layers(model)
        if {_key(name) for name in layers} != set(self.gates):
            raise OptionError(
                f"the gates are for layers {', '.join(self.gates)}; the model has {', '.join(map(_key, layers))}"
            )
        parts: list[Tensor] = []
        watched = [_Watch(layer, self.gates[_key(name)], self._loss, parts) for name, layer in layers.items()]
        try:
            with torch.no_grad():
                model(**batch) if isinstance(batch, Mapping) else model(batch)
        finally:
            for watch in watched:
                watch.remove()
        return {"gate_kl": torch.stack(parts).sum()}

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        first = int(logits.shape[2] * self.skip)
        logits, target = logits[:, :, first:], target[:, :, first:]
        held = target.sum(-1) > 0
        # rows of padding have no block at all; masked blocks weigh nothing on both sides
        logits = logits.masked_fill(~held[..., None], 0.0)
        log_p = torch.log_softmax(logits, -1).masked_fill(target == 0, 0.0)
        rows = (torch.special.xlogy(target, target) - target * log_p).sum(-1)
        if self.reduction == "official":
            return rows.sum() / target.numel()
        return rows.sum() / held.sum().clamp(min=1)


@torch.no_grad()
def block_targets(
    q: Tensor, k: Tensor, *, block: int = 64, pattern: Pattern | Bound | None = None, scale: float | None = None
) -> Tensor:
    """The largest softmax weight of each tile over the sum of its row of tiles: (B, H, n, n), n = ceil(N / block).

    q (B, H, N, D), k (B, G, N, D) rotated as they meet. pattern: Causal() if None. A row of nothing stays 0.
    """
    pattern = Causal() if pattern is None else pattern
    largest = readout(q, k, None, pattern, what="block_max", block=(block, block), scale=scale)
    total = largest.sum(-1, keepdim=True)
    return largest / torch.where(total == 0, torch.ones_like(total), total)


class _Watch:
    """Hooks on one layer: its queries and keys before rotation, and the loss of its gate once both are there."""

    def __init__(self, layer: OpAttention, gate: Any, loss: Any, parts: list[Tensor]):
        self.layer, self.gate, self.loss, self.parts = layer, gate, loss, parts
        self.seen: dict[str, Tensor] = {}
        self.hooks = [
            layer.norm_q.register_forward_hook(lambda module, given, out: self.seen.__setitem__("q", out)),
            layer.norm_k.register_forward_hook(lambda module, given, out: self.seen.__setitem__("k", out)),
            layer.register_forward_hook(self.finish, with_kwargs=True),
        ]

    def finish(self, module: nn.Module, given: Any, options: dict[str, Any], out: Tensor) -> None:
        q, k = self.seen.pop("q").detach(), self.seen.pop("k").detach()
        padding = options.get("padding")
        if not options.get("is_causal") or options.get("reset") is not None or q.shape[2] != k.shape[2]:
            raise Unsupported("gates are trained on causal attention of one document to itself")
        if q.shape[2] < self.gate.block:
            raise OptionError(f"{q.shape[2]} tokens are shorter than a block of {self.gate.block}: there is no choice")
        pattern: Pattern | Bound = Causal()
        if padding is not None:
            pattern = pattern & KeyValid(rows=True).bind(key_valid=padding)
        turned = [q, k]
        if self.layer.rotary:
            places = torch.arange(q.shape[2], device=q.device)
            turned = [rope(x, places, base=self.layer.rotary_base) for x in (q, k)]
        target = block_targets(turned[0], turned[1], block=self.gate.block, pattern=pattern)
        with torch.enable_grad():
            self.parts.append(self.loss(self.gate(q, k, key_valid=padding), target))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _softmax_layers(model: nn.Module) -> dict[str, OpAttention]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OpAttention) and module.op is softmax_attention
    }


def _key(name: str) -> str:
    # a ModuleDict takes no dots and no empty names
    return name.replace(".", "/") or "layer"
