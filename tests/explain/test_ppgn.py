"""Plug and play generation against chains by hand, where its laws are known, and on real digits."""

import math
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import PPGN, OptionError, ShapeError, Unsupported, caption_condition, class_condition, unit_condition
from regard.models.generative.ppgn import SIZES, CodeEncoder, UpconvGenerator, adversarial_losses
from regard.models.generative.ppgn import feature_loss as features_lost
from regard.models.generative.ppgn import image_loss as image_lost
from tests.explain.digit_vit import digits

CODE = 6


class Toy:
    """A smooth generator of 4 x 5 images with two channels, an encoder and a classifier of three classes."""

    def __init__(self):
        self.a, self.b, self.c = (torch.randn(40, CODE) / 2, torch.randn(CODE, 40) / 4, torch.randn(3, 40) / 4)

    def generator(self, h):
        return torch.tanh(h @ self.a.to(h).T).view(-1, 2, 4, 5)

    def encoder(self, images):
        return images.flatten(1) @ self.b.to(images).T

    def classifier(self, images):
        return images.flatten(1) @ self.c.to(images).T

    def ppgn(self, **options):
        given = {"clip": None, "code": CODE, "condition": class_condition(self.classifier), **options}
        return PPGN(self.generator, self.encoder, **given)


@pytest.fixture
def toy(seeded):
    return Toy()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_code_that_the_encoder_reads_back_stays_where_it_is(toy, normalize):
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    h = torch.randn(3, 8)
    walk = PPGN(
        lambda h: (h @ turn).view(-1, 1, 2, 4), lambda x: x.flatten(1) @ turn.T,
        lambda x, target: x.flatten(1).sum(1), eps=(1e-5, 0, 0, 0), clip=None, normalize_step=normalize,
    )  # fmt: skip
    # what rounding leaves of the prior would be a step of size 1
    assert 0 < (walk.encoder(walk.generator(h)) - h).abs().max() < 1e-5
    done = walk.sample(0, 20, init=h)
    assert torch.equal(done.codes, h) and done.trace.steps.tolist() == [0, 0, 0]
    assert done.trace.stopped == ("no gradient at step 0",) * 3
    off = PPGN(walk.generator, lambda x: 1.01 * walk.encoder(x), walk.condition, eps=walk.eps, clip=None)
    assert (off.sample(0, 20, init=h).codes - h).abs().mean() > 1


@pytest.mark.parametrize("normalize, lr", [(False, 0.05), (True, 0.002)])
def test_with_the_condition_alone_its_score_rises_at_every_small_step(toy, normalize, lr):
    walk = toy.ppgn(eps=(0, 1, 0, 0), normalize_step=normalize)
    init = torch.randn(3, CODE, dtype=torch.float64)
    done = walk.sample(torch.tensor([0, 1, 2]), 100, lr=(lr, lr), init=init)
    assert done.trace.scores.shape == (101, 3) and (done.trace.scores.diff(dim=0) > 0).all()
    assert (done.trace.scores[-1] - done.trace.scores[0] > 0.1).all()


def test_the_terms_are_what_autograd_says(toy):
    h, target = torch.randn(4, CODE, dtype=torch.float64), torch.tensor([2, 0, 1, 1])
    mask = torch.rand(4, 5) < 0.5
    image = torch.randn(2, 4, 5, dtype=torch.float64)
    found = toy.ppgn(eps=(1, 1, 0, 1)).terms(h, target, mask=mask, image=image)
    x = h.clone().requires_grad_()
    made = toy.generator(x)
    seen = torch.where(mask, image, made)
    scores = toy.classifier(seen).log_softmax(-1)[range(4), target]
    torch.testing.assert_close(found.scores, scores.detach())
    torch.testing.assert_close(found.prior, (toy.encoder(seen) - x).detach())
    torch.testing.assert_close(found.condition, torch.autograd.grad(scores.sum(), x, retain_graph=True)[0])
    context = -((made - image) * mask).square().sum() / 2
    torch.testing.assert_close(found.context, torch.autograd.grad(context, x)[0])


