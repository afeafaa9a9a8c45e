"""How near two results must be: the one place.

All are relative: the largest difference over the largest magnitude of the expected result.
"""

from __future__ import annotations

import torch

# the same equation in another order of operations
SAME = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# its gradients, which add up over more terms
GRADIENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# a result in half precision against the float32 one of the same (rounded) inputs
HALF = {torch.float16: 6e-3, torch.bfloat16: 4e-2}
# a whole layer in half precision: its projections round as well
HALF_LAYER = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
# a derivative against finite differences in float64
SLOPE = 1e-5
# what counts as a change
CHANGE = 1e-4
# how far above chance a baseline that must fail may score: noise of a finite test
ABOVE_CHANCE = 0.01
