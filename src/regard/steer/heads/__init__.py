"""Interventions on the outputs of heads and layers: which of them take part, and how much."""
