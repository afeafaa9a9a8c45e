"""Our saliency methods where captum expects its own; captum is installed for these tests alone."""

from functools import partial

import pytest
import torch
from torch import nn

from regard import MissingExtra, ShapeError, as_captum, gradcam, linear_approx, lrp, normgrad, saliency
from regard.explain.saliency import as_captum as room


def relevance(model, x, target):
    return lrp(model, x, target).relevance


METHODS = {
    "gradcam": partial(gradcam, layer="2"),
    "normgrad": partial(normgrad, layer="2"),
    "linear_approx": partial(linear_approx, layer="2"),
    "saliency": partial(saliency, layer="0", extract="conv3x3"),
    "lrp": relevance,
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def images(batch=3):
    return torch.randn(batch, 3, 12, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def attr():
    return pytest.importorskip("captum.attr", reason="captum is not installed")


@pytest.fixture
def metrics():
    return pytest.importorskip("captum.metrics", reason="captum is not installed")


@pytest.mark.parametrize("name", METHODS)
def test_an_attribution_has_the_inputs_shape_and_sums_to_the_map(name, attr):
    model, x = network(), images()
    method = as_captum(METHODS[name], model)
    assert isinstance(method, attr.Attribution) and method.forward_func is model
    for target in (2, torch.tensor([0, 4, 2]), None):
        found = method.attribute(x, target=target)
        assert found.shape == x.shape
        own = METHODS[name](model, x, target)
        if name == "lrp":
            assert torch.equal(found, own)
        else:
            enlarged = nn.functional.interpolate(own, (12, 10), mode="bilinear")
            torch.testing.assert_close(found.sum(1, keepdim=True), enlarged)
        (one,) = method.attribute((x,), target=target)
        assert torch.equal(one, found)
    with pytest.raises(ShapeError, match="one input is read, not 2"):
        method.attribute((x, x))


@pytest.mark.parametrize("name", METHODS)
def test_captums_metrics_take_it(name, metrics):
    model, x = network(), images()
    method = as_captum(METHODS[name], model)
    torch.manual_seed(0)
    sensitivity = metrics.sensitivity_max(method.attribute, x, target=2, n_perturb_samples=4, perturb_radius=0.05)
    assert sensitivity.shape == (3,) and bool((sensitivity > 0).all()) and bool(sensitivity.isfinite().all())
    still = metrics.sensitivity_max(method.attribute, x, lambda x: x, target=2, n_perturb_samples=2)
    torch.testing.assert_close(still, torch.zeros(3), atol=1e-5, rtol=0)

    def perturb(inputs):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    torch.manual_seed(0)
    given = method.attribute(x, target=2)
    infidelity = metrics.infidelity(model, perturb, x, given, target=2, n_perturb_samples=20, normalize=True)
    assert infidelity.shape == (3,) and bool(infidelity.isfinite().all())


def test_what_is_faithful_is_so_by_captums_measure(metrics):
    # of a linear model, gradients tell all: no perturbation finds them wrong
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 10, 5)).eval()
    x = images()

    def gradient(model, x, target):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(model(x)[:, target].sum(), x)[0]

    def perturb(inputs):
        noise = torch.randn_like(inputs)
        return noise, inputs - noise

    right = as_captum(gradient, model).attribute(x, target=1)
    assert metrics.infidelity(model, perturb, x, right, target=1).max() < 1e-6
    assert metrics.infidelity(model, perturb, x, -right, target=1).min() > 1e-2


def test_the_noise_tunnel_takes_it(attr):
    model, x = network(), images()
    method = as_captum(METHODS["normgrad"], model)
    tunnel = attr.NoiseTunnel(method)
    torch.manual_seed(0)
    smooth = tunnel.attribute(x, nt_type="smoothgrad", nt_samples=3, stdevs=0.0, target=2)
    torch.testing.assert_close(smooth, method.attribute(x, target=2))
    noisy = tunnel.attribute(x, nt_type="smoothgrad", nt_samples=3, stdevs=0.3, target=2)
    assert noisy.shape == x.shape and not torch.allclose(noisy, smooth)


def test_maps_of_another_shape_are_refused(attr):
    with pytest.raises(ShapeError, match=r"gives \(3, 4\) for \(3, 3, 12, 10\)"):
        as_captum(lambda model, x, target: torch.ones(3, 4), network()).attribute(images())


def test_without_captum_it_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(room, "installed", lambda module: False)
    with pytest.raises(MissingExtra, match=r"as_captum needs 'captum'.*pip install captum"):
        as_captum(METHODS["normgrad"], network())
