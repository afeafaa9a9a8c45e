"""Systems that are a function of q, k, v, without weights.

Belongs here: one file per mechanism: docstring with the equation, `CARD`, one public function.
Does not: projections and positions (layers, mixers), fast code (engines).
Look at: `sigmoid.py` for a softmax-like op, `lightning.py` for one that runs on the scan.
"""
