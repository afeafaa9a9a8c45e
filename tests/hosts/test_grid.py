"""Where the patches of an image lie among a model's tokens, as every family puts them."""

from typing import Any

import pytest
import torch
import transformers

from regard import overview, record
from regard.hosts.transformers.session import sides
from regard.hosts.transformers.specimens import VISION, make, prompt

hf: Any = transformers
FAMILIES = {
    "vit": (lambda **sizes: hf.ViTModel(hf.ViTConfig(**sizes)), 1),
    "deit": (lambda **sizes: hf.DeiTModel(hf.DeiTConfig(**sizes)), 2),
    "dinov2": (lambda **sizes: hf.Dinov2Model(hf.Dinov2Config(**sizes)), 1),
    "dinov2_registers": (
        lambda **sizes: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)),
        4,
    ),
    "clip": (lambda **sizes: hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes)), 1),
    "siglip": (lambda **sizes: hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes, vision_use_head=False)), 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_grid_and_what_stands_before_it_are_all_tokens(name):
    make_model, before = FAMILIES[name]
    sizes = {k: v for k, v in VISION.items() if k != "intermediate_size" or not name.startswith("dinov2")}
    model = make_model(**sizes).eval()
    tape = record(model, {"pixel_values": torch.randn(1, 3, 16, 16)})
    assert tape.meta["grid"] == (4, 4, before)
    assert tape["weights", 0].shape[-1] == 4 * 4 + before


@pytest.mark.parametrize("name", ["deit", "dinov2_registers"])
def test_the_tokens_before_the_grid_are_those_that_no_patch_of_the_image_moves(name):
    make_model, before = FAMILIES[name]
    sizes = {k: v for k, v in VISION.items() if k != "intermediate_size" or not name.startswith("dinov2")}
    model = make_model(**sizes).eval()
    torch.manual_seed(0)
    image = torch.randn(1, 3, 16, 16)
    other = image.clone()
    # the patch in row 1, column 2
    other[..., 4:8, 8:12] += 1
    first, second = (record(model, {"pixel_values": x}, sites=("embed",))["embed", 0] for x in (image, other))
    moved = (first - second).abs().amax(-1)[0].nonzero().flatten().tolist()
    assert moved == [before + 1 * 4 + 2]


@pytest.mark.parametrize("size", [(16, 8), [16, 8]])
def test_images_need_not_be_square(size):
    model = hf.ViTModel(hf.ViTConfig(**{**VISION, "image_size": size, "patch_size": (4, 2)})).eval()
    seen = overview(model, {"pixel_values": torch.randn(1, 3, 16, 8)})
    assert seen.grid == (4, 4, 1) and len(seen.tokens) == 17
    model = hf.ViTModel(hf.ViTConfig(**{**VISION, "image_size": size})).eval()
    assert overview(model, {"pixel_values": torch.randn(1, 3, 16, 8)}).grid == (4, 2, 1)


@pytest.mark.parametrize(
    "size, found",
    [
        (16, (16, 16)), ((16, 8), (16, 8)), ([16, 8], (16, 8)), ({"height": 16, "width": 8}, (16, 8)), (None, None),
        ({"shortest_edge": 16}, None), ((16, 8, 3), None),
    ],
)  # fmt: skip
def test_sizes_as_configs_write_them(size, found):
    assert sides(size) == found


def test_models_of_text_have_no_grid():
    assert "grid" not in record(make("llama"), prompt(length=9)).meta
