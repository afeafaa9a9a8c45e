"""Relevance is kept from layer to layer, and areas stand where the formula puts them."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import (
    OptionError,
    ShapeError,
    Unsupported,
    context_aware_saliency,
    lrp,
    salient_relevance,
)
from tests.explain.pasted_digits import Pasted, area, mass, read_rightly, trained


def cnn(bias=False, norm=False):
    """Convolutions, one of them grouped and dilated, two kinds of pooling, two linear layers."""

    def layer(a, b, **options):
        made = [nn.Conv2d(a, b, 3, bias=bias, **{"padding": 1, **options})]
        return made + ([nn.BatchNorm2d(b)] if norm else []) + [nn.ReLU(inplace=True)]

    parts = [
        *layer(2, 4),
        nn.MaxPool2d(3, 2, padding=1),
        *layer(4, 8, groups=2, dilation=2, padding=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
    ]
    parts += [nn.Dropout(), nn.Linear(8, 12, bias=bias), nn.ReLU(), nn.Linear(12, 5, bias=bias)]
    return nn.Sequential(*parts).double().eval()


class Residual(nn.Module):
    """What torchvision's networks do in functions: sums in place, joins, views, means."""

    def __init__(self, bias=False, norm=False):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, bias=bias)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.third = nn.Conv2d(6, 4, 1, bias=bias)
        self.head = nn.Linear(10, 5, bias=bias)
        self.double().eval()

    def forward(self, x):
        x = F.relu(self.first(x))
        y = self.bn(self.second(x))
        y += x
        y = torch.relu(y)
        y = torch.cat([y, F.relu(self.third(y), inplace=True)], 1)
        y = F.max_pool2d(y, 2)
        y = y.mean((2, 3), keepdim=True)
        return self.head(F.dropout(y.view(x.size(0), -1), training=self.training))


EPSILON = {"linear": "epsilon"}


