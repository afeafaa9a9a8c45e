"""The kernels compile for GPUs, on a machine without one: what the interpreter runs is also what the compiler takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.engines.triton_device import needs_triton

# kilobytes of shared memory of a block: NVIDIA's tuning guides
SHARED = {80: 163, 89: 99, 90: 227}
SCRIPT = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from regard import L1, Causal, Linear, Sigmoid, Softmax
from regard.engines import triton as home
from regard.engines.chunks import Options
from regard.engines.triton import blocks, scan

capability, dtype, wide = int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] == "wide"
found = []

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", capability, 32)

def compile_only(on, kernel, programs, *arguments, **constants):
    made = kernel.warmup(*arguments, grid=(programs,), **constants)
    found.append((kernel.__name__, made.metadata.shared, len(made.asm["cubin"]), "mma" in made.asm["ptx"]))

triton.runtime.driver.set_active(Driver())
home.run = compile_only
d = 128 if wide else 64
q, k, v = (torch.zeros(2, h, 150, d, dtype=dtype) for h in (4, 2, 2))
layout = Causal().layout(150, 150)
# exact products of float32 take the compiler long
for normaliser in (L1(),) if wide or dtype == torch.float32 else (Softmax(), Sigmoid(-1.0), L1(), Linear()):
    softmax = isinstance(normaliser, Softmax)
    options = Options(
        0.1, 3, normaliser, bias=torch.zeros(1, 4, 150, 150), sinks=torch.zeros(1, 4, 1) if softmax else None,
        seed=torch.tensor(3), dropout_p=0.1,
    )
    out, lse = blocks.forward(q, k, v, layout, options)
    lse = torch.zeros(2, 4, 150)
    blocks.backward(out, lse, q, k, v, out, lse, layout, options)
if not wide:
    g, s0, segment = torch.zeros(2, 4, 150), torch.zeros(2, 4, d, d), torch.zeros(2, 150, dtype=torch.int64)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    out, s = scan._forward(q, k, v, 0.5, g, s0, segment)
    scan._backward(out, s, q, k, v, 0.5, g, s0, segment)
print(json.dumps(found))
"""
KERNELS = {
    "forward", "backward_queries", "backward_keys", "backward_bias", "chunk_states", "prefix_states", "chunk_outputs",
}  # fmt: skip


def compiled(capability, dtype, width):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(capability), dtype, width],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("capability, dtype", [(80, "bfloat16"), (89, "float16"), (90, "bfloat16")])
def test_half_precision_compiles_into_matrix_instructions_and_fits(capability, dtype):
    found = compiled(capability, dtype, "narrow")
    assert {name for name, *_ in found} == KERNELS
    for name, shared, binary, matrix in found:
        assert binary and shared <= SHARED[capability] * 1024, name
        assert matrix or name == "prefix_states"


@needs_triton
def test_heads_of_128_in_half_precision_fit_into_small_devices():
    assert all(shared <= SHARED[89] * 1024 for _, shared, *_ in compiled(89, "bfloat16", "wide"))


@needs_triton
def test_float32_compiles_into_exact_products_and_fits():
    found = compiled(80, "float32", "narrow")
    assert {name for name, *_ in found} == KERNELS
    for name, shared, binary, matrix in found:
        # a matrix instruction would round the factors to TF32
        assert binary and not matrix and shared <= SHARED[80] * 1024, name
