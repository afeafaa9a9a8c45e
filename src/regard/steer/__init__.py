"""Interventions on pretrained models: cheaper or better without training, and gone when the block ends.

Belongs here: frozen dataclasses with a card, written against the site names of `contract/attach`; a folder for each site:
`cache/ scores/ heads/ tokens/ decoding/ diffusion/`. Does not: readings that change nothing (explain), training (train).
Look at: `cache/snapkv.py`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from regard.contract.attach import Session, steer


class _Room(ModuleType):
    """`regard.steer` is the room and, as users know it, the function: importing the one must not hide the other."""

    def __call__(self, model: Any, *interventions: Any) -> Session:
        return steer(model, *interventions)


sys.modules[__name__].__class__ = _Room