def test_the_chain_of_a_gaussian_ends_in_the_posterior():
    """Linear G, a denoiser E for noise of variance s, evidence y = B x + noise of variance 1: all moments are known."""
    size, s, rate = 3, 0.3, 0.02
    one = torch.eye(size, dtype=torch.float64)
    basis, given = torch.randn(6, size, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64) / 2
    mean, root = torch.tensor([1.0, -2.0, 0.5]).double(), one + torch.randn(size, size, dtype=torch.float64) / 3
    cov, inverse = root @ root.T, torch.linalg.pinv(basis)
    shrink = cov @ torch.linalg.inv(cov + s * one)
    y = torch.tensor([2.0, -1.0], dtype=torch.float64)

    walk = PPGN(
        lambda h: (h @ basis.T).view(-1, 1, 2, 3),
        lambda x: mean + (x.flatten(1) @ inverse.T - mean) @ shrink.T,
        lambda x, target: -(x.flatten(1) @ given.T - target).square().sum(1) / 2,
        eps=(rate / s, rate, math.sqrt(2 * rate), 0), clip=None, normalize_step=False,
    )  # fmt: skip
    done = walk.sample(y.expand(10000, 2), 500, init=torch.zeros(10000, size, dtype=torch.float64))
    # a denoiser's prior is the one with its noise
    seen, prior = given @ basis, torch.linalg.inv(cov + s * one)
    precision = prior + seen.T @ seen
    posterior = torch.linalg.inv(precision)
    centre = posterior @ (prior @ mean + seen.T @ y)
    found = torch.cov(done.codes.T)
    assert (done.codes.mean(0) - centre).norm() < 0.05 * centre.norm()
    assert (found - posterior).norm() < 0.05 * posterior.norm()
    # neither the prior alone nor the evidence alone says that
    for other in (cov + s * one, torch.linalg.pinv(seen.T @ seen)):
        assert (found - other).norm() > 0.3 * other.norm()


def test_known_pixels_come_nearer_and_the_others_change(toy):
    image = toy.generator(torch.randn(1, CODE))[0]
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, :3] = True
    init = torch.randn(3, CODE)
    walk = toy.ppgn(eps=(1e-3, 1e-2, 0, 1))
    done = walk.sample(1, 200, lr=(0.1, 0), init=init, mask=mask, image=image)
    before, after = toy.generator(init), done.images
    assert ((after - image)[..., mask].abs().mean(1) < 0.2 * (before - image)[..., mask].abs().mean(1)).all()
    assert ((after - before)[..., ~mask].abs().amax((1, 2)) > 0.1).all()
    assert (done.trace.sizes["context"][0] > 0).all()


def test_encoder_and_condition_see_the_known_pixels(toy):
    image, mask = torch.full((2, 4, 5), 7.0), torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0] = True
    seen = []
    walk = PPGN(
        toy.generator, lambda x: (seen.append(x.detach()), toy.encoder(x))[1],
        lambda x, target: (seen.append(x.detach()), x[:, 0].flatten(1).sum(1))[1], eps=(1, 1, 0, 0), clip=None,
    )  # fmt: skip
    h = torch.randn(2, CODE)
    terms = walk.terms(h, 0, mask=mask, image=image)
    for x in seen:
        assert (x[:, 0] == 7).all() and torch.equal(x[:, 1], toy.generator(h)[:, 1])
    # known pixels have no gradient: they are not the generator's
    assert len(seen) == 2 and not terms.condition.any() and not terms.context.any()


def test_the_weight_of_the_context_does_nothing_without_a_mask(toy):
    init = torch.randn(2, CODE)
    with_it, without = (toy.ppgn(eps=(1e-3, 1, 0, e)).sample(1, 5, init=init) for e in (1.0, 0.0))
    assert torch.equal(with_it.codes, without.codes) and not with_it.trace.sizes["context"].any()


