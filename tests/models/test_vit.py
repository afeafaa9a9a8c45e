from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from regard import OptionError, ShapeError
from regard.models.vision.vit import SIZES, ViT, ViTSettings
from tests.oracles import normal

# millions of parameters (table 1 of the DeiT paper has them without decimals), and exactly those of timm's networks
PAPER = {"deit_tiny": (5.7, 5_717_416), "deit_small": (22.1, 22_050_664), "deit_base": (86.6, 86_567_656)}
TINY = ViTSettings(image=(8, 12), patch=2, dim=16, depth=2, heads=4, classes=5)


def count(settings):
    with torch.device("meta"):
        return sum(p.numel() for p in ViT(settings).parameters())


@pytest.mark.parametrize("name", PAPER)
def test_published_sizes_have_the_published_parameters(name):
    millions, exact = PAPER[name]
    assert round(count(SIZES[name]) / 1e6, 1) == millions
    # one vector less: the class token holds its position
    assert count(SIZES[name]) == exact - SIZES[name].dim


def test_sparsifiner_adds_its_projections_to_deit():
    rank, head, narrow = 197 // 6, 64, 32
    own = 2 * (head * narrow + narrow) + 2 * 197 * rank
    assert count(SIZES["sparsifiner_deit_small"]) == count(SIZES["deit_small"]) + 12 * own


# millions of parameters as published (22.7 for the small network, which its released code does not have), and exactly
# those of the released code
AGENT = {
    "agent_deit_tiny": (6.0, 6_015_640),
    "agent_deit_small": (None, 22_647_112),
    "agent_deit_base": (87.2, 87_204_904),
}


@pytest.mark.parametrize("name", AGENT)
def test_agent_deit_has_the_published_parameters(name):
    millions, exact = AGENT[name]
    assert count(SIZES[name]) == exact - SIZES[name].dim
    assert millions in (None, round(exact / 1e6, 1))


def test_agents_take_the_first_blocks_and_read_the_class_token_and_other_images():
    with torch.device("meta"):
        base = ViT(SIZES["agent_deit_base"])
    kinds = [type(block.mixer).__name__ for block in base.blocks]
    assert kinds == ["AgentAttention2d"] * 4 + ["OpAttention"] * 8
    assert base.blocks[0].mixer.side == 9 and base.blocks[0].mixer.prefix == 1
    assert base.blocks[0].mixer.bias_ak.rows.shape == (12, 81, 14, 1)
    model = ViT(replace(TINY, mixer="agent", options={"agents": 4}, mixer_blocks=1)).double().eval()
    seen = []
    model.blocks[0].mixer.register_forward_hook(
        lambda m, given, options, out: seen.append((given[0].shape[1], options["shape"])), with_kwargs=True
    )
    for size, shape in (((8, 12), (4, 6)), ((10, 4), (5, 2))):
        (images,) = normal((2, 3, *size))
        assert model(images).shape == (2, 5)
        assert seen[-1] == (shape[0] * shape[1] + 1, shape)
    changed = images.clone()
    changed[:, :, 0, 0] += 1
    assert (model(changed) - model(images)).abs().max() > 0


@pytest.mark.parametrize("name", ["deit_tiny", "sparsifiner_deit_small", "agent_deit_tiny"])
def test_a_published_size_reads_an_image(name):
    model = ViT(SIZES[name]).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 1000) and logits.isfinite().all()


