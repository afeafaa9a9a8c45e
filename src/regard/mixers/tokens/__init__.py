"""Mixers of sequences: (B, N, C) -> (B, N, C).

Ops that decode from keys and values need no file here: `regard.mixer("softmax", dim, heads)` wraps them.
"""
