"""A language model that reads both ways: the causal mask is taken off.

    s_ij is seen for all j, not for j <= i alone

Pads stay hidden, and a sliding window becomes two-sided. Nothing else changes: what the model writes afterwards is
written by a model that was never trained so, hence this serves embedders.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from regard.contract.attach import intervention
from regard.contract.card import InterventionCard
from regard.contract.errors import Unsupported

CARD = InterventionCard(
    slug="bidirectional",
    title="The causal mask taken off",
    exports=("Bidirectional",),
    sites=("scores",),
    padding=True,
    baseline=True,
)

# the makers of masks that look at the setting, and layers whose masks are made by them
_MAKERS = ("create_causal_mask", "create_masks_for_generate")
_LAYERS = ("full_attention", "sliding_attention")


@intervention(CARD)
@dataclass(frozen=True)
class Bidirectional:
    """Let every token see those after it; a model that is not causal stays as it is (NV-Embed, section 3.1).

    Of a prompt in pieces no token sees the pieces after its own: give it whole. Raises Unsupported for models that keep
    order in another way: recurrent layers, chunks, a decoder under an encoder, or attention of their own that is not
    dispatched.
    """

    def start(self, session: Any) -> Bidirectional:
        """Set `is_causal` of the stack's config until the session ends."""
        main = session.anatomy.main
        name = type(session.model).__name__
        if main.place in ("decoder", "vision"):
            raise Unsupported(f"{name} is no language model of one stack: there is no causal mask to take off")
        others = sorted(set(getattr(main.base.config, "layer_types", None) or ()) - set(_LAYERS))
        if others:
            raise Unsupported(f"{name} has layers of {', '.join(others)}, which stay causal")
        makers = vars(sys.modules[type(main.base).__module__])
        if not any(maker in makers for maker in _MAKERS):
            raise Unsupported(f"{name} does not get its mask from the library, and no setting takes one off")
        session.change(main.base.config, "is_causal", False)
        return self
