"""Images of four cells, one of them a digit and three of them digits with shuffled pixels, and a network that reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL = 8


class Pasted:
    """Draws images (B, 1, 16, 16), their digits (B,) and cells (B,), of 1400 digits to learn from and of the others."""

    def __init__(self, seed: int = 0):
        from sklearn.datasets import load_digits

        data = load_digits()
        self.images, self.labels = torch.tensor(data.images).float() / 16, torch.tensor(data.target)
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=self.generator)
        self.train, self.test = order[:1400], order[1400:]

    def draw(self, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, generator = len(which), self.generator
        cells = torch.randint(4, (count,), generator=generator)
        shown = torch.zeros(count, 1, 2 * CELL, 2 * CELL)
        for cell in range(4):
            others = self.train[torch.randint(len(self.train), (count,), generator=generator)]
            pixels = torch.rand(count, CELL * CELL, generator=generator).argsort(1)
            clutter = self.images[others].flatten(1).gather(1, pixels).unflatten(1, (CELL, CELL))
            here = torch.where((cells == cell)[:, None, None], self.images[which], clutter)
            y, x = CELL * (cell // 2), CELL * (cell % 2)
            shown[:, 0, y : y + CELL, x : x + CELL] = here
        return shown, self.labels[which], cells


def network(bias: bool = True) -> nn.Sequential:
    def conv(a: int, b: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(a, b, 3, padding=1, stride=stride, bias=bias)

    parts = [conv(1, 24), nn.ReLU(), conv(24, 48, 2), nn.ReLU(), conv(48, 64), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10, bias=bias))


def trained(data: Pasted, epochs: int, bias: bool = True) -> nn.Sequential:
    """The network after some epochs, every time with new clutter."""
    torch.manual_seed(0)
    model, batch = network(bias), 64
    optimizer = torch.optim.Adam(model.parameters())
    steps = epochs * -(-len(data.train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(epochs):
        images, labels, _ = data.draw(data.train[torch.randperm(len(data.train), generator=data.generator)])
        for start in range(0, len(images), batch):
            loss = F.cross_entropy(model(images[start : start + batch]), labels[start : start + batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def read_rightly(model: nn.Module, data: Pasted, count: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Unseen images that the model reads rightly, `count` at most, and its share of right answers."""
    images, labels, cells = data.draw(data.test)
    with torch.no_grad():
        right = model(images).argmax(-1) == labels
    return images[right][:count], labels[right][:count], cells[right][:count], float(right.float().mean())


def pointed(maps: Tensor, cells: Tensor) -> float:
    """How often the largest value of a map (B, 1, h, w) lies in the digit's cell."""
    height, width = maps.shape[-2:]
    best = maps.flatten(1).argmax(1)
    found = best // width // (height // 2) * 2 + best % width // (width // 2)
    return float((found == cells).float().mean())


def mass(maps: Tensor, cells: Tensor) -> Tensor:
    """The share of a map's sum that lies in the digit's cell, (B,)."""
    height, width = maps.shape[-2:]
    parts = maps[:, 0].unflatten(2, (2, width // 2)).unflatten(1, (2, height // 2)).sum((2, 4)).flatten(1)
    return parts.gather(1, cells[:, None])[:, 0] / parts.sum(1)


def area(maps: Tensor, cells: Tensor) -> Tensor:
    """How many of a map's brightest places, as many as a cell has, lie in the digit's cell: a share, (B,)."""
    height, width = maps.shape[-2:]
    best = maps.flatten(1).topk(height * width // 4, 1).indices
    found = best // width // (height // 2) * 2 + best % width // (width // 2)
    return (found == cells[:, None]).float().mean(1)