def test_one_seed_is_one_chain_and_targets_come_in_batches(toy):
    walk = toy.ppgn(eps=(1e-2, 1, 0.1, 0))
    target = torch.tensor([0, 1, 2, 1])
    first, same, other = (walk.sample(target, 10, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.codes, same.codes) and torch.equal(first.trace.scores, same.trace.scores)
    assert not torch.equal(first.codes, other.codes)
    assert not torch.equal(first.codes[1], first.codes[3])
    # float64, since a chain makes rounding grow
    quiet, init = toy.ppgn(eps=(1e-2, 1, 0, 0)), torch.randn(4, CODE, dtype=torch.float64)
    together = quiet.sample(target, 10, init=init)
    for i in range(4):
        alone = quiet.sample(target[i : i + 1], 10, init=init[i : i + 1])
        torch.testing.assert_close(alone.codes, together.codes[i : i + 1])
    assert torch.equal(quiet.sample(1, 3, init=init).codes, quiet.sample(torch.ones(4).long(), 3, init=init).codes)


def test_a_chain_goes_on_from_its_codes(toy):
    walk, target = toy.ppgn(eps=(1e-2, 1, 0, 0)), torch.tensor([0, 2])
    whole = walk.sample(target, 12)
    begun = walk.sample(target, 5)
    rest = walk.sample(target, 7, init=begun.codes)
    assert torch.equal(rest.codes, whole.codes) and torch.equal(rest.images, whole.images)
    assert torch.equal(torch.cat((begun.trace.scores[:-1], rest.trace.scores)), whole.trace.scores)


def test_codes_stay_within_the_clip(toy):
    walk = toy.ppgn(eps=(1e-2, 1, 0.5, 0), clip=(-0.3, 0.4))
    init = 5 * torch.randn(4, CODE)
    kept = init.clone()
    for steps in (1, 20):
        codes = walk.sample(0, steps, init=init).codes
        assert codes.min() >= -0.3 and codes.max() <= 0.4
        assert (codes == 0.4).any()
    assert torch.equal(init, kept)
    # a chain that cannot move is within the clip too
    still = toy.ppgn(condition=lambda x, t: 0 * x.flatten(1).sum(1), eps=(0, 1, 0, 0), clip=(0, 1))
    assert torch.equal(still.sample(0, 2, init=init).codes, init.clamp(0, 1))


def test_only_the_ratio_of_the_weights_counts_and_noise_is_part_of_the_step(toy):
    init = torch.randn(3, CODE)
    one, four = (toy.ppgn(eps=(0.25 * e, e, 0.5 * e, 0)).sample(1, 6, init=init) for e in (1.0, 4.0))
    assert torch.equal(one.codes, four.codes)
    # rates fall from 1 towards 0: of two steps the second has half of it
    walk = toy.ppgn(eps=(0.25, 1, 0.5, 0))
    once, twice = (walk.sample(1, steps, lr=(1, 0), init=init).codes for steps in (1, 2))
    torch.testing.assert_close((once - init).abs().mean(1), torch.ones(3))
    torch.testing.assert_close((twice - once).abs().mean(1), torch.full((3,), 0.5))
    raw = toy.ppgn(eps=(0, 1, 0, 0), normalize_step=False)
    torch.testing.assert_close(raw.sample(1, 1, init=init).codes, init + raw.terms(init, 1).condition)


def test_a_chain_without_direction_stops_and_says_so(toy):
    flat = lambda x, target: (x.flatten(1).sum(1) * target).relu()  # noqa: E731
    target = torch.tensor([0.0, 1.0, 0.0])
    init = torch.rand(3, CODE).abs() + 1
    # the weight of the noise is that of the released code: alone, it would make whole steps
    walk = PPGN(lambda h: h.view(-1, 1, 2, 3), None, flat, eps=(0, 1, 1e-17, 0), clip=None)
    done = walk.sample(target, 8, init=init)
    assert done.trace.steps.tolist() == [0, 8, 0]
    assert done.trace.stopped == ("no gradient at step 0", "", "no gradient at step 0")
    assert torch.equal(done.codes[::2], init[::2]) and done.codes.isfinite().all()
    assert done.trace.scores.shape == (9, 3)
    ended = walk.sample(torch.zeros(3), 8, init=init)
    assert ended.trace.scores.shape == (1, 3) and ended.trace.sizes["noise"].shape == (0, 3)
    # a chain of Langevin has its noise where nothing else moves it
    free = PPGN(walk.generator, None, flat, eps=(0, 1, 0.1, 0), clip=None, normalize_step=False)
    assert free.sample(target, 8, init=init).trace.stopped == ("", "", "")


def test_a_chain_that_is_not_finite_any_more_stops_before_that(toy):
    def score(x, target):
        return torch.where(x.flatten(1).amax(1) > 2, float("nan"), 1.0) * x.flatten(1).sum(1)

    walk = PPGN(lambda h: h.view(-1, 1, 2, 3), None, score, eps=(0, 1, 0, 0), clip=None)
    done = walk.sample(0, 9, lr=(0.5, 0.5), init=torch.stack((torch.zeros(6), torch.full((6,), -9.0))))
    assert done.codes.isfinite().all() and done.trace.steps.tolist() == [5, 9]
    assert done.trace.stopped == ("not finite at step 5", "")


def test_what_has_no_gradient_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    images, cut = (lambda h: h.view(-1, 1, 2, 3)), (lambda h: h.detach().view(-1, 1, 2, 3))
    for generator, condition in (
        (images, lambda x, target: x.detach().flatten(1).sum(1)),
        (images, lambda x, target: x.flatten(1).argmax(1).float()),
        # its weights have a gradient, the codes have none
        (cut, class_condition(net)),
    ):
        walk = PPGN(generator, None, condition, eps=(0, 1, 0, 0), code=6)
        with pytest.raises(OptionError, match=r"no gradient reaches the codes through the condition.*differentiable"):
            walk.sample(0, 2)
    known = {"mask": torch.ones(2, 3, dtype=torch.bool), "image": torch.zeros(1, 2, 3)}
    with pytest.raises(OptionError, match="through the generator"):
        PPGN(cut, None, class_condition(net), eps=(0, 0, 0, 1), code=6).sample(0, 2, **known)


def test_what_is_plugged_in_is_left_alone(toy):
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))
    walk = toy.ppgn(condition=unit_condition(net, "2"))
    numbers = torch.random.get_rng_state()
    with torch.no_grad():
        done = walk.sample(5, 3)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert done.trace.steps.tolist() == [3] and not done.codes.requires_grad and not done.images.requires_grad
    assert all(p.grad is None for p in net.parameters()) and not any(m._forward_hooks for m in net.modules())


