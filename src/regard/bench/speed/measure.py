"""Rivals timed in turns, in one process, with the machine's own rate taken in between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import torch

from regard._version import __version__
from regard.bench.machine import hardware, limits, peak_mib
from regard.bench.results import Results
from regard.bench.speed.rivals import Attention, Rival, call, rivals
from regard.bench.speed.work import DTYPES, Work
from regard.contract.dispatch import engine
from regard.contract.errors import Unsupported
from regard.patterns import BlockCausal, Causal, DilatedWindow, Neighborhood, Sinks, SlidingWindow


class Watcher(Protocol):
    """Whom `measure` tells how it goes."""

    def advance(self, step: int, note: str) -> None: ...


def default_works(lengths: tuple[int, ...], patterns: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Work]:
    """Every pattern, length, dtype and direction; decoding has no backward pass."""
    directions = {True: (False,), False: (False, True)}
    return [
        Work(pattern, length, dtype, backward)
        for pattern in patterns
        for length in lengths
        for dtype in dtypes
        for backward in directions[pattern == "decode"]
    ]


def option_works() -> list[Work]:
    """What options cost: the head widths, the biases and the normalisers on one dense causal work."""
    works = [Work("causal", 2048, dim=dim, backward=b) for dim in (16, 32, 64, 128, 256) for b in (False, True)]
    works += [Work("causal", 2048, bias=bias, backward=b) for bias in ("dense", "key") for b in (False, True)]
    works += [Work("causal", 2048, normaliser=n, backward=b) for n in ("sigmoid", "softplus") for b in (False, True)]
    return works


def measure(
    works: list[Work], results: Results, watcher: Watcher, *, engines: tuple[str, ...], limit_s: float = 20.0
) -> None:
    """Time every work by every rival, one result line a work, and the machine's limits first.

    One thread: process CPU time; more: wall time; medians. limit_s: a rival whose one call would take longer is
    skipped, by its time on the same work at a shorter length. Works that the results hold already are not repeated.
    """
    if "machine" not in results:
        results.add({"kind": "machine", "key": "machine", **limits(), "fma_gflops": rates()})
    slow: dict[tuple[str, str], tuple[int, float]] = {}
    for place, work in enumerate(works, 1):
        if work.key not in results:
            results.add(
                {"kind": "timing", "key": work.key, **asdict(work), **_time(work, engines, slow, limit_s)} | _facts()
            )
        watcher.advance(place, work.key)


def rates() -> dict[str, float]:
    """The multiply-add rate of the registers alone, GFLOP/s of one thread, a dtype; empty without native code."""
    native = engine("native")
    if native.missing():
        return {}
    return {name: round(native.fma_rate(None, DTYPES[name], 0.05) / 1e9, 1) for name in ("fp32", "bf16")}


def measure_once(results: Results) -> None:
    """What needs no rivals: how long layouts take, and how much memory a long window takes."""
    if "layout" not in results:
        results.add({"kind": "layout", "key": "layout", "length": 65536, "ms": layout_times(65536)} | _facts())
    work = Work("window:256", 65536, backward=True)
    if f"memory {work.key}" not in results:
        line = memory(work, "block_sparse:native")
        results.add({"kind": "memory", "key": f"memory {work.key}", **line} | _facts())


def layout_times(n: int, *, block: int = 64) -> dict[str, float]:
    """How long the block layout of each kind of pattern takes to build at n tokens, in ms, not cached."""
    side = int(n**0.5)
    causal = Causal()
    kinds = {
        "Causal": causal,
        "Causal & SlidingWindow(256)": causal & SlidingWindow(256),
        "Causal & (SlidingWindow(256) | Sinks(4))": causal & (SlidingWindow(256) | Sinks(4)),
        "DilatedWindow(64, 4)": DilatedWindow(64, 4),
        "BlockCausal(100)": BlockCausal(100),
        f"Neighborhood({side}x{side}, 15)": Neighborhood((side, side), (15, 15)),
    }
    out = {}
    # the first layout of a process also pays for torch's own start
    SlidingWindow(3).layout(256, 256, block=(block, block))
    for name, pattern in kinds.items():
        begin = time.process_time()
        pattern.layout(n, n, block=(block, block))
        out[name] = round((time.process_time() - begin) * 1e3, 2)
    return out


def memory(work: Work, name: str) -> dict[str, Any]:
    """The rise of the process's memory in one call, against inputs, output and gradients together."""
    q, k, v = work.tensors()
    attention = next(r for r in rivals((name,)) if r.name == name).prepare(work, q, k, v)
    needed = sum(x.nbytes for x in (q, k, v)) * (2 if work.backward else 1) + 2 * q.nbytes
    inputs = sum(x.nbytes for x in (q, k, v))
    rise = peak_mib(lambda: call(work, attention, (q, k, v)))
    total = None if rise is None else rise * 2**20 + inputs
    return {"peak_bytes": total, "needed_bytes": needed, "ratio": None if total is None else round(total / needed, 3)}


