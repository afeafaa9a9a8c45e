"""Rules of elastic windows: widths, densities, patterns, plans as text."""

import pytest
import torch

from regard import Causal, PerHead, SinkBand
from regard.contract.errors import OptionError
from regard.patterns.elastic import MoAPlan, band_blocks

PLAN = MoAPlan(((128.0, 0.0, -512.0), (0.0, 64.0, 100.0)), ((0.0, 0.25, 0.5), (1.0, 0.0, 0.125)))


@pytest.mark.parametrize(
    "alpha, beta, length, blocks",
    [
        (128, 0.0, 1024, 2), (128, 0.0, 4096, 2), (0, 0.25, 1024, 4), (0, 0.25, 4096, 16), (-512, 0.5, 1024, 1),
        (-512, 0.5, 4096, 24), (100, 0.0, 1024, 1), (100, 0.1, 1024, 2), (-1, 0.0, 1024, 1), (0, 1.0, 65, 2),
        (-100, 0.25, 1024, 2),
    ],
)  # fmt: skip
def test_the_band_floors_alpha_by_itself(alpha, beta, length, blocks):
    assert band_blocks(alpha, beta, length, 64) == blocks


def test_only_heads_with_beta_grow_with_the_length():
    lengths = (64, 512, 1024, 4096, 16384)
    for layer in range(PLAN.layers):
        widths = [PLAN.band_blocks(layer, n) for n in lengths]
        for head, beta in enumerate(PLAN.betas[layer]):
            own = [row[head] for row in widths]
            if beta == 0:
                assert len(set(own)) == 1
            else:
                assert own == sorted(own) and own[-1] > own[1]


def test_patterns_are_causal_sinks_and_a_band():
    pattern = PLAN.pattern(0, 1024)
    assert isinstance(pattern, PerHead) and pattern.causal and pattern.heads == 3
    assert pattern.patterns[0] == Causal() & SinkBand(64, 1, 2)
    seen = pattern.dense(1024, 1024)[0]
    i, j = torch.arange(1024)[:, None], torch.arange(1024)[None]
    for head, blocks in enumerate(PLAN.band_blocks(0, 1024)):
        # two-sided in the released code, 2 n - 1 blocks, then cut by the causal mask
        band = (i // 64 - j // 64).abs() <= (2 * blocks - 1) // 2
        assert torch.equal(seen[head], ((j < 64) | band) & (j <= i))


@pytest.mark.parametrize("length", [1, 64, 100, 1024, 1500])
def test_density_is_what_the_widest_row_sees(length):
    seen = torch.cat([PLAN.pattern(layer, length).dense(length, length) for layer in range(2)], 1)[..., ::64]
    assert PLAN.density(length) == pytest.approx((seen.sum(-1).amax(-1) / seen.shape[-1]).double().mean().item())


def test_plans_are_values_that_travel_as_text():
    assert MoAPlan.from_json(PLAN.to_json()) == PLAN and hash(MoAPlan.from_json(PLAN.to_json())) == hash(PLAN)
    assert MoAPlan.from_json('{"alphas": [[0, 64]], "betas": [[1, 0.5]]}') == MoAPlan([[0, 64]], [[1, 0.5]], 64)
    with pytest.raises(AttributeError):
        PLAN.block = 32


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "alphas and betas"),
        ('{"alphas": [[1]]}', "alphas and betas"),
        ('{"alphas": [[1]], "betas": [[1]], "blocks": 64}', "no field 'blocks'.*'block'"),
        ('{"alphas": [[1]], "betas": [[1]], "block": 0}', "at least 1, not 0"),
        ('{"alphas": [[1]], "betas": [[1]], "block": "64"}', "at least 1, not '64'"),
        ('{"alphas": [[1, 2]], "betas": [[1]]}', "same number of heads"),
        ('{"alphas": [[1, 2], [1]], "betas": [[1, 1], [1]]}', "same number of heads"),
        ('{"alphas": [], "betas": []}', "same number of heads"),
        ('{"alphas": [[]], "betas": [[]]}', "same number of heads"),
        ('{"alphas": [1], "betas": [1]}', "must be numbers"),
        ('{"alphas": [["a"]], "betas": [[1]]}', "must be numbers"),
        ('{"alphas": [[NaN]], "betas": [[1]]}', "finite alpha"),
        ('{"alphas": [[1]], "betas": [[-1]]}', "at least 0"),
    ],
)
def test_bad_plans(text, message):
    with pytest.raises(OptionError, match=message):
        MoAPlan.from_json(text)


def test_bad_places():
    with pytest.raises(OptionError, match="layers 0 to 1, but not 2"):
        PLAN.band_blocks(2, 64)
    with pytest.raises(OptionError, match="layers 0 to 1, but not -1"):
        PLAN.pattern(-1, 64)
    with pytest.raises(OptionError, match="at least 1 token"):
        PLAN.density(0)
