from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import OptionError, SelectiveTemperatureAttention, ShapeError
from regard.layers.conv_blocks import BatchNorm, ConvSpec, PoolSpec, fuse
from regard.models.vision import skeleton
from regard.models.vision.skeleton import (
    Backbone,
    BackboneSettings,
    BackboneSpec,
    BlockSpec,
    Bottleneck,
    StageSpec,
    TwoResiduals,
    load_external,
)
from tests.oracles import normal


@dataclass(frozen=True)
class Given:
    """A spec as it is."""

    whole: BackboneSpec

    def spec(self):
        return self.whole


TINY = BackboneSettings(
    dims=(8, 12, 16),
    depths=(1, 2, 1),
    heads=(1, 2, 2),
    options={"softmax": {"rotary": False}},
    stem_stride=2,
    classes=5,
)


def residual_network(mixer="conv", options=None, classes=4):
    block = BlockSpec(mixer, 2, options or {}, form="bottleneck", ratio=0.5, act="relu")
    stem = (ConvSpec(8, 7, 2, bias=False, norm="bn", act="relu"), PoolSpec())
    stages = (StageSpec(16, 1, (block,)), StageSpec(24, 2, (block,), stride=2))
    return Backbone(Given(BackboneSpec(stem, stages, norm=None, classes=classes)))


class Shift(nn.Module):
    """A mixer of grids: every place takes the one to its left."""

    def __init__(self, dim, heads, *, by=1, stride=1):
        super().__init__()
        self.by, self.stride = by, stride
        self.weight = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.eye_(self.weight.weight)

    def forward(self, x):
        assert x.dim() == 4
        return self.weight(torch.roll(x, self.by, 2))[:, :: self.stride, :: self.stride]


@pytest.fixture
def shifting(monkeypatch):
    real, on_grid = skeleton.make_mixer, skeleton._is_on_grid
    monkeypatch.setattr(
        skeleton, "make_mixer", lambda name, *a, **o: Shift(*a, **o) if name == "shift" else real(name, *a, **o)
    )
    monkeypatch.setattr(skeleton, "_is_on_grid", lambda name: name == "shift" or on_grid(name))


def test_features_are_a_pyramid_and_logits_are_its_pooled_top():
    model = Backbone(TINY).double().eval()
    (images,) = normal((2, 3, 32, 16))
    found = model.features(images)
    assert [tuple(f.shape) for f in found] == [(2, 8, 16, 8), (2, 12, 8, 4), (2, 16, 4, 2)]
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in found)
    top = model.norm(found[-1].permute(0, 2, 3, 1)).mean((1, 2))
    torch.testing.assert_close(model(images), F.linear(top, model.head.fc.weight, model.head.fc.bias))
    assert Backbone(dataclasses.replace(TINY, classes=0))(images.float()).shape == (2, 16)


def test_a_block_is_its_two_residuals():
    settings = dataclasses.replace(TINY, cpe=3, layer_scale=0.5)
    block = Backbone(settings).double().stages[1].blocks[1].eval()
    assert isinstance(block, TwoResiduals)
    (x,) = normal((2, 4, 6, 12))
    y = x + F.conv2d(x.permute(0, 3, 1, 2), block.cpe1.conv.weight, block.cpe1.conv.bias, padding=1, groups=12).permute(
        0, 2, 3, 1
    )
    y = y + 0.5 * block.mixer(block.norm1(y).flatten(1, 2)).view_as(y)
    y = y + 0.5 * block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), y)


def test_a_block_may_have_its_norms_behind_and_a_stage_its_positions():
    block = BlockSpec("softmax", 2, {"rotary": False}, form="post", norm_eps=0.1, act="gelu_tanh")
    stage = StageSpec(8, 2, (block,), positions=(4, 6))
    model = Backbone(Given(BackboneSpec((ConvSpec(8, 2, 2, p=0),), (stage,), classes=3, drop_path=0.4)))
    assert [b.drop_path.p for b in model.stages[0].blocks] == [0, 0.4]
    model = model.double().eval()
    made = model.stages[0].blocks[1]
    (x,) = normal((2, 4, 6, 8))
    torch.testing.assert_close(model.stages[0].enter(x), x + model.stages[0].positions.table)
    y = F.layer_norm(x + made.mixer(x.flatten(1, 2)).view_as(x), (8,), eps=0.1)
    hidden = F.gelu(made.mlp.fc1(y), approximate="tanh")
    torch.testing.assert_close(made(x), F.layer_norm(y + made.mlp.fc2(hidden), (8,), eps=0.1))


