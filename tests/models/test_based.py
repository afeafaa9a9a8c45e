from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import regard
from regard import Based, GatedShortConv, OptionError, TaylorLinearAttention
from regard.bench.text.corpus import read_corpus
from regard.bench.training import Recipe, train
from regard.layers.attention import OpAttention
from regard.models.sequence.based import SIZES, based_layers
from tests.pairs import nats_of_pairs

OPTIONS = {
    "based": {"feature_dim": 4},
    "sliding_window": {"window": 5},
    "short_conv": {"expand": 2, "form": "based"},
}


def made(dtype=torch.float64, **options):
    torch.manual_seed(0)
    small = {"vocab": 11, "dim": 16, "depth": 5, "heads": 4, "hidden": 24, "options": OPTIONS, **options}
    return Based(dataclasses.replace(SIZES["based_360m"], mixer=based_layers(5, (1,)), **small)).to(dtype).eval()


def published():
    with torch.device("meta"):
        return regard.build("based_360m")


def test_the_layers_stand_where_they_were_published():
    kinds = [block.mixer for block in published().blocks]
    assert len(kinds) == 27
    assert [i for i, m in enumerate(kinds) if isinstance(m, TaylorLinearAttention)] == [1, 6, 11, 16, 21]
    assert [i for i, m in enumerate(kinds) if isinstance(m, OpAttention)] == [2, 7, 12, 17, 22]
    assert sum(isinstance(m, GatedShortConv) for m in kinds) == 17
    window = kinds[2]
    # 256 // 2 keys before the own one
    assert window.reach == 129 and window.rotary and (window.heads, window.head_dim) == (16, 64)


def test_it_has_the_published_parameters():
    model = published()
    d, vocab = 1024, 50264
    # a projection into twice 2 d, a kernel of 3 without bias, a projection back
    conv = (4 * d * d + 4 * d) + 3 * 2 * d + (2 * d * d + d)
    # queries and keys of 16 a head, values of 64
    taylor = 2 * d * 256 + 2 * d * d
    window, unit, norms = 4 * d * d, 3 * d * 2 * d, 2 * d
    count = sum(p.numel() for p in model.parameters())
    assert count == vocab * d + 17 * conv + 5 * taylor + 5 * window + 27 * (unit + norms) + d
    # called 360m
    assert count == 362_620_928


def test_a_state_has_the_features_times_the_width_and_one_and_the_window():
    model = published()
    taylor, window = model.blocks[1].mixer, model.blocks[2].mixer
    assert taylor.state_bytes(1, 10**6) == 4 * 16 * 153 * (64 + 1)
    assert window.state_bytes(1, 10**6) == 4 * 16 * 2 * 129 * 64
    assert model.state_bytes(1, 10**4) == model.state_bytes(1, 10**6)


def test_a_convolution_is_that_of_the_released_models():
    conv, x = made().blocks[0].mixer, torch.randn(2, 9, 16, dtype=torch.float64)
    inner = conv.up(x)
    want = torch.zeros_like(inner)
    for t in range(9):
        for back in range(min(3, t + 1)):
            want[:, t] += conv.conv.conv.weight[:, 0, 2 - back] * inner[:, t - back]
    want = conv.down(want * torch.sigmoid(want) * conv.gate(x))
    torch.testing.assert_close(conv(x, is_causal=True), want)
    assert conv.conv.conv.bias is None


@pytest.mark.parametrize("pieces", [(40,), (25, 15), (33, *([1] * 7))])
def test_prefill_and_steps_equal_the_parallel_form(pieces):
    model, ids = made(), torch.randint(11, (2, 40))
    with torch.no_grad():
        state, outs, at = model.init_state(2), [], 0
        for n in pieces:
            out, state = model.prefill(ids[:, at : at + n], state)
            outs.append(out)
            at += n
        torch.testing.assert_close(torch.cat(outs, 1), model(ids))
    assert state.size_bytes == model.state_bytes(2, 40) == model.state_bytes(2, 10**6)


def test_bad_settings_are_refused():
    with pytest.raises(OptionError, match="windows included"):
        made(is_causal=False)
    with pytest.raises(OptionError, match="at least 1 key"):
        made(options={**OPTIONS, "sliding_window": {"window": 0}})
    with pytest.raises(OptionError, match="do not fit at 26 of 27 layers"):
        based_layers(27, (1, 26))
    with pytest.raises(OptionError, match="do not fit at 2 of 9 layers"):
        based_layers(9, (1, 2))
    with pytest.raises(OptionError, match="'zoology' or 'based'"):
        made(options={**OPTIONS, "short_conv": {"form": "hyena"}})
    with pytest.warns(UserWarning, match="feature_dim 33"):
        made(options={**OPTIONS, "based": {"feature_dim": 33}})


@pytest.mark.slow
def test_based_on_text(tmp_path, record):
    corpus = read_corpus(seq_len=256)
    figures = {
        "task": "bytes of the Python standard library, length 256, width 64, 5 layers, 4 heads, window 32, 200 steps of "
        "8 rows"
    }
    small = {"dtype": torch.float32, "vocab": 257, "dim": 64, "hidden": 128}
    options = {**OPTIONS, "based": {"feature_dim": 8}, "sliding_window": {"window": 32}}
    for name, others in (("based", {}), ("convolutions alone", {"mixer": "short_conv"})):
        model = made(**small, options=options)
        if others:
            torch.manual_seed(0)
            model = Based(dataclasses.replace(model.settings, **others))
        recipe = Recipe(200, 8, 3e-3, 0, "bits_per_byte", name, 32, 128)
        outcome = train(model.train(), corpus, recipe, checkpoint=tmp_path / name)
        figures[name] = {"bits_per_byte": outcome.value, "seconds": outcome.seconds}
    rows = corpus.build("test", 128)
    asked = rows.targets >= 0
    nats = nats_of_pairs(corpus, rows.inputs[asked], rows.targets[asked])
    figures["table of pairs"] = {"bits_per_byte": nats / math.log(2)}
    record(figures)
    assert figures["based"]["bits_per_byte"] < figures["table of pairs"]["bits_per_byte"] - 0.3
