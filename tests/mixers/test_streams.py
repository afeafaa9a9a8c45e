"""Mixers with a state of fixed size read a stream of any length in the memory of a short one."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from pathlib import Path

import pytest
import torch

import regard
from regard.contract.names import mixers

DIM, HEADS, PIECE = 32, 2, 2000
STREAMS = {
    name: entry.card.options
    for name, entry in mixers().items()
    if getattr(entry.card, "constant_state", False) and "causal_self" in entry.card.attends
}
MEMORY = Path("/proc/self/statm")


def resident():
    """Bytes of memory that the process holds, without what it has freed."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tokens(start, count, dtype=torch.float32):
    """Some tokens of a stream that is never held as a whole; the same for every dtype."""
    generator = torch.Generator().manual_seed(start)
    return torch.randn(1, count, DIM, generator=generator).to(dtype)


def stream(layer, marks, steps, dtype=torch.float32):
    """Read a stream, the last `steps` tokens before every mark one by one: the outputs and facts at every mark."""
    state, at, outs, facts = layer.init_state(1), 0, {}, {}
    with torch.no_grad():
        for mark in marks:
            while at < mark - steps:
                count = min(PIECE, mark - steps - at)
                _, state = layer.prefill(tokens(at, count, dtype), state)
                at += count
            start = time.process_time()
            for x in tokens(at, steps, dtype).split(1, 1):
                out, state = layer.step(x, state)
            seconds = time.process_time() - start
            at += steps
            assert out.isfinite().all()
            outs[mark] = out
            facts[mark] = {
                "resident_bytes": resident(), "state_bytes": state.size_bytes, "step_us": round(seconds / steps * 1e6, 1),
            }  # fmt: skip
    return outs, facts


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    return regard.mixer(name, DIM, HEADS, **STREAMS[name]).to(dtype).eval()


@pytest.mark.skipif(not MEMORY.exists(), reason="this system does not tell how much memory a process holds")
@pytest.mark.parametrize("name", STREAMS)
def test_twenty_thousand_tokens_take_the_memory_of_two_thousand(name):
    layer = made(name)
    _, facts = stream(layer, (2_000, 20_000), 100)
    early, late = facts.values()
    assert early["state_bytes"] == late["state_bytes"] == layer.state_bytes(1, 20_000)
    # keys and values of the tokens between would be 4.6 MB
    assert late["resident_bytes"] - early["resident_bytes"] < 2**20


@pytest.mark.slow
@pytest.mark.skipif(not MEMORY.exists(), reason="this system does not tell how much memory a process holds")
def test_streams_of_a_million_tokens_take_constant_memory(record):
    marks, steps = (1_000, 10_000, 100_000, 1_000_000), 200
    figures = {
        "task": f"one row of random tokens, width 32, 2 heads: read in pieces of {PIECE}, the last {steps} before every "
        "mark one by one; drift: the output at 100000 against that of float64, relative"
    }
    for name in STREAMS:
        layer = made(name)
        # what is set up once is none of the stream's memory
        stream(layer, (3_000,), steps)
        before, start = resident(), time.process_time()
        outs, facts = stream(layer, marks, steps)
        seconds = time.process_time() - start
        exact, _ = stream(made(name, torch.float64), marks[:3], steps, torch.float64)
        drift = (outs[100_000] - exact[100_000]).norm() / exact[100_000].norm()
        figures[name] = {
            "resident_bytes_before": before, **{str(mark): fact for mark, fact in facts.items()},
            "seconds": round(seconds, 1), "drift": drift.item(),
        }  # fmt: skip
        record(figures)
    for name in STREAMS:
        at = [figures[name][str(mark)] for mark in marks]
        assert at[1]["state_bytes"] == at[2]["state_bytes"] == at[3]["state_bytes"], name
        # keys and values of a million tokens would be 256 MB
        assert at[3]["resident_bytes"] - at[1]["resident_bytes"] < 2**21, name
        assert figures[name]["drift"] < 0.01, name
