"""The generator and encoder of plug and play generation against the released definitions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import (
    CodeEncoder,
    OptionError,
    ShapeError,
    UpconvGenerator,
    UpconvSettings,
    adversarial_losses,
    feature_loss,
    image_loss,
)
from regard.models.generative.ppgn import SIZES

# generator.prototxt, layer by layer: kind, outputs, kernel, stride, pad; inputs are the outputs before
GENERATOR = [
    ("linear", 4096, 4096),
    ("linear", 4096, 4096),
    ("linear", 4096, 4096),
    ("up", 256, 256, 4, 2, 1),
    ("up", 256, 512, 3, 1, 1),
    ("up", 512, 256, 4, 2, 1),
    ("up", 256, 256, 3, 1, 1),
    ("up", 256, 128, 4, 2, 1),
    ("up", 128, 128, 3, 1, 1),
    ("up", 128, 64, 4, 2, 1),
    ("up", 64, 32, 4, 2, 1),
    ("up", 32, 3, 4, 2, 1),
]
# caffenet.prototxt up to fc6: inputs, outputs, kernel, stride, pad, groups
ENCODER = [
    (3, 96, 11, 4, 0, 1),
    (96, 256, 5, 1, 2, 2),
    (256, 384, 3, 1, 1, 1),
    (384, 384, 3, 1, 1, 2),
    (384, 256, 3, 1, 1, 2),
]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_released_generator_layer_by_layer():
    with torch.device("meta"):
        generator = regard.build("ppgn_fc6")
        assert generator(torch.zeros(2, 4096)).shape == (2, 3, 256, 256)
    found = [("linear", m.in_features, m.out_features) for m in generator.linear]
    for pair in zip(generator.up, generator.conv, strict=True):
        for m in pair:
            if isinstance(m, torch.nn.ConvTranspose2d):
                found.append(("up", m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]))
    assert found == GENERATOR
    counted = sum(a * b + b if kind == "linear" else a * b * rest[0] ** 2 + b for kind, a, b, *rest in GENERATOR)
    assert parameters(generator) == counted == 56_097_891


def test_the_released_encoder_layer_by_layer():
    with torch.device("meta"):
        encoder = CodeEncoder()
        pool5, fc6 = encoder.read(torch.zeros(2, 3, 227, 227))
    assert pool5.shape == (2, 256, 6, 6) and fc6.shape == (2, 4096)
    found = [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0], m.groups) for m in encoder.conv
    ]
    assert found == ENCODER
    counted = sum(a // g * b * k**2 + b for a, b, k, _, _, g in ENCODER) + 256 * 36 * 4096 + 4096
    assert parameters(encoder) == counted == 40_086_912


def test_the_generator_is_that_of_the_definition_written_out():
    generator = UpconvGenerator(replace(SIZES["ppgn_digits"], ups=(12, 8), convs=(10, 0), crop=8)).double()
    h = torch.randn(3, 64, dtype=torch.float64)
    weights = dict(generator.named_parameters())
    x = h
    for i in range(2):
        x = F.leaky_relu(x @ weights[f"linear.{i}.weight"].T + weights[f"linear.{i}.bias"], 0.3)
    x = x.view(3, 64, 2, 2)
    for name, stride, active in (("up.0", 2, True), ("conv.0", 1, True), ("up.1", 2, True), ("up.2", 2, False)):
        x = F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=1)
        x = F.leaky_relu(x, 0.3) if active else x
    assert x.shape == (3, 1, 16, 16) and (x < 0).any()
    torch.testing.assert_close(generator(h), x)


def test_the_encoder_is_that_of_the_definition_written_out():
    settings = UpconvSettings(
        code=7, crop=27, hidden=(), grid=8, base=4, ups=(4,), convs=(0,), features=(6, 8), kernels=(5, 3), strides=(2, 1),
        paddings=(0, 1), groups=(1, 2), responses=(True, False), pools=(True, True),
    )  # fmt: skip
    encoder = CodeEncoder(settings).double()
    images = 9 * torch.randn(2, 3, 27, 27, dtype=torch.float64)
    w = dict(encoder.named_parameters())
    x = F.max_pool2d(F.relu(F.conv2d(images, w["conv.0.weight"], w["conv.0.bias"], stride=2)), 3, 2)
    # caffe's response: over (1 + 1e-4 / 5 sum of squares of five neighbours) ^ 0.75
    squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
    x = x / (1 + 1e-4 / 5 * sum(squares[:, i : i + 6] for i in range(5))) ** 0.75
    halves = [
        F.conv2d(
            x[:, 3 * i : 3 * i + 3],
            w["conv.1.weight"][4 * i : 4 * i + 4],
            w["conv.1.bias"][4 * i : 4 * i + 4],
            padding=1,
        )
        for i in range(2)
    ]
    features = F.max_pool2d(F.relu(torch.cat(halves, 1)), 3, 2)
    code = F.relu(features.flatten(1) @ w["linear.weight"].T + w["linear.bias"])
    found = encoder.read(images)
    torch.testing.assert_close(found[0], features)
    torch.testing.assert_close(found[1], code)
    assert torch.equal(encoder(images), found[1]) and (code == 0).any() and (code > 0).any()


def test_the_digits_networks_fit_together():
    generator, encoder = regard.build("ppgn_digits"), CodeEncoder(SIZES["ppgn_digits"])
    images = generator(torch.randn(2, generator.code))
    assert images.shape == (2, 1, 8, 8) and encoder(images).shape == (2, generator.code)


def test_image_and_feature_losses_are_squared_distances():
    a, b = torch.randn(3, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 4, 5, requires_grad=True)
    c, d = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    rows = [((a[i] - b[i]) ** 2).sum().item() for i in range(3)]
    assert image_loss(a, b).item() == pytest.approx(sum(rows) / 3)
    more = ((c - d) ** 2).sum().item() / 3
    loss = feature_loss((a, c), (b, d))
    assert loss.item() == pytest.approx(sum(rows) / 3 + more)
    loss.backward()
    # what is to be reached does not come nearer
    assert a.grad.any() and c.grad.any() and b.grad is None and d.grad is None
    with pytest.raises(ShapeError, match="cannot be compared"):
        image_loss(a, b[:1])
    for other in ((b,), ()):
        with pytest.raises(ShapeError, match="layers cannot be compared"):
            feature_loss((a, c) if other else (), other)


def test_adversarial_losses_are_those_of_the_probabilities():
    made, real = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    generator, discriminator = adversarial_losses(made, real)
    p, q = torch.sigmoid(made), torch.sigmoid(real)
    torch.testing.assert_close(generator, -p.log().mean())
    torch.testing.assert_close(discriminator, -q.log().mean() - (1 - p).log().mean())
    far = adversarial_losses(torch.full((2,), -500.0), torch.full((2,), 500.0))
    assert far[0] == 500 and far[1] == 0


def test_what_does_not_fit_is_refused():
    settings = SIZES["ppgn_digits"]
    for change, text in (
        ({"convs": ()}, "one entry a doubling"),
        ({"kernels": (3,)}, "one entry a convolution"),
        ({"crop": 9}, "images of 8x8 have no crop of 9"),
    ):
        with pytest.raises(OptionError, match=text):
            replace(settings, **change)
    with pytest.raises(OptionError, match="32 channels in and 64 out do not divide into 3 groups"):
        CodeEncoder(replace(settings, groups=(1, 3)))
    with pytest.raises(OptionError, match="too small"):
        CodeEncoder(replace(settings, crop=4, pools=(True, True)))
    with pytest.raises(ShapeError, match=r"it takes codes \(B, 64\)"):
        UpconvGenerator(settings)(torch.randn(2, 65))
    with pytest.raises(ShapeError, match=r"it takes \(B, 1, 8, 8\)"):
        CodeEncoder(settings)(torch.randn(2, 1, 9, 8))
