"""Ways to train: losses, regularisers, reparametrisations, schedules, distillation.

Belongs here: methods for any torch model: a loss is called with (model, batch) and returns named scalars.
Does not: training loops of our own, modules that stay in the model (layers), measuring (bench).
Look at: `distillation/seerattention.py`, which trains gates on what a frozen model attends to.
"""
