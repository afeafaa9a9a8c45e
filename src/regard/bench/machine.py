"""What the machine itself can do: the limits that stand beside every timing."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def limits(device: str = "cpu") -> dict[str, Any]:
    """Measured and stated facts: float32 GEMM rate (GFLOP/s), copy and read bandwidth (GB/s), threads, allocator, versions."""
    size = 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    big = torch.ones(32 << 20, device=device)
    other = torch.empty_like(big)
    gemm_s = seconds(lambda: torch.mm(a, b))
    copy_s = seconds(lambda: other.copy_(big))
    read_s = seconds(lambda: big.sum())
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_gib(), 1),
        "gemm_gflops": round(2 * size**3 / gemm_s / 1e9, 1),
        "copy_gb_s": round(2 * big.nbytes / copy_s / 1e9, 1),
        "read_gb_s": round(big.nbytes / read_s / 1e9, 1),
        "allocator": _allocator(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "os": platform.platform(),
    }


def hardware() -> str:
    """A short name of the machine, for result lines."""
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def seconds(work: Callable[[], Any], *, repeats: int = 7, at_least_s: float = 0.0) -> float:
    """The best time of one call, of `repeats` calls after one that warms up, or of more until `at_least_s` have passed."""
    work()
    best, begin, count = float("inf"), time.perf_counter(), 0
    while count < repeats or time.perf_counter() - begin < at_least_s:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        count += 1
    return best


def peak_mib(work: Callable[[], Any]) -> float | None:
    """How far the process's memory rises above its start while `work` runs, MiB; None where the system cannot tell."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    try:
        _give_back_free_memory()
        reset.write_text("5")
    except OSError:
        return None
    before = _status_kib("VmRSS")
    work()
    return round(max(_status_kib("VmHWM") - before, 0) / 1024, 1)


def _give_back_free_memory() -> None:
    # freed memory that the C library still holds would hide what the work takes
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return 0.0


def _allocator() -> str:
    preload = os.environ.get("LD_PRELOAD", "")
    name = next((n for n in ("jemalloc", "tcmalloc", "mimalloc") if n in preload), platform.libc_ver()[0] or "system")
    tuned = [f"{key}={os.environ[key]}" for key in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_") if key in os.environ]
    return " ".join([name, *tuned])
