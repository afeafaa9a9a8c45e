"""Recall by states of fixed size: how many pairs the linear mixers keep, by MQAR."""

from pathlib import Path

import pytest
import torch

from regard.bench.recall.zoology import MQAR
from regard.bench.training import Recipe, train
from regard.models.sequence.shell import SequenceModel, SequenceSettings


def recalled(mixer, task, steps, folder, lr=1e-2, **options):
    """Held-out accuracy of a short convolution and a mixer, without feed-forwards, and how it was got."""
    torch.manual_seed(0)
    model = SequenceModel(
        SequenceSettings(
            vocab=task.vocab_size, dim=64, depth=2, heads=4, mixer=("short_conv", mixer), options={mixer: options},
            hidden=0,
        )
    )  # fmt: skip
    recipe = Recipe(steps, 64, lr, 0, "accuracy", mixer, 256, 1000, early_stop=True)
    outcome = train(model, task, recipe, checkpoint=Path(folder) / mixer)
    return {
        "accuracy": outcome.value, "steps": outcome.steps, "seconds": outcome.seconds,
        "state_bytes": model.blocks[1].mixer.state_bytes(1, task.seq_len),
    }  # fmt: skip


@pytest.mark.slow
def test_mqar_of_linear_mixers(tmp_path, record):
    task = MQAR(256, 64, 8)
    figures = {
        "task": "MQAR vocab 256, length 64, 8 pairs; conv + mixer, width 64, 4 heads; 64 rows a step, lr 1e-2, at most "
        "800 steps",
        "chance": task.chance,
    }
    for mixer in ("lightning", "linear", "flow"):
        figures[mixer] = recalled(mixer, task, 800, tmp_path)
        record(figures)
    assert figures["lightning"]["accuracy"] >= 0.85
    assert figures["linear"]["accuracy"] >= 0.85
    assert figures["flow"]["accuracy"] >= 0.6