def by_hand(model, images, order):
    """Tokens of a network with softmax attention; order: "pc" patches then class, "cp" the other way."""
    s = model.settings
    conv, table = model.patches.proj, model.positions.table
    x = F.conv2d(images, conv.weight, conv.bias, stride=s.patch).flatten(2).transpose(1, 2) + table.flatten(0, 1)
    cls = model.prefix.expand(len(images), 1, s.dim)
    x = torch.cat((cls, x) if order == "cp" else (x, cls), 1)
    for block in model.blocks:
        y = F.layer_norm(x, (s.dim,), block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = (
            to(y).unflatten(-1, (s.heads, -1)).transpose(1, 2)
            for to in (block.mixer.to_q, block.mixer.to_k, block.mixer.to_v)
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * (s.dim // s.heads) ** -0.5, -1)
        x = x + block.mixer.to_out((weights @ v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, (s.dim,), block.norm2.weight, block.norm2.bias, 1e-6)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
    return F.layer_norm(x, (s.dim,), model.norm.weight, model.norm.bias, 1e-6)


@pytest.mark.parametrize("cls_position, order", [("first", "cp"), ("last", "pc")])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_it_is_patches_blocks_and_a_head(cls_position, order, pool):
    model = ViT(replace(TINY, cls_position=cls_position, pool=pool)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    (images,) = normal((2, 3, 8, 12))
    tokens = by_hand(model, images, order)
    torch.testing.assert_close(model.tokens(images), tokens)
    place = 0 if order == "cp" else -1
    patches = tokens[:, 1:] if order == "cp" else tokens[:, :-1]
    torch.testing.assert_close(model(images), model.head(tokens[:, place] if pool == "cls" else patches.mean(1)))


def test_a_prefix_may_hold_more_tokens_or_none():
    (images,) = normal((2, 3, 8, 12))
    for prefix, place, tokens in ((("cls", "dist"), "first", 26), (("reg", "cls"), "last", 26), ((), "first", 24)):
        model = ViT(replace(TINY, prefix=prefix, cls_position=place, pool="mean")).double().eval()
        assert model.tokens(images).shape == (2, tokens, 16) and model(images).shape == (2, 5)
    model = ViT(replace(TINY, prefix=("cls", "reg"), cls_position="last", depth=1)).double().eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    model(images)
    assert torch.equal(seen[0][:, 0], model.prefix[1].expand(2, -1))
    assert torch.equal(seen[0][:, -1], model.prefix[0].expand(2, -1))


@pytest.mark.parametrize("pos", ["learned", "rope", "both", None])
def test_positions_are_a_table_or_rotations(pos):
    model = ViT(replace(TINY, pos=pos))
    assert (model.positions is not None) is (pos in ("learned", "both"))
    assert all(block.mixer.rotary is (pos in ("rope", "both")) for block in model.blocks)
    # without positions a network does not know where its patches are
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    (images,) = normal((1, 3, 8, 12))
    turned = images.flip(2).unflatten(2, (4, 2)).flip(3).flatten(2, 3)
    same = torch.allclose(model(images), model(turned))
    assert same is (pos is None)


def test_another_image_has_its_positions_resized_and_another_mixer_takes_the_place():
    model = ViT(TINY)
    assert model(torch.randn(1, 3, 16, 8)).shape == (1, 5)
    other = ViT(TINY, mixer="selective_temperature")
    assert type(other.blocks[1].mixer).__name__ == "SelectiveTemperatureAttention"
    bound = ViT(TINY, mixer="sparsifiner")
    assert bound.blocks[0].mixer.connectivity.num_tokens == 25 and bound.blocks[0].mixer.connectivity.prefix == 1
    with pytest.raises(ShapeError, match="resize P, P_back"):
        bound(torch.randn(1, 3, 16, 8))


def test_all_parameters_train_and_paths_are_dropped_at_a_rising_rate():
    model = ViT(replace(TINY, depth=3, drop_path=0.2, layer_scale=0.1, classes=0))
    assert [b.drop_path.rate for b in model.blocks] == pytest.approx([0, 0.1, 0.2])
    out = model.eval()(torch.randn(4, 3, 8, 12))
    assert out.shape == (4, 16)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.3)


def timm_weights(model):
    """The weights of a network under timm's names, the position of the class token apart."""
    weights, (position,) = {}, normal((1, model.settings.dim))
    for name, t in model.state_dict().items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".mixer.to_q." in name:
            parts = [model.state_dict()[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            name, t = name.replace("mixer.to_q", "attn.qkv"), torch.cat(parts)
        name = name.replace("mixer.to_out", "attn.proj").replace("patches.", "patch_embed.")
        weights[name.replace("ls1.scale", "ls1.gamma").replace("ls2.scale", "ls2.gamma")] = t
    weights["cls_token"] = (weights.pop("prefix") - position)[None]
    weights["pos_embed"] = torch.cat((position, weights.pop("positions.table").flatten(0, 1)))[None]
    return weights


def test_weights_of_timm_are_renamed():
    settings = replace(TINY, layer_scale=0.1)
    there, here = ViT(settings).double().eval(), ViT(settings).double().eval()
    here.load_timm(timm_weights(there))
    (images,) = normal((2, 3, 8, 12))
    torch.testing.assert_close(here(images), there(images))
    with pytest.raises(ShapeError, match=r"pos_embed has 25 places; an image of 8x8 has .* 4x4 patches"):
        ViT(replace(settings, image=(8, 8))).load_timm(timm_weights(there))
    with pytest.raises(OptionError, match="one class token, in front"):
        ViT(replace(settings, cls_position="last")).load_timm(timm_weights(there))
    with pytest.raises(OptionError, match=r"without a place: \['extra \(as extra\)'\]"):
        here.load_timm({**timm_weights(there), "extra": torch.ones(1)})


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("name", ["deit_tiny", "deit_small"])
def test_logits_are_those_of_timm(name):
    import timm

    theirs = timm.create_model(f"{name}_patch16_224").double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.02 * torch.randn_like(p)
    assert sum(p.numel() for p in theirs.parameters()) == PAPER[name][1]
    ours = ViT(SIZES[name]).double().eval()
    ours.load_timm(theirs.state_dict())
    (images,) = normal((1, 3, 224, 224))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"depth": 0}, "at least 1 block"),
        ({"image": (8, 11)}, "8x11 pixels does not divide into patches of 2"),
        ({"prefix": ("cls", "cls")}, "not all different"),
        ({"prefix": ("reg",)}, "no class token in the prefix"),
        ({"prefix": (), "cls_position": "last", "pool": "mean"}, "no class token in the prefix"),
        ({"cls_position": "middle"}, "cls_position is 'middle'"),
        ({"pos": "sinusoid"}, "pos is 'sinusoid'"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"mixer": "neighborhood"}, "neighborhood mixes a grid"),
        ({"mixer": "sparsifiner", "pos": "rope"}, "has no rotary positions"),
        ({"mixer": "sparsifiner", "cls_position": "last"}, "class token in front"),
        ({"mixer": "agent", "pos": "rope"}, "has no rotary positions"),
        ({"mixer": "agent", "cls_position": "last"}, "class token in front"),
        ({"mixer": "agent", "options": {"agents": 5}}, "5 is not a square"),
        ({"mixer_blocks": 3}, "mixer_blocks is 3; it is a number of the 2 blocks"),
        ({"mixer": "softmix"}, "no mixer is called"),
    ],
)
def test_what_cannot_be_is_refused(changes, error):
    with pytest.raises((OptionError, LookupError), match=error):
        ViT(replace(TINY, **changes))
