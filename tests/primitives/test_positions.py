from __future__ import annotations

import math

import pytest
import torch

from regard import OptionError
from regard.primitives.positions import alibi_slopes, rope, sinusoid
from tests.oracles import normal


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dims", [None, 4, 0])
def test_rotary_scores_depend_on_the_distance_only(layout, dims):
    q, k = normal((1, 1, 1, 8), (1, 1, 1, 8))
    scores = {}
    for i in range(0, 40, 5):
        for j in range(0, 40, 5):
            turned = [rope(x, torch.tensor([p]), dims=dims, layout=layout) for x, p in ((q, i), (k, j))]
            scores.setdefault(i - j, []).append((turned[0] * turned[1]).sum().item())
    assert all(max(s) - min(s) < 1e-12 for s in scores.values())
    assert (len({round(s[0], 6) for s in scores.values()}) > 1) == (dims != 0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_keeps_lengths_and_leaves_position_zero(layout):
    (x,) = normal((2, 3, 7, 8))
    turned = rope(x, torch.arange(7), layout=layout)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_is_a_product_of_complex_numbers(layout):
    (x,) = normal((5, 6))
    pairs = x.view(5, 2, 3).transpose(1, 2) if layout == "half" else x.view(5, 3, 2)
    rates = 100.0 ** -(torch.arange(3, dtype=torch.float64) / 3)
    turn = torch.polar(torch.ones(5, 3, dtype=torch.float64), torch.arange(5)[:, None] * rates)
    want = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    want = want.transpose(1, 2).reshape(5, 6) if layout == "half" else want.reshape(5, 6)
    torch.testing.assert_close(rope(x, torch.arange(5), base=100.0, layout=layout), want)


def test_only_the_first_dims_are_rotated():
    (x,) = normal((5, 8))
    turned = rope(x, torch.arange(5), dims=4)
    assert torch.equal(turned[:, 4:], x[:, 4:])
    assert torch.equal(turned[:, :4], rope(x[:, :4], torch.arange(5)))


def test_positions_may_differ_by_row():
    (x,) = normal((2, 1, 3, 4))
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])[:, None]
    assert torch.equal(rope(x, positions)[1], rope(x[1], positions[1, 0]))


def test_angles_are_not_rounded_to_half_precision():
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    turned = rope(x, torch.tensor([1001])).float()
    torch.testing.assert_close(
        turned, torch.tensor([[math.cos(1001) - math.sin(1001), math.cos(1001) + math.sin(1001)]]), atol=2e-2, rtol=0
    )


@pytest.mark.parametrize("dims", [3, 10, -2])
def test_odd_or_too_many_rotary_channels_are_refused(dims):
    with pytest.raises(OptionError, match="even number of channels up to 8"):
        rope(torch.zeros(4, 8), torch.arange(4), dims=dims)


def test_sinusoids_are_sines_then_cosines():
    table = sinusoid(torch.arange(6), 4)
    for p in range(6):
        want = [math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)]
        torch.testing.assert_close(table[p], torch.tensor(want))
    with pytest.raises(OptionError, match="even width"):
        sinusoid(torch.arange(6), 3)


def test_eight_heads_have_the_slopes_from_a_half_to_a_256th():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def test_other_head_counts_interleave_the_next_power_of_two():
    slopes = alibi_slopes(6)
    torch.testing.assert_close(slopes[:4], alibi_slopes(4))
    torch.testing.assert_close(slopes[4:], alibi_slopes(8)[::2][:2])
    assert alibi_slopes(1).tolist() == [2.0**-8]
    with pytest.raises(OptionError, match="at least one head"):
        alibi_slopes(0)
