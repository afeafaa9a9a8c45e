from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

import regard
from regard import HaloAttention, HaloNet, HaloNetSettings, OptionError, ShapeError
from regard.layers.conv_blocks import BatchNorm
from regard.models.vision.halonet import SIZES

# what timm 1.0.31 counts
TIMM = {"halonet_h1": 8_100_056, "halonet26t": 12_480_288, "halonet50ts": 22_733_280}


@pytest.mark.parametrize("name", TIMM)
def test_sizes_have_the_parameters_of_timm(name):
    with torch.device("meta"):
        model = regard.build(name)
    assert sum(p.numel() for p in model.parameters()) == TIMM[name]


def test_which_blocks_attend():
    with torch.device("meta"):
        found = {
            name: ["".join("h" if isinstance(b.mixer, HaloAttention) else "c" for b in s.blocks) for s in build.stages]
            for name in TIMM
            if (build := regard.build(name))
        }
    assert found == {
        "halonet_h1": ["hhh", "hhh", "h" * 10, "hhh"],
        "halonet26t": ["cc", "cc", "ch", "hh"],
        "halonet50ts": ["ccc", "ccch", "chchch", "chc"],
    }
    with torch.device("meta"):
        assert regard.build("halonet50ts").stages[1].blocks[3].mixer.heads == 4


@pytest.mark.parametrize("name", ["halonet_h1", "halonet26t"])
def test_one_image_goes_through(name):
    model = regard.build(name).eval()
    with torch.no_grad():
        image = torch.randn(1, 3, 256, 256)
        assert [f.shape[2] for f in model.features(image)] == [64, 32, 16, 8]
        logits = model(image)
    assert logits.shape == (1, 1000) and logits.isfinite().all()


def test_maps_must_divide_into_blocks():
    with pytest.raises(ShapeError, match=r"56x56.*choose block"):
        HaloNet(replace(SIZES["halonet_h1"], block=10, depths=(1, 1, 1, 1)))(torch.randn(1, 3, 224, 224))


def test_bad_settings_are_refused():
    for change, text in (
        ({"heads": (8,)}, "one entry a stage"),
        ({"stem": "3x3"}, "the stem is '3x3'"),
        ({"attention": ("all", "some", "all", "all")}, "none, odd, last, all"),
    ):
        with pytest.raises(OptionError, match=text):
            HaloNet(replace(SIZES["halonet_h1"], **change))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", TIMM)
def test_with_its_weights_the_network_is_that_of_timm(name):
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model(name).double().eval()
    with torch.no_grad():
        for m in theirs.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(std=0.1)
                m.running_mean.normal_(std=0.1)
                m.running_var.uniform_(0.5, 1.5)
        ours = regard.build(name).double().eval()
        ours.load_timm(theirs.state_dict())
        image = torch.randn(1, 3, 256, 256, dtype=torch.float64)
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-6, atol=1e-6)
    assert any(isinstance(m, BatchNorm) for m in ours.modules())


@pytest.mark.slow
def test_halonet_learns_digits(record):
    from tests.models.test_dinat import train

    settings = HaloNetSettings(
        dims=(32, 64), depths=(2, 2), heads=(2, 4), attention=("all", "all"), block=4, halo=1, stem_dim=32,
        border="mask", strided="pixels", classes=10, channels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    accuracy = train(HaloNet(settings), epochs=8)
    record({"test_accuracy": accuracy, "epochs": 8, "block": 4, "halo": 1})
    assert accuracy >= 0.95
