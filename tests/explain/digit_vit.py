"""Small vision transformers that read real digits, alone or in one of four cells of a larger image."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

CELL = 8


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) between 0 and 1, and labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    part = order[:1400] if split == "train" else order[1400:]
    return images[part], labels[part]


def in_a_cell(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image in one of four cells of noise: (n, 1, 16, 16), and the cell."""
    n = len(images)
    canvas = 0.3 * torch.rand(n, 1, 2 * CELL, 2 * CELL, generator=generator)
    cells = torch.randint(4, (n,), generator=generator)
    for i, cell in enumerate(cells.tolist()):
        y, x = CELL * (cell // 2), CELL * (cell % 2)
        canvas[i, :, y : y + CELL, x : x + CELL] = images[i]
    return canvas, cells


@lru_cache
def trained(*, steps: int, cells: bool, layers: int = 3, width: int = 48, seed: int = 0) -> ViTForImageClassification:
    """A classifier of ten digits with patches of 2 x 2 and four heads a layer, after so many steps of 64 images.

    Made once for all who ask alike.
    """
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=2 * CELL if cells else CELL, patch_size=2, num_channels=1, hidden_size=width, num_labels=10,
        intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    images, labels = digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,), generator=generator)
        batch = in_a_cell(images[rows], generator)[0] if cells else images[rows]
        loss = F.cross_entropy(model(batch).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad()
    return model.eval()
