"""One model under sessions: its modules, what acts on it, and how it is made ready for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, ref

from transformers import PreTrainedModel

from regard.contract.attach import Session
from regard.contract.errors import Unsupported
from regard.hosts.transformers.anatomy import anatomy
from regard.hosts.transformers.attention import Attention
from regard.hosts.transformers.effects import Beside, Changes, Effects
from regard.hosts.transformers.hooks import Hooks
from regard.hosts.transformers.passes import Passes
from regard.hosts.transformers.uncompiled import compiled_parts, run_as_written

# families whose stack hands on as many tokens as it got, whatever its layers return
_FIXED_LENGTH = {"gpt2"}


class Attached(Beside):
    """What the sessions of one model share; with the last of them nothing of it is left on the model."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.anatomy = anatomy(model)
        self.effects, self.changes = Effects(), Changes()
        self.passes = Passes(model, self.anatomy, self.effects)
        self.attention = Attention(model, self.anatomy, self.effects, self.passes)
        self._hooks = Hooks(model, self.anatomy, self.effects, self.passes, self.attention)
        self._compile_again: Callable[[], None] | None = None

    @staticmethod
    def of(model: PreTrainedModel) -> Attached:
        """What is attached to a model, new if nothing is."""
        found = _MODELS.get(model, lambda: None)()
        if found is None:
            found = Attached(model)
            _MODELS[model] = ref(found)
        return found

    def add(self, session: Session) -> None:
        """Let a session's interventions act. Raises Unsupported for a site that is missing or owned already."""
        owned = {
            site: i.card.slug
            for other in dict.fromkeys(s for s, _ in self.effects.pairs)
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
            self.effects.pairs.append((session, given.start(session) if hasattr(given, "start") else given))
        if self.effects.pairs:
            for part, name, value in compiled_parts(session.outer):
                self.changes.set(session, part, name, value)
        self._lay()

    def remove(self, session: Session) -> None:
        """End a session; with the last one nothing is left on the model."""
        self.effects.pairs = [pair for pair in self.effects.pairs if pair[0] is not session]
        self.changes.undo(session)
        self._lay()

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
        """Make the model ready for the effects in force, and for no more than them."""
        own, acts = vars(self.model), bool(self.effects.pairs)
        self.effects.again = False
        self._hooks.remove()
        if acts and self._compile_again is None:
            self.attention.claim()
            self._compile_again = run_as_written(self.passes.alone, self.model, self.anatomy.main.base)
        self.attention.switch(self.effects.at_attention() and self.model._can_set_attn_implementation())
        if acts:
            if "_prefill" not in own and hasattr(self.model, "_prefill"):
                own["_prefill"] = self.passes.read_prompt
            self._hooks.lay()
            return
        if self._compile_again is not None:
            self._compile_again()
            self._compile_again = None
            self.attention.leave()
        if getattr(own.get("_prefill"), "__self__", None) is self.passes:
            del own["_prefill"]


# its hooks keep what is attached to a model, and a model that nobody holds any more is not held by this
_MODELS: WeakKeyDictionary[PreTrainedModel, Callable[[], Attached | None]] = WeakKeyDictionary()
