"""What every system promises, and how it is found.

Belongs here: the card, the catalogue, shape specs, error classes, engine dispatch, the collector, optional imports.
Does not: anything that computes attention; anything that imports torch when this package is imported.
Look at: `card.py` for the claims a system makes, `operator.py` for how an op is wrapped.
"""
