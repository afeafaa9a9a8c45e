"""Systems with weights that map tokens to tokens.

Belongs here: one file per mixer: docstring, `CARD`, one module on top of a layer. `tokens/` for (B, N, C),
`grid/` for (B, H, W, C). Pools, tokens to one vector, stand in `tokens/` with a `PoolCard`.
Does not: whole networks (models), parts without a name of their own (layers).
Look at: `tokens/selective_temperature.py` on the attention layer, `tokens/lightning.py` on the scan.
"""
