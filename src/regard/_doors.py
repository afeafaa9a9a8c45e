"""Public names that no card exports: where each one is defined."""

from __future__ import annotations

DOORS: dict[str, str] = {
    "attend": "regard.ops.attend",
    "get": "regard.contract.names",
    "op": "regard.contract.names",
    "mixer": "regard.contract.names",
    "model": "regard.contract.names",
    "build": "regard.contract.names",
    "task": "regard.contract.names",
    "tiny": "regard.bench.proving",
    "why": "regard.contract.dispatch",
    "check": "regard.checks.battery",
    "steer": "regard.contract.attach",
    **dict.fromkeys(("record", "recording", "Tape"), "regard.hosts.tape"),
    **dict.fromkeys(("patch", "Edit"), "regard.hosts.patch"),
    "lens": "regard.hosts.lens",
    "swap": "regard.hosts.transformers.swap",
    **dict.fromkeys(("SequenceModel", "SequenceSettings"), "regard.models.sequence.shell"),
    **dict.fromkeys(("RegardForCausalLM", "RegardConfig"), "regard.models.sequence.pretrained"),
    **dict.fromkeys(("PoolingMatrix", "TextPairs", "pooling_matrix"), "regard.bench.text.trainable_pooling"),
    "collect_losses": "regard.contract.collect",
    "add_loss": "regard.contract.collect",
    **dict.fromkeys(
        (
            "Axial", "Band", "BlockCausal", "BlockGrid", "BlockLayout", "BlockLocal", "BlockSelection", "Blocks",
            "Causal", "DilatedWindow", "Documents", "Empty", "Explicit", "Full", "Geometry", "GridWindow", "Halo",
            "KeyValid", "Neighborhood", "Pattern", "PerHead", "Permuted", "Prefix", "SinkBand", "Sinks",
            "SlidingWindow", "Strided", "StridedBlocks", "TilePermutation", "TokenSelection", "Window", "tile_cost",
        ),
        "regard.patterns",
    ),
    **dict.fromkeys(("Softmax", "Sigmoid", "L1", "ReLUOverN", "Linear", "Sharpen"), "regard.primitives.normalisers"),
    "merge": "regard.primitives.merge",
    **dict.fromkeys(
        ("PeerLost", "SequenceParallel", "position_ids", "shard", "sum_gradients", "unshard"), "regard.parallel"
    ),
    **dict.fromkeys(
        ("RegardError", "ShapeError", "OptionError", "Unsupported", "MissingExtra", "UnknownName"),
        "regard.contract.errors",
    ),
}  # fmt: skip
