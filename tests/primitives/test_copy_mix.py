"""The mixture of writing and copying, against a loop."""

import pytest
import torch

from regard import ShapeError
from regard.primitives.copy_mix import copy_mix


def made(seed=0, lead=(2, 3), vocab=9, places=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(*lead, vocab, generator=generator, dtype=dtype).softmax(-1)
    weights = torch.rand(*lead, places, generator=generator, dtype=dtype).softmax(-1)
    ids = torch.randint(0, vocab - 2, (*lead, places), generator=generator)
    return p, weights, ids, torch.rand(*lead, generator=generator, dtype=dtype)


def test_repeated_words_add_up():
    p, weights, ids, gate = made()
    found = copy_mix(p, weights, ids, gate)
    for b in range(2):
        for n in range(3):
            g = float(gate[b, n])
            wanted = [(1 - g) * float(x) for x in p[b, n]]
            for w, i in zip(weights[b, n].tolist(), ids[b, n].tolist(), strict=True):
                wanted[i] += g * w
            assert found[b, n].tolist() == pytest.approx(wanted, abs=1e-12)
    assert any(len(set(row)) < len(row) for row in ids.flatten(0, 1).tolist())
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def test_words_that_stand_nowhere_keep_their_share_to_the_bit():
    p, weights, ids, gate = made(dtype=torch.float32)
    found = copy_mix(p, weights, ids, gate)
    assert torch.equal(found[..., -2:], (1 - gate.unsqueeze(-1)) * p[..., -2:])


def test_gates_of_nought_and_one():
    p, weights, ids, gate = made()
    assert torch.equal(copy_mix(p, weights, ids, torch.zeros_like(gate)), p)
    copied = copy_mix(p, weights, ids, torch.ones_like(gate))
    assert torch.equal(copied[..., -2:], torch.zeros(2, 3, 2, dtype=torch.float64))


def test_gradients():
    p, weights, ids, gate = made(lead=(2,), vocab=4, places=3)
    tensors = [x.requires_grad_() for x in (p, weights, gate)]
    assert torch.autograd.gradcheck(lambda p, w, g: copy_mix(p, w, ids.clamp(max=3), g), tensors)


def test_the_wider_precision_wins():
    p, weights, ids, gate = made(dtype=torch.float32)
    assert copy_mix(p.bfloat16(), weights, ids, gate).dtype == torch.float32


def test_shapes_that_do_not_fit():
    p, weights, ids, gate = made()
    for wrong in ((p, weights[..., :-1], ids, gate), (p[:1], weights, ids, gate), (p, weights, ids, gate[..., None])):
        with pytest.raises(ShapeError, match="do not fit"):
            copy_mix(*wrong)
