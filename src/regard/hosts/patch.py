"""Other values at a model's sites: given ones, computed ones, or those of a tape.

A patch is a session, so it stacks with interventions and recordings: what is recorded inside it is what the model used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.contract.attach import HIDDEN, AttentionCall, Session, Step, open_session
from regard.contract.card import InterventionCard
from regard.contract.errors import OptionError, ShapeError, near
from regard.hosts.tape import Tape

_OF_CALL = ("q", "k", "v", "scores", "weights", "z")
SITES = (*_OF_CALL, *HIDDEN)
# those of no layer
_ONCE = ("embed", "final")


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site of one layer.

    site: of `SITES`. layer: negative from the last; 0 for "embed" and "final", which are of none. value: what stands there
    instead, broadcastable; or fn: a function of what stood there; or from_tape: a tape whose value of the same site and
    layer is taken, of as many rows or one for all. positions: query places (keys for k and v; negative from the end),
    heads: of which, None for all. step: of which pass, None for every. Raises OptionError; ShapeError for what does not fit.
    """

    site: str
    layer: int = 0
    positions: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    value: Tensor | float | None = None
    fn: Callable[[Tensor], Tensor] | None = None
    from_tape: Tape | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise OptionError(f"{self.site!r} cannot be patched{near(self.site, SITES)}; what can: {', '.join(SITES)}")
        if sum(x is not None for x in (self.value, self.fn, self.from_tape)) != 1:
            raise OptionError("an edit takes one of value=, fn= and from_tape=")
        if self.heads is not None and self.site not in _OF_CALL:
            raise OptionError(f"{self.site!r} has no heads")

    def apply(self, x: Tensor, step: Step) -> Tensor:
        """The value with the change: streams (B, N, C), z (B, N, H, E), the others (B, H, N, …)."""
        if self.step is not None and self.step != step.index:
            return x
        if self.fn is not None:
            new = self.fn(x)
        elif self.from_tape is not None:
            new = self.from_tape.get(self.site, self.layer, step=0 if self.step is None else self.step)
            if new.shape[1:] != x.shape[1:]:
                raise ShapeError(
                    f"{self.site!r} of layer {self.layer} is {tuple(x.shape)}, and on the tape {tuple(new.shape)}: record all "
                    "heads and rows, with as many tokens"
                )
        else:
            new = torch.as_tensor(self.value, dtype=x.dtype, device=x.device)
        try:
            new = new.to(x).expand_as(x)
        except RuntimeError as error:
            raise ShapeError(
                f"{self.site!r} of layer {self.layer} is {tuple(x.shape)}; {tuple(new.shape)} cannot stand there"
            ) from error
        chosen = torch.ones((), dtype=torch.bool, device=x.device)
        heads, places = (2, 1) if self.site == "z" else (1, 2) if self.site in _OF_CALL else (0, 1)
        for axis, which in ((places, self.positions), (heads, self.heads)):
            if which is not None:
                count = x.shape[axis]
                if any(not -count <= place < count for place in which):
                    raise OptionError(
                        f"{self.site!r} has {count} {'positions' if axis == places else 'heads'} in this pass, and the edit is "
                        f"of {list(which)}; step= says of which pass it is, 0 for the prompt"
                    )
                at = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
                at[list(which)] = True
                chosen = chosen & at.view(-1, *(1,) * (x.dim() - axis - 1))
        return torch.where(chosen, new, x)


def patch(
    model: Any, edits: Sequence[Edit], *, freeze: Sequence[tuple[str, int]] = (), tape: Tape | None = None
) -> Session:
    """A session in which sites hold other values.

    freeze: (site, layer) pairs that keep what `tape` recorded of them, before the edits. Raises OptionError, Unsupported.
    """
    if freeze and tape is None:
        raise OptionError("freeze= needs the tape= whose values the sites keep")
    frozen = [Edit(site, layer, from_tape=tape) for site, layer in freeze]
    return open_session(model, (_Patch([*frozen, *edits]),))


class _Patch:
    """The effect behind `patch`; it has the methods that its edits need."""

    def __init__(self, edits: list[Edit]):
        self.edits = edits
        sites = tuple(dict.fromkeys(e.site for e in edits))
        self.card = InterventionCard(
            slug="patch", title="patch", exports=("patch",), baseline=True,
            sites=tuple(s for s in sites if s not in HIDDEN),
        )  # fmt: skip
        self.hidden_sites = tuple(s for s in sites if s in HIDDEN)
        if not set(sites) & {"q", "k", "v"}:
            self.on_attention = None  # type: ignore[assignment]
        for name in ("scores", "weights", "z"):
            if name not in sites:
                setattr(self, f"on_{name}", None)

    def start(self, session: Any) -> _Patch:
        """The same with its layers counted from the first. Raises OptionError for one that the model has not."""
        main = session.anatomy.main
        for edit in self.edits:
            if edit.site in _ONCE and edit.layer:
                raise OptionError(f"{edit.site!r} is of no layer: leave layer={edit.layer} out")
        return _Patch([replace(edit, layer=main.chosen((edit.layer,))[0]) for edit in self.edits])

    def wants(self, call: AttentionCall) -> bool:
        """Only layers with an edit of scores or weights pay for the table."""
        return call.main and any(e.site in ("scores", "weights") and e.layer == call.layer for e in self.edits)

    def on_attention(self, call: AttentionCall, follow: Callable[..., Tensor]) -> Tensor:
        if not call.main:
            return follow()
        changed = {site: self._at(site, call.layer, call.step, getattr(call, site)) for site in ("q", "k", "v")}
        changed = {site: x for site, x in changed.items() if x is not getattr(call, site)}
        return follow(call.replace(**changed)) if changed else follow()

    def on_scores(self, call: AttentionCall, scores: Tensor) -> Tensor:
        return self._at("scores", call.layer, call.step, scores)

    def on_weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return self._at("weights", call.layer, call.step, weights)

    def on_z(self, call: AttentionCall, z: Tensor) -> Tensor:
        if not call.main:
            return z
        turned = z.transpose(1, 2)
        changed = self._at("z", call.layer, call.step, turned)
        return z if changed is turned else changed.transpose(1, 2)

    def on_hidden(self, step: Step, site: str, layer: int, x: Tensor) -> Tensor:
        return self._at(site, 0 if site in _ONCE else layer, step, x)

    def _at(self, site: str, layer: int, step: Step, x: Tensor) -> Tensor:
        for edit in self.edits:
            if edit.site == site and edit.layer == layer:
                x = edit.apply(x, step)
        return x
