"""Made-up result lines in the schema of `regard.bench.results`, seeded, with the shapes that real ones have."""

from __future__ import annotations

from typing import Any

import numpy as np

SYSTEMS = ("softmax", "sliding_window", "linear", "sigmoid", "lightning", "based", "aaren", "sqa")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

# slug -> title, bits per byte, recall, training tokens/s, state in bytes a token, state in bytes, prefill exponent
_FACTS: dict[str, tuple[str, float, float, float, float, float, float]] = {
    "softmax": ("Softmax attention", 1.872, 0.996, 21_400, 4096, 0, 1.9),
    "sliding_window": ("Sliding-window attention", 1.898, 0.071, 23_900, 0, 524_288, 1.05),
    "linear": ("Linear attention (elu + 1)", 1.991, 0.742, 22_700, 0, 69_632, 1.0),
    "sigmoid": ("Sigmoid self-attention", 1.879, 0.991, 18_100, 4096, 0, 1.9),
    "lightning": ("Lightning attention", 1.921, 0.633, 24_600, 0, 65_536, 1.0),
    "based": ("Based: linear attention with a Taylor map", 1.889, 0.987, 15_300, 0, 393_216, 1.0),
    "aaren": ("Attention as a recurrent network", 2.084, 0.112, 17_800, 0, 4352, 1.0),
    "sqa": ("Sparse query attention", 1.880, 0.993, 23_300, 2048, 0, 1.85),
}
_COMMON = {"regard": "0.1.0", "torch": "2.13.0+cpu", "hardware": "Example CPU, 2 threads"}


def made_results(
    systems: tuple[str, ...] = SYSTEMS,
    tasks: tuple[str, ...] = ("text", "recall"),
    seeds: int = 2,
    lengths: tuple[int, ...] = LENGTHS,
    diverged: tuple[tuple[str, str], ...] = (),
    quick: bool = False,
    settled: bool = True,
) -> list[dict[str, Any]]:
    """Lines of a whole run. diverged: (task, slug) pairs that end without a value. settled: lr search over."""
    dice = np.random.default_rng(7)
    lines: list[dict[str, Any]] = [_run(systems, tasks, seeds, quick), _machine()]
    for task in tasks:
        for slug in systems:
            for lr, seed in [(0.003, s) for s in range(seeds)] + [(0.01, 0)]:
                line = _train(task, slug, seed, lr, dice, (task, slug) in diverged)
                lines.append({**line, "best": lr == 0.003} if settled else {**line, "kind": "trial"})
    lines.extend(_speed(slug, length, dice) for slug in systems for length in lengths)
    return lines


def _run(systems: tuple[str, ...], tasks: tuple[str, ...], seeds: int, quick: bool) -> dict[str, Any]:
    about = {
        slug: {
            "title": _FACTS[slug][0],
            "paper": "",
            "mixer": slug,
            "options": {"window": 256} if slug == "sliding_window" else {},
            "parameters": 1_181_000 + 512 * index,
        }
        for index, slug in enumerate(systems)
    }
    settings = {
        "paths": [],
        "tasks": list(tasks),
        "length": 2048,
        "width": 128,
        "depth": 4,
        "seeds": seeds,
        "lrs": [0.003, 0.01],
        "lengths": list(LENGTHS),
        "quick": quick,
    }
    data = (
        "source text of the Python 3.12 standard library, /usr/lib/python3.12: 1,692 files, 29.8 MB, "
        "split by file 90/5/5, BPE of 4,096 pieces"
    )
    return {
        "kind": "run",
        "key": "run",
        "settings": settings,
        "data": data,
        "systems": about,
        "matched": "4 layers of width 128 for every system; the feed-forward width was moved until parameters "
        "agreed within 0.4 %",
    }


def _machine() -> dict[str, Any]:
    return {
        "kind": "machine",
        "key": "machine",
        "cpu": "Example CPU @ 2.60GHz",
        "cores": 2,
        "threads": 2,
        "memory_gib": 15.6,
        "gemm_gflops": 142.31,
        "copy_gb_s": 9.42,
        "read_gb_s": 14.8,
        "allocator": "glibc malloc",
        "python": "3.12.3",
        "torch": "2.13.0+cpu",
        "os": "Linux 6.8",
    }


def _train(task: str, slug: str, seed: int, lr: float, dice: np.random.Generator, diverged: bool) -> dict[str, Any]:
    _, bits, recall, rate, *_ = _FACTS[slug]
    steps, tokens, length = (1000, 4_096_000, 2048) if task == "text" else (1000, 4_096_000, 64)
    seen = np.linspace(tokens / 40, tokens, 40)
    part = seen / tokens
    if task == "text":
        end = bits + dice.normal(0, 0.004) + (0.03 if lr == 0.01 else 0)
        value = end + 2.6 * (np.exp(-9 * part) - np.exp(-9)) + 0.25 * (1 - part) + dice.normal(0, 0.006, 40)
    else:
        end = float(np.clip(recall + dice.normal(0, 0.012), 0, 1))
        middle = 0.2 + 0.25 * (1 - recall) + dice.uniform(0, 0.06)
        rise = 1 / (1 + np.exp(-(part - middle) * 24))
        value = np.clip(0.008 + (end - 0.008) * rise / rise[-1] + dice.normal(0, 0.004, 40), 0, 1)
    value[-1] = end
    kept = 9 if diverged else 40
    curve = [
        [int(t), round(float(t) / rate, 2), round(float(v), 4)] for t, v in zip(seen[:kept], value[:kept], strict=True)
    ]
    return {
        "kind": "train",
        "key": f"train {task} {slug} seed={seed} lr={lr}",
        "system": slug,
        **_COMMON,
        "task": task,
        "task_version": "1",
        "metric": "bits_per_byte" if task == "text" else "accuracy",
        "seed": seed,
        "lr": lr,
        "engine": "dense:sdpa" if slug in ("softmax", "sqa") else "scan:torch",
        "parameters": 1_181_000,
        "length": length,
        "steps": steps,
        "tokens": curve[-1][0],
        "seconds": curve[-1][1],
        "value": None if diverged else curve[-1][2],
        "chance": None if task == "text" else 0.008,
        "curve": curve,
        "stopped": "diverged" if diverged else "steps",
    }


def _speed(slug: str, length: int, dice: np.random.Generator) -> dict[str, Any]:
    _, _, _, rate, growing, fixed, exponent = _FACTS[slug]
    state = int(growing * length + fixed)
    seconds = length / (2.8 * rate) + (length / 16384) ** exponent * (4.0 if exponent > 1.5 else 0.4)
    return {
        "kind": "speed",
        "key": f"speed {slug} {length}",
        "system": slug,
        **_COMMON,
        "length": length,
        "train_tokens_per_s": rate * dice.uniform(0.98, 1.02) if length == 2048 else None,
        "prefill_tokens_per_s": length / seconds * dice.uniform(0.98, 1.02),
        "decode_ms": (0.9 + state / 1.5e7 + 0.1 * dice.uniform()) * (1.2 if slug == "based" else 1.0),
        "state_bytes": state,
        "peak_mib": 160 + length * 0.02 + (length / 1024) ** 2 * (0.9 if exponent > 1.5 else 0.0) + state / 2**20,
        "reason": None,
    }
