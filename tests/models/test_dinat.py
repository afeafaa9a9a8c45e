from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import DiNAT, DiNATSettings, NeighborhoodAttention, OptionError, UnknownName
from regard.models.vision.dinat import SIZES, PatchMerging, resize_bias
from tests.neighbours import attend_by_mask, neighbourhood_mask, relative_bias
from tests.oracles import normal

# tables 2 and 3 of the paper, in whole millions
PAPER = {
    "dinat_mini": 20, "dinat_tiny": 28, "dinat_small": 51, "dinat_base": 90, "dinat_large": 200,
    "dinat_s_tiny": 28, "dinat_s_small": 50, "dinat_s_base": 88, "dinat_s_large": 197,
}  # fmt: skip


def count(name):
    with torch.device("meta"):
        return sum(p.numel() for p in regard.build(name).parameters())


@pytest.mark.parametrize("name", PAPER)
def test_published_sizes_have_the_published_parameters(name):
    assert count(name) / 1e6 == pytest.approx(PAPER[name], abs=0.5, rel=0.01)


def test_a_size_is_built_by_name_with_changes():
    with torch.device("meta"):
        model = regard.build("dinat_s_tiny", classes=7)
    assert model.settings == replace(SIZES["dinat_s_tiny"], classes=7)
    with pytest.raises(UnknownName, match=r"dinat_tinny.*did you mean 'dinat_tiny'"):
        regard.build("dinat_tinny")
    with pytest.raises(UnknownName, match=r"there are .*dinat_tiny"):
        regard.build("resnet50")
    with pytest.raises(OptionError, match=r"no 'clases'.*'classes'"):
        regard.build("dinat_tiny", clases=7)


def mixers(model):
    return [[block.mixer for block in stage.blocks] for stage in model.stages]


def test_every_second_block_is_dilated():
    with torch.device("meta"):
        found = mixers(regard.build("dinat_mini"))
    assert [[m.dilation[0] for m in level] for level in found] == [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]
    with torch.device("meta"):
        found = mixers(regard.build("dinat_large_384"))
    assert [level[1].dilation for level in found] == [(13, 13), (6, 6), (3, 3), (1, 1)]


def test_the_dilations_at_224_and_384_fill_the_maps():
    for name, side in (("dinat_tiny", 224), ("dinat_large_384", 384), ("dinat_large_384_11x11", 384)):
        settings = SIZES[name]
        sides = [side // 4 // 2**level for level in range(3)]
        assert [s // settings.kernel for s in sides] == list(settings.dilations[:3])


@pytest.mark.parametrize("name", [n for n in SIZES if "384" not in n and "large" not in n])
def test_one_image_goes_through(name):
    model = regard.build(name).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 1000) and logits.isfinite().all()


TINY = DiNATSettings(dim=8, depths=(2, 2), heads=(1, 2), kernel=3, dilations=(2, 1), classes=5)


def by_hand(model, images):
    """The network with whole tables in place of neighbourhoods; for stems of convolutions."""
    x = images
    for conv in model.stem:
        x = F.conv2d(x, conv.conv.weight, conv.conv.bias, 2, 1)
    x = model.stem[1].norm(x.permute(0, 2, 3, 1))
    for stage in model.stages:
        if not isinstance(stage.down, nn.Identity):
            x = F.conv2d(x.permute(0, 3, 1, 2), stage.down.conv.weight, None, 2, 1).permute(0, 2, 3, 1)
            x = stage.down.norm(x)
        for block in stage.blocks:
            x = x + attention_by_hand(block.mixer, block.norm1(x))
            y = F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias)
            x = x + F.linear(F.gelu(y), block.mlp.fc2.weight, block.mlp.fc2.bias)
    return F.linear(model.norm(x).mean((1, 2)), model.head.fc.weight, model.head.fc.bias)


