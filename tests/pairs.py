"""The bar that a language model has to pass: a table of which token follows which."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.bench.text.corpus import Corpus


def nats_of_pairs(corpus: Corpus, before: Tensor, after: Tensor) -> float:
    """Mean nats of the tokens `after` the tokens `before`, by counts of the training text with one added to each."""
    stream, size = corpus.streams["train"].long(), corpus.vocab_size
    counts = torch.ones(size, size).index_put_((stream[:-1], stream[1:]), torch.tensor(1.0), accumulate=True)
    return -(counts / counts.sum(1, keepdim=True)).log()[before, after].mean().item()
