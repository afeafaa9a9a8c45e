"""What acts on a model under sessions: the effects in their order, and the attributes that they set meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.contract.attach import Session
from regard.contract.errors import Unsupported

# the methods that need the attention functions
_AT_ATTENTION = ("on_scores", "on_weights", "on_z", "on_attention", "on_kv", "on_read", "on_tokens")
# what stood in an attribute that was not there
_ABSENT = object()


class Beside:
    """What stands beside a model and is reached from its hooks: it is not copied with the model, and not stored."""

    def __deepcopy__(self, memo: Any) -> Beside:
        # a copy of the model is refused when it runs
        return self

    def __reduce__(self) -> Any:
        raise Unsupported("a model under steer or record cannot be pickled: use save_pretrained, or leave the session")


class Effects(Beside):
    """The effects in force. pairs: (session, effect), in the order in which the sessions were opened.

    again: whether layers run for the second time, for the gradients of checkpointed ones.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Session, Any]] = []
        self.again = False

    def acting(self, method: str) -> list[Any]:
        """The effects that have a method, in order; those that only read come last, to see what the model used."""
        found = [effect for _, effect in self.pairs if getattr(effect, method, None) is not None]
        if self.again and method != "on_weights":
            # they have read it; that weights are looked at decides how they are computed
            found = [effect for effect in found if not getattr(effect, "reads_only", False)]
        return sorted(found, key=lambda effect: getattr(effect, "reads_only", False))

    def at_attention(self) -> bool:
        """Whether attention functions must come here."""
        return any(getattr(effect, method, None) is not None for _, effect in self.pairs for method in _AT_ATTENTION)


@dataclass(eq=False)
class _Change:
    session: Session
    thing: Any
    name: str
    before: Any


class Changes:
    """Attributes set until sessions end, in whatever order they do."""

    def __init__(self) -> None:
        self._all: list[_Change] = []

    def set(self, session: Session, thing: Any, name: str, value: Any) -> None:
        """Set an attribute until a session ends; one that was not there is taken away again."""
        self._all.append(_Change(session, thing, name, getattr(thing, name, _ABSENT)))
        setattr(thing, name, value)

    def of(self, session: Session) -> bool:
        """Whether a session has set anything."""
        return any(change.session is session for change in self._all)

    def undo(self, session: Session) -> None:
        """Put back what a session found; where another has set the same since, it is that one's to put back."""
        for change in [change for change in reversed(self._all) if change.session is session]:
            later = self._all[self._all.index(change) + 1 :]
            above = next((c for c in later if c.thing is change.thing and c.name == change.name), None)
            self._all.remove(change)
            if above is not None:
                above.before = change.before
            elif change.before is _ABSENT:
                delattr(change.thing, change.name)
            else:
                setattr(change.thing, change.name, change.before)
