"""The loop of a beam search over a transformers model, inside `generate(custom_generate=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.contract.errors import Unsupported
from regard.primitives.beam import Beams


def write_beams(
    model: Any, input_ids: Tensor, beams: Beams, step: Callable[[Tensor, Beams], Beams], most: int,
    model_kwargs: Mapping[str, Any], processors: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Beams:  # fmt: skip
    """Let all beams go on, by one forward pass of the model a step, until their groups are closed or have `most` tokens.

    input_ids: int64 (B K, P), the prompts, each K times. step: (log_p (B K, V), beams) -> beams. model_kwargs: what generate
    hands on. processors: (ids so far, log_p) -> log_p. Raises Unsupported for a cache that cannot follow its beams.
    """
    given = dict(model_kwargs)
    for index in range(most):
        ids = torch.cat((input_ids, beams.tokens.flatten(0, 1)), 1)
        cache = given.get("past_key_values")
        known = 0 if cache is None or not given.get("use_cache", True) else cache.get_seq_length()
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=ids.shape[1] - known if known else None, is_first_iteration=index == 0, **given
        )
        out = model(**inputs, return_dict=True)
        given = model._update_model_kwargs_for_generation(
            out, given, is_encoder_decoder=model.config.is_encoder_decoder
        )
        logits = out.logits[:, -1]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        beams = step(log_p if processors is None else processors(ids, log_p), beams)
        if bool(beams.closed.all()):
            break
        cache = given.get("past_key_values")
        if cache is not None:
            if not hasattr(cache, "reorder_cache"):
                raise Unsupported(
                    f"a {type(cache).__name__} cannot follow beams; use a DynamicCache, or use_cache=False"
                )
            cache.reorder_cache(beams.flat_parents())
    return beams
