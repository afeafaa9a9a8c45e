"""Class activation maps against sums by hand, and where they point."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from regard import OptionError, ShapeError, Unsupported, cam, gradcam
from regard.hosts.transformers.session import TransformersSession
from tests.explain.digit_vit import digits, in_a_cell, trained


def classifier(**changes):
    """A small vision transformer with random weights that are large enough to tell images apart."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = hf.ViTConfig(**{"image_size": 16, "patch_size": 4, "num_labels": 5, **sizes, **changes})
    model = hf.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def pooled(output):
    """A score that is linear in the mean of the patches."""
    return output.last_hidden_state[:, 1:].mean(1) @ torch.linspace(-1, 1, 32)


def by_hand(model, images, target, module):
    """Grad-CAM with a hook and a reshape of one's own; the stream that enters a layer."""
    held = []
    hook = module.register_forward_pre_hook(lambda m, args: held.append(args[0]))
    logits = model(images).logits
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), held[0])
    maps = []
    for x, g in zip(held[0][:, 1:].detach(), gradient[:, 1:], strict=True):
        maps.append((x * g.mean(0)).sum(-1).relu().view(1, 4, 4))
    return torch.stack(maps)


@pytest.mark.parametrize("layer", [-1, 1])
def test_gradcam_is_the_one_with_a_hook_and_a_reshape(model, images, layer):
    wanted = by_hand(model, images, torch.tensor([2, 2, 2]), model.vit.layers[layer])
    found = gradcam(model, images, 2, layer=layer)
    assert found.shape == (3, 1, 4, 4) and (found >= 0).all() and found.max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_targets_are_a_class_one_a_row_a_function_or_the_likeliest(model, images):
    rows = torch.tensor([4, 0, 1])
    each = gradcam(model, images, rows)
    for i, target in enumerate(rows.tolist()):
        torch.testing.assert_close(each[i : i + 1], gradcam(model, images[i : i + 1], target), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradcam(model, images, lambda output: output.logits[:, 3]), gradcam(model, images, 3))
    likeliest = model(images).logits.argmax(-1)
    torch.testing.assert_close(gradcam(model, images), gradcam(model, images, likeliest))
    named = gradcam(model, {"pixel_values": images, "interpolate_pos_encoding": False}, 3)
    torch.testing.assert_close(named, gradcam(model, images, 3))


def test_the_mean_of_a_class_activation_map_is_the_score(images):
    model = hf.ViTModel(classifier().config).eval()
    found = cam(model, images, pooled, site="final")
    score = pooled(model(images))
    torch.testing.assert_close(found.mean((1, 2, 3)), score, rtol=1e-4, atol=1e-5)
    assert found.shape == (3, 1, 4, 4) and found.min() < 0 < found.max()
    x = model(images).last_hidden_state[:, 1:].detach()
    torch.testing.assert_close(found.flatten(1), x @ torch.linspace(-1, 1, 32), rtol=1e-4, atol=1e-5)


def test_scores_that_are_not_linear_in_the_mean_have_no_class_activation_map(model, images):
    with pytest.raises(Unsupported, match="ViTForImageClassification does not read the mean over places at resid_post"):
        cam(model, images, 1)
    with pytest.raises(Unsupported, match="resid_pre of layer -1"):
        cam(hf.ViTModel(model.config).eval(), images, pooled, site="resid_pre")


def test_what_leaves_the_last_layer_is_refused_where_the_class_token_alone_is_read(model, images):
    with pytest.raises(OptionError, match=r"depends on no place at resid_post of layer -1: .* take an earlier layer"):
        gradcam(model, images, 1, site="resid_post")
    assert gradcam(model, images, 1, layer=-2, site="resid_post").max() > 0


