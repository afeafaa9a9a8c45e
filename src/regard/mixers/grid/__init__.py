"""Systems that mix the places of a grid: (B, H, W, C) to (B, H, W, C).

Look at: `neighborhood.py`.
"""
