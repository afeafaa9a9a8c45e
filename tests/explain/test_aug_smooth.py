"""Maps averaged over changed images, against each made by hand."""

from functools import partial

import pytest
import torch
from torch import nn

from regard import OptionError, ShapeError, aug_smooth, gradcam, normgrad


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def images():
    return torch.randn(3, 3, 8, 11, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", [partial(normgrad, layer="1"), partial(gradcam, layer="3")])
def test_it_is_the_mean_of_each_by_hand(method):
    model, x, target = network(), images(), torch.tensor([4, 0, 2])
    wanted = torch.zeros_like(method(model, x, target))
    for factor in (0.9, 1.0, 1.1):
        wanted += method(model, factor * x, target) / 6
        wanted += method(model, factor * x.flip(-1), target).flip(-1) / 6
    torch.testing.assert_close(aug_smooth(method, model, x, target), wanted)
    assert not torch.allclose(wanted, method(model, x, target), rtol=1e-2)
    plain = aug_smooth(method, model, x, target, factors=(1.0,), mirror=False)
    assert torch.equal(plain, method(model, x, target))


def test_a_mirrored_image_has_a_mirrored_map():
    model, x = network(), images()
    method = partial(normgrad, layer="1")
    one, other = (aug_smooth(method, model, given, 1) for given in (x, x.flip(-1)))
    torch.testing.assert_close(other, one.flip(-1))
    assert not torch.allclose(method(model, x.flip(-1), 1), method(model, x, 1).flip(-1))


def test_the_class_is_that_of_the_image_as_it_is():
    model, x = network(), images()
    asked = []

    def method(model, x, target):
        asked.append(target)
        return torch.ones(3, 1, 2, 2)

    aug_smooth(method, model, x)
    assert len(asked) == 6 and all(torch.equal(target, model(x).argmax(-1)) for target in asked)


def test_what_cannot_be_is_refused():
    model, x = network(), images()
    method = partial(normgrad, layer="1")
    with pytest.raises(OptionError, match="at least one"):
        aug_smooth(method, model, x, 1, factors=())
    with pytest.raises(ShapeError, match="images are"):
        aug_smooth(method, model, x[0], 1)
    with pytest.raises(ShapeError, match=r"gives \(3, 3, 8, 11\); \(3, 1, h, w\)"):
        aug_smooth(lambda model, x, target: x, model, x, 1)
