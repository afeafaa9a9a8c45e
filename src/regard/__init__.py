"""Every attention mechanism in one place: build with them, put them into pretrained models, see, measure.

Everything is reached by name: `regard.attend`, `regard.get("sigmoid")`, `regard.mixer("based", dim=512, heads=8)`,
`from regard import Causal, sigmoid_attention`. Importing this package imports neither torch nor any optional library.
"""

from __future__ import annotations

import importlib
from typing import Any

from regard._version import __version__

# name -> the module that defines it; what a card exports is added by the catalogue
_DOORS = {
    "attend": "regard.ops.attend",
    "get": "regard.contract.names",
    "op": "regard.contract.names",
    "mixer": "regard.contract.names",
    "model": "regard.contract.names",
    "task": "regard.contract.names",
    "why": "regard.contract.dispatch",
    "check": "regard.checks.battery",
    **dict.fromkeys(("SequenceModel", "SequenceSettings"), "regard.models.sequence.shell"),
    "collect_losses": "regard.contract.collect",
    "add_loss": "regard.contract.collect",
    **dict.fromkeys(
        ("Causal", "Documents", "Explicit", "Full", "KeyValid", "Pattern", "Prefix", "Sinks", "SlidingWindow"),
        "regard.patterns",
    ),
    **dict.fromkeys(
        ("Softmax", "Sigmoid", "L1", "ReLUOverN", "Linear", "Sharpen"), "regard.primitives.normalisers"
    ),
    "merge": "regard.primitives.merge",
    **dict.fromkeys(
        ("RegardError", "ShapeError", "OptionError", "Unsupported", "MissingExtra", "UnknownName"),
        "regard.contract.errors",
    ),
}

__all__ = ["__version__", *_DOORS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    if name in _DOORS:
        value = getattr(importlib.import_module(_DOORS[name]), name)
    else:
        from regard.contract.catalogue import public_names
        from regard.contract.errors import near

        names = public_names()
        if name not in names:
            raise AttributeError(f"module 'regard' has no attribute {name!r}{near(name, [*names, *_DOORS])}")
        value = names[name].exports()[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from regard.contract.catalogue import public_names

    return sorted({*globals(), *_DOORS, *public_names()})
