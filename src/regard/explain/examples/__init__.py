"""Answers told by examples: images that a network answers to, made or found among those it has learned from.

Belongs here: sampling and retrieval that show what an answer looks like. Does not: maps of one image (saliency).
Look at: `ppgn.py`, whose generator, encoder and condition are any functions of tensors.
"""
