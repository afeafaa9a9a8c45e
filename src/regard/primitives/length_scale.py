"""Score factors that grow with the number of visible keys."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def log_scale(counts: Tensor, kind: Literal["log_n", "log_d_log_n"] = "log_n", *, d: int = 0) -> Tensor:
    """ln n ("log_n") or ln d ln n ("log_d_log_n"), n = counts clamped to at least 1; float64, shape of counts."""
    log_n = torch.log(counts.clamp(min=1).to(torch.float64))
    return log_n * math.log(d) if kind == "log_d_log_n" else log_n
