"""Readings of a model: what its parts do and how much they matter. Nothing is changed.

Belongs here: analyses of recorded queries, keys, values, weights and gradients, returned as plain data.
Does not: interventions (steer), training on what was read (train), figures of the weights alone (engines/readout).
Look at: `heads/moa.py`, which measures what each pair of blocks is worth and plans windows from it.
"""
