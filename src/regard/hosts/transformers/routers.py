"""How families of mixtures of experts choose: their rule, done again with some experts barred and some demanded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.contract.errors import Unsupported


def experts_of(router: nn.Module) -> tuple[int, int]:
    """(number of experts, how many a token gets)."""
    parts: Any = router
    return int(parts.num_experts), int(parts.top_k)


def choose(router: nn.Module, logits: Tensor, barred: Tensor, demanded: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (T, k) and experts int64 (T, k) by the router's own rule, from logits (T, E).

    barred, demanded: bool (E,). A barred expert is never chosen, and the others share its weight as the rule has it; a
    demanded one always is, with the weight that its own logit gives. Raises Unsupported for a rule that is not known.
    """
    parts: Any = router
    if hasattr(parts, "e_score_correction_bias"):
        return _by_sigmoid(parts, logits, barred, demanded)
    if "sigmoid" in type(parts).__name__.lower() or hasattr(parts, "bias"):
        raise Unsupported(f"the rule of {type(parts).__name__} is not known")
    return _by_softmax(parts, logits, barred, demanded)


def check_rule(router: nn.Module, logits: Tensor, weights: Tensor, experts: Tensor) -> None:
    """Raise Unsupported unless the rule, left alone, chooses what the router chose."""
    none = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    ours, chosen = choose(router, logits, none, none)
    same = torch.equal(chosen.sort(-1).values, experts.sort(-1).values)
    if not same or not torch.allclose(ours.sort(-1).values.float(), weights.sort(-1).values.float(), atol=1e-4):
        raise Unsupported(f"{type(router).__name__} chooses by a rule that is not known")


def _by_softmax(router: Any, logits: Tensor, barred: Tensor, demanded: Tensor) -> tuple[Tensor, Tensor]:
    """Mixtral, Qwen: softmax, the largest k, divided by their sum where the family does so."""
    probabilities = logits.masked_fill(barred, float("-inf")).float().softmax(-1)
    experts = probabilities.masked_fill(demanded, 2.0).topk(router.top_k, -1).indices
    weights = probabilities.gather(-1, experts)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def _by_sigmoid(router: Any, logits: Tensor, barred: Tensor, demanded: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3: sigmoid; groups by their two best, corrected; then the largest k in the best groups.

    Where these hold fewer than k that are not barred, the best of the others follow; what is demanded comes from any group.
    """
    nothing = float("-inf")
    scores = logits.float().sigmoid().masked_fill(barred, 0.0)
    choice = (scores + router.e_score_correction_bias).masked_fill(barred, nothing).masked_fill(demanded, 1e9)
    groups = choice.unflatten(-1, (router.num_group, -1))
    two = groups.topk(2, -1).values
    worth = two.masked_fill(two == nothing, 0.0).sum(-1).masked_fill(two[..., 0] == nothing, nothing)
    best = worth.topk(router.topk_group, -1).indices
    inside = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
    first = (inside.unsqueeze(-1).expand_as(groups).flatten(-2) | demanded) & ~barred
    # by what they are worth, and then those of the chosen groups first
    order = choice.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, first.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    experts = order[..., : router.top_k]
    weights = scores.gather(-1, experts)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * router.routed_scaling_factor).to(logits.dtype), experts