class Convolutions(nn.Module):
    """A network as class activation maps were made for: convolutions, a mean over places, one linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, padding=1))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def test_convolutions_are_read_by_the_name_of_a_module(images):
    torch.manual_seed(0)
    network = Convolutions().eval()
    features = network.features(images).detach()
    weight = network.head.weight[3].detach()
    wanted = torch.einsum("bchw,c->bhw", features, weight)[:, None]
    torch.testing.assert_close(cam(network, images, 3, layer="features"), wanted, rtol=1e-4, atol=1e-6)
    # there Grad-CAM is the same, without what speaks against the class, over the number of places
    torch.testing.assert_close(gradcam(network, images, 3, layer="features"), wanted.relu() / 64, rtol=1e-4, atol=1e-6)
    with pytest.raises(Unsupported, match=r"'features\.0'"):
        cam(network, images, 3, layer="features.0")
    with pytest.raises(OptionError, match="did you mean 'features'"):
        gradcam(network, images, 3, layer="feature")


def test_maps_are_enlarged_and_scaled_when_asked(model, images):
    plain = gradcam(model, images, 2)
    large = gradcam(model, images, 2, upsample=(16, 16), normalize=True)
    assert large.shape == (3, 1, 16, 16)
    wanted = F.interpolate(plain, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(large[0], (wanted[0] - wanted[0].min()) / (wanted[0].max() - wanted[0].min()))
    flat = gradcam(model, images, 2, normalize=True).flatten(1)
    assert flat.amin(1).tolist() == [0, 0, 0] and flat.amax(1).max() == 1


def test_the_first_component_keeps_what_channels_share(images):
    torch.manual_seed(0)
    network = Convolutions().eval()
    features = network.features(images).detach().double()
    terms = features * network.head.weight[3].detach().double()[:, None, None] / 64
    found = gradcam(network, images, 3, layer="features", eigen_smooth=True)
    for row in range(3):
        table = terms[row].flatten(1).T
        values, vectors = torch.linalg.eigh(torch.cov(table.T))
        assert values[-1] > 1.02 * values[-2]
        along = table @ vectors[:, -1]
        sums = table.sum(1)
        along = along * torch.corrcoef(torch.stack((along, sums)))[0, 1].sign()
        torch.testing.assert_close(found[row].flatten().double(), along.relu(), rtol=1e-3, atol=1e-5)
    plain = gradcam(network, images, 3, layer="features")
    assert found.shape == plain.shape and not torch.allclose(found, plain, rtol=0.1)
    # where all channels say the same it is Grad-CAM, up to its size
    with torch.no_grad():
        network.head.weight[3].fill_(1.0)
        network.features[2].weight.copy_(network.features[2].weight[:1].expand(6, -1, -1, -1))
        network.features[2].bias.fill_(0.1)
    smooth, plain = (gradcam(network, images, 3, layer="features", eigen_smooth=on) for on in (True, False))
    torch.testing.assert_close(smooth * 6**0.5, plain, rtol=1e-4, atol=1e-6)


def test_grids_that_the_model_does_not_tell(monkeypatch):
    model = classifier(image_size=(8, 24))
    images = torch.randn(2, 3, 8, 24)
    told = gradcam(model, images, 1)
    assert told.shape == (2, 1, 2, 6)
    monkeypatch.setattr(TransformersSession, "facts", lambda self: {})
    torch.testing.assert_close(gradcam(model, images, 1, grid=(2, 6)), told)
    with pytest.raises(OptionError, match=r"give grid=\(h, w\)"):
        gradcam(model, images, 1)
    with pytest.raises(ShapeError, match="13 tokens are not 2 and a grid of 2 x 6"):
        gradcam(model, images, 1, grid=(2, 6), prefix_tokens=2)


def test_nothing_is_left_behind_and_frozen_models_are_read(images):
    model = classifier()
    wanted = gradcam(model, images, 2)
    assert all(p.grad is None for p in model.parameters())
    before = model(images).logits
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(gradcam(model, images, 2), wanted)
        assert torch.equal(model(images).logits, before)
    assert not images.requires_grad


@pytest.mark.parametrize(
    "target, message",
    [
        (5, "there are classes 0 to 4, not"),
        (-1, "there are classes 0 to 4, not"),
        (torch.tensor([1, 2]), "one for each of 3 rows"),
        (torch.tensor([1.0, 2.0, 3.0]), "one for each of 3 rows"),
        (lambda output: output.logits, r"one number a row is needed"),
    ],
)
def test_bad_targets_are_refused(model, images, target, message):
    with pytest.raises(OptionError, match=message):
        gradcam(model, images, target)


def test_models_without_logits_need_a_function(images):
    model = hf.ViTModel(classifier().config).eval()
    with pytest.raises(OptionError, match="give target= as a function of its output"):
        gradcam(model, images, 1)


@pytest.mark.slow
def test_gradcam_of_a_transformer_points_at_the_digit_more_often_than_chance(record):
    model = trained(steps=1500, cells=True)
    plain, labels = digits("test")
    images, cells = in_a_cell(plain, torch.Generator().manual_seed(9))
    with torch.no_grad():
        right = model(images).logits.argmax(-1) == labels

    def judged(maps):
        """The share of maps whose largest place is in the digit's cell, and the mean share of a map that lies there."""
        by_cell = (
            maps[right].unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        best, own = by_cell.amax(-1).argmax(-1), cells[right]
        mass = by_cell.sum(-1)
        share = mass / mass.sum(-1, keepdim=True).clamp(min=1e-12)
        return {
            "pointing": float((best == own).float().mean()),
            "mass": float(share.gather(1, own[:, None]).mean()),
        }

    found = {f"resid_pre of layer {layer}": judged(gradcam(model, images, labels, layer=layer)) for layer in range(3)}
    record(
        {
            "task": "a digit in one of four cells of noise, 8 x 8 patches; images that are read rightly",
            "chance": 0.25,
            "images": int(right.sum()),
            "accuracy": float(right.float().mean()),
            "gradcam": found,
            "brightness of patches": judged(F.avg_pool2d(images, 2)),
        }
    )
    # three standard deviations of as many guesses
    bar = 0.25 + 3 * (0.25 * 0.75 / int(right.sum())) ** 0.5
    assert all(each["pointing"] > bar and each["mass"] > 0.25 for each in found.values())