def test_a_mixer_of_grids_gets_the_grid(shifting):
    model = Backbone(dataclasses.replace(TINY, mixer="shift", options={"shift": {"by": 2}})).double().eval()
    block = model.stages[0].blocks[0]
    assert torch.equal(block.mixer.weight.weight, torch.eye(8).double()), "reset_parameters has the last word"
    (x,) = normal((2, 4, 6, 8))
    y = x + torch.roll(block.norm1(x), 2, 2)
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_blocks_take_turns_and_mixers_may_differ_by_stage(shifting):
    stage = StageSpec(8, 5, (BlockSpec("shift"), BlockSpec("softmax", 2, ratio=0)))
    model = Backbone(Given(BackboneSpec((ConvSpec(8, 2, 2, p=0),), (stage,), classes=3)))
    kinds = [type(b.mixer).__name__ for b in model.stages[0].blocks]
    assert kinds == ["Shift", "OpAttention", "Shift", "OpAttention", "Shift"]
    assert [b.mlp is None for b in model.stages[0].blocks] == [False, True, False, True, False]
    mixed = Backbone(dataclasses.replace(TINY, mixer=("shift", "shift", "softmax")))
    assert [type(s.blocks[0].mixer).__name__ for s in mixed.stages] == ["Shift", "Shift", "OpAttention"]


def test_another_mixer_takes_the_place_of_all():
    model = Backbone(TINY, mixer="selective_temperature")
    assert {type(b.mixer) for s in model.stages for b in s.blocks} == {SelectiveTemperatureAttention}
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    assert model.settings == TINY


@pytest.mark.parametrize("stride, channels", [(1, 16), (1, 8), (2, 16)])
def test_a_bottleneck_is_that_of_residual_networks(stride, channels):
    spec = BlockSpec("conv", form="bottleneck", ratio=0.5, act="relu")
    block = Bottleneck(channels, 16, spec, stride, 0.0).double().eval()
    for m in block.modules():
        if isinstance(m, BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 1.5)
    (x,) = normal((2, 6, 4, channels))

    def conv_bn(part, y, s=1):
        c = part.conv
        weight = c.weight if c.weight.dim() == 4 else c.weight[:, :, None, None]
        y = F.conv2d(y, weight, None, s, weight.shape[-1] // 2)
        n = part.norm
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)

    y = x.permute(0, 3, 1, 2)
    out = F.relu(conv_bn(block.narrow, y))
    assert out.shape[1] == 8
    out = conv_bn(block.widen, F.relu(conv_bn(block.mixer, out, stride)))
    short = y if (stride, channels) == (1, 16) else conv_bn(block.shortcut, y, stride)
    torch.testing.assert_close(block(x), F.relu(out + short).permute(0, 2, 3, 1))


def test_bottlenecks_of_convolutions_have_the_parameters_of_a_residual_network_of_50_layers():
    block = BlockSpec("conv", form="bottleneck", ratio=0.25, act="relu")
    stages = tuple(
        StageSpec(dim, depth, (block,), stride=stride)
        for dim, depth, stride in zip((256, 512, 1024, 2048), (3, 4, 6, 3), (1, 2, 2, 2), strict=True)
    )
    stem = (ConvSpec(64, 7, 2, bias=False, norm="bn", act="relu"), PoolSpec())
    with torch.device("meta"):
        model = Backbone(Given(BackboneSpec(stem, stages, norm=None)))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert [f.shape[2] for f in model.features(torch.empty(1, 3, 224, 224, device="meta"))] == [56, 28, 14, 7]


