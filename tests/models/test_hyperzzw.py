from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import GroupStandardisation, OptionError, ShapeError, Terminator, slow_neural_loss
from tests.oracles import normal


def small(**options):
    torch.manual_seed(0)
    settings = {"channels": 1, "dims": (12, 12, 24), "kernels": (3, 3, 3, 3), "hidden": 4, **options}
    return Terminator(6, 5, **settings).double()


def test_groups_are_standardised_over_the_batch_and_over_each_map_in_turn():
    norm = GroupStandardisation(24).double()
    (x,) = normal((4, 5, 5, 24))
    out = norm(3 * x + 7)
    torch.testing.assert_close(out.mean((0, 1, 2)), torch.zeros(24).double(), atol=1e-12, rtol=0)
    maps = out.mean((1, 2)).abs().amax(0).unflatten(0, (12, 2))
    assert (maps[1::2] < 1e-12).all()
    assert (maps[0::2] > 1e-3).all(), "standardised over the batch, not in each map"
    torch.testing.assert_close(out.var((0, 1, 2), unbiased=False), torch.ones(24).double(), rtol=1e-4, atol=0)
    assert not list(norm.parameters())


def test_in_evaluation_a_row_does_not_depend_on_its_neighbours():
    norm = GroupStandardisation(12).double()
    (x,) = normal((8, 5, 5, 12))
    assert (norm(x)[:1] - norm(x[:1])).abs().max() > 1e-3
    norm.eval()
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))
    model = small().eval()
    (images,) = normal((3, 1, 6, 6))
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


def test_equal_kernels_have_no_slow_loss():
    first, second = normal((1, 3, 4, 4), (1, 6, 4, 4))
    assert slow_neural_loss(first, torch.cat((first, first), 1)) == 0
    want = ((second[:, :3] - first).square().mean() + (second[:, 3:] - first).square().mean()) / 2
    torch.testing.assert_close(slow_neural_loss(first, second), want)
    with pytest.raises(ShapeError, match="a multiple of its channels"):
        slow_neural_loss(first, second[:, :5])


def test_the_slow_loss_of_consecutive_blocks_is_handed_to_the_collector():
    model, (images,) = small(dims=(12, 12, 24, 24)), normal((2, 1, 6, 6))
    with regard.collect_losses() as losses:
        model(images)
    (loss,) = losses["slow_neural"]
    kernels = [block.mixer.slow() for block in model.blocks]
    want = (F.mse_loss(kernels[0], kernels[1]) + F.mse_loss(kernels[1].repeat(1, 2, 1, 1), kernels[2])) / 2
    torch.testing.assert_close(loss, want)
    with regard.collect_losses() as losses:
        small(dims=(12, 12))(images)
    assert not losses


def test_blocks_read_the_two_maps_before_their_input():
    model = small(dims=(12, 12, 24, 24))
    assert [b.mixer.bottleneck.in_features for b in model.blocks] == [120, 120 + 12, 240 + 24]


def test_batch_mean_is_handed_to_the_local_branches():
    (images,) = normal((3, 1, 6, 6))
    shared = small(batch_mean=True).eval()
    assert (shared(images)[1:2] - shared(images[1:2])).abs().max() > 1e-9


def test_bad_settings_are_refused():
    for dims, text in (((12,), "one a block"), ((12, 30), "multiple of the one before")):
        with pytest.raises(OptionError, match=text):
            small(dims=dims)
    with pytest.raises(OptionError, match="20 channels do not divide into 12 groups"):
        small(dims=(10, 20))
    with pytest.raises(ShapeError, match=r"\(B, 1, 6, 6\)"):
        small()(torch.zeros(2, 1, 6, 7).double())


@pytest.mark.slow
def test_terminator_learns_digits(record):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    torch.manual_seed(0)
    model = Terminator(8, 10, channels=1, dims=(24, 24, 24), kernels=(3, 3, 5, 5))
    parameters = sum(p.numel() for p in model.parameters())
    # no weight decay: it would turn every phase of the slow nets by radians at each step
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(14):
        for rows in train[torch.randperm(len(train))].split(64):
            with regard.collect_losses() as losses:
                loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimiser.zero_grad()
            (loss + 0.1 * losses["slow_neural"][0]).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(-1) == labels[test]).float().mean().item()
    record({"test_accuracy": accuracy, "parameters": parameters, "epochs": 14})
    assert parameters < 300_000
    assert accuracy > 0.95
