"""The public contract battery: what a card claims is tried out, what it does not claim must be refused.

Belongs here: one file of checks per kind of card (ops, mixers, training), the runner, the tolerances, what is tried on.
Does not: facts of one system (tests/<room>/), a check without a culprit in tests/culprits/.
Look at: `battery.py` for what a check is, `ops.py` for checks; `regard check FILE` runs them on anyone's file.
"""