def images(size=6, batch=3, channels=2):
    return torch.randn(batch, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def gradient_times_input(model, x, target):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
    return x.detach() * gradient


@pytest.mark.parametrize("rules", ["paper", EPSILON, {"conv": "zplus"}, {"conv": "alphabeta", "linear": "alphabeta"}])
@pytest.mark.parametrize("make", [cnn, Residual])
def test_relevance_is_the_logit_in_every_layer(make, rules):
    model, x = make(), images()
    found = lrp(model, x, torch.tensor([0, 3, 4]), rules=rules)
    logits = model(x).gather(1, torch.tensor([[0], [3], [4]]))[:, 0]
    torch.testing.assert_close(found.score, logits)
    torch.testing.assert_close(found.relevance.flatten(1).sum(1), logits, rtol=1e-4, atol=1e-4)
    assert found.relevance.shape == x.shape
    if make is cnn:
        assert len(found.layers) == len(model)
        for name, reached in found.layers.items():
            torch.testing.assert_close(reached, logits, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("make", [cnn, Residual])
def test_without_biases_epsilon_is_gradient_times_input(make):
    model, x, target = make(), images(), torch.tensor([0, 3, 4])
    wanted = gradient_times_input(model, x, target)
    torch.testing.assert_close(lrp(model, x, target, rules=EPSILON, eps=0.0).relevance, wanted)
    near = lrp(model, x, target, rules=EPSILON, eps=1e-3).relevance
    assert (near - wanted).abs().max() > 1e-6


def test_zplus_keeps_the_sign_of_its_start():
    model, x = cnn(), images()
    rules = {"conv": "zplus", "linear": "zplus"}
    assert (x < 0).any()
    found = lrp(model, x, lambda output: output.abs().sum(1), rules=rules).relevance
    assert (found >= 0).all() and (found > 0).any()


def test_rules_are_their_formulas():
    torch.manual_seed(3)
    layer = nn.Linear(16, 3).double()
    x, start = torch.randn(2, 16, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    w, b = layer.weight.detach(), layer.bias.detach()
    model = nn.Sequential(layer).eval()

    def read(rule, eps=0.0):
        return lrp(model, x, lambda output: output @ start, rules={"linear": rule}, eps=eps).relevance

    for row in range(2):
        share = x[row, None] * w
        z = share.sum(1) + b
        r = z * start
        positive, negative = share.clamp(min=0), share.clamp(max=0)
        zplus = (positive / positive.sum(1, keepdim=True) * r[:, None]).sum(0)
        zminus = (negative / negative.sum(1, keepdim=True) * r[:, None]).sum(0)
        assert (positive.sum(1) > 0).all() and (negative.sum(1) < 0).all()
        torch.testing.assert_close(read("zplus")[row], zplus)
        torch.testing.assert_close(read("alphabeta")[row], 2 * zplus - zminus)
        torch.testing.assert_close(read(("alphabeta", 3, 2))[row], 3 * zplus - 2 * zminus)
        signed = z + 0.1 * torch.where(z < 0, -1.0, 1.0)
        torch.testing.assert_close(read("epsilon", 0.1)[row], (share / signed[:, None] * r[:, None]).sum(0))
        low, high = -3.0, 2.5
        bounded = share - low * w.clamp(min=0) - high * w.clamp(max=0)
        torch.testing.assert_close(
            read(("zb", low, high))[row], (bounded / bounded.sum(1, keepdim=True) * r[:, None]).sum(0)
        )
    low, high = float(x.min()), float(x.max())
    assert torch.equal(read("zb"), read(("zb", low, high)))


def test_rules_are_chosen_by_name_then_class_then_kind():
    model, x = cnn(), images()
    all_zb = lrp(model, x, 1, rules={"0": ("zb", -4, 4)}).relevance
    assert not torch.allclose(all_zb, lrp(model, x, 1).relevance)
    # the kind "conv" reaches both convolutions, the class too, the name one
    kind = lrp(model, x, 1, rules={"conv": "zplus"}).relevance
    assert torch.equal(kind, lrp(model, x, 1, rules={"Conv2d": "zplus"}).relevance)
    assert torch.equal(kind, lrp(model, x, 1, rules={"conv": "epsilon", "Conv2d": "zplus"}).relevance)
    by_name = lrp(model, x, 1, rules={"0": "zplus", "3": "zplus", "Conv2d": "epsilon"}).relevance
    assert torch.equal(kind, by_name)


def test_what_has_no_rule_asks_for_one_and_takes_it():
    model = (
        nn.Sequential(nn.Flatten(), nn.Linear(8, 6, bias=False), nn.GELU(), nn.Linear(6, 3, bias=False)).double().eval()
    )
    x = images(2)
    with pytest.raises(Unsupported, match=r"no relevance rule for GELU, the module '2'.*pass rules="):
        lrp(model, x, 1)
    logits = model(x)[:, 1]
    passed = lrp(model, x, 1, rules={"GELU": "pass", "linear": "epsilon"})
    torch.testing.assert_close(passed.relevance.flatten(1).sum(1), logits)
    calls = []

    def rule(module, x, output, relevance):
        calls.append(torch.equal(output, F.gelu(x)))
        return relevance

    own = lrp(model, x, 1, rules={"2": rule, "linear": "epsilon"})
    assert calls == [True] and torch.equal(own.relevance, passed.relevance)
    # a whole part can be one rule
    part = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.Linear(6, 3)).double().eval()
    assert lrp(part, x, 1, rules={"1": "epsilon"}).layers.keys() == {"0", "1", "2"}


def test_biases_take_what_is_missing():
    model, x = cnn(bias=True), images()
    found = lrp(model, x, 1, rules=EPSILON)
    taken = found.score - found.relevance.flatten(1).sum(1)
    assert (taken.abs() > 1e-3).all()
    # with epsilon, what a bias takes is its own share: that of a constant input of 1
    zero = torch.zeros_like(x[:1])
    silent = lrp(model, zero, 1, rules=EPSILON)
    assert torch.equal(silent.relevance, zero) and silent.score.abs() > 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [cnn, Residual])
def test_batch_norm_is_merged_into_the_layer_before(make, bias):
    torch.manual_seed(5)
    model = make(bias=bias, norm=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.3)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    merged = copy.deepcopy(model)
    convs = (("0", "1"), ("4", "5")) if make is cnn else (("second", "bn"),)
    for conv, norm in convs:
        fused = nn.utils.fuse_conv_bn_eval(merged.get_submodule(conv), merged.get_submodule(norm))
        merged.set_submodule(conv, fused)
        merged.set_submodule(norm, nn.Identity())
    x = images()
    torch.testing.assert_close(merged(x), model(x))
    torch.testing.assert_close(lrp(model, x, 1).relevance, lrp(merged, x, 1).relevance)


def test_other_batch_norms_are_refused():
    x = images()
    lonely = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).double().eval()
    with pytest.raises(Unsupported, match="BatchNorm2d, the module '0': it follows no layer"):
        lrp(lonely, x, 1)
    assert lrp(lonely, x, 1, rules={"BatchNorm2d": "epsilon"}).relevance.shape == x.shape
    with pytest.raises(OptionError, match=r"module '1' is in training mode; call model.eval\(\)"):
        lrp(cnn(norm=True).train(), x, 1)
    with pytest.raises(OptionError, match=r"in training mode"):
        lrp(cnn().train(), x, 1)


