"""Fast ways to compute what ops and mixers define.

Belongs here: one module per algorithm (dense, scan, …), each with its plain reference and `IMPLEMENTATIONS`.
Does not: a mechanism of its own (ops), weights (layers).
Look at: `dense.py`; `contract/dispatch.py` says how an implementation is chosen.
"""