def test_crops_are_cut_out_of_the_middle_and_need_not_be_square(toy):
    seen = []
    walk = PPGN(
        lambda h: h.view(-1, 1, 6, 7), lambda x: (seen.append(x), torch.zeros(2, 42))[1],
        lambda x, t: (seen.append(x), x.flatten(1).sum(1))[1], eps=(1, 1, 0, 0), crop=(3, 4),
    )  # fmt: skip
    h = torch.randn(2, 42)
    walk.terms(h, 0)
    assert [torch.equal(x, h.view(-1, 1, 6, 7)[:, :, 1:4, 1:5]) for x in seen] == [True, True]
    assert walk.sample(0, 1, init=h).images.shape == (2, 1, 3, 4)


def test_images_and_codes_that_do_not_fit_are_refused(toy):
    h = torch.randn(2, CODE)
    for options, text in (
        ({"crop": (4, 6)}, "a crop of 4x6 does not fit into the generator's images of 4x5"),
        ({"condition": lambda x, t: x.sum()}, r"the condition gives \(\); it must give \(2,\)"),
        ({"condition": lambda x, t: 1.0}, "the condition gives float"),
    ):
        with pytest.raises(ShapeError, match=text):
            toy.ppgn(**options).sample(0, 1, init=h)
    score = class_condition(toy.classifier)
    with pytest.raises(ShapeError, match=r"the encoder gives \(2, 40\) for codes of \(2, 6\)"):
        PPGN(toy.generator, lambda x: x.flatten(1), score).sample(0, 1, init=h)
    with pytest.raises(ShapeError, match=r"the generator gives \(2, 6\); it must give images"):
        PPGN(lambda h: h, toy.encoder, score).sample(0, 1, init=h)
    for init in (torch.randn(3, CODE), torch.zeros(2, CODE).long()):
        with pytest.raises(ShapeError, match=r"it must be codes \(B, …\), a row for each of the targets"):
            toy.ppgn().sample(torch.tensor([0, 1]), 1, init=init)
    known = torch.ones(4, 5, dtype=torch.bool)
    for mask, image, text in (
        (known.float(), torch.zeros(2, 4, 5), "it must be bool"),
        (known, torch.zeros(2, 5, 4), "they must fit images of"),
        (known, torch.zeros(7, 2, 4, 5), "they must fit images of"),
        (known, torch.zeros(1, 1, 2, 4, 5), "of images of"),
    ):
        with pytest.raises(ShapeError, match=text):
            toy.ppgn().sample(0, 1, init=h, mask=mask, image=image)


