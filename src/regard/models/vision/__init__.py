"""Networks that read images: (B, channels, Y, X) to logits or a pyramid of features."""