def attention_by_hand(m, x):
    shape = tuple(x.shape[1:3])
    q, k, v = m.qkv(x).flatten(1, 2).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4)
    mask = neighbourhood_mask(shape, m.kernel, m.dilation)
    out = attend_by_mask(q, k, v, mask, bias=relative_bias(m.rpb, shape, m.kernel, m.dilation))
    return m.proj(out.transpose(1, 2).flatten(2)).view_as(x)


def test_the_network_is_its_blocks_with_whole_tables():
    model = DiNAT(TINY).double().eval()
    (images,) = normal((2, 3, 27, 32))
    torch.testing.assert_close(model(images), by_hand(model, images))


def test_without_dilations_it_is_a_nat():
    plain = DiNAT(replace(TINY, dilations=(1, 1))).double().eval()
    dilated = DiNAT(TINY).double().eval()
    dilated.load_state_dict(plain.state_dict())
    (images,) = normal((2, 3, 32, 32))
    torch.testing.assert_close(plain(images), by_hand(plain, images))
    assert (plain(images) - dilated(images)).abs().max() > 1e-6


def test_a_map_as_large_as_the_kernel_is_full_attention_with_the_bias():
    m = NeighborhoodAttention(12, 3, kernel=7, rpb=True).double()
    (x,) = normal((2, 7, 7, 12))
    q, k, v = m.qkv(x).flatten(1, 2).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    y, z = torch.arange(49) // 7, torch.arange(49) % 7
    bias = m.rpb[:, y[None] - y[:, None] + 6, z[None] - z[:, None] + 6]
    out = F.scaled_dot_product_attention(q, k, v, bias[None]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(m(x), m.proj(out).view_as(x))


def test_dilation_widens_what_the_centre_sees():
    """The inputs with a gradient to the centre of a 56 x 56 map after two layers, against products of masks."""
    side, centre, counts = 56, 28 * 56 + 28, {}
    for dilations in ((1, 1), (1, 8)):
        layers = [NeighborhoodAttention(4, 1, kernel=7, dilation=d, rpb=True).double() for d in dilations]
        (x,) = normal((1, side, side, 4))
        y = x.requires_grad_()
        for layer in layers:
            y = layer(y)
        (grad,) = torch.autograd.grad(y[0, 28, 28].sum(), x)
        first, second = (neighbourhood_mask((side, side), 7, d) for d in dilations)
        expected = (second[centre].float() @ first.float()) > 0
        assert torch.equal(grad[0].abs().amax(-1).flatten() > 0, expected)
        counts[dilations] = int(expected.sum())
    assert counts[1, 1] == 13 * 13
    assert counts[1, 8] == (7 * 7) ** 2


def test_merged_patches_keep_the_order_of_the_released_weights():
    m = PatchMerging(2, 4).double()
    (x,) = normal((1, 3, 4, 2))
    wide = F.pad(x, (0, 0, 0, 0, 0, 1))
    cell = torch.cat([wide[0, y, z] for z in (0, 1) for y in (2, 3)])
    torch.testing.assert_close(m(x)[0, 1, 0], m.reduction(m.norm(cell)))
    assert m(x).shape == (1, 2, 2, 4)


def test_features_are_a_pyramid():
    model = DiNAT(TINY)
    assert [tuple(f.shape) for f in model.features(torch.randn(1, 3, 32, 48))] == [(1, 8, 8, 12), (1, 16, 4, 6)]


def test_a_small_image_is_refused_naming_the_level():
    with torch.device("meta"):
        model = regard.build("dinat_mini")
    with pytest.raises(OptionError, match=r"200x224.*50x56 at level 1.*kernel 7 times dilation 8"):
        model(torch.empty(1, 3, 200, 224, device="meta"))
    with pytest.raises(OptionError, match=r"level 2.*kernel 3 times dilation 1"):
        DiNAT(replace(TINY, dilations=(1, 1)))(torch.zeros(1, 3, 25, 16))


@pytest.mark.parametrize("small_input", ["pad_legacy", "shrink"])
def test_a_small_image_may_be_padded_or_the_windows_shrunk(small_input):
    model = DiNAT(replace(TINY, small_input=small_input)).double().eval()
    (images,) = normal((2, 3, 16, 20))
    out = model(images)
    assert out.shape == (2, 5) and out.isfinite().all()


def test_a_bias_for_another_kernel_is_interpolated():
    rpb = torch.randn(2, 13, 13)
    assert resize_bias(rpb, 7) is rpb
    assert resize_bias(rpb, 11).shape == (2, 21, 21)
    flat = torch.full((1, 13, 13), 0.3)
    torch.testing.assert_close(resize_bias(flat, 11), torch.full((1, 21, 21), 0.3))


class Oracle:
    """What transformers takes from NATTEN, as whole tables; heads first, (B, H, Y, X, D)."""

    @staticmethod
    def natten2dqkrpb(query, key, rpb, kernel_size, dilation):
        if query.dim() != 5 or query.shape[1] != len(rpb):
            pytest.skip("this transformers hands its heads to NATTEN in another place than NATTEN takes them from")
        shape, kernel = tuple(query.shape[2:4]), (kernel_size, kernel_size)
        mask = neighbourhood_mask(shape, kernel, dilation)
        scores = query.flatten(2, 3) @ key.flatten(2, 3).transpose(2, 3)
        scores = scores + relative_bias(rpb, shape, kernel, dilation)
        keys = mask.nonzero()[:, 1].view(1, 1, len(mask), -1).expand(*scores.shape[:3], -1)
        return scores.gather(3, keys).unflatten(2, shape)

    @staticmethod
    def natten2dav(weights, value, kernel_size, dilation):
        shape = tuple(value.shape[2:4])
        mask = neighbourhood_mask(shape, kernel_size, dilation)
        table = value.new_zeros(*weights.shape[:2], *mask.shape)
        table[:, :, mask] = weights.flatten(2)
        return (table @ value.flatten(2, 3)).unflatten(2, shape)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
def test_logits_are_those_of_transformers(monkeypatch, layer_scale):
    from transformers import DinatConfig
    from transformers.models.dinat import modeling_dinat

    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *a: None)
    for name in ("natten2dqkrpb", "natten2dav"):
        monkeypatch.setattr(modeling_dinat, name, getattr(Oracle, name))
    config = DinatConfig(
        embed_dim=8, depths=[2, 2], num_heads=[1, 2], kernel_size=3, dilations=[[1, 2], [1, 1]], mlp_ratio=3.0,
        num_labels=5, layer_scale_init_value=layer_scale,
    )  # fmt: skip
    theirs = modeling_dinat.DinatForImageClassification(config).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.2 * torch.randn_like(p)
    settings = replace(TINY, layer_scale=layer_scale or None, small_input="pad_legacy")
    ours = DiNAT(settings).double().eval()
    ours.load_transformers(theirs.state_dict())
    # the second level of the second image is smaller than the kernel: it is padded
    for shape in ((2, 3, 32, 36), (1, 3, 24, 16)):
        (images,) = normal(shape)
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-9, atol=1e-10)
    assert "transformers" in sys.modules


def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    # enlarged four times: the stem's stride makes it 8 x 8 again
    images = F.interpolate(images, scale_factor=4)[order]
    labels = torch.tensor(found.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train(model, epochs, rate=3e-3, size=35):
    images, labels, test_images, test_labels = digits()
    every = len(images) // size
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * every)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(size):
            F.cross_entropy(model.train()(images[batch]), labels[batch]).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    with torch.no_grad():
        return (model.eval()(test_images).argmax(1) == test_labels).float().mean().item()


@pytest.mark.slow
def test_dinat_learns_digits(record):
    settings = DiNATSettings(
        dim=32, depths=(2, 2), heads=(2, 4), kernel=3, dilations=(2, 1), classes=10, channels=1, drop_path=0.0
    )
    torch.manual_seed(0)
    accuracy = train(DiNAT(settings), epochs=12)
    record({"test_accuracy": accuracy, "epochs": 12, "kernel": 3, "dilations": [1, 2]})
    assert accuracy >= 0.95
