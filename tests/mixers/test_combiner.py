from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import CombinerAttention, OptionError, Unsupported, softmax_attention
from regard.layers.attention import OpAttention
from regard.models.sequence.shell import SequenceModel, SequenceSettings
from tests.oracles import normal


def layer(**options):
    torch.manual_seed(0)
    return CombinerAttention(16, 4, kv_heads=2, **options).double()


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("pieces", [(1,) * 14, (14,), (3, 3, 8), (5, 1, 2, 6)])
def test_decoding_from_spans_equals_the_parallel_form(pieces, pool, rotary):
    made, (x,) = layer(segment=3, pool=pool, rotary=rotary), normal((2, 14, 16))
    state, outs, at = made.init_state(2), [], 0
    for n in pieces:
        out, state = made.prefill(x[:, at : at + n], state)
        outs.append(out)
        at += n
        assert (state.core_k.shape[2], state.k.shape[2]) == divmod(at, 3)
        assert state.size_bytes == made.state_bytes(2, at)
    torch.testing.assert_close(torch.cat(outs, 1), made(x, is_causal=True))


def test_texts_shorter_than_a_segment_get_softmax_attention():
    made, (x,) = layer(segment=64), normal((2, 9, 16))
    plain = OpAttention(16, 4, op=softmax_attention, kv_heads=2, rotary=False).double()
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(x, is_causal=True), plain(x, is_causal=True))


def test_other_variants_mix_and_do_not_decode():
    (x,) = normal((2, 12, 16))
    for variant, shape in (("log", None), ("axial_mixture", (3, 4))):
        made = layer(variant=variant, shape=shape)
        assert made(x, is_causal=True).shape == x.shape
        with pytest.raises(Unsupported, match="does not decode; 'fixed' does"):
            made.init_state(1)


def test_what_cannot_be_is_refused():
    mask = torch.ones(2, 9, dtype=torch.bool)
    (x,) = normal((2, 9, 16))
    with pytest.raises(OptionError, match="at least 1 token, not 0"):
        layer(segment=0)
    with pytest.raises(OptionError, match="it is one of fixed"):
        layer(variant="rows")
    for name in ("padding", "reset"):
        with pytest.raises(Unsupported, match="combiner takes no"):
            layer(segment=3)(x, is_causal=True, **{name: mask})
    with pytest.raises(Unsupported, match="reads no context"):
        layer(segment=3)(x, x)


def needles(rows, generator, *, length=32, symbols=16):
    """A symbol first, noise of other symbols after it, and the question at the end: (ids, the first symbol)."""
    ids = torch.randint(symbols, 2 * symbols, (rows, length), generator=generator)
    ids[:, 0] = torch.randint(symbols, (rows,), generator=generator)
    ids[:, -1] = 2 * symbols
    return ids, ids[:, 0]


def trained(mixer, options, steps, reset=None):
    """Accuracy on fresh rows after training a model of two layers to say the first symbol at the end."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = SequenceModel(
        SequenceSettings(
            33, dim=48, depth=2, heads=4, mixer=mixer, options={mixer: options}, hidden=96, positions="sinusoid"
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(steps):
        ids, wanted = needles(64, generator)
        loss = F.cross_entropy(model(ids, reset=None if reset is None else reset.expand(64, -1))[:, -1], wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        ids, wanted = needles(1024, generator)
        out = model(ids, reset=None if reset is None else reset.expand(1024, -1))
        return (out[:, -1].argmax(-1) == wanted).float().mean().item()


@pytest.mark.slow
def test_combiner_copies_over_segments(record):
    # the baseline sees its own segment alone: documents of the length of a segment
    reset = torch.arange(32)[None] % 8 == 0
    figures = {
        "task": "the first of 32 tokens, one of 16 symbols, is asked for at the end; 2 layers, width 48, 500 steps of 64",
        "combiner, segments of 8": trained("combiner", {"segment": 8}, 500),
        "own segment of 8 only": trained("softmax", {"rotary": False}, 500, reset),
        "softmax": trained("softmax", {"rotary": False}, 500),
        "chance": 1 / 16,
    }
    record(figures)
    assert figures["combiner, segments of 8"] >= 0.95
    assert figures["own segment of 8 only"] <= 0.12
