from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import OptionError, Orchid, ShapeError, Unsupported, data_dependent_conv
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from regard.primitives.fft_conv import fft_conv
from tests.oracles import normal

FORMS = [{}, {"magnitude": "square"}, {"conditioning": "correlation"}]


def layer(dim=6, max_len=16, **options):
    torch.manual_seed(1)
    made = Orchid(dim, max_len=max_len, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


def without_static(made):
    with torch.no_grad():
        made.static.down.weight.zero_()
        made.static.skip.zero_()
    return made


@pytest.mark.parametrize("n, n_fft", [(1, 1), (7, 7), (8, 8), (7, 13), (8, 20)])
@pytest.mark.parametrize("complex_spectrum", [False, True])
def test_the_transform_is_the_double_sum(n, n_fft, complex_spectrum):
    x, static, real, imaginary = normal((2, 3, n), (3, n_fft), (2, 3, n_fft // 2 + 1), (2, 3, n_fft // 2 + 1))
    spectrum = torch.complex(real, imaginary) if complex_spectrum else real
    # the taps, summed wave by wave
    frequency, lag = torch.arange(n_fft // 2 + 1), torch.arange(n_fft)
    twice = torch.where((frequency == 0) | (2 * frequency == n_fft), 1.0, 2.0)
    angle = 2 * torch.pi * frequency[:, None].double() * lag / n_fft
    parts = [real[..., None] * angle.cos()]
    if complex_spectrum:
        edge = (frequency == 0) | (2 * frequency == n_fft)
        parts.append(-imaginary.masked_fill(edge, 0.0)[..., None] * angle.sin())
    taps = static + (twice[:, None] * sum(parts)).sum(-2) / n_fft
    want = torch.zeros_like(x)
    for i in range(n):
        for j in range(n):
            want[..., i] += taps[..., (i - j) % n_fft] * x[..., j]
    torch.testing.assert_close(data_dependent_conv(x, static, spectrum, n_fft=n_fft), want)


def test_without_the_adaptive_kernel_it_is_a_plain_long_convolution():
    x, static = normal((2, 3, 9), (3, 9))
    zero = torch.zeros(2, 3, 5, dtype=torch.float64)
    want = fft_conv(x, static, is_causal=False)
    torch.testing.assert_close(data_dependent_conv(x, static, zero), want)
    torch.testing.assert_close(data_dependent_conv(x, static, None), want)
    assert (data_dependent_conv(x, None, None) == 0).all()
    # and in the layer
    made, (tokens,) = layer(norm=False, circular=True), normal((2, 9, 6))
    with torch.no_grad():
        made.second.conv.weight.zero_()
        made.second.conv.bias.zero_()
    s1, s2, v = made.short(made.to_inner(tokens).transpose(1, 2), True).chunk(3, 1)
    mixed = s2 * fft_conv(s1 * v, made.static(9, 9), is_causal=False)
    torch.testing.assert_close(made(tokens), made.to_out(mixed.transpose(1, 2)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("n", [8, 11])
def test_on_a_ring_rolling_the_input_rolls_the_output(options, norm, n):
    made, (x,) = layer(circular=True, norm=norm, residual="static", **options), normal((2, n, 6))
    out = made(x)
    for shift in (1, 5):
        torch.testing.assert_close(made(x.roll(shift, 1)), out.roll(shift, 1))


@pytest.mark.parametrize("options", FORMS)
def test_the_kernel_of_a_rolled_sequence_is_the_same(options):
    made, (x,) = layer(circular=True, **options), normal((2, 9, 6))
    u = x.transpose(1, 2)
    kernel = made.adaptive_kernel(u, 9)
    torch.testing.assert_close(made.adaptive_kernel(u.roll(4, -1), 9), kernel)
    assert (made.adaptive_kernel(u.flip(0), 9) - kernel).abs().max() > 1e-2, "it depends on the sequence"


@pytest.mark.parametrize("options", FORMS)
def test_between_zeros_shifting_all_tokens_shifts_the_output(options):
    made, (x,) = layer(max_len=16, **options), normal((2, 9, 6))
    later = torch.cat((torch.full((2, 4, 6), 9.0).double(), x), 1)
    padding = torch.arange(13).expand(2, 13) >= 4
    torch.testing.assert_close(made(later, padding=padding)[:, 4:], made(x))


def test_centred_convolutions_are_needed_for_that():
    made, (x,) = layer(circular=True), normal((2, 9, 6))
    made.circular = False
    u = x.transpose(1, 2)
    assert (made.adaptive_kernel(u.roll(4, -1), 9) - made.adaptive_kernel(u, 9)).abs().max() > 1e-3


def test_the_static_kernel_has_lags_of_both_signs_at_their_place():
    made = layer().static
    ring, line = made(7, 7), made(7, 20)
    torch.testing.assert_close(line[:, :4], ring[:, :4])
    torch.testing.assert_close(line[:, -3:], ring[:, -3:])
    assert (line[:, 7:14] == 0).all()
    assert (line[:, :7] != 0).all() and (line[:, 14:] != 0).all()
    torch.testing.assert_close(made(5, 20)[:, :5], line[:, :5])
    assert made(8, 8).shape == (6, 8) and (made(8, 8) != 0).all()


def test_the_window_decays_with_the_lag_at_a_rate_of_its_channel():
    made = Orchid(4, max_len=64).double().static
    taps = made(64, 128)
    rate = made.rate.clone()
    torch.testing.assert_close(rate[[0, -1]], torch.tensor([1.0, 16.0]).double())
    made.rate.zero_()
    distance = torch.minimum(torch.arange(128), 128 - torch.arange(128)).double() / 64
    torch.testing.assert_close(taps, made(64, 128) * torch.exp(-distance * rate[:, None]))


@pytest.mark.parametrize("options", [*FORMS, {"circular": True}, {"residual": "static"}])
def test_gradients_are_those_of_finite_differences(options):
    made, (x,) = layer(dim=3, max_len=5, **options), normal((1, 5, 3))
    assert torch.autograd.gradcheck(made, (x.requires_grad_(),))


def test_the_spectrum_is_float32_under_autocast():
    made = layer().float()
    (x,) = normal((2, 9, 6), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert made.adaptive_kernel(x.transpose(1, 2), 32).dtype is torch.float32
        y, spectrum = x.transpose(1, 2), torch.randn(2, 6, 5)
        inside = data_dependent_conv(y, None, spectrum)
    assert torch.equal(inside, data_dependent_conv(y, None, spectrum))


def test_padded_values_are_nothing_on_a_ring_too():
    made, (x,) = layer(circular=True), normal((2, 9, 6))
    padding = torch.arange(9).expand(2, 9) < 6
    other = torch.where(padding[..., None], x, 30 * torch.randn_like(x))
    torch.testing.assert_close(made(other, padding=padding)[:, :6], made(x, padding=padding)[:, :6])


def test_time_grows_hardly_faster_than_length():
    def seconds(n):
        made, x = Orchid(64, max_len=n), torch.randn(1, n, 64)
        best = float("inf")
        with torch.no_grad():
            for _ in range(5):
                start = time.process_time()
                made(x)
                best = min(best, time.process_time() - start)
        return best

    assert seconds(4096) / seconds(1024) < 6


def test_what_it_cannot_do_is_refused():
    made, (x,) = layer(), normal((2, 9, 6))
    with pytest.raises(Unsupported, match="the kernel is computed from the whole sequence"):
        made(x, is_causal=True)
    with pytest.raises(Unsupported, match="reads no context"):
        made(x, x)
    with pytest.raises(Unsupported, match="separates no documents"):
        made(x, reset=torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ShapeError, match="max_len=16 tokens; there are 17"):
        made(torch.zeros(1, 17, 6).double())
    for options, text in (
        ({"max_len": 0}, "at least 1"),
        ({"conditioning": "phase"}, "'magnitude' or 'correlation'"),
        ({"magnitude": "log"}, "'abs' or 'square'"),
        ({"residual": "x"}, "'static' or None"),
    ):
        with pytest.raises(OptionError, match=text):
            Orchid(4, **options)
    assert not hasattr(made, "init_state")
    with pytest.raises(ShapeError, match=r"n_fft // 2 \+ 1"):
        data_dependent_conv(x.transpose(1, 2), None, torch.zeros(2, 6, 4))
    with pytest.raises(OptionError, match="at least 9 steps, not 8"):
        data_dependent_conv(x.transpose(1, 2), None, torch.zeros(2, 6, 5), n_fft=8)


def test_truncating_the_kernel_would_not_make_it_causal():
    # what the released causal flag does: taps of later tokens are cut, but later tokens still shape the others
    made, (x,) = layer(circular=True), normal((1, 8, 6))

    def first(x):
        u = made.to_inner(x).transpose(1, 2)
        taps = torch.fft.irfft(made.adaptive_kernel(u[:, -6:], 16), n=16)[..., :8]
        return fft_conv(u[:, :6], taps)[..., 0].sum()

    later = torch.autograd.functional.jacobian(first, x)[0, 1:]
    assert (later.abs().amax(-1) > 1e-6).any()


class Reader(nn.Module):
    """Digits as 64 pixels one after the other."""

    def __init__(self, slug, **options):
        super().__init__()
        self.embed, self.places = nn.Linear(1, 32), nn.Parameter(torch.randn(64, 32) * 0.1)
        settings = SequenceSettings(
            vocab=1, dim=32, depth=2, heads=4, mixer=slug, options={slug: options}, hidden=64, is_causal=False
        )
        self.frame = SequenceModel(settings)
        self.head = nn.Linear(32, 10)

    def forward(self, pixels):
        x = self.embed(pixels[..., None]) + self.places
        for block in self.frame.blocks:
            x = block(x, padding=None, reset=None, is_causal=False)
        return self.head(self.frame.norm(x).mean(1))


@pytest.mark.slow
def test_orchid_reads_digits_pixel_by_pixel(record):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    scores = {}
    for name, options in (("magnitude", {}), ("correlation", {"conditioning": "correlation"})):
        torch.manual_seed(0)
        model = Reader("orchid", max_len=64, **options)
        optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
        for _ in range(25):
            for rows in train[torch.randperm(len(train))].split(64):
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        model.eval()
        with torch.no_grad():
            scores[name] = (model(images[test]).argmax(-1) == labels[test]).float().mean().item()
    record({"task": "digits pixel by pixel, width 32, 2 layers, 25 epochs, seed 0", **scores})
    assert min(scores.values()) >= 0.93, scores


def test_it_is_a_mixer_of_the_frame():
    made = regard.mixer("orchid", 8, 2, max_len=12)
    model = SequenceModel(SequenceSettings(vocab=5, dim=8, depth=1, heads=2, mixer="orchid", is_causal=False))
    assert made(torch.randn(1, 12, 8)).shape == (1, 12, 8)
    assert model(torch.randint(5, (2, 7))).shape == (2, 7, 5)
