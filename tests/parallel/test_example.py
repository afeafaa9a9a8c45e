"""The worked example: the same losses on one process and, through torchrun, on two and four."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "split_sequence.py"


def losses(processes: int, steps: int) -> list[float]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLE), "--steps", str(steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "REGARD_CALIBRATION": "off"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]


@pytest.mark.slow
def test_split_training_loses_what_one_process_loses(record):
    """As much, to ten digits."""
    alone = losses(1, 20)
    figures = {"one_process": alone}
    for processes in (2, 4):
        together = losses(processes, 20)
        assert len(together) == len(alone) == 20
        apart = max(abs(a - b) for a, b in zip(alone, together, strict=True))
        figures[f"farthest_of_{processes}_processes"] = apart
        assert apart < 1e-9
    record(figures)
    assert alone[-1] < alone[0]


def test_the_example_runs_on_one_process():
    assert len(losses(1, 2)) == 2
