"""Optional libraries: imported at first use, asked for by name."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from regard.contract.errors import MissingExtra


def need(module: str, extra: str) -> ModuleType:
    """Import an optional library, or raise MissingExtra naming the extra of regard that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(f"this needs {package!r}, which is not installed: pip install 'regard[{extra}]'") from error


def installed(module: str) -> bool:
    """Whether a library could be imported, without importing it."""
    return importlib.util.find_spec(module) is not None
