"""NormGrad is the gradient of a real identity layer; steps of learning leave a model as it was."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import (
    OptionError,
    ShapeError,
    Unsupported,
    class_sensitivity,
    combine_layers,
    gradcam,
    identity_gradients,
    linear_approx,
    map_view,
    meta_saliency,
    normgrad,
    saliency,
)  # fmt: skip
from regard.explain.saliency.normgrad import _reduced
from regard.hosts.transformers.specimens import make
from tests.explain.pasted_digits import Pasted, pointed, read_rightly, trained

EXTRACTS = ("conv1x1", "conv3x3", "depthwise3x3", "scaling", "bias")
REDUCES = ("norm", "filter_norm", "sum", "max")


def network(channels=6, classes=5, padding_mode="zeros", inplace=True, norm=False):
    """Two strided convolutions, pooled."""

    def conv(a, b, stride=1):
        return nn.Conv2d(a, b, 3, padding=1, stride=stride, padding_mode=padding_mode)

    parts = [conv(1, channels), nn.ReLU(inplace), conv(channels, channels, 2), nn.ReLU(inplace)]
    parts += [nn.BatchNorm2d(channels)] if norm else [nn.Identity()]
    parts += [nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*parts).eval()


def explicit(x, g, extract):
    """identity_gradients place by place and weight by weight."""
    b, c, h, w = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    places = []
    for y in range(h):
        for z in range(w):
            gu, xu, around = g[:, :, y, z], x[:, :, y, z], padded[:, :, y : y + 3, z : z + 3].reshape(b, c, 9)
            share = {
                "bias": lambda gu=gu: gu,
                "scaling": lambda gu=gu, xu=xu: gu * xu,
                "conv1x1": lambda gu=gu, xu=xu: torch.einsum("bo,bi->boi", gu, xu),
                "conv3x3": lambda gu=gu, a=around: torch.einsum("bo,bik->boik", gu, a),
                "depthwise3x3": lambda gu=gu, a=around: torch.einsum("bc,bck->bck", gu, a),
            }[extract]()
            places.append(share.flatten(1))
    return torch.stack(places, -1).unflatten(-1, (h, w))


def reduced(parts, how):
    if how == "norm":
        return parts.square().sum(1, keepdim=True).sqrt()
    if how == "filter_norm":
        return parts.clamp(min=0).square().sum(1, keepdim=True).sqrt()
    return parts.sum(1, keepdim=True) if how == "sum" else parts.max(1, keepdim=True).values


def by_hand(model, x, target, layer):
    """Activation and gradient behind layer number `layer` of a Sequential without parts that work in place."""
    a = x
    for part in model[: layer + 1]:
        a = part(a)
    a = a.detach().requires_grad_()
    out = a
    for part in model[layer + 1 :]:
        out = part(out)
    (g,) = torch.autograd.grad(out.gather(1, target[:, None]).sum(), a)
    return a.detach(), g


@pytest.mark.parametrize("extract", EXTRACTS)
@pytest.mark.parametrize("reduce", REDUCES)
def test_a_cell_is_the_explicit_gradients_reduced(extract, reduce):
    x, g = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    parts = explicit(x, g, extract)
    torch.testing.assert_close(identity_gradients(x, g, extract), parts)
    torch.testing.assert_close(_reduced(x, g, extract, reduce), reduced(parts, reduce))


@pytest.mark.parametrize("extract", EXTRACTS)
def test_the_shares_are_those_of_a_real_identity_layer(extract):
    model = network(inplace=False).double()
    x, target = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    c = 6
    kernel = torch.zeros(c, 1, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 1] = 1
    eye = torch.eye(c, dtype=torch.float64)
    weight = {
        "bias": torch.zeros(c, dtype=torch.float64), "scaling": torch.ones(c, dtype=torch.float64),
        "conv1x1": eye[:, :, None, None], "conv3x3": eye[:, :, None, None] * kernel[:1], "depthwise3x3": kernel,
    }[extract].requires_grad_()  # fmt: skip
    inserted = {
        "bias": lambda a: a + weight[:, None, None],
        "scaling": lambda a: a * weight[:, None, None],
        "conv1x1": lambda a: F.conv2d(a, weight),
        "conv3x3": lambda a: F.conv2d(a, weight, padding=1),
        "depthwise3x3": lambda a: F.conv2d(a, weight, padding=1, groups=c),
    }[extract]
    before = model[:2](x)
    out = model[2:](inserted(before))
    torch.testing.assert_close(out, model(x))
    (wanted,) = torch.autograd.grad(out.gather(1, target[:, None]).sum(), weight)
    a, g = by_hand(model, x, target, 1)
    shares = identity_gradients(a, g, extract)
    torch.testing.assert_close(shares.sum((0, 2, 3)), wanted.flatten())


@pytest.mark.parametrize("inplace", [False, True])
def test_the_layer_is_read_before_what_works_in_place_behind_it(inplace):
    torch.manual_seed(0)
    model = network(inplace=inplace)
    plain = network(inplace=False)
    plain.load_state_dict(model.state_dict())
    x, target = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 2])
    a, g = by_hand(plain, x, target, 0)
    assert (a < 0).any()
    found = linear_approx(model, x, target, layer="0")
    torch.testing.assert_close(found, (a * g).sum(1, keepdim=True))
    torch.testing.assert_close(
        normgrad(model, x, target, layer="0"), a.norm(dim=1, keepdim=True) * g.norm(dim=1, keepdim=True)
    )
    assert found.shape == (3, 1, 8, 8) and (found < 0).any() and (found > 0).any()


def test_targets_are_classes_rows_functions_or_the_likeliest():
    model = network()
    x = torch.randn(3, 1, 8, 8)
    likeliest = model(x).argmax(-1)
    read = partial(normgrad, model, x, layer="2")
    assert torch.equal(read(), read(likeliest))
    assert torch.equal(read(2), read(torch.tensor([2, 2, 2])))
    torch.testing.assert_close(read(lambda out: 2 * out[:, 1]), 2 * read(1))
    for row in range(3):
        torch.testing.assert_close(normgrad(model, x[row : row + 1], 2, layer="2"), read(2)[row : row + 1])


def test_maps_are_enlarged_and_brought_between_0_and_1():
    model, x = network(), torch.randn(2, 1, 8, 8)
    small = normgrad(model, x, 1, layer="2")
    large = normgrad(model, x, 1, layer="2", upsample=(8, 8), normalize=True)
    assert small.shape == (2, 1, 4, 4) and large.shape == (2, 1, 8, 8)
    assert torch.equal(large.amin((1, 2, 3)), torch.zeros(2)) and torch.equal(large.amax((1, 2, 3)), torch.ones(2))


def test_nothing_of_a_reading_is_left():
    model, x = network(), torch.randn(2, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    saliency(model, x, 1, layer="2")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_frozen_weights_change_nothing():
    model, x = network(), torch.randn(2, 1, 8, 8)
    wanted = normgrad(model, x, 1, layer="2")
    model.requires_grad_(False)
    assert torch.equal(normgrad(model, x, 1, layer="2"), wanted)


def test_layers_by_number_are_read_under_frozen_weights_too():
    model, x = make("vit"), torch.randn(2, 3, 16, 16)
    wanted = normgrad(model, x, first_token, layer=0)
    model.requires_grad_(False)
    torch.testing.assert_close(normgrad(model, x, first_token, layer=0), wanted)
    language = make("llama").requires_grad_(False)
    with pytest.raises(Unsupported, match="no gradient reaches resid_post of layer 1"):
        normgrad(language, torch.arange(12).view(1, 12), lambda out: out.logits[:, -1, 3], layer=1, grid=(3, 4))


def first_token(output):
    return output.last_hidden_state[:, 0, :3].sum(-1)


def test_maps_move_with_the_image_by_the_stride():
    model = network(padding_mode="circular").double()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    moved = x.roll((4, 2), (2, 3))
    for extract in EXTRACTS:
        one, other = (saliency(model, images, 1, layer="1", extract=extract) for images in (x, moved))
        # a border of zeros stands around the places of a 3 x 3 layer
        inner = (slice(None), slice(None), slice(5, 11), slice(3, 11))
        torch.testing.assert_close(one.roll((4, 2), (2, 3))[inner], other[inner])
    deep = normgrad(model, x, 1, layer="3").roll((2, 1), (2, 3))
    torch.testing.assert_close(deep, normgrad(model, moved, 1, layer="3"))


def test_a_bias_before_the_average_says_nothing():
    model, x = network(), torch.randn(2, 1, 8, 8)
    flat = saliency(model, x, 1, layer="3", extract="bias")
    assert torch.equal(flat, flat[:, :, :1, :1].expand_as(flat)) and (flat > 0).all()
    assert normgrad(model, x, 1, layer="3").flatten(1).std(1).min() > 0


def test_layers_are_combined_by_products():
    maps = [torch.rand(2, 1, 4, 4), torch.rand(2, 1, 8, 8)]
    large = [F.interpolate(m, size=(8, 8), mode="bilinear", align_corners=False) for m in maps]
    scaled = [
        (m - m.amin((2, 3), keepdim=True)) / (m.amax((2, 3), keepdim=True) - m.amin((2, 3), keepdim=True))
        for m in large
    ]
    torch.testing.assert_close(combine_layers(maps, (8, 8)), scaled[0] * scaled[1])
    weighted = combine_layers(maps, (8, 8), how="weighted", weights=(3, 1))
    torch.testing.assert_close(weighted, scaled[0] ** 0.75 * scaled[1] ** 0.25)
    torch.testing.assert_close(combine_layers(maps, (8, 8), how="weighted", weights=(1, 0)), scaled[0])
    equal = combine_layers(maps, (8, 8), how="weighted")
    torch.testing.assert_close(equal, (scaled[0] * scaled[1]).sqrt())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("error", [False, True])
def test_a_meta_step_leaves_every_bit(training, error):
    model = network(norm=True).train(training)
    model[0].eval()
    model[2].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {name: (t, t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 1, 8, 8)
    seen = []

    def method(model, x, target):
        seen.append([p.detach().clone() for p in model.parameters()])
        model(x)
        if error and len(seen) > 1:
            raise ValueError("mine")
        return normgrad(model, x, target, layer="2")

    if error:
        with pytest.raises(ValueError, match="mine"):
            meta_saliency(method, model, x, 1, lr=0.1)
    else:
        assert meta_saliency(method, model, x, 1, lr=0.1).shape == (2, 1, 4, 4)
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == state.keys()
    assert all(now[name] is t and torch.equal(t, before) for name, (t, before) in state.items())
    assert [m.training for m in model.modules()] == modes
    assert not model[2].weight.requires_grad and model[0].weight.requires_grad
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[0].bias.grad is None
    # what the method saw was another model
    assert all(not torch.equal(p, q) for p, q in zip(seen[0], (b for _, b in state.values()), strict=False))


def test_a_meta_step_is_one_of_gradient_descent_row_by_row():
    model, x, target = network(), torch.randn(2, 1, 8, 8), torch.tensor([1, 4])
    read = partial(normgrad, layer="2")
    base = read(model, x, target)
    torch.testing.assert_close(meta_saliency(read, model, x, target, lr=0.0), base)
    found = meta_saliency(read, model, x, target, lr=0.1, steps=2)
    for row in range(2):
        learned = copy.deepcopy(model)
        optimizer = torch.optim.SGD(learned.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(learned(x[row : row + 1]), target[row : row + 1]).backward()
            optimizer.step()
        wanted = read(learned, x[row : row + 1], target[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted)
    changed = meta_saliency(read, model, x, target, lr=0.1, steps=2, difference=True)
    torch.testing.assert_close(changed, found - base)
    assert (changed != 0).any()


def test_a_model_in_training_is_learned_in_evaluation():
    model, x = network(norm=True), torch.randn(2, 1, 8, 8)
    read = partial(meta_saliency, partial(normgrad, layer="2"), lr=0.1)
    wanted = read(copy.deepcopy(model), x, 1)
    assert torch.equal(read(model.train(), x, 1), wanted) and model.training


def test_sensitivity_is_the_correlation_of_two_maps():
    model, x = network(), torch.randn(3, 1, 8, 8)
    logits = model(x)
    read = partial(linear_approx, layer="2")
    found = class_sensitivity(read, model, x)
    assert torch.equal(found.most, logits.argmax(-1)) and torch.equal(found.least, logits.argmin(-1))
    first, second = read(model, x, found.most), read(model, x, found.least)
    for row in range(3):
        pair = torch.stack((first[row].flatten(), second[row].flatten()))
        torch.testing.assert_close(found.correlation[row], torch.corrcoef(pair)[0, 1])
    assert class_sensitivity(lambda m, x, t: first, model, x).mean == pytest.approx(1)
    assert class_sensitivity(lambda m, x, t: torch.ones(3, 1, 4, 4), model, x).mean == 1
    rows = iter((first, torch.ones(3, 1, 4, 4)))
    assert class_sensitivity(lambda m, x, t: next(rows), model, x).mean == 0


def test_tokens_of_a_vision_transformer_are_a_map():
    model = make("vit")
    x = torch.randn(2, 3, 16, 16)

    def target(output):
        return output.last_hidden_state[:, 0, :3].sum(-1)

    found = normgrad(model, x, target, layer=0)
    assert found.shape == (2, 1, 4, 4) and (found > 0).all()
    named = normgrad(
        model,
        {"pixel_values": x},
        target,
        layer="layers.0" if hasattr(model, "layers") else "encoder.layer.0",
        grid=(4, 4),
    )
    torch.testing.assert_close(named, found)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(OptionError, match="depends on no place"):
        normgrad(model, x, target, layer=-1)


def test_the_same_method_call_serves_grad_cam():
    model = make("vit")
    head = Classifier(model)
    x = torch.randn(2, 3, 16, 16)
    found = class_sensitivity(partial(normgrad, layer="vit", grid=(4, 4)), head, x)
    assert found.correlation.shape == (2,)
    maps = gradcam(model, x, lambda out: out.last_hidden_state[:, 1:].mean((1, 2)), site="resid_post")
    assert map_view(maps, x).maps.shape == (2, 1, 4, 4)


class Classifier(nn.Module):
    """Logits from the mean of a vision transformer's patches; the part called vit gives tokens."""

    def __init__(self, vit):
        super().__init__()
        self.body, self.vit, self.head = vit, nn.Identity(), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.vit(self.body(x).last_hidden_state)[:, 1:].tanh().mean(1))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"layer": "7"}, ShapeError, r"the module '7' gives \(2, 6\); a map needs \(B, C, h, w\)"),
        ({"layer": "12"}, OptionError, "Sequential has no module '12'"),
        ({"layer": "2", "target": 5}, OptionError, "classes 0 to 4, not 5"),
        ({"layer": "2", "target": -1}, OptionError, "classes 0 to 4"),
        ({"layer": "2", "target": torch.tensor([1, 2, 3])}, OptionError, "one for each of 2 rows"),
        ({"layer": "2", "target": 1.5}, OptionError, "target is a class"),
        ({"layer": "2", "target": lambda out: out}, OptionError, "one number a row"),
        ({"layer": "2", "target": lambda out: torch.ones(2)}, OptionError, "depends on no place"),
        ({"layer": "2", "extract": "conv2x2"}, OptionError, "did you mean"),
        ({"layer": "2", "reduce": "mean"}, OptionError, "reduce='mean' is not known"),
        ({"layer": 1}, Unsupported, "no host knows a torch"),
    ],
)
def test_what_makes_no_map_is_refused(options, error, message):
    options = dict(options)
    with pytest.raises(error, match=message):
        saliency(network(), torch.randn(2, 1, 8, 8), options.pop("target", None), **options)


