"""Contrastive losses: the right pair must score above all others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.contract.errors import OptionError, ShapeError


def info_nce(scores: Tensor, temperature: float, *, symmetric: bool = True) -> Tensor:
    """Cross-entropy of scores / temperature (B, M), where column i is right for row i; a scalar, the mean over rows.

    symmetric: the mean of it and of the same over columns, which needs M = B. Raises ShapeError, OptionError.
    """
    if scores.dim() != 2 or scores.shape[1] < scores.shape[0] or (symmetric and scores.shape[0] != scores.shape[1]):
        wanted = "(B, B)" if symmetric else "(B, M) with M >= B"
        raise ShapeError(f"scores are {tuple(scores.shape)}; they must be {wanted}, column i right for row i")
    logits = _logits(scores, temperature)
    right = torch.arange(len(logits), device=logits.device)
    loss = F.cross_entropy(logits, right)
    return (loss + F.cross_entropy(logits.T, right)) / 2 if symmetric else loss


def retrieval_nce(
    queries: Tensor, positives: Tensor, negatives: Tensor | None = None, *, temperature: float, in_batch: bool = True
) -> Tensor:
    """Cross-entropy over cosines: each query (B, C) must find its positive (B, C) among negatives (B, K, C); a scalar.

    in_batch: the positives and negatives of the other queries are candidates too; switch it off where they may be right
    as well, as in classes (NV-Embed, section 3.2). Raises ShapeError, OptionError.
    """
    b, c = queries.shape if queries.dim() == 2 else (-1, -1)
    fits = negatives is None or (negatives.dim() == 3 and (negatives.shape[0], negatives.shape[2]) == (b, c))
    if b < 1 or positives.shape != queries.shape or not fits:
        raise ShapeError(
            f"queries {tuple(queries.shape)}, positives {tuple(positives.shape)} and negatives "
            f"{None if negatives is None else tuple(negatives.shape)} must be (B, C), (B, C) and (B, K, C)"
        )
    if negatives is None and not in_batch:
        raise OptionError("in_batch=False leaves no candidate but the right one: give negatives=")
    queries, positives = F.normalize(queries, dim=-1), F.normalize(positives, dim=-1)
    negatives = None if negatives is None else F.normalize(negatives, dim=-1)
    if in_batch:
        candidates = positives if negatives is None else torch.cat((positives, negatives.flatten(0, 1)))
        return info_nce(queries @ candidates.T, temperature, symmetric=False)
    assert negatives is not None
    scores = torch.cat((positives[:, None], negatives), 1) @ queries[:, :, None]
    logits = _logits(scores.squeeze(-1), temperature)
    return F.cross_entropy(logits, torch.zeros(b, dtype=torch.long, device=logits.device))


def _logits(scores: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise OptionError(f"the temperature divides scores and is above 0, not {temperature}")
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
