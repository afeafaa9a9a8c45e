from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import BiFormer, BiFormerSettings, OptionError, ShapeError
from tests.oracles import normal

PAPER = {"biformer_tiny": 13.1, "biformer_small": 25.5, "biformer_base": 56.8}
TINY = BiFormerSettings(dims=(8, 16, 16), depths=(1, 1, 1), topk=(1, 3, -2), regions=2, head_dim=4, classes=5)


@pytest.mark.parametrize("name", PAPER)
def test_published_sizes_have_the_published_parameters(name):
    with torch.device("meta"):
        model = regard.build(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PAPER[name], rel=0.01)


def test_heads_and_choices_are_those_of_the_released_networks():
    with torch.device("meta"):
        model = regard.build("biformer_base")
    mixers = [stage.blocks[0].mixer for stage in model.stages]
    assert [m.heads for m in mixers] == [3, 6, 12, 8]
    assert [m.topk for m in mixers] == [1, 4, 16, None]
    assert [m.qkv.bias is None for m in mixers] == [False, False, False, True]
    assert [m.scale for m in mixers] == [96**-0.5, 192**-0.5, 384**-0.5, 96**-0.5]
    assert model.stages[0].blocks[0].norm1.eps == 1e-6 and model.norm.eps == 1e-5


def test_tiny_reads_an_image_with_64_keys_a_query():
    model = regard.build("biformer_tiny").eval()
    seen = []
    for stage in model.stages[:3]:
        mixer = stage.blocks[0].mixer
        mixer.register_forward_hook(lambda m, x, y: seen.append(m.topk * x[0].shape[1] * x[0].shape[2] // 49))
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 1000) and logits.isfinite().all()
    assert seen == [64, 64, 64]


def test_a_block_is_positions_attention_and_feed_forward():
    block = BiFormer(TINY).double().eval().stages[1].blocks[0]
    (x,) = normal((2, 4, 6, 16))
    conv = block.cpe1.conv
    y = x + F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=16).permute(0, 2, 3, 1)
    y = y + block.mixer(F.layer_norm(y, (16,), block.norm1.weight, block.norm1.bias, 1e-6))
    hidden = F.gelu(block.mlp.fc1(F.layer_norm(y, (16,), block.norm2.weight, block.norm2.bias, 1e-6)))
    torch.testing.assert_close(block(x), y + block.mlp.fc2(hidden))
    assert hidden.shape[-1] == 48


def test_topk_of_minus_one_is_attention_to_all_without_the_convolution():
    model = BiFormer(replace(TINY, topk=(1, -1, -2)))
    assert [s.blocks[0].mixer.lce is None for s in model.stages] == [False, True, False]


@pytest.mark.parametrize("pad", ["mask", "legacy", None])
def test_images_that_do_not_divide_are_padded_or_refused(pad):
    model = BiFormer(replace(TINY, regions=3, pad=pad)).eval()
    image = torch.randn(1, 3, 40, 56)
    if pad is None:
        with pytest.raises(ShapeError, match="10x14 does not divide into 3x3 regions"):
            model(image)
    else:
        assert [tuple(f.shape[2:]) for f in model.features(image)] == [(10, 14), (5, 7), (3, 4)]


def test_bad_settings_are_refused():
    with pytest.raises(OptionError, match="one entry a stage"):
        BiFormer(replace(TINY, topk=(1, 2)))
    with pytest.raises(OptionError, match="a number of regions, -1 or -2"):
        BiFormer(replace(TINY, topk=(0, 2, -2)))
    with pytest.raises(OptionError, match="1 to 4 can be chosen"):
        BiFormer(replace(TINY, topk=(5, 2, -2)))


@pytest.mark.slow
def test_biformer_learns_digits(record):
    from tests.models.test_dinat import train

    settings = BiFormerSettings(
        dims=(32, 64), depths=(2, 2), topk=(2, -2), regions=2, head_dim=16, classes=10, channels=1
    )
    torch.manual_seed(0)
    accuracy = train(BiFormer(settings), epochs=8)
    record({"test_accuracy": accuracy, "epochs": 8, "regions": 2})
    assert accuracy >= 0.95
