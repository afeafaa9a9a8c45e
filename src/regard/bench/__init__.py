"""Measuring: tasks, training runs, timings, results, reports.

Belongs here: tasks with a seeded generator and a metric, `compare` and what it needs. Systems are reached by name.
Does not: a mechanism, a training method (train).
Look at: `recall/zoology.py` for a task, `results.py` for what a measurement is.
"""