def test_bad_settings_are_refused(toy):
    for options, text in (
        ({"eps": (1, 1, 1)}, "eps are weights"),
        ({"eps": (1, -1, 0, 0)}, "0 or more"),
        ({"clip": (1, 0)}, r"clip is \(low, high\)"),
    ):
        with pytest.raises(OptionError, match=text):
            toy.ppgn(**options)
    with pytest.raises(OptionError, match="give an encoder, or eps"):
        PPGN(toy.generator, None, class_condition(toy.classifier))
    with pytest.raises(OptionError, match="the shape of a code is not known"):
        toy.ppgn(code=None).sample(0, 1)
    for options in ({"steps": 0}, {"lr": (1, -1)}):
        with pytest.raises(OptionError, match="steps is at least 1 and lr 0 or more"):
            toy.ppgn().sample(0, **options)
    with pytest.raises(OptionError, match="give both, or neither"):
        toy.ppgn().sample(0, 1, mask=torch.ones(4, 5, dtype=torch.bool))


def test_codes_may_be_the_pixels_themselves(toy):
    """PPGN-x: the generator is the identity, the encoder a denoiser of images."""
    walk = PPGN(nn.Identity(), lambda x: 0.9 * x, class_condition(toy.classifier), clip=(-1, 1), code=(2, 4, 5))
    done = walk.sample(torch.tensor([0, 1, 2]), 30, lr=(0.1, 0.01))
    assert done.codes.shape == (3, 2, 4, 5) and torch.equal(done.codes, done.images)
    assert (toy.classifier(done.images).argmax(1) == torch.arange(3)).all()


def test_the_score_of_a_class_is_its_log_probability(toy):
    images, classes = torch.randn(4, 2, 4, 5), torch.tensor([0, 2, 1, 1])
    wanted = toy.classifier(images).log_softmax(-1)
    torch.testing.assert_close(class_condition(toy.classifier)(images, classes), wanted[range(4), classes])
    in_a_box = class_condition(lambda x: SimpleNamespace(logits=toy.classifier(x)))
    torch.testing.assert_close(in_a_box(images, 1), wanted[:, 1])
    for target, text in ((3, "classes 0 to 2"), (torch.tensor([0, 1]), "one for each of 4 rows"), (None, "a number")):
        with pytest.raises(OptionError, match=text):
            class_condition(toy.classifier)(images, target)
    with pytest.raises(OptionError, match="no logits"):
        class_condition(lambda x: x)(images, 1)


def test_the_score_of_a_unit_is_its_activation():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(80, 5))
    images, units = torch.randn(3, 2, 4, 5, requires_grad=True), torch.tensor([1, 3, 0])
    maps = net[0](images)
    found = unit_condition(net, "0", place=(1, 4))(images, units)
    torch.testing.assert_close(found, maps[range(3), units, 1, 4])
    gradient = torch.autograd.grad(found.sum(), images)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(maps[range(3), units, 1, 4].sum(), images)[0])
    torch.testing.assert_close(unit_condition(net, "3")(images, 2), net(images)[:, 2])
    for place in (None, (4, 0), (-1, 0)):
        with pytest.raises(OptionError, match=r"maps of 4x5: give place=\(y, x\)"):
            unit_condition(net, "0", place=place)(images, 0)
    with pytest.raises(ShapeError, match=r"'3' gives \(3, 5\)"):
        unit_condition(net, "3", place=(0, 0))(images, 0)
    with pytest.raises(OptionError, match="classes 0 to 3"):
        unit_condition(net, "0", place=(0, 0))(images, 4)
    twice = nn.Sequential(net[2], nn.Linear(40, 40))
    twice.append(twice[1])
    with pytest.raises(Unsupported, match="ran 2 times"):
        unit_condition(twice, "1")(images, 0)


class Captioner(nn.Module):
    """Logits of the word after each, from the image and all words so far."""

    def __init__(self, words=5):
        super().__init__()
        self.look, self.read, self.out = nn.Linear(40, 8), nn.Embedding(words, 8), nn.Linear(8, words)

    def forward(self, images, words):
        return self.out(torch.tanh(self.look(images.flatten(1))[:, None] + self.read(words).cumsum(1)))


