"""How fast the engines are on this machine: measured once, at the first large call, and kept in the user's cache.

A call is estimated as `start + pairs * rate`, pairs being query-key pairs of 64 + 64 numbers. The measurement takes a
fraction of a second for each dtype. REGARD_CALIBRATION=off measures nothing and leaves a fixed rule; a path there is
where the figures are read and written instead of <cache>/regard/calibration.json.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.engines import native
from regard.engines.block_sparse import block_sparse
from regard.engines.dense import dense
from regard.engines.native.abi import version
from regard.patterns import Causal, SlidingWindow

VARIABLE = "REGARD_CALIBRATION"
# queries and keys of the measured calls, heads, window
LENGTH, HEADS, WINDOW = 1024, 2, 128


@dataclass(frozen=True)
class Rate:
    """start_us: microseconds of a call of next to nothing. per_mpair_us: microseconds per million pairs visited."""

    start_us: float
    per_mpair_us: float

    def estimate_us(self, pairs: float) -> float:
        """Microseconds of a call that visits so many pairs."""
        return self.start_us + self.per_mpair_us * pairs / 1e6


Rates = dict[str, Rate]
_known: dict[str, Rates | None] = {}


def rates(dtype: torch.dtype) -> Rates | None:
    """What was measured for a dtype, by way: "sdpa causal", "sdpa full", "sdpa masked", "native", "torch", "reference".

    Measures if need be. None where measuring is off, or where torch.compile is at work and nothing was measured yet.
    """
    name = str(dtype)
    if name not in _known and not torch.compiler.is_compiling():
        _known[name] = _read_or_measure(name, dtype)
    return _known.get(name)


def forget() -> None:
    """Drop what was read or measured in this process."""
    _known.clear()


def machine() -> str:
    """What the figures hold for: processor, threads, torch, native library."""
    kernels = "no native kernels" if native.missing() else f"native kernels {version()}"
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernels}"


def _read_or_measure(name: str, dtype: torch.dtype) -> Rates | None:
    setting = os.environ.get(VARIABLE, "")
    if setting == "off" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    path = Path(setting) if setting else _cache() / "calibration.json"
    kept = _read(path)
    here = kept.setdefault(machine(), {})
    if name not in here:
        here[name] = {way: asdict(rate) for way, rate in measure(dtype).items()}
        _write(path, kept)
    return {way: Rate(**figures) for way, figures in here[name].items()}


def measure(dtype: torch.dtype) -> Rates:
    """Time the ways on made-up tensors."""
    heads, n = HEADS, LENGTH
    q, k, v = (torch.randn(1, heads, n, 64).to(dtype) for _ in range(3))
    near = Causal() & SlidingWindow(WINDOW)
    mask = near.dense(n, n)
    # a way, the call, the pairs that it visits
    works: dict[str, tuple[Callable[[Any, Any, Any], Any], float]] = {
        "sdpa causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads * n * n),
        "sdpa full": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), heads * n * n),
        "sdpa masked": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask[..., : q.shape[2], : q.shape[2]]), heads * n * n
        ),
        "reference": (lambda q, k, v: dense(q, k, v, near, engine="reference"), heads * n * n),
        "torch": (lambda q, k, v: block_sparse(q, k, v, near, engine="block_sparse:torch"), _visited(near)),
    }  # fmt: skip
    if native.missing() is None:
        works["native"] = (
            lambda q, k, v: block_sparse(q, k, v, Causal(), engine="block_sparse:native"), _visited(Causal())
        )  # fmt: skip
    found = {}
    with torch.no_grad():
        for way, (work, pairs) in works.items():
            start = _seconds(work, [x[:, :, :8] for x in (q, k, v)], 5)
            whole = _seconds(work, [q, k, v], 2)
            found[way] = Rate(round(start * 1e6, 2), round(max(whole - start, 1e-9) * 1e12 / pairs, 4))
    return found


def _visited(pattern: Any) -> float:
    return HEADS * pattern.layout(LENGTH, LENGTH).visited * 64.0 * 64.0


def _seconds(work: Callable[..., Any], tensors: list[Tensor], repeats: int) -> float:
    work(*tensors)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work(*tensors)
        best = min(best, time.perf_counter() - start)
    return best


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, figures: dict[str, Any]) -> None:
    # a cache that cannot be written is measured again next time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError:
        return


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
