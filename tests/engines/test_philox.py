"""The random words of dropout against the published answers of Philox4x32-10."""

import pytest
import torch

from regard.engines.philox import keep, random_words

# counter, key, output: the known answers that come with Random123 (Salmon et al., 2011)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_words_are_the_published_ones(counter, key, output):
    seed = key[0] | key[1] << 32
    seed = torch.tensor(seed - (seed >> 63 << 64))
    b, h, i, fourth = (torch.tensor(x) for x in counter)
    assert tuple(random_words(seed, b, h, i, 4 * fourth + torch.arange(4)).tolist()) == output


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_share_of_p_is_dropped_and_neighbours_do_not_agree_more_than_chance(p):
    kept = keep(torch.tensor(7), p, torch.tensor(0), torch.tensor(1), torch.arange(512).view(-1, 1), torch.arange(512))
    kept = kept.double()
    error = 4 * (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < error
    for shift in (1, 2, 4):
        for axis in (0, 1):
            both = (kept * kept.roll(shift, axis)).mean()
            assert abs(both - (1 - p) ** 2) < 2 * error