def _time(
    work: Work, engines: tuple[str, ...], slow: dict[tuple[str, str], tuple[int, float]], limit_s: float
) -> dict[str, Any]:
    leaves = work.tensors()
    kind = work.key.replace(f" {work.length} ", " ", 1)
    with torch.set_grad_enabled(work.backward):
        ready: dict[str, Attention] = {}
        refused: dict[str, str] = {}
        first: dict[str, float] = {}
        for rival in rivals(engines):
            length, seconds = slow.get((rival.name, kind), (work.length, 0.0))
            # pairs grow with the square of the length
            if seconds * (work.length / length) ** 2 > limit_s:
                refused[rival.name] = f"would take longer than {limit_s:.0f} s"
                continue
            try:
                begin = _clock()
                attention = _warm(rival, work, leaves)
                first[rival.name] = _clock() - begin
            except Unsupported as error:
                refused[rival.name] = str(error)
                continue
            ready[rival.name] = attention
        times = _in_turns({name: _work_of(work, run, leaves) for name, run in ready.items()})
        slow.update({(name, kind): (work.length, seconds) for name, seconds in times.items()})
    flops = work.flops()
    rate = rates().get(work.dtype)
    share = {} if rate is None else {n: round(flops / t / 1e9 / rate, 3) for n, t in times.items()}
    return {
        "flops": flops,
        "fma_gflops": rate,
        "first_ms": {name: round(t * 1e3, 3) for name, t in first.items()},
        "ms": {name: round(t * 1e3, 4) for name, t in times.items()},
        "share": share,
        "refused": refused,
        "gb_per_s": {
            n: round((work.length * work.heads * work.dim * 2 * leaves[1].element_size()) / t / 1e9, 2)
            for n, t in times.items()
        }
        if work.pattern == "decode"
        else {},
    }


def _warm(rival: Rival, work: Work, leaves: tuple[torch.Tensor, ...]) -> Attention:
    attention = rival.prepare(work, *leaves)
    call(work, attention, leaves)
    return attention


def _work_of(work: Work, attention: Attention, leaves: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    return lambda: call(work, attention, leaves)


def _in_turns(calls: dict[str, Callable[[], None]], *, enough_s: float = 2.0, rounds: int = 15) -> dict[str, float]:
    """Median seconds of each, called one after the other in rounds, so that a slow moment meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for count in range(rounds):
        if count >= 3 and time.perf_counter() - begin > enough_s * len(calls):
            break
        for name, run in calls.items():
            start = _clock()
            run()
            taken[name].append(_clock() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _facts() -> dict[str, Any]:
    threads = torch.get_num_threads()
    clock = "process CPU time" if threads == 1 else "wall time"
    return {
        "threads": threads,
        "clock": clock,
        "regard": __version__,
        "torch": torch.__version__,
        "hardware": hardware(),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's thread count inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
