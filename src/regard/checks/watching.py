"""What an intervention's methods get and change while a model runs, and where in a pass that stands.

Each effect of a session is put behind a spy, which compares what a method was given with what it returned, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.checks.untouched import same
from regard.contract.attach import AttentionCall, steer
from regard.hosts.tape import KINDS, Tape, recording

# where things stand in a pass: within a layer from the stream that enters it to the one that leaves
ORDER = (
    "embed", "tokens", "resid_pre", "q", "kv", "k", "v", "scores", "weights", "z", "attn_out", "resid_mid", "router",
    "mlp_hidden", "mlp_out", "resid_post", "final", "logits",
)  # fmt: skip
# what a tape can hold whatever runs in place of softmax, of every model that is tried
TAPED = tuple(site for site in ORDER if site in KINDS and site not in ("weights", "router", "mlp_hidden"))
_OF_CALL = ("q", "k", "v", "scores", "weights", "z")
# what a method gets beside that whose name it has
_MET = {"on_read": _OF_CALL, "on_output": ("logits",)}
# what other fields of a call make other scores
_OF_SCORES = ("pattern", "mask", "bias", "scale", "sinks", "softcap", "q_offset", "positions")
_STEPS = 2


class Place(NamedTuple):
    """Where something stands; places compare in the order in which a model comes to them. rank: in `ORDER`."""

    step: int
    layer: int
    rank: int

    @property
    def site(self) -> str:
        """Its name."""
        return ORDER[self.rank]


def place(step: int, layer: int, site: str) -> Place:
    """The place of a site; what comes after all layers is of none of them."""
    return Place(step, 1 << 30 if site in ("final", "logits") else layer, ORDER.index(site))


class Watched:
    """What was seen of one intervention.

    written: place -> the sites one of which a card must name for it. touched: places that are computed in another way,
    written or not. met: sites whose values its methods get. settings: whether it changed an attribute of the model.
    """

    def __init__(self) -> None:
        self.written: dict[Place, tuple[str, ...]] = {}
        self.touched: set[Place] = set()
        self.met: set[str] = set()
        self.settings = False

    def wrote(self, step: int, layer: int, site: str, one_of: tuple[str, ...] = ()) -> None:
        """Note a change."""
        self.written[place(step, layer, site)] = one_of or (site,)

    def first(self, sites: tuple[str, ...]) -> Place:
        """Where a pass may differ first. sites: of the card, which count where no method is seen to act."""
        found = {*self.written, *self.touched}
        if self.settings or not found:
            # keys are given up between passes
            found |= {place(int(site == "kv"), 0, site) for site in sites}
        return min(found)


def watch(model: Any, intervention: Any, given: dict[str, Tensor]) -> tuple[Watched, Tape]:
    """Run a prompt and two steps after it under an intervention, and note what it does and what a tape shows."""
    watched = Watched()
    with steer(model, intervention) as session:
        attached: Any = session.attached  # type: ignore[attr-defined]
        for _, effect in attached.effects.pairs:
            watched.met |= _met(effect)
        attached.effects.pairs = [(owner, _Spy(effect, watched)) for owner, effect in attached.effects.pairs]
        watched.settings = attached.changes.of(session)
        tape = run(model, given)
    return watched, tape


def run(model: Any, given: dict[str, Tensor]) -> Tape:
    """The tape of a prompt and two steps after it, whose tokens are the same whatever the model says."""
    with recording(model, sites=TAPED) as tape, torch.no_grad():
        cache, mask = model(**given, use_cache=True).past_key_values, given["attention_mask"]
        for token in range(5, 5 + _STEPS):
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            ids = torch.full((len(mask), 1), token)
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return tape


def differences(plain: Tape, other: Tape, until: Place) -> list[Place]:
    """Where two tapes of the same passes differ by a bit before a place, in order; what one of them lacks is no difference."""
    theirs = dict(other.items())
    found = []
    for (site, layer, step), value in plain.items():
        at, address = place(step, layer, site), (site, layer, step)
        if at < until and address in theirs and not same(value, theirs[address]):
            found.append(at)
    return sorted(found)


def _met(effect: Any) -> set[str]:
    found: set[str] = set()
    for name in ("scores", "weights", "z", "kv", "tokens", "router", "logits"):
        if getattr(effect, f"on_{name}", None) is not None:
            found.add(name)
    for name, sites in _MET.items():
        if getattr(effect, name, None) is not None:
            found.update(sites)
    if getattr(effect, "on_hidden", None) is not None:
        found.update(effect.hidden_sites)
    return found


class _Spy:
    """An effect, with its methods watched."""

    def __init__(self, effect: Any, watched: Watched):
        self._effect, self._watched = effect, watched

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._effect, name)
        spied = vars(_Spy).get(f"_{name}")
        return value if spied is None or value is None else partial(spied, self, value)

    def _on_scores(self, method: Callable[..., Any], call: AttentionCall, scores: Tensor) -> Tensor:
        return self._table("scores", method, call, scores)

    def _on_weights(self, method: Callable[..., Any], call: AttentionCall, weights: Tensor) -> Tensor:
        return self._table("weights", method, call, weights)

    def _on_z(self, method: Callable[..., Any], call: AttentionCall, z: Tensor) -> Tensor:
        return self._returned(call.step.index, call.layer, "z", partial(method, call), z)

    def _on_hidden(self, method: Callable[..., Any], step: Any, site: str, layer: int, x: Tensor) -> Tensor:
        return self._returned(step.index, layer, site, partial(method, step, site, layer), x)

    def _on_logits(self, method: Callable[..., Any], step: Any, ids: Tensor | None, logits: Tensor) -> Tensor:
        return self._returned(step.index, 0, "logits", partial(method, step, ids), logits)

    def _on_tokens(self, method: Callable[..., Any], step: Any, layer: int, x: Tensor) -> Tensor | None:
        chosen: Tensor | None = method(step, layer, x)
        if chosen is not None:
            self._watched.wrote(step.index, layer, "tokens")
        return chosen

    def _on_router(self, method: Callable[..., Any], step: Any, choice: Any) -> Any:
        names = ("logits", "weights", "experts")
        before = [getattr(choice, name).clone() for name in names]
        made = method(step, choice)
        if not all(same(x, getattr(made, name)) for name, x in zip(names, before, strict=True)):
            self._watched.wrote(step.index, choice.layer, "router")
        return made

    def _on_kv(self, method: Callable[..., Any], step: Any, layer: int, kept: Any) -> None:
        before = [None if x is None else x.clone() for x in (kept.keys, kept.values, kept.positions)]
        method(step, layer, kept)
        if not all(map(same, before, (kept.keys, kept.values, kept.positions))):
            self._watched.wrote(step.index, layer, "kv")

    def _on_read(self, method: Callable[..., Any], call: AttentionCall, seen: Any) -> None:
        before = seen.z.clone()
        method(call, seen)
        if not same(before, seen.z):
            self._watched.wrote(call.step.index, call.layer, "z")

    def _on_output(self, method: Callable[..., Any], step: Any, output: Any) -> None:
        before = output.logits.clone()
        method(step, output)
        if not same(before, output.logits):
            self._watched.wrote(step.index, 0, "logits")

    def _on_attention(self, method: Callable[..., Any], call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        before = {name: getattr(call, name).clone() for name in ("q", "k", "v")}
        came: list[Tensor] = []

        def on(changed: AttentionCall = call) -> Tensor:
            self._called(call, before, changed)
            out = follow(changed)
            came.append(out.clone())
            return out

        out: Tensor = method(call, on)
        if not came:
            self._watched.wrote(call.step.index, call.layer, "scores", ("scores", "weights", "z"))
        elif not same(came[-1], out):
            self._watched.wrote(call.step.index, call.layer, "z")
        return out

    def _called(self, call: AttentionCall, before: dict[str, Tensor], changed: AttentionCall) -> None:
        """What a call that goes on differs in from the one that came."""
        wrote = partial(self._watched.wrote, call.step.index, call.layer)
        for name, value in before.items():
            if not same(value, getattr(changed, name)):
                wrote(name)
        if any(not same(getattr(call, name), getattr(changed, name)) for name in _OF_SCORES):
            wrote("scores")
        if changed.dropout_p != call.dropout_p:
            wrote("weights")
        if changed.plain is not None and changed.plain is not call.plain:
            wrote("scores", ("scores", "weights", "z"))

    def _table(self, site: str, method: Callable[..., Any], call: AttentionCall, table: Tensor) -> Tensor:
        # the table is made for it, and another way to the same result may differ in its last bits
        self._watched.touched.add(place(call.step.index, call.layer, "weights"))
        return self._returned(call.step.index, call.layer, site, partial(method, call), table)

    def _returned(self, step: int, layer: int, site: str, method: Callable[..., Tensor], x: Tensor) -> Tensor:
        before = x.clone()
        out = method(x)
        if not same(before, out):
            self._watched.wrote(step, layer, site)
        return out
