"""Pure functions and frozen values without weights.

Belongs here: positions, feature maps, normalisers, the softmax merge, the state base class, losses on tensors.
Does not: weights (layers), a whole mechanism (ops), anything that picks an engine.
Look at: `normalisers.py` for a family of values, `merge.py` for a function.
"""
