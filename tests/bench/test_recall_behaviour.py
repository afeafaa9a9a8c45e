"""MQAR tells mechanisms apart: what the paper reports, at a size for two cores."""

import tempfile
from pathlib import Path

import pytest
import torch

from regard.bench.recall.zoology import MQAR
from regard.bench.training import Recipe, train
from regard.models.sequence.shell import SequenceModel, SequenceSettings


def model(mixer, vocab=256, **options):
    torch.manual_seed(0)
    return SequenceModel(
        SequenceSettings(
            vocab=vocab, dim=64, depth=2, heads=4, mixer=("short_conv", mixer), options={mixer: options}, hidden=0
        )
    )


def mean_only():
    # without a query all scores are equal: the mean of the prefix
    made = model("softmax")
    attention = made.blocks[1].mixer
    torch.nn.init.zeros_(attention.to_q.weight)
    attention.to_q.weight.requires_grad_(False)
    return made


def run(made, task, steps, tmp_path, lr=1e-2):
    recipe = Recipe(steps, 64, lr, 0, "accuracy", "recall", 256, 1000, early_stop=True)
    # a file of its own: a run goes on from a checkpoint that fits
    outcome = train(made, task, recipe, checkpoint=Path(tempfile.mkdtemp(dir=tmp_path)) / "run")
    return {"accuracy": outcome.value, "steps": outcome.steps, "seconds": outcome.seconds}


def test_a_short_convolution_and_softmax_recall_and_a_mean_does_not(tmp_path):
    task = MQAR(64, 16, 2)
    torch.manual_seed(0)
    solver = run(model("softmax", 64), task, 300, tmp_path)
    assert solver["accuracy"] > 0.9
    aaren = run(model("aaren", 64), task, 300, tmp_path)
    assert aaren["accuracy"] < 0.75
    assert aaren["accuracy"] > 2 * task.chance


@pytest.mark.slow
def test_mqar_small_cell(tmp_path, record):
    task = MQAR(256, 64, 8)
    figures = {
        "task": "MQAR vocab 256, length 64, 8 pairs; 64 rows a step, lr 1e-2, at most 1000 steps (window and mean: 1500)",
        "conv + softmax": run(model("softmax"), task, 1000, tmp_path),
        "conv + based (feature_dim 8)": run(model("based", feature_dim=8), task, 1000, tmp_path),
        "conv + sliding_window (8)": run(model("sliding_window", window=8), task, 1500, tmp_path),
        "conv + aaren": run(model("aaren"), task, 1500, tmp_path),
        "conv + mean of the prefix": run(mean_only(), task, 1500, tmp_path),
        "chance": task.chance,
    }
    record(figures)
    assert figures["conv + softmax"]["accuracy"] >= 0.99
    assert figures["conv + based (feature_dim 8)"]["accuracy"] >= 0.98
    assert figures["conv + sliding_window (8)"]["accuracy"] <= 0.2
    assert figures["conv + aaren"]["accuracy"] <= 0.5
    assert figures["conv + mean of the prefix"]["accuracy"] <= 0.5
