"""Parts with weights that several mixers and models share.

Belongs here: the attention layer, feed-forwards, causal convolutions, caches.
Does not: a system with a name of its own (mixers), functions without weights (primitives).
Look at: `attention.py`, the layer under every softmax-like mixer.
"""
