"""The scan against what torch users write, and the delta rule against transformers' fallback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from regard.engines.delta import delta_rule
from regard.engines.native import scan as kernels
from regard.engines.scan import ScanState, linear_scan
from tests.engines.scan_speed import PRODUCTS, chunk_loop, parallel_prefix, tensors

REUSED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


@pytest.mark.parametrize("way", [parallel_prefix, chunk_loop])
def test_the_competitors_compute_the_same(way):
    (q, k, v, g), _ = tensors(256, torch.float64, True)
    torch.testing.assert_close(way(q, k, v, g.double()), linear_scan(q, k, v, g.double())[0])
    if way is parallel_prefix:
        torch.testing.assert_close(way(q, k, v), linear_scan(q, k, v)[0])


def measured(environment, *arguments):
    command = [sys.executable, "-m", "tests.engines.scan_speed", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(kernels.missing() is not None, reason=f"no native scan: {kernels.missing()}")
def test_scan_speed(record):
    figures, fresh = measured(REUSED), measured({}, "loop")
    linear, half = figures["linear float32 4096 ms"], figures["linear bfloat16 4096 ms"]
    short, long = figures["decayed float32 4096 ms"], figures["decayed float32 16384 ms"]
    operations = PRODUCTS * 2 * 64**3 * 8 * 4096 / 64
    figures["ratios"] = {
        "linear float32, prefix form": linear["prefix"] / linear["native"],
        "linear bfloat16, prefix form": half["prefix"] / half["native"],
        "decayed 4096, prefix form": short["prefix"] / short["native"],
        "decayed 4096, chunk loop": short["loop"] / short["native"],
        "decayed 16384, chunk loop": long["loop"] / long["native"],
        "decayed 16384, chunk loop, with fresh pages": fresh["loop"] / fresh["native"],
        "share of the multiply-add rate": operations / linear["native"] / 1e6 / figures["fma GFLOP/s"],
    }
    delta = figures["delta float32 4096 ms"]
    if "transformers" in delta:
        figures["ratios"]["delta rule, transformers' fallback"] = delta["transformers"] / delta["delta"]
    figures["with fresh pages, decayed float32 16384 ms"] = fresh
    record({"environment": REUSED, "clock": "process CPU time", **figures})
    ratios = figures["ratios"]
    assert ratios["linear float32, prefix form"] > 3.5
    # 2.9 to 3.4 on a busy machine
    assert ratios["linear bfloat16, prefix form"] > 2.5
    assert ratios["decayed 4096, chunk loop"] > 6
    assert ratios["decayed 16384, chunk loop"] > 20
    assert ratios["decayed 16384, chunk loop, with fresh pages"] > 50
    assert ratios.get("delta rule, transformers' fallback", 4.1) > 4
    assert ratios["share of the multiply-add rate"] > 0.45
    assert figures["scan:native time per token, 65536 against 4096"] < 1.15


@pytest.mark.slow
def test_the_delta_rule_is_that_of_qwen3_next():
    model = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    generator = torch.Generator().manual_seed(0)
    for n in (1, 64, 100, 257):
        # (B, N, H, ·), keys and queries for half of the heads
        q, k = (torch.randn(2, n, 2, 16, generator=generator) for _ in range(2))
        v, s0 = torch.randn(2, n, 4, 24, generator=generator), torch.randn(2, 4, 16, 24, generator=generator)
        beta, g = torch.rand(2, n, 4, generator=generator), -torch.rand(2, n, 4, generator=generator)
        given = [x.requires_grad_() for x in (q, k, v, beta, g, s0)]
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        want = model.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=s0, **options)
        # x / sqrt(|x|^2 + 1e-6), and a scale of D^-1/2
        unit = [x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k)]
        turned = [x.transpose(1, 2) for x in (*unit, v, beta, g)]
        out, state = delta_rule(*turned, scale=16**-0.5, initial_state=ScanState(s0))
        torch.testing.assert_close(out.transpose(1, 2), want[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state.s, want[1], atol=1e-5, rtol=1e-5)
        found = torch.autograd.grad(out.cos().sum() + state.s.sum(), given)
        wanted = torch.autograd.grad(want[0].cos().sum() + want[1].sum(), given)
        for got, expected in zip(found, wanted, strict=True):
            assert (got - expected).norm() / expected.norm() < 1e-5