def test_nothing_of_a_reading_is_left():
    model, x = cnn(), images()
    before, given = copy.deepcopy(model.state_dict()), x.clone()
    with torch.no_grad():
        found = lrp(model, x, 1)
    assert torch.equal(found.score, model(x)[:, 1].detach()) and torch.equal(x, given)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not found.relevance.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_rows_do_not_mix():
    model, x = cnn(bias=True), images()
    whole = lrp(model, x, torch.tensor([0, 3, 4])).relevance
    torch.testing.assert_close(lrp(model, x[1:2], 3).relevance, whole[1:2])
    likeliest = model(x).argmax(-1)
    assert torch.equal(lrp(model, x).classes, likeliest)
    assert torch.equal(lrp(model, x).relevance, lrp(model, x, likeliest).relevance)


def alexnet(width=1.0):
    """AlexNet as torchvision has it, without biases; width: of its channels."""
    c = [round(width * n) for n in (64, 192, 384, 256, 256, 4096)]

    def conv(a, b, kernel, **options):
        return [nn.Conv2d(a, b, kernel, bias=False, **options), nn.ReLU(inplace=True)]

    parts = [
        *conv(3, c[0], 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *conv(c[0], c[1], 5, padding=2),
        nn.MaxPool2d(3, 2),
    ]
    parts += [*conv(c[1], c[2], 3, padding=1), *conv(c[2], c[3], 3, padding=1), *conv(c[3], c[4], 3, padding=1)]
    parts += [nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Dropout()]
    for a, b in ((36 * c[4], c[5]), (c[5], c[5])):
        parts += [nn.Linear(a, b, bias=False), nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(*parts, nn.Linear(c[5], 1000, bias=False)).eval()


def vgg16(width=1.0):
    """VGG16 without biases; width: of its channels."""
    parts, before = [], 3
    for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            parts += [nn.Conv2d(before, round(width * channels), 3, padding=1, bias=False), nn.ReLU(inplace=True)]
            before = round(width * channels)
        parts.append(nn.MaxPool2d(2, 2))
    parts += [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    wide = round(width * 4096)
    for a, b in ((49 * before, wide), (wide, wide)):
        parts += [nn.Linear(a, b, bias=False), nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(*parts, nn.Linear(wide, 1000, bias=False)).eval()


@pytest.mark.parametrize("make, size", [(alexnet, 224), (vgg16, 64)])
def test_deep_networks_keep_relevance(make, size):
    model = make(0.125)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    x = images(size, 2, 3)
    found = lrp(model.double(), x)
    torch.testing.assert_close(found.relevance.flatten(1).sum(1), found.score, rtol=1e-4, atol=0)
    assert found.layers.keys() == {str(i) for i in range(len(model))}
    for name, reached in found.layers.items():
        torch.testing.assert_close(reached, found.score, rtol=1e-4, atol=0, msg=name)


def test_a_turned_image_has_a_turned_map():
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for i in (0, 3):
            model[i].weight.copy_(torch.stack([model[i].weight.rot90(k, (2, 3)) for k in range(4)]).mean(0))
    x = images(12)
    found, turned = (salient_relevance(model, given, 1, size=40) for given in (x, x.rot90(1, (2, 3))))
    torch.testing.assert_close(turned.relevance.relevance, found.relevance.relevance.rot90(1, (2, 3)))
    torch.testing.assert_close(turned.saliency, found.saliency.rot90(1, (2, 3)))
    assert found.saliency.flatten(1).std(1).min() > 0.01


def unlikeness(image, patch, neighbours, c, pyramid=(), step=1):
    """The formula of one scale, patch by patch; pyramid: the map at other scales, where patches are looked for too."""
    half = patch // 2

    def read(level):
        h, w = level.shape
        places = [(y, x) for y in range(0, h, step) for x in range(0, w, step)]

        def at(y, x):
            return float(level[min(max(y, 0), h - 1), min(max(x, 0), w - 1)])

        around = range(-half, half + 1)
        values = [np.array([at(y + i, x + j) for i in around for j in around]) for y, x in places]
        middles = [((y + 0.5) / max(h, w), (x + 0.5) / max(h, w)) for y, x in places]
        return list(zip(values, middles, strict=True))

    own = read(image)
    others = own + [seen for level in pyramid for seen in read(level)]
    out = []
    for i, (value, middle) in enumerate(own):
        distances = []
        for j, (other, place) in enumerate(others):
            if i != j:
                away = np.sqrt(((value - other) ** 2).sum()) / patch
                distances.append(away / (1 + c * math.dist(middle, place)))
        nearest = sorted(distances)[:neighbours]
        out.append(1 - math.exp(-sum(nearest) / len(nearest)))
    return torch.tensor(out, dtype=image.dtype).view([-(-n // step) for n in image.shape])


def scaled(m):
    return (m - m.min()) / (m.max() - m.min())


# every pixel has a patch, which is looked for at its own scale
PLAIN = {"size": None, "step": 1, "among": (1.0,)}


@pytest.mark.parametrize(
    "size, neighbours, c, patch", [((12, 12), 64, 3.0, 7), ((12, 12), 5, 0.0, 3), ((5, 9), 300, 2.0, 3)]
)
def test_one_scale_is_the_formula(size, neighbours, c, patch):
    image = torch.rand(size, dtype=torch.float64)
    # no focus passes 1
    found = context_aware_saliency(image, patch=patch, neighbours=neighbours, c=c, scales=(1.0,), focus=1.0, **PLAIN)
    wanted = scaled(unlikeness(scaled(image), patch, neighbours, c))
    torch.testing.assert_close(found, wanted)


def shrunk(image, size):
    return F.interpolate(image[None, None], size, mode="bilinear", antialias=True)[0, 0]


@pytest.mark.parametrize("scale, sides", [(1.0, (16, 7, 4)), (0.5, (7, 4)), (0.3, (4,))])
def test_patches_are_looked_for_at_smaller_scales_too_but_not_at_the_smallest(scale, sides):
    """Sides are those on which patches three pixels apart reach both borders."""
    image = scaled(torch.rand(16, 16, dtype=torch.float64))
    found = context_aware_saliency(image, size=None, patch=3, neighbours=8, scales=(scale,), focus=1.0)
    own, *pyramid = (image if side == 16 else shrunk(image, (side, side)) for side in sides)
    wanted = unlikeness(own, 3, 8, 3.0, pyramid, step=3)
    wanted = F.interpolate(wanted[None, None], own.shape, mode="bilinear", align_corners=True)
    wanted = F.interpolate(wanted, (16, 16), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(found, scaled(wanted))


def test_small_maps_are_brought_to_a_size_and_back():
    image = torch.rand(6, 10, dtype=torch.float64)
    large = F.interpolate(image[None, None], (24, 40), mode="bilinear")
    options = {"patch": 5, "neighbours": 16}
    found = context_aware_saliency(image, size=40, **options)
    wanted = shrunk(context_aware_saliency(large, size=None, **options)[0, 0], (6, 10))
    torch.testing.assert_close(found, wanted)
    assert found.shape == (6, 10)


def test_scales_are_averaged_and_foci_draw():
    image = torch.rand(12, 12, dtype=torch.float64)

    def read(scales, focus):
        return context_aware_saliency(image, patch=3, neighbours=8, scales=scales, focus=focus, **PLAIN)

    single = [read((scale,), 1.0) for scale in (1.0, 0.5)]
    mean = read((1.0, 0.5), 1.0)
    torch.testing.assert_close(mean, (single[0] + single[1]) / 2)
    found = read((1.0, 0.5), 0.6)
    foci = (mean > 0.6).nonzero().double()
    assert 0 < len(foci) < 100
    places = torch.cartesian_prod(torch.arange(12), torch.arange(12)).double()
    distance = torch.cdist(places, foci).amin(1).view(12, 12)
    torch.testing.assert_close(found, mean * (1 - distance / distance.max()))
    # the farthest place loses all, a focus nothing
    assert found.flatten()[distance.argmax()] == 0
    torch.testing.assert_close(found[mean > 0.6], mean[mean > 0.6])


def test_constant_maps_are_silent_and_a_blob_speaks():
    for size in (None, 40):
        still = context_aware_saliency(torch.full((2, 1, 16, 16), 0.3), size=size)
        assert torch.equal(still, torch.zeros(2, 1, 16, 16))
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    blob = (-((y - 7) ** 2 + (x - 15) ** 2).double() / 8).exp()
    for size in (None, 100):
        found = context_aware_saliency(blob, size=size)
        top = divmod(int(found.argmax()), 24)
        assert blob[top] > 0.5
        assert float(found.min()) >= 0 and float(found.max()) <= 1
        both = context_aware_saliency(torch.stack([blob, blob.T])[:, None], size=size)
        torch.testing.assert_close(both[0, 0], found)
        torch.testing.assert_close(both[1, 0], found.T)


def test_pixels_are_absolute_and_between_0_and_1():
    model, x = cnn(), images()
    found = salient_relevance(model, x, 1, size=30)
    summed = found.relevance.relevance.sum(1, keepdim=True).abs()
    for row in range(3):
        torch.testing.assert_close(found.pixels[row], scaled(summed[row]))
    assert found.saliency.shape == (3, 1, 6, 6)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rules": {"conv": "zpluss"}}, OptionError, "no rule 'zpluss'.*'zplus'"),
        ({"rules": {"cnov": "zplus"}}, OptionError, "'cnov', which is no kind, module or class here.*'conv'"),
        ({"rules": "papers"}, OptionError, 'rules is "paper" or a mapping'),
        ({"rules": {"conv": ("alphabeta", 1, 1)}}, OptionError, "alpha - beta is 1"),
        ({"rules": {"conv": ("zb", 1, 2)}}, OptionError, "low <= 0 <= high"),
        ({"rules": {"conv": ("epsilon", 1, 2)}}, OptionError, "takes no such settings"),
        ({"rules": {"mean": "zplus"}}, OptionError, "'zplus' is a rule for weights; '5' is a AvgPool2d"),
        ({"rules": {"conv": "winner"}}, OptionError, '"winner" is a rule for maxima'),
        ({"rules": {"mean": "pass"}}, OptionError, '"pass" needs a module that keeps the shape'),
        ({"eps": -1.0}, OptionError, "eps is 0 or more"),
        ({"target": 5}, OptionError, "classes 0 to 4"),
    ],
)
def test_rules_and_targets_that_cannot_be_are_refused(options, error, message):
    options = dict(options)
    with pytest.raises(error, match=message):
        lrp(cnn(), images(), options.pop("target", 1), **options)


class Written(nn.Module):
    """A network whose forward is given."""

    def __init__(self, forward):
        super().__init__()
        self.layer, self.forward_of = nn.Linear(4, 4), forward
        self.double().eval()

    def forward(self, x):
        return self.forward_of(self, x)


def _dropped(net, x):
    y = net.layer(x)
    y.relu_()
    return y


@pytest.mark.parametrize(
    "forward, message",
    [
        (lambda net, x: net.layer(x) if x.sum() > 0 else x, "torch.fx cannot trace Written"),
        (lambda net, x: torch.sigmoid(net.layer(x)), "no relevance rule for the call of sigmoid"),
        (lambda net, x: net.layer(x) * x, "no relevance rule for the call of mul"),
        (lambda net, x: {"logits": net.layer(x)}, "returns a .*dict; one tensor"),
        (_dropped, "relu_ changes a value in place"),
    ],
)
def test_networks_that_cannot_be_read_are_refused(forward, message):
    with pytest.raises(Unsupported, match=message):
        lrp(Written(forward), torch.randn(2, 4, dtype=torch.float64), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"patch": 4}, {"neighbours": 0}, {"c": -1.0}, {"scales": ()}, {"scales": (2.0,)}, {"focus": 2.0}, {"step": 0},
        {"size": 1}, {"among": ()}, {"among": (0.5,)},
    ],
)  # fmt: skip
def test_settings_of_areas_that_cannot_be_are_refused(options):
    with pytest.raises(OptionError):
        context_aware_saliency(torch.rand(8, 8), **options)


def test_areas_need_images():
    with pytest.raises(ShapeError, match="maps are"):
        context_aware_saliency(torch.rand(2, 3, 8, 8))
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    with pytest.raises(ShapeError, match="areas need images"):
        salient_relevance(model, torch.rand(2, 4), 1)


def test_figures():
    found = salient_relevance(cnn(), images(), 1, size=30)
    assert len(found.figure().data) == 6 and len(found.relevance.figure().data) == 3


def judged(pixels, areas, cells):
    """Of relevance and of areas: the share of their sum in the digit's cell, and of as many brightest places."""
    named = {"relevance": pixels, "salient relevance": areas}
    return {
        "mass in the digit's cell": {name: float(mass(m, cells).mean()) for name, m in named.items()},
        "share of the digit's cell among as many brightest places": {
            name: float(area(m, cells).mean()) for name, m in named.items()
        },
    }


def test_areas_hold_more_of_the_digit_than_pixels_do():
    data = Pasted()
    model = trained(data, epochs=4)
    shown, labels, cells, _ = read_rightly(model, data, 30)
    found = salient_relevance(model, shown, labels, size=100)
    torch.testing.assert_close(found.relevance.score, model(shown).gather(1, labels[:, None])[:, 0].detach())
    # chance is a quarter
    masses, shares = judged(found.pixels, found.saliency, cells).values()
    assert masses["salient relevance"] > masses["relevance"] > 0.25
    assert shares["salient relevance"] >= 1.3 * shares["relevance"]


@pytest.mark.slow
def test_salient_relevance_of_pasted_digits(record):
    """Of pixels 3/4 of the mass is in the cell already; 1.3 times as much is asked of the brightest places alone."""
    data = Pasted()
    figures = {}
    for bias in (True, False):
        model = trained(data, epochs=30, bias=bias)
        shown, labels, cells, accuracy = read_rightly(model, data, 40)
        found = salient_relevance(model, shown, labels)
        kept = found.relevance.relevance.flatten(1).sum(1) / found.relevance.score
        small = context_aware_saliency(found.pixels, size=None, step=1, among=(1.0,))
        figures["with biases" if bias else "without biases"] = {
            "accuracy": accuracy,
            "images": len(shown),
            "maps of 250 pixels": judged(found.pixels, found.saliency, cells),
            "maps of 16 pixels": judged(found.pixels, small, cells),
            "relevance kept": {"median": float(kept.median()), "largest error": float((kept - 1).abs().max())},
        }
    record(figures)
    assert figures["without biases"]["relevance kept"]["largest error"] < 1e-3
    for row in figures.values():
        masses, shares = row["maps of 250 pixels"].values()
        assert row["accuracy"] >= 0.9 and shares["salient relevance"] >= 1.3 * shares["relevance"]
        assert masses["salient relevance"] >= masses["relevance"] + 0.05


@pytest.mark.slow
def test_relevance_kept_by_alexnet_and_vgg16(record):
    errors = {}
    for make in (alexnet, vgg16):
        found = lrp(make(), torch.randn(1, 3, 224, 224))
        errors[make.__name__] = max(float((reached / found.score - 1).abs()) for reached in found.layers.values())
    record({"largest error of a layer's sum, relative, float32, random weights": errors})
    assert max(errors.values()) < 1e-3
