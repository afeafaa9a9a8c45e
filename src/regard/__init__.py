"""Every attention mechanism in one place: build with them, put them into pretrained models, see, measure.

Everything is reached by name: `regard.attend`, `regard.get("sigmoid")`, `regard.mixer("based", dim=512, heads=8)`,
`from regard import Causal, sigmoid_attention`. Importing this package imports neither torch nor any optional library.
"""

from __future__ import annotations

import importlib
from typing import Any

from regard._doors import DOORS
from regard._version import __version__

__all__ = ["__version__", *DOORS]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    if name in DOORS:
        value = getattr(importlib.import_module(DOORS[name]), name)
    else:
        from regard.contract.catalogue import public_names
        from regard.contract.errors import near

        names = public_names()
        if name not in names:
            raise AttributeError(f"module 'regard' has no attribute {name!r}{near(name, [*names, *DOORS])}")
        value = names[name].exports()[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from regard.contract.catalogue import public_names

    return sorted({*globals(), *DOORS, *public_names()})
