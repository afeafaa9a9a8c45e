"""The proving ground: small trained models of real library classes, whose weights come with the package.

model, tokenizer = regard.tiny.lm()
cases = regard.tiny.note_cases(32, 512)
right = cases.right(model(cases.ids).logits)
"""

from __future__ import annotations

from typing import Any

import torch

from regard.bench.proving.notes import NoteCases as NoteCases
from regard.bench.proving.notes import note_cases as note_cases


def lm(*, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """tiny-lm, a transformers LlamaForCausalLM in evaluation mode, and its tokenizer; new objects at every call.

    Three layers of four heads of 32 (two key heads), vocabulary 388: bytes, begin, note, ask, keys, values, pad. The weights
    are stored in bfloat16 and were scored in float32, see `scores.json` beside them. Raises MissingExtra without transformers.
    """
    from regard.bench.proving.tiny_lm import WEIGHTS, load

    return load(WEIGHTS, dtype)
