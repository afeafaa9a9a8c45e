"""The output of a pointer-generator: a word is written from the vocabulary, or copied from where it stands."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.contract.errors import ShapeError


def copy_mix(p_vocab: Tensor, weights: Tensor, ids: Tensor, gate: Tensor) -> Tensor:
    """gate * (weights added up at their ids) + (1 - gate) * p_vocab: (…, V), in the wider of the two precisions.

    p_vocab: (…, V). weights: (…, S), how much each place is pointed at. ids: int64 (…, S), 0 to V - 1, which word stands
    there; a word that stands at several places gets the sum. gate: (…,), 0 to 1, how much is copied. Words that stand
    nowhere get (1 - gate) p exactly. Source: See et al., "Get To The Point", equation 9. Raises ShapeError.
    """
    lead = p_vocab.shape[:-1]
    if weights.shape != ids.shape or weights.shape[:-1] != lead or gate.shape != lead:
        raise ShapeError(
            f"p_vocab {tuple(p_vocab.shape)}, weights {tuple(weights.shape)}, ids {tuple(ids.shape)} and gate "
            f"{tuple(gate.shape)} do not fit: (…, V), (…, S), (…, S) and (…,) are needed"
        )
    kind = torch.promote_types(p_vocab.dtype, weights.dtype)
    copied = torch.zeros_like(p_vocab, dtype=kind).scatter_add(-1, ids, weights.to(kind))
    share = gate.to(kind).unsqueeze(-1)
    return share * copied + (1 - share) * p_vocab
