"""Attaching to a model: its sites, one attention call, and the session in which interventions act on it.

A host (rooms hosts/*) knows where the sites of a family of models lie. `open_session` finds the host by the model, also
where that lies inside others (adapters, compiled or parallel models), so that interventions and models need to know none.
An intervention is a value with settings; what it does, it does in methods named after sites, each of which gets a value and
returns it, changed or not:

    on_scores(call, scores)    before mask and normaliser, (B, H, N, M)
    on_weights(call, weights)  after both, (B, H, N, M)
    on_z(call, z)              the heads' outputs before the output projection, (B, H, N, E)
    on_attention(call, next)   the whole call; next() goes on, next(changed call) goes on with another
    on_kv(step, layer, kept)   a layer of the cache before a decoding step; `kept.keep(index)` gives up the others
    on_tokens(step, layer, x)  which tokens (B, N, C) go on from this layer: int64 (B, N') ascending, or None for all
    on_router(step, choice)    the choice of experts
    on_logits(step, ids, logits)  the next token's logits (B, V)
    on_hidden(step, site, layer, x)  a stream between modules, (B, N, C); `hidden_sites` names those it wants
    on_read(call, seen)        nothing is returned: what came of the call in the end, a `Seen`
    on_output(step, output)    nothing is returned: what the model returned
    on_module(name, output)    nothing is returned: what a module gave out, of those in `modules`, by name

`start(session)`, where there is one, gives what acts in a session in place of the value, with state of its own. `wants(call)`
says at which calls on_scores and on_weights act; without it they act at all. What has `reads_only` comes last everywhere.
With `needs_rotation` calls carry what turned their queries and keys, so that `unrotated` can give them as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from regard.contract.dispatch import engine
from regard.contract.errors import OptionError, Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from regard.contract.card import InterventionCard

T = TypeVar("T")

# the sites that lie between modules, where a host lays hooks
HIDDEN = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_hidden", "mlp_out", "resid_post", "final")
# the class of which a library's models are -> the module of its host, with `open_session`
HOSTS = {"transformers.modeling_utils.PreTrainedModel": "regard.hosts.transformers.session"}


@dataclass
class Step:
    """One forward pass of a model under a session.

    index: 0 for the first pass over a sequence, then 1, 2, … phase: "decode" for a single token that follows others, unless
    it is known to be of the prompt (transformers' generate tells, one's own loop over pieces does not), else "prefill".
    padding: bool (B, tokens so far), None if there is none. start: how many tokens came before this pass. tokens: how many
    come in it. ids: int64 (B, N), where the model got ids.
    decoded: how many decoding passes there were, this one included. notes: name -> what interventions keep of the sequence,
    handed on from pass to pass; rows that change places in the cache do not here.
    """

    index: int
    phase: str
    start: int
    tokens: int
    padding: Tensor | None = None
    ids: Tensor | None = None
    decoded: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def has_pads(self) -> bool:
        """Whether any row has padding."""
        return self.padding is not None and not bool(self.padding.all())


@dataclass(frozen=True, eq=False)
class Seen:
    """What came of an attention call: z (B, H, N, E); scores and weights, None unless somebody looked at them."""

    z: Tensor
    scores: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention layer at work.

    q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), after positions and cache. pattern, mask: who may meet whom, both
    hold; mask bool, broadcastable to (B, H, N, M). bias: added to the scores; sinks: logits of keys without value,
    (1, H, 1, 1); softcap: c tanh(s / c). layer: place in its stack; place: the stack ("" in models of one stack);
    kind: "self" or "cross". main: whether it is self-attention of the stack in which interventions count layers.
    positions: int64 (B, G, M) of cached keys in the whole sequence, -1 for none, None where all are there. kept: the layer
    of the cache, where it can give up keys. plain: the host's own way to the result, for a call that nobody changed.
    instead: the op that `plain` runs where it is not softmax attention. rotation: what the layer did to q and k by their
    places in the sequence, `turn(x, places)` and `undo(x, places)`; None unless an effect needs it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Any
    mask: Tensor | None
    scale: float
    layer: int
    step: Step
    place: str = ""
    kind: str = "self"
    main: bool = True
    bias: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    q_offset: int = 0
    positions: Tensor | None = None
    kept: Any = None
    plain: Callable[[], Tensor] | None = None
    instead: str = ""
    rotation: Any = None

    def replace(self, **changes: Any) -> AttentionCall:
        """The call with other tensors, to be computed by our own engines."""
        return replace(self, **changes, plain=None)

    def instead_of(self, z: Tensor, name: str) -> AttentionCall:
        """The call whose result is known already, by something else than softmax over all that it may see."""
        return replace(self, plain=lambda: z, instead=name)

    def run(self) -> Tensor:
        """The heads' outputs (B, H, N, E)."""
        if self.plain is not None:
            return self.plain()
        if self.softcap is not None or self.sinks is not None:
            return self.heads(self.weights())
        return engine("automatic").attend(
            self.q, self.k, self.v, self.pattern, mask=self.mask, bias=self.bias, scale=self.scale,
            q_offset=self.q_offset, dropout_p=self.dropout_p,
        ).out  # fmt: skip

    def scores(self) -> Tensor:
        """scale q k', capped, + bias: (B, H, N, M), before mask and normaliser."""
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        scores = self.q @ k.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        return scores if self.bias is None else scores + self.bias

    def visible(self) -> Tensor | None:
        """Who may meet whom as one mask, bool (B|1, H|1, N, M); None if all may."""
        if self.pattern is None:
            return self.mask
        n, m = self.q.shape[2], self.k.shape[2]
        dense = self.pattern.dense(n, m, q_offset=self.q_offset, device=self.q.device)
        return dense if self.mask is None else dense & self.mask

    def weights(self, scores: Tensor | None = None) -> Tensor:
        """The softmax of the scores under the mask, (B, H, N, M), computed in float32 at least, in q's dtype."""
        import torch

        if self.instead:
            raise Unsupported(f"layer {self.layer} runs {self.instead}, whose weights are not those of softmax")
        scores = self.scores() if scores is None else scores
        high, mask = scores.to(torch.promote_types(scores.dtype, torch.float32)), self.visible()
        if mask is not None:
            high = high.masked_fill(~mask, float("-inf"))
        if self.sinks is not None:
            high = torch.cat((high, self.sinks.to(high).expand(*high.shape[:-1], 1)), -1)
        # a row that may attend nothing weighs nothing
        nothing = (high == float("-inf")).all(-1, keepdim=True)
        weights = high.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        return weights[..., : scores.shape[-1]].to(self.q.dtype)

    def last(self, rows: int) -> AttentionCall:
        """The call of its last queries alone; fewer, where fewer came."""
        n = self.q.shape[2]
        rows = min(rows, n)

        def cut(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[-2] == 1 else x[..., -rows:, :]

        return self.replace(
            q=self.q[:, :, -rows:], mask=cut(self.mask), bias=cut(self.bias), q_offset=self.q_offset + n - rows
        )

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """q and k before the layer turned them by their places. Raises OptionError where no effect needs the rotation."""
        import torch

        if self.rotation is None:
            raise OptionError("the rotation of this call was not seen: an effect that undoes it has `needs_rotation`")
        places = torch.arange(self.step.start + self.step.tokens, device=self.q.device)
        n, m = self.q.shape[2], self.k.shape[2]
        keys = places[-m:] if self.positions is None else self.positions.clamp(min=0)
        return self.rotation.undo(self.q, places[-n:]), self.rotation.undo(self.k, keys)

    def received(self) -> Tensor:
        """How much each key is attended to by all rows together, (B, H, M) float32, read in tiles."""
        if self.q.shape[2] == 1 or self.softcap is not None or self.sinks is not None or self.mask is not None:
            return self.weights().float().sum(2)
        return engine("readout").readout(
            self.q, self.k, None, self.pattern, what="column_sums", bias=self.bias, scale=self.scale,
            q_offset=self.q_offset,
        )  # fmt: skip

    def heads(self, weights: Tensor) -> Tensor:
        """weights v: (B, H, N, E)."""
        import torch.nn.functional as F

        return F.dropout(weights, self.dropout_p) @ self.v.repeat_interleave(self.q.shape[1] // self.v.shape[1], 1)


class Session:
    """Interventions at work on one model, inside a `with` block. Hosts subclass it.

    Sessions of one model stack: those opened later act after the earlier ones, and they may end in any order. A session is
    entered again only when it has ended. outer: what holds the model, or the model.
    """

    def __init__(self, model: Any, interventions: Sequence[Any]):
        self.model = self.outer = model
        self.interventions = tuple(interventions)

    def __enter__(self) -> Session:
        raise NotImplementedError

    def __exit__(self, *error: Any) -> None:
        raise NotImplementedError

    @property
    def anatomy(self) -> Any:
        """The model's stacks and layers, as its host knows them."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a tape says of the model: heads, key_heads, head_dim, rotary_base, layer_types, grid."""
        raise NotImplementedError

    def full_layers(self) -> list[int]:
        """The layers of the main stack that have no window or other form of their own."""
        kinds = self.facts()["layer_types"]
        return [i for i in range(len(self.anatomy.main.layers)) if kinds is None or kinds[i] == "full_attention"]

    def change(self, thing: Any, name: str, value: Any) -> None:
        """Set an attribute until this session ends."""
        raise NotImplementedError

    def report(self) -> list[dict[str, Any]]:
        """What the interventions did, a row a layer: tokens kept, bytes."""
        raise NotImplementedError


def intervention(card: InterventionCard) -> Callable[[type[T]], type[T]]:
    """Give a frozen dataclass the card of its file; its fields are the settings."""

    def give(cls: type[T]) -> type[T]:
        if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise TypeError(f"{cls.__name__} must be a frozen dataclass: an intervention is a value")
        cls.card = card  # type: ignore[attr-defined]
        return cls

    return give


def open_session(model: Any, interventions: Sequence[Any]) -> Session:
    """The session of the host that knows the model, or the one inside it. Raises Unsupported as `model_inside`."""
    found = model_inside(model)
    session: Session = import_module(str(_host(found))).open_session(found, interventions)
    session.outer = model
    return session


def model_inside(model: Any) -> Any:
    """The outermost module that a host knows: the model, or the one inside an adapter, a compiled or a parallel model.

    Raises Unsupported where there is none, where there are several side by side, and for copies on several devices.
    """
    from torch.nn import DataParallel

    found = list(dict.fromkeys(_known(model)))
    if not found:
        libraries = ", ".join(sorted(name.partition(".")[0] for name in HOSTS))
        raise Unsupported(
            f"no host knows a {type(model).__module__}.{type(model).__name__}; there are hosts for models of {libraries}"
        )
    if len(found) > 1:
        inside = ", ".join(type(x).__name__ for x in found)
        raise Unsupported(f"a {type(model).__name__} holds several models ({inside}): give the one that is meant")
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise Unsupported(
            f"DataParallel runs copies of the model on {len(model.device_ids)} devices: use DistributedDataParallel, or "
            "give the model itself"
        )
    return found[0]


def _known(module: Any) -> Iterator[Any]:
    if _host(module) is not None:
        yield module
    elif hasattr(module, "children"):
        for child in module.children():
            yield from _known(child)


def _host(model: Any) -> str | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__)
    return next((HOSTS[name] for name in names if name in HOSTS), None)


def steer(model: Any, *interventions: Any) -> Session:
    """Let interventions act on a model inside a `with` block; afterwards nothing of them is left.

    They act in their order: at scores, weights and streams the first one first, around a whole call the first one
    outermost. Threads take turns on one model; copies of it are made outside, and so is its attention set; with gradient
    checkpointing, backward runs inside. Raises OptionError for what is no intervention; Unsupported where the model lacks
    a site, or where two interventions own the same one.
    """
    for given in interventions:
        if isinstance(given, type) or not hasattr(given, "card"):
            raise OptionError(f"{given!r} is no intervention; write steer(model, SnapKV(budget=1024))")
    return open_session(model, interventions)
