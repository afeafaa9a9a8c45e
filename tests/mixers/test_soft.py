from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import OptionError, ShapeError, SOFTAttention2d, Unsupported
from tests.oracles import normal


def layer(**options):
    made = SOFTAttention2d(8, 2, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.3 * torch.randn_like(p)
    return made


def gauss(x, y):
    return torch.exp(-(x[:, None] - y[None]).square().sum(-1) / 2)


def by_hand(made, x):
    """The layer on one image (H, W, C), head after head, with an exact inverse."""
    height, width, _ = x.shape
    ratio, side = made.ratio, made.local.weight.shape[-1]
    q, v = made.to_q(x) / 4**0.25, made.to_v(x)
    out = []
    for h in range(2):
        own_q, own_v = q[..., 4 * h : 4 * h + 4], v[..., 4 * h : 4 * h + 4]
        patches = own_q.unfold(0, ratio, ratio).unfold(1, ratio, ratio).flatten(0, 1)
        landmarks = torch.einsum("nchw,ochw->no", patches, made.landmarks.weight)
        landmarks = F.gelu(F.layer_norm(landmarks, (4,), made.norm.weight, made.norm.bias))
        c, b = gauss(own_q.flatten(0, 1), landmarks), gauss(landmarks, landmarks)
        inverse = torch.linalg.inv(b + 0.01 * torch.eye(len(b), dtype=torch.float64))
        if made.symmetric_norm:
            root = b.sum(-1) ** -0.5
            inverse = root[:, None] * inverse * root
        mixed = c @ inverse @ c.T @ own_v.flatten(0, 1)
        border = side // 2
        windows = F.pad(own_v, (0, 0, border, border, border, border)).unfold(0, side, 1).unfold(1, side, 1)
        # one kernel for all channels of the head
        mixed = mixed + torch.einsum("hwcyx,yx->hwc", windows, made.local.weight[h, 0]).flatten(0, 1)
        out.append(mixed)
    return made.to_out(torch.cat(out, -1)).view(height, width, -1)


@pytest.mark.parametrize(
    "options", [{}, {"conv": 5}, {"symmetric_norm": True}, {"ratio": 1}, {"ratio": 1, "symmetric_norm": True}]
)
def test_it_is_kernels_through_landmarks_and_a_convolution(options):
    # steps enough for landmarks that are near each other
    made = layer(newton_iters=60, **options)
    (x,) = normal((2, 4, 6, 8))
    torch.testing.assert_close(made(x), torch.stack([by_hand(made, row) for row in x]), rtol=1e-6, atol=1e-7)


def test_a_few_more_steps_of_newton_change_little():
    (x,) = normal((2, 8, 8, 8))
    made = layer()
    early = made(x)
    made.newton_iters = 60
    assert (made(x) - early).abs().max() < 0.05 * early.abs().max()


def test_published_ratios_have_49_landmarks_at_every_stage():
    seen = []
    for side, ratio in ((56, 8), (28, 4), (14, 2)):
        made = SOFTAttention2d(8, 2, ratio=ratio)
        made.norm.register_forward_hook(lambda m, x, y: seen.append(y.shape[1]))
        with torch.no_grad():
            made(torch.randn(1, side, side, 8))
    assert seen == [49, 49, 49]


def test_what_it_cannot_do_is_refused():
    made = layer(ratio=4)
    x = torch.randn(1, 8, 8, 8).double()
    with pytest.raises(ShapeError, match="8x6 does not divide by the ratio 4"):
        made(x[:, :, :6])
    with pytest.raises(Unsupported, match="is not causal"):
        made(x, is_causal=True)
    with pytest.raises(Unsupported, match="reads no context"):
        made(x, x)
    with pytest.raises(Unsupported, match="takes no padding"):
        made(x, padding=torch.ones(1, 8, 8, dtype=torch.bool))
    for options in ({"ratio": 0}, {"conv": 4}):
        with pytest.raises(OptionError, match="the ratio is at least 1 and the side of the convolution odd"):
            regard.mixer("soft", 8, 2, **options)
