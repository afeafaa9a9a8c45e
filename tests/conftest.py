"""What all tests share: one thread, and result files for experiments that prove behaviour."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regard._version import __version__
from regard.bench.machine import hardware
from regard.bench.results import write_atomically

# the choice of an engine must not hang on how busy the machine is
os.environ["REGARD_CALIBRATION"] = "off"
# two processes share two cores; and one thread gives the same numbers on every machine with as many cores
torch.set_num_threads(1)

RESULTS = Path(__file__).resolve().parents[1] / "results"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def record(request) -> Callable[[dict[str, Any]], None]:
    """Write the figures of a slow experiment to results/<test>.json, with what is needed to repeat it."""

    def write(figures: dict[str, Any]) -> None:
        test = request.node.nodeid.partition("tests/")[2] or request.node.nodeid
        facts = {
            "command": f"python -m pytest -m slow {shlex.quote('tests/' + test)}",
            "seed": 0,
            "regard": __version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "hardware": hardware(),
            "threads": torch.get_num_threads(),
            "figures": figures,
        }
        RESULTS.mkdir(exist_ok=True)
        name = request.node.name.removeprefix("test_")
        write_atomically(RESULTS / f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())

    return write
