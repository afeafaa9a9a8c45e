"""Sequences that are longer than one process holds: every process has a part, and the result is that of the whole.

Belongs here: functions of q, k, v over a group of processes, what they exchange, the block that splits a model.
Does not: splitting of batches or weights (torch's DDP and FSDP do that), anything with weights.
Look at: `ring_self_attention.py` for a system, `exchange.py` for what travels, `sequence_parallel.py` for models.
"""

from regard.parallel.exchange import (
    PeerLost,
    all_to_all_heads,
    position_ids,
    ring_exchange,
    shard,
    sum_gradients,
    unshard,
)
from regard.parallel.lasp2 import allgather_attention, lasp2
from regard.parallel.ring_self_attention import ring_attention
from regard.parallel.sequence_parallel import SequenceParallel
from regard.parallel.unified_long_sequence import grid_attention

__all__ = [
    "PeerLost",
    "SequenceParallel",
    "all_to_all_heads",
    "allgather_attention",
    "grid_attention",
    "lasp2",
    "position_ids",
    "ring_attention",
    "ring_exchange",
    "shard",
    "sum_gradients",
    "unshard",
]