def test_the_score_of_a_caption_is_the_sum_over_its_words(toy):
    captioner, images = Captioner(), torch.randn(2, 2, 4, 5)
    captions = torch.tensor([[3, 1, 4], [2, 2, 0]])
    wanted = torch.zeros(2)
    for row in range(2):
        said = [0]
        for word in captions[row].tolist():
            logits = captioner(images[row : row + 1], torch.tensor([said]))[0, -1]
            wanted[row] += logits.log_softmax(-1)[word]
            said.append(word)
    score = caption_condition(captioner)
    torch.testing.assert_close(score(images, captions), wanted)
    assert not torch.allclose(caption_condition(captioner, start=1)(images, captions), wanted)
    for target, text in ((captions[0], r"int64 \(2, L\)"), (captions.float(), "int64"), (captions[:, :0], "int64")):
        with pytest.raises(ShapeError, match=text):
            score(images, target)
    with pytest.raises(OptionError, match="words 0 to 4"):
        score(images, captions + 1)
    with pytest.raises(ShapeError, match="next_word gives"):
        caption_condition(lambda x, words: captioner(x, words)[:, -1])(images, captions)


def test_images_are_found_for_captions(toy):
    walk = toy.ppgn(condition=caption_condition(Captioner()), eps=(1e-4, 1, 0, 0), clip=(-5, 5))
    captions = torch.tensor([[3, 1, 4], [2, 2, 0]])
    done = walk.sample(captions, 60, lr=(0.3, 0))
    assert (done.trace.scores[-1] > done.trace.scores[0] + 0.5).all()
    # each image speaks for its own caption
    crossed = walk.condition(done.images, captions.flip(0))
    assert (done.trace.scores[-1] > crossed).all()


@pytest.mark.parametrize("chains, channels", [(2, 3), (13, 1), (25, 2)])
def test_figure_shows_images_and_their_scores(chains, channels):
    size = channels * 12
    walk = PPGN(
        lambda h: h.view(-1, channels, 3, 4), None, lambda x, t: x.flatten(1).square().sum(1), (0, 1, 0, 0), code=size
    )
    figure = walk.sample(torch.zeros(chains), 4).figure()
    shown = min(chains, 20)
    kinds = [trace.type for trace in figure.data]
    assert kinds.count("image") == shown and kinds.count("scatter") == shown
    assert all(len(trace.y) == 5 for trace in figure.data if trace.type == "scatter")
    first = next(trace.z for trace in figure.data if trace.type == "image")
    assert first.shape == (3, 4, 3) and first.min() == 0 and first.max() == 255


def test_the_released_networks_fit_together():
    with torch.device("meta"):
        generator, encoder = regard.build("ppgn_fc6"), CodeEncoder()
        walk = PPGN(generator, encoder, lambda x, t: x.flatten(1).sum(1), crop=(227, 227))
        h = torch.zeros(2, generator.code)
        images, _, _ = walk._look(h, 0, None)
        assert images.shape == (2, 3, 227, 227) and walk._prior(h, images).shape == h.shape


@lru_cache
def readers(epochs: int):
    """An encoder with its classifier, and another classifier that judges, learned from real digits."""
    images, labels = digits("train")
    settings = SIZES["ppgn_digits"]
    torch.manual_seed(0)
    encoder = CodeEncoder(settings)
    reader = nn.Sequential(encoder, nn.Linear(settings.code, 10))
    parts = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    judge = nn.Sequential(*parts, nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10))
    for net in (reader, judge):
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(64):
                noisy = images[rows] + 0.1 * torch.randn_like(images[rows])
                optimizer.zero_grad()
                F.cross_entropy(net(noisy), labels[rows]).backward()
                optimizer.step()
        net.eval().requires_grad_(False)
    return encoder, reader, judge


