"""Where the tests of the Triton kernels run: on a GPU if there is one, otherwise on the CPU in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# read by Triton when it is first imported, so that no test can set it
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs triton, and without a GPU TRITON_INTERPRET=1 in the environment: make test-triton",
)


@pytest.fixture
def true_bfloat16(monkeypatch):
    """The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584) and cuts off where a GPU rounds."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, convert = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def multiply_numbers(self, a, b, *rest):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    def convert_and_round(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).bfloat16().float().numpy()
            source = TensorHandle(rounded, tl.float32)
        return convert(self, source, kind)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply_numbers)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", convert_and_round)
