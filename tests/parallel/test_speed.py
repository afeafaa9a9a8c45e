"""Two processes of one thread each against one process of one thread, for the same whole sequence."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from regard.engines.block_sparse import block_sparse
from regard.engines.scan import linear_scan
from regard.parallel import lasp2, ring_attention, shard
from regard.patterns import Causal, Full
from tests.oracles import normal
from tests.parallel.worlds import start

REPEATS = 6
N = {"ring": 6144, "lasp2": 16384}


def alone(name, q, k, v):
    if name.startswith("ring"):
        return block_sparse(q, k, v, Causal() if "causal" in name else Full()).out
    return linear_scan(q, k, v, DECAY if "decay" in name else None)[0]


def together(name, q, k, v):
    if name.startswith("ring"):
        return ring_attention(q, k, v, is_causal="causal" in name, layout=layout_of(name))
    return lasp2(q, k, v, DECAY if "decay" in name else None)


def layout_of(name) -> str:
    return "zigzag" if "causal" in name else "contiguous"


DECAY = -torch.arange(1, 9) / 64
NAMES = ("ring", "ring causal", "lasp2", "lasp2 decay")


def measure(rank: int, size: int, folder: str) -> None:
    """Forward and backward of every case: seconds of wall clock and of this process's processor, of every repeat."""
    found = {}
    for name in NAMES:
        shape = (1, 8, N[name.partition(" ")[0]], 64)
        whole = normal(shape, shape, shape, dtype=torch.float32)
        parts = [shard(x, layout=layout_of(name)).contiguous().requires_grad_() for x in whole]
        call = partial(alone if size == 1 else together, name)
        # in the kernels, the sum of squares costs nothing beside them
        for repeat in range(REPEATS + 1):
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            call(*parts).square().sum().backward()
            if repeat:
                took = (time.perf_counter() - wall, time.process_time() - processor)
                found.setdefault(name, []).append(took)
    (Path(folder) / f"{size}.{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_against_one(tmp_path, record):
    load = os.getloadavg()[0]
    for size in (1, 2):
        assert start(size, tmp_path, measure, str(tmp_path)) == [0] * size
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1.0", "2.0", "2.1"))
    figures = {"load_before": load, "load_after": os.getloadavg()[0], "cores": os.cpu_count(), "repeats": REPEATS}
    for name in NAMES:
        # a step ends when the slower process does
        walls = [max(pair) for pair in zip(*([wall for wall, _ in times[name]] for times in two), strict=True)]
        processor = max(min(cpu for _, cpu in times[name]) for times in two)
        figures[name] = {
            "tokens": N[name.partition(" ")[0]],
            "one_process_wall_s": min(wall for wall, _ in one[name]),
            "two_processes_wall_s": min(walls),
            "one_process_processor_s": min(cpu for _, cpu in one[name]),
            "two_processes_processor_s": processor,
        }
        for clock in ("wall", "processor"):
            ratio = figures[name][f"one_process_{clock}_s"] / figures[name][f"two_processes_{clock}_s"]
            figures[name][f"speedup_{clock}"] = round(ratio, 3)
    record(figures)
    # by processor time, which other work on the machine does not stretch; messages are counted in it, waiting is not
    assert min(figures[name]["speedup_processor"] for name in NAMES) >= 1.7
