"""Mixers stacked into networks.

Belongs here: one file per network: settings, `SIZES` (a row per published variant, with its source), one module.
Does not: a mechanism (ops, mixers), training (train).
Look at: `sequence/shell.py`, the frame that sequence models are rows of.
"""
