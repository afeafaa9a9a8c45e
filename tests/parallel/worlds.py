"""Worlds of processes on one machine: gloo, a file for the rendezvous, one thread each.

A world runs every function `check_*(rank, size)` of this folder's test files once, in one order, and the tests ask for
the outcomes: starting processes is what takes time.
"""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from regard.parallel import PeerLost

SIZES = (1, 2, 3, 4)
TIMEOUT_S = 60
HERE = Path(__file__).parent


def checks_of(module: str) -> list[str]:
    """The names of the checks of a test file, in the order of their definition."""
    return [
        n for n, f in vars(importlib.import_module(module)).items() if n.startswith("check_") and f.__module__ == module
    ]


def every_check() -> list[tuple[str, str]]:
    modules = [f"tests.parallel.{path.stem}" for path in sorted(HERE.glob("test_*.py"))]
    return [(module, name) for module in modules for name in checks_of(module)]


def facts(module: str) -> Any:
    """The test of a file: every check of it in every world."""

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", checks_of(module))
    def test_fact(outcomes, size, name):
        failures = outcomes(size)[f"{module}.{name}"]
        assert not failures, "\n".join(failures)

    return test_fact


def start(size: int, folder: Path, work: Callable[..., None], *args: Any) -> list[int]:
    """Run work(rank, size, *args) in a world of its own; exit codes by rank. What still runs at the end is killed."""
    rendezvous = folder / f"rendezvous{size}"
    rendezvous.unlink(missing_ok=True)
    context = mp.get_context("spawn")
    processes = [context.Process(target=_enter, args=(rank, size, str(rendezvous), work, args)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 3 * TIMEOUT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _enter(rank: int, size: int, rendezvous: str, work: Callable[..., None], args: tuple) -> None:
    os.environ["REGARD_CALIBRATION"] = "off"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
    )
    work(rank, size, *args)
    # no goodbye: a world may have lost a process on purpose
    os._exit(0)


def run_checks(rank: int, size: int, folder: str) -> None:
    """Every check, until another process is lost; what failed is written to the folder."""
    found: dict[str, str | None] = {}
    for module, name in every_check():
        check = getattr(importlib.import_module(module), name)
        try:
            torch.manual_seed(0)
            check(rank, size)
            found[f"{module}.{name}"] = None
        except BaseException as error:
            found[f"{module}.{name}"] = traceback.format_exc()
            if isinstance(error, PeerLost):
                break
    (Path(folder) / f"{size}.{rank}.json").write_text(json.dumps(found))


def outcomes_of(size: int, folder: Path) -> dict[str, list[str]]:
    """check -> what the ranks have against it. One process of pytest runs the world, others wait for it."""
    done = folder / f"{size}.done"
    try:
        os.close(os.open(folder / f"{size}.lock", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + 4 * TIMEOUT_S
        while not done.exists():
            assert time.monotonic() < deadline, f"the process of pytest that runs the world of {size} is gone"
            time.sleep(0.1)
    else:
        codes = start(size, folder, run_checks, str(folder))
        done.write_text(json.dumps(codes))
    said: dict[str, list[str]] = {f"{module}.{name}": [] for module, name in every_check()}
    for rank in range(size):
        path = folder / f"{size}.{rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for name, failures in said.items():
            if name not in found:
                failures.append(f"rank {rank} did not get so far: {done.read_text()}")
            elif found[name] is not None:
                failures.append(f"rank {rank}: {found[name]}")
    return said
