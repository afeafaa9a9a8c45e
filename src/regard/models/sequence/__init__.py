"""Models of token sequences: (B, N) ids to logits."""
