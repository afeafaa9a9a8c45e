"""Train a small model on sequences of which every process holds a part.

    torchrun --standalone --nproc-per-node 2 examples/split_sequence.py
    python examples/split_sequence.py                # one process: the same losses

The second half of every sequence repeats the first. Two layers scan (LASP-2), two attend (ring attention); the model
itself knows nothing of processes. In float64, so that the losses can be compared digit by digit.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

import regard
from regard.parallel import SequenceParallel, shard

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=128, help="tokens, a multiple of the number of processes")
given = parser.parse_args()

if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
torch.set_default_dtype(torch.float64)

# the same weights and the same data on every process
torch.manual_seed(0)
settings = regard.SequenceSettings(vocab=16, dim=32, depth=4, heads=4, hidden=64, mixer=("linear", "softmax"))
model = regard.SequenceModel(settings)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(given.steps):
    half = torch.randint(settings.vocab, (4, given.length // 2))
    ids = torch.cat((half, half), 1)
    # the next token, and none to guess in the first half nor at the end
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets[:, : given.length // 2 - 1] = -100
    count = (targets != -100).sum()

    optimizer.zero_grad()
    with SequenceParallel(model) as split:
        logits = model(shard(ids, dim=1))
        wanted = shard(targets, dim=1)
        # this process's part of the mean: its own sum over the count of the whole sequence
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / count
        loss.backward()
    split.sum_gradients()
    optimizer.step()

    total = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"step {step:3d}  loss {total.item():.10f}", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
