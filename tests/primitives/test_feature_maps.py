from __future__ import annotations

import pytest
import torch

from regard.primitives.feature_maps import elu1, relu, silu, taylor2
from tests.oracles import normal

MAPS = {"elu1": elu1, "relu": relu, "silu": silu, "taylor2": taylor2}


def unpacked_taylor(x):
    d = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2**0.5 * d**0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x / d**0.25, outer), -1)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("d", [1, 4, 16])
def test_a_map_makes_as_many_features_as_it_says(name, d):
    (x,) = normal((5, d))
    features = MAPS[name](x)
    assert features.shape == (5, MAPS[name].size(d))
    assert features.dtype == x.dtype
    if MAPS[name].non_negative:
        assert (features >= 0).all()


def test_elu1_is_positive_and_continues_the_exponential():
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(elu1(x), torch.stack((x[0].exp(), x[1] + 1, x[2] + 1)))


@pytest.mark.parametrize("d", [1, 3, 8, 16])
def test_taylor_features_have_the_second_order_kernel(d):
    q, k = normal((9, d), (9, d))
    a = q @ k.T / d**0.5
    torch.testing.assert_close(taylor2(q) @ taylor2(k).T, 1 + a + a**2 / 2)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_packed_features_have_the_kernel_of_the_full_ones(d):
    q, k = normal((9, d), (9, d))
    torch.testing.assert_close(taylor2(q) @ taylor2(k).T, unpacked_taylor(q) @ unpacked_taylor(k).T)


def test_the_packed_size_for_sixteen_is_153():
    assert taylor2.size(16) == 153
    assert unpacked_taylor(torch.zeros(1, 16)).shape[-1] == 273


def test_the_taylor_kernel_is_at_least_one_half():
    q, k = (2 * x for x in normal((200, 4), (200, 4)))
    assert (q @ k.T / 2).min() < -5, "some a must be past the minimum at -1 and far from it"
    assert (taylor2(q) @ taylor2(k).T).min() >= 0.5 - 1e-9
