"""Which pairs of positions may meet.

Belongs here: patterns as pure values, their algebra, their lowerings to masks and layouts, routers' selections.
Does not: soft masks, distances and tables (those are biases), anything with weights.
Look at: `atoms.py` for the atoms, `algebra.py` for what is common to all patterns.
"""

from regard.patterns.algebra import Bound, Pattern
from regard.patterns.atoms import Causal, Documents, Explicit, Full, KeyValid, Prefix, Sinks, SlidingWindow

__all__ = [
    "Bound",
    "Causal",
    "Documents",
    "Explicit",
    "Full",
    "KeyValid",
    "Pattern",
    "Prefix",
    "Sinks",
    "SlidingWindow",
]
