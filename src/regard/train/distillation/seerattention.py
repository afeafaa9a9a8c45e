"""Distillation of SeerAttention's gates: the pooled attention map of a frozen model is what its gates learn.

    T[a, b] = max of the softmax weights in tile (a, b), rows over their sum;   loss = sum over layers KL(T || softmax(S))

The first quarter of the block rows is left out: it has few blocks to choose from. Pretrained models are read at their
sites, queries and keys turned back to before rotation.
Departs from the released code: KL is taken per row and averaged over rows; there it is averaged over all elements,
masked ones too (reduction="official"), so that its size shrinks with the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.contract.attach import AttentionCall, Seen, open_session
from regard.contract.card import InterventionCard, TrainingCard
from regard.contract.errors import OptionError, Unsupported
from regard.engines.readout import readout
from regard.hosts.calls import is_causal_alone
from regard.layers.attention import OpAttention
from regard.layers.seerattention import SeerGate
from regard.ops.softmax import softmax_attention
from regard.patterns import Bound, Causal, KeyValid, Pattern
from regard.primitives.positions import rope

CARD = TrainingCard(
    slug="seerattention",
    title="Distillation of SeerAttention's gates",
    part_of="seerattention",
    exports=("GateDistillation",),
    builds_on=("softmax",),
    options={"block": 4, "hidden": 16},
    teacher="llama",
    batch="inputs",
    losses=("gate_kl",),
    trains=("self.*",),
)


class GateDistillation(nn.Module):
    """A gate for every softmax attention layer of a model, and the loss that trains them: `loss(model, batch)`.

    model: with attention layers over the softmax op, causal, or a pretrained one that a host knows, of which layers with
    windows get no gate; it is not changed and not trained. block, hidden, pool_q, pool_k: of each `SeerGate`. skip: share
    of the first block rows without loss, in [0, 1). reduction: "rows", the mean over the rows of blocks of every head;
    "official", the mean over all elements. Its parameters are the gates', in `gates`: those of a pretrained model by the
    numbers of their layers. Raises Unsupported for a model without such a layer; OptionError.
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
        self.skip, self.reduction = skip, reduction
        weight = next(model.parameters())
        self.gates = nn.ModuleDict(
            {
                key: SeerGate(*sizes, block=block, hidden=hidden, pool_q=pool_q, pool_k=pool_k, rotary_base=base)
                for key, (*sizes, base) in _sizes(model).items()
            }
        ).to(weight.device)

    def forward(self, model: nn.Module, batch: Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
        """{"gate_kl": the loss} of token ids, or of the keyword arguments of the model. Raises OptionError."""
        there = _sizes(model)
        if set(there) != set(self.gates):
            raise OptionError(f"the gates are for layers {', '.join(self.gates)}; the model has {', '.join(there)}")
        parts: list[Tensor] = []
        layers = _softmax_layers(model)
        if not layers:
            with open_session(model, (_Read(self.gates, self._loss, parts),)), torch.no_grad():
                model(**batch) if isinstance(batch, Mapping) else model(input_ids=batch, use_cache=False)
            return {"gate_kl": torch.stack(parts).sum()}
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
        if not options.get("is_causal") or options.get("reset") is not None or q.shape[2] != k.shape[2]:
            raise Unsupported("gates are trained on causal attention of one document to itself")
        turned = (q, k)
        if self.layer.rotary:
            places = torch.arange(q.shape[2], device=q.device)
            turned = (rope(q, places, base=self.layer.rotary_base), rope(k, places, base=self.layer.rotary_base))
        self.parts.append(_part(self.gate, self.loss, (q, k), turned, options.get("padding"), None))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Read:
    """The same for a pretrained model, as an effect that only reads."""

    card = InterventionCard(
        slug="gate_distillation", title="Distillation of gates", exports=("x",), baseline=True, sites=("q", "k")
    )
    needs_rotation = reads_only = True

    def __init__(self, gates: Any, loss: Any, parts: list[Tensor]):
        self.gates, self.loss, self.parts = gates, loss, parts

    def on_read(self, call: AttentionCall, seen: Seen) -> None:
        if not call.main or str(call.layer) not in self.gates:
            return
        if call.step.start or not is_causal_alone(call):
            raise Unsupported(f"gates are trained on causal attention of whole texts, which layer {call.layer} is not")
        padding = call.step.padding if call.step.has_pads else None
        gate, turned = self.gates[str(call.layer)], (call.q, call.k)
        self.parts.append(_part(gate, self.loss, call.unrotated(), turned, padding, call.scale))


def _part(
    gate: Any,
    loss: Any,
    plain: tuple[Tensor, Tensor],
    turned: tuple[Tensor, Tensor],
    padding: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The loss of one gate, from queries and keys before rotation and after it."""
    n = plain[0].shape[2]
    if n < gate.block:
        raise OptionError(f"{n} tokens are shorter than a block of {gate.block}: there is no choice")
    pattern: Pattern | Bound = Causal()
    if padding is not None:
        pattern = pattern & KeyValid(rows=True).bind(key_valid=padding)
    target = block_targets(*turned, block=gate.block, pattern=pattern, scale=scale)
    with torch.enable_grad():
        made: Tensor = loss(gate(*plain, key_valid=padding), target)
    return made


def _sizes(model: nn.Module) -> dict[str, tuple[int, int, int, float | None]]:
    """Heads, key heads, width and rotary base of the layers that get a gate, by the gate's key."""
    layers = _softmax_layers(model)
    if layers:
        return {
            _key(name): (a.heads, a.kv_heads, a.head_dim, a.rotary_base if a.rotary else None)
            for name, a in layers.items()
        }
    try:
        session = open_session(model, ())
    except Unsupported as error:
        raise Unsupported(
            f"{type(model).__name__} has no attention layer over the softmax op, whose weights a gate could learn, and "
            f"{error}"
        ) from error
    facts = session.facts()
    sizes = (facts["heads"], facts["key_heads"], facts["head_dim"], facts["rotary_base"])
    return {str(layer): sizes for layer in session.full_layers()}


def _softmax_layers(model: nn.Module) -> dict[str, OpAttention]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OpAttention) and module.op is softmax_attention
    }


def _key(name: str) -> str:
    # a ModuleDict takes no dots and no empty names
    return name.replace(".", "/") or "layer"
