from __future__ import annotations

import pytest
import torch

from regard import OptionError, ShapeError
from regard.layers.patches import PatchEmbed, PositionTable, resize_table
from tests.oracles import normal


def test_every_patch_goes_through_one_linear_map():
    embed = PatchEmbed(5, 2).double()
    (images,) = normal((2, 3, 4, 6))
    out = embed(images)
    assert out.shape == (2, 2, 3, 5)
    flat = embed.proj.weight.flatten(1)
    for y in range(2):
        for x in range(3):
            patch = images[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten(1)
            torch.testing.assert_close(out[:, y, x], patch @ flat.T + embed.proj.bias)


def test_a_table_is_added_as_it_is_or_resized():
    table = PositionTable(4, (6, 8)).double()
    (x,) = normal((2, 6, 8, 4))
    torch.testing.assert_close(table(x), x + table.table)
    assert table(x[:, :3, :4]).shape == (2, 3, 4, 4)
    # a bicubic resize keeps what is linear in the place, away from the border
    ramp = torch.arange(12.0).double()[:, None, None].expand(12, 12, 1)
    small = resize_table(ramp, (6, 6))
    torch.testing.assert_close(small[1:-1, 0, 0], torch.arange(6).double()[1:-1] * 2 + 0.5)
    assert resize_table(table.table, (6, 8)) is table.table


def test_the_gradient_of_a_resized_table_reaches_all_of_it():
    table = PositionTable(2, (4, 4)).double()
    table(torch.zeros(1, 6, 6, 2).double()).sum().backward()
    assert (table.table.grad != 0).all()


def test_images_that_do_not_fit_are_refused():
    embed = PatchEmbed(5, 4)
    with pytest.raises(ShapeError, match="8x10 pixels does not divide into patches of 4"):
        embed(torch.randn(1, 3, 8, 10))
    with pytest.raises(ShapeError, match=r"\(B, 3, Y, X\)"):
        embed(torch.randn(1, 8, 8, 3))
    with pytest.raises(OptionError, match="at least 1 pixel"):
        PatchEmbed(5, 0)