def test_other_misuse_is_refused():
    x = torch.randn(2, 1, 8, 8)
    twice = nn.Sequential(*[nn.ReLU()] * 2, nn.Flatten())
    with pytest.raises(Unsupported, match="ran 2 times"):
        normgrad(twice, x, layer="0")
    with pytest.raises(OptionError, match="lr is 0 or more"):
        meta_saliency(partial(normgrad, layer="2"), network(), x, lr=-1.0)
    with pytest.raises(OptionError, match="cannot be a function"):
        meta_saliency(partial(normgrad, layer="2"), network(), x, lambda out: out[:, 0])
    with pytest.raises(OptionError, match="classes 0 to 4"):
        meta_saliency(partial(normgrad, layer="2"), network(), x, 7)
    for options in (
        {"how": "sum"},
        {"weights": (1, 1)},
        {"how": "weighted", "weights": (1,)},
        {"how": "weighted", "weights": (0, 0)},
    ):
        with pytest.raises(OptionError):
            combine_layers([torch.rand(1, 1, 4, 4)] * 2, (8, 8), **options)
    with pytest.raises(ShapeError, match="maps are"):
        map_view(torch.rand(2, 3, 4, 4))
    with pytest.raises(ShapeError, match="3 titles"):
        map_view(torch.rand(2, 1, 4, 4), titles=("a", "b", "c"))


