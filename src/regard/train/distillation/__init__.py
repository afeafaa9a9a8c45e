"""Training a part on what a frozen model does."""
