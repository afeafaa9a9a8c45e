"""In which dtype the engines accumulate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision and float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off on a device, if it is on."""
    # torch knows no autocast for meta tensors
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
