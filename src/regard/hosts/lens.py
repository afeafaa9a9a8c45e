"""The logit lens: what a stream in the middle of a model would say if it were the last one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regard.contract.attach import open_session
from regard.contract.errors import Unsupported


def lens(model: Any, hidden: Tensor, *, norm: bool = True) -> Tensor:
    """Logits (…, V) of a stream (…, C), through the final norm (nostalgebraist, 2020) and the output embeddings.

    What a family does to them besides, such as Gemma 2's cap or T5's factor before the embeddings, is left out.
    norm: False for streams that have passed the final norm already. Raises Unsupported for a model without either.
    """
    session = open_session(model, ())
    head = session.model.get_output_embeddings()
    if head is None:
        raise Unsupported(f"{type(session.model).__name__} has no output embeddings to read a stream with")
    if not norm:
        return head(hidden)
    final = session.anatomy.main.final
    if final is None:
        raise Unsupported(f"{type(session.model).__name__} has no final norm that was recognised; give norm=False")
    # not through the module: hooks on it would take this for a pass of the model
    return head(final.forward(hidden))
