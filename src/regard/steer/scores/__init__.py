"""Interventions on scores and weights: who attends to whom, and how much."""