def maker(encoder, epochs: int, *, noise: float, adversarial: float = 0.1):
    """A generator of digits. noise: on the codes that it learns from, in their standard deviations."""
    images = digits("train")[0]
    torch.manual_seed(1)
    generator = UpconvGenerator(encoder.settings)
    parts = [nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 3, 2, 1), nn.LeakyReLU(0.2)]
    critic = nn.Sequential(*parts, nn.Flatten(), nn.Linear(1024, 1), nn.Flatten(0))
    makes = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.999))
    judges = torch.optim.Adam(critic.parameters(), 4e-4, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(makes, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            real = images[rows]
            features = encoder.read(real)
            codes = features[1]
            made = generator((codes + noise * codes.std() * torch.randn_like(codes)).clamp(min=0))
            loss = image_lost(made, real) + 0.02 * features_lost(encoder.read(made), features)
            if adversarial:
                loss = loss + adversarial * adversarial_losses(critic(made), critic(real))[0]
            makes.zero_grad()
            loss.backward()
            makes.step()
            if adversarial:
                judges.zero_grad()
                adversarial_losses(critic(made.detach()), critic(real))[1].backward()
                judges.step()
        schedule.step()
    return generator.eval().requires_grad_(False)


def drawn(nets, generator, eps1: float, *, chains: int, steps: int):
    """Of samples of every class: how many its reader and a judge read as it, and how far the nearest real digit is."""
    encoder, reader, judge = nets
    target = torch.arange(10).repeat_interleave(chains)
    walk = PPGN(generator, encoder, class_condition(reader), eps=(eps1, 1, 1e-17, 0))
    done = walk.sample(target, steps)
    near = torch.cdist(done.images.flatten(1), digits("train")[0].flatten(1)).amin(1)
    spread = torch.stack([torch.pdist(rows).mean() for rows in done.images.view(10, chains, 64)])
    right = [float((net(done.images).argmax(1) == target).float().mean()) for net in (reader, judge)]
    return {
        "read_as_their_class": right[0],
        "read_as_their_class_by_another_network": right[1],
        "distance_to_the_nearest_digit": float(near.mean()),
        "distance_within_a_class": float(spread.mean()),
        "log_probability": float(done.trace.scores[-1].mean()),
    }


def test_the_prior_brings_samples_nearer_to_digits_after_little_training():
    nets = readers(6)
    generator = maker(nets[0], 15, noise=0.2, adversarial=0.0)
    free, bound = (drawn(nets, generator, eps1, chains=3, steps=60) for eps1 in (0.0, 1e-3))
    assert free["read_as_their_class"] >= 0.95 and bound["read_as_their_class"] >= 0.95
    assert bound["distance_to_the_nearest_digit"] < 0.7 * free["distance_to_the_nearest_digit"]


@pytest.mark.slow
def test_samples_of_digits_are_read_as_their_class_and_look_like_digits_with_a_prior(record):
    nets = readers(20)
    images, labels = digits("test")
    distances = torch.cdist(images.flatten(1), digits("train")[0].flatten(1)).amin(1)
    figures = {
        "accuracy_on_held_out_digits": float((nets[1](images).argmax(1) == labels).float().mean()),
        "accuracy_of_the_other_network": float((nets[2](images).argmax(1) == labels).float().mean()),
        "distance_of_held_out_digits_to_the_nearest": float(distances.mean()),
        "squared_size_of_an_image": float(image_lost(torch.zeros_like(images), images)),
        "chains": 200,
        "steps": 200,
    }
    for noise in (0.2, 0.0):
        generator = maker(nets[0], 60, noise=noise)
        with torch.no_grad():
            codes = nets[0](images)
            made = generator(codes)
            found = {
                "squared_error_of_an_image": float(image_lost(made, images)),
                "relative_error_of_codes_read_off_it": float((nets[0](made) - codes).norm() / codes.norm()),
            }
        for eps1 in (0.0, 1e-5, 1e-3, 1e-1):
            found[f"eps1={eps1:g}"] = drawn(nets, generator, eps1, chains=20, steps=200)
        found["eps1=0, 20 steps"] = drawn(nets, generator, 0.0, chains=20, steps=20)
        figures[f"trained with noise {noise:g}"] = found
    record(figures)
    with_noise, without_noise = (figures[f"trained with noise {noise:g}"] for noise in (0.2, 0.0))
    for eps1 in ("1e-05", "0.001"):
        for name in ("read_as_their_class", "read_as_their_class_by_another_network"):
            assert with_noise[f"eps1={eps1}"][name] >= 0.95
        assert without_noise[f"eps1={eps1}"]["read_as_their_class"] >= 0.95
        near, far, early = (
            with_noise[name]["distance_to_the_nearest_digit"] for name in (f"eps1={eps1}", "eps1=0", "eps1=0, 20 steps")
        )
        # a walk without a prior leaves the digits, and it is no cure to end it early
        assert near < 0.5 * far and near < early
