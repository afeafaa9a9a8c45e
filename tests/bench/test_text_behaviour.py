"""Sigmoid attention on real text: the bias -ln n is what makes it train."""

import pytest
import torch

from regard.bench.text.corpus import read_corpus
from regard.bench.training import Recipe, train
from regard.models.sequence.shell import SequenceModel, SequenceSettings


@pytest.mark.slow
def test_sigmoid_bias_on_text(tmp_path, record):
    corpus = read_corpus(seq_len=512)
    figures = {
        "task": "bytes of the Python standard library, length 512, width 64, 2 layers, 4 heads, 600 steps of 8 rows"
    }
    settings = {
        "softmax": ("softmax", {"qk_norm": True}),
        "sigmoid, b = -ln n": ("sigmoid", {"length": 512}),
        "sigmoid, b = 0": ("sigmoid", {"length": 512, "sigmoid_bias": 0.0}),
    }
    for name, (mixer, options) in settings.items():
        torch.manual_seed(0)
        model = SequenceModel(
            SequenceSettings(vocab=257, dim=64, depth=2, heads=4, mixer=mixer, options={mixer: options}, hidden=168)
        )
        recipe = Recipe(600, 8, 3e-3, 0, "bits_per_byte", name, 32, 128)
        outcome = train(model, corpus, recipe, checkpoint=tmp_path / "none")
        figures[name] = {"bits_per_byte": outcome.value, "stopped": outcome.stopped, "seconds": outcome.seconds}
    record(figures)
    plain, off = figures["sigmoid, b = -ln n"], figures["sigmoid, b = 0"]
    assert plain["stopped"] == "steps"
    assert off["stopped"] == "diverged" or off["bits_per_byte"] > plain["bits_per_byte"] + 0.02