def test_figures():
    model, x = network(), torch.randn(2, 1, 8, 8)
    figure = map_view(normgrad(model, x, 1, layer="2"), x, titles=("a", "b")).figure()
    assert len(figure.data) == 4 and figure.data[0].z.shape == (4, 4) and figure.data[1].z.shape == (8, 8)
    assert len(map_view(normgrad(model, x, 1, layer="2")).figure().data) == 2
    assert class_sensitivity(partial(normgrad, layer="2"), model, x).figure().data[0].x is not None


def test_the_map_points_at_the_digit_and_learning_makes_it_depend_on_the_class():
    data = Pasted()
    model = trained(data, epochs=4)
    images, labels, cells, _ = read_rightly(model, data, 40)
    # four rounds of learning; chance is a quarter
    assert pointed(normgrad(model, images, labels, layer="3"), cells) >= 0.75
    read = partial(normgrad, layer="3")
    learned = partial(meta_saliency, read, lr=0.1)
    assert class_sensitivity(learned, model, images[:10]).mean < class_sensitivity(read, model, images[:10]).mean


@pytest.mark.slow
def test_saliency_points_at_pasted_digits(record):
    data = Pasted()
    model = trained(data, epochs=30)
    images, labels, cells, accuracy = read_rightly(model, data, 300)
    points = {
        f"{extract} {reduce}, layer {layer}": pointed(
            saliency(model, images, labels, layer=layer, extract=extract, reduce=reduce), cells
        )
        for layer in ("1", "3", "5")
        for extract in EXTRACTS
        for reduce in REDUCES
    }
    layers = [normgrad(model, images, labels, layer=layer) for layer in ("1", "3", "5")]
    points["product of layers"] = pointed(combine_layers(layers, (16, 16)), cells)
    sensitivity = {}
    for layer in ("3", "5"):
        read = partial(normgrad, layer=layer)
        sensitivity[f"layer {layer}, plain"] = class_sensitivity(read, model, images[:60]).mean
        for lr in (1e-4, 1e-3, 1e-2, 1e-1):
            learned = partial(meta_saliency, read, lr=lr)
            found = class_sensitivity(learned, model, images[:60]).mean
            sensitivity[f"layer {layer}, after a step of {lr:g}"] = found
            if lr >= 1e-2:
                assert found < sensitivity[f"layer {layer}, plain"] - 0.05
                points[f"normgrad, layer {layer}, after a step of {lr:g}"] = pointed(
                    meta_saliency(read, model, images, labels, lr=lr), cells
                )
    record({"accuracy": accuracy, "images": len(images), "pointed at the digit": points, "correlation": sensitivity})
    assert accuracy >= 0.9
    assert all(points[f"conv1x1 norm, layer {layer}"] >= 0.95 for layer in ("1", "3", "5"))
    assert points["product of layers"] >= 0.95