def test_a_mixer_in_a_bottleneck_gets_the_stride_and_a_norm_after_it(shifting):
    model = residual_network("shift")
    blocks = [b for s in model.stages for b in s.blocks]
    assert [b.mixer.stride for b in blocks] == [1, 2, 1]
    assert [b.mixer.weight.in_features for b in blocks] == [8, 12, 12]
    assert isinstance(blocks[0].norm[0], BatchNorm) and isinstance(blocks[0].norm[1], nn.ReLU)
    assert [tuple(f.shape[1:]) for f in model.features(torch.randn(1, 3, 32, 32))] == [(16, 8, 8), (24, 4, 4)]


def test_the_rate_of_dropped_paths_rises_over_all_blocks():
    model = Backbone(dataclasses.replace(TINY, drop_path=0.3))
    rates = [b.drop_path.rate for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_names_of_the_weights_are_those_of_the_family():
    names = set(Backbone(dataclasses.replace(TINY, cpe=3, layer_scale=1e-5)).state_dict())
    for name in (
        "stem.0.conv.weight", "stem.0.norm.bias", "stages.1.down.conv.weight", "stages.1.down.norm.weight",
        "stages.0.blocks.0.cpe1.conv.weight", "stages.0.blocks.0.norm1.weight", "stages.0.blocks.0.mixer.to_q.weight",
        "stages.2.blocks.0.ls1.scale", "stages.2.blocks.0.mlp.fc1.bias", "stages.2.blocks.0.ls2.scale", "norm.weight",
        "head.fc.weight",
    ):  # fmt: skip
        assert name in names


def test_fusing_a_network_keeps_its_logits():
    model = residual_network()
    (images,) = normal((4, 3, 32, 32), dtype=torch.float32)
    for _ in range(3):
        model(images + torch.randn_like(images))
    model = model.double().eval()
    fused = fuse(model)
    assert not any(isinstance(m, BatchNorm) for m in fused.modules())
    torch.testing.assert_close(fused(images.double()), model(images.double()), rtol=1e-9, atol=1e-9)


def test_every_parameter_of_both_kinds_of_blocks_is_trained():
    for model in (Backbone(dataclasses.replace(TINY, cpe=3, layer_scale=1.0)), residual_network()):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_linear_layers_start_small():
    model = Backbone(TINY)
    assert model.stages[0].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (model.head.fc.bias == 0).all()


def test_foreign_weights_are_renamed_and_all_used():
    model = residual_network()
    there = {
        "net." + name: t[:, :, None, None] if t.dim() == 2 and "fc" not in name else t.clone()
        for name, t in residual_network().state_dict().items()
    }
    rules = ((r"^net\.", ""),)
    images = torch.randn(1, 3, 32, 32)
    load_external(model, there, rules)
    for name, t in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(t, there["net." + name].view_as(t))
    assert model.eval()(images).isfinite().all()
    with pytest.raises(OptionError, match=r"sources without a place: \['net.extra \(as extra\)'\]"):
        load_external(model, {**there, "net.extra": torch.ones(1)}, rules)
    load_external(model, {**there, "net.extra": torch.ones(1)}, rules, ignore=(r"extra$",))
    with pytest.raises(OptionError, match=r"without a source: \['head.fc.bias'\]"):
        load_external(model, {n: t for n, t in there.items() if n != "net.head.fc.bias"}, rules)
    with pytest.raises(OptionError, match=r"both called 'head\.fc\.bias'"):
        load_external(model, {**there, "head.fc.bias": torch.ones(4)}, rules)
    with pytest.raises(ShapeError, match=r"head.fc.bias must be \(4,\)"):
        load_external(model, {**there, "net.head.fc.bias": torch.ones(3)}, rules)


def test_what_cannot_be_is_refused():
    with pytest.raises(OptionError, match="must have one entry a stage"):
        Backbone(dataclasses.replace(TINY, depths=(1, 2)))
    with pytest.raises(OptionError, match="needs down= or a bottleneck"):
        Backbone(Given(BackboneSpec((), (StageSpec(8, 1, (BlockSpec("softmax"),)),))))
    with pytest.raises(OptionError, match="at least one stage"):
        Backbone(Given(BackboneSpec((), ())))
    with pytest.raises(ShapeError, match=r"\(B, 3, Y, X\)"):
        Backbone(TINY)(torch.randn(1, 16, 16, 3))
    with pytest.raises(LookupError, match="no mixer is called 'softmix'"):
        Backbone(dataclasses.replace(TINY, mixer="softmix"))
