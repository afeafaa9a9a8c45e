from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import SOFT, OptionError, ShapeError, SOFTSettings
from tests.oracles import normal

# millions of parameters as published (the released code's small network is larger), and exactly those of that code
PUBLISHED = {"soft_tiny": 13, "soft_small": None, "soft_medium": 45, "soft_large": 64, "soft_huge": 87}
RELEASED = {
    "soft_tiny": 13_069_056,
    "soft_small": 38_858_462,
    "soft_medium": 45_812_707,
    "soft_large": 64_700_646,
    "soft_huge": 87_108_273,
}
TINY = SOFTSettings(
    image=(32, 48), dims=(8, 12, 16), depths=(1, 2, 1), heads=(2, 2, 4), ratios=(2, 1), convs=(5, 3), classes=5
)


def moved(settings=TINY):
    model = SOFT(settings).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_have_the_parameters_of_the_released_code(name):
    with torch.device("meta"):
        model = regard.build(name)
    count = sum(p.numel() for p in model.parameters())
    # one vector less: the class token holds its position
    assert count == RELEASED[name] - 512
    assert PUBLISHED[name] in (None, count // 10**6)


def test_stages_are_those_of_the_released_networks():
    with torch.device("meta"):
        model = regard.build("soft_huge")
    assert [len(stage.blocks) for stage in model.stages] == [1, 5, 49, 5]
    first = [stage.blocks[0] for stage in model.stages]
    assert [(b.mixer.ratio, b.mixer.local.kernel_size[0], b.mixer.heads) for b in first[:3]] == [
        (8, 9, 2),
        (4, 5, 4),
        (2, 3, 11),
    ]
    assert [b.post for b in first] == [True, True, True, False]
    assert [b.norm1.eps for b in first] == [1e-5, 1e-5, 1e-5, 1e-6] and model.norm.eps == 1e-6
    assert [b.mlp.fc1.out_features for b in first] == [256, 512, 1408, 2048]
    assert [b.mlp.act.approximate for b in first] == ["tanh", "tanh", "tanh", "none"]
    assert [tuple(stage.positions.table.shape[:2]) for stage in model.stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert isinstance(first[0].drop_path, torch.nn.Dropout) and not isinstance(first[3].drop_path, torch.nn.Dropout)


def test_tiny_reads_images():
    model = regard.build("soft_tiny").eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 224, 224))
        assert logits.shape == (1, 1000) and logits.isfinite().all()
        shapes = [tuple(f.shape[1:]) for f in model.features(torch.randn(1, 3, 224, 256))]
    assert shapes == [(64, 56, 64), (128, 28, 32), (320, 14, 16), (512, 7, 8)]


def test_blocks_are_normed_behind_their_sums():
    block = moved().stages[0].blocks[0]
    (x,) = normal((2, 8, 12, 8))
    y = F.layer_norm(x + block.mixer(x), (8,), block.norm1.weight, block.norm1.bias)
    hidden = F.gelu(block.mlp.fc1(y), approximate="tanh")
    torch.testing.assert_close(
        block(x), F.layer_norm(y + block.mlp.fc2(hidden), (8,), block.norm2.weight, block.norm2.bias)
    )


def test_the_last_stage_is_softmax_attention_with_a_class_token_that_the_head_reads():
    model = moved()
    (images,) = normal((2, 3, 32, 48))
    *_, middle, top = model.features(images)
    last = model.stages[2]
    x = last.down(middle.permute(0, 2, 3, 1)) + last.positions.table
    x = torch.cat((model.cls.expand(2, 1, 16), x.flatten(1, 2)), 1)
    block = last.blocks[0]
    y = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (to(y).view(2, 7, 4, 4).transpose(1, 2) for to in (block.mixer.to_q, block.mixer.to_k, block.mixer.to_v))
    x = x + block.mixer.to_out((torch.softmax(q @ k.mT / 2, -1) @ v).transpose(1, 2).flatten(2))
    x = x + block.mlp(F.layer_norm(x, (16,), block.norm2.weight, block.norm2.bias, 1e-6))
    torch.testing.assert_close(top, x[:, 1:].view(2, 2, 3, 16).permute(0, 3, 1, 2))
    torch.testing.assert_close(model(images), model.head.fc(model.norm(x[:, 0])))


def test_dropout_and_dropped_paths_rise_over_all_blocks():
    model = SOFT(replace(TINY, drop_path=0.3))
    drops = [block.drop_path for stage in model.stages for block in stage.blocks]
    assert [d.p for d in drops[:3]] == pytest.approx([0, 0.1, 0.2]) and drops[3].rate == pytest.approx(0.3)


def test_another_mixer_takes_the_place_of_softmax_free_attention_alone():
    model = SOFT(TINY, mixer="inline")
    kinds = [type(stage.blocks[0].mixer).__name__ for stage in model.stages]
    assert kinds == ["InLineAttention2d", "InLineAttention2d", "OpAttention"]
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 5)


def test_symmetric_norm_is_passed_on():
    assert not moved().stages[1].blocks[1].mixer.symmetric_norm
    plus = SOFT(replace(TINY, symmetric_norm=True)).double().eval()
    plain = SOFT(TINY).double().eval()
    plain.load_state_dict(plus.state_dict())
    (images,) = normal((1, 3, 32, 48))
    assert plus.stages[1].blocks[1].mixer.symmetric_norm
    assert (plus(images) - plain(images)).abs().max() > 1e-6


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match="one entry a stage"):
        SOFT(replace(TINY, ratios=(2, 1, 1)))
    with pytest.raises(ShapeError, match="7x12 does not divide by the ratio 2"):
        SOFT(TINY)(torch.randn(1, 3, 26, 48))


@pytest.mark.slow
def test_soft_learns_digits(record):
    from tests.models.test_dinat import train

    settings = SOFTSettings(
        image=(32, 32), dims=(32, 64, 96), depths=(1, 2, 1), heads=(2, 4, 4), ratios=(2, 1), convs=(5, 3), stem_dim=16,
        drop_path=0.0, classes=10, channels=1,
    )  # fmt: skip
    found = {}
    for name, made in {
        "soft": settings,
        "soft, symmetric norm": replace(settings, symmetric_norm=True),
        "softmax in its place": replace(settings, mixer="softmax"),
    }.items():
        torch.manual_seed(0)
        found[name] = train(SOFT(made), epochs=8, rate=1e-3)
    record({"task": "8 x 8 digits enlarged to 32 x 32; 16 landmarks a stage; 397 test images", "test_accuracy": found})
    assert found["soft"] >= 0.95 and found["soft, symmetric norm"] >= 0.95
