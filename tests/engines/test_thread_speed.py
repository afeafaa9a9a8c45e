"""What a second thread brings the native blocks, by wall time: on a quiet machine with two cores."""

import os
import statistics
import time

import pytest
import torch

from regard import Causal, SlidingWindow
from regard.engines.block_sparse import block_sparse
from regard.engines.native import missing


def seconds(call, threads):
    torch.set_num_threads(threads)
    try:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason="there are no native kernels")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_two_threads_against_one(record):
    ratios, load = {}, os.getloadavg()[0]
    for name, pattern, n in (("causal", Causal(), 4096), ("window 256", Causal() & SlidingWindow(256), 16384)):
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                q, k, v = (torch.randn(1, 8, n, 64, dtype=dtype, requires_grad=backward) for _ in range(3))

                def call(q=q, k=k, v=v, pattern=pattern, backward=backward):
                    out = block_sparse(q, k, v, pattern, engine="block_sparse:native").out
                    if backward:
                        torch.autograd.grad(out.sum(), (q, k, v))

                call()
                taken = {1: [], 2: []}
                for _ in range(7):
                    for threads, times in taken.items():
                        times.append(seconds(call, threads))
                key = f"{name}, {n} tokens, {dtype}, forward{' and backward' if backward else ''}"
                ratios[key] = round(statistics.median(taken[1]) / statistics.median(taken[2]), 3)
    record(
        {
            "clock": "wall time, medians of 7 in turns",
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "ratios": ratios,
        }
    )
    assert min(ratios.values()) > 1
