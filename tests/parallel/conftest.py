"""The outcomes of the worlds, shared by all tests and by all processes of pytest."""

import os
from functools import lru_cache

import pytest

from tests.parallel.worlds import outcomes_of


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "worlds"
    folder.mkdir(exist_ok=True)
    return lru_cache(lambda size: outcomes_of(size, folder))
