from __future__ import annotations

import math

import torch

from regard.primitives.length_scale import log_scale


def test_the_scale_is_natural_and_one_key_scales_to_zero():
    counts = torch.tensor([[0, 1, 2, 10]])
    assert log_scale(counts).dtype == torch.float64
    torch.testing.assert_close(log_scale(counts), torch.tensor([[0, 0, math.log(2), math.log(10)]]).double())
    torch.testing.assert_close(log_scale(counts, "log_d_log_n", d=64), log_scale(counts) * math.log(64))
