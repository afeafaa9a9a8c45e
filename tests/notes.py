"""The notes task: keys with values somewhere in noise, and at the end a key whose value is asked for.

    . . k3 v3 . . . k1 v1 . . k2 v2 . . . . k1 -> v1

One note among several is asked for, so that copying the only value in sight does not solve it; chance is 1 / notes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE, KEYS = 32, 32
VOCAB = NOISE + 2 * KEYS
IGNORED = -100


def note_rows(
    rows: int, length: int, *, notes: int = 8, asks: int = 1, repeats: int = 1, until: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """ids and targets (rows, length). repeats: a note is a passage of so many equal pairs. until: notes stand before."""
    g = torch.Generator().manual_seed(seed)
    body, span = length - 2 * asks, 2 * repeats
    room = body if until is None else until
    ids = torch.randint(NOISE, (rows, length), generator=g)
    targets = torch.full_like(ids, IGNORED)
    keys = torch.rand(rows, KEYS, generator=g).argsort(1)[:, :notes] + NOISE
    values = torch.rand(rows, KEYS, generator=g).argsort(1)[:, :notes] + NOISE + KEYS
    slots = room // span
    place = torch.rand(rows, slots, generator=g).argsort(1)[:, :notes] * span
    place = place + torch.randint(room - slots * span + 1, (rows, 1), generator=g)
    for r in range(repeats):
        ids.scatter_(1, place + 2 * r, keys)
        ids.scatter_(1, place + 2 * r + 1, values)
    who = torch.rand(rows, notes, generator=g).argsort(1)[:, :asks]
    ids[:, body::2], ids[:, body + 1 :: 2] = keys.gather(1, who), values.gather(1, who)
    targets[:, body::2] = ids[:, body + 1 :: 2]
    return ids, targets


def train_on(model, make, steps, *, lr, stop, warm_up=50):
    """AdamW on make(step) -> ids, targets, until the running accuracy passes `stop`; gives it and the steps made."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    running = 0.0
    for step in range(steps):
        ids, targets = make(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm_up)
        asked = targets != IGNORED
        logits = model.head(model.hidden(ids)[asked])
        optimizer.zero_grad()
        F.cross_entropy(logits, targets[asked]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.95 * running + 0.05 * float((logits.argmax(-1) == targets[asked]).float().mean())
        if running > stop:
            break
    return running, step + 1


@torch.no_grad()
def answered(model, ids: Tensor, targets: Tensor, rows: int = 8) -> float:
    """The share of asked values that the model gives."""
    hits = 0
    for some, wanted in zip(ids.split(rows), targets.split(rows), strict=True):
        asked = wanted != IGNORED
        hits += int((model.head(model.hidden(some)[asked]).argmax(-1) == wanted[asked]).sum())
    return hits / int((targets != IGNORED).sum())
